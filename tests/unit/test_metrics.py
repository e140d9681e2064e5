"""/metrics tells what is known, and nothing else, in a text that Prometheus' own parser reads.

With a real supervisord: tests/integration/test_metrics.py. The alert rules, the dashboard and the
reference: tests/unit/test_alerts.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from supervisor.states import ProcessStates

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import (
    Breaker,
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    ProcessState,
    Row,
    Snapshot,
    Usage,
)
from supervisor_synapse.plugin import metrics
from supervisor_synapse.plugin.board import Board, boards
from supervisor_synapse.version import VERSION
from tests.unit.builders import GIB, MIB, row

_NOW = 1_800_000_000.0
_PROMTOOL = shutil.which("promtool")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Process:
    """As supervisord holds one."""

    def __init__(self, state: int) -> None:
        self.pid = 4711
        self._state = state

    def get_state(self) -> int:
        return self._state


class Supervisord:
    """As much of one as a page needs."""

    def __init__(self, **states: int) -> None:
        self.logged: list[str] = []
        self.options = SimpleNamespace(logger=SimpleNamespace(critical=self.logged.append))
        self.process_groups = {
            name: SimpleNamespace(processes={name: Process(state)})
            for name, state in states.items()
        }


HOST = Supervisord()


def board(*rows: Row, devices: tuple[DeviceRow, ...] = ()) -> Board:
    """One that has just heard of these."""
    listener = ListenerRow(7, "1.2.3", _NOW, 0.0125, 0.002)
    found = Board(HOST)
    found.take(json.loads(snapshots.dump(Snapshot(_NOW, rows, devices, listener))))
    return found


def told(found: Board, host: Supervisord = HOST) -> Samples:
    """What Prometheus' parser reads in the page; no sample stands there twice."""
    families = list(text_string_to_metric_families(metrics.page(found, host)))
    samples = [
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in families
        for sample in family.samples
    ]
    assert len(dict(samples)) == len(samples)
    return dict(samples)


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"synapse_{name}", frozenset(labels.items())))


def named(samples: Samples, name: str) -> list[dict[str, str]]:
    """The labels of each sample of a metric."""
    return [dict(labels) for found, labels in samples if found == f"synapse_{name}"]


# --- what is known -------------------------------------------------------------------------------


def test_a_model_at_work_is_told_with_all_that_is_known_of_it() -> None:
    samples = told(
        board(
            row(
                name="m", repo="acme/m", file="m.gguf", alias="em", device="CUDA0",
                started_at=1_799_999_000, measured_bytes=300 * MIB, slots_busy=3, restarts=2,
                generation=5, trial=True, breaker=Breaker.HALF_OPEN,
                usage=Usage(4, 1000, 250, 0.0031),
                last_failure=Failure(FailureClass.CRASHED, "signal 11", 1_799_990_000.5),
                failures=(("crashed", 2),),
            )
        )
    )  # fmt: skip
    about = {
        "repo": "acme/m", "file": "m.gguf", "tier": "FAST", "role": "text", "device": "CUDA0",
        "alias": "em",
    }  # fmt: skip
    assert named(samples, "model_info") == [{"model": "m", **about}]
    expected = {
        "ready": 1, "enabled": 1, "generation": 5, "trial": 1, "restarts_total": 2,
        "start_time_seconds": 1_799_999_000, "load_seconds": 1.25, "probe_seconds": 0.0031,
        "asleep": 0, "port": 8100, "context_tokens": 4096, "slots": 4, "slots_busy": 3,
        "requests_queued": 4, "prompt_tokens_total": 1000, "generated_tokens_total": 250,
        "memory_measured_bytes": 300 * MIB,
    }  # fmt: skip
    assert {name: value(samples, f"model_{name}", model="m") for name in expected} == expected
    assert value(samples, "model_memory_estimated_bytes", model="m", source="header") == 200 * MIB
    assert value(samples, "model_breaker", model="m", state="half-open") == 1
    assert value(samples, "model_process_state", model="m", state="RUNNING") == 1
    at = value(samples, "model_last_failure_time_seconds", model="m", **{"class": "crashed"})
    assert at == 1_799_990_000.5


