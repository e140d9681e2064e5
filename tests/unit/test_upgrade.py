"""A deployment as the first layout wrote it, read by the code of today.

It knew no generations, no trials, and nobody that is still to be told. Its files are under
data/first_layout as that code left them, with paths and digests put in by name: three models that
were served, of which beta was edited by hand and gamma disabled by command, and a swap under way.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import config, deploy, discovery, revise, rollback
from supervisor_synapse.adapters import (
    deployment as deployments,
)
from supervisor_synapse.adapters import (
    engine as engines,
)
from supervisor_synapse.adapters import footprints, generations, intent, journal, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core import trials
from supervisor_synapse.core.changes import Changes
from supervisor_synapse.core.model import Failure, FailureClass
from supervisor_synapse.core.swap import Step, Swap
from supervisor_synapse.errors import ConfigError
from tests.gguf_factory import write_model
from tests.unit.applied import on_disk

FIRST_LAYOUT = Path(__file__).parent / "data" / "first_layout"
NAMES = ("alpha", "beta", "gamma")
PORTS = {"alpha": 18140, "beta": 18141, "gamma": 18142}
FAILURE = Failure(FailureClass.BAD_ARGUMENT, "error: invalid argument", 1700000000.0)


@dataclass(frozen=True)
class Old:
    """The deployment on disk, and the folder of its models."""

    deployment: Deployment
    models: Path

    def discover(self, forced: tuple[str, ...] = ()) -> tuple[Changes, tuple[str, ...]]:
        """As `synapse discover` does, with no supervisord about; and what it says."""
        deployments.require_laid_down(self.deployment)
        deploy.initialize(self.deployment)
        settings = config.load(self.deployment.settings)
        found = discovery.discover(self.deployment, settings, None, forced)
        said: list[str] = []
        deploy.apply(self.deployment, found, None, said.append)
        return found.changes, tuple(said)

    def texts(self) -> dict[str, bytes]:
        return {name: self.deployment.block(name).read_bytes() for name in NAMES}

    def stamps(self) -> dict[str, tuple[int, int]]:
        found = {name: self.deployment.block(name).stat() for name in NAMES}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}

    def edit(self, name: str, words: str) -> None:
        path = self.deployment.block(name)
        path.write_text(re.sub(r"^(command=.*)$", rf"\1 {words}", path.read_text(), flags=re.M))


@pytest.fixture
def old(tmp_path: Path, llama_server: object) -> Old:
    """The engine is the one of today: a new one changes blocks, and rightly so."""
    prefix, models = tmp_path / "at", tmp_path / "models"
    models.mkdir()
    for name in NAMES:
        write_model(models / f"{name}.gguf")
    values = {
        "@PREFIX@": str(prefix), "@MODELS@": str(models), "@ENGINE@": engines.locate("auto"),
        "@BIN@/synapse-run": " ".join(deployments.launcher_command()),
        "@BIN@/synapse": " ".join(deployments.own_command()),
    }  # fmt: skip
    blocks = {name: FIRST_LAYOUT / "etc" / "conf.d" / f"{name}.conf" for name in NAMES}
    for name, path in blocks.items():
        text = _filled(path.read_text(), values)
        values[f"@DIGEST {name}@"] = hashlib.sha256(text.encode()).hexdigest()
    for folder in ("etc/conf.d", "etc/templates", "var/lib", "var/log", "var/run", "var/models"):
        (prefix / folder).mkdir(parents=True, mode=0o700)
    for path in FIRST_LAYOUT.rglob("*.*"):
        if path.is_file():
            copied = prefix / path.relative_to(FIRST_LAYOUT)
            copied.write_text(_filled(path.read_text(), values))
    found = Old(Deployment(prefix), models)
    found.edit("beta", "--no-warmup")
    return found


def _filled(text: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def without_new_keys(new: Any, old: Any) -> Any:
    """Of JSON, what the first layout knew of."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: without_new_keys(new.get(key), value) for key, value in old.items()}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [without_new_keys(*pair) for pair in zip(new, old, strict=True)]
    return new


