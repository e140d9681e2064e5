"""What each model is, and what is to be done about it: (state, seen, now) → (state, actions).

Level-triggered: every call sees the whole truth, so a listener that was killed and started again
carries on from what there is. Nothing is believed done because it was asked for; only the next
observation tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from supervisor_synapse.core.failures import Ending, classify
from supervisor_synapse.core.model import (
    Failure,
    FailureClass,
    Health,
    Incarnation,
    Phase,
    ProcessState,
)
from supervisor_synapse.core.waves import next_starts


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found of one model."""

    name: str
    enabled: bool
    state: ProcessState
    incarnation: Incarnation | None  # None: no process
    fresh: bool  # never started since supervisord knows this program
    health: Health = Health.UNKNOWN  # of this incarnation, newest probe
    busy: bool = False
    ending: Ending | None = None  # where the process has ended by itself
    spawn_error: str = ""


@dataclass(frozen=True, slots=True)
class ModelState:
    """What is remembered of one model between two looks. Times are monotonic seconds."""

    phase: Phase = Phase.DISABLED
    reason: str = ""
    incarnation: Incarnation | None = None
    started_at: float | None = None
    ready_seconds: float | None = None
    failed_probes: int = 0
    restarts: int = 0
    last_failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Ask supervisord to start a model."""

    name: str
    reason: str


Action = Start


@dataclass(frozen=True, slots=True)
class Transition:
    """A model went from one phase to another."""

    model: str
    before: Phase | None  # None: seen for the first time
    after: Phase
    reason: str
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say of these decisions."""

    max_parallel: int = 3
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class Now:
    """The two clocks, read once for each decision."""

    monotonic: float
    wall: float


@dataclass(frozen=True, slots=True)
class Decision:
    """New states by name, what to do, and what has changed."""

    states: Mapping[str, ModelState]
    actions: tuple[Action, ...]
    transitions: tuple[Transition, ...]


# Phases in which a model holds a loading place.
_LOADING = frozenset({Phase.LOADING})


def decide(
    states: Mapping[str, ModelState], seen: Sequence[Seen], now: Now, policy: Policy
) -> Decision:
    """One step for the whole fleet; `seen` is in the order in which models start."""
    after = {one.name: _judge(states.get(one.name), one, now, policy) for one in seen}
    starts = next_starts(
        [one.name for one in seen if after[one.name].phase is Phase.PENDING],
        sum(state.phase in _LOADING for state in after.values()),
        policy.max_parallel,
    )
    actions = tuple(Start(name, after[name].reason) for name in starts)
    return Decision(after, actions, tuple(_transitions(states, after)))


def _transitions(
    before: Mapping[str, ModelState], after: Mapping[str, ModelState]
) -> Iterable[Transition]:
    for name, state in after.items():
        earlier = before.get(name)
        if earlier is None or earlier.phase is not state.phase:
            failure = state.last_failure
            evidence = failure.message if failure and state.phase is Phase.FAILED else ""
            before_phase = earlier.phase if earlier else None
            yield Transition(name, before_phase, state.phase, state.reason, evidence)


def _judge(before: ModelState | None, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """The phase of one model, from supervisord's state of its process and the newest probe."""
    state = _of_incarnation(before or ModelState(), seen, now)
    match seen.state:
        case ProcessState.STOPPED:
            return _at_rest(state, seen)
        case ProcessState.STARTING:
            return _in(state, Phase.LOADING, "its process is starting")
        case ProcessState.RUNNING:
            return _running(state, seen, now, policy)
        case ProcessState.STOPPING:
            phase = Phase.DRAINING if seen.busy else Phase.STOPPING
            return _in(state, phase, "a stop was asked for")
        case ProcessState.BACKOFF | ProcessState.FATAL:
            return _failed(state, FailureClass.CRASHED, seen.spawn_error or "cannot start", now)
        case ProcessState.EXITED | ProcessState.UNKNOWN:
            kind, evidence = classify(seen.ending or Ending(-1, ""))
            return _failed(state, kind, evidence, now)
    assert_never(seen.state)


def _of_incarnation(state: ModelState, seen: Seen, now: Now) -> ModelState:
    """Forget what belonged to another run."""
    if seen.incarnation == state.incarnation or seen.incarnation is None:
        return state
    again = state.incarnation is not None
    return replace(
        state, incarnation=seen.incarnation, started_at=now.monotonic, ready_seconds=None,
        failed_probes=0, restarts=state.restarts + again, phase=Phase.PENDING,
    )  # fmt: skip


def _in(state: ModelState, phase: Phase, reason: str) -> ModelState:
    return state if state.phase is phase else replace(state, phase=phase, reason=reason)


def _at_rest(state: ModelState, seen: Seen) -> ModelState:
    if not seen.fresh:
        return _in(state, Phase.STOPPED, "stopped on request")
    if seen.enabled:
        return _in(state, Phase.PENDING, "enabled; waits for a loading place")
    return _in(state, Phase.DISABLED, "not enabled")


def _running(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """Startup, then readiness: before the first 200 nothing is a failure."""
    was_ready = state.phase in (Phase.READY, Phase.UNHEALTHY)
    match seen.health:
        case Health.READY:
            seconds = state.ready_seconds
            if seconds is None and state.started_at is not None:
                seconds = now.monotonic - state.started_at
            ready = replace(state, failed_probes=0, ready_seconds=seconds)
            return _in(ready, Phase.READY, f"answers {seconds or 0:.1f} s after its start")
        case Health.UNKNOWN:
            return state if was_ready else _in(state, Phase.LOADING, "its process runs")
        case Health.LOADING | Health.REFUSED | Health.SILENT | Health.BROKEN:
            if not was_ready:
                return _in(state, Phase.LOADING, "its process runs")
            return _missed(state, seen.health, policy)
    assert_never(seen.health)


def _missed(state: ModelState, health: Health, policy: Policy) -> ModelState:
    """One missed probe proves nothing."""
    missed = replace(state, failed_probes=state.failed_probes + 1)
    if missed.failed_probes < policy.failure_threshold:
        return missed
    return _in(missed, Phase.UNHEALTHY, f"{missed.failed_probes} probes failed: {health.value}")


def _failed(state: ModelState, kind: FailureClass, evidence: str, now: Now) -> ModelState:
    if state.phase is Phase.FAILED:
        return state
    failure = Failure(kind, evidence, now.wall)
    return replace(state, phase=Phase.FAILED, reason=kind.value, last_failure=failure)
