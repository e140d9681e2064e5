"""`/metrics` on supervisord's own web server, for Prometheus: what the board holds, as text.

Nothing here does I/O, waits, or raises. What is unknown has no sample, and is never 0. What cannot
be read in a snapshot is left out and counted, and the rest is told.

The text format is written here: prometheus_client takes 7 ms for 50 models (13 ms as OpenMetrics),
in which supervisord would do nothing else. Tests hold the text to what that library reads in it.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import Any

from supervisor.web import VIEWS

from supervisor_synapse.core.model import FailureClass
from supervisor_synapse.plugin.board import Board, boards
from supervisor_synapse.version import VERSION

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PAGE = "metrics"
_SILENT_SECONDS = 10.0  # the listener gives a sign of life every 2 s
_MOST_SUBJECTS = 1000  # models, and devices: a page stays of a size that can be scraped
_LONGEST_LABEL = 256
_LARGEST_INTEGER = 2**63
_SENT_AT_ONCE_BYTES = 65536  # else 4096 in each turn of supervisord's loop: twice the work in all
_HEADERS = {
    "Content-Type": CONTENT_TYPE, "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}  # fmt: skip

Json = Mapping[str, Any]
_Samples = Iterable[tuple[tuple[object, ...], object]]  # values of the further labels, and a number


class Kind(Enum):
    """Prometheus' types."""

    GAUGE = "gauge"
    COUNTER = "counter"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `read` makes of a subject its number (None: unknown), or samples where there are
    further labels. What it raises says that this part of the snapshot cannot be read.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]  # beyond those that name the subject
    unit: str  # "" where there is none
    meaning: str
    read: Callable[[Any], Any]


# --- how a number is found -----------------------------------------------------------------------


def _at(*path: str) -> Callable[[Any], object]:
    """What stands there in nested objects; None where nothing does."""
    first, *others = path

    def read(subject: Any) -> object:
        found = subject.get(first)
        for key in others:
            found = None if found is None else found.get(key)
        return found

    return read


def _present(key: str) -> Callable[[Any], _Samples]:
    """Which of its values a state has: one sample, 1."""

    def read(subject: Any) -> _Samples:
        value = subject.get(key)
        return [] if value is None else [((value,), 1)]

    return read


def _described(*keys: str) -> Callable[[Any], _Samples]:
    """Words as labels of one sample, 1; what is not known is empty."""
    return lambda subject: [(tuple(subject.get(key) or "" for key in keys), 1)]


def _is_ready(model: Json) -> object:
    """supervisord is asked as well: a listener that is gone does not tell of a crash."""
    phase = model.get("phase")
    return None if phase is None else phase == "ready" and model.get("state") == "RUNNING"


def _is_asleep(model: Json) -> object:
    usage = model.get("usage")
    return usage.get("asleep") if usage and model.get("started_at") is not None else None


def _failures(model: Json) -> _Samples:
    """Also the classes that have not been met: else Prometheus would not see a first failure."""
    found = model.get("failures")
    if found is None:
        return []
    counts = {kind.value: 0 for kind in FailureClass} | dict(found)
    return [((kind,), count) for kind, count in counts.items()]


def _last_failure(model: Json) -> _Samples:
    failure = model.get("last_failure")
    return [] if failure is None else [((failure["class"],), failure["at"])]


def _estimate(model: Json) -> _Samples:
    memory = model.get("memory") or {}
    return [((memory.get("source") or "",), memory.get("estimated"))]


def _is_read(device: Json) -> object:
    return device.get("free") is not None and not device.get("problem")


def _is_up(board: Board) -> object:
    return board.snapshot is not None and board.age_seconds <= _SILENT_SECONDS


def _age_seconds(board: Board) -> object:
    return None if board.snapshot is None else board.age_seconds


def _of_listener(key: str) -> Callable[[Board], object]:
    read = _at("listener", key)
    return lambda board: read(board.snapshot or {})


def _listener_version(board: Board) -> _Samples:
    version = _of_listener("version")(board)
    return [] if version is None else [((version,), 1)]


# --- the metrics ---------------------------------------------------------------------------------

_GAUGE, _COUNTER = Kind.GAUGE, Kind.COUNTER

