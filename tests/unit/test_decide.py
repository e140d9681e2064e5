"""Histories that `decide` must live through, played against a small simulated supervisord.

The simulation obeys what it is asked at once, as supervisord does, and complains about every
question that should not have been asked: a start of what runs, a kill without a bad verdict.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as HypPhase
from hypothesis import strategies as st

from supervisor_synapse.adapters import states
from supervisor_synapse.core.decide import decide
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.model import FailureClass, Incarnation, Phase, ProcessState
from supervisor_synapse.core.probes import BAD, Verdict
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.settings import RestartPolicy
from supervisor_synapse.core.state import (
    Action,
    Bless,
    Decision,
    Kill,
    ModelState,
    MovePort,
    Now,
    Policy,
    RollBack,
    Seen,
    Start,
    Stop,
    Transition,
)
from supervisor_synapse.core.trials import Good, Trial

SPACING_SECONDS = 1.0  # supervisord tells runs apart by whole seconds
LOADING_PLACE_SECONDS = 60.0
HOUR_SECONDS = 3600.0
TICK_SECONDS = 0.25

CORRUPT = "gguf_init_from_file_ptr: failed to read magic"
MISSING = "E gguf_init_from_file: failed to open GGUF file 'a.gguf' (No such file or directory)"
BAD_FLAG = "error: invalid argument: --nonsense"
PORT_TAKEN = "E start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8100"
NO_MEMORY = "E llama_init_from_model: failed to allocate compute pp buffers"
PERMANENT_LOGS = {
    FailureClass.MODEL_CORRUPT: CORRUPT,
    FailureClass.MODEL_MISSING: MISSING,
    FailureClass.BAD_ARGUMENT: BAD_FLAG,
}


@dataclass(slots=True)
class Simulated:
    """One program in supervisord, and how each of its runs goes."""

    name: str
    enabled: bool = True
    why: str = "chosen by settings"
    state: ProcessState = ProcessState.STOPPED
    pid: int = 0
    start: int = 0
    began: float = 0.0
    loads_seconds: float = 0.5
    dies_after: float | None = None
    log: str = ""
    status: int = 1
    spawns: bool = True
    refuses: int = 0  # so many requests for a start get lost
    drain_seconds: float = 0.5
    busy: bool = False
    asleep: bool = False
    sick: Verdict | None = None  # what the probes say of this run whatever it does
    file_stamp: int = 1
    ending: Ending | None = None
    stop_at: float = 0.0
    verify_seconds: float = 0.0  # how long what a run left is looked for
    residue: str = ""  # what each of its runs leaves for good
    ended_at: float = 0.0
    started: list[float] = field(default_factory=list)  # when we asked for it
    ran: list[float] = field(default_factory=list)  # when it really began, whoever asked
    was_ready: bool = False
    is_out: bool = False  # killed by the listener after it had been ready, and not back
    ends_since_out: int = 0

    @property
    def is_alive(self) -> bool:
        return self.pid != 0

    @property
    def incarnation(self) -> Incarnation | None:
        return Incarnation(self.pid, self.start) if self.pid else None


class World:
    """supervisord, its programs, two clocks and one listener."""

    def __init__(self, *names: str, policy: Policy | None = None, chance: float = 0.5) -> None:
        self.models = {name: Simulated(name) for name in names or ("a",)}
        self.policy = policy or Policy()
        self.chance = chance
        self.monotonic = 1000.0
        self.wall = 1_800_000_000.0
        self.states: Mapping[str, ModelState] = {}
        self.actions: list[tuple[float, Action]] = []
        self.transitions: list[Transition] = []
        self._pids = 100

    def __getitem__(self, name: str) -> Simulated:
        return self.models[name]

    # --- what others do -------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """A start, by whomever."""
        model = self.models[name]
        if model.is_alive:
            return
        model.start = int(self.wall)
        model.began, model.sick, model.ending, model.was_ready = self.monotonic, None, None, False
        model.asleep = False
        if not model.spawns:
            model.state = ProcessState.FATAL
            model.ends_since_out += 1
            return
        self._pids += 1
        model.pid, model.state = self._pids, ProcessState.RUNNING
        model.ran.append(self.monotonic)

    def die(self, name: str, status: int = -1, log: str = "") -> None:
        """It ends by itself, or by somebody's signal."""
        model = self.models[name]
        if not model.is_alive:
            return
        stopping = model.state is ProcessState.STOPPING
        model.pid = 0
        model.state = ProcessState.STOPPED if stopping else ProcessState.EXITED
        model.ending = None if stopping else Ending(status, log)
        model.ended_at = self.monotonic
        model.ends_since_out += 1

    def stop(self, name: str) -> None:
        """A stop, by whomever; it drains."""
        model = self.models[name]
        if model.state is ProcessState.RUNNING:
            model.state = ProcessState.STOPPING
            model.stop_at = self.monotonic + model.drain_seconds

    def enable(self, name: str, enabled: bool = True) -> None:
        """The command `enable` or `disable`, as the listener takes it."""
        model = self.models[name]
        model.enabled = enabled
        model.why = "enabled by command" if enabled else "disabled by command"
        state = self.states.get(name, ModelState())
        self.states = {**self.states, name: replace(state, resume=enabled, is_by_hand=False)}

    def drain(self, name: str = "a") -> None:
        """The command `drain`, as the listener takes it."""
        self.states = {**self.states, name: replace(self.states[name], drain=True)}

    def configure(self, name: str, enabled: bool) -> None:
        """Discovery chose anew, with nobody commanding."""
        model = self.models[name]
        model.enabled, model.why = enabled, "chosen by settings"

    def replace_program(self, name: str) -> None:
        """Its block was removed and added again."""
        old = self.models[name]
        if not old.is_alive:
            self.models[name] = replace(
                old, state=ProcessState.STOPPED, start=0, ending=None, is_out=False
            )

    def restart_listener(self, *, with_state: bool = True) -> None:
        """The next one reads what this one wrote."""
        if not with_state:
            self.states = {}
            for model in self.models.values():  # what it did not write down, none can know
                model.is_out = False
                model.started.clear()
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.json"
            states.save(path, "boot", self.states)
            self.states = states.load(path, "boot")
        assert set(self.states) <= set(self.models)

    # --- time -------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Time goes by, and nobody looks."""
        self.monotonic += seconds
        self.wall += seconds
        for model in self.models.values():
            age = self.monotonic - model.began
            if model.state is ProcessState.STOPPING and self.monotonic >= model.stop_at:
                self.die(model.name)
            elif model.is_alive and model.dies_after is not None and age >= model.dies_after:
                self.die(model.name, model.status, model.log)

    def tick(self, seconds: float = TICK_SECONDS) -> Decision:
        """Time goes by; then the listener looks, decides and acts."""
        self.pass_time(seconds)
        seen = [self._see(model) for model in self.models.values()]
        now = Now(self.monotonic, self.wall, self.chance)
        decision = decide(self.states, seen, now, self.policy)
        self._note(decision, seen)
        self.states = decision.states
        for action in decision.actions:
            self.actions.append((self.monotonic, action))
            self._perform(action, {one.name: one for one in seen})
        return decision

    def run(self, seconds: float, step: float = TICK_SECONDS) -> World:
        """Let the listener work for so long."""
        end = self.monotonic + seconds
        while self.monotonic < end:
            self.tick(step)
        return self

    def run_until(self, condition: Callable[[], bool], within: float) -> World:
        end = self.monotonic + within
        while not condition():
            assert self.monotonic < end, f"not within {within} s: {self.phases()}"
            self.tick()
        return self

    def ready(self) -> World:
        """Bring all up."""
        self.tick()
        return self.run_until(lambda: set(self.phases().values()) == {Phase.READY}, 60.0)

    # --- what is seen, and what must hold ---------------------------------------------------------

    def verdict(self, model: Simulated) -> Verdict:
        if model.state not in (ProcessState.RUNNING, ProcessState.UNKNOWN):
            return Verdict.UNKNOWN
        if model.sick is not None:
            return model.sick
        loading = self.monotonic - model.began < model.loads_seconds
        return Verdict.LOADING if loading else Verdict.READY

    def _see(self, model: Simulated) -> Seen:
        verdict = self.verdict(model)
        return Seen(
            name=model.name, enabled=model.enabled, why=model.why, state=model.state,
            incarnation=model.incarnation, run=model.start,
            age_seconds=max(self.wall - model.start, 0.0), verdict=verdict,
            verdict_reason=f"the probes say {verdict.value}" if verdict in BAD else "",
            busy=model.busy, ending=model.ending,
            spawn_error="" if model.spawns else "can't find command",
            file_stamp=0 if model.is_alive else model.file_stamp,
            is_leaving=self.is_verifying(model),
            residue="" if model.is_alive or self.is_verifying(model) else model.residue,
            is_asleep=model.asleep,
        )  # fmt: skip

    def is_verifying(self, model: Simulated) -> bool:
        """Whether what its last run left is still being looked for."""
        since_end = self.monotonic - model.ended_at
        return not model.is_alive and since_end < model.verify_seconds

    def _note(self, decision: Decision, seen: Sequence[Seen]) -> None:
        assert set(decision.states) == {one.name for one in seen}
        for change in decision.transitions:
            assert change.reason, f"{change} has no reason"
            assert change.before is not change.after
        self.transitions += decision.transitions
        for one in seen:
            model, phase = self.models[one.name], decision.states[one.name].phase
            if one.verdict is Verdict.READY:
                model.was_ready, model.is_out = True, False
            at_rest = phase in (Phase.FAILED, Phase.STOPPED, Phase.DISABLED)
            if at_rest or model.ends_since_out > 1:
                model.is_out = False

    def _perform(self, action: Action, seen: Mapping[str, Seen]) -> None:
        model = self.models[action.name]
        assert not isinstance(action, Start | Stop | Kill | MovePort) or action.reason
        match action:
            case Start():
                self._check_start(model)
                model.started.append(self.monotonic)
                if model.refuses:
                    model.refuses -= 1
                else:
                    self.begin(model.name)
            case Stop():
                self._check_stop(model)
                self.stop(model.name)
            case Kill():
                self._check_kill(model, action, seen[action.name])
                self.die(model.name)
            case MovePort():
                assert not model.is_alive
                self.replace_program(model.name)

    def _check_start(self, model: Simulated) -> None:
        assert not model.is_alive, "an incarnation lives"
        assert not self.is_verifying(model), "what the run before it left may still be there"
        last = model.started[-1] if model.started else -SPACING_SECONDS
        assert self.monotonic - last >= SPACING_SECONDS, "supervisord cannot tell these runs apart"
        assert self.loading() < self.policy.max_parallel, "too many load at once"

    def _check_stop(self, model: Simulated) -> None:
        if model.enabled:
            assert self.states[model.name].drain, "only what was disabled or drained is stopped"
            assert not model.busy, "a busy model is drained until it is idle"

    def loading(self) -> int:
        """Runs that load and hold a place."""
        return sum(
            model.state is ProcessState.RUNNING
            and not model.was_ready
            and self.verdict(model) in (Verdict.LOADING, Verdict.UNKNOWN)
            and self.monotonic - model.began < LOADING_PLACE_SECONDS - 5.0
            for model in self.models.values()
        )

    def _check_kill(self, model: Simulated, action: Kill, seen: Seen) -> None:
        assert seen.verdict in BAD, f"killed on {seen.verdict}"
        assert action.incarnation == model.incarnation
        if model.was_ready and self.states[model.name].was_ready:
            others = [one.name for one in self.models.values() if one.is_out and one is not model]
            assert not others, f"{others} are out already"
            model.is_out, model.ends_since_out = True, 0

    # --- short forms ------------------------------------------------------------------------------

    def phase(self, name: str = "a") -> Phase:
        return self.states[name].phase

    def phases(self) -> dict[str, Phase]:
        return {name: state.phase for name, state in self.states.items()}

    def reason(self, name: str = "a") -> str:
        return self.states[name].reason

    def of(self, kind: type[Action], name: str | None = None) -> list[float]:
        """When such actions were taken."""
        return [
            at for at, action in self.actions
            if isinstance(action, kind) and name in (None, action.name)
        ]  # fmt: skip

    def path(self, name: str = "a") -> list[Phase]:
        return [change.after for change in self.transitions if change.model == name]


def gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


# --- coming up ------------------------------------------------------------------------------------


def test_an_enabled_model_comes_up_and_then_is_left_alone() -> None:
    """pending, loading, ready; nothing happens to it afterwards."""
    world = World().ready().run(HOUR_SECONDS, step=5.0)
    assert world.path() == [Phase.PENDING, Phase.LOADING, Phase.READY]
    assert len(world.actions) == 1
    assert world.states["a"].restarts == 0
    assert world.states["a"].ready_seconds == pytest.approx(0.5, abs=2 * TICK_SECONDS)


def test_a_model_that_is_not_enabled_is_never_started() -> None:
    """Its phase tells why."""
    world = World()
    world["a"].enabled = False
    world.run(10.0)
    assert (world.phase(), world.reason()) == (Phase.DISABLED, "chosen by settings")
    assert not world.actions


def test_no_more_load_at_once_than_allowed_and_the_first_come_first() -> None:
    """Each place that becomes free is given away at once, in order."""
    world = World("a", "b", "c", "d", "e", policy=Policy(max_parallel=2))
    world["a"].loads_seconds = 10.0
    world.ready()
    order = [action.name for _, action in world.actions]
    assert order == ["a", "b", "c", "d", "e"]
    assert world["e"].ran[0] - world["a"].ran[0] < 10.0, "the slow one held the others back"


