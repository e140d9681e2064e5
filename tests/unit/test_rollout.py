"""Changed blocks, played against a simulated supervisord whose servers do what their blocks say.

A block is its digest; what it does, its first letter says: `g` serves, `c` crashes as it loads, `b`
is refused its arguments. What `revise` and `discover` do on disk is done at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.core import trials
from supervisor_synapse.core.decide import decide
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.model import Failure, FailureClass, Incarnation, Phase, ProcessState
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.rollout import fails, holds_back
from supervisor_synapse.core.settings import RestartPolicy
from supervisor_synapse.core.state import (
    Action,
    Bless,
    ModelState,
    Now,
    Policy,
    Renew,
    RollBack,
    Seen,
    Start,
    Stop,
)
from supervisor_synapse.core.trials import (
    DISCOVER,
    ROLLBACK,
    UPDATE,
    Generation,
    Good,
    Rejected,
    Standing,
    Trial,
)

TRIAL_SECONDS = 5.0
LOADS_SECONDS = 1.0
TICK_SECONDS = 0.5
POLICY = Policy(
    trial_seconds=TRIAL_SECONDS,
    restart=RestartPolicy(
        backoff_initial_seconds=1, backoff_factor=2, backoff_max_seconds=4, intensity=5,
        period_seconds=60, cooldown_seconds=20,
    ),
)  # fmt: skip
LOGS = {"c": "E ggml: segmentation fault", "b": "error: invalid argument: --nonsense"}
SETTLED = (Phase.READY, Phase.FAILED, Phase.DISABLED, Phase.STOPPED)


@dataclass
class Simulated:
    """One program in supervisord: `held` is the block with which it starts it."""

    held: str
    state: ProcessState = ProcessState.STOPPED
    pid: int = 0
    run: int = 0
    began: float = 0.0
    serving_since: float | None = None
    ending: Ending | None = None
    ran: list[str] = field(default_factory=list)  # the block of each run


class World:
    """A deployment of models that are all good and ready at first, and its listener."""

    def __init__(self, *names: str) -> None:
        self.at = 1000.0
        self.number = 1
        self.states: Mapping[str, ModelState] = {}
        self.models = {name: Simulated("g0") for name in names}
        self.standings = {name: Standing("g0", 1, (Good("g0", 1),)) for name in names}
        self.untold: dict[str, str] = {}
        self.is_stuck = False  # somebody's file is broken: supervisord rereads nothing
        self.is_full = False  # the disk: nothing can be gone back from
        self.out: dict[str, float] = {}  # healthy ones that were taken out for another block
        self.served: set[tuple[str, str]] = set()  # for as long as a trial takes
        self.actions: list[Action] = []
        self._pids = 100
        self.settle()
        self.actions.clear()

    # --- what others do ---------------------------------------------------------------------------

    def discover(self, **blocks: str) -> None:
        """As deploy does: on disk at once, and supervisord is to be told."""
        blocks = {
            name: digest
            for name, digest in blocks.items()
            if digest != self.standings[name].digest
            and self.standings[name].rejection(digest) is None
        }
        if blocks:
            self._apply(DISCOVER, blocks)
            self.untold |= blocks

    def update(self, name: str, digest: str, *, starts: bool = False) -> None:
        """An edit, and `supervisorctl update`: it is stopped, and not started."""
        if self.is_stuck or digest == self.standings[name].digest:
            return
        self.models[name] = Simulated(digest, ran=self.models[name].ran)
        self.untold.pop(name, None)
        self._apply(UPDATE, {name: digest})
        if starts:
            self.begin(name)

    def begin(self, name: str) -> None:
        """A start, by whomever."""
        model = self.models[name]
        if not model.pid:
            self._pids += 1
            model.pid, model.run, model.state = self._pids, int(self.at * 10), ProcessState.RUNNING
            model.began, model.serving_since, model.ending = self.at, None, None
            model.ran.append(model.held)

    def stop(self, name: str) -> None:
        model = self.models[name]
        if model.pid:
            model.pid, model.state, model.ending = 0, ProcessState.STOPPED, None

    def crash(self, name: str) -> None:
        model = self.models[name]
        if model.pid:
            model.pid, model.state, model.ending = 0, ProcessState.EXITED, Ending(-11, "")

    def forget(self) -> None:
        """The listener is killed, and what it remembered is lost."""
        self.states = {}
        self.out.clear()

    def _apply(
        self, surface: str, blocks: Mapping[str, str], failure: Failure | None = None
    ) -> None:
        self.number += 1
        failures = dict.fromkeys(blocks, failure) if failure else {}
        generation = Generation(
            self.number, 1.0, surface, "", blocks, changed=tuple(blocks), failures=failures
        )
        self.standings = trials.taken_up(self.standings, generation)

    # --- a turn -----------------------------------------------------------------------------------

    def tick(self) -> None:
        self.at += TICK_SECONDS
        for name, model in self.models.items():
            self._live(name, model)
        if not self.is_stuck:
            self._cross_off()
        seen = [self._see(name, model) for name, model in self.models.items()]
        decision = decide(self.states, seen, Now(self.at, self.at), POLICY)
        self.states = decision.states
        for name in [name for name in self.out if self._is_back(name)]:
            del self.out[name]
        for action in decision.actions:
            self.actions.append(action)
            self._perform(action)

    def _is_back(self, name: str) -> bool:
        is_told = name not in self.untold
        return is_told and self.states[name].phase in SETTLED

    def _live(self, name: str, model: Simulated) -> None:
        age = self.at - model.began
        if not model.pid or age < LOADS_SECONDS:
            return
        log = LOGS.get(model.held[0])
        if log is not None:
            model.pid, model.state, model.ending = 0, ProcessState.EXITED, Ending(1, log)
            return
        if model.serving_since is None:
            model.serving_since = self.at
        if self.at - model.serving_since >= TRIAL_SECONDS:
            self.served.add((name, model.held))

    def _cross_off(self) -> None:
        for name in list(self.untold):
            model = self.models[name]
            if model.pid and model.held == self.untold[name]:
                del self.untold[name]

    def _see(self, name: str, model: Simulated) -> Seen:
        standing = self.standings[name]
        verdict = Verdict.UNKNOWN
        if model.pid:
            verdict = Verdict.LOADING if model.serving_since is None else Verdict.READY
        is_untold = name in self.untold
        return Seen(
            name, True, "by settings", model.state,
            Incarnation(model.pid, model.run) if model.pid else None, model.run,
            age_seconds=self.at - model.began, verdict=verdict, ending=model.ending,
            digest=standing.digest, trial=self._trial(standing) if standing.on_trial else None,
            is_untold=is_untold,
            is_outdated=is_untold and not self.is_stuck and model.held != self.untold[name],
        )  # fmt: skip

    def _trial(self, standing: Standing) -> Trial:
        return Trial(
            standing.digest, standing.generation, standing.former,
            rejection=standing.rejection(standing.digest),
            broken=trials.broken_by(self.standings, standing.generation),
        )  # fmt: skip

    def _perform(self, action: Action) -> None:
        model = self.models[action.name]
        standing = self.standings[action.name]
        match action:
            case Start():
                assert not model.pid
                self.begin(action.name)
            case Stop():
                assert action.name in self.untold, "only for another block"
                if model.serving_since is not None:
                    assert not self.out.keys() - {action.name}, f"{self.out} is out already"
                    self.out[action.name] = self.at
                self.stop(action.name)
            case Renew():
                assert not model.pid
                self._take_up(action.name)
            case Bless():
                assert (action.name, action.digest) in self.served, "it has never served"
                if standing.digest == action.digest:
                    self.standings[action.name] = trials.proven(standing)
            case RollBack():
                self._roll_back(action, standing)
            case _:
                raise AssertionError(action)

    def _roll_back(self, action: RollBack, standing: Standing) -> None:
        if self.is_full or standing.digest != action.digest:
            return
        assert standing.former is not None
        digest = standing.former.digest
        assert digest[0] == "g", "only what was good is gone back to"
        self._apply(ROLLBACK, {action.name: digest}, action.failure)
        self.untold[action.name] = digest
        self._take_up(action.name)

    def _take_up(self, name: str) -> None:
        model = self.models[name]
        if not self.is_stuck and not model.pid:
            self.models[name] = Simulated(self.standings[name].digest, ran=model.ran)
            self.untold.pop(name, None)

    def settle(self, seconds: float = 30.0) -> World:
        for _ in range(int(seconds / TICK_SECONDS)):
            self.tick()
        return self

    # --- looks ------------------------------------------------------------------------------------

    @property
    def phases(self) -> dict[str, Phase]:
        return {name: state.phase for name, state in self.states.items()}

    def serving(self) -> dict[str, str]:
        """By name, the block that serves."""
        return {
            name: model.held
            for name, model in self.models.items()
            if model.pid and model.serving_since is not None
        }

    def done(self, kind: type) -> list[str]:
        return [action.name for action in self.actions if isinstance(action, kind)]


# --- taking up -----------------------------------------------------------------------------------


def test_a_changed_block_is_taken_up_and_proves_itself() -> None:
    at = World("a", "b")
    at.discover(a="g1")
    at.settle()
    assert at.serving() == {"a": "g1", "b": "g0"}
    assert not at.standings["a"].on_trial
    assert (at.done(Stop), at.done(Renew), at.done(Start), at.done(Bless)) == (["a"],) * 4
    assert at.models["b"].ran == ["g0"]


def test_of_several_one_is_out_at_a_time() -> None:
    at = World("a", "b", "c")
    at.discover(a="g1", b="g1", c="g1")
    for _ in range(60):
        at.tick()
        assert len(at.serving()) >= 2
    assert at.serving() == {"a": "g1", "b": "g1", "c": "g1"}


def test_one_that_is_out_and_updated_by_hand_meanwhile_is_still_waited_for() -> None:
    at = World("a", "b")
    at.discover(a="g1", b="g1")
    at.tick()
    assert at.done(Stop) == ["a"]
    at.update("a", "g0")
    at.settle()  # a second model that is taken out meanwhile fails it
    assert at.serving() == {"a": "g0", "b": "g1"}


def test_those_that_do_not_serve_wait_for_nobody() -> None:
    at = World("a", "b", "c")
    for name in ("b", "c"):
        at.update(name, "b1")
        at.standings[name] = replace(at.standings[name], good=())
    at.settle()
    assert at.phases["b"] is Phase.FAILED
    at.discover(a="g1", b="g1", c="g1")
    at.tick()
    assert set(at.done(Renew)) >= {"b", "c"}


def test_a_model_that_was_stopped_by_hand_takes_up_its_block_and_rests() -> None:
    at = World("a")
    at.stop("a")
    at.settle(2)
    at.discover(a="g1")
    at.settle()
    assert at.models["a"].held == "g1"
    assert at.phases["a"] is Phase.STOPPED


def test_an_updated_model_comes_back_by_itself() -> None:
    at = World("a", "b")
    at.update("a", "g1")
    at.settle()
    assert at.serving() == {"a": "g1", "b": "g0"}


# --- going back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["c1", "b1"])
@pytest.mark.parametrize("how", ["update", "discover"])
def test_a_block_that_fails_goes_back_and_is_tried_once(block: str, how: str) -> None:
    at = World("a", "b")
    at.update("a", block) if how == "update" else at.discover(a=block)
    at.settle()
    assert at.serving() == {"a": "g0", "b": "g0"}
    assert at.models["a"].ran.count(block) == 1
    rejection = at.standings["a"].rejection(block)
    assert rejection is not None
    assert rejection.failure is not None
    assert rejection.failure.at > 0
    assert at.models["b"].ran == ["g0"]


def test_the_same_text_again_goes_back_without_a_try() -> None:
    at = World("a")
    at.update("a", "b1")
    at.settle()
    at.update("a", "b1")
    at.settle()
    assert at.serving() == {"a": "g0"}
    assert at.models["a"].ran.count("b1") == 1


def test_the_same_text_again_goes_back_also_where_it_was_started_by_hand() -> None:
    at = World("a")
    at.update("a", "b1")
    at.settle()
    at.update("a", "b1", starts=True)
    at.settle()
    assert at.serving() == {"a": "g0"}


def test_what_was_started_by_hand_before_anybody_looked_goes_back_all_the_same() -> None:
    """It has failed before the listener ever saw it run."""
    at = World("a")
    at.update("a", "b1", starts=True)
    at._live("a", at.models["a"])
    at.at += LOADS_SECONDS
    at.settle()
    assert at.serving() == {"a": "g0"}


def test_without_a_way_back_it_is_a_model_like_any_other() -> None:
    at = World("a")
    at.standings["a"] = Standing("g0", 1)
    at.settle()
    at.standings["a"] = replace(at.standings["a"], good=())
    at.update("a", "b1")
    at.standings["a"] = replace(at.standings["a"], good=())
    at.settle()
    assert at.phases["a"] is Phase.FAILED
    assert at.done(RollBack) == []


def test_a_generation_that_breaks_several_goes_back_as_a_whole() -> None:
    at = World("a", "b", "c", "d")
    at.discover(a="b1", b="b1", c="g1", d="g1")
    at.settle(60)
    assert at.serving() == dict.fromkeys("abcd", "g0")


def test_a_failure_of_a_block_that_proved_itself_takes_nothing_back() -> None:
    at = World("a")
    at.discover(a="g1")
    at.settle()
    for _ in range(3):
        at.crash("a")
        at.settle()
    assert at.serving() == {"a": "g1"}
    assert at.done(RollBack) == []


def test_on_a_full_disk_it_goes_back_when_there_is_room() -> None:
    at = World("a", "b")
    at.is_full = True
    at.update("a", "c1")
    at.settle(60)
    assert at.serving() == {"b": "g0"}
    assert len(at.done(RollBack)) <= 60 / 3 + 1
    at.is_full = False
    at.settle()
    assert at.serving() == {"a": "g0", "b": "g0"}


# --- a supervisord that rereads nothing ----------------------------------------------------------


def test_a_model_is_healed_although_its_block_cannot_be_taken_up() -> None:
    at = World("a", "b")
    at.is_stuck = True
    at.discover(a="g1")
    at.crash("a")
    at.settle(40)
    assert at.serving() == {"a": "g0", "b": "g0"}
    at.is_stuck = False
    at.settle()
    assert at.serving() == {"a": "g1", "b": "g0"}


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_what_an_older_block_does_proves_nothing_of_the_new_one(is_forgotten: bool) -> None:
    """It served long enough, but with what supervisord held."""
    at = World("a")
    at.is_stuck = True
    at.discover(a="b1")
    at.forget() if is_forgotten else at.crash("a")
    at.settle(60)
    assert at.serving() == {"a": "g0"}
    assert at.standings["a"].on_trial
    at.is_stuck = False
    at.settle()
    assert at.serving() == {"a": "g0"}
    assert at.standings["a"].rejection("b1") is not None


def test_a_failure_of_an_older_block_is_none_of_the_new_one() -> None:
    at = World("a")
    at.is_stuck = True
    at.discover(a="g1")
    for _ in range(3):
        at.crash("a")
        at.settle(20)
    at.is_stuck = False
    at.settle()
    assert at.serving() == {"a": "g1"}
    assert at.done(RollBack) == []


# --- single decisions ----------------------------------------------------------------------------


def seen(**changes: object) -> Seen:
    trial = Trial("X", 2, Good("A", 1))
    one = Seen("a", True, "", ProcessState.EXITED, None, 7, digest="X", trial=trial)
    return replace(one, **changes)  # type: ignore[arg-type]


FAILED = ModelState(
    phase=Phase.FAILED, tried="X", last_failure=Failure(FailureClass.CRASHED, "boom", 5.0)
)


def test_a_failure_of_its_own_run_fails_the_trial() -> None:
    assert fails(seen(), FAILED) == FAILED.last_failure


@pytest.mark.parametrize(
    ("one", "state"),
    [
        (seen(trial=None), FAILED),
        (seen(trial=Trial("X", 2)), FAILED),
        (seen(), replace(FAILED, tried="A")),
        (seen(), replace(FAILED, phase=Phase.LOADING)),
        (seen(), replace(FAILED, last_failure=None)),
        (seen(), replace(FAILED, last_failure=Failure(FailureClass.PORT_IN_USE, "", 1.0))),
        (seen(trial=Trial("X", 2, Good("A", 1), rejection=Rejected("X", 1, None))),
         replace(FAILED, phase=Phase.READY)),
        (seen(trial=Trial("X", 2, Good("A", 1), broken=(("b", FailureClass.CRASHED),))),
         replace(FAILED, phase=Phase.READY)),
    ],
    ids=["not on trial", "no way back", "another block ran", "it loads", "no failure",
         "a stranger's port", "left by command", "one other broke"],
)  # fmt: skip
def test_nothing_else_does(one: Seen, state: ModelState) -> None:
    assert fails(one, state) is None


def test_a_stranger_on_its_new_port_does() -> None:
    state = replace(FAILED, last_failure=Failure(FailureClass.PORT_IN_USE, "", 1.0))
    assert fails(seen(trial=Trial("X", 2, Good("A", 1), has_other_port=True)), state) is not None


def test_what_cannot_be_taken_up_is_not_waited_for_for_ever() -> None:
    one = seen(trial=None, is_untold=True)
    state = ModelState(untold_at=100.0, retries=Restarts())
    assert holds_back(one, state, Now(110.0, 0.0))
    assert not holds_back(one, state, Now(116.0, 0.0))


# --- whatever happens ----------------------------------------------------------------------------

NAMES: Sequence[str] = "abc"
BLOCKS = st.sampled_from(["g0", "g1", "g2", "c1", "b1"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["discover", "discover", "discover all", "update", "update and start", "stop", "start",
             "crash", "stuck", "forget", "full"]
        ),
        st.sampled_from(NAMES),
        BLOCKS,
        st.integers(0, 20),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_all_comes_to_rest_on_blocks_that_serve(steps: list[tuple[str, str, str, int]]) -> None:
    """Whatever is changed, by whomever: one healthy model is out at a time, only what has served is
    good, only what was good is gone back to; and in the end supervisord holds what is applied.
    """
    at = World(*NAMES)
    for step, name, block, ticks in steps:
        match step:
            case "discover":
                at.discover(**{name: block})
            case "discover all":
                at.discover(**dict.fromkeys(NAMES, block))
            case "update" | "update and start":
                at.update(name, block, starts=step != "update")
            case "stop":
                at.stop(name)
            case "start":
                at.begin(name)
            case "crash":
                at.crash(name)
            case "forget":
                at.forget()
            case "stuck":
                at.is_stuck = not at.is_stuck
            case "full":
                at.is_full = not at.is_full
        at.settle(ticks * TICK_SECONDS)
    at.is_stuck = at.is_full = False
    at.settle(80)
    assert at.untold == {}
    for name, standing in at.standings.items():
        model = at.models[name]
        assert model.held == standing.digest
        if at.phases[name] is not Phase.STOPPED:
            assert standing.digest[0] == "g", at.phases
            assert name in at.serving()
            assert not standing.on_trial
