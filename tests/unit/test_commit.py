"""A change is whole or not at all: each is broken off at every write, rename and removal in turn.

Then whoever comes next carries on, and all is either as it was, or as it would have been.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import commit as commits
from supervisor_synapse import revise, rollback
from supervisor_synapse.errors import SynapseError
from tests.unit.applied import FAILURE, Applied, Faults, Killed, faulty, on_disk, tiny

# A deployment in which alpha has a former good block, beta was edited by hand and adopted, gamma
# and delta are as they came; each of `CHANGES` changes that.
NAMES = ("alpha", "beta", "gamma", "delta")


@dataclass(frozen=True)
class Original:
    """A deployment that is put back as it was, in its place, since blocks name that."""

    at: Applied

    def again(self) -> Applied:
        folder = self.at.deployment.prefix
        shutil.rmtree(folder)
        shutil.copytree(self._kept, folder, symlinks=True)
        return self.at

    def keep(self) -> None:
        shutil.copytree(self.at.deployment.prefix, self._kept, symlinks=True)

    @property
    def _kept(self) -> Path:
        return self.at.deployment.prefix.with_name("kept")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    at = Applied.at(tmp_path_factory.mktemp("original") / "at")
    programs = [tiny(name, port=8100 + place) for place, name in enumerate(NAMES)]
    at.discover(*programs)
    at.prove(*NAMES)
    at.discover(tiny("alpha", "--mlock"), *programs[1:])
    at.edit("beta", "--no-warmup")
    revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
    at.prove("beta")
    made = Original(at)
    made.keep()
    return made


def discovered(at: Applied) -> None:
    """A discovery that adds one, changes two, removes one and keeps what was edited."""
    at.discover(
        tiny("alpha", "--no-mmap"), tiny("beta", port=8101), tiny("gamma", "--mlock", port=8102),
        tiny("new", port=8104),
    )  # fmt: skip


def forced(at: Applied) -> None:
    """A discovery that takes ours in place of a block that was edited by hand."""
    at.discover(
        tiny("alpha", "--mlock"), tiny("beta", "--jinja", port=8101), tiny("gamma", port=8102),
        tiny("delta", port=8103), forced=("beta",),
    )  # fmt: skip


def forced_over_an_edit(at: Applied) -> None:
    """The same over an edit of which nobody has taken note."""
    at.edit("beta", "--verbose")
    forced(at)


def adopted(at: Applied) -> None:
    at.edit("alpha", "--verbose")
    at.edit("gamma", "--verbose")
    revise.adopt(at.deployment, on_disk(at.deployment, "alpha", "gamma"))


def rolled_back(at: Applied) -> None:
    rollback.roll_back(at.deployment, "alpha", failure=FAILURE)


def rolled_back_by_command(at: Applied) -> None:
    rollback.roll_back(at.deployment, "beta", command="e-1")


def on_another_rung(at: Applied) -> None:
    """What `set_rung` does before it tells supervisord, of which there is none."""
    _without_supervisord(lambda: revise.set_rung(at.deployment, "gamma", 1))


def on_another_port(at: Applied) -> None:
    _without_supervisord(lambda: revise.move_port(at.deployment, "alpha"))


def _without_supervisord(change: Callable[[], None]) -> None:
    with pytest.raises(SynapseError, match="cannot reach supervisord"):
        change()


CHANGES = [
    discovered, forced, forced_over_an_edit, adopted, rolled_back, rolled_back_by_command,
    on_another_rung, on_another_port,
]  # fmt: skip


def complete(at: Applied) -> None:
    with commits.locked(at.deployment):
        commits.complete(at.deployment)


def attempt(at: Applied, change: Callable[[Applied], None], faults: Faults) -> None:
    """Make a change that may be broken off by what was injected, and by nothing else."""
    try:
        with faulty(faults):
            change(at)
    except (Killed, OSError, SynapseError, AssertionError):
        if not faults.did_strike:
            raise
    except BaseException as error:  # pytest's own "did not raise"
        if not faults.did_strike:
            raise AssertionError(repr(error)) from error


EDITED: dict[Any, tuple[str, ...]] = {adopted: ("alpha", "gamma"), forced_over_an_edit: ("beta",)}
FAULTS: dict[str, Callable[[int], Faults]] = {
    "killed": lambda n: Faults(n, Killed(), lasts=True),
    "disk full for a moment": lambda n: Faults(n, OSError(errno.ENOSPC, "full", "f"), lasts=False),
    "disk full from then on": lambda n: Faults(n, OSError(errno.ENOSPC, "full", "f"), lasts=True),
}


def edited_before(at: Applied, change: Callable[[Applied], None]) -> Any:
    """The deployment before a change, with what is edited by hand for it."""
    for name in EDITED.get(change, ()):
        at.edit(name, "--verbose")
    return at.picture()


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_is_broken_off_anywhere_is_whole_or_not_at_all(
    original: Original, change: Callable[[Applied], None], kind: str
) -> None:
    """After the next one has carried on; and carrying on twice is carrying on once."""
    before = edited_before(original.again(), change)
    at = original.again()
    change(at)
    complete(at)
    after = at.picture()
    assert after != before
    found = set()
    for number in range(1, 200):
        at = original.again()
        faults = FAULTS[kind](number)
        attempt(at, change, faults)
        if not faults.did_strike:
            break
        complete(at)
        picture = at.picture()
        assert picture in (before, after), f"step {number} of {change.__name__}"
        complete(at)
        assert at.picture() == picture
        assert at.stray_files() == []
        found.add(picture == after)
    assert found == {False, True}


def broken_off(original: Original, change: Callable[[Applied], None]) -> Iterator[Applied]:
    """The deployment as somebody left it who was killed in a change, at each step of it."""
    for number in range(1, 200):
        at = original.again()
        for name in EDITED.get(change, ()):
            at.edit(name, "--verbose")
        faults = FAULTS["killed"](number)
        attempt(at, change, faults)
        if not faults.did_strike:
            return
        yield at


@pytest.mark.parametrize("other", [on_another_rung, on_another_port], ids=lambda one: one.__name__)
def test_what_follows_a_change_that_was_broken_off_carries_it_on_first(
    original: Original, other: Callable[[Applied], None]
) -> None:
    """Else a block that nobody has tried would pass for the good one on another rung or port."""
    name = "gamma" if other is on_another_rung else "alpha"
    tried = set()
    for at in broken_off(original, discovered):
        with contextlib.suppress(SynapseError, OSError):
            other(at)
        is_new = at.registry().generation > 3
        standing = at.standings()[name]
        assert standing.on_trial == (is_new or name == "alpha")
        assert standing.digest == at.on_disk()[name]
        tried.add(is_new)
    assert tried == {False, True}


def test_an_edit_is_adopted_only_after_what_was_broken_off_is_carried_on(
    original: Original,
) -> None:
    for at in broken_off(original, discovered):
        was_written = at.registry().generation > 3
        at.edit("beta", "--verbose")
        revise.adopt(at.deployment, on_disk(at.deployment, "beta"))
        standing = at.standings()["gamma"]
        assert standing.on_trial == was_written
        assert at.standings()["beta"].digest == at.on_disk()["beta"]


@pytest.mark.parametrize("change", [discovered, rolled_back, rolled_back_by_command, forced])
def test_an_edit_between_a_kill_and_the_completion_is_not_overwritten(
    original: Original, change: Callable[[Applied], None]
) -> None:
    count = 0
    for at in broken_off(original, change):
        edited = {name: at.edit(name, "--edited") for name in at.on_disk()}
        complete(at)
        after = at.on_disk()
        assert {name: after[name] for name in edited} == edited
        count += 1
    assert count > 10


def test_an_edit_back_to_an_older_text_after_the_completion_is_an_edit(original: Original) -> None:
    """What was ours while the change was under way is not ours for ever."""
    for at in broken_off(original, discovered):
        before = at.deployment.block("gamma").read_bytes()
        complete(at)
        at.deployment.block("gamma").write_bytes(before)
        if at.registry().generation > 3 and before != b"":
            digests = at.registry().digests()["gamma"]
            assert len(digests) == 1
