"""What the page shows: the snapshot, the history and the clock -> words and numbers; pure.

Everything in a snapshot is taken for hostile: of another kind than expected it counts as absent,
text is cleaned of control characters and of what turns its direction, and all is bounded. Escaping
is the template's.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supervisor.states import SupervisorStates

from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.plan import mib

SILENT_SECONDS = 10.0  # the listener gives a sign of life every 2 s

_MOST_MODELS = 500
_MOST_DEVICES = 64
_MOST_LINES = 30
_LONGEST = 400
_BAR_UNITS = 1000.0  # of the drawing
_URL = re.compile(r"https?://[A-Za-z0-9.\-]+(:\d{1,5})?|http://\[[0-9A-Fa-f:]+\](:\d{1,5})?")
# Keys where they are usually met: a command line, a header, an environment, and those of well-known
# services by how they begin.
_KEY = re.compile(
    r"(--api-key[ =]|[Bb]earer |API_KEY=|\bhf_(?=\w{16})|\bsk-(?=[\w-]{16}))[^\s\"']+"
)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_ORDER = (
    Phase.READY, Phase.LOADING, Phase.PENDING, Phase.DEFERRED, Phase.UNHEALTHY, Phase.BACKOFF,
    Phase.FAILED, Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING, Phase.STOPPED, Phase.DISABLED,
)  # fmt: skip
_PHASES = {phase.value: phase for phase in Phase}
# One look for those that mean the same to a person; the word itself stands beside it.
_LOOKS = {
    Phase.READY: "good", Phase.LOADING: "busy", Phase.PENDING: "busy", Phase.DEFERRED: "wait",
    Phase.UNHEALTHY: "bad", Phase.BACKOFF: "wait", Phase.FAILED: "bad", Phase.DRAINING: "busy",
    Phase.STOPPING: "busy", Phase.VERIFYING: "busy",
}  # fmt: skip
_WAITING = frozenset({Phase.DEFERRED, Phase.BACKOFF, Phase.FAILED})
_IN_TROUBLE = frozenset({Phase.BACKOFF, Phase.FAILED, Phase.UNHEALTHY})
_UP = frozenset({"RUNNING", "STARTING", "BACKOFF"})
_DOWN = frozenset({"STOPPED", "EXITED", "FATAL"})

_RESERVED_CLASS, _OTHERS_CLASS, _FREE_CLASS = "reserve", "others", "free"
_OWN_CLASSES = 6

_MOODS = {
    SupervisorStates.RESTARTING: "supervisord is reloading.",
    SupervisorStates.SHUTDOWN: "supervisord is shutting down.",
}


@dataclass(frozen=True, slots=True)
class Button:
    """An action on one model."""

    verb: str
    label: str


@dataclass(frozen=True, slots=True)
class Fault:
    """The last thing that went wrong with a model."""

    kind: str
    evidence: str
    ago: str
    so_far: str  # how often each kind of failure was met
    is_open: bool  # its evidence is shown at once


@dataclass(frozen=True, slots=True)
class ModelView:
    """A line of the table of models, in words."""

    name: str
    origin: str
    tier: str
    phase: str
    look: str
    health: str
    reason: str
    notes: tuple[str, ...]
    memory: str
    memory_source: str
    slots: str
    queue: str
    up: str
    restarts: int
    port: str
    url: str
    device: str
    context: str
    generation: str
    fault: Fault | None
    buttons: tuple[Button, ...]
    is_waiting: bool


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a device's bar: where it lies in the drawing, and what it is, in words."""

    look: str
    label: str
    size: str
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class DeviceView:
    """The memory of one device."""

    name: str
    description: str
    total: str
    summary: str
    problem: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A transition."""

    when: str
    stamp: str
    model: str
    before: str
    after: str
    look: str
    reason: str
    kind: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows of the fleet."""

    models: tuple[ModelView, ...]
    left_out: int
    counts: str
    devices: tuple[DeviceView, ...]
    history: tuple[Line, ...]
    age: str  # empty before the listener spoke
    warning: str
    version: str