def test_a_load_that_takes_hours_does_not_hold_its_place_for_ever() -> None:
    """The next one starts after a minute, also for a listener that did not see the load begin."""
    for with_state in (True, False):
        world = World("a", "b", policy=Policy(max_parallel=1))
        world["a"].loads_seconds = HOUR_SECONDS
        world.run(10.0)
        assert not world["b"].ran
        world.restart_listener(with_state=with_state)
        world.tick()
        world.run_until(lambda world=world: world.phase("b") is Phase.READY, 75.0)  # type: ignore[misc]
        assert world.phase("a") is Phase.LOADING
        assert len(world["a"].ran) == 1


def test_half_of_the_models_bad_at_boot_does_not_hold_back_the_other_half() -> None:
    """The good ones are ready as soon as if they were alone."""
    alone = World("g1", "g2", "g3", policy=Policy(max_parallel=2)).ready()
    mixed = World("b1", "g1", "b2", "g2", "b3", "g3", policy=Policy(max_parallel=2))
    for name, log in zip(("b1", "b2", "b3"), PERMANENT_LOGS.values(), strict=True):
        mixed[name].log, mixed[name].dies_after = log, 0.0
    mixed.tick()
    mixed.run_until(lambda: all(mixed.phase(name) is Phase.READY for name in alone.models), 60.0)
    assert mixed.monotonic - alone.monotonic <= 3 * TICK_SECONDS
    assert {mixed.phase(name) for name in ("b1", "b2", "b3")} == {Phase.FAILED}


def test_a_start_that_got_lost_is_asked_for_again_and_holds_nobody_back() -> None:
    """Spaced, and the others have their turn."""
    world = World("a", "b", policy=Policy(max_parallel=1))
    world["a"].refuses = 5
    world.ready()
    assert min(gaps(world.of(Start, "a"))) >= SPACING_SECONDS
    assert world["b"].ran[0] < world["a"].ran[0]


# --- crashes: backoff and breaker -----------------------------------------------------------------


def crash_loop(chance: float = 0.5, after: float = 3.0) -> World:
    """A model that exits 3 s after each start."""
    world = World(chance=chance)
    world["a"].dies_after, world["a"].loads_seconds = after, 0.5
    return world


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("after", [0.0, 3.0])
def test_a_crash_loop_is_slowed_geometrically_and_then_stopped(chance: float, after: float) -> None:
    """1, 2, 4, 8 s within 20%; five starts; then the breaker is open."""
    world = crash_loop(chance, after).run(120.0)
    restart = world.policy.restart
    assert len(world["a"].ran) == restart.intensity
    for wait, nominal in zip(gaps(world["a"].ran), (1, 2, 4, 8), strict=True):
        slack = 2 * TICK_SECONDS + SPACING_SECONDS * (nominal == 1)
        assert 0.8 * nominal <= wait - after <= 1.2 * nominal + slack
    assert world.phase() is Phase.FAILED
    assert "crashed" in world.reason()
    assert "5 failures within 600 s" in world.reason()


def test_after_the_cooldown_there_is_one_trial_and_its_failure_opens_the_breaker_again() -> None:
    """One start each 15 minutes, for as long as it fails."""
    world = crash_loop().run(60.0)
    opened = world.monotonic
    world.run(3 * 900.0, step=1.0)
    trials = [at for at in world["a"].ran if at > opened]
    assert len(trials) in (2, 3)
    assert all(900.0 <= gap <= 910.0 for gap in gaps(trials))


def test_a_trial_that_holds_closes_the_breaker_only_after_a_full_healthy_period() -> None:
    """A crash before that opens it at once; one after that begins with the shortest wait."""
    world = crash_loop().run(60.0)
    world["a"].dies_after = None
    world.run_until(lambda: world.phase() is Phase.READY, 950.0)
    world.run(590.0, step=2.0).die("a")
    world.tick()
    assert world.phase() is Phase.FAILED
    world.run_until(lambda: world.phase() is Phase.READY, 950.0)
    world.run(610.0, step=2.0).die("a")
    world.tick()
    assert world.phase() is Phase.BACKOFF
    assert world.states["a"].retries.attempt == 1


def test_healthy_for_less_than_a_period_forgets_nothing() -> None:
    """Three crashes with a minute of health between: the waits still grow."""
    world = World().ready()
    waits = []
    for _ in range(3):
        world.run(60.0, step=1.0).die("a")
        died = world.monotonic
        world.run_until(lambda: world["a"].is_alive, 30.0)
        waits.append(world.monotonic - died)
    assert waits == sorted(waits)
    assert waits[-1] > 3.0


def test_one_kill_gives_one_restart_with_its_class_in_the_history() -> None:
    """kill -9: backoff within the next look, ready again soon after."""
    world = World().ready()
    world.die("a")
    world.tick()
    assert world.phase() is Phase.BACKOFF
    change = world.transitions[-1]
    assert change.failure is not None
    assert change.failure.failure_class is FailureClass.CRASHED
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)
    assert (world.states["a"].restarts, len(world["a"].ran)) == (1, 2)


def sleeper(*, overcommit: bool) -> World:
    """Ready, and asleep for a while."""
    world = World(policy=Policy(overcommit_sleepers=overcommit)).ready()
    world["a"].asleep = True
    world.run(10)
    world["a"].asleep = False
    return world


def test_a_sleeper_that_finds_its_memory_given_away_has_not_failed() -> None:
    """However often: it starts anew as soon as there is room, and the breaker stays closed."""
    world = sleeper(overcommit=True)
    for _ in range(8):
        world.die("a", -6, NO_MEMORY)
        world.tick()
        assert world.phase() is Phase.PENDING
        assert world.states["a"].last_failure is not None
        world.run_until(lambda: world.phase() is Phase.READY, 5.0)
        world["a"].asleep = True
        world.run(2)
        world["a"].asleep = False
    assert world.states["a"].retries == Restarts()


def test_a_sleeper_that_falls_for_another_reason_has_failed() -> None:
    world = sleeper(overcommit=True)
    world.die("a", -11, "")
    world.tick()
    assert world.phase() is Phase.BACKOFF


def test_where_sleepers_keep_their_room_running_out_of_it_is_a_failure() -> None:
    world = sleeper(overcommit=False)
    world.die("a", -6, NO_MEMORY)
    world.tick()
    assert world.phase() is Phase.BACKOFF


def test_who_never_slept_was_given_its_memory_and_has_failed() -> None:
    world = World(policy=Policy(overcommit_sleepers=True)).ready()
    world.die("a", -6, NO_MEMORY)
    world.tick()
    assert world.phase() is Phase.BACKOFF