def test_what_is_unknown_has_no_sample() -> None:
    """A model that is at rest has no run, so nothing of a run is told; nothing is told as 0."""
    samples = told(
        board(
            row(
                name="m", repo=None, phase=Phase.STOPPED, state=ProcessState.STOPPED, pid=0,
                ready_seconds=None,
            )
        )
    )  # fmt: skip
    absent = {
        "memory_measured_bytes", "slots_busy", "requests_queued", "prompt_tokens_total",
        "generated_tokens_total", "probe_seconds", "asleep", "start_time_seconds", "load_seconds",
        "next_retry_seconds", "last_failure_time_seconds",
    }  # fmt: skip
    assert {name for name in absent if named(samples, f"model_{name}")} == set()
    assert value(samples, "model_ready", model="m") == 0
    assert value(samples, "snapshot_unreadable") == 0
    assert named(samples, "model_info")[0]["repo"] == ""


@pytest.mark.parametrize("phase", list(Phase))
def test_of_the_phases_only_the_one_it_is_in_has_a_sample(phase: Phase) -> None:
    samples = told(board(row(name="m", phase=phase)))
    assert named(samples, "model_phase") == [{"model": "m", "phase": phase.value}]
    assert value(samples, "model_ready", model="m") == (phase is Phase.READY)


def test_every_failure_class_begins_at_0() -> None:
    """Else Prometheus would not see the first failure of a class as an increase."""
    samples = told(board(row(name="m", failures=(("wedged", 3),))))
    counts = {
        kind.value: value(samples, "model_failures_total", model="m", **{"class": kind.value})
        for kind in FailureClass
    }
    assert counts == {kind.value: 0 for kind in FailureClass} | {"wedged": 3}


def test_the_state_is_supervisords_of_this_moment() -> None:
    """The listener may be gone, and with it whoever would have noticed the crash."""
    host = Supervisord(m=ProcessStates.EXITED)
    samples = told(board(row(name="m")), host)
    assert named(samples, "model_process_state") == [{"model": "m", "state": "EXITED"}]
    assert value(samples, "model_ready", model="m") == 0


def test_a_device_is_told_with_who_holds_it() -> None:
    devices = (
        DeviceRow(
            "CUDA0", "NVIDIA H100", 80 * GIB, 9 * GIB, GIB, -5, 2 * GIB,
            (Holding("a", 3 * GIB, 4 * GIB), Holding("b", None, GIB)),
        ),
        DeviceRow("CUDA1", "", 80 * GIB, None, GIB, None, None, (), "the driver does not answer"),
    )  # fmt: skip
    samples = told(board(devices=devices))
    assert value(samples, "device_info", device="CUDA0", description="NVIDIA H100") == 1
    expected = {
        "up": 1, "total_bytes": 80 * GIB, "free_bytes": 9 * GIB, "reserve_bytes": GIB,
        "room_bytes": -5, "others_bytes": 2 * GIB,
    }  # fmt: skip
    of_first = {name: value(samples, f"device_{name}", device="CUDA0") for name in expected}
    assert of_first == expected
    of_second = {name: value(samples, f"device_{name}", device="CUDA1") for name in expected}
    assert of_second == dict.fromkeys(expected) | {
        "up": 0, "total_bytes": 80 * GIB, "reserve_bytes": GIB,
    }  # fmt: skip
    assert value(samples, "model_device_held_bytes", device="CUDA0", model="a") == 3 * GIB
    assert value(samples, "model_device_held_bytes", device="CUDA0", model="b") is None
    assert value(samples, "model_device_committed_bytes", device="CUDA0", model="b") == GIB


