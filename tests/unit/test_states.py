"""What the listener remembers, and what was commanded: whole on disk, or as if there were none."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import intent, states
from supervisor_synapse.core.model import Failure, FailureClass, Incarnation, Phase
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.state import ModelState

BOOT = "one-boot"
FAILURE = Failure(FailureClass.WEDGED, "busy, and nothing has moved for 121 s", 1_800_000_000.5)
FULL = ModelState(
    phase=Phase.BACKOFF, reason="wedged; starts again after 2.0 s",
    incarnation=Incarnation(4711, 1_800_000_000), started_at=12.5, ready_seconds=1.25,
    was_ready=True, ready_at=14.0, restarts=3,
    retries=Restarts(2, (10.0, 20.5), 25.0, is_open=True, is_trial=True),
    last_failure=FAILURE, failed_run=1_800_000_000, failed_stamp=2**62 + 1, asked_at=11.0,
    condemned=FAILURE, killed_at=19.0, is_out=True, is_by_hand=True, resume=True, moved_run=9,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_TIME = st.none() | st.floats(0, 1e9)
_FAILURES = st.builds(Failure, st.sampled_from(FailureClass), _TEXT, st.floats(0, 1e10))
_STATES = st.builds(
    ModelState, phase=st.sampled_from(Phase), reason=_TEXT,
    incarnation=st.none() | st.builds(Incarnation, st.integers(1, 2**22), st.integers(0, 2**33)),
    started_at=_TIME, ready_at=_TIME, was_ready=st.booleans(),
    retries=st.builds(
        Restarts, st.integers(0, 1000), st.lists(st.floats(0, 1e9), max_size=5).map(tuple), _TIME,
        st.booleans(), st.booleans(),
    ),
    last_failure=st.none() | _FAILURES, condemned=st.none() | _FAILURES,
    failed_run=st.integers(0, 2**33), failed_stamp=st.integers(-(2**70), 2**70),
)  # fmt: skip


# --- what the listener remembers ------------------------------------------------------------------


def test_everything_remembered_comes_back(path: Path) -> None:
    states.save(path, BOOT, {"full": FULL, "new": ModelState()})
    assert states.load(path, BOOT) == {"full": FULL, "new": ModelState()}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(models=st.dictionaries(_TEXT, _STATES, max_size=3))
def test_any_states_come_back_as_they_were(path: Path, models: dict[str, ModelState]) -> None:
    states.save(path, BOOT, models)
    assert states.load(path, BOOT) == models


def test_nothing_remembered_is_no_problem(path: Path) -> None:
    assert states.load(path, BOOT) == {}


def test_what_another_boot_remembered_does_not_hold(path: Path) -> None:
    """Its clock and its process numbers mean nothing now; the file is no rubbish either."""
    states.save(path, BOOT, {"a": FULL})
    assert states.load(path, "another-boot") == {}
    assert path.exists()


def test_what_was_written_in_the_future_does_not_hold(path: Path) -> None:
    """Where boots have no names, a clock that went back shows that there was one."""
    states.save(path, "", {"a": FULL})
    value = json.loads(path.read_text())
    value["at"] = time.monotonic() + 1000.0
    path.write_text(json.dumps(value))
    assert states.load(path, "") == {}


def test_a_file_of_an_older_listener_that_knew_less_is_read(path: Path) -> None:
    """What it does not say is as for a model never seen."""
    states.save(path, BOOT, {"a": FULL})
    value = json.loads(path.read_text())
    del value["models"]["a"]["moved_run"]
    path.write_text(json.dumps(value))
    assert states.load(path, BOOT)["a"].moved_run == 0


def test_a_file_torn_at_any_place_is_set_aside(path: Path) -> None:
    states.save(path, BOOT, {"a": FULL})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        assert states.load(path, BOOT) == {}
        assert not path.exists()
        assert path.with_name("state.json.corrupt").read_bytes() == whole[:length]


def _with(**changes: Any) -> dict[str, Any]:
    return {"boot": BOOT, "at": 1.0, "models": {"a": changes}}


@pytest.mark.parametrize(
    "value",
    [
        [], {}, 7, "x", {"boot": BOOT, "at": 1.0, "models": []}, _with(phase="flying"),
        _with(incarnation=7), _with(incarnation={"pid": "x", "started_at": 1}),
        _with(retries={"failures": "x"}), _with(last_failure={"failure_class": "bored"}),
        _with(restarts=1.5), _with(retries={"attempt": None}),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_file_of_another_shape_is_set_aside(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
    assert states.load(path, BOOT) == {}
    assert path.with_name("state.json.corrupt").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"\0" * 4096, b"{}{}"])
def test_a_file_that_is_no_json_is_set_aside(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert states.load(path, BOOT) == {}
    assert path.with_name("state.json.corrupt").exists()


def test_a_folder_in_its_place_is_as_none(path: Path) -> None:
    path.mkdir()
    assert states.load(path, BOOT) == {}


def test_a_disk_that_does_not_take_it_leaves_what_was(path: Path, tmp_path: Path) -> None:
    """The caller goes on; the next one reads the old states."""
    states.save(path, BOOT, {"a": FULL})
    with pytest.raises(OSError, match="File name too long"):
        states.save(path.with_name("x" * 300), BOOT, {})
    assert states.load(path, BOOT) == {"a": FULL}
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]


def test_only_its_owner_can_read_it(path: Path) -> None:
    states.save(path, BOOT, {"a": FULL})
    assert path.stat().st_mode & 0o077 == 0


def test_a_boot_has_one_name() -> None:
    assert states.boot_id()
    assert states.boot_id() == states.boot_id()


# --- what was commanded ---------------------------------------------------------------------------


def test_commands_come_back(path: Path) -> None:
    intent.save(path, {"b": False, "a": True})
    assert intent.load(path) == {"a": True, "b": False}
    assert path.read_text() == '{"a":true,"b":false}\n'


def test_no_commands_are_none(path: Path) -> None:
    assert intent.load(path) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1}', '{"a": "true"}', '{"a": null}', '{"a": {}}', "7"]
)
def test_what_is_no_list_of_commands_is_set_aside(path: Path, text: str) -> None:
    """`null` is as good as nothing, and is left."""
    path.write_text(text)
    assert intent.load(path) == {}
    assert text == "null" or path.with_name("state.json.corrupt").exists()


def test_commands_that_cannot_be_written_leave_the_old_ones(path: Path) -> None:
    intent.save(path, {"a": False})
    with pytest.raises(OSError, match="No such file"):
        intent.save(path.parent / "gone" / "intent.json", {"a": True})
    assert intent.load(path) == {"a": False}
