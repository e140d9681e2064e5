"""What is to be done about changed blocks: taken up, proved, or taken back. Pure.

    its block on disk has changed       it runs          → stopped; of healthy ones, one at a time
                                        it is at rest    → supervisord takes the new one up
    on trial, and ready long enough                      → it has proved itself
    on trial, and its run failed                         → back to the block that was last good
    on trial, and the same text failed before            → back, without being tried
    its generation broke several others                  → back with them
    on trial, nothing to go back to                      → as any model: retries, ladder, failed

Going back only changes what is on disk; the rest follows as for any change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from supervisor_synapse.core.model import Failure, FailureClass, Phase, ProcessState
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.state import (
    Action,
    Bless,
    ModelState,
    Now,
    Policy,
    Renew,
    RollBack,
    Seen,
    Stop,
)
from supervisor_synapse.core.trials import SEVERAL

_AGAIN_SECONDS = 3.0  # what was asked for and did not come about is asked for again
_SELDOM_SECONDS = 60.0
# After so long it starts with what supervisord holds: a block that cannot be taken up (another
# file is broken) must not keep a model from being healed.
_HELD_SECONDS = 15.0
_LONGEST_OUT_SECONDS = 600.0  # a renewed model may load from a slow disk; then the next goes on

_GAVE_WAY = frozenset({Phase.BACKOFF, Phase.FAILED})
_SETTLED = frozenset({Phase.READY, Phase.FAILED, Phase.DISABLED, Phase.STOPPED, Phase.DEFERRED})
_UP = frozenset({ProcessState.RUNNING, ProcessState.STARTING})


def roll_out(
    seen: Sequence[Seen], after: dict[str, ModelState], now: Now, policy: Policy
) -> list[Action]:
    """The actions, noted in `after`."""
    actions: list[Action] = []
    for one in seen:
        after[one.name] = _noted(one, after[one.name], now)
        actions += _bless(one, after, now, policy)
        actions += _go_back(one, after, now)
    return [*actions, *_renew(seen, after, now)]


def holds_back(one: Seen, state: ModelState, now: Now) -> bool:
    """Whether a model must not start yet, since another block is on its way to supervisord."""
    asked = state.back_since if fails(one, state) is not None else state.untold_at
    is_held = one.is_untold or one.is_unadopted or fails(one, state) is not None
    return is_held and (asked is None or now.monotonic - asked < _HELD_SECONDS)


def fails(one: Seen, state: ModelState) -> Failure | None:
    """Why the block on trial is to be taken back; None: it is not, or there is no way back."""
    trial, failure = one.trial, state.last_failure
    if trial is None or trial.former is None:
        return None
    if trial.rejection is not None and trial.rejection.failure is not None:
        return replace(trial.rejection.failure, at=0.0)
    others = [(name, kind) for name, kind in trial.broken if name != one.name]
    if len(others) >= SEVERAL:
        names = ", ".join(name for name, _ in others)
        return Failure(others[0][1], f"generation {trial.generation} broke {names}", 0.0)
    if one.is_foreign and state.tried == trial.digest:
        words = "its command runs no llama-server by way of synapse-run"
        return Failure(FailureClass.BAD_ARGUMENT, words, 0.0)
    if state.phase not in _GAVE_WAY or failure is None or state.tried != trial.digest:
        return None
    if failure.failure_class is FailureClass.PORT_IN_USE and not trial.has_other_port:
        return None  # going back would not help
    return failure


def was_just_told(state: ModelState, now: Now) -> bool:
    """Whether it was told to go back a moment ago; after a while, it is told less often."""
    since = state.back_since
    is_long = since is not None and now.monotonic - since > _HELD_SECONDS
    wait = _SELDOM_SECONDS if is_long else _AGAIN_SECONDS
    return state.back_at is not None and now.monotonic - state.back_at < wait


def going_back(one: Seen, state: ModelState, failure: Failure, now: Now) -> ModelState:
    """The state of a model that is told to go back."""
    if one.trial is None or state.back_from == one.trial.digest:  # it was refused before
        return replace(state, back_at=now.monotonic)
    former = one.trial.former
    words = f"{failure.failure_class.value}: {failure.message}"
    generation = former.generation if former else 0
    reason = f"{words}; goes back to generation {generation}"
    if state.phase in _GAVE_WAY or state.phase in (Phase.PENDING, Phase.DEFERRED):
        state = replace(state, phase=Phase.PENDING, reason=reason)
    return replace(
        state, back_at=now.monotonic, back_from=one.trial.digest, back_since=now.monotonic,
        renewed_at=now.monotonic, retries=Restarts(),
    )  # fmt: skip


def _noted(one: Seen, state: ModelState, now: Now) -> ModelState:
    """Since when another block waits; and that a model which was out for one is back."""
    if not (one.is_untold or one.is_unadopted):
        if state.untold_at is not None or state.renewed_at is not None:
            state = replace(state, untold_at=None, renewed_at=None)
    elif state.untold_at is None:
        state = replace(state, untold_at=now.monotonic)
    if state.back_from and (one.trial is None or one.trial.digest != state.back_from):
        state = replace(state, back_from="", back_since=None, back_at=None)
    is_back = not one.is_untold and state.phase in _SETTLED and fails(one, state) is None
    if state.out_since is not None and is_back:
        state = replace(state, out_since=None)
    return state


def _bless(one: Seen, after: dict[str, ModelState], now: Now, policy: Policy) -> Iterable[Action]:
    state, trial = after[one.name], one.trial
    if trial is None or trial.rejection is not None or state.tried != trial.digest:
        return
    ready_at = state.ready_at
    if state.phase is not Phase.READY or ready_at is None:
        return
    if now.monotonic - ready_at < policy.trial_seconds or _is_recent(state.blessed_at, now):
        return
    after[one.name] = replace(state, blessed_at=now.monotonic)
    yield Bless(one.name, trial.digest, f"ready for {policy.trial_seconds:.0f} s")


def _go_back(one: Seen, after: dict[str, ModelState], now: Now) -> Iterable[Action]:
    state = after[one.name]
    failure = fails(one, state)
    if failure is None or one.trial is None or was_just_told(state, now):
        return
    after[one.name] = going_back(one, state, failure, now)
    failure = replace(failure, at=failure.at or now.wall)
    yield RollBack(one.name, one.trial.digest, failure, failure.message)


def _renew(seen: Sequence[Seen], after: dict[str, ModelState], now: Now) -> Iterable[Action]:
    out = {one.name for one in seen if is_out(after[one.name], now)}
    for one in seen:
        state = after[one.name]
        if not one.is_untold or fails(one, state) is not None:
            continue
        if one.incarnation is None:
            yield from _take_up(one, after, now)
        elif one.is_outdated and one.state in _UP and not (state.was_ready and out - {one.name}):
            if state.was_ready:
                out.add(one.name)
                state = replace(state, out_since=now.monotonic)
            after[one.name] = replace(state, resume=True)
            yield Stop(one.name, "its block has changed")


def _take_up(one: Seen, after: dict[str, ModelState], now: Now) -> Iterable[Action]:
    state = after[one.name]
    if one.is_leaving or _is_asked(state, now) or _is_recent(state.renewed_at, now):
        return
    rests = state.phase is Phase.STOPPED and not state.is_by_hand
    after[one.name] = replace(state, renewed_at=now.monotonic, rests=rests)
    yield Renew(one.name, "its block has changed")


def is_out(state: ModelState, now: Now) -> bool:
    """Whether it was healthy, and is out by our own doing."""
    since = state.out_since
    is_renewed = since is not None and now.monotonic - since < _LONGEST_OUT_SECONDS
    is_climbing = state.target_rung is not None and state.resume
    return state.is_out or is_renewed or is_climbing


def _is_asked(state: ModelState, now: Now) -> bool:
    """Whether its start was asked for just now, and was not seen yet."""
    return state.asked_at is not None and now.monotonic - state.asked_at < 1.0


def _is_recent(at: float | None, now: Now) -> bool:
    return at is not None and now.monotonic - at < _AGAIN_SECONDS
