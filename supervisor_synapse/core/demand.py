"""Models that come when they are asked for, and go when nobody has asked for long.

A demand is what somebody who waits says again each second; when he goes away it grows stale, and
then nobody has to make room for it. A model that was stopped because nobody used it is dormant:
enabled, deferred, and back when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.state import Action, ModelState, Now, Policy, Seen, Stop

_STALE_SECONDS = 3.0


def is_demanded(state: ModelState, now: Now) -> bool:
    """Whether somebody waits for it right now."""
    return state.demanded_at is not None and now.monotonic - state.demanded_at <= _STALE_SECONDS


def waits_to_be_asked(state: ModelState, now: Now) -> bool:
    """Whether it has gone for want of use, and nobody wants it back."""
    return state.is_dormant and not is_demanded(state, now)


def idle_stops(
    seen: Sequence[Seen], after: dict[str, ModelState], now: Now, policy: Policy
) -> Iterable[Action]:
    """Those that nobody has used for so long; never one that is pinned, nor one that stands in, is
    on trial, or was started by hand.
    """
    if not policy.idle_stop_seconds:
        return
    for one in seen:
        state = after[one.name]
        if not _may_go(one, state) or state.idle_since is None:
            continue
        if now.monotonic - state.idle_since < policy.idle_stop_seconds or is_demanded(state, now):
            continue
        reason = f"nobody has used it for {policy.idle_stop_seconds:.0f} s"
        after[one.name] = replace(state, is_dormant=True, resume=True)
        yield Stop(one.name, reason)


def _may_go(one: Seen, state: ModelState) -> bool:
    return (
        state.phase is Phase.READY
        and one.enabled
        and not one.claim.is_pinned
        and not one.is_swapped
        and one.trial is None
        and state.failover is None
        and not state.is_by_hand
        and not state.evicted_for
        and state.target_rung is None
    )


def wanted(states: Mapping[str, ModelState], name: str, now: float) -> dict[str, ModelState]:
    """The states with one more word that somebody waits for a model. `now` is monotonic seconds."""
    state = states.get(name, ModelState())
    return {**states, name: replace(state, demanded_at=now)}
