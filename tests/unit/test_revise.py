"""Changes of single models while a supervisord is about, which answers by script."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import commit as commits
from supervisor_synapse import revise, rollback
from supervisor_synapse.adapters import generations, registry
from supervisor_synapse.adapters.supervisord import Fault
from supervisor_synapse.core import trials
from supervisor_synapse.core.model import ProcessState
from supervisor_synapse.errors import ConfigError, RollbackFailed, ShuttingDown, TransientError
from tests.unit import scripted
from tests.unit.applied import FAILURE, Applied, on_disk, tiny
from tests.unit.test_supervisord import PROCESS


@dataclass
class Scripted:
    """A supervisord that holds blocks, and takes up those on disk when it is told to.

    `held`: digest by program name; `up`: those that run; `faults`: what it answers, by method.
    """

    at: Applied
    held: dict[str, str] = field(default_factory=dict)
    up: set[str] = field(default_factory=set)
    faults: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def answer(self, connection: socket.socket, request: bytes) -> None:
        arguments, method = xmlrpc.client.loads(request.partition(b"\r\n\r\n")[2])
        short = str(method).partition(".")[2]
        name = str(arguments[0]) if arguments else ""
        self.calls.append(f"{short} {name}".strip())
        fault = self.faults.get(short) or self.faults.get(f"{short} {name}")
        value: Any = xmlrpc.client.Fault(int(fault), "SAID") if fault else self._do(short, name)
        if not isinstance(value, xmlrpc.client.Fault):
            value = (value,)
        body = xmlrpc.client.dumps(value, methodresponse=True).encode()
        scripted.http(200, body)(connection, request)

    def _do(self, method: str, name: str) -> Any:
        there = self.at.on_disk()
        match method:
            case "getSupervisorVersion":
                return "4.3.0"
            case "reloadConfig":
                added = sorted(set(there) - set(self.held))
                changed = [one for one in self.held if there.get(one, "") != self.held[one]]
                gone = sorted(set(self.held) - set(there))
                return [[added, [one for one in changed if one in there], gone]]
            case "getProcessInfo":
                if name not in self.held:
                    return xmlrpc.client.Fault(int(Fault.BAD_NAME), "BAD_NAME")
                state = ProcessState.RUNNING if name in self.up else ProcessState.STOPPED
                pid = 4711 if name in self.up else 0
                return PROCESS | {"name": name, "group": name, "state": state.value, "pid": pid}
            case "removeProcessGroup":
                assert name not in self.up
                del self.held[name]
                return True
            case "addProcessGroup":
                self.held[name] = there[name]
                return True
        raise AssertionError(method)


@pytest.fixture
def at() -> Iterator[Applied]:
    """alpha has a former good block, beta and gamma are good; in a short path, as sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    found = Applied.at(folder / "at")
    others = (tiny("beta", port=8101), tiny("gamma", port=8102))
    found.discover(tiny("alpha"), *others)
    found.prove("alpha", "beta", "gamma")
    found.discover(tiny("alpha", "--mlock"), *others)
    yield found
    shutil.rmtree(folder)


@pytest.fixture
def supervisord(at: Applied) -> Iterator[Scripted]:
    """It holds what is applied, and nothing runs."""
    found = Scripted(at, at.on_disk())
    with scripted.on_unix_socket(at.deployment.socket, found.answer):
        yield found


def good(at: Applied, name: str = "alpha") -> list[str]:
    return [one.digest for one in at.standings()[name].good]


# --- going back ----------------------------------------------------------------------------------


def test_the_former_good_block_is_on_disk_and_in_supervisord(
    at: Applied, supervisord: Scripted
) -> None:
    failed = at.standings()["alpha"].digest
    said = rollback.roll_back(at.deployment, "alpha", left=failed, failure=FAILURE)
    assert said == "alpha: has its former block again, as generation 3"
    standing = at.standings()["alpha"]
    assert standing.digest == at.on_disk()["alpha"] == supervisord.held["alpha"] == good(at)[-1]
    assert not standing.on_trial
    rejection = standing.rejection(failed)
    assert rejection is not None
    assert (rejection.failure, rejection.generation) == (FAILURE, 2)
    assert at.registry().untold == {}
    assert "--mlock" not in at.registry().programs[0].arguments


