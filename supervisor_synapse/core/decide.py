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

A model that failed and has a fallback is pending again at once, with that (failover.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from supervisor_synapse.core import failover, restarts
from supervisor_synapse.core.act import act
from supervisor_synapse.core.demand import waits_to_be_asked
from supervisor_synapse.core.failures import PERMANENT, REFUSED_STATUS, Ending, classify
from supervisor_synapse.core.model import (
    AT_REST,
    DeviceReading,
    Failure,
    FailureClass,
    Phase,
    ProcessState,
)
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.state import Decision, ModelState, Now, Policy, Seen, Transition

_SEEN_START_SECONDS = 2.5  # the loop looks more often than that
_REPLACED_SECONDS = 30.0  # a program that is new within them is new by our own doing
_UPDATE_SECONDS = 3.0  # between the end of a model and its replacement, by one `update`
_GOLDEN = 0.6180339887498949
_DORMANT = "nobody has used it for long; starts when it is asked for"

_WAITS = frozenset({Phase.PENDING, Phase.DEFERRED})  # for a place, or for memory


def decide(
    states: Mapping[str, ModelState],
    seen: Sequence[Seen],
    now: Now,
    policy: Policy,
    readings: Sequence[DeviceReading] = (),
) -> Decision:
    """One step for the whole fleet; `seen` is in the order in which models start."""
    after: dict[str, ModelState] = {}
    for place, one in enumerate(seen):
        # Models that fail in the same instant still wait differently long.
        chance = (now.chance + place * _GOLDEN) % 1.0
        after[one.name] = _judge(states.get(one.name), one, replace(now, chance=chance), policy)
    actions, ledger = act(seen, after, now, policy, tuple(readings))
    return Decision(after, actions, tuple(_transitions(states, after)), ledger)


def is_at_rest_by_hand(state: ModelState, now: Now) -> bool:
    """Whether a model had been stopped by hand before its program is replaced: `supervisorctl
    update` stops one that runs, too, and replaces it at once.
    """
    if state.phase is not Phase.STOPPED or state.stopped_at is None:
        return False
    return state.rests or now.monotonic - state.stopped_at > _UPDATE_SECONDS


# --- what a model is -----------------------------------------------------------------------------


def _judge(before: ModelState | None, seen: Seen, now: Now, policy: Policy) -> ModelState:
    state = failover.of_both(before, _by_process(before, seen, now, policy), seen.claim)
    if seen.is_leaving and seen.incarnation is None and state.phase in AT_REST:
        return _in(state, Phase.VERIFYING, "its run is over")
    return state


def _by_process(before: ModelState | None, seen: Seen, now: Now, policy: Policy) -> ModelState:
    state = _of_run(before or ModelState(), seen, now)
    match seen.state:
        case ProcessState.STOPPED:
            was_disabled = before is not None and before.phase is Phase.DISABLED
            return _at_rest(replace(state, resume=state.resume or was_disabled), seen, now)
        case ProcessState.STARTING:
            return _in(state, Phase.LOADING, "its process is starting")
        case ProcessState.RUNNING:
            return _running(state, seen, now, policy)
        case ProcessState.STOPPING:
            return _stopping(state, seen)
        case ProcessState.UNKNOWN if seen.incarnation is not None:
            # A signal of supervisord's failed: it lives, and supervisord cannot stop it any more.
            return _running(replace(state, drain=False), seen, now, policy)
        case ProcessState.EXITED | ProcessState.FATAL | ProcessState.BACKOFF | ProcessState.UNKNOWN:
            return _ended(state, seen, now, policy)
    assert_never(seen.state)


def _of_run(state: ModelState, seen: Seen, now: Now) -> ModelState:
    """Forget what belonged to another run, or to a program that was replaced."""
    if seen.is_fresh:
        is_new = state.incarnation is None and not state.failed_run
        is_moved = state.failed_run != 0 and state.moved_run == state.failed_run
        is_replaced = _is_ours_to_replace(state.replaced_at, now)
        is_replaced = is_replaced or state.target_rung == seen.claim.rung
        if is_replaced and state.failover is not None:  # it may have to wait for long
            return replace(state, incarnation=None, failed_run=0)
        if is_new or is_moved or is_replaced:
            return state
        # Out by our own doing it stays, whoever has replaced it meanwhile.
        anew = ModelState(
            resume=state.resume, asked_at=state.asked_at, out_since=state.out_since
        )  # fmt: skip
        if not _is_ours_to_replace(state.renewed_at, now):
            if not is_at_rest_by_hand(state, now):
                return anew
            return replace(anew, phase=state.phase, reason=state.reason, rests=True)
        return replace(
            anew, phase=state.phase, reason=state.reason, last_failure=state.last_failure,
            rests=state.rests, out_since=state.out_since,
        )  # fmt: skip
    if seen.incarnation is None or seen.incarnation == state.incarnation:
        return state if state.tried else replace(state, tried=_block_of(state, seen))
    return replace(
        state, incarnation=seen.incarnation, seen_at=now.monotonic,
        started_at=_start_of(state, seen, now), ready_seconds=None, was_ready=False, ready_at=None,
        has_slept=False,
        condemned=None, killed_at=None, moved_run=0, failed_run=0, phase=Phase.PENDING,
        is_by_hand=state.is_by_hand if _is_ours(state, now) else not seen.enabled,
        retries=restarts.on_start(state.retries), resume=False, drain=False, idle_since=None,
        roomy_since=None, is_refused=False, evicted_for="", replaced_at=None, renewed_at=None,
        is_wanted_itself=failover.is_asked_for(state), tried=_block_held(seen), rests=False,
        stopped_at=None,
    )  # fmt: skip


def _block_held(seen: Seen) -> str:
    """The block with which supervisord starts a model; "" while it may be another than the applied
    one. What a run of that does proves nothing of the applied one.
    """
    return "" if seen.is_untold or seen.is_unadopted else seen.digest


def _block_of(state: ModelState, seen: Seen) -> str:
    """The block of a run that was seen before, or judged, when that was not known."""
    is_known = seen.incarnation is not None or state.failed_run == seen.run
    return _block_held(seen) if is_known else ""


def _is_ours_to_replace(at: float | None, now: Now) -> bool:
    """Whether a program that is new since then is so by our own doing."""
    return at is not None and now.monotonic - at <= _REPLACED_SECONDS


def _start_of(state: ModelState, seen: Seen, now: Now) -> float | None:
    """When this incarnation was started; None where nobody was looking."""
    if _asked_just_now(state, now):
        return state.asked_at
    return now.monotonic if seen.age_seconds <= _SEEN_START_SECONDS else None


def _is_ours(state: ModelState, now: Now) -> bool:
    """Whether a new run is the one we asked for; a `disable` may have come in between."""
    return state.phase in _WAITS and _asked_just_now(state, now)


def _asked_just_now(state: ModelState, now: Now) -> bool:
    return state.asked_at is not None and now.monotonic - state.asked_at <= _SEEN_START_SECONDS


def _in(state: ModelState, phase: Phase, reason: str) -> ModelState:
    return state if state.phase is phase else replace(state, phase=phase, reason=reason)


def _said(state: ModelState, phase: Phase, reason: str) -> ModelState:
    """Like `_in`, where the reason changes within the phase."""
    return replace(state, phase=phase, reason=reason)


def _at_rest(state: ModelState, seen: Seen, now: Now) -> ModelState:
    state = replace(state, is_out=False, condemned=None, ready_at=None)
    if not seen.enabled and (seen.is_fresh or not state.is_by_hand):
        return _said(state, Phase.DISABLED, _with_residue(seen.why, seen))
    if seen.enabled and ((seen.is_fresh and not state.rests) or state.resume):
        news = "its block has changed" if _is_renewed(state) else "enabled"
        if waits_to_be_asked(state, now):
            return _said(state, Phase.DEFERRED, _with_residue(_DORMANT, seen))
        return _wanted(state, f"{news}; waits for a loading place")
    why = "drained" if state.drain else "stopped by hand"
    if state.stopped_at is None:
        state = replace(state, stopped_at=now.monotonic)
    return _in(state, Phase.STOPPED, _with_residue(why, seen))


def _is_renewed(state: ModelState) -> bool:
    """Whether it is out for another block."""
    return state.out_since is not None or state.renewed_at is not None


def _wanted(state: ModelState, reason: str) -> ModelState:
    """It waits for a place; where it waits for memory already, it goes on doing that."""
    if state.is_refused:
        return _in(state, Phase.FAILED, state.reason)
    return state if state.phase is Phase.DEFERRED else _in(state, Phase.PENDING, reason)


def _with_residue(reason: str, seen: Seen) -> str:
    return f"{reason}; left behind: {seen.residue}" if seen.residue else reason


def _running(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """Startup, then readiness, then liveness; no evidence changes nothing."""
    # It runs: whoever stops it from now on is heeded, and a stop of ours was not.
    if state.resume or state.evicted_for or state.target_rung is not None or state.is_dormant:
        state = replace(state, resume=False, evicted_for="", target_rung=None, is_dormant=False)
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
            return _ready(state, seen, now, policy)
        case Verdict.STUCK:
            return _unhealthy(state, FailureClass.UNRESPONSIVE, seen, now)
        case Verdict.UNRESPONSIVE:
            return _unhealthy(state, FailureClass.UNRESPONSIVE, seen, now)
        case Verdict.WEDGED:
            return _unhealthy(state, FailureClass.WEDGED, seen, now)
        case Verdict.FOREIGN:
            return _unhealthy(state, FailureClass.PORT_IN_USE, seen, now)
        case Verdict.ON_HOST:
            return _unhealthy(state, FailureClass.NOT_OFFLOADED, seen, now)
    assert_never(seen.verdict)


def _ready(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    seconds = state.ready_seconds
    if seconds is None and state.started_at is not None:
        seconds = now.monotonic - state.started_at
    ready_at = now.monotonic if state.ready_at is None else state.ready_at
    idle_since = now.monotonic if state.idle_since is None else state.idle_since
    ready = replace(
        state, ready_seconds=seconds, was_ready=True, ready_at=ready_at, condemned=None,
        is_out=False, idle_since=None if seen.busy else idle_since,
        has_slept=state.has_slept or seen.is_asleep,
        demanded_at=None,  # who waited for it is served
        retries=restarts.after_healthy(state.retries, now.monotonic - ready_at, policy.restart),
    )  # fmt: skip
    if state.drain:
        return _in(ready, Phase.DRAINING, "stops when it is idle")
    when = "answers" if seconds is None else f"answered {seconds:.1f} s after its start"
    ready = failover.in_service(ready, seen.claim)
    return _in(ready, Phase.READY, when + failover.who_serves(ready, seen.claim))


def _unhealthy(state: ModelState, kind: FailureClass, seen: Seen, now: Now) -> ModelState:
    condemned = state.condemned or Failure(kind, seen.verdict_reason, now.wall)
    sick = replace(state, condemned=condemned, ready_at=None, last_failure=condemned)
    return _in(sick, Phase.UNHEALTHY, seen.verdict_reason)


def _stopping(state: ModelState, seen: Seen) -> ModelState:
    phase = Phase.DRAINING if seen.busy else Phase.STOPPING
    why = "its block has changed" if _is_renewed(state) else failover.why_stopped(state)
    return _in(replace(state, ready_at=None), phase, why)


def _ended(state: ModelState, seen: Seen, now: Now, policy: Policy) -> ModelState:
    """Each end is judged once; then it is waited, or not, as the failure's class has it."""
    if seen.run != state.failed_run:
        state = _failed(state, seen, now, policy)
    if state.last_failure is not None and _was_refused(seen):
        return _refused(state, state.last_failure, seen)
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


def _was_refused(seen: Seen) -> bool:
    """Whether the launcher found no memory for it; nothing was started."""
    return seen.ending is not None and seen.ending.exit_status == REFUSED_STATUS


def _refused(state: ModelState, failure: Failure, seen: Seen) -> ModelState:
    """No failure of the model: it waits for memory, or is what it was before the attempt."""
    state = replace(state, is_out=False)
    if seen.enabled:
        return _wanted(state, failure.message)
    return _said(replace(state, is_by_hand=False), Phase.DISABLED, failure.message)


def _permanent(
    state: ModelState, failure: Failure, seen: Seen, now: Now, policy: Policy
) -> ModelState:
    """A retry waits for a changed file, and then as after a crash: it may still be written."""
    kind, retries = failure.failure_class, state.retries
    is_mended = kind is not FailureClass.BAD_ARGUMENT and seen.file_stamp != state.failed_stamp
    # Away when it started, and back before anybody looked.
    is_mended = is_mended or (kind is FailureClass.MODEL_MISSING and seen.has_files)
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
    woke_in_vain = is_known and _woke_in_vain(state, failure, policy)
    is_no_fault = woke_in_vain or _was_refused(seen)
    if failure.failure_class not in PERMANENT and not is_no_fault:
        retries = restarts.after_failure(retries, now.monotonic, now.chance, policy.restart)
    return replace(
        state, last_failure=failure, failed_run=seen.run, failed_stamp=seen.file_stamp,
        retries=retries, condemned=None, killed_at=None, ready_at=None, resume=False,
        incarnation=state.incarnation if is_known else None,
        tried=state.tried if is_known else _block_held(seen),
        is_out=state.is_out and is_known and state.killed_at is not None,  # not if it fails again
    )  # fmt: skip


def _woke_in_vain(state: ModelState, failure: Failure, policy: Policy) -> bool:
    """Whether a sleeper found its memory given away, as the settings allow: it waits for that."""
    is_out_of_memory = failure.failure_class is FailureClass.OUT_OF_MEMORY
    return policy.overcommit_sleepers and state.has_slept and is_out_of_memory


def _waiting(state: ModelState, failure: Failure, now: Now, policy: Policy) -> ModelState:
    kind, retries = failure.failure_class.value, state.retries
    if state.resume or restarts.is_due(retries, now.monotonic):
        return _wanted(state, f"{kind}; starts again")
    wait = (retries.retry_at or 0.0) - now.monotonic
    if retries.is_open:
        restart = policy.restart
        return _in(
            replace(state, is_out=False), Phase.FAILED,
            f"{kind}; {restart.intensity} failures within {restart.period_seconds:.0f} s: one "
            f"trial after {wait:.0f} s",
        )  # fmt: skip
    return _in(state, Phase.BACKOFF, f"{kind}; starts again after {wait:.1f} s")


def _transitions(
    before: Mapping[str, ModelState], after: Mapping[str, ModelState]
) -> Iterable[Transition]:
    for name, state in after.items():
        earlier = before.get(name)
        is_given_up = failover.begins(earlier, state)
        if earlier is None or earlier.phase is not state.phase or is_given_up:
            is_new = earlier is not None and state.last_failure != earlier.last_failure
            is_told = is_new or is_given_up or state.phase in _AFTER_FAILURE
            failure = state.last_failure if is_told else None
            yield Transition(
                name, earlier.phase if earlier else None, state.phase, state.reason,
                state.incarnation, failure,
            )  # fmt: skip


_AFTER_FAILURE = frozenset({Phase.UNHEALTHY, Phase.BACKOFF, Phase.FAILED})