_OF_THE_PLUGIN = (
    Metric(
        "synapse_up", _GAUGE, (), "",
        "1 where the listener has spoken in the last 10 s, else 0: then all else is old news",
        _is_up,
    ),
    Metric(
        "synapse_build_info", _GAUGE, ("version",), "",
        "1; the version of the plugin that answers", lambda board: [((VERSION,), 1)],
    ),
    Metric(
        "synapse_snapshot_age_seconds", _GAUGE, (), "seconds",
        "since the listener last spoke", _age_seconds,
    ),
    Metric(
        "synapse_commands_waiting", _GAUGE, (), "",
        "commands that the listener has not carried out yet",
        lambda board: len(board.mailbox.waiting()),
    ),
    Metric(
        "synapse_listener_info", _GAUGE, ("version",), "",
        "1; the version of the listener", _listener_version,
    ),
    Metric(
        "synapse_listener_start_time_seconds", _GAUGE, (), "seconds",
        "when the listener began, since the epoch", _of_listener("started_at"),
    ),
    Metric(
        "synapse_listener_turn_seconds", _GAUGE, (), "seconds",
        "how long the listener's last look at everything took", _of_listener("turn_seconds"),
    ),
    Metric(
        "synapse_listener_lag_seconds", _GAUGE, (), "seconds",
        "how much later than planned that look began", _of_listener("lag_seconds"),
    ),
)  # fmt: skip

_INFO = ("repo", "file", "tier", "role", "device", "alias")

_OF_MODELS = (
    Metric(
        "synapse_model_info", _GAUGE, _INFO, "",
        "1; what the model is, and where it runs", _described(*_INFO),
    ),
    Metric(
        "synapse_model_phase", _GAUGE, ("phase",), "",
        "1 for the phase that the model is in; the other phases have no sample", _present("phase"),
    ),
    Metric(
        "synapse_model_ready", _GAUGE, (), "",
        "1 where the model is in phase ready and its process runs, else 0", _is_ready,
    ),
    Metric(
        "synapse_model_enabled", _GAUGE, (), "",
        "1 where the model is meant to run, else 0", _at("enabled"),
    ),
    Metric(
        "synapse_model_process_state", _GAUGE, ("state",), "",
        "1 for the state that supervisord's process is in at this moment; the other states have "
        "no sample", _present("state"),
    ),
    Metric(
        "synapse_model_breaker", _GAUGE, ("state",), "",
        "1 for the state of the circuit breaker: closed, open or half-open", _present("breaker"),
    ),
    Metric(
        "synapse_model_generation", _GAUGE, (), "",
        "the generation in which the model's block was applied; the largest one is the "
        "deployment's", _at("generation"),
    ),
    Metric(
        "synapse_model_trial", _GAUGE, (), "",
        "1 while the model's block has still to prove itself, else 0", _at("trial"),
    ),
    Metric(
        "synapse_model_restarts_total", _COUNTER, (), "",
        "starts after a failure, by ourselves", _at("restarts"),
    ),
    Metric(
        "synapse_model_failures_total", _COUNTER, ("class",), "",
        "failures by class, since the listener began", _failures,
    ),
    Metric(
        "synapse_model_last_failure_time_seconds", _GAUGE, ("class",), "seconds",
        "when the model last failed, since the epoch", _last_failure,
    ),
    Metric(
        "synapse_model_next_retry_seconds", _GAUGE, (), "seconds",
        "until the model is tried again, where that is planned", _at("next_retry_in"),
    ),
    Metric(
        "synapse_model_start_time_seconds", _GAUGE, (), "seconds",
        "when the run that is up was started, since the epoch", _at("started_at"),
    ),
    Metric(
        "synapse_model_load_seconds", _GAUGE, (), "seconds",
        "from the start of the run that is up until it was ready", _at("ready_seconds"),
    ),
    Metric(
        "synapse_model_probe_seconds", _GAUGE, (), "seconds",
        "until the last probe was answered; a server may answer only between two batches",
        _at("usage", "probe_seconds"),
    ),
    Metric(
        "synapse_model_asleep", _GAUGE, (), "",
        "1 where the running server has freed its weights until the next request, else 0",
        _is_asleep,
    ),
    Metric(
        "synapse_model_port", _GAUGE, (), "", "the port that the model serves",
        _at("port"),
    ),
    Metric(
        "synapse_model_context_tokens", _GAUGE, (), "tokens",
        "the context that the server was started with", _at("context"),
    ),
    Metric(
        "synapse_model_memory_estimated_bytes", _GAUGE, ("source",), "bytes",
        "what the model takes on all devices by the estimate, and where that comes from",
        _estimate,
    ),
    Metric(
        "synapse_model_memory_measured_bytes", _GAUGE, (), "bytes",
        "what the run that is up was seen to hold on all devices", _at("memory", "measured"),
    ),
    Metric(
        "synapse_model_slots", _GAUGE, (), "",
        "requests that the server can work on at a time", _at("slots", "total"),
    ),
    Metric(
        "synapse_model_slots_busy", _GAUGE, (), "",
        "requests that it works on", _at("slots", "busy"),
    ),
    Metric(
        "synapse_model_requests_queued", _GAUGE, (), "",
        "requests that wait for a slot", _at("usage", "queued"),
    ),
    Metric(
        "synapse_model_prompt_tokens_total", _COUNTER, (), "tokens",
        "tokens read by the run that is up", _at("usage", "prompt_tokens"),
    ),
    Metric(
        "synapse_model_generated_tokens_total", _COUNTER, (), "tokens",
        "tokens written by the run that is up", _at("usage", "generated_tokens"),
    ),
)  # fmt: skip

