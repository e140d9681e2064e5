"""What each model is, and what is to be done about it: (state, seen, now) → (state, actions).

Level-triggered: every call sees the whole truth, so a listener that was killed and started again
carries on from what there is. Nothing is believed done because it was asked for; only the next
observation tells.

    supervisord says     and we know                        the model is
    STOPPED              never started, wanted              pending
                         never started, not wanted          disabled
                         it was stopped by hand             stopped, until it is started by hand
    STARTING             -                                  loading
    RUNNING              no 200 yet                         loading
                         a good verdict                     ready
                         a bad verdict                      unhealthy → killed (one at a time)
    STOPPING             slots busy / idle                  draining / stopping
    at rest, but         what is left of its run is sought  verifying
    EXITED, FATAL        a retry cannot help                failed
                         the breaker is open                failed, until the cooldown is over
                         the wait is not over               backoff
                         the wait is over                   pending
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from supervisor_synapse.core import restarts
from supervisor_synapse.core.failures import PERMANENT, Ending, classify
from supervisor_synapse.core.model import (
    AT_REST,
    Failure,
    FailureClass,
    Incarnation,
    Phase,
    ProcessState,
)
from supervisor_synapse.core.probes import BAD, Verdict
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.settings import RestartPolicy
from supervisor_synapse.core.waves import next_starts

# supervisord tells runs apart by whole seconds.
_START_SPACING_SECONDS = 1.05
_SEEN_START_SECONDS = 2.5  # the loop looks more often than that
_KILL_AGAIN_SECONDS = 5.0
# A load that takes longer no longer keeps others from loading.
_LOADING_PLACE_SECONDS = 60.0
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found of one model."""

    name: str
    enabled: bool  # by settings and commands together
    why: str  # it is enabled, or not
    state: ProcessState
    incarnation: Incarnation | None  # None: no process
    run: int  # names its newest run, also when that is over; 0: never started
    age_seconds: float = 0.0  # of the incarnation
    verdict: Verdict = Verdict.UNKNOWN  # of this incarnation
    verdict_reason: str = ""
    busy: bool = False
    ending: Ending | None = None  # where the process has ended by itself
    spawn_error: str = ""
    file_stamp: int = 0  # changes when the model's file does
    is_leaving: bool = False  # its last run is over, and what it left is being looked for
    residue: str = ""  # what its last run left behind for good

    @property
    def is_fresh(self) -> bool:
        """Never started since supervisord knows this program."""
        return self.run == 0


@dataclass(frozen=True, slots=True)
class ModelState:
    """What is remembered of one model between two looks. Times are monotonic seconds."""

    phase: Phase = Phase.DISABLED
    reason: str = ""
    incarnation: Incarnation | None = None
    seen_at: float | None = None  # this incarnation, for the first time
    started_at: float | None = None  # None: nobody was looking
    ready_seconds: float | None = None
    was_ready: bool = False  # this incarnation, at some time
    ready_at: float | None = None  # ready without a break since then
    restarts: int = 0  # starts after a failure, by ourselves
    retries: Restarts = field(default_factory=Restarts)
    last_failure: Failure | None = None
    failed_run: int = 0  # the run whose end was judged
    failed_stamp: int = 0  # of its file, then
    asked_at: float | None = None  # a start was asked for
    condemned: Failure | None = None  # why this incarnation must go
    killed_at: float | None = None
    is_out: bool = False  # a model that had been ready was taken out and is not back
    is_by_hand: bool = False  # started although it is not enabled
    resume: bool = False  # enabled by command since it was stopped
    drain: bool = False  # to be stopped when it is idle
    moved_run: int = 0  # the failed run for which another port was asked for


@dataclass(frozen=True, slots=True)
class Start:
    """Ask supervisord to start a model."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask supervisord to stop a model; it drains."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End a run that answers no more: it is not asked."""

    name: str
    incarnation: Incarnation
    reason: str


@dataclass(frozen=True, slots=True)
class MovePort:
    """Give a model another port: a stranger has its own."""

    name: str
    reason: str


Action = Start | Stop | Kill | MovePort