def test_the_listener_and_the_plugin_tell_of_themselves() -> None:
    found = board()
    found.mailbox.post("enable", "m")
    samples = told(found)
    assert value(samples, "up") == 1
    assert value(samples, "build_info", version=VERSION) == 1
    assert value(samples, "listener_info", version="1.2.3") == 1
    assert value(samples, "listener_start_time_seconds") == _NOW
    assert value(samples, "listener_turn_seconds") == 0.0125
    assert value(samples, "listener_lag_seconds") == 0.002
    assert value(samples, "commands_waiting") == 1
    age = value(samples, "snapshot_age_seconds")
    assert age is not None
    assert 0 <= age < 60


def test_before_the_listener_spoke_nothing_is_told_of_it() -> None:
    samples = told(Board(HOST))
    assert {name for name, _ in samples} == {
        "synapse_up", "synapse_build_info", "synapse_commands_waiting",
        "synapse_snapshot_unreadable",
    }  # fmt: skip
    assert value(samples, "up") == value(samples, "snapshot_unreadable") == 0


def test_a_listener_that_fell_silent_is_not_up() -> None:
    found = board(row(name="m"))
    found.taken_at -= 11
    samples = told(found)
    assert value(samples, "up") == 0
    assert value(samples, "model_enabled", model="m") == 1


# --- what comes from outside ---------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(name=_TEXT, repo=_TEXT, alias=_TEXT)
def test_any_text_is_read_back_as_it_was(name: str, repo: str, alias: str) -> None:
    samples = told(board(row(name=name, repo=repo, alias=alias)))
    (about,) = named(samples, "model_info")
    assert (about["model"], about["repo"], about["alias"]) == (name, repo, alias)
    assert value(samples, "model_port", model=name) == 8100


HOSTILE = [
    'x"} 1\nsynapse_up 0', "\\", '\\"', "\\n", "\n", "a\nb", "\r\n", "\x00\x1b[2J", "\u2028",
    "\u202e", "#", "{", "}", ",", "=", "имя", "模型", "🦙", " ", "# EOF",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_name_adds_or_breaks_a_line(name: str) -> None:
    plain, samples = told(board(row(name="m"))), told(board(row(name=name)))
    assert len(samples) == len(plain)
    assert value(samples, "up") == 1
    assert named(samples, "model_info")[0]["model"] == name


def test_half_a_character_does_not_break_the_encoding() -> None:
    text = metrics.page(board(row(name="m\ud800")), HOST)
    assert 'model="m?"' in text.encode("utf-8").decode("utf-8")


def test_long_text_is_cut_and_nothing_is_told_twice() -> None:
    long = "x" * 5000
    found = board(row(name=long + "a", port=1), row(name=long + "b", port=2))
    samples = told(found)
    assert value(samples, "model_port", model="x" * 256) == 1
    assert value(samples, "snapshot_unreadable") == 1


BROKEN: dict[str, Any] = {
    "no object": 5, "null": None, "a list": [], "no name": {}, "a number": {"name": 5},
    "of one name with another": {"name": "good"}, "a state that is none": {"name": "b", "state": 7},
    "a phase that is none": {"name": "b", "phase": ["ready"]},
    "memory in words": {"name": "b", "memory": "much"}, "no usage": {"name": "b", "usage": 1},
    "a number in words": {"name": "b", "restarts": "many"},
    "a port in words": {"name": "b", "port": "nan"},
    "not a number": {"name": "b", "ready_seconds": float("nan")},
    "infinite": {"name": "b", "ready_seconds": float("-inf")},
    "beyond any size": {"name": "b", "restarts": 10**5000},
    "no counts": {"name": "b", "failures": [1]}, "no count": {"name": "b", "failures": {"x": []}},
    "no time": {"name": "b", "last_failure": {"class": "crashed"}},
}  # fmt: skip


@pytest.mark.parametrize("model", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_left_out_and_counted(model: Any) -> None:
    found = board(row(name="good"))
    assert found.snapshot is not None
    found.snapshot["models"].append(model)
    samples = told(found)
    assert value(samples, "snapshot_unreadable")
    assert value(samples, "up") == value(samples, "model_ready", model="good") == 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "phase", "state", "memory", "estimated", "slots", "usage", "failures",
                 "queued", "last_failure", "class", "at", "models", "free", "held", "version"]
            ),
            inner, max_size=6,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(models=st.lists(_JSON, max_size=4), devices=_JSON, listener=_JSON)
