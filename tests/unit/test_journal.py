"""Operations under way: whole on disk, or as if there were none."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import journal
from supervisor_synapse.core.swap import Step, Swap
from tests.unit.test_store import full_disk

SWAP = Swap("ab12-1", "old", "new", Step.NEW_ALONE, False, True, "new did not become ready (x)")
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_SWAPS = st.builds(
    Swap, _TEXT, _TEXT, _TEXT, st.sampled_from(Step), st.booleans(), st.booleans(), _TEXT
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.json"


def as_json(**changes: object) -> dict[str, Any]:
    """The swap as it stands in the file."""
    value = {
        "command": "ab12-1", "old": "old", "new": "new", "step": "new-alone", "together": False,
        "old_served": True, "why_undone": "",
    }  # fmt: skip
    return value | changes


def test_without_a_file_nothing_is_under_way(path: Path) -> None:
    assert journal.load(path) == ()
    assert list(path.parent.iterdir()) == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(swaps=st.lists(_SWAPS, max_size=4))
def test_whatever_is_written_comes_back_in_its_order(path: Path, swaps: list[Swap]) -> None:
    journal.save(path, swaps)
    assert journal.load(path) == tuple(swaps)


def test_it_is_for_its_owner_alone(path: Path) -> None:
    journal.save(path, [SWAP])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_an_earlier_release_is_read(path: Path) -> None:
    """What stands on disk is a contract: an upgrade may come in the middle of a swap."""
    path.write_text(json.dumps([as_json()]))
    assert journal.load(path) == (Swap("ab12-1", "old", "new", Step.NEW_ALONE, False, True, ""),)


@pytest.mark.parametrize("step", list(Step))
def test_every_step_can_be_carried_on_with(path: Path, step: Step) -> None:
    journal.save(path, [Swap("1", "a", "b", step, True, True)])
    (swap,) = journal.load(path)
    assert swap.step is step


def test_on_a_full_disk_the_last_one_stays(path: Path) -> None:
    journal.save(path, [SWAP])
    with full_disk(), pytest.raises(OSError, match="too large"):
        journal.save(path, [SWAP, SWAP])
    assert journal.load(path) == (SWAP,)
    assert [found.name for found in path.parent.iterdir()] == ["journal.json"]


BROKEN: dict[str, str] = {
    "torn": json.dumps([as_json()])[:-9],
    "empty": "",
    "nothing": "null",
    "not a list": json.dumps(as_json()),
    "not a swap": json.dumps([1]),
    "unknown step": json.dumps([as_json(step="sideways")]),
    "no names": json.dumps([{"command": "1", "step": "new-alone"}]),
    "a name that is none": json.dumps([as_json(old=["old"])]),
    "one good, one not": json.dumps([as_json(), {}]),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_is_torn_is_set_aside_and_nothing_is_under_way(path: Path, text: str) -> None:
    path.write_text(text)
    assert journal.load(path) == ()
    assert not path.exists()
    assert path.with_name("journal.json.corrupt").read_text() == text
    journal.save(path, [SWAP])
    assert journal.load(path) == (SWAP,)