@dataclass(frozen=True, slots=True)
class Transition:
    """A model went from one phase to another."""

    model: str
    before: Phase | None  # None: seen for the first time
    after: Phase
    reason: str
    incarnation: Incarnation | None = None
    failure: Failure | None = None  # what caused it, where something failed


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say of these decisions."""

    max_parallel: int = 3
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True)
class Now:
    """The two clocks and one chance in [0, 1), read once for each decision."""

    monotonic: float
    wall: float
    chance: float = 0.5


@dataclass(frozen=True, slots=True)
class Decision:
    """New states by name, what to do, and what has changed."""

    states: Mapping[str, ModelState]
    actions: tuple[Action, ...]
    transitions: tuple[Transition, ...]


def decide(
    states: Mapping[str, ModelState], seen: Sequence[Seen], now: Now, policy: Policy
) -> Decision:
    """One step for the whole fleet; `seen` is in the order in which models start."""
    after: dict[str, ModelState] = {}
    actions: list[Action] = []
    for place, one in enumerate(seen):
        # Models that fail in the same instant still wait differently long.
        chance = (now.chance + place * _GOLDEN) % 1.0
        after[one.name] = _judge(states.get(one.name), one, replace(now, chance=chance), policy)
    transitions = tuple(_transitions(states, after))
    actions += _moves(seen, after)
    actions += _stops(seen, after)
    actions += _kills(seen, after, now)
    actions += _starts(seen, after, now, policy)
    return Decision(after, tuple(actions), transitions)


# --- what a model is -----------------------------------------------------------------------------


def _judge(before: ModelState | None, seen: Seen, now: Now, policy: Policy) -> ModelState:
    state = _by_process(before, seen, now, policy)
    if seen.is_leaving and seen.incarnation is None and state.phase in AT_REST:
        return _in(state, Phase.VERIFYING, "its run is over")
    return state


def _by_process(before: ModelState | None, seen: Seen, now: Now, policy: Policy) -> ModelState:
    state = _of_run(before or ModelState(), seen, now)
    match seen.state:
        case ProcessState.STOPPED:
            was_disabled = before is not None and before.phase is Phase.DISABLED
            return _at_rest(replace(state, resume=state.resume or was_disabled), seen)
        case ProcessState.STARTING:
            return _in(state, Phase.LOADING, "its process is starting")
        case ProcessState.RUNNING:
            return _running(state, seen, now, policy)
        case ProcessState.STOPPING:
            return _stopping(state, seen)
        case ProcessState.UNKNOWN if seen.incarnation is not None:
            return _running(state, seen, now, policy)  # a signal of supervisord's failed: it lives
        case ProcessState.EXITED | ProcessState.FATAL | ProcessState.BACKOFF | ProcessState.UNKNOWN:
            return _ended(state, seen, now, policy)
    assert_never(seen.state)


def _of_run(state: ModelState, seen: Seen, now: Now) -> ModelState:
    """Forget what belonged to another run, or to a program that was replaced."""
    if seen.is_fresh:
        is_new = state.incarnation is None and not state.failed_run
        is_moved = state.failed_run != 0 and state.moved_run == state.failed_run
        if is_new or is_moved:
            return state
        return ModelState(resume=state.resume, asked_at=state.asked_at)
    if seen.incarnation is None or seen.incarnation == state.incarnation:
        return state
    return replace(
        state, incarnation=seen.incarnation, seen_at=now.monotonic,
        started_at=_start_of(state, seen, now), ready_seconds=None, was_ready=False, ready_at=None,
        condemned=None, killed_at=None, moved_run=0, failed_run=0, phase=Phase.PENDING,
        is_by_hand=state.is_by_hand if _is_ours(state, now) else not seen.enabled,
        retries=restarts.on_start(state.retries), resume=False, drain=False,
    )  # fmt: skip


def _start_of(state: ModelState, seen: Seen, now: Now) -> float | None:
    """When this incarnation was started; None where nobody was looking."""
    if _asked_just_now(state, now):
        return state.asked_at
    return now.monotonic if seen.age_seconds <= _SEEN_START_SECONDS else None


def _is_ours(state: ModelState, now: Now) -> bool:
    """Whether a new run is the one we asked for; a `disable` may have come in between."""
    return state.phase is Phase.PENDING and _asked_just_now(state, now)


def _asked_just_now(state: ModelState, now: Now) -> bool:
    return state.asked_at is not None and now.monotonic - state.asked_at <= _SEEN_START_SECONDS


def _in(state: ModelState, phase: Phase, reason: str) -> ModelState:
    return state if state.phase is phase else replace(state, phase=phase, reason=reason)


def _said(state: ModelState, phase: Phase, reason: str) -> ModelState:
    """Like `_in`, where the reason changes within the phase."""
    return replace(state, phase=phase, reason=reason)


def _at_rest(state: ModelState, seen: Seen) -> ModelState:
    state = replace(state, is_out=False, condemned=None, ready_at=None)
    if not seen.enabled and (seen.is_fresh or not state.is_by_hand):
        return _said(state, Phase.DISABLED, _with_residue(seen.why, seen))
    if seen.enabled and (seen.is_fresh or state.resume):
        return _in(state, Phase.PENDING, "enabled; waits for a loading place")
    why = "drained" if state.drain else "stopped by hand"
    return _in(state, Phase.STOPPED, _with_residue(why, seen))


def _with_residue(reason: str, seen: Seen) -> str:
    return f"{reason}; left behind: {seen.residue}" if seen.residue else reason


def _running(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """Startup, then readiness, then liveness; no evidence changes nothing."""
    state = replace(state, resume=False)  # it runs: whoever stops it from now on is heeded
    if state.killed_at is not None:
        return state  # what a killed server answers, or no longer answers, is no evidence
    match seen.verdict:
        case Verdict.UNKNOWN | Verdict.MISSED:
            if state.phase in (Phase.READY, Phase.UNHEALTHY, Phase.LOADING):
                return state
            if state.phase is Phase.DRAINING and state.drain:
                return state
            return _in(state, Phase.LOADING, "its process runs")
        case Verdict.LOADING:
            reason = seen.verdict_reason or "its process runs"
            return _in(replace(state, ready_at=None), Phase.LOADING, reason)
        case Verdict.READY:
            return _ready(state, now, policy)
        case Verdict.STUCK:
            return _unhealthy(state, FailureClass.UNRESPONSIVE, seen, now)
        case Verdict.UNRESPONSIVE:
            return _unhealthy(state, FailureClass.UNRESPONSIVE, seen, now)
        case Verdict.WEDGED:
            return _unhealthy(state, FailureClass.WEDGED, seen, now)
        case Verdict.FOREIGN:
            return _unhealthy(state, FailureClass.PORT_IN_USE, seen, now)
    assert_never(seen.verdict)


def _ready(state: ModelState, now: Now, policy: Policy) -> ModelState:
    seconds = state.ready_seconds
    if seconds is None and state.started_at is not None:
        seconds = now.monotonic - state.started_at
    ready_at = now.monotonic if state.ready_at is None else state.ready_at
    ready = replace(
        state, ready_seconds=seconds, was_ready=True, ready_at=ready_at, condemned=None,
        is_out=False,
        retries=restarts.after_healthy(state.retries, now.monotonic - ready_at, policy.restart),
    )  # fmt: skip
    if state.drain:
        return _in(ready, Phase.DRAINING, "stops when it is idle")
    when = "answers" if seconds is None else f"answered {seconds:.1f} s after its start"
    return _in(ready, Phase.READY, when)


def _unhealthy(state: ModelState, kind: FailureClass, seen: Seen, now: Now) -> ModelState:
    condemned = state.condemned or Failure(kind, seen.verdict_reason, now.wall)
    sick = replace(state, condemned=condemned, ready_at=None, last_failure=condemned)
    return _in(sick, Phase.UNHEALTHY, seen.verdict_reason)


def _stopping(state: ModelState, seen: Seen) -> ModelState:
    phase = Phase.DRAINING if seen.busy else Phase.STOPPING
    return _in(replace(state, ready_at=None), phase, "a stop was asked for")


def _ended(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """Each end is judged once; then it is waited, or not, as the failure's class has it."""
    if seen.run != state.failed_run:
        state = _failed(state, seen, now, policy)
    if state.drain:
        return _in(replace(state, is_out=False), Phase.STOPPED, _with_residue("drained", seen))
    if not seen.enabled and not state.is_by_hand:
        return _said(replace(state, is_out=False), Phase.DISABLED, seen.why)
    failure = state.last_failure
    if failure is None:  # cannot be: the line above noted one
        return state
    if failure.failure_class in PERMANENT and not state.resume:
        return _permanent(state, failure, seen, now, policy)
    return _waiting(state, failure, now, policy)


