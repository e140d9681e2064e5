"""One model takes the place of another: a step at a time, each of which can be taken up again.

    both fit      NEW_FIRST ──new ready──► OLD_LEAVES ──old verified stopped──► NEW_ALONE
    else          OLD_LEAVES ──old verified stopped──► NEW_ALONE
                  NEW_ALONE ──new ready──► done
    the new one does not become ready
                  NEW_FIRST, NEW_ALONE ──► NEW_LEAVES ──new verified stopped──► OLD_RETURNS
                  OLD_RETURNS ──old ready, as it is where it never stopped──► failed

A step says only which of the two shall run; how they get there is decided as ever. So whoever
finds a step in the journal carries on from whatever the world has become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from supervisor_synapse.core.model import AT_REST, Phase


class Step(Enum):
    """Where a swap stands."""

    NEW_FIRST = "new-first"
    OLD_LEAVES = "old-leaves"
    NEW_ALONE = "new-alone"
    NEW_LEAVES = "new-leaves"
    OLD_RETURNS = "old-returns"


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap under way. `command` is the id of the command that asked for it."""

    command: str
    old: str
    new: str
    step: Step
    together: bool  # both fit into memory
    old_served: bool  # the old one ran when it began
    why_undone: str = ""

    def wants(self, name: str) -> bool | None:
        """Whether a model shall run now; None: it has no part in this."""
        if name not in (self.old, self.new):
            return None
        old_runs, new_runs = _RUNS[self.step]
        if not self.together and self.step in (Step.OLD_LEAVES, Step.NEW_LEAVES):
            return False  # there is no room for one before the other is verified stopped
        return (old_runs and self.old_served) if name == self.old else new_runs


# Which of old and new shall run.
_RUNS = {
    Step.NEW_FIRST: (True, True),
    Step.OLD_LEAVES: (False, True),
    Step.NEW_ALONE: (False, True),
    Step.NEW_LEAVES: (True, False),
    Step.OLD_RETURNS: (True, False),
}

# A model that was asked to run and is here did not become ready.
_DID_NOT_COME = AT_REST | {Phase.BACKOFF, Phase.UNHEALTHY, Phase.DEFERRED}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A swap is over."""

    ok: bool
    message: str


def begin(command: str, old: str, new: str, *, together: bool, old_served: bool) -> Swap:
    """The first step. The old one leaves first only where both do not fit."""
    step = Step.NEW_FIRST if together else Step.OLD_LEAVES
    return Swap(command, old, new, step, together, old_served)


def advance(swap: Swap, phases: Mapping[str, Phase], reasons: Mapping[str, str]) -> Swap | Outcome:
    """The swap after one look; the same one where nothing has changed for it.

    The phases must be of a look that came after the step began: what a model was before it was
    asked to run says nothing.
    """
    old = phases.get(swap.old, Phase.DISABLED)
    new = phases.get(swap.new, Phase.FAILED)  # gone from the configuration
    match swap.step:
        case Step.NEW_FIRST:
            return _new_first(swap, new, reasons)
        case Step.OLD_LEAVES:
            return _old_leaves(swap, old, new)
        case Step.NEW_ALONE:
            return _new_alone(swap, old, new, reasons)
        case Step.NEW_LEAVES:
            return _new_leaves(swap, old, new)
        case Step.OLD_RETURNS:
            return _old_returns(swap, old, new, reasons)
    assert_never(swap.step)


def _new_first(swap: Swap, new: Phase, reasons: Mapping[str, str]) -> Swap | Outcome:
    if new is Phase.READY or new is Phase.DEFERRED:  # the room for both is gone: it comes alone
        return replace(swap, step=Step.OLD_LEAVES)
    if new in _DID_NOT_COME:
        return replace(swap, step=Step.NEW_LEAVES, why_undone=_why(swap.new, reasons))
    return swap


def _old_leaves(swap: Swap, old: Phase, new: Phase) -> Swap | Outcome:
    if old not in AT_REST:
        return swap
    if new is Phase.READY:
        return _done(swap)
    return replace(swap, step=Step.NEW_ALONE)


def _new_alone(swap: Swap, old: Phase, new: Phase, reasons: Mapping[str, str]) -> Swap | Outcome:
    if new in _DID_NOT_COME:
        return replace(swap, step=Step.NEW_LEAVES, why_undone=_why(swap.new, reasons))
    if new is Phase.READY and old in AT_REST:  # it may have been started by hand meanwhile
        return _done(swap)
    return swap


def _new_leaves(swap: Swap, old: Phase, new: Phase) -> Swap | Outcome:
    if new not in AT_REST:
        return swap
    if not swap.old_served:
        return Outcome(ok=False, message=swap.why_undone)
    if old is Phase.READY:
        return Outcome(ok=False, message=f"{swap.why_undone}; {swap.old} goes on")
    return replace(swap, step=Step.OLD_RETURNS)


def _old_returns(swap: Swap, old: Phase, new: Phase, reasons: Mapping[str, str]) -> Swap | Outcome:
    if new not in AT_REST:  # it may have been started by hand meanwhile
        return swap
    if old in AT_REST:
        also = _why(swap.old, reasons)
        return Outcome(ok=False, message=f"{swap.why_undone}; and {also}")
    if old is Phase.READY:
        return Outcome(ok=False, message=f"{swap.why_undone}; {swap.old} is back")
    return swap


def _done(swap: Swap) -> Outcome:
    return Outcome(ok=True, message=f"{swap.new} serves, {swap.old} is stopped")


def _why(name: str, reasons: Mapping[str, str]) -> str:
    return f"{name} did not become ready ({reasons.get(name, 'there is no such model')})"