def test_models_that_fail_together_do_not_come_back_in_step() -> None:
    """Jitter tells them apart, even from one chance."""
    names = [f"m{number}" for number in range(8)]
    world = World(*names, policy=Policy(max_parallel=8)).ready()
    for name in names:
        world.die(name)
    world.tick()
    due = [world.states[name].retries.retry_at for name in names]
    assert len(set(due)) == len(due)


def test_a_program_that_cannot_be_spawned_backs_off_and_says_why() -> None:
    """supervisord's own words are the evidence."""
    world = World()
    world["a"].spawns = False
    world.run(120.0)
    assert len(world.of(Start)) == world.policy.restart.intensity
    assert world.states["a"].last_failure is not None
    assert "can't find command" in world.states["a"].last_failure.message


def test_a_run_too_short_to_be_seen_is_judged_on_its_own_evidence() -> None:
    """It had not been ready, whatever the run before it was."""
    world = World().ready()
    world.die("a")
    world["a"].dies_after, world["a"].status = 0.0, 128 + 6
    world.run_until(lambda: len(world["a"].ran) == 2, 5.0).tick()
    assert world.states["a"].last_failure is not None
    assert world.states["a"].last_failure.failure_class is FailureClass.OUT_OF_MEMORY


def test_a_file_that_went_missing_under_a_ready_model_ends_in_failed_and_not_in_a_loop() -> None:
    """Crash, one restart, model-missing, no more."""
    world = World().ready()
    world.die("a", -1, "")
    world["a"].dies_after, world["a"].log = 0.0, MISSING
    world.run(30.0)
    assert world.phase() is Phase.FAILED
    assert "model-missing" in world.reason()
    assert len(world["a"].ran) == 2


def test_words_of_a_failed_load_in_the_log_of_a_ready_server_do_not_bar_its_restart() -> None:
    """Some request had made it print them; then it was killed."""
    for log in PERMANENT_LOGS.values():
        world = World().ready()
        world.die("a", -1, log)
        world.tick()
        assert world.phase() is Phase.BACKOFF
        world.run_until(lambda world=world: world.phase() is Phase.READY, 5.0)  # type: ignore[misc]


# --- what a retry cannot help ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PERMANENT_LOGS))
def test_what_a_retry_cannot_help_is_tried_once(kind: FailureClass) -> None:
    """failed at once, with class and evidence, however long one waits."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, PERMANENT_LOGS[kind]
    world.run(2.0).run(HOUR_SECONDS, step=10.0)
    assert world.phase() is Phase.FAILED
    assert world.reason().startswith(kind.value)
    assert len(world["a"].ran) == 1
    last = world.states["a"].last_failure
    assert last is not None
    assert last.message == PERMANENT_LOGS[kind]


@pytest.mark.parametrize("kind", [FailureClass.MODEL_CORRUPT, FailureClass.MODEL_MISSING])
def test_a_file_that_was_mended_is_tried_again(kind: FailureClass) -> None:
    """Soon after it changed, with nobody asking."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, PERMANENT_LOGS[kind]
    world.run(10.0)
    world["a"].file_stamp, world["a"].dies_after = 2, None
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


def test_a_file_that_is_still_being_written_is_no_restart_storm() -> None:
    """It changes ten times a second for ten minutes, and is corrupt all the while."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, CORRUPT
    for _ in range(6000):
        world["a"].file_stamp += 1
        world.tick(0.1)
    assert 2 <= len(world["a"].ran) <= world.policy.restart.intensity + 1
    world["a"].dies_after = None
    world.run_until(lambda: world.phase() is Phase.READY, 1000.0)


def test_enabling_a_model_by_command_starts_it_once_more() -> None:
    """Also where a retry could not help; if it still cannot, that is that."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, BAD_FLAG
    world.run(10.0).enable("a")
    world.run(60.0)
    assert (world.phase(), len(world["a"].ran)) == (Phase.FAILED, 2)


def test_a_new_block_is_a_new_chance() -> None:
    """Removed and added again: what failed before is forgotten."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, BAD_FLAG
    world.run(10.0)
    world["a"].dies_after = None
    world.replace_program("a")
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


def test_starts_are_spaced_also_across_a_new_block() -> None:
    """Whatever was asked for before the block was replaced still counts."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, BAD_FLAG
    world.tick()
    for _ in range(3):
        world.tick(0.1)
        world.replace_program("a")
    world.run(5.0, step=0.1)
    assert len(world["a"].ran) >= 2
    assert min(gaps(world["a"].ran)) >= SPACING_SECONDS


# --- intent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [True, False])
def test_stopped_by_hand_stays_stopped(with_state: bool) -> None:
    """Also for the next listener, with its state or without."""
    world = World().ready()
    world.stop("a")
    world.run(5.0).restart_listener(with_state=with_state)
    world.run(HOUR_SECONDS, step=10.0)
    assert (world.phase(), world.reason()) == (Phase.STOPPED, "stopped by hand")
    assert len(world["a"].ran) == 1


def test_a_stop_is_draining_while_slots_are_busy_and_then_stopping() -> None:
    """And a server that answers no more while it stops is not killed."""
    world = World().ready()
    world["a"].busy, world["a"].drain_seconds = True, 10.0
    world.stop("a")
    world.tick()
    assert world.phase() is Phase.DRAINING
    world["a"].busy = False
    world.tick()
    assert world.phase() is Phase.STOPPING
    world.run(15.0)
    assert world.phase() is Phase.STOPPED
    assert not world.of(Kill)


def test_stopped_by_hand_then_started_by_hand_is_ready_without_us() -> None:
    """Our own starts are none of it."""
    world = World().ready()
    world.stop("a")
    world.run(5.0).begin("a")
    world.run(5.0)
    assert world.phase() is Phase.READY
    assert len(world.of(Start)) == 1


def test_disable_stops_a_running_model_and_enable_brings_it_back() -> None:
    """Both by command."""
    world = World().ready()
    world.enable("a", False)
    world.run(5.0)
    assert (world.phase(), world.reason()) == (Phase.DISABLED, "disabled by command")
    assert not world["a"].is_alive
    world.run(60.0).enable("a")
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


def test_enable_starts_what_was_stopped_by_hand() -> None:
    world = World().ready()
    world.stop("a")
    world.run(5.0).enable("a")
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


@pytest.mark.parametrize("with_state", [True, False])
def test_a_disabled_model_started_by_hand_is_left_running(with_state: bool) -> None:
    """It is healed like any other; stopped by hand, it is stopped."""
    world = World()
    world["a"].enabled = False
    world.run(3.0).begin("a")
    world.run(5.0)
    world.restart_listener(with_state=with_state)
    world.run(20.0)
    assert world.phase() is Phase.READY
    assert not world.of(Stop)
    world.die("a")
    world.run(10.0)
    assert world.phase() is Phase.READY
    world.stop("a")
    world.run(60.0)
    assert world.phase() is Phase.STOPPED
    assert not world["a"].is_alive


