"""Changes at the wrong moment, or of the wrong kind: what the user meant stands, and nothing that
was not proved is ever gone back to.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from supervisor_synapse import commit as commits
from supervisor_synapse import config, discovery
from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters import generations, registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core.trials import DISCOVER, Generation
from tests.integration.harness import Deployment, holds_for, promised, wait_until
from tests.integration.test_changes import (
    BACK_SECONDS,
    SETTINGS,
    _are_proved,
    arguments,
    block,
    edit,
    proved,
)

pytestmark = pytest.mark.usefixtures("llama_server")


def test_a_model_stopped_by_hand_stays_stopped_when_its_edited_block_is_updated() -> None:
    """`update` replaces its program; that is no reason to start it. A start by hand is."""
    with proved("beta") as at:
        at.ctl("stop", "beta")
        at.wait_for_rows({"beta": "stopped"})
        # So long that it can be told from the stop of an `update`.
        assert holds_for(lambda: at.rows()["beta"]["phase"] == "stopped", 3.5)
        edit(at, "beta", "--temp 0.5")
        at.ctl("update")
        assert holds_for(lambda: at.rows().get("beta", {}).get("phase") in (None, "stopped"), 4)
        edit(at, "beta", "--top-k 3")
        at.ctl("update")
        assert holds_for(lambda: at.rows().get("beta", {}).get("phase") in (None, "stopped"), 4)
        at.ctl("start", "beta")
        at.wait_for_rows({"beta": "ready"})
        assert {"--temp", "--top-k"} <= set(at.servers()["beta"].cmdline())


def test_a_model_whose_block_was_away_for_a_while_starts_again() -> None:
    """`update` stopped it, and nobody by hand. Gone means: for longer than an `update` takes."""
    with proved("beta") as at:
        text = block(at, "beta").read_text()
        block(at, "beta").unlink()
        at.ctl("update")
        wait_until(lambda: "beta" not in at.rows(), promised(BACK_SECONDS), "gone")
        block(at, "beta").write_text(text)
        at.ctl("update")
        at.wait_for_rows({"beta": "ready"}, promised(BACK_SECONDS))


def test_a_block_that_supervisord_does_not_hold_is_not_proved_by_what_it_does() -> None:
    """Its environment was edited at rest and not updated: what runs then is still the old one. Once
    updated it fails, and there is a way back.
    """
    with proved("beta") as at:
        former = block(at, "beta").read_text()
        at.ctl("stop", "beta")
        at.wait_for_rows({"beta": "stopped"})
        bad = re.sub(
            r"^(environment=.*)$", r'\1,LLAMA_ARG_N_PREDICT="many"', former, flags=re.MULTILINE
        )
        assert bad != former
        block(at, "beta").write_text(bad)
        # The listener has looked, and has tried again.
        assert holds_for(lambda: block(at, "beta").read_text() == bad, 4)
        at.ctl("start", "beta")
        at.wait_for_rows({"beta": "ready"})
        known = len(at.synapse("generations", "beta", "--json").json())
        assert holds_for(lambda: at.rows()["beta"]["phase"] == "ready", 4)
        at.ctl("update")
        wait_until(
            lambda: block(at, "beta").read_text() == former and _are_proved(at, ("beta",)),
            promised(BACK_SECONDS), f"{at.rows()}",
        )  # fmt: skip
        assert known == 1


def test_an_edit_that_was_updated_and_started_at_once_is_a_generation_too() -> None:
    """It never was at rest for long, and can be gone back from."""
    with proved("beta") as at:
        former = block(at, "beta").read_text()
        edit(at, "beta", "--temp 0.5")
        at.ctl("update")
        at.ctl("start", "beta", expect=None)
        wait_until(lambda: len(_generations(at)) == 2, promised(BACK_SECONDS), "taken note of")
        at.synapse("rollback", "beta")
        assert block(at, "beta").read_text() == former
        wait_until(
            lambda: _are_proved(at, ("beta",)) and "--temp" not in arguments(at, "beta"),
            promised(BACK_SECONDS), f"{at.rows()}",
        )  # fmt: skip


def test_a_control_character_in_an_edited_block_costs_that_model_nothing_but_the_edit() -> None:
    """supervisord cannot tell such a command in XML; it fails, and goes back, as any other."""
    with proved("alpha", "beta") as at:
        former, pid = block(at, "beta").read_text(), at.pids()["alpha"]
        edit(at, "beta", "'--x\x1b[31m'")
        at.ctl("update", expect=None)
        wait_until(
            lambda: block(at, "beta").read_text() == former and _are_proved(at, ("alpha", "beta")),
            promised(BACK_SECONDS), f"{at.rows()}",
        )  # fmt: skip
        assert at.pids()["alpha"] == pid
        head = (at.conf_d / "beta.conf.rejected").read_text().split("[program:")[0]
        assert "bad-argument" in head
        assert "\x1b" not in head + at.rows()["beta"]["reason"] + at.synapse("generations").out


def test_a_block_that_was_broken_while_nothing_ran_keeps_nobody_from_starting() -> None:
    """It is set aside with file and line. A stranger's stays, and is named."""
    with proved("alpha", "beta") as at:
        former = block(at, "beta").read_text()
        at.down()
        block(at, "beta").write_text("[program:beta\ncommand=/bin/true\n")
        strange = at.conf_d / "strange.conf"
        strange.write_text("[program:strange\n")
        done = at.synapse("up", "--detach", expect=None)
        assert done.status != 0
        assert "strange.conf, line 1" in done.err
        assert strange.read_text() == "[program:strange\n"
        strange.unlink()
        at.synapse("up", "--detach")
        assert block(at, "beta").read_text() == former
        assert "beta.conf, line 1" in (at.conf_d / "beta.conf.rejected").read_text()
        at.wait_for_rows({"alpha": "ready", "beta": "ready"})
        assert "beta.conf, line 1" in at.rows()["beta"]["reason"]