_OF_DEVICES = (
    Metric(
        "synapse_device_info", _GAUGE, ("description",), "",
        "1; what the device is", _described("description"),
    ),
    Metric(
        "synapse_device_up", _GAUGE, (), "",
        "1 where the reader of the device's memory answers, else 0", _is_read,
    ),
    Metric(
        "synapse_device_total_bytes", _GAUGE, (), "bytes",
        "memory of the device", _at("total"),
    ),
    Metric(
        "synapse_device_free_bytes", _GAUGE, (), "bytes",
        "what its driver says is free", _at("free"),
    ),
    Metric(
        "synapse_device_reserve_bytes", _GAUGE, (), "bytes",
        "what is to be kept free", _at("reserve"),
    ),
    Metric(
        "synapse_device_room_bytes", _GAUGE, (), "bytes",
        "what may still be given to models; below 0 where the reserve is broken into",
        _at("room"),
    ),
    Metric(
        "synapse_device_others_bytes", _GAUGE, (), "bytes",
        "what others than our models have taken", _at("others"),
    ),
)  # fmt: skip

_OF_HOLDINGS = (
    Metric(
        "synapse_model_device_held_bytes", _GAUGE, (), "bytes",
        "what the model was seen to hold of the device", _at("held"),
    ),
    Metric(
        "synapse_model_device_committed_bytes", _GAUGE, (), "bytes",
        "what is set aside for the model: what it holds, and what it may still take",
        _at("committed"),
    ),
)  # fmt: skip

_UNREADABLE = Metric(
    "synapse_snapshot_unreadable", _GAUGE, (), "",
    "parts of the listener's snapshot that could not be read, or are too many, and have no samples",
    lambda page: page.unreadable,
)  # fmt: skip

# By the labels that name the subject.
METRICS: Mapping[tuple[str, ...], tuple[Metric, ...]] = {
    (): (*_OF_THE_PLUGIN, _UNREADABLE), ("model",): _OF_MODELS, ("device",): _OF_DEVICES,
    ("device", "model"): _OF_HOLDINGS,
}  # fmt: skip
EVERY = tuple(metric for some in METRICS.values() for metric in some)


# --- the text ------------------------------------------------------------------------------------