def test_no_snapshot_breaks_the_page(models: list[Any], devices: Any, listener: Any) -> None:
    found = Board(HOST)
    found.take({"models": models, "devices": devices, "listener": listener})
    assert value(told(found), "up") == 1


def test_more_models_than_can_be_scraped_are_counted_alone() -> None:
    found = Board(HOST)
    found.take({"models": [{"name": f"m{number}"} for number in range(2000)]})
    samples = told(found)
    assert len(named(samples, "model_info")) == 1000
    assert value(samples, "snapshot_unreadable") == 1000


# --- how it is told ------------------------------------------------------------------------------


def test_names_follow_prometheus_conventions() -> None:
    for metric in metrics.EVERY:
        assert re.fullmatch(r"synapse(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is metrics.Kind.COUNTER)
        stem = metric.name.removesuffix("_total")
        assert not metric.unit or stem.endswith(f"_{metric.unit}"), metric.name
    names = [metric.name for metric in metrics.EVERY]
    assert len(set(names)) == len(names)


def test_the_parser_reads_type_and_meaning_of_each_metric() -> None:
    failure = Failure(FailureClass.CRASHED, "", 1.0)
    full = row(
        name="m", started_at=1, measured_bytes=1, slots_busy=1, next_retry_seconds=1.0,
        usage=Usage(1, 1, 1, 1.0), last_failure=failure,
    )  # fmt: skip
    device = DeviceRow("CPU", "", 1, 1, 1, 1, 1, (Holding("m", 1, 1),))
    text = metrics.page(board(full, devices=(device,)), HOST)
    read = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(text)
    }
    assert list(read) == [metric.name for metric in metrics.EVERY]
    for metric in metrics.EVERY:
        family = read[metric.name]
        assert (family.type, family.documentation) == (metric.kind.value, metric.meaning)


@pytest.mark.skipif(_PROMTOOL is None, reason="promtool is not on PATH")
def test_promtool_finds_nothing_to_mend() -> None:
    text = metrics.page(board(*(row(name=name) for name in HOSTILE)), HOST)
    checked = subprocess.run(
        [str(_PROMTOOL), "check", "metrics"], input=text.encode(), capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


# --- the page ------------------------------------------------------------------------------------


class Request:
    """As much of supervisor's as the page needs."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.reply_code = 200
        self.channel = SimpleNamespace(ac_out_buffer_size=4096)


@pytest.fixture
def host() -> Iterator[Supervisord]:
    """A supervisord with a board."""
    found = Supervisord()
    boards[found] = board(row(name="m"))
    yield found
    del boards[found]


def asked(host: Supervisord, command: str = "GET") -> tuple[int, dict[str, str], bytes]:
    request = Request(command)
    answer = metrics.View(SimpleNamespace(request=request, supervisord=host))()
    return request.reply_code, answer["headers"], answer["body"]


def test_a_get_is_answered_in_prometheus_text_format(host: Supervisord) -> None:
    status, headers, body = asked(host)
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert body.startswith(b"# HELP synapse_up ")
    assert b'synapse_model_ready{model="m"} 1\n' in body


@pytest.mark.parametrize("command", ["POST", "PUT", "get", ""])
def test_only_get_is_answered(host: Supervisord, command: str) -> None:
    status, headers, body = asked(host, command)
    assert (status, headers["Allow"], body) == (405, "GET", b"405 Method Not Allowed\n")


def test_without_a_board_there_is_no_page() -> None:
    assert asked(Supervisord())[0] == 503


def test_a_fault_of_ours_is_logged_and_answered(host: Supervisord) -> None:
    """Nothing may leave the view, whatever it meets."""
    boards[host] = object()  # type: ignore[assignment]
    status, _, body = asked(host)
    assert (status, body) == (500, b"500 Internal Server Error\n")
    assert "Traceback" in host.logged[0]