def test_what_is_under_test_is_the_first_layout(old: Old) -> None:
    value = json.loads(old.deployment.registry.read_text())
    assert value["version"] == 1
    assert "untold" not in value
    assert not old.deployment.trials.exists()
    assert not old.deployment.generations.exists()


def test_all_state_is_read_as_it_was_written(old: Old) -> None:
    deployment = old.deployment
    before = json.loads(deployment.registry.read_text())
    found = registry.load(deployment.registry)
    assert {entry.name: entry.choice.port for entry in found.entries.values()} == PORTS
    registry.save(deployment.registry, found)
    assert without_new_keys(json.loads(deployment.registry.read_text()), before) == before
    assert intent.load(deployment.intent) == {"gamma": False}
    assert journal.load(deployment.journal) == (
        Swap("e-1", "alpha", "gamma", Step.NEW_FIRST, together=True, old_served=True),
    )
    assert len(footprints.load(deployment.footprints).by_key) == 3
    assert list(deployment.prefix.rglob("*.corrupt")) == []


def test_a_discovery_changes_nothing_that_runs_and_standings_come_to_be(old: Old) -> None:
    stamps, texts = old.stamps(), old.texts()
    remembered = old.deployment.footprints.read_bytes()
    changes, _ = old.discover()
    assert not changes
    assert changes.kept == ("beta",)
    assert (old.stamps(), old.texts()) == (stamps, texts)
    found = registry.load(old.deployment.registry)
    assert {entry.name: entry.choice.port for entry in found.entries.values()} == PORTS
    assert found.generation == 1
    assert found.untold == {}
    assert old.deployment.footprints.read_bytes() == remembered
    standings = generations.standings(old.deployment)
    for name in ("alpha", "gamma"):
        assert standings[name].digest == hashlib.sha256(texts[name]).hexdigest()
        assert generations.kept(old.deployment, standings[name].digest) is not None


def test_what_was_edited_by_hand_is_taken_note_of(old: Old) -> None:
    """As the listener does, when it sees that supervisord holds it."""
    texts = old.texts()
    old.discover()
    revise.adopt(old.deployment, on_disk(old.deployment, "beta"))
    standing = generations.standings(old.deployment)["beta"]
    assert standing.digest == hashlib.sha256(texts["beta"]).hexdigest()
    assert old.texts() == texts
    changes, _ = old.discover()
    assert (bool(changes), changes.kept) == (False, ("beta",))


@pytest.mark.parametrize("how", ["edited", "discovered"])
def test_the_next_change_can_be_taken_back(old: Old, how: str) -> None:
    texts = old.texts()
    old.discover()
    revise.adopt(old.deployment, on_disk(old.deployment, "beta"))
    for name, standing in generations.standings(old.deployment).items():
        rollback.bless(old.deployment, name, standing.digest)
    if how == "edited":
        old.edit("alpha", "--nonsense")
        revise.adopt(old.deployment, on_disk(old.deployment, "alpha"))
    else:
        settings = old.deployment.settings
        settings.write_text(settings.read_text() + "[model:alpha]\nparallel = 2\n")
        changes, _ = old.discover()
        assert changes.changed == ("alpha",)
    standing = generations.standings(old.deployment)["alpha"]
    assert standing.on_trial
    assert standing.former is not None
    rollback.roll_back(old.deployment, "alpha", left=standing.digest, failure=FAILURE)
    assert old.texts() == texts
    assert not generations.standings(old.deployment)["alpha"].on_trial


def test_before_any_discovery_a_command_finds_nothing_and_harms_nothing(old: Old) -> None:
    """The listener may be new while nobody has discovered yet."""
    texts = old.texts()
    with pytest.raises(ConfigError, match="alpha: there is no such model"):
        rollback.roll_back(old.deployment, "alpha")
    rollback.bless(old.deployment, "alpha", "x")
    revise.adopt(old.deployment, on_disk(old.deployment, "alpha", "beta"))
    found = generations.load(old.deployment, 2)
    assert found is not None
    assert (found.surface, found.changed) == (trials.UPDATE, ("alpha", "beta"))
    assert found.why == "edited by hand"
    assert old.texts() == texts
    shutil.rmtree(old.deployment.kept_blocks)
    changes, _ = old.discover()
    assert not changes