def shown(value: object, longest: int = _LONGEST) -> str:
    """Text from outside, on one line; without control characters, changes of direction and keys."""
    if not isinstance(value, str):
        return ""
    text = value[: 4 * longest]
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = _KEY.sub(r"\1***", text)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def make_page(
    *, snapshot: Mapping[str, Any] | None, models: Sequence[Any], devices: Sequence[Any],
    history: Sequence[Any], age_seconds: float, mood: int, now: float, worded: Worded,
) -> Page:  # fmt: skip
    """The page of a supervisord in `mood` at `now`, on the wall clock."""
    rows = [one for one in models if isinstance(one, dict) and _is_name(one.get("name"))]
    age_seconds = age_seconds if snapshot is not None else 0.0
    listener = _dict(snapshot.get("listener")) if snapshot is not None else {}
    return Page(
        models=worded.models(rows[:_MOST_MODELS], age_seconds, now),
        left_out=max(len(rows) - _MOST_MODELS, 0),
        counts=_counts(rows),
        devices=tuple(_device(one) for one in devices[:_MOST_DEVICES] if isinstance(one, dict)),
        history=tuple(_line(one, now) for one in reversed(history[-_MOST_LINES:])),
        age="" if snapshot is None else seconds_in_words(age_seconds),
        warning=_warning(snapshot, age_seconds, mood),
        version=shown(listener.get("version"), 40),
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def _warning(snapshot: Mapping[str, Any] | None, age_seconds: float, mood: int) -> str:
    if mood in _MOODS:
        return _MOODS[mood]
    if snapshot is None:
        return "The listener has not spoken yet: nothing is known of the models."
    if age_seconds > SILENT_SECONDS:
        return (
            f"The listener has been silent for {seconds_in_words(age_seconds)}: what stands here "
            "was so then, and nothing heals models now. Only supervisord's states are of now."
        )
    return ""


def _counts(rows: Iterable[Mapping[str, Any]]) -> str:
    """`4 ready, 1 deferred`."""
    counted = Counter(_phase(row.get("phase")) for row in rows)
    return ", ".join(f"{counted[phase]} {phase.value}" for phase in _ORDER if counted[phase])


# --- a model -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Times:
    """What of a model changes by itself."""

    up: str
    failed_ago: str
    next_try: str


class Worded:
    """Models in words; one of which nothing changed since the last page is not worded anew."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Mapping[str, Any], _Times, ModelView]] = {}

    def models(
        self, rows: Iterable[Mapping[str, Any]], age_seconds: float, now: float
    ) -> tuple[ModelView, ...]:
        """The models of one snapshot, each name once; others are forgotten."""
        made = {}
        for row in rows:
            name, times = str(row["name"]), _times(row, age_seconds, now)
            before = self._made.get(name)
            is_same = before is not None and before[0] == row and before[1] == times
            made[name] = before if before and is_same else (row, times, _model(row, times))
        self._made = made
        return tuple(view for _, _, view in made.values())


def _times(row: Mapping[str, Any], age_seconds: float, now: float) -> _Times:
    started_at = _number(row.get("started_at"))
    failed_at = _number(_dict(row.get("last_failure")).get("at"))
    retry = _number(row.get("next_retry_in"))
    return _Times(
        "" if started_at is None else seconds_in_words(now - started_at),
        "" if failed_at is None else f"{seconds_in_words(now - failed_at)} ago",
        "" if retry is None else _next_try(retry - age_seconds),
    )


def _next_try(seconds: float) -> str:
    return f"next try in {seconds_in_words(seconds)}" if seconds >= 1 else "next try now"


def _model(row: Mapping[str, Any], times: _Times) -> ModelView:
    phase = _phase(row.get("phase"))
    slots, usage = _dict(row.get("slots")), _dict(row.get("usage"))
    queued = _count(usage.get("queued"))
    state = shown(row.get("state"), 20)
    return ModelView(
        name=str(row["name"]),
        origin=shown(row.get("repo"), 120) or shown(row.get("file"), 120),
        tier=shown(row.get("tier"), 20).lower(),
        phase="" if phase is None else phase.value,
        look="idle" if phase is None else _LOOKS.get(phase, "idle"),
        health=_health(phase, state, slots, usage, queued),
        reason=shown(row.get("reason")),
        notes=tuple(_notes(row, times)),
        memory=_memory(_dict(row.get("memory"))),
        memory_source=_memory_source(_dict(row.get("memory"))),
        slots=_slots(slots),
        queue=str(queued or ""),
        up=times.up if state in _UP else "",
        restarts=_count(row.get("restarts")) or 0,
        port=str(_count(row.get("port")) or ""),
        url=_url(row.get("url")),
        device=shown(row.get("device"), 60),
        context=_grouped(_count(row.get("context"))),
        generation=str(_count(row.get("generation")) or ""),
        fault=_fault(row, times, is_open=phase in _IN_TROUBLE),
        buttons=_buttons(row, state),
        is_waiting=phase in _WAITING,
    )


def _phase(value: object) -> Phase | None:
    return _PHASES.get(value) if isinstance(value, str) else None


def _health(
    phase: Phase | None, state: str, slots: Mapping[str, Any], usage: Mapping[str, Any],
    queued: int | None,
) -> str:  # fmt: skip
    """What a person would say of its condition, where that says more than its phase."""
    if phase is Phase.UNHEALTHY:
        return "does not answer as it should"
    if phase is not Phase.READY:
        return ""
    if state not in _UP:
        return f"supervisord says {state.lower() or 'nothing'}"
    if usage.get("asleep") is True:
        return "asleep; a request wakes it"
    if queued:
        return f"all slots busy, {queued} waiting"
    return "at work" if _count(slots.get("busy")) else "idle"


def _notes(row: Mapping[str, Any], times: _Times) -> Iterable[str]:
    """What a person must know beside the reason."""
    if times.next_try:
        yield times.next_try
    breaker = row.get("breaker")
    if breaker == "open":
        yield "failed too often: left alone for a while"
    elif breaker == "half-open":
        yield "failed too often: on its one try"
    if row.get("trial") is True:
        yield "changed block, on trial"


def _memory(memory: Mapping[str, Any]) -> str:
    measured, estimated = _count(memory.get("measured")), _count(memory.get("estimated"))
    if measured is not None:
        return mib(measured)
    return "-" if estimated is None else f"~{mib(estimated)}"


def _memory_source(memory: Mapping[str, Any]) -> str:
    estimated = _count(memory.get("estimated"))
    source = shown(memory.get("source"), 20)
    if _count(memory.get("measured")) is None:
        return f"estimated ({source})" if source else "estimated"
    return "measured" if estimated is None else f"measured; estimate {mib(estimated)} ({source})"


def _slots(slots: Mapping[str, Any]) -> str:
    busy, total = _count(slots.get("busy")), _count(slots.get("total"))
    return f"{'-' if busy is None else busy}/{'-' if total is None else total}"


def _failures(failures: Mapping[str, Any]) -> str:
    """`2 crashed, 1 wedged`."""
    counted = ((_count(often), shown(kind, 30)) for kind, often in list(failures.items())[:16])
    return ", ".join(f"{often} {kind}" for often, kind in counted if often and kind)


def _url(value: object) -> str:
    """Only what cannot lead elsewhere than to a server's root is ever a link."""
    return value if isinstance(value, str) and _URL.fullmatch(value) else ""


def _fault(row: Mapping[str, Any], times: _Times, *, is_open: bool) -> Fault | None:
    failure = _dict(row.get("last_failure"))
    kind = shown(failure.get("class"), 30)
    if not kind:
        return None
    return Fault(
        kind, shown(failure.get("message")), times.failed_ago,
        _failures(_dict(row.get("failures"))), is_open,
    )  # fmt: skip


def _buttons(row: Mapping[str, Any], state: str) -> tuple[Button, ...]:
    """What can be asked of it now; what is refused all the same says why."""
    found = []
    if state in _DOWN:
        found.append(Button("start", "Start"))
    if state in _UP:
        found += [Button("stop", "Stop"), Button("restart", "Restart"), Button("drain", "Drain")]
    enabled = row.get("enabled") is True
    found.append(Button("disable", "Disable") if enabled else Button("enable", "Enable"))
    return tuple(found)


# --- devices -------------------------------------------------------------------------------------


def _device(device: Mapping[str, Any]) -> DeviceView:
    total = _count(device.get("total")) or 0
    room, free = _count(device.get("room")), _count(device.get("free"))
    parts = list(_parts(device, room))
    return DeviceView(
        name=shown(device.get("name"), 60),
        description=shown(device.get("description"), 120),
        total=mib(total),
        summary=_summary(total, room, free),
        problem=shown(device.get("problem")),
        segments=tuple(_segments(parts, total)),
    )


_Part = tuple[str, str, int, str]  # look, label, bytes, more words


def _parts(device: Mapping[str, Any], room: int | None) -> Iterable[_Part]:
    holdings = device.get("models")
    found = holdings if isinstance(holdings, list) else []
    models = [one for one in found if isinstance(one, dict)][:_MOST_MODELS]
    for number, one in enumerate(models):
        committed = _count(one.get("committed")) or 0
        held = _count(one.get("held"))
        more = "" if held is None or held == committed else f", holds {mib(held)}"
        name = one.get("name") if _is_name(one.get("name")) else "?"
        yield f"own{number % _OWN_CLASSES}", str(name), max(committed, held or 0), more
    others = _count(device.get("others"))
    if others:
        yield _OTHERS_CLASS, "other programs", others, ""
    reserve = _count(device.get("reserve"))
    if reserve:
        yield _RESERVED_CLASS, "kept free", reserve, ""
    if room is not None:
        yield _FREE_CLASS, "free for models", room, ""


def _segments(parts: Sequence[_Part], total: int) -> Iterable[Segment]:
    """Side by side; squeezed where they are more than there is."""
    whole = max(total, sum(size for _, _, size, _ in parts), 1)
    x = 0.0
    for look, label, size, more in parts:
        width = round(_BAR_UNITS * size / whole, 2)
        yield Segment(look, label, mib(size) + more, round(x, 2), width)
        x += width


def _summary(total: int, room: int | None, free: int | None) -> str:
    words = [f"{mib(total)} in all"]
    if room is not None:
        words.append(f"{mib(room)} free for models")
    if free is not None:
        words.append(f"{mib(free)} free by its driver")
    return ", ".join(words)


# --- history -------------------------------------------------------------------------------------


def _line(line: Mapping[str, Any], now: float) -> Line:
    at = _number(line.get("when"))
    phase = _phase(line.get("to"))
    return Line(
        when=_clock(at, now),
        stamp=_stamp(at),
        model=shown(line.get("model"), 63),
        before=shown(line.get("from"), 20),
        after=shown(line.get("to"), 20),
        look="idle" if phase is None else _LOOKS.get(phase, "idle"),
        reason=shown(line.get("reason")),
        kind=shown(line.get("class"), 30),
        evidence=shown(line.get("evidence")),
    )


# --- numbers and times ---------------------------------------------------------------------------


def seconds_in_words(seconds: float) -> str:
    """`7 s`, `3 min`, `2 h 5 min`, `4 d 3 h`."""
    whole = int(min(max(seconds, 0.0), 1e10))
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def _clock(at: float | None, now: float) -> str:
    """The time of day; with the date where it was not within the last half day."""
    moment = _local(at)
    if at is None or moment is None:
        return ""
    return time.strftime("%H:%M:%S" if abs(now - at) < 43200 else "%Y-%m-%d %H:%M", moment)


def _stamp(at: float | None) -> str:
    moment = _local(at)
    return "" if moment is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", moment)


def _local(at: float | None) -> time.struct_time | None:
    try:
        return None if at is None else time.localtime(at)
    except (OverflowError, ValueError, OSError):
        return None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _count(value: object) -> int | None:
    """A whole number from 0 to what memory could be."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60
    return value if is_one and isinstance(value, int) else None


def _grouped(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
