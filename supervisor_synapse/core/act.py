"""What is to be done about the models: who starts, who stops, who makes room for whom.

A model that is due to start

    1. has to be replaced first by another rung of its ladder       → that, or waits for it
    2. finds no loading place                                       → stays pending
    3. fits beside everything that is committed                     → starts
    4. does not fit, and somebody waits for it: who is idle and no more important leaves
    5. does not fit:
         degrade   the next rung that fits                          → that one; none: deferred
         evict     who is idle and less important leaves            → waits; nobody: deferred
         wait                                                       → deferred
         refuse                                                     → failed, until it is told

Deferred models are looked at again with each decision, so one starts when memory is back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import assert_never

from supervisor_synapse.core import admission, failover, restarts
from supervisor_synapse.core.admission import Commitment, Idle, Ledger, Shortage
from supervisor_synapse.core.demand import idle_stops, is_demanded, waits_to_be_asked
from supervisor_synapse.core.model import (
    DeviceReading,
    Failure,
    FailureClass,
    Phase,
    ProcessState,
)
from supervisor_synapse.core.probes import BAD
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.rollout import going_back, holds_back, is_out, roll_out, was_just_told
from supervisor_synapse.core.settings import WhenFull
from supervisor_synapse.core.state import (
    Action,
    Kill,
    ModelState,
    MovePort,
    Now,
    Policy,
    RollBack,
    Seen,
    SetRung,
    Start,
    Stop,
)
from supervisor_synapse.core.waves import free_places

# supervisord tells runs apart by whole seconds.
_START_SPACING_SECONDS = 1.05
_KILL_AGAIN_SECONDS = 5.0
# A load that takes longer no longer keeps others from loading.
_LOADING_PLACE_SECONDS = 60.0
_REPLACING_SECONDS = 10.0  # after that its block is taken for one that is not ours to change
_IMMOVABLE_SECONDS = 300.0
_MOST_DOUBLINGS = 6  # of the wait before a climb

_WAITS = frozenset({Phase.PENDING, Phase.DEFERRED})
_LEAVES = frozenset({Phase.READY, Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING})
_OUT_OF_ROOM = frozenset({FailureClass.OUT_OF_MEMORY, FailureClass.NOT_OFFLOADED})
_UP = frozenset({ProcessState.RUNNING, ProcessState.STARTING})


def act(
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    readings: tuple[DeviceReading, ...],
) -> tuple[tuple[Action, ...], Ledger]:
    """The actions, noted in `after`; and what is committed when they are done."""
    ledger = Ledger(readings, tuple(_commitments(seen, after, now, policy)), policy.reserve)
    actions: list[Action] = [
        *roll_out(seen, after, now, policy),
        *_moves(seen, after, now), *_stops(seen, after), *_kills(seen, after, now),
    ]  # fmt: skip
    _step_down(seen, after, now, policy)
    actions += failover.advance(seen, after, now, policy, ledger, _idle(seen, after, now))
    actions += _climbs(seen, after, now, policy, ledger)
    actions += _relieve(seen, after, now, policy, ledger)
    actions += idle_stops(seen, after, now, policy)
    starts, ledger = _starts(seen, after, now, policy, ledger)
    return (*actions, *starts), ledger


def _commitments(
    seen: Sequence[Seen], after: dict[str, ModelState], now: Now, policy: Policy
) -> Iterable[Commitment]:
    """What runs, was asked to run just now, or is not yet verified to be gone."""
    for one in seen:
        state, needs = after[one.name], one.claim.deployed.needs
        if one.incarnation is not None:
            yield Commitment(
                one.name, needs, one.claim.held, is_loading=not state.was_ready,
                is_asleep=one.is_asleep and policy.overcommit_sleepers,
            )  # fmt: skip
        elif _is_asked(state, now):
            yield Commitment(one.name, needs, is_loading=True)
        elif one.is_leaving:
            yield Commitment(one.name, needs)


def _is_asked(state: ModelState, now: Now) -> bool:
    """Whether a start was asked for that was not seen yet."""
    asked_at = state.asked_at
    if state.phase not in _WAITS or asked_at is None:
        return False
    return now.monotonic - asked_at < _START_SPACING_SECONDS


def _moves(seen: Sequence[Seen], after: dict[str, ModelState], now: Now) -> Iterable[Action]:
    """A port that a stranger took is given up, once for each failure."""
    for one in seen:
        state, failure = after[one.name], after[one.name].last_failure
        if (
            state.phase is Phase.BACKOFF
            and not holds_back(one, state, now)
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
        running = one.state in _UP
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


# --- starts and memory ---------------------------------------------------------------------------


def _starts(
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    ledger: Ledger,
) -> tuple[list[Action], Ledger]:
    """What somebody waits for before all others, then the highest priority first; one that does not
    fit never holds back the next.
    """
    actions: list[Action] = []
    places = free_places(
        sum(_holds_place(state, now) for state in after.values()), policy.max_parallel
    )
    for one in sorted(seen, key=lambda one: not is_demanded(after[one.name], now)):
        # Nothing starts beside what its last run may have left.
        if one.is_leaving or not _may_start(after[one.name], now):
            continue
        if waits_to_be_asked(after[one.name], now):
            continue
        if holds_back(one, after[one.name], now):
            continue
        if after[one.name].target_rung is not None:
            after[one.name], replacing = _replaced(one, after[one.name], now)
            actions += replacing
        if after[one.name].target_rung is not None or places <= 0:
            continue
        if after[one.name].phase not in _WAITS:  # what should have been deployed could not be
            continue
        shortages = ledger.shortages(one.claim.deployed.needs)
        if shortages:
            making, ledger = _short(one, seen, after, now, policy, ledger, shortages)
            actions += making
            continue
        places -= 1
        ledger = ledger.with_one(Commitment(one.name, one.claim.deployed.needs, is_loading=True))
        after[one.name] = _asked(after[one.name], now)
        actions.append(Start(one.name, after[one.name].reason))
    return actions, ledger


def _may_start(state: ModelState, now: Now) -> bool:
    if state.phase not in _WAITS:
        return False
    return state.asked_at is None or now.monotonic - state.asked_at >= _START_SPACING_SECONDS


def _asked(state: ModelState, now: Now) -> ModelState:
    if state.phase is Phase.DEFERRED:
        state = replace(state, phase=Phase.PENDING, reason="it fits now")
    return replace(
        state, asked_at=now.monotonic, retries=restarts.on_start(state.retries),
        restarts=state.restarts + (state.failed_run != 0),
    )  # fmt: skip


def _holds_place(state: ModelState, now: Now) -> bool:
    if state.phase is not Phase.LOADING:
        return False
    seen_at = now.monotonic if state.seen_at is None else state.seen_at
    return now.monotonic - seen_at < _LOADING_PLACE_SECONDS


def _replaced(one: Seen, state: ModelState, now: Now) -> tuple[ModelState, list[Action]]:
    """Its program is replaced before it starts; a block that is not ours to change stays."""
    target = state.target_rung
    if target is None or target >= len(one.claim.rungs):
        return replace(state, target_rung=None), []
    if state.replaced_at is None:  # also where it was written down, and perhaps no more than that
        action = SetRung(one.name, target, state.reason)
        return replace(state, replaced_at=now.monotonic), [action]
    if one.claim.rung == target:
        return replace(state, target_rung=None), []
    if now.monotonic - state.replaced_at < _REPLACING_SECONDS:
        return state, []
    until = now.monotonic + _IMMOVABLE_SECONDS
    return failover.undone(replace(state, target_rung=None, immovable_until=until)), []


def _short(
    one: Seen,
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    ledger: Ledger,
    shortages: tuple[Shortage, ...],
) -> tuple[list[Action], Ledger]:
    """A model does not fit; what is set aside for it while others make room, nobody else gets."""
    state, words = after[one.name], admission.in_words(shortages)
    if (back := _back_for_room(one, state, policy, ledger, words, now)) is not None:
        after[one.name] = going_back(one, state, back.failure, now)
        return [back], ledger
    if is_demanded(state, now):  # others as important serve nobody just now
        made = _make_room(one, seen, after, now, ledger, words, one.claim.priority - 1)
        if made is not None:
            return made
    match policy.when_full:
        case WhenFull.DEGRADE:
            rung = admission.first_that_fits(ledger, one.claim)
            if rung is not None and now.monotonic >= state.immovable_until:
                chosen = one.claim.rungs[rung]
                aimed = _towards(state, rung, f"{words}; steps down to {chosen.label}")
                after[one.name], actions = _replaced(one, aimed, now)
                return actions, ledger.with_one(Commitment(one.name, chosen.needs, is_loading=True))
        case WhenFull.EVICT:
            made = _make_room(one, seen, after, now, ledger, words, one.claim.priority)
            if made is not None:
                return made
        case WhenFull.REFUSE:
            refused = f"refused: {words}; enable it when there is room"
            after[one.name] = replace(
                state, phase=Phase.FAILED, reason=refused, is_refused=True, resume=False
            )
            return [], ledger
        case WhenFull.WAIT:
            pass
        case _:
            assert_never(policy.when_full)
    after[one.name] = replace(state, phase=Phase.DEFERRED, reason=words)
    return [], ledger


def _make_room(
    one: Seen,
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    ledger: Ledger,
    words: str,
    priority: int,
) -> tuple[list[Action], Ledger] | None:
    """Idle models of less importance than `priority` leave; None where that would not do."""
    state, needs = after[one.name], one.claim.deployed.needs
    with_it = ledger.with_one(Commitment(one.name, needs, is_loading=True))
    leaving = [name for name, other in after.items() if _is_evicted(other)]
    if not ledger.without(leaving).shortages(needs):
        after[one.name] = _pending(state, f"{words}; waits for {', '.join(leaving)}")
        return [], with_it
    names = admission.victims(ledger, needs, priority, _idle(seen, after, now))
    if not names:
        return None
    after[one.name] = _pending(state, f"{words}; {', '.join(names)} makes room")
    return [_evict(name, after, f"makes room for {one.name}") for name in names], with_it


def _back_for_room(
    one: Seen, state: ModelState, policy: Policy, ledger: Ledger, words: str, now: Now
) -> RollBack | None:
    """A block on trial that can never fit, or finds no room where the former one does."""
    trial = one.trial
    if trial is None or trial.former is None or was_just_told(state, now):
        return None
    is_degrading = policy.when_full is WhenFull.DEGRADE
    can_wait = admission.is_possible(ledger, one.claim.deployed.needs)
    if can_wait and is_degrading and admission.first_that_fits(ledger, one.claim) is not None:
        return None
    if can_wait and (ledger.shortages(trial.former_needs) or policy.when_full is WhenFull.EVICT):
        return None
    failure = Failure(FailureClass.OUT_OF_MEMORY, words, now.wall)
    return RollBack(one.name, trial.digest, failure, words)


def _towards(state: ModelState, rung: int, reason: str) -> ModelState:
    """Another rung is to be deployed before the next start."""
    return replace(
        state, phase=Phase.PENDING, reason=reason, target_rung=rung, replaced_at=None,
        roomy_since=None,
    )  # fmt: skip


def _pending(state: ModelState, reason: str) -> ModelState:
    return replace(state, phase=Phase.PENDING, reason=reason)


def _is_evicted(state: ModelState) -> bool:
    """Whether it is on its way out for another."""
    return bool(state.evicted_for) and state.phase in _LEAVES


def _idle(seen: Sequence[Seen], after: dict[str, ModelState], now: Now) -> list[Idle]:
    return [
        Idle(one.name, one.claim.priority, now.monotonic - since)
        for one in seen
        if after[one.name].phase is Phase.READY
        and not one.claim.is_pinned
        and not _is_evicted(after[one.name])
        and (since := after[one.name].idle_since) is not None
    ]


def _evict(name: str, after: dict[str, ModelState], reason: str) -> Stop:
    """It comes back by itself when there is room."""
    after[name] = replace(after[name], resume=True, evicted_for=reason)
    return Stop(name, reason)


def _relieve(
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    ledger: Ledger,
) -> Iterable[Action]:
    """Memory runs low while all serve: the least important idle model goes, one at a time, before
    the kernel or a driver chooses one.
    """
    if policy.when_full is not WhenFull.EVICT or any(map(_is_evicted, after.values())):
        return
    for reading in ledger.readings:
        if not admission.under_pressure(reading, policy.reserve):
            continue
        holders = {one.name for one in ledger.commitments if one.committed(reading.name)}
        idle = [one for one in _idle(seen, after, now) if one.name in holders]
        if idle:
            lowest = max(idle, key=lambda one: (one.priority, one.idle_seconds))
            yield _evict(lowest.name, after, f"memory runs low on {reading.name}")
            return


def _step_down(
    seen: Sequence[Seen], after: dict[str, ModelState], now: Now, policy: Policy
) -> None:
    """A model that found no memory when it loaded, or later, tries the next rung."""
    if policy.when_full is not WhenFull.DEGRADE:
        return
    for one in seen:
        state, failure, rung = after[one.name], after[one.name].last_failure, one.claim.rung + 1
        if (
            state.phase in (Phase.BACKOFF, Phase.FAILED)
            and not holds_back(one, state, now)
            and failure is not None
            and failure.failure_class in _OUT_OF_ROOM
            and rung < len(one.claim.rungs)
            and now.monotonic >= state.immovable_until
        ):
            label = one.claim.rungs[rung].label
            reason = f"{failure.failure_class.value}; steps down to {label}"
            after[one.name] = replace(
                _towards(state, rung, reason), retries=Restarts(), falls=state.falls + 1
            )


def _climbs(
    seen: Sequence[Seen],
    after: dict[str, ModelState],
    now: Now,
    policy: Policy,
    ledger: Ledger,
) -> Iterable[Action]:
    """One idle model at a time goes a rung up again, when there has been room for long enough;
    the longer, the more often it fell.
    """
    if policy.when_full is not WhenFull.DEGRADE:
        return
    is_one_out = any(
        _is_changing(one, after[one.name]) or is_out(after[one.name], now) for one in seen
    )
    for one in seen:
        state = after[one.name]
        if not _may_climb(one, state, now, ledger):
            if state.roomy_since is not None:
                after[one.name] = replace(state, roomy_since=None)
            continue
        since = now.monotonic if state.roomy_since is None else state.roomy_since
        wait = policy.climb_after_seconds * 2.0 ** min(state.falls, _MOST_DOUBLINGS)
        after[one.name] = replace(state, roomy_since=since)
        if now.monotonic - since < wait or is_one_out:
            continue
        is_one_out = True
        rung = one.claim.rung - 1
        after[one.name] = replace(
            state, target_rung=rung, replaced_at=None, roomy_since=None, resume=True
        )
        yield Stop(one.name, f"there is room for {one.claim.rungs[rung].label} again")


def _is_changing(one: Seen, state: ModelState) -> bool:
    """Whether it is out for another rung of its own doing."""
    return state.target_rung is not None or (one.claim.rung > 0 and state.phase is Phase.LOADING)


def _may_climb(one: Seen, state: ModelState, now: Now, ledger: Ledger) -> bool:
    return (
        one.claim.rung > 0
        and one.enabled
        and state.failover is None
        and state.phase is Phase.READY
        and state.idle_since is not None
        and not state.drain
        and now.monotonic >= state.immovable_until
        and admission.may_climb(ledger, one.name, one.claim)
    )
