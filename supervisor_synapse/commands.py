"""What was commanded: intents and swaps. Sole writer of intent.json and journal.json.

Everything here is called from one thread at a time and takes and gives the listener's states as
values. A command is answered when it is carried out; one that concerns a model that is being
swapped waits for the end of that, so the last one asked has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from supervisor_synapse.adapters import intent, journal, store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.supervisord import Request
from supervisor_synapse.core import swap as swaps
from supervisor_synapse.core.decide import ModelState
from supervisor_synapse.core.model import Phase, Program
from supervisor_synapse.core.swap import Outcome, Swap
from supervisor_synapse.observe import Wanted

States = Mapping[str, ModelState]
Programs = Mapping[str, Program]

_NOT_SERVING = frozenset(
    {
        Phase.DISABLED, Phase.PENDING, Phase.DEFERRED, Phase.STOPPED, Phase.BACKOFF, Phase.FAILED,
        Phase.VERIFYING,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a command, in a line for a person."""

    command: str
    ok: bool
    message: str


class Commands:
    """Intents and swaps of one deployment; `fits` says whether a program finds memory now."""

    def __init__(self, deployment: Deployment, fits: Callable[[Program], bool]) -> None:
        self._deployment = deployment
        self._fits = fits
        self._intent: Mapping[str, bool] = store.load_state(deployment.intent, intent.load)
        self._swaps = store.load_state(deployment.journal, journal.load)

    @property
    def is_swapping(self) -> bool:
        return bool(self._swaps)

    def wanted(self, program: Program) -> Wanted:
        """Whether a model shall run: a swap wins over a command, a command over discovery."""
        for swap in self._swaps:
            wants = swap.wants(program.name)
            if wants is not None:
                other = swap.old if program.name == swap.new else swap.new
                return Wanted(wants, f"is being swapped with {other}")
        return self._wanted_for_itself(program)

    def _wanted_for_itself(self, program: Program) -> Wanted:
        commanded = self._intent.get(program.name)
        if commanded is None:
            return Wanted(program.enabled, program.reason)
        return Wanted(commanded, "enabled by command" if commanded else "disabled by command")

    def take_up(self, states: States) -> States:
        """The swaps that an earlier listener left; what a step wants is asked for again."""
        for swap in self._swaps:
            states = _asked(states, swap)
        return states

    def heed(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        """Carry a command out, as if it might come twice; None: its answer comes later."""
        names = [name for name in (request.model, request.other) if name]
        if any(swap.wants(name) is not None for swap in self._swaps for name in names):
            return states, None
        unknown = next((name for name in names if name not in programs), None)
        if unknown is not None:
            return states, Answer(request.id, False, f"{unknown}: there is no such model")
        try:
            return self._carry_out(request, states, programs)
        except OSError as error:
            message = f"{request.model}: cannot write it down: {error.strerror}"
            return states, Answer(request.id, False, message)

    def _carry_out(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        name = request.model
        match request.verb:
            case "enable" | "disable":
                enable = request.verb == "enable"
                self._save_intent({**self._intent, name: enable}, programs)
                states = _with(states, name, resume=enable, is_by_hand=False, drain=False)
                return states, Answer(request.id, True, f"{name}: {request.verb}d")
            case "drain":
                if _phase(states, name) in _NOT_SERVING:
                    return states, Answer(request.id, False, f"{name}: does not run")
                states = _with(states, name, drain=True)
                return states, Answer(request.id, True, f"{name}: stops when it is idle")
            case "swap":
                return self._begin_swap(request, states, programs)
        return states, Answer(request.id, False, f"this listener knows no command {request.verb}")

    def _begin_swap(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        old, new = request.model, request.other
        runs = _phase(states, new) not in _NOT_SERVING
        swap = swaps.begin(
            request.id, old, new, together=runs or self._fits(programs[new]),
            old_served=_phase(states, old) not in _NOT_SERVING,
        )  # fmt: skip
        self._save_swaps((*self._swaps, swap))
        return _asked(states, swap), None

    def advance(self, states: States, programs: Programs) -> tuple[States, list[Answer]]:
        """Take each swap as far as the world has come; the answers of those that are over.

        Raises:
            OSError: a step could not be written down; it is tried again.
        """
        answers = []
        for swap in self._swaps:
            phases = {name: state.phase for name, state in states.items() if name in programs}
            reasons = {name: state.reason for name, state in states.items()}
            result = swaps.advance(swap, phases, reasons)
            if isinstance(result, Outcome):
                states = self._end_swap(swap, result, states, programs)
                answers.append(Answer(swap.command, result.ok, result.message))
            elif result is not swap:
                self._save_swaps([result if one is swap else one for one in self._swaps])
                states = _asked(states, result)
        return states, answers

    def _end_swap(self, swap: Swap, outcome: Outcome, states: States, programs: Programs) -> States:
        """What a swap reached holds from now on; where it failed, what held before it."""
        if outcome.ok:
            self._save_intent({**self._intent, swap.old: False, swap.new: True}, programs)
        self._save_swaps([one for one in self._swaps if one is not swap])
        old = programs.get(swap.old)
        if outcome.ok or old is None or self._wanted_for_itself(old).enabled:
            return states
        return _with(states, swap.old, is_by_hand=True)  # as it was: started by hand

    def _save_intent(self, wish: Mapping[str, bool], programs: Programs) -> None:
        kept = {name: enabled for name, enabled in wish.items() if name in programs}
        if kept != self._intent:
            intent.save(self._deployment.intent, kept)
            self._intent = kept

    def _save_swaps(self, under_way: list[Swap] | tuple[Swap, ...]) -> None:
        journal.save(self._deployment.journal, under_way)
        self._swaps = tuple(under_way)


def _asked(states: States, swap: Swap) -> States:
    """The states with what a step of a swap asks of its two models."""
    for name in (swap.old, swap.new):
        if swap.wants(name):
            states = _with(states, name, resume=True, drain=False)
        else:
            states = _with(states, name, resume=False, is_by_hand=False)
    return states


def _with(states: States, name: str, **changes: bool) -> States:
    state = states.get(name, ModelState())
    return {**states, name: replace(state, **changes)}  # type: ignore[arg-type]  # all are flags


def _phase(states: States, name: str) -> Phase:
    return states.get(name, ModelState()).phase