def test_disable_also_stops_a_model_that_was_started_by_hand() -> None:
    """The newer command wins."""
    world = World()
    world["a"].enabled = False
    world.run(3.0).begin("a")
    world.run(5.0).enable("a", False)
    world.run(5.0)
    assert world.phase() is Phase.DISABLED
    assert not world["a"].is_alive


def test_disable_right_after_our_own_start_is_not_taken_for_a_start_by_hand() -> None:
    """The command came before the run was seen for the first time."""
    world = World()
    world.tick()
    assert world["a"].is_alive
    world.enable("a", False)
    world.run(10.0)
    assert world.phase() is Phase.DISABLED
    assert not world["a"].is_alive


def test_disabled_and_enabled_by_settings_is_brought_up() -> None:
    """Nobody stopped it by hand."""
    world = World().ready()
    world.configure("a", False)
    world.run(5.0)
    assert world.phase() is Phase.DISABLED
    world.configure("a", True)
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


def test_disabled_in_backoff_waits_no_more_and_enabled_starts_at_once() -> None:
    """The command is the user's word that it may run now."""
    world = crash_loop().run(30.0)
    world["a"].dies_after = None
    world.enable("a", False)
    world.run(1500.0, step=2.0)
    assert world.phase() is Phase.DISABLED
    runs = len(world["a"].ran)
    world.enable("a")
    world.run_until(lambda: len(world["a"].ran) > runs, 2.0)


def test_enable_starts_a_model_that_failed_while_it_was_disabled() -> None:
    """A by-hand start of a disabled model that ended at once is no reason against it."""
    world = World()
    world["a"].enabled = False
    world["a"].dies_after, world["a"].log = 0.0, CORRUPT
    world.run(2.0).begin("a")
    world.run(5.0)
    assert world.phase() is Phase.DISABLED
    world["a"].dies_after = None
    world.enable("a")
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)


# --- what answers no more -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (Verdict.UNRESPONSIVE, FailureClass.UNRESPONSIVE),
        (Verdict.WEDGED, FailureClass.WEDGED),
        (Verdict.STUCK, FailureClass.UNRESPONSIVE),
        (Verdict.FOREIGN, FailureClass.PORT_IN_USE),
    ],
)
def test_what_answers_no_more_is_killed_not_asked_and_comes_back(
    verdict: Verdict, kind: FailureClass
) -> None:
    """unhealthy, backoff, pending, loading, ready; the class is the verdict's."""
    world = World().ready()
    world["a"].sick = verdict
    decision = world.tick()
    assert [type(action) for action in decision.actions] == [Kill]
    assert world.phase() is Phase.UNHEALTHY
    world.tick()
    last = world.states["a"].last_failure
    assert last is not None
    assert (last.failure_class, last.message) == (kind, f"the probes say {verdict.value}")
    world.run_until(lambda: world.phase() is Phase.READY, 5.0)
    assert not world.of(Stop)


@pytest.mark.parametrize("verdict", [Verdict.UNKNOWN, Verdict.MISSED])
def test_no_evidence_and_single_misses_change_nothing(verdict: Verdict) -> None:
    """For however long."""
    world = World("a", "b").ready()
    before = len(world.transitions)
    for model in world.models.values():
        model.sick = verdict
    world.run(HOUR_SECONDS, step=10.0)
    assert len(world.transitions) == before
    assert set(world.phases().values()) == {Phase.READY}


@pytest.mark.parametrize("verdict", [Verdict.UNKNOWN, Verdict.MISSED])
def test_a_sick_model_of_which_nothing_is_known_now_is_not_killed(verdict: Verdict) -> None:
    """While another one is out it waits, and the evidence goes."""
    world = World("a", "b").ready()
    world["b"].loads_seconds = 10.0
    world["a"].sick = world["b"].sick = Verdict.UNRESPONSIVE
    world.tick()
    (_, first), *others = [entry for entry in world.actions if isinstance(entry[1], Kill)]
    assert not others
    waiting = "b" if first.name == "a" else "a"
    world[waiting].sick = verdict
    world.run(60.0)
    assert len(world.of(Kill)) == 1
    assert world[waiting].is_alive


def test_of_many_that_stop_answering_one_at_a_time_is_taken_out() -> None:
    """The next goes only when the one before is ready again."""
    names = ("a", "b", "c", "d")
    world = World(*names).ready()
    for model in world.models.values():
        model.sick, model.loads_seconds = Verdict.UNRESPONSIVE, 3.0
    world.run_until(lambda: len(world.of(Kill)) == 4, 60.0)
    assert min(gaps(world.of(Kill))) >= 3.0
    world.ready()
    assert [len(world[name].ran) for name in names] == [2, 2, 2, 2]


def test_one_at_a_time_holds_also_for_a_model_that_had_failed_before() -> None:
    """An earlier crash of the one that is out does not set the next one free."""
    world = World("a", "b").ready()
    world.die("a")
    world.ready()
    for model in world.models.values():
        model.sick, model.loads_seconds = Verdict.WEDGED, 3.0
    world.run_until(lambda: len(world.of(Kill)) == 2, 30.0)
    assert min(gaps(world.of(Kill))) >= 3.0


def test_one_that_does_not_come_back_does_not_shield_the_others_for_ever() -> None:
    """Its second failure, or its breaker, is the end of waiting for it."""
    world = World("a", "b").ready()
    world["a"].dies_after, world["a"].began = 0.5, world.monotonic
    world["a"].loads_seconds = 1.0
    world["a"].dies_after = None
    world["a"].sick = world["b"].sick = Verdict.WEDGED
    world.tick()
    world["a"].dies_after = 0.5
    world.run_until(lambda: len(world.of(Kill)) == 2, 30.0)
    assert world.phase("b") is not Phase.READY


def test_a_server_that_says_again_that_it_loads_is_not_called_ready() -> None:
    """Nor is it restarted."""
    world = World().ready()
    world["a"].sick = Verdict.LOADING
    world.run(120.0)
    assert world.phase() is Phase.LOADING
    world["a"].sick = None
    world.tick()
    assert world.phase() is Phase.READY
    assert len(world["a"].ran) == 1


def test_supervisord_not_knowing_what_a_live_process_does_is_no_end_of_it() -> None:
    """A signal of its that failed: nothing is started beside what still runs."""
    world = World().ready()
    world["a"].state = ProcessState.UNKNOWN
    world.run(60.0)
    assert len(world.of(Start)) == 1
    assert world.states["a"].restarts == 0
    assert world.states["a"].last_failure is None
    world["a"].state = ProcessState.RUNNING
    world.tick()
    assert world.phase() is Phase.READY