def test_what_failed_is_left_beside_with_the_reason_on_top(
    at: Applied, supervisord: Scripted
) -> None:
    text = at.deployment.block("alpha").read_text()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    beside = at.deployment.rejected("alpha").read_text()
    assert beside.endswith(text)
    head = beside.removesuffix(text).splitlines()
    assert all(line.startswith("; ") for line in head)
    assert FAILURE.message in head[1]


@pytest.mark.parametrize(
    "message", ["a\n[program:evil]\r\ncommand=x", "\u2028\0\x1b[31m", "x" * 9999]
)
def test_what_a_server_printed_opens_no_line_there(
    at: Applied, supervisord: Scripted, message: str
) -> None:
    text = at.deployment.block("alpha").read_text()
    failure = replace(FAILURE, message=message)
    rollback.roll_back(at.deployment, "alpha", failure=failure)
    head = at.deployment.rejected("alpha").read_text().removesuffix(text)
    assert len(head.splitlines()) == 3
    assert head.replace("\n", "").isprintable()
    assert len(head) < 2000


def test_a_model_that_runs_is_told_later(at: Applied, supervisord: Scripted) -> None:
    """It has to stop first, and that the listener decides."""
    supervisord.up = {"alpha"}
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert set(at.registry().untold) == {"alpha"}
    assert "removeProcessGroup alpha" not in supervisord.calls
    supervisord.up = set()
    rollback.renew(at.deployment, ["alpha"])
    assert supervisord.held["alpha"] == at.on_disk()["alpha"]
    assert at.registry().untold == {}


def test_nobody_else_is_touched(at: Applied, supervisord: Scripted) -> None:
    before = at.on_disk()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    after = at.on_disk()
    assert {name for name in before if before[name] != after[name]} == {"alpha"}
    assert not [call for call in supervisord.calls if "beta" in call or "gamma" in call]


def test_the_same_command_twice_is_one_rollback(at: Applied, supervisord: Scripted) -> None:
    """As when a listener was killed before it could answer."""
    at.prove("alpha")
    first = rollback.roll_back(at.deployment, "alpha", command="e-1")
    assert rollback.roll_back(at.deployment, "alpha", command="e-1") == first
    assert at.registry().generation == 3
    rollback.roll_back(at.deployment, "alpha", command="e-2")
    assert at.registry().generation == 4


def test_the_same_command_twice_is_one_rollback_whatever_came_between(
    at: Applied, supervisord: Scripted
) -> None:
    at.prove("alpha")
    first = rollback.roll_back(at.deployment, "alpha", command="e-1")
    applied = at.on_disk()["alpha"]
    at.edit("beta", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    assert rollback.roll_back(at.deployment, "alpha", command="e-1") == first
    assert at.on_disk()["alpha"] == applied
    assert at.registry().generation == 4


def test_a_command_that_was_never_carried_out_is_carried_out(
    at: Applied, supervisord: Scripted
) -> None:
    """Killed before the registry was written: there is its generation, and nothing has happened."""
    phantom = generations.load(at.deployment, 2)
    assert phantom is not None
    generations.record(at.deployment, replace(phantom, number=3, command="e-1"))
    rollback.roll_back(at.deployment, "alpha", command="e-1")
    assert at.on_disk()["alpha"] == good(at)[-1]


def test_only_the_block_that_failed_is_left(at: Applied, supervisord: Scripted) -> None:
    """The user was quicker: another is applied by now."""
    failed = at.standings()["alpha"].digest
    at.edit("alpha", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "alpha"))
    before = at.picture()
    said = rollback.roll_back(at.deployment, "alpha", left=failed, failure=FAILURE)
    assert said == "alpha: has another block by now"
    assert at.picture() == before