class _Page:
    """Samples by metric, and of each by its labels: Prometheus takes no page with two of one."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._samples: dict[str, dict[str, str]] = {metric.name: {} for metric in EVERY}

    def add(self, metrics: Iterable[Metric], subject: object, **own: str) -> None:
        """What `metrics` tell of a subject, which its `own` labels name."""
        head = _labels(own.items())
        for metric in metrics:
            try:
                self._add(metric, subject, head)
            except Exception:  # whatever a snapshot may hold
                self.unreadable += 1

    def _add(self, metric: Metric, subject: object, head: str) -> None:
        found, samples = metric.read(subject), self._samples[metric.name]
        if not metric.labels:
            if found is not None:
                samples[head] = _number(found)
            return
        for values, number in found:
            if number is not None:
                rest = _labels(zip(metric.labels, values, strict=True))
                samples[f"{head},{rest}" if head else rest] = _number(number)

    def text(self) -> str:
        return "".join(self._family(metric) for metric in EVERY)

    def _family(self, metric: Metric) -> str:
        samples, name = self._samples[metric.name], metric.name
        if not samples:
            return ""
        lines = [
            f"{name}{{{labels}}} {number}\n" if labels else f"{name} {number}\n"
            for labels, number in samples.items()
        ]
        head = f"# HELP {name} {metric.meaning}\n# TYPE {name} {metric.kind.value}\n"
        return head + "".join(lines)


def _labels(pairs: Iterable[tuple[str, object]]) -> str:
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in pairs])


def _escaped(value: object) -> str:
    """As it stands between the quotes of a label; half a character would break the encoding."""
    if not isinstance(value, str):
        raise TypeError(f"a label is text, not {type(value).__name__}")
    whole = _whole(value)
    return whole.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _whole(value: str) -> str:
    cut = value[:_LONGEST_LABEL]
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode("utf-8")


def _number(value: object) -> str:
    """A number as Prometheus reads it; truth is 1."""
    if isinstance(value, int):
        if abs(value) >= _LARGEST_INTEGER:
            raise ValueError("an integer beyond any size")
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    raise TypeError(f"a number is finite, and not {type(value).__name__}")


def page(board: Board, supervisord: Any) -> str:
    """All that is known now, in Prometheus' text format. What cannot be read costs only itself."""
    made = _Page()
    made.add(_OF_THE_PLUGIN, board)
    for name, model in _named(made, lambda: board.models(supervisord)):
        made.add(_OF_MODELS, model, model=name)
    for device, found in _named(made, board.devices):
        made.add(_OF_DEVICES, found, device=device)
        for model, holding in _named(made, partial(_at("models"), found)):
            made.add(_OF_HOLDINGS, holding, device=device, model=model)
    made.add((_UNREADABLE,), made)
    return made.text()


def _named(made: _Page, read: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Objects, each with its name; of two with one name, the first."""
    found: dict[str, Any] = {}
    try:
        for item in read() or ():
            name = _name(item)
            if name is None or name in found or len(found) >= _MOST_SUBJECTS:
                made.unreadable += 1
            else:
                found[name] = item
    except Exception:  # whatever a snapshot may hold
        made.unreadable += 1
    return list(found.items())


def _name(item: object) -> str | None:
    name = item.get("name") if isinstance(item, dict) else None
    return _whole(name) if isinstance(name, str) else None


# --- the page ------------------------------------------------------------------------------------


def install(supervisord: Any) -> None:
    """Have supervisord's web servers answer under /metrics; to say so twice is no error."""
    try:
        VIEWS[_PAGE] = {"template": None, "view": View}
    except Exception:
        supervisord.options.logger.critical(traceback.format_exc())


class View:
    """One request for the page, as supervisor.web calls it."""

    delay = 0.0  # seconds between two calls, where an answer takes several

    def __init__(self, context: Any) -> None:
        self._request, self._supervisord = context.request, context.supervisord

    def __call__(self) -> dict[str, Any]:
        """Headers and body; supervisord's loop is above."""
        try:
            return self._answer()
        except Exception:
            self._supervisord.options.logger.critical(traceback.format_exc())
            return self._refusal(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _answer(self) -> dict[str, Any]:
        board = boards.get(self._supervisord)
        if board is None:
            return self._refusal(HTTPStatus.SERVICE_UNAVAILABLE)
        if self._request.command != "GET":
            return self._refusal(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET")
        self._request.channel.ac_out_buffer_size = _SENT_AT_ONCE_BYTES
        return {"headers": dict(_HEADERS), "body": page(board, self._supervisord).encode()}

    def _refusal(self, status: HTTPStatus, **headers: str) -> dict[str, Any]:
        self._request.reply_code = status.value
        plain = {"Content-Type": "text/plain; charset=utf-8", **headers}
        return {"headers": plain, "body": f"{status.value} {status.phrase}\n".encode()}