# --- ports ----------------------------------------------------------------------------------------


def test_a_taken_port_is_given_up_once_a_failure_and_the_next_one_serves() -> None:
    """The stranger has the first two; the third is free."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, PORT_TAKEN
    world.run_until(lambda: len(world.of(MovePort)) == 2, 30.0)
    world["a"].dies_after = None
    world.run_until(lambda: world.phase() is Phase.READY, 10.0)
    assert len(world.of(MovePort)) == 2
    assert len(world["a"].ran) == 3


def test_moves_end_where_every_port_is_taken() -> None:
    """The breaker holds for them as well."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, PORT_TAKEN
    world.run(300.0)
    assert world.phase() is Phase.FAILED
    assert len(world["a"].ran) <= world.policy.restart.intensity
    assert len(world.of(MovePort)) <= world.policy.restart.intensity


def test_no_other_failure_moves_a_port() -> None:
    world = crash_loop().run(120.0)
    assert not world.of(MovePort)


# --- listeners that come and go, and clocks that jump ---------------------------------------------


@pytest.mark.parametrize("with_state", [True, False])
def test_a_new_listener_disturbs_nothing(with_state: bool) -> None:
    """Ready models go on serving, loading ones on loading, without one action."""
    world = World("a", "b", "c").ready()
    world.die("c")
    world.ready()
    world["b"].sick = Verdict.LOADING
    actions = len(world.actions)
    world.run(5.0).restart_listener(with_state=with_state)
    world.tick()
    assert world.phases()["a"] is Phase.READY
    world.run(100.0)
    assert len(world.actions) == actions


def test_a_new_listener_with_state_writes_no_history_of_what_did_not_change() -> None:
    world = World("a", "b").ready()
    before = len(world.transitions)
    world.restart_listener()
    world.run(10.0)
    assert len(world.transitions) == before


def test_a_new_listener_remembers_backoff_breaker_and_cooldown() -> None:
    """A crash loop is not faster for a listener that crashes as well."""
    plain, shaken = crash_loop().run(2000.0, step=0.5), crash_loop()
    for _ in range(400):
        shaken.run(5.0, step=0.5).restart_listener()
    assert len(shaken["a"].ran) == len(plain["a"].ran)
    assert gaps(shaken["a"].ran) == pytest.approx(gaps(plain["a"].ran), abs=0.1)


def test_a_new_listener_without_state_does_not_retry_what_cannot_be_helped() -> None:
    """The log still says so."""
    world = World()
    world["a"].dies_after, world["a"].log = 0.0, CORRUPT
    world.run(5.0).restart_listener(with_state=False)
    world.run(60.0)
    assert (world.phase(), len(world["a"].ran)) == (Phase.FAILED, 1)


@pytest.mark.parametrize("jump", [HOUR_SECONDS, -HOUR_SECONDS])
def test_a_jump_of_the_wall_clock_changes_nothing(jump: float) -> None:
    """Ready, loading, waiting, cooling down: no action, no transition, and the same waits."""
    histories = []
    for jumped in (0.0, jump):
        world = World("ready", "loading", "looping", "broken")
        world["loading"].loads_seconds = 40.0
        world["looping"].dies_after = 3.0
        world["broken"].dies_after, world["broken"].log = 0.0, CORRUPT
        world.run(15.0)
        world.wall += jumped
        world.run(1000.0)
        steps = [(change.model, change.after) for change in world.transitions]
        histories.append((steps, [at for at, _ in world.actions]))
    assert histories[0] == histories[1]


def test_an_hour_in_which_nobody_looked_is_no_storm() -> None:
    """A suspended machine: all is as it was."""
    world = World("a", "b", "c").ready()
    actions = len(world.actions)
    world.pass_time(HOUR_SECONDS)
    world.run(60.0)
    assert len(world.actions) == actions


def test_a_run_that_replaced_another_unseen_inherits_nothing_of_it() -> None:
    """Killed and started by hand between two looks."""
    world = World().ready()
    world["a"].sick = Verdict.MISSED
    world.tick()
    world.die("a")
    world.wall += 1.0
    world.begin("a")
    world["a"].loads_seconds = 5.0
    world.tick()
    assert world.phase() is Phase.LOADING
    assert not world.states["a"].was_ready
    assert world.states["a"].incarnation == world["a"].incarnation


# --- whatever happens -----------------------------------------------------------------------------

QUICK = Policy(
    max_parallel=2,
    restart=RestartPolicy(
        backoff_initial_seconds=1.0, backoff_factor=2.0, backoff_max_seconds=8.0, intensity=3,
        period_seconds=40.0, cooldown_seconds=60.0,
    ),
)  # fmt: skip
NAMES = ("a", "b", "c", "d")
SETTLES_WITHIN_SECONDS = 400.0


def _sicken(verdict: Verdict) -> Callable[[World, str], None]:
    def fault(world: World, name: str) -> None:
        world[name].sick = verdict

    return fault


def _doom(log: str, after: float, status: int = 1) -> Callable[[World, str], None]:
    def fault(world: World, name: str) -> None:
        model = world[name]
        model.log, model.dies_after, model.status = log, after, status

    return fault


def _change(**values: object) -> Callable[[World, str], None]:
    def fault(world: World, name: str) -> None:
        for key, value in values.items():
            setattr(world[name], key, value)

    return fault


def _heal(world: World, name: str) -> None:
    model = world[name]
    model.dies_after, model.spawns, model.loads_seconds, model.refuses = None, True, 0.5, 0
    model.busy = False


def _lose_track(world: World, name: str) -> None:
    if world[name].is_alive:
        world[name].state = ProcessState.UNKNOWN


def _write_file(world: World, name: str) -> None:
    world[name].file_stamp += 1


