"""What was commanded: intents and swaps. Sole writer of intent.json and journal.json.

Everything here is called from one thread at a time and takes and gives the listener's states as
values. A command is answered when it is carried out; one that concerns a model that is being
swapped waits for the end of that, and those after it that concern the same models wait behind it,
so the last one asked has the last word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from supervisor_synapse.adapters import intent, journal, store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.supervisord import Request
from supervisor_synapse.core import swap as swaps
from supervisor_synapse.core.demand import wanted
from supervisor_synapse.core.model import AT_REST, Phase, Program
from supervisor_synapse.core.state import ModelState
from supervisor_synapse.core.swap import Outcome, Swap
from supervisor_synapse.errors import SynapseError
from supervisor_synapse.observe import Wanted

States = Mapping[str, ModelState]
Programs = Mapping[str, Program]

_NOT_SERVING = frozenset(
    {
        Phase.DISABLED, Phase.PENDING, Phase.DEFERRED, Phase.STOPPED, Phase.BACKOFF, Phase.FAILED,
        Phase.VERIFYING,
    }
)  # fmt: skip
_MOST_ENDED = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a command, in a line for a person."""

    command: str
    ok: bool
    message: str


class Commands:
    """Intents and swaps of one deployment; `fits` says whether a program finds memory now.

    `roll_back_to`: carries a rollback out (a model, a generation or 0, the command), and says what
    was done; the same command twice is one rollback.
    """

    def __init__(
        self,
        deployment: Deployment,
        fits: Callable[[Program], bool],
        roll_back_to: Callable[[str, int, str], str],
    ) -> None:
        self._deployment = deployment
        self._fits = fits
        self._roll_back_to = roll_back_to
        self._intent: Mapping[str, bool] = store.load_state(deployment.intent, intent.load)
        self._swaps = store.load_state(deployment.journal, journal.load)
        self._waiting: dict[str, frozenset[str]] = {}  # the models of commands that wait, by id
        self._ended: dict[str, Answer] = {}  # of swaps: the answer may get lost on its way
        self._handed_out: States | None = None
        self._taken_up: States | None = None

    @property
    def is_swapping(self) -> bool:
        return bool(self._swaps)

    def wanted(self, program: Program) -> Wanted:
        """Whether a model shall run: a swap wins over a command, a command over discovery."""
        for swap in self._swaps:
            wants = swap.wants(program.name)
            if wants is not None:
                other = swap.old if program.name == swap.new else swap.new
                return Wanted(wants, f"is being swapped with {other}", is_swapped=True)
        return self._wanted_for_itself(program)

    def _wanted_for_itself(self, program: Program) -> Wanted:
        commanded = self._intent.get(program.name)
        if commanded is None:
            return Wanted(program.enabled, program.reason)
        return Wanted(commanded, "enabled by command" if commanded else "disabled by command")

    def take_up(self, states: States) -> States:
        """The swaps that an earlier listener left; what a step wants is asked for again.

        But not of a model that was seen on its way since: who stopped it then is heeded.
        """
        for swap in self._swaps:
            for name in (swap.old, swap.new):
                if not swap.wants(name) or _phase(states, name) in AT_REST:
                    states = _ask(states, swap, name)
        self._taken_up = states
        return self._hand_out(states)

    def _hand_out(self, states: States) -> States:
        self._handed_out = states
        return states

    def heed(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        """Carry a command out, as if it might come twice; None: its answer comes later.

        As long as nobody has looked at the models, all commands wait.
        """
        if states is self._taken_up:
            return states, None
        if request.verb == "demand":
            is_known = request.model in programs
            found = wanted(states, request.model, time.monotonic()) if is_known else states
            return self._hand_out(found), None
        states, answer = self._heed(request, states, programs)
        return self._hand_out(states), answer

    def _heed(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        if request.id in self._ended:
            return states, self._ended[request.id]
        others = () if request.verb == "rollback" else (request.other,)
        names = [name for name in (request.model, *others) if name]
        if self._must_wait(request.id, names):
            return states, None
        unknown = next((name for name in names if name not in programs), None)
        if unknown is not None:
            return states, Answer(request.id, False, f"{unknown}: there is no such model")
        try:
            return self._carry_out(request, states, programs)
        except OSError as error:
            message = f"{request.model}: cannot write it down: {error.strerror}"
            return states, Answer(request.id, False, message)

    def _must_wait(self, command: str, names: list[str]) -> bool:
        """For the end of a swap, its own included, or for an earlier command that waits."""
        if any(swap.command == command for swap in self._swaps):
            return True
        taken = {name for swap in self._swaps for name in (swap.old, swap.new)}
        for earlier, others in self._waiting.items():
            if earlier == command:
                break
            taken |= others
        if taken.isdisjoint(names):
            self._waiting.pop(command, None)
            return False
        self._waiting[command] = frozenset(names)
        return True

    def _carry_out(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        name = request.model
        match request.verb:
            case "enable" | "disable":
                enable = request.verb == "enable"
                self._save_intent({**self._intent, name: enable}, programs)
                states = _with(
                    states, name, resume=enable, is_by_hand=False, drain=False, is_refused=False,
                    is_wanted_itself=enable,
                )  # fmt: skip
                return states, Answer(request.id, True, f"{name}: {request.verb}d")
            case "drain":
                return self._drain(request, states, programs[name])
            case "rollback":
                return states, self._roll_back(request)
            case "swap":
                return self._begin_swap(request, states, programs)
        return states, Answer(request.id, False, f"this listener knows no command {request.verb}")

    def _drain(
        self, request: Request, states: States, program: Program
    ) -> tuple[States, Answer | None]:
        """Of a model that has stopped already and shall stay so, all is as it was asked for."""
        name = program.name
        state = states.get(name, ModelState())
        if state.phase not in _NOT_SERVING:
            states = _with(states, name, drain=True, resume=False)
            return states, Answer(request.id, True, f"{name}: stops when it is idle")
        if self._stays_stopped(program, state):
            return states, Answer(request.id, True, f"{name}: is stopped already")
        return states, Answer(request.id, False, f"{name}: does not run")

    def _stays_stopped(self, program: Program, state: ModelState) -> bool:
        if state.phase is Phase.DISABLED:
            return not self.wanted(program).enabled
        return state.phase is Phase.STOPPED and not state.resume

    def _roll_back(self, request: Request) -> Answer:
        to = int(request.other) if request.other.isascii() and request.other.isdigit() else 0
        try:
            return Answer(request.id, True, self._roll_back_to(request.model, to, request.id))
        except SynapseError as error:
            return Answer(request.id, False, str(error))

    def _begin_swap(
        self, request: Request, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        old, new = request.model, request.other
        if old == new or not new:
            return states, Answer(request.id, False, f"{old}: a model cannot take its own place")
        runs = _phase(states, new) not in _NOT_SERVING
        swap = swaps.begin(
            request.id, old, new, together=runs or self._has_room(programs[new]),
            old_served=_serves(states, old),
        )  # fmt: skip
        self._save_swaps((*self._swaps, swap))
        for name in (old, new):
            states = _ask(states, swap, name)
        return states, None

    def _has_room(self, program: Program) -> bool:
        """Where it cannot be told, there is none."""
        try:
            return self._fits(program)
        except SynapseError:
            return False

    def advance(self, states: States, programs: Programs) -> tuple[States, list[Answer]]:
        """Take each swap as far as the world has come; the answers of those that are over.

        Only by states that were decided since the last call: a look may fail, and the states as
        they were handed out do not yet say what became of what was asked. Nor without a registry.

        Raises:
            OSError: a step could not be written down; it is tried again.
        """
        if states is self._handed_out or not programs:
            return states, []
        answers: list[Answer] = []
        problem: OSError | None = None
        before = states
        for swap in self._swaps:
            states = _kept_from_running(states, swap)
            try:
                states, answer = self._advance_one(swap, states, programs)
            except OSError as error:
                problem = error  # what has become of the others is not lost for that
                continue
            if answer is not None:
                answers.append(answer)
        if problem is not None and states is before:
            raise problem
        return self._hand_out(states), answers

    def _advance_one(
        self, swap: Swap, states: States, programs: Programs
    ) -> tuple[States, Answer | None]:
        phases = {name: state.phase for name, state in states.items() if name in programs}
        reasons = {name: state.reason for name, state in states.items()}
        result = swaps.advance(swap, phases, reasons)
        if isinstance(result, Outcome):
            return self._end_swap(swap, result, states, programs)
        if result is swap:
            return states, None
        self._save_swaps([result if one is swap else one for one in self._swaps])
        for name in (swap.old, swap.new):
            if result.wants(name) != swap.wants(name):
                states = _ask(states, result, name)
        return states, None

    def _end_swap(
        self, swap: Swap, outcome: Outcome, states: States, programs: Programs
    ) -> tuple[States, Answer]:
        """What a swap reached holds from now on; where it failed, what held before it.

        But a model that did not come in is not tried again beside the one that serves.
        """
        new = programs.get(swap.new)
        if outcome.ok:
            self._save_intent({**self._intent, swap.old: False, swap.new: True}, programs)
        elif (
            new is not None
            and self._wanted_for_itself(new).enabled
            and _phase(states, swap.new) is not Phase.STOPPED  # where it stays, by hand
        ):
            self._save_intent({**self._intent, swap.new: False}, programs)
        self._save_swaps([one for one in self._swaps if one is not swap])
        answer = Answer(swap.command, outcome.ok, outcome.message)
        self._ended[swap.command] = answer
        if len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        old = programs.get(swap.old)
        was_by_hand = old is not None and not self._wanted_for_itself(old).enabled
        if not outcome.ok and swap.old_served and was_by_hand:
            states = _with(states, swap.old, is_by_hand=True)
        return states, answer

    def _save_intent(self, wish: Mapping[str, bool], programs: Programs) -> None:
        kept = {name: enabled for name, enabled in wish.items() if name in programs}
        if kept != self._intent:
            intent.save(self._deployment.intent, kept)
            self._intent = kept

    def _save_swaps(self, under_way: list[Swap] | tuple[Swap, ...]) -> None:
        journal.save(self._deployment.journal, under_way)
        self._swaps = tuple(under_way)


def _ask(states: States, swap: Swap, name: str) -> States:
    """The states with what a step of a swap asks of one of its two models."""
    if swap.wants(name):
        return _with(states, name, resume=True, drain=False, is_refused=False)
    # What was stopped by hand stays so, whatever becomes of the swap.
    return _with(states, name, resume=False, is_by_hand=_phase(states, name) is Phase.STOPPED)


def _kept_from_running(states: States, swap: Swap) -> States:
    """A start by hand does not keep a model running that has to leave; else no swap would end."""
    for name in (swap.old, swap.new):
        state = states.get(name, ModelState())
        if state.is_by_hand and state.phase is not Phase.STOPPED and not swap.wants(name):
            states = _with(states, name, is_by_hand=False)
    return states


def _serves(states: States, name: str) -> bool:
    """Whether a model runs and was not told to stop."""
    state = states.get(name, ModelState())
    is_told = state.phase is Phase.STOPPING or (state.phase is Phase.DRAINING and not state.drain)
    return state.phase not in _NOT_SERVING and not is_told


def _with(states: States, name: str, **changes: bool) -> States:
    state = states.get(name, ModelState())
    return {**states, name: replace(state, **changes)}  # type: ignore[arg-type]  # all are flags


def _phase(states: States, name: str) -> Phase:
    return states.get(name, ModelState()).phase
