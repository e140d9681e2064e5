"""A model that was given up, and the fallback that serves in its place, until it is well. Pure.

    the model itself                                        the fallback
    given up: its breaker is open, or a retry     ──►       started at once, on its port and alias
    cannot help; whatever `when_full` says
    on trial: one failure, or no memory for it,   ◄──       its cooldown is over, its files or
    and the fallback serves again                           arguments have changed, or somebody
                                                            asked for it; it is idle, and there
    ready for a full healthy period: well                   is room

Each trial that failed doubles the wait for the next, up to a bound. Which of the two is deployed
is told by the rung alone; so whoever finds a state carries on from whatever the world has become.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from supervisor_synapse.core import admission, rollout
from supervisor_synapse.core.admission import Claim, Idle, Ledger
from supervisor_synapse.core.failures import PERMANENT
from supervisor_synapse.core.model import Phase, ProcessState
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.settings import WhenFull
from supervisor_synapse.core.state import Failover, ModelState, Now, Policy, Seen, Stop

_MOST_DOUBLINGS = 6
_SETTLING_SECONDS = 5.0  # a file that still changes is still being written

_COOLDOWN_OVER = "its cooldown is over"
_CHANGED = "its files or arguments have changed"
_ASKED = "it was asked for"

_STARTS = frozenset({Phase.PENDING, Phase.DEFERRED, Phase.LOADING})
_ON_ITS_WAY = frozenset(
    {Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING, Phase.PENDING, Phase.LOADING}
)
# Nothing of it runs, and the fallback is not just being started.
_IDLES = frozenset({Phase.PENDING, Phase.DEFERRED, Phase.BACKOFF, Phase.FAILED})
_START_SECONDS = 2.5  # a start that was asked for shows within them


def advance(
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    ledger: Ledger,
    idle: Sequence[Idle] = (),
) -> Iterable[Stop]:
    """Who fails over and who is tried again, noted in `after`; one that serves goes at a time.

    `idle`: who could be evicted, where the settings say so.
    """
    is_one_out = any(_is_out(after[one.name]) for one in seen)
    for one in seen:
        state = _settled(one, after[one.name], now, policy)
        if _is_given_up(one, state, now):
            state = _failed_over(one, state, now, policy)
        before, why = state.failover, _why_tried(one, state, now)
        if before is not None and why:
            rung = _rung_with_room(one, state, policy, ledger, idle)
            if rung is not None and _is_at_rest(one, state, now):
                tried = _tried(state, before, rung, why)
                state = replace(tried, phase=Phase.PENDING, reason=f"{why}; it is tried itself")
            elif rung is not None and _is_idle(one, state) and not is_one_out:
                is_one_out = True
                state = _tried(state, before, rung, why)
                yield Stop(one.name, why_stopped(state))
        after[one.name] = state


# --- what is deployed ----------------------------------------------------------------------------


def serves(state: ModelState, claim: Claim) -> bool:
    """Whether the fallback is deployed for a model that was given up."""
    return state.failover is not None and claim.is_on_fallback


def own_rung(state: ModelState | None, deployed: int) -> int:
    """The rung on which a model is served by its own files, where another one may be deployed."""
    return deployed if state is None or state.failover is None else state.failover.rung


def _settled(one: Seen, state: ModelState, now: Now, policy: Policy) -> ModelState:
    """What was asked for has come about, or something else has."""
    if state.failover is None:
        if state.is_wanted_itself:
            state = replace(state, is_wanted_itself=False)
        return _found(one, state, now, policy)
    if not one.claim.fallback:
        return _over(state)  # it has none any more
    if not one.claim.is_known or state.target_rung is not None:
        return state
    if not one.claim.is_on_fallback:
        is_well = (
            state.phase is Phase.READY
            and state.ready_at is not None
            and now.monotonic - state.ready_at >= policy.restart.period_seconds
        )
        if is_well:
            reason = f"well again: ready for {policy.restart.period_seconds:.0f} s on trial"
            return replace(_over(state), reason=reason)
        # Without a trial somebody else deployed it.
        return state if state.failover.trial else _over(state)
    if state.failover.trial:  # for want of memory, or since its block is not ours to change
        return _put_off(state, now, policy)
    return replace(state, failover=_with_stamp(state.failover, one.own_stamp, now))


def _found(one: Seen, state: ModelState, now: Now, policy: Policy) -> ModelState:
    """A fallback of which nobody remembers why it serves.

    After a restart of everything the model itself is tried. One that runs is as one of a model
    whose breaker opened, unless it may be there for want of memory and climbs.
    """
    if not one.claim.is_on_fallback or not one.enabled or state.target_rung is not None:
        return state
    if one.is_fresh and state.replaced_at is None and now.monotonic >= state.immovable_until:
        return _towards(state, 0, "enabled; it is tried itself, and not its fallback")
    if state.phase is not Phase.READY or policy.when_full is WhenFull.DEGRADE:
        return state
    trial_at = now.monotonic + policy.restart.cooldown_seconds
    return replace(state, failover=Failover(0, "it was given up", state.last_failure, 0, trial_at))


def _over(state: ModelState) -> ModelState:
    return replace(state, failover=None, is_wanted_itself=False)


def _with_stamp(before: Failover, stamp: int, now: Now) -> Failover:
    """What the model itself would be served with may change; 0: nobody has looked."""
    if not before.stamp or not stamp:
        return replace(before, stamp=before.stamp or stamp)
    if stamp == before.stamp:
        return replace(before, new_stamp=0, changed_at=None)
    if stamp == before.new_stamp:
        return before
    return replace(before, new_stamp=stamp, changed_at=now.monotonic)


# --- to the fallback -----------------------------------------------------------------------------


def _is_given_up(one: Seen, state: ModelState, now: Now) -> bool:
    claim, failure = one.claim, state.last_failure
    if not claim.fallback or not claim.is_known or claim.is_on_fallback or one.is_swapped:
        return False
    if not one.enabled or state.target_rung is not None or now.monotonic < state.immovable_until:
        return False
    if one.incarnation is not None or rollout.holds_back(one, state, now):
        return False
    if state.failover is not None:  # on trial, which is over with one failure
        return state.phase in (Phase.BACKOFF, Phase.FAILED, Phase.DEFERRED)
    if state.phase is not Phase.FAILED or state.is_refused or failure is None:
        return False
    return state.retries.is_open or failure.failure_class in PERMANENT


def _failed_over(one: Seen, state: ModelState, now: Now, policy: Policy) -> ModelState:
    before = state.failover
    trials = 0 if before is None else before.trials + 1
    why, is_for_good = _why_given_up(state, policy)
    trial_at = None if is_for_good else now.monotonic + _wait_seconds(trials, policy)
    failover = Failover(
        one.claim.rung, why, state.last_failure, one.own_stamp, trial_at, trials,
        retries=state.retries,
    )  # fmt: skip
    aimed = _towards(state, len(one.claim.rungs) - 1, f"{why}; {_in_its_place(one.claim)}")
    return replace(aimed, failover=failover, retries=Restarts(), is_wanted_itself=False)


def _why_given_up(state: ModelState, policy: Policy) -> tuple[str, bool]:
    """In words, and whether there is no point in a trial before something has changed."""
    failure = state.last_failure
    if failure is None or state.phase is Phase.DEFERRED or state.is_refused:
        return f"no memory for its trial: {state.reason}", False
    kind = failure.failure_class
    if kind in PERMANENT:
        return kind.value, True
    if state.failover is not None:
        return f"{kind.value}; failed its trial", False
    count, seconds = policy.restart.intensity, policy.restart.period_seconds
    return f"{kind.value}; {count} failures within {seconds:.0f} s", False


def _wait_seconds(trials: int, policy: Policy) -> float:
    return policy.restart.cooldown_seconds * 2.0 ** min(trials, _MOST_DOUBLINGS)


def _put_off(state: ModelState, now: Now, policy: Policy) -> ModelState:
    """No trial came about: the fallback serves on, and the next trial is later."""
    if state.failover is None:
        return state
    trials = state.failover.trials + 1
    trial_at = now.monotonic + _wait_seconds(trials, policy)
    failover = replace(state.failover, trial="", trial_at=trial_at, trials=trials)
    return replace(state, failover=failover, retries=Restarts())


def undone(state: ModelState) -> ModelState:
    """Its block is not ours to change, so what is deployed stays: a model that was given up is so
    still, with its retries.
    """
    failover = state.failover
    if failover is None or failover.trial:
        return state
    reason = f"{failover.why}; its fallback cannot serve: its block was edited by hand"
    return replace(
        state, phase=Phase.FAILED, reason=reason, failover=None, retries=failover.retries,
        resume=False,
    )  # fmt: skip


# --- and back ------------------------------------------------------------------------------------


def _why_tried(one: Seen, state: ModelState, now: Now) -> str:
    """Why the model itself is due to be tried; "" where it is not."""
    failover = state.failover
    if failover is None or failover.trial or not serves(state, one.claim):
        return ""
    if not one.enabled or one.is_swapped or state.drain:
        return ""
    if state.target_rung is not None or now.monotonic < state.immovable_until:
        return ""
    if state.is_wanted_itself:
        return _ASKED
    settling = _SETTLING_SECONDS * 2.0 ** min(failover.trials, _MOST_DOUBLINGS)
    if failover.changed_at is not None and now.monotonic - failover.changed_at >= settling:
        return _CHANGED
    is_cool = failover.trial_at is not None and now.monotonic >= failover.trial_at
    return _COOLDOWN_OVER if is_cool else ""


def _rung_with_room(
    one: Seen, state: ModelState, policy: Policy, ledger: Ledger, idle: Sequence[Idle]
) -> int | None:
    """Where it returns: the rung from which it failed over; a lower one only by its ladder."""
    last = len(one.claim.rungs) - 1
    home = min(own_rung(state, 0), last - 1)
    without = ledger.without([one.name])
    lowest = last if policy.when_full is WhenFull.DEGRADE else home + 1
    for rung in range(home, lowest):
        if not without.shortages(one.claim.rungs[rung].needs):
            return rung
    if policy.when_full is not WhenFull.EVICT:
        return None
    others = [other for other in idle if other.name != one.name]
    needs = one.claim.rungs[home].needs
    return home if admission.victims(without, needs, one.claim.priority, others) else None


def _is_at_rest(one: Seen, state: ModelState, now: Now) -> bool:
    if one.incarnation is not None or state.phase not in _IDLES:
        return False
    is_asked = state.asked_at is not None and now.monotonic - state.asked_at < _START_SECONDS
    return not (is_asked and state.phase in (Phase.PENDING, Phase.DEFERRED))


def _is_idle(one: Seen, state: ModelState) -> bool:
    is_up = one.state is ProcessState.RUNNING and state.phase is Phase.READY
    is_used = one.busy or state.idle_since is None
    return is_up and not is_used and not state.evicted_for


def _is_out(state: ModelState) -> bool:
    """Whether a model is out of service by our doing, or on the way back from it."""
    is_tried = state.failover is not None and bool(state.failover.trial)
    is_away = state.target_rung is not None or state.phase in _ON_ITS_WAY
    return state.is_out or (is_tried and is_away)


def _tried(state: ModelState, before: Failover, rung: int, why: str) -> ModelState:
    """The model itself, on trial: the first failure opens its breaker again."""
    trials = 0 if why == _ASKED else before.trials
    return replace(
        _towards(state, rung, state.reason), phase=state.phase, is_wanted_itself=False,
        last_failure=before.failure or state.last_failure,
        failover=replace(before, trial=why, trials=trials),
        retries=replace(before.retries, is_open=True, retry_at=None),
    )  # fmt: skip


def _towards(state: ModelState, rung: int, reason: str) -> ModelState:
    """Another rung is to be deployed before the next start."""
    return replace(
        state, phase=Phase.PENDING, reason=reason, target_rung=rung, replaced_at=None,
        roomy_since=None, resume=True, is_refused=False,
    )  # fmt: skip


# --- commands, and whoever comes after -----------------------------------------------------------


def is_asked_for(state: ModelState) -> bool:
    """Whether a run that is new was started by hand: it is the fallback's, since its block is
    deployed, but who starts a model by hand wants that.
    """
    return state.is_wanted_itself or (state.failover is not None and state.phase not in _STARTS)


def taken_up(states: Mapping[str, ModelState]) -> dict[str, ModelState]:
    """What an earlier listener asked for may not have been carried out: it is asked for anew."""
    return {
        name: state if state.target_rung is None else replace(state, replaced_at=None)
        for name, state in states.items()
    }


# --- in words ------------------------------------------------------------------------------------


def in_service(state: ModelState, claim: Claim) -> ModelState:
    """A model that is ready: what failed last is what it was given up for."""
    if state.failover is None or not claim.is_on_fallback or state.failover.failure is None:
        return state
    return replace(state, last_failure=state.failover.failure)


def who_serves(state: ModelState, claim: Claim) -> str:
    """What is to be said of a model that is ready, where it does not serve as configured."""
    if state.failover is None:
        return f"; stepped down to {claim.deployed.label}" if claim.rung else ""
    if claim.is_on_fallback:
        return f"; {_in_its_place(claim)}: {state.failover.why}"
    return f"; on trial itself after: {state.failover.why}"


def _in_its_place(claim: Claim) -> str:
    return f"{claim.rungs[-1].label} serves in its place"


def begins(before: ModelState | None, after: ModelState) -> bool:
    """Whether a model was given up just now; that is told also where its phase is the same."""
    if after.failover is None or after.failover.trial or after.phase is not Phase.PENDING:
        return False
    return before is None or before.failover is None or bool(before.failover.trial)


def of_both(before: ModelState | None, state: ModelState, claim: Claim) -> ModelState:
    """Where the fallback fails too, both reasons are said."""
    is_new = before is None or before.phase is not state.phase
    if state.failover is None or not serves(state, claim) or not is_new:
        return state
    if state.phase not in (Phase.BACKOFF, Phase.FAILED):
        return state
    reason = f"{claim.deployed.label}: {state.reason}; itself: {state.failover.why}"
    return replace(state, reason=reason)


def why_stopped(state: ModelState) -> str:
    """Of a run that is being stopped."""
    failover = state.failover
    if failover is None or not failover.trial or state.target_rung is None:
        return "a stop was asked for"
    return f"{failover.trial}; the fallback makes way, and it is tried itself"


def next_trial_at(state: ModelState) -> float | None:
    """When the model itself is due again, by its cooldown."""
    failover = state.failover
    return None if failover is None or failover.trial else failover.trial_at
