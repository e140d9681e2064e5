"""The listener's word about memory: what it writes is what the launcher reads and keeps to."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse import launcher
from supervisor_synapse.adapters import ledger
from supervisor_synapse.adapters.ledger import Entry, Ledger, Process
from tests.unit.builders import MIB

GONE = Process(2**22 + 1, 1)  # beyond the largest pid there is


def word(**changes: Any) -> Ledger:
    """This process listens; 300 MiB are left on CUDA0, and `m` wants 200 of them."""
    values: dict[str, Any] = {
        "listener": ledger.process_of(os.getpid()),
        "room": {"CUDA0": 300 * MIB, "CPU": 5 * MIB},
        "models": {"m": Entry(False, {"CUDA0": 200 * MIB}, "a (500 MiB)")},
    }
    return Ledger(**(values | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def refusal(path: Path, model: str = "m") -> str:
    """What the launcher says to a start now; "" where it goes ahead."""
    try:
        launcher.require_memory(str(path), model)
    except launcher.StartError as error:
        return str(error) if error.status == launcher.EXIT_NO_MEMORY else repr(error)
    return ""


def claims(path: Path) -> list[Any]:
    found: list[Any] = json.loads(path.with_name("ledger.json.claims").read_text())
    return found


def claim_of(process: Process, needed_bytes: int) -> dict[str, Any]:
    return {"pid": process.pid, "started": process.started, "needs": {"CUDA0": needed_bytes}}


def test_what_is_left_is_claimed(path: Path) -> None:
    ledger.save(path, word())
    assert refusal(path) == ""
    assert claims(path) == [claim_of(ledger.process_of(os.getpid()), 200 * MIB)]
    assert stat.S_IMODE(os.stat(f"{path}.claims").st_mode) == 0o600


def test_what_is_not_left_is_refused_with_the_numbers_and_who_could_be_stopped(path: Path) -> None:
    ledger.save(path, word(models={"m": Entry(False, {"CUDA0": 900 * MIB}, "a (500 MiB)")}))
    assert refusal(path) == (
        "m does not fit: needs 900 MiB on CUDA0, 300 MiB left; could be stopped: a (500 MiB)"
    )
    assert not path.with_name("ledger.json.claims").exists()


def test_a_device_that_could_not_be_read_admits_nothing(path: Path) -> None:
    ledger.save(path, word(room={}))
    assert "could not be read" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"models": {"m": Entry(True, {"CUDA0": 900 * MIB})}},
        {"models": {}},
        {"listener": GONE, "models": {"m": Entry(False, {"CUDA0": 900 * MIB})}},
        {"models": {"m": Entry(False, {"CUDA0": 0})}, "room": {"CUDA0": -5}},
    ],
    ids=["admitted", "not in it", "the listener is gone", "needs nothing"],
)
def test_nothing_speaks_against_a_start(path: Path, changes: dict[str, Any]) -> None:
    ledger.save(path, word(**changes))
    assert refusal(path) == ""


def test_without_a_word_the_launcher_goes_ahead(path: Path) -> None:
    assert refusal(path) == ""
    ledger.save(path, word(models={"m": Entry(False, {"CUDA0": 900 * MIB})}))
    ledger.remove(path)
    ledger.remove(path)
    assert refusal(path) == ""


@pytest.mark.parametrize(
    ("other", "counted", "fits"),
    [("alive", False, False), ("alive", True, True), ("gone", False, True)],
)
def test_two_starts_by_hand_do_not_get_the_same_memory(
    path: Path, other: str, counted: bool, fits: bool
) -> None:
    """A claim holds while its launcher lives, and until the listener counts it itself."""
    claimant = ledger.process_of(os.getppid()) if other == "alive" else GONE
    path.with_name("ledger.json.claims").write_text(json.dumps([claim_of(claimant, 150 * MIB)]))
    ledger.save(path, word(counted=(claimant,) if counted else ()))
    assert (refusal(path) == "") is fits


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["version", "listener", "models", "room", "m", "needs", "pid"]), inner,
        max_size=4,
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_what_makes_no_sense_is_no_word(text: bytes) -> None:
    assert launcher.parse_ledger(text, "m") is None
    assert all(isinstance(claim.needs, dict) for claim in launcher.parse_claims(text))


def test_a_torn_word_is_none(path: Path) -> None:
    ledger.save(path, word())
    text = path.read_bytes()
    assert launcher.parse_ledger(text, "m") is not None
    assert all(launcher.parse_ledger(text[:end], "m") is None for end in range(len(text) - 1))


def test_links_do_not_lead_the_writing_astray(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("ledger.json.claims", "ledger.json.claims.new", "ledger.json.new"):
        (tmp_path / name).symlink_to(precious)
    ledger.save(path, word())
    assert refusal(path) == ""
    assert precious.read_text() == "mine"
    assert len(claims(path)) == 1


def test_a_name_from_outside_does_not_break_the_line() -> None:
    line = launcher.refusal("m\n\x1b[31m", ["1 MiB on \r\nX"], "é")
    assert line.isascii()
    assert line.isprintable()
