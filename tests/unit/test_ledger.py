"""The listener's word for the launcher: what is written is what the launcher reads."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse import launcher
from supervisor_synapse.adapters import ledger
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.ledger import Entry, Ledger, Process
from tests.unit.test_store import full_disk

LEDGER = Ledger(
    listener=Process(4711, 900),
    room={"CPU": 5, "CUDA0": -3},
    counted=(Process(7, 70), Process(8, 80)),
    models={
        "a": Entry(admitted=False, needs={"CUDA0": 9}, could_stop="b (500 MiB)"),
        "b": Entry(admitted=True, needs={"CPU": 4, "CUDA0": 0}),
    },
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def test_the_file_is_as_launchers_of_other_releases_expect_it(path: Path) -> None:
    """Blocks outlive an upgrade, and so do the launchers that they started."""
    ledger.save(path, LEDGER)
    assert json.loads(path.read_text("ascii")) == {
        "version": 1,
        "listener": {"pid": 4711, "started": 900},
        "room": {"CPU": 5, "CUDA0": -3},
        "counted": [[7, 70], [8, 80]],
        "models": {
            "a": {"admitted": False, "needs": {"CUDA0": 9}, "could_stop": "b (500 MiB)"},
            "b": {"admitted": True, "needs": {"CPU": 4, "CUDA0": 0}, "could_stop": ""},
        },
    }


_NAMES = st.text(max_size=10)  # lone surrogates included
_SIZES = st.dictionaries(_NAMES, st.integers(0, 2**63 - 1), max_size=3)
_PROCESSES = st.builds(Process, st.integers(1, 2**31 - 1), st.integers(0, 2**63 - 1))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    said=st.builds(
        Ledger, _PROCESSES, _SIZES, st.lists(_PROCESSES, max_size=3).map(tuple),
        st.dictionaries(_NAMES, st.builds(Entry, st.booleans(), _SIZES, _NAMES), max_size=3),
    )
)  # fmt: skip
def test_the_launcher_reads_what_was_said_of_each_model(path: Path, said: Ledger) -> None:
    ledger.save(path, said)
    for name, entry in said.models.items():
        word = launcher.parse_ledger(path.read_bytes(), name)
        if entry.admitted:
            assert word is None
            continue
        assert word is not None
        assert word.listener == (said.listener.pid, said.listener.started)
        assert (word.needs, word.room) == (entry.needs, said.room)
        assert word.counted == {(process.pid, process.started) for process in said.counted}
        assert word.could_stop == entry.could_stop


def test_a_torn_word_is_none(path: Path) -> None:
    ledger.save(path, LEDGER)
    text = path.read_bytes()
    assert launcher.parse_ledger(text, "a") is not None
    assert all(launcher.parse_ledger(text[:end], "a") is None for end in range(len(text) - 1))


def test_a_listener_that_lives_is_believed_and_one_that_has_ended_is_not(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ledger.save(path, replace(LEDGER, listener=ledger.process_of(process.pid)))
        assert launcher.read_word(str(path), "a") is not None
        process.communicate(b"\n")
    assert launcher.read_word(str(path), "a") is None


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    ours = ledger.process_of(os.getpid())
    assert ours.pid == os.getpid()
    assert ours == ledger.process_of(os.getpid())
    assert launcher.is_alive(ours.pid, ours.started)


def test_it_is_for_its_owner_alone(path: Path) -> None:
    former = os.umask(0)
    try:
        ledger.save(path, LEDGER)
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_on_a_full_disk_the_last_one_stays(path: Path) -> None:
    ledger.save(path, LEDGER)
    with full_disk(), pytest.raises(OSError, match="too large"):
        ledger.save(path, replace(LEDGER, room={}))
    assert launcher.parse_ledger(path.read_bytes(), "a") is not None
    assert [found.name for found in path.parent.iterdir()] == ["ledger.json"]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ledger.save(tmp_path / "nowhere" / "ledger.json", LEDGER)


def test_what_a_killed_listener_left_is_taken_up(path: Path) -> None:
    new = path.with_name("ledger.json.new")
    new.write_text("{half")
    ledger.save(path, LEDGER)
    assert [found.name for found in path.parent.iterdir()] == ["ledger.json"]
    new.write_text("{half")
    ledger.remove(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["ledger.json", "ledger.json.new"])
def test_no_link_leads_the_writing_astray(path: Path, place: str) -> None:
    other = path.with_name("other")
    other.write_text("not ours")
    path.with_name(place).symlink_to(other)
    ledger.save(path, LEDGER)
    assert other.read_text() == "not ours"
    assert not path.is_symlink()
    assert launcher.parse_ledger(path.read_bytes(), "a") is not None


def test_to_remove_what_is_not_there_is_no_error(path: Path) -> None:
    ledger.remove(path)
    ledger.save(path, LEDGER)
    ledger.remove(path)
    assert list(path.parent.iterdir()) == []


def test_it_stands_where_the_rendered_blocks_look_for_it(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    assert deployment.ledger == deployment.run / "ledger.json"