EVENTS: dict[str, Callable[[World, str], None]] = {
    "nothing": lambda world, name: None,
    "wedged": _sicken(Verdict.WEDGED),
    "unresponsive": _sicken(Verdict.UNRESPONSIVE),
    "stuck": _sicken(Verdict.STUCK),
    "foreign": _sicken(Verdict.FOREIGN),
    "missed": _sicken(Verdict.MISSED),
    "unknown": _sicken(Verdict.UNKNOWN),
    "loads again": _sicken(Verdict.LOADING),
    "well": _change(sick=None),
    "dies": lambda world, name: world.die(name),
    "crashes when loading": _doom("", 0.2, 128 + 6),
    "crashes later": _doom("", 3.0),
    "corrupt": _doom(CORRUPT, 0.0),
    "port taken": _doom(PORT_TAKEN, 0.0),
    "slow": _change(loads_seconds=20.0),
    "cannot spawn": _change(spawns=False),
    "supervisord lost track": _lose_track,
    "start lost": _change(refuses=2),
    "healed": _heal,
    "file written": _write_file,
    "stopped by hand": lambda world, name: world.stop(name),
    "started by hand": lambda world, name: world.begin(name),
    "enabled": lambda world, name: world.enable(name),
    "disabled": lambda world, name: world.enable(name, False),
    "enabled by settings": lambda world, name: world.configure(name, True),
    "disabled by settings": lambda world, name: world.configure(name, False),
    "block replaced": lambda world, name: world.replace_program(name),
    "listener restarted": lambda world, name: world.restart_listener(),
    "listener without state": lambda world, name: world.restart_listener(with_state=False),
    "clock forward": lambda world, name: setattr(world, "wall", world.wall + HOUR_SECONDS),
    "clock back": lambda world, name: setattr(world, "wall", world.wall - HOUR_SECONDS),
    "nobody looks": lambda world, name: world.pass_time(30.0),
    "drained": lambda world, name: world.drain(name) if name in world.states else None,
    "busy": _change(busy=True),
    "idle": _change(busy=False),
    "slow to go": _change(verify_seconds=3.0),
    "leaves something": _change(residue="pid 4711"),
}

# Without shrinking, which takes minutes: add HypPhase.shrink to look into a failure.
PHASES = (HypPhase.reuse, HypPhase.generate)

HISTORIES = st.lists(
    st.tuples(
        st.sampled_from(sorted(EVENTS)),
        st.sampled_from(NAMES),
        st.sampled_from((0.1, 0.25, 1.0, 2.0, 9.0)),
    ),
    max_size=50,
)


def end_faults(world: World) -> None:
    """From here on each new run is good, unless its file is broken; what hangs goes on hanging."""
    for name in NAMES:
        model = world[name]
        is_broken = model.log == CORRUPT and model.dies_after is not None
        _heal(world, name)
        if is_broken:
            model.dies_after = 0.0
        if model.sick in (Verdict.MISSED, Verdict.UNKNOWN, Verdict.LOADING):
            model.sick = None


def is_settled(world: World, name: str) -> bool:
    """At the right kind of rest: nothing more will happen, and the phase says what is."""
    model, phase = world[name], world.phase(name)
    if phase is Phase.READY:
        return world.verdict(model) is Verdict.READY
    if phase is Phase.FAILED:
        return "a retry cannot help" in world.reason(name) and not model.is_alive
    return phase in (Phase.STOPPED, Phase.DISABLED) and not model.is_alive


@settings(
    max_examples=60,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(history=HISTORIES, chance=st.floats(0, 1, exclude_max=True))
def test_whatever_happens_the_rules_hold_and_all_settles(
    history: list[tuple[str, str, float]], chance: float
) -> None:
    """The simulation checks each action; once the faults end, every model comes to rest."""
    world = World(*NAMES, policy=QUICK, chance=chance)
    for event, name, seconds in history:
        EVENTS[event](world, name)
        world.tick(seconds)
    end_faults(world)
    world.tick()
    world.run_until(lambda: all(is_settled(world, name) for name in NAMES), SETTLES_WITHIN_SECONDS)
    quiet = len(world.transitions)
    world.run(30.0, step=1.0)
    assert len(world.transitions) == quiet, "it was no rest"


@settings(max_examples=60, deadline=None)
@given(
    faults=st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0.1, 30.0)), max_size=30),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_however_a_model_crashes_it_starts_no_oftener_than_the_breaker_allows(
    faults: list[tuple[str, float]], chance: float
) -> None:
    """In no period more starts than `intensity`, however the crashes fall."""
    world = World(*NAMES, policy=replace(QUICK, max_parallel=4), chance=chance)
    for name, seconds in faults:
        world.run(seconds, step=0.5)
        world.die(name)
    world.run(60.0, step=0.5)
    restart = QUICK.restart
    for name in NAMES:
        ran = world[name].ran
        for first in ran:
            within = [at for at in ran if first <= at < first + restart.period_seconds - 5.0]
            assert len(within) <= restart.intensity + 1


def test_a_model_enabled_while_it_runs_stays_stopped_when_it_is_stopped_later() -> None:
    """`enable` asks for a start now, and is not a licence to undo a later stop."""
    world = World().ready()
    world.enable("a")
    world.tick()
    world.stop("a")
    world.run(30.0)
    assert world.phase() is Phase.STOPPED


# --- verified stops and drains --------------------------------------------------------------------


def test_a_stop_is_verified_before_it_is_called_one() -> None:
    """Process gone is not all: what it left is looked for, and only then it is stopped."""
    world = World().ready()
    world["a"].verify_seconds = 3.0
    world.stop("a")
    world.run(2.0)
    assert world.phase() is Phase.VERIFYING
    world.run(3.0)
    assert world.phase() is Phase.STOPPED
    assert world.path()[-3:] == [Phase.STOPPING, Phase.VERIFYING, Phase.STOPPED]


@pytest.mark.parametrize("how", ["crash", "kill", "restart by enable"])
def test_no_run_follows_one_that_is_not_verified_to_be_over(how: str) -> None:
    """The simulation complains about a start meanwhile; after it, the model comes back."""
    world = World().ready()
    world["a"].verify_seconds = 4.0
    match how:
        case "crash":
            world.die("a")
        case "kill":
            world["a"].sick = Verdict.WEDGED
        case _:
            world.enable("a", False)
            world.run(1.0)
            world.enable("a")
    world.run(3.0)
    assert world.phase() in (Phase.VERIFYING, Phase.BACKOFF, Phase.PENDING)
    assert len(world["a"].ran) == 1
    world.run_until(lambda: world.phase() is Phase.READY, 10.0)


def test_a_failure_is_judged_once_although_it_was_verified_first() -> None:
    world = World().ready()
    world["a"].verify_seconds = 2.0
    world.die("a", 1, "it broke")
    world.run(2.5)
    failure = world.states["a"].last_failure
    assert failure is not None
    assert (failure.failure_class, failure.message) == (FailureClass.CRASHED, "it broke")
    assert world.states["a"].retries.attempt == 1


def test_a_start_by_hand_while_the_last_run_is_looked_for_is_seen() -> None:
    world = World().ready()
    world["a"].verify_seconds = 60.0
    world.stop("a")
    world.run(2.0).begin("a")
    world.run(2.0)
    assert world.phase() is Phase.READY


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_left_behind_for_good_is_told(enabled: bool) -> None:
    world = World().ready()
    world["a"].verify_seconds, world["a"].residue = 1.0, "pid 4711"
    if enabled:
        world.stop("a")
    else:
        world.enable("a", False)
    world.run(5.0)
    assert world.phase() is (Phase.STOPPED if enabled else Phase.DISABLED)
    assert world.reason().endswith("; left behind: pid 4711")


