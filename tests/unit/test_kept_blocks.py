"""Blocks that are kept, and the broken ones that they take the place of."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor_synapse import commit as commits
from supervisor_synapse import rollback
from supervisor_synapse.adapters import generations
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import Kept
from supervisor_synapse.core.model import Failure, FailureClass
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.trials import Standing
from tests.unit.builders import program

BROKEN, APPLIED = "[program:a\n", "[program:a]\ncommand=/bin/true\n"
FAILURE = Failure(FailureClass.BAD_ARGUMENT, "a.conf, line 1", 0.0)


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    found = Deployment(tmp_path)
    for folder in (found.blocks, found.lib, found.run):
        folder.mkdir(parents=True)
    choice = Choice(8100, context=0, device="", fitted=False, basis="")
    kept = Kept("a", APPLIED, True, program(name="a"), choice)
    generations.keep(found, [kept])
    generations.save_standings(found, {"a": Standing(kept.digest, 1)})
    return found


def test_the_broken_one_is_left_beside_with_the_reason(deployment: Deployment) -> None:
    path = deployment.block("a")
    path.write_text(BROKEN)
    rollback.set_aside(deployment, "a", commits.digest_of(BROKEN.encode()), FAILURE)
    assert path.read_text() == APPLIED
    beside = deployment.rejected("a").read_text()
    assert beside.endswith(BROKEN)
    assert "a.conf, line 1" in beside


def test_what_was_mended_since_somebody_looked_stays(deployment: Deployment) -> None:
    path, mended = deployment.block("a"), f"{APPLIED}priority=5\n"
    path.write_text(mended)
    rollback.set_aside(deployment, "a", commits.digest_of(BROKEN.encode()), FAILURE)
    assert path.read_text() == mended
    assert not deployment.rejected("a").exists()


def test_a_kept_block_that_was_torn_is_kept_anew(deployment: Deployment) -> None:
    """Else there is no way back to a block that serves, though its text is at hand."""
    [path] = deployment.kept_blocks.glob("*.json")
    whole = generations.kept(deployment, path.stem)
    assert whole is not None
    path.write_text("{")
    generations.keep(deployment, [whole])
    assert generations.kept(deployment, path.stem) == whole