def _generations(at: Deployment) -> list[object]:
    found: list[object] = at.synapse("generations", "beta", "--json").json()
    return found


def test_a_change_whose_writer_was_killed_before_the_blocks_is_carried_out() -> None:
    """The listener looks meanwhile: that supervisord holds what is on disk is not yet the end."""
    with proved("beta") as at:
        at.configure(f"{SETTINGS}\n[model:beta]\ncontext = 256")
        # In a process of its own: where models are is read once, from the environment.
        at.run(sys.executable, "-c", _WRITER, str(_ROOT), str(at.prefix))
        wait_until(lambda: _serves_with(at, 256), promised(BACK_SECONDS), f"{at.rows()}")


_ROOT = Path(__file__).parents[2]
_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.integration.test_changes_attacked import write_ahead
write_ahead(sys.argv[2])
"""


def write_ahead(prefix: str) -> None:
    """Hold the lock for so long that the listener has looked at what was written."""
    of = deployments.choose(prefix)
    with commits.locked(of):
        _write_ahead(of)
        time.sleep(2.5)


def _write_ahead(of: deployments.Deployment) -> None:
    """What a discovery does before it writes the first block."""
    found = discovery.discover(of, config.load(of.settings), Supervisord(of.socket))
    texts = {name: one.text for name, one in found.blocks.items()}
    written = commits.kept_of(found.registry, texts, found.changes.changed)
    assert [one.name for one in written] == ["beta"]
    generations.keep(of, written)
    digests = {one.name: one.digest for one in written}
    number = found.registry.generation
    generations.record(
        of, Generation(number, time.time(), DISCOVER, "", digests, changed=("beta",))
    )
    registry.save(of.registry, replace(found.registry, untold=digests))


def _serves_with(at: Deployment, context: int) -> bool:
    server = at.servers().get("beta")
    words = server.cmdline() if server is not None else []
    return f"--ctx-size {context}" in " ".join(words) and at.rows()["beta"]["phase"] == "ready"