def _permanent(
    state: ModelState, failure: Failure, seen: Seen, now: Now, policy: Policy
) -> ModelState:
    """A retry waits for a changed file, and then as after a crash: it may still be written."""
    kind, retries = failure.failure_class, state.retries
    is_mended = kind is not FailureClass.BAD_ARGUMENT and seen.file_stamp != state.failed_stamp
    if is_mended and retries.retry_at is None:
        retries = restarts.after_failure(retries, now.monotonic, now.chance, policy.restart)
    if retries.retry_at is not None:
        return _waiting(replace(state, retries=retries), failure, now, policy)
    reason = f"{kind.value}: a retry cannot help; mend it, then start it"
    return _in(replace(state, is_out=False), Phase.FAILED, reason)


def _failed(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    # A run may be over before anybody saw it; then what is known is of the run before.
    is_known = state.incarnation is not None and state.incarnation.started_at == seen.run
    failure = state.condemned if is_known else None
    if failure is None:
        kind, evidence = classify(
            seen.ending or Ending(-1, seen.spawn_error), was_ready=is_known and state.was_ready
        )
        failure = Failure(kind, evidence, now.wall)
    retries = restarts.on_start(state.retries)
    if failure.failure_class not in PERMANENT:
        retries = restarts.after_failure(retries, now.monotonic, now.chance, policy.restart)
    return replace(
        state, last_failure=failure, failed_run=seen.run, failed_stamp=seen.file_stamp,
        retries=retries, condemned=None, killed_at=None, ready_at=None, resume=False,
        incarnation=state.incarnation if is_known else None,
        is_out=state.is_out and is_known and state.killed_at is not None,  # not if it fails again
    )  # fmt: skip


def _waiting(state: ModelState, failure: Failure, now: Now, policy: Policy) -> ModelState:
    kind, retries = failure.failure_class.value, state.retries
    if state.resume or restarts.is_due(retries, now.monotonic):
        return _in(state, Phase.PENDING, f"{kind}; starts again")
    wait = (retries.retry_at or 0.0) - now.monotonic
    if retries.is_open:
        restart = policy.restart
        return _in(
            replace(state, is_out=False), Phase.FAILED,
            f"{kind}; {restart.intensity} failures within {restart.period_seconds:.0f} s: one "
            f"trial after {wait:.0f} s",
        )  # fmt: skip
    return _in(state, Phase.BACKOFF, f"{kind}; starts again after {wait:.1f} s")


# --- what is to be done --------------------------------------------------------------------------


def _moves(seen: Sequence[Seen], after: dict[str, ModelState]) -> Iterable[Action]:
    """A port that a stranger took is given up, once for each failure."""
    for one in seen:
        state, failure = after[one.name], after[one.name].last_failure
        if (
            state.phase is Phase.BACKOFF
            and state.moved_run != state.failed_run
            and failure is not None
            and failure.failure_class is FailureClass.PORT_IN_USE
        ):
            after[one.name] = replace(state, moved_run=state.failed_run)
            yield MovePort(one.name, failure.message)


def _stops(seen: Sequence[Seen], after: dict[str, ModelState]) -> Iterable[Action]:
    """What was disabled by command goes; what was started by hand since then stays."""
    for one in seen:
        state = after[one.name]
        running = one.state in (ProcessState.RUNNING, ProcessState.STARTING)
        if running and not one.enabled and not state.is_by_hand:
            yield Stop(one.name, one.why)
        elif running and state.drain and state.phase is Phase.DRAINING and not one.busy:
            yield Stop(one.name, "drained")


def _kills(seen: Sequence[Seen], after: dict[str, ModelState], now: Now) -> Iterable[Action]:
    """Those that are condemned; of those that had been ready, one at a time.

    Probes of healthy servers fail together when the machine is out of breath, and then killing
    them all would be the outage.
    """
    is_one_out = any(state.is_out for state in after.values())
    for one in seen:
        state = after[one.name]
        if state.condemned is None or one.incarnation is None:
            continue
        if one.verdict not in BAD and state.killed_at is None:
            continue
        if state.killed_at is not None and now.monotonic - state.killed_at < _KILL_AGAIN_SECONDS:
            continue
        if state.was_ready and is_one_out and not state.is_out:
            continue
        is_one_out = is_one_out or state.was_ready
        after[one.name] = replace(state, killed_at=now.monotonic, is_out=state.was_ready)
        yield Kill(one.name, one.incarnation, state.condemned.message)


def _starts(
    seen: Sequence[Seen], after: dict[str, ModelState], now: Now, policy: Policy
) -> Iterable[Action]:
    # Nothing starts beside what its last run may have left.
    due = [one.name for one in seen if not one.is_leaving and _may_start(after[one.name], now)]
    loading = sum(_holds_place(state, now) for state in after.values())
    for name in next_starts(due, loading, policy.max_parallel):
        state = after[name]
        after[name] = replace(
            state, asked_at=now.monotonic, retries=restarts.on_start(state.retries),
            restarts=state.restarts + (state.failed_run != 0),
        )  # fmt: skip
        yield Start(name, state.reason)


def _may_start(state: ModelState, now: Now) -> bool:
    if state.phase is not Phase.PENDING:
        return False
    return state.asked_at is None or now.monotonic - state.asked_at >= _START_SPACING_SECONDS


def _holds_place(state: ModelState, now: Now) -> bool:
    if state.phase is not Phase.LOADING:
        return False
    seen_at = now.monotonic if state.seen_at is None else state.seen_at
    return now.monotonic - seen_at < _LOADING_PLACE_SECONDS


def _transitions(
    before: Mapping[str, ModelState], after: Mapping[str, ModelState]
) -> Iterable[Transition]:
    for name, state in after.items():
        earlier = before.get(name)
        if earlier is None or earlier.phase is not state.phase:
            failure = state.last_failure if state.phase in _AFTER_FAILURE else None
            yield Transition(
                name, earlier.phase if earlier else None, state.phase, state.reason,
                state.incarnation, failure,
            )  # fmt: skip


_AFTER_FAILURE = frozenset({Phase.UNHEALTHY, Phase.BACKOFF, Phase.FAILED})