def test_a_stop_that_left_nothing_says_nothing_of_it() -> None:
    world = World().ready()
    world["a"].verify_seconds = 1.0
    world.stop("a")
    world.run(5.0)
    assert world.reason() == "stopped by hand"


def test_a_new_listener_verifies_nothing_anew_and_carries_on() -> None:
    """One that died while it verified: its successor finds a stopped process."""
    world = World().ready()
    world["a"].verify_seconds = 2.0
    world.stop("a")
    world.run(1.0)
    assert world.phase() is Phase.VERIFYING
    world["a"].verify_seconds = 0.0  # nobody remembers what was looked for
    world.restart_listener()
    world.run(5.0)
    assert (world.phase(), world.reason()) == (Phase.STOPPED, "stopped by hand")


def test_a_drained_model_is_stopped_when_it_is_idle_and_stays_stopped() -> None:
    """The simulation complains about a stop of a busy one."""
    world = World().ready()
    world["a"].busy = True
    world.drain()
    world.run(HOUR_SECONDS, step=30.0)
    assert world.phase() is Phase.DRAINING
    assert world["a"].is_alive
    world["a"].busy = False
    world.run(5.0)
    assert (world.phase(), world.reason()) == (Phase.STOPPED, "drained")
    world.run(HOUR_SECONDS, step=30.0).restart_listener()
    world.run(60.0)
    assert world.phase() is Phase.STOPPED
    assert len(world["a"].ran) == 1


@pytest.mark.parametrize("verdict", [Verdict.MISSED, Verdict.UNKNOWN])
def test_a_missed_probe_does_not_make_a_draining_model_one_that_loads(verdict: Verdict) -> None:
    """That would hold back others that wait for a loading place."""
    world = World().ready()
    world["a"].busy = True
    world.drain()
    world.tick()
    quiet = len(world.transitions)
    world["a"].sick = verdict
    world.run(5.0)
    world["a"].sick = None
    world.run(5.0)
    assert world.phase() is Phase.DRAINING
    assert len(world.transitions) == quiet


def test_a_draining_model_that_hangs_is_killed_and_not_brought_back() -> None:
    """The user asked for its end; it came another way."""
    world = World().ready()
    world["a"].busy = True
    world.drain()
    world.tick()
    world["a"].sick = Verdict.WEDGED
    world.run(60.0)
    assert len(world.of(Kill)) == 1
    assert (world.phase(), world.reason()) == (Phase.STOPPED, "drained")
    assert len(world["a"].ran) == 1


def test_a_model_that_crashed_while_it_drained_starts_at_once_when_it_is_enabled() -> None:
    """Its end was judged then, and is not held against the new start."""
    world = World().ready()
    world["a"].busy = True
    world.drain()
    world.tick()
    world.die("a", 1, CORRUPT)
    world.run(10.0)
    assert world.phase() is Phase.STOPPED
    failure = world.states["a"].last_failure
    assert failure is not None, "the history does not know that it crashed"
    state = replace(world.states["a"], resume=True, is_by_hand=False, drain=False)
    world.states = {"a": state}
    world.run_until(lambda: world.phase() is Phase.READY, 2.0)
    assert Phase.BACKOFF not in world.path()


def test_a_model_that_is_drained_while_it_loads_stops_when_it_has_loaded() -> None:
    world = World()
    world["a"].loads_seconds = 5.0
    world.run(1.0)
    world.drain()
    world.run(20.0)
    assert (world.phase(), world.reason()) == (Phase.STOPPED, "drained")


def test_started_by_hand_a_drained_model_serves_again() -> None:
    """The newer word wins, and no drain is left from before."""
    world = World().ready()
    world.drain()
    world.run(5.0)
    assert world.phase() is Phase.STOPPED
    world.begin("a")
    world.run(60.0)
    assert world.phase() is Phase.READY


@pytest.mark.parametrize("answer", [Verdict.READY, Verdict.MISSED, Verdict.UNKNOWN])
def test_what_a_killed_server_seems_to_answer_does_not_clear_it(answer: Verdict) -> None:
    """Between the kill and its burial supervisord says RUNNING, and questions end in odd ways."""
    run = Incarnation(7, 70)
    up = Seen("a", True, "", ProcessState.RUNNING, run, 70, verdict=Verdict.READY)
    wedged = replace(up, verdict=Verdict.WEDGED, verdict_reason="nothing moved")
    states: Mapping[str, ModelState] = {}
    for second, one in enumerate((up, wedged, replace(up, verdict=answer))):
        decision = decide(states, [one], Now(float(second), 0.0), Policy())
        states = decision.states
    assert states["a"].phase is Phase.UNHEALTHY
    ended = replace(up, state=ProcessState.EXITED, incarnation=None, ending=Ending(-1, ""))
    failure = decide(states, [ended], Now(3.0, 0.0), Policy()).states["a"].last_failure
    assert failure is not None
    assert failure.failure_class is FailureClass.WEDGED


def test_a_run_proves_no_block_that_supervisord_may_not_hold() -> None:
    """Its block could not be taken up in time, so it was started with what supervisord held; as
    soon as that is known to be the one, it is on trial like any.
    """
    run = Incarnation(pid=7, started_at=70)
    trial = Trial("new", 2, Good("old", 1))
    seen = Seen(
        "a", True, "", ProcessState.RUNNING, run, 70, verdict=Verdict.READY, digest="new",
        trial=trial, is_untold=True,
    )  # fmt: skip
    known: Mapping[str, ModelState] = {"a": ModelState(phase=Phase.PENDING)}
    policy = Policy(trial_seconds=2)
    actions: list[Action] = []
    for second in range(10):
        decision = decide(known, [seen], Now(100.0 + second, 0.0), policy)
        known, actions = decision.states, [*actions, *decision.actions]
    assert not [action for action in actions if isinstance(action, Bless)]
    told = decide(known, [replace(seen, is_untold=False)], Now(110.0, 0.0), policy)
    assert [action.digest for action in told.actions if isinstance(action, Bless)] == ["new"]


def test_a_run_that_was_over_before_anybody_saw_it_was_one_of_the_applied_block() -> None:
    """So that block is on trial for it, and is taken back."""
    trial = Trial("new", 2, Good("old", 1))
    ending = Ending(1, BAD_FLAG)
    seen = Seen(
        "a", True, "", ProcessState.EXITED, None, 70, ending=ending, digest="new", trial=trial
    )
    before = ModelState(phase=Phase.PENDING, asked_at=99.0, tried="old")
    after = decide({"a": before}, [seen], Now(100.0, 0.0), Policy())
    assert [action.digest for action in after.actions if isinstance(action, RollBack)] == ["new"]