def test_a_block_that_is_being_edited_is_not_overwritten(
    at: Applied, supervisord: Scripted
) -> None:
    at.edit("alpha", "--verbose")
    before = at.picture()
    with pytest.raises(ConfigError, match="supervisorctl update takes it up"):
        rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert at.picture() == before


def test_a_block_that_was_deleted_is_written_again(at: Applied, supervisord: Scripted) -> None:
    at.deployment.block("alpha").unlink()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert at.on_disk()["alpha"] == good(at)[-1]


def test_there_is_no_way_back_to_what_was_never_good(at: Applied, supervisord: Scripted) -> None:
    before = at.picture()
    with pytest.raises(RollbackFailed, match="block that was good"):
        rollback.roll_back(at.deployment, "beta", failure=FAILURE)
    assert at.picture() == before


def test_there_is_no_way_back_to_a_block_that_is_lost(at: Applied, supervisord: Scripted) -> None:
    path = at.deployment.kept_blocks / f"{good(at)[0]}.json"
    path.write_text("{")
    before = at.picture()
    with pytest.raises(RollbackFailed, match="block of generation 1 is lost"):
        rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert at.picture() == before


@pytest.mark.parametrize("name", ["nobody", "", "../alpha", "all"])
def test_a_model_that_is_none_is_named(at: Applied, supervisord: Scripted, name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such model"):
        rollback.roll_back(at.deployment, name)


@pytest.mark.parametrize(
    ("to", "error", "words"),
    [
        (7, ConfigError, "generation 7 is not kept"),
        (-1, ConfigError, "generation -1 is not kept"),
        (10**40, ConfigError, "is not kept"),
        (2, RollbackFailed, "block of generation 2 was never good"),
    ],
)
def test_a_generation_to_go_to_is_one_that_was_good(
    at: Applied, supervisord: Scripted, to: int, error: type[Exception], words: str
) -> None:
    before = at.picture()
    with pytest.raises(error, match=words):
        rollback.roll_back(at.deployment, "alpha", to=to)
    assert at.picture() == before


def test_to_go_to_the_generation_that_is_applied_changes_nothing(
    at: Applied, supervisord: Scripted
) -> None:
    before = at.picture()
    for to in (1, 2):
        said = rollback.roll_back(at.deployment, "beta", to=to)
        assert said == f"beta: its block is that of generation {to} already"
    assert at.picture() == before


def test_to_go_to_it_writes_a_deleted_block_again(at: Applied, supervisord: Scripted) -> None:
    block = at.deployment.block("beta")
    before = block.read_bytes()
    block.unlink()
    rollback.roll_back(at.deployment, "beta", to=1)
    assert block.read_bytes() == before


def test_one_goes_back_further_than_the_last(at: Applied, supervisord: Scripted) -> None:
    at.prove("alpha")
    rollback.roll_back(at.deployment, "alpha", to=1)
    oldest = at.on_disk()["alpha"]
    rollback.roll_back(at.deployment, "alpha", to=2)
    assert at.on_disk()["alpha"] != oldest
    rollback.roll_back(at.deployment, "alpha", to=3)
    assert at.on_disk()["alpha"] == oldest


def test_going_back_to_what_was_edited_by_hand_is_no_discovery(
    at: Applied, supervisord: Scripted
) -> None:
    """Discovery goes on keeping it."""
    edited = at.edit("beta", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    at.prove("beta")
    at.edit("beta", "--more")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    rollback.roll_back(at.deployment, "beta", failure=FAILURE)
    assert at.on_disk()["beta"] == edited
    assert edited not in at.registry().digests()["beta"]
    changes = at.discover(
        tiny("alpha", "--mlock"), tiny("beta", "--jinja", port=8101), tiny("gamma", port=8102)
    )
    assert changes.kept == ("beta",)


def test_without_a_supervisord_it_is_done_at_once(at: Applied) -> None:
    rollback.roll_back(at.deployment, "alpha")
    assert at.on_disk()["alpha"] == good(at)[-1]
    assert at.registry().untold == {}


@pytest.mark.parametrize(
    "faults",
    [{"reloadConfig": Fault.CANT_REREAD}, {"removeProcessGroup": Fault.STILL_RUNNING},
     {"addProcessGroup": Fault.BAD_NAME}, {"reloadConfig": Fault.SHUTDOWN_STATE}],
    ids=lambda faults: next(iter(faults)),
)  # fmt: skip
def test_a_supervisord_that_refuses_is_told_again(
    at: Applied, supervisord: Scripted, faults: dict[str, int]
) -> None:
    """All is written; and what is not crossed off is told until it is."""
    supervisord.faults = faults
    with pytest.raises((TransientError, ShuttingDown)):
        rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert at.on_disk()["alpha"] == at.standings()["alpha"].digest == good(at)[-1]
    assert set(at.registry().untold) == {"alpha"}
    supervisord.faults = {}
    rollback.renew(at.deployment, ["alpha"])
    assert supervisord.held["alpha"] == at.on_disk()["alpha"]
    assert at.registry().untold == {}


# --- taking note of edits ------------------------------------------------------------------------


def test_edits_that_came_together_are_one_generation(at: Applied) -> None:
    digests = {name: at.edit(name, "--verbose") for name in ("alpha", "beta")}
    revise.adopt(at.deployment, on_disk(at.deployment, "alpha", "beta", "gamma"))
    found = generations.load(at.deployment, at.registry().generation)
    assert found is not None
    assert (found.number, found.surface, found.changed) == (3, trials.UPDATE, ("alpha", "beta"))
    assert found.why == "edited by hand"
    assert found.blocks == at.on_disk()
    for name, digest in digests.items():
        standing = at.standings()[name]
        assert (standing.digest, standing.generation, standing.on_trial) == (digest, 3, True)


def test_an_edit_is_not_rewritten_and_nobody_is_told(at: Applied, supervisord: Scripted) -> None:
    at.edit("beta", "--verbose")
    before = at.deployment.block("beta").stat()
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    after = at.deployment.block("beta").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert at.registry().untold == {}
    assert supervisord.calls == []


def test_what_is_known_is_not_taken_note_of_again(at: Applied) -> None:
    at.edit("beta", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    before = at.deployment.registry.stat().st_mtime_ns
    revise.adopt(at.deployment, on_disk(at.deployment, "beta", "nobody", "../beta"))
    assert at.registry().generation == 3
    assert at.deployment.registry.stat().st_mtime_ns == before


def test_an_edit_back_to_what_was_good_is_good(at: Applied) -> None:
    path = at.deployment.block("beta")
    text = path.read_text()
    at.edit("beta", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    path.write_text(text)
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    assert not at.standings()["beta"].on_trial


def test_an_edit_back_to_what_failed_stays_rejected(at: Applied, supervisord: Scripted) -> None:
    path = at.deployment.block("alpha")
    text = path.read_text()
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    path.write_text(text)
    revise.adopt(at.deployment, on_disk(at.deployment, "alpha"))
    standing = at.standings()["alpha"]
    assert standing.on_trial
    assert standing.rejection(standing.digest) is not None
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)
    assert not at.standings()["alpha"].on_trial


# --- proving -------------------------------------------------------------------------------------


def test_a_block_that_proved_itself_is_good(at: Applied) -> None:
    digest = at.standings()["alpha"].digest
    rollback.bless(at.deployment, "alpha", digest)
    assert good(at)[-1] == digest
    before = at.deployment.trials.stat().st_mtime_ns
    rollback.bless(at.deployment, "alpha", digest)
    assert at.deployment.trials.stat().st_mtime_ns == before


def test_another_block_than_the_applied_one_is_not_proved(at: Applied) -> None:
    before = at.standings()
    for name, digest in (("alpha", good(at)[0]), ("alpha", ""), ("alpha", "x"), ("nobody", "x")):
        rollback.bless(at.deployment, name, digest)
        assert at.standings() == before


# --- broken files --------------------------------------------------------------------------------


def test_a_file_that_supervisord_cannot_read_is_set_aside(at: Applied) -> None:
    content = b"[program:alpha\n\xff"
    at.deployment.block("alpha").write_bytes(content)
    rollback.set_aside(at.deployment, "alpha", on_disk(at.deployment, "alpha")["alpha"], FAILURE)
    assert at.on_disk()["alpha"] == at.standings()["alpha"].digest
    beside = at.deployment.rejected("alpha").read_text("utf-8")
    assert beside.endswith("[program:alpha\n\ufffd")


def test_a_broken_file_stays_where_nothing_can_take_its_place(at: Applied) -> None:
    path = at.deployment.block("alpha")
    path.write_text("broken")
    shutil.rmtree(at.deployment.kept_blocks)
    for name in ("alpha", "nobody"):
        with pytest.raises(RollbackFailed, match="no former block"):
            rollback.set_aside(at.deployment, name, on_disk(at.deployment, name)[name], FAILURE)
    assert path.read_text() == "broken"


# --- telling supervisord -------------------------------------------------------------------------


def written(at: Applied, *names: str) -> None:
    """Blocks that are on disk, and of which supervisord is still to be told."""
    found = at.registry()
    digests = at.on_disk()
    registry.save(
        at.deployment.registry,
        replace(found, untold={name: digests.get(name, "") for name in names}),
    )


def test_what_supervisord_holds_already_is_crossed_off(at: Applied, supervisord: Scripted) -> None:
    written(at, "alpha", "beta")
    rollback.told_of(at.deployment, ["alpha"])
    assert set(at.registry().untold) == {"beta"}


def test_what_was_still_being_written_is_not_crossed_off(
    at: Applied, supervisord: Scripted
) -> None:
    """The listener looked before the block was on disk, and crosses off after it: too late."""
    at.discover(tiny("alpha", "--jinja"), tiny("beta", port=8101), tiny("gamma", port=8102))
    written(at, "alpha")
    supervisord.up = {"alpha"}
    rollback.told_of(at.deployment, ["alpha"])
    assert set(at.registry().untold) == {"alpha"}


def test_what_was_broken_off_is_carried_on_before_it_is_crossed_off(
    at: Applied, supervisord: Scripted
) -> None:
    """Killed between registry and block: supervisord holds the block on disk, but a former one."""
    at.prove("alpha")
    before = at.deployment.block("alpha").read_text()
    at.discover(tiny("alpha", "--jinja"), tiny("beta", port=8101), tiny("gamma", port=8102))
    after = at.on_disk()["alpha"]
    written(at, "alpha")
    at.deployment.block("alpha").write_text(before)
    supervisord.up = {"alpha"}
    rollback.told_of(at.deployment, ["alpha"])
    assert at.on_disk()["alpha"] == after
    assert set(at.registry().untold) == {"alpha"}


def test_a_removed_program_is_removed_there_too(at: Applied, supervisord: Scripted) -> None:
    at.discover(tiny("alpha", "--mlock"), tiny("beta", port=8101))
    written(at, "gamma")
    rollback.renew(at.deployment, ["gamma"])
    assert "gamma" not in supervisord.held
    assert at.registry().untold == {}


def test_a_new_program_is_added(at: Applied, supervisord: Scripted) -> None:
    del supervisord.held["beta"]
    written(at, "beta")
    rollback.renew(at.deployment, ["beta"])
    assert supervisord.held["beta"] == at.on_disk()["beta"]
    assert at.registry().untold == {}


def test_while_somebody_else_changes_the_deployment_nothing_is_done(at: Applied) -> None:
    before = at.picture()
    changes: list[Callable[[], object]] = [
        lambda: rollback.roll_back(at.deployment, "alpha"),
        lambda: rollback.bless(at.deployment, "alpha", at.standings()["alpha"].digest),
    ]
    with commits.locked(at.deployment), pytest.MonkeyPatch.context() as patch:
        patch.setattr(commits, "_LOCK_SECONDS", 0.05)
        for change in changes:
            with pytest.raises(TransientError, match="another change of this deployment"):
                change()
    with contextlib.suppress(ConfigError):
        assert at.picture() == before
