"""Startup, readiness and liveness of one run: what its answers, and its silence, add up to.

/health alone proves little: a server whose compute hangs goes on answering 200. What proves life
is work: a decode counter or a slot that moves while something is being processed. So beside quick
questions (/health, bounded by the probe timeout) there is one patient question at a time (the
counters; and, to an idle server, a completion of one token). A server is *wedged* when something
is under way and nothing has moved for `stall_seconds`. On builds where the counters answer only
between two batches, a question that is still out counts as something under way.

Nothing here is an opinion about speed: a full queue, an hour-long prompt and a slow disk all move.
Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from supervisor_synapse.core.model import Health
from supervisor_synapse.core.settings import ProbePolicy

_CANARY_SHARE = 0.25
_CANARY_SHARE_OF_ONE = 5.0


class Verdict(Enum):
    """What the evidence says of a run now."""

    UNKNOWN = "unknown"
    LOADING = "loading"
    READY = "ready"
    MISSED = "missed"  # some probes failed, not yet enough
    STUCK = "stuck"  # loading, and neither log nor memory nor disk has moved
    UNRESPONSIVE = "unresponsive"
    WEDGED = "wedged"
    FOREIGN = "foreign"  # another process answers on its port
    ON_HOST = "on-host"  # it was to run on a device, and does not


BAD = frozenset(
    {
        Verdict.STUCK, Verdict.UNRESPONSIVE, Verdict.WEDGED, Verdict.FOREIGN, Verdict.ON_HOST,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Activity:
    """How many slots work, and counters of which some move whenever work is done."""

    busy: int
    counters: tuple[int, ...] = ()
    queued: int | None = None  # requests that wait for a slot
    prompt_tokens: int | None = None  # read since its start
    generated_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Liveness:
    """The evidence about one incarnation."""

    health: Health = Health.UNKNOWN  # the newest quick answer
    was_ready: bool = False
    missed: int = 0  # quick questions in a row that found no healthy server
    moved_at: float = 0.0  # the newest sign of work, or of there being none to do
    footprint: tuple[int, ...] = ()  # while it loads: sizes that grow
    activity: Activity | None = None
    asked_at: float | None = None  # the patient question is out since then
    canary_at: float | None = None  # one token was asked for then
    proven_at: float = 0.0  # when it last produced something, or may be taken to
    is_asleep: bool = False
    is_halted: bool = False  # its process is stopped by a signal
    foreign: str = ""  # who listens on its port, if that is not this run
    on_host: str = ""  # the line that shows that it did not come onto its device


def begin(now: float, *, was_ready: bool = False) -> Liveness:
    """Nothing is known of a new run; of an older one, that it `was_ready`."""
    return Liveness(moved_at=now, proven_at=now, was_ready=was_ready)


def on_health(before: Liveness, health: Health, now: float) -> Liveness:
    """A quick question was answered, or was not."""
    match health:
        case Health.UNKNOWN:
            return before
        case Health.READY:
            first = not before.was_ready
            return replace(
                before, health=health, was_ready=True, missed=0, is_halted=False,
                moved_at=now if first else before.moved_at,
                proven_at=now if first else before.proven_at,
            )  # fmt: skip
        case Health.LOADING:
            return replace(before, health=health, missed=0, is_halted=False)
        case Health.REFUSED | Health.SILENT | Health.BROKEN:
            missed = before.missed + 1 if before.was_ready else 0
            return replace(before, health=health, missed=missed)
    assert_never(health)


def on_sleep(before: Liveness, now: float) -> Liveness:
    """The server said that it sleeps: healthy, and not to be asked for more."""
    awake = on_health(before, Health.READY, now)
    return replace(
        awake, is_asleep=True, moved_at=now, proven_at=now, activity=Activity(0), asked_at=None
    )


def on_footprint(before: Liveness, footprint: tuple[int, ...], now: float) -> Liveness:
    """Sizes that grow while a server loads; any change is life."""
    if footprint == before.footprint:
        return before
    return replace(before, footprint=footprint, moved_at=now)


def on_asked(before: Liveness, now: float) -> Liveness:
    """The patient question goes out."""
    return replace(before, asked_at=now, moved_at=_unless_busy(before, now))


def on_activity(before: Liveness, found: Activity | None, now: float) -> Liveness:
    """The patient question came back; None: this server does not tell, which proves nothing."""
    if found is None:
        return replace(before, activity=None, asked_at=None, moved_at=now)
    worked = before.activity is not None and found.counters != before.activity.counters
    idle = found.busy == 0 and before.canary_at is None
    return replace(
        before, activity=found, asked_at=None, is_asleep=False,
        moved_at=now if worked or idle else before.moved_at,
        proven_at=now if worked else before.proven_at,
    )  # fmt: skip


def on_unanswered(before: Liveness) -> Liveness:
    """The patient question was refused, or given up: the evidence stays as it is."""
    return replace(before, asked_at=None)


def on_canary(before: Liveness, now: float) -> Liveness:
    """One token is asked for."""
    return replace(before, canary_at=now, moved_at=_unless_busy(before, now))


def on_canary_answer(before: Liveness, now: float, *, answered: bool) -> Liveness:
    """The token came; or the question was given up, which leaves the evidence as it is."""
    if not answered:
        return replace(before, canary_at=None)
    return replace(before, canary_at=None, moved_at=now, proven_at=now)


def forgive(before: Liveness, seconds: float, now: float) -> Liveness:
    """We looked away for so long (frozen, suspended): what was not seen is no evidence."""
    return replace(before, moved_at=min(before.moved_at + seconds, now), missed=0)


def is_working(state: Liveness) -> bool:
    """Whether something is under way that should make counters move."""
    busy = state.activity is not None and state.activity.busy > 0
    return busy or state.asked_at is not None or state.canary_at is not None


def _unless_busy(state: Liveness, now: float) -> float:
    """A new question to an idle server starts the clock; one to a busy server does not stop it."""
    return state.moved_at if is_working(state) else now


def canary_seconds(policy: ProbePolicy, parallel: int) -> float:
    """How long a server may be idle before it is asked for one token.

    The token costs a slot its cached prompt. One of several slots can be spared for that; the only
    one is left alone much longer.
    """
    return policy.stall_seconds * (_CANARY_SHARE if parallel > 1 else _CANARY_SHARE_OF_ONE)


def wants_canary(state: Liveness, now: float, interval_seconds: float) -> bool:
    """Whether an idle server should be asked for one token now.

    Only when every slot is known to be idle: a busy server would only queue it, and shows by its
    counters whether it works.
    """
    return (
        state.was_ready
        and state.health is Health.READY
        and state.activity is not None
        and not is_working(state)
        and not state.is_asleep
        and now - state.proven_at >= interval_seconds
    )


def judge(state: Liveness, now: float, policy: ProbePolicy) -> tuple[Verdict, str]:
    """The verdict, and what it rests on in words."""
    still_seconds = now - state.moved_at
    if state.foreign:
        return Verdict.FOREIGN, f"its port is served by {state.foreign}"
    if state.on_host:
        return Verdict.ON_HOST, f"it was to run on a device, and does not: {state.on_host}"
    if not state.was_ready:
        if state.health is Health.UNKNOWN and still_seconds < policy.stall_seconds:
            return Verdict.UNKNOWN, ""
        if still_seconds >= policy.stall_seconds:
            return Verdict.STUCK, (
                f"not ready, and its log, memory and reads have stood still for "
                f"{still_seconds:.0f} s"
            )
        return Verdict.LOADING, ""
    return _judge_ready(state, still_seconds, policy)


def _judge_ready(state: Liveness, still_seconds: float, policy: ProbePolicy) -> tuple[Verdict, str]:
    if state.missed and state.is_halted:
        return Verdict.UNRESPONSIVE, "its process was stopped by a signal and answers no more"
    if state.missed >= policy.failure_threshold:
        return Verdict.UNRESPONSIVE, f"{state.missed} probes in a row failed: {state.health.value}"
    if is_working(state) and still_seconds >= policy.stall_seconds:
        return Verdict.WEDGED, f"busy, and nothing has moved for {still_seconds:.0f} s"
    if state.health is Health.LOADING and still_seconds >= policy.stall_seconds:
        return Verdict.UNRESPONSIVE, f"it says that it loads, for {still_seconds:.0f} s"
    if state.health is Health.LOADING:  # again: it woke, or took another model
        return Verdict.LOADING, "it says that it loads"
    if state.missed:
        return Verdict.MISSED, f"{state.missed} probe(s) failed: {state.health.value}"
    return (Verdict.UNKNOWN if state.health is Health.UNKNOWN else Verdict.READY), ""
