"""A model that was given up: its fallback serves in its place, and hands back when it is well."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import states
from supervisor_synapse.core import failover
from supervisor_synapse.core.admission import Claim, Rung
from supervisor_synapse.core.decide import decide
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.model import (
    DeviceReading,
    FailureClass,
    Incarnation,
    Phase,
    ProcessState,
)
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.settings import Reserve, RestartPolicy, WhenFull
from supervisor_synapse.core.state import (
    Action,
    Kill,
    ModelState,
    MovePort,
    Now,
    Policy,
    Seen,
    SetRung,
    Start,
    Stop,
    Transition,
)

DEVICE = "CUDA0"
CRASH = "GGML_ASSERT failed"
CORRUPT = "gguf_init_from_file_ptr: failed to read magic"
MISSING = "E gguf_init_from_file: failed to open GGUF file 'a.gguf' (No such file or directory)"
BAD_FLAG = "error: invalid argument: --nonsense"
OOM = "E ggml_backend: failed to allocate CUDA0 buffer of size 1"
PERMANENT_LOGS = {
    FailureClass.MODEL_CORRUPT: CORRUPT,
    FailureClass.MODEL_MISSING: MISSING,
    FailureClass.BAD_ARGUMENT: BAD_FLAG,
}

TURN_SECONDS = 1.5
COOLDOWN_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
RESTART = RestartPolicy(
    backoff_initial_seconds=1, intensity=3, period_seconds=HEALTHY_SECONDS,
    cooldown_seconds=COOLDOWN_SECONDS,
)  # fmt: skip


@dataclass
class Simulated:
    """One model with a fallback on its last rung, and how its runs go."""

    sizes: tuple[int, ...] = (4, 1)  # of its rungs
    fallback: str = "spare"
    fails: str = ""  # the log of each run of the model itself; "": it works
    fallback_fails: str = ""
    enabled: bool = True
    swapped: bool = False
    busy: bool = False
    movable: bool = True
    priority: int = 10
    seconds: float = 0.0  # that a load, a stop and looking after it each take
    rung: int = 0
    stamp: int = 1  # of its own files and arguments
    state: ProcessState = ProcessState.STOPPED
    pid: int = 0
    run: int = 0
    ending: Ending | None = None
    began: float = 0.0
    stop_at: float = 0.0
    ended_at: float = -1000.0

    @property
    def is_on_fallback(self) -> bool:
        return bool(self.fallback) and self.rung == len(self.sizes) - 1

    @property
    def serves(self) -> str:
        """Who answers on its port."""
        if not self.pid:
            return ""
        return self.fallback if self.is_on_fallback else "itself"


@dataclass
class World:
    """supervisord with one device, which does at once what it is told."""

    models: dict[str, Simulated]
    when_full: WhenFull = WhenFull.WAIT
    total: int = 100
    stranger: int = 0
    at: float = 1000.0
    states: Mapping[str, ModelState] = field(default_factory=dict)
    actions: list[tuple[float, Action]] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    forgets_actions: bool = False  # the listener is killed before it acts

    @property
    def a(self) -> Simulated:
        return self.models["a"]

    @property
    def state(self) -> ModelState:
        return self.states["a"]

    def look(self) -> list[Seen]:
        return [self._seen(name, one) for name, one in self.models.items()]

    def _seen(self, name: str, one: Simulated) -> Seen:
        last = len(one.sizes) - 1
        rungs = tuple(
            Rung(
                f"fallback {one.fallback}" if one.fallback and n == last else f"rung {n}",
                ((DEVICE, size),),
            )
            for n, size in enumerate(one.sizes)
        )
        held = ((DEVICE, one.sizes[one.rung]),) if one.pid else ()
        is_loading = self.at - one.began < one.seconds
        return Seen(
            name, one.enabled, "by settings", one.state,
            Incarnation(one.pid, one.run) if one.pid else None, one.run,
            verdict=_verdict(one, is_loading=is_loading), busy=one.busy,
            is_leaving=not one.pid and self.at - one.ended_at < one.seconds,
            ending=one.ending, is_swapped=one.swapped, own_stamp=one.stamp,
            file_stamp=0 if one.pid else (99 if one.is_on_fallback else one.stamp),
            claim=Claim(rungs, one.rung, held, one.priority, fallback=one.fallback),
        )  # fmt: skip

    def turn(self, seconds: float = TURN_SECONDS) -> None:
        self.at += seconds
        for name, one in self.models.items():
            if one.state is ProcessState.STOPPING and self.at >= one.stop_at:
                self.end(name)
        taken = sum(one.sizes[one.rung] for one in self.models.values() if one.pid)
        free = max(self.total - taken - self.stranger, 0)
        policy = Policy(
            max_parallel=99, restart=RESTART, reserve=Reserve(0), when_full=self.when_full,
            climb_after_seconds=10,
        )  # fmt: skip
        readings = (DeviceReading(DEVICE, self.total, free),)
        decision = decide(self.states, self.look(), Now(self.at, self.at), policy, readings)
        for change in decision.transitions:
            assert change.reason, f"{change} has no reason"
        self.transitions += decision.transitions
        self.states = decision.states
        if self.forgets_actions:
            return
        for action in decision.actions:
            self.actions.append((self.at, action))
            self._obey(action)

    def _obey(self, action: Action) -> None:
        one = self.models[action.name]
        match action:
            case Start():
                assert not one.pid, "an incarnation lives"
                assert action.reason
                self.start(action.name)
            case Stop():
                assert not (one.busy and one.enabled), "a busy model is not stopped for others"
                assert action.reason
                self.stop(action.name)
            case SetRung(rung=rung):
                assert not one.pid, "only what does not run is replaced"
                assert self.at - one.ended_at >= one.seconds, "it is not verified to be gone"
                if one.movable and rung != one.rung:
                    one.rung, one.run, one.state, one.ending = rung, 0, ProcessState.STOPPED, None
            case MovePort() | Kill():
                raise AssertionError(f"nobody asked for {action}")

    def start(self, name: str = "a") -> None:
        """By whomever."""
        one = self.models[name]
        assert self.at - one.ended_at >= one.seconds, "what its last run left may be there"
        one.run, one.began = int(self.at * 10), self.at
        log = one.fallback_fails if one.is_on_fallback else one.fails
        if log:
            one.state, one.ending = ProcessState.EXITED, Ending(1, log)
            one.ended_at = self.at
            return
        one.pid, one.state, one.ending = one.run, ProcessState.RUNNING, None

    def stop(self, name: str = "a") -> None:
        """By whomever; it takes a while."""
        one = self.models[name]
        if one.pid and one.state is not ProcessState.STOPPING:
            one.state, one.stop_at = ProcessState.STOPPING, self.at + one.seconds
            if not one.seconds:
                self.end(name)

    def end(self, name: str) -> None:
        """It has stopped."""
        one = self.models[name]
        one.pid, one.state, one.ended_at = 0, ProcessState.STOPPED, self.at

    def crash(self, name: str = "a") -> None:
        one = self.models[name]
        one.pid, one.state, one.ending = 0, ProcessState.EXITED, Ending(1, CRASH)
        one.ended_at = self.at

    def enable(self, name: str = "a", enabled: bool = True) -> None:
        """By command, as commands.py takes it."""
        self.models[name].enabled = enabled
        state = replace(
            self.states[name], resume=enabled, is_by_hand=False, is_refused=False,
            is_wanted_itself=enabled,
        )  # fmt: skip
        self.states = {**self.states, name: state}

    def restart_supervisord(self) -> None:
        for one in self.models.values():
            one.pid, one.run, one.state, one.ending = 0, 0, ProcessState.STOPPED, None

    def replace_listener(self) -> None:
        """The next one reads what this one wrote."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.json"
            states.save(path, "boot", self.states)
            self.states = failover.taken_up(states.load(path, "boot"))

    def run(self, seconds: float, step: float = TURN_SECONDS) -> World:
        for _ in range(int(seconds / step) + 1):
            self.turn(step)
        return self

    def run_until_serves(self, who: str, within: float, name: str = "a") -> World:
        end = self.at + within
        while self.models[name].serves != who or self.states[name].phase is not Phase.READY:
            assert self.at < end, f"{who} not within {within} s: {self.states[name]}"
            self.turn()
        return self

    def count(self, kind: type[Action], since: float = 0.0) -> int:
        return sum(isinstance(action, kind) for at, action in self.actions if at >= since)


def _verdict(one: Simulated, *, is_loading: bool) -> Verdict:
    if one.state is not ProcessState.RUNNING:
        return Verdict.UNKNOWN
    return Verdict.LOADING if is_loading else Verdict.READY


def world(one: Simulated | None = None, **more: Simulated) -> World:
    return World({"a": one or Simulated(), **more})


def failed_over(fails: str = CRASH, when_full: WhenFull = WhenFull.WAIT) -> World:
    at = World({"a": Simulated(fails=fails)}, when_full)
    return at.run_until_serves("spare", 40)


# --- to the fallback -----------------------------------------------------------------------------


@pytest.mark.parametrize("when_full", WhenFull)
def test_where_the_breaker_opens_the_fallback_serves_whatever_when_full_says(
    when_full: WhenFull,
) -> None:
    at = failed_over(when_full=when_full)
    assert at.count(Start) == RESTART.intensity + 1
    why = "crashed; 3 failures within 60 s"
    assert at.state.reason.endswith(f"fallback spare serves in its place: {why}")
    assert at.state.last_failure is not None
    assert at.state.last_failure.failure_class is FailureClass.CRASHED
    told = {change.reason: change.failure for change in at.transitions}
    assert told[f"{why}; fallback spare serves in its place"] == at.state.last_failure


@pytest.mark.parametrize("kind", PERMANENT_LOGS, ids=lambda kind: str(kind.value))
def test_where_a_retry_cannot_help_it_serves_at_once(kind: FailureClass) -> None:
    at = world(Simulated(fails=PERMANENT_LOGS[kind])).run_until_serves("spare", 6)
    assert at.count(Start) == 2
    assert kind.value in at.state.reason
    assert at.state.last_failure is not None
    assert at.state.last_failure.failure_class is kind


def test_a_model_without_a_fallback_is_given_up_as_ever() -> None:
    at = world(Simulated(fails=CORRUPT, fallback="")).run(60)
    assert at.state.phase is Phase.FAILED
    assert at.count(SetRung) == 0


def test_a_model_that_is_not_enabled_does_not_fail_over() -> None:
    at = world(Simulated(enabled=False, fails=CORRUPT))
    at.turn()
    at.start()
    at.run(30)
    assert at.count(SetRung) == at.count(Start) == 0


def test_a_model_in_a_swap_does_not_fail_over_so_the_swap_sees_it_fail() -> None:
    at = world(Simulated(fails=CORRUPT, swapped=True)).run(10)
    assert at.state.phase is Phase.FAILED
    at.a.swapped = False
    at.run_until_serves("spare", 6)


def test_a_block_that_is_not_ours_to_change_leaves_the_model_failed_with_its_breaker() -> None:
    at = world(Simulated(fails=CRASH, movable=False)).run(30)
    assert at.state.phase is Phase.FAILED
    assert "edited by hand" in at.state.reason
    assert at.count(Start) == RESTART.intensity
    assert at.state.retries.retry_at is not None
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 5)  # its own half-open trial


def test_a_fallback_that_does_not_fit_is_deferred_and_starts_when_there_is_room() -> None:
    at = world(Simulated(fails=CORRUPT, sizes=(4, 3)))
    at.total = 4
    at.turn()
    at.stranger = 3
    at.run(120)  # for longer than a program is new
    assert at.state.phase is Phase.DEFERRED
    assert "on CUDA0" in at.state.reason
    assert at.a.is_on_fallback
    at.stranger = 0
    at.run_until_serves("spare", 6)
    assert "model-corrupt" in at.state.reason
    assert at.count(Start) == 2


def test_a_model_on_a_lower_rung_for_want_of_memory_fails_over_from_there_and_back() -> None:
    at = World({"a": Simulated(sizes=(9, 4, 1))}, WhenFull.DEGRADE, total=10, stranger=5)
    at.run_until_serves("itself", 10)
    assert at.a.rung == 1
    at.a.fails = CORRUPT
    at.crash()
    at.run_until_serves("spare", 10)
    at.stranger = 0
    at.a.fails, at.a.stamp = "", 2
    at.run_until_serves("itself", 20)
    assert at.a.rung == 1
    at.run(HEALTHY_SECONDS + 40)  # when it is well it climbs as ever
    assert at.a.rung == 0


def test_a_fallback_does_not_climb_because_there_is_memory() -> None:
    at = failed_over(CORRUPT, WhenFull.DEGRADE)
    stops = at.count(Stop)
    at.run(HEALTHY_SECONDS * 5)
    assert at.a.serves == "spare"
    assert at.count(Stop) == stops


# --- and back ------------------------------------------------------------------------------------


def test_after_the_cooldown_it_hands_back_and_after_a_healthy_period_it_is_well() -> None:
    at = failed_over()
    since = at.at
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 5)
    assert at.at - since >= COOLDOWN_SECONDS - 5
    assert "on trial" in at.state.reason
    at.run(HEALTHY_SECONDS + 5)
    assert at.state.failover is None
    assert at.state.retries == Restarts()
    assert "well again" in at.state.reason
    (stop,) = [action for _, action in at.actions if isinstance(action, Stop)]
    assert stop.reason.startswith("its cooldown is over")


def test_one_failure_on_trial_and_the_fallback_serves_again_with_no_wait() -> None:
    at = failed_over()
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 5)
    assert at.state.retries.is_trial
    at.run(HEALTHY_SECONDS / 2)
    at.crash()
    at.run_until_serves("spare", 6)
    assert "failed its trial" in at.state.reason


def test_the_wait_for_the_next_trial_doubles_up_to_a_bound() -> None:
    at = failed_over()
    at.run(COOLDOWN_SECONDS * 64 * 4, step=4.0)
    tried = [when for when, action in at.actions if isinstance(action, Stop)]
    waits = [later - earlier for earlier, later in pairwise(tried)]
    expected = [COOLDOWN_SECONDS * 2.0 ** min(n, 6) for n in range(1, len(waits) + 1)]
    assert len(waits) >= 7
    for wait, least in zip(waits, expected, strict=True):
        assert least <= wait <= least + 30


def test_a_busy_fallback_is_not_cut() -> None:
    at = failed_over()
    at.a.fails, at.a.busy = "", True
    at.run(COOLDOWN_SECONDS * 3)
    assert at.a.serves == "spare"
    at.a.busy = False
    at.run_until_serves("itself", 6)


def test_it_hands_back_only_where_the_model_itself_has_room() -> None:
    at = failed_over()
    at.a.fails, at.total, at.stranger = "", 10, 8
    at.run(COOLDOWN_SECONDS * 2)
    assert at.a.serves == "spare"
    at.stranger = 0
    at.run_until_serves("itself", 6)


def test_room_that_was_lost_on_the_way_brings_the_fallback_back() -> None:
    at = failed_over()
    at.a.fails = ""
    while not at.count(Stop):
        at.turn()
    at.stranger = at.total - 2
    at.run_until_serves("spare", 10)
    assert "no memory for its trial" in at.state.reason
    assert at.state.last_failure is not None
    assert at.state.last_failure.failure_class is FailureClass.CRASHED
    at.stranger = 0
    at.run_until_serves("itself", COOLDOWN_SECONDS * 2 + 6)


def test_where_others_may_be_evicted_they_make_room_for_the_trial() -> None:
    low = Simulated(sizes=(4,), fallback="", priority=30)
    at = World({"a": Simulated(fails=CRASH, sizes=(6, 1)), "low": low}, WhenFull.EVICT, total=8)
    at.run_until_serves("spare", 40)
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 10)
    assert at.states["low"].phase is Phase.DEFERRED


def test_a_ladder_that_ends_on_the_fallback_puts_the_trial_off() -> None:
    at = failed_over(when_full=WhenFull.DEGRADE)
    at.a.fails = ""
    while not at.count(Stop):
        at.turn()
    at.stranger = at.total - 2
    since = at.at
    at.run_until_serves("spare", 10)
    at.stranger = 0
    at.run_until_serves("itself", COOLDOWN_SECONDS * 2 + 12)
    assert at.at - since >= COOLDOWN_SECONDS * 2


@pytest.mark.parametrize("kind", PERMANENT_LOGS, ids=lambda kind: str(kind.value))
def test_what_cannot_be_helped_hands_back_once_its_files_or_arguments_changed(
    kind: FailureClass,
) -> None:
    at = failed_over(PERMANENT_LOGS[kind])
    at.run(COOLDOWN_SECONDS * 10)
    assert at.a.serves == "spare"
    at.a.fails, at.a.stamp = "", 2
    at.run_until_serves("itself", 12)
    assert at.count(Stop) == 1


def test_a_file_that_is_still_being_written_is_waited_for() -> None:
    at = failed_over(CORRUPT)
    for stamp in range(2, 60):
        at.a.stamp = stamp
        at.turn()
    assert at.a.serves == "spare"
    assert at.count(Stop) == 0
    at.a.fails = ""
    at.run_until_serves("itself", 12)


def test_a_file_that_was_changed_in_vain_is_tried_once() -> None:
    at = failed_over(CORRUPT)
    at.a.stamp = 2
    at.run(60)
    assert at.a.serves == "spare"
    assert at.count(Stop) == 1


def test_enabled_by_command_the_model_itself_is_tried_at_once() -> None:
    at = failed_over(CORRUPT)
    at.a.fails = ""
    at.enable()
    at.run_until_serves("itself", 6)


def test_a_stop_by_hand_is_heeded_and_a_start_by_hand_tries_the_model_itself() -> None:
    at = failed_over(CORRUPT)
    at.stop()
    at.run(COOLDOWN_SECONDS * 3)
    assert at.state.phase is Phase.STOPPED
    at.start()
    at.a.fails = ""
    at.run_until_serves("itself", 10)


def test_a_stop_by_hand_on_trial_is_heeded() -> None:
    at = failed_over()
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 5)
    at.stop()
    at.run(COOLDOWN_SECONDS * 3)
    assert at.state.phase is Phase.STOPPED


def test_disabled_it_stops_and_enabled_again_it_is_tried_itself_without_its_fallback() -> None:
    at = failed_over(CORRUPT)
    at.enable(enabled=False)
    at.run(30)
    assert at.state.phase is Phase.DISABLED
    assert at.a.serves == ""
    at.a.fails, starts = "", at.count(Start)
    at.enable()
    at.run_until_serves("itself", 6)
    assert at.count(Start) == starts + 1


def test_after_a_restart_of_everything_the_model_itself_is_tried() -> None:
    at = failed_over(CORRUPT)
    at.restart_supervisord()
    at.a.fails = ""
    at.run_until_serves("itself", 6)
    assert at.state.failover is None


def test_where_discovery_deployed_the_model_itself_the_failover_is_over() -> None:
    at = failed_over(CORRUPT)
    at.run(40)
    at.a.rung, at.a.fails = 0, ""
    at.restart_supervisord()
    at.run_until_serves("itself", 6)
    assert at.state.failover is None


def test_a_fallback_that_nobody_remembers_hands_back_as_after_an_open_breaker() -> None:
    at = failed_over()
    at.states, at.a.fails = {}, ""
    at.run(10)
    assert at.a.serves == "spare"
    at.run_until_serves("itself", COOLDOWN_SECONDS + 6)


def test_one_model_at_a_time_hands_back() -> None:
    at = World({name: Simulated(fails=CRASH) for name in ("a", "b", "c")})
    for name in at.models:
        at.run_until_serves("spare", 40, name)
    for one in at.models.values():
        one.fails = ""
    for _ in range(60):
        stops = at.count(Stop)
        at.turn()
        assert at.count(Stop) - stops <= 1
        assert sum(not one.pid for one in at.models.values()) <= 1
    assert [one.serves for one in at.models.values()] == ["itself"] * 3


def test_a_listener_killed_before_it_asked_for_the_fallback_is_followed_by_one_that_does() -> None:
    at = world(Simulated(fails=CORRUPT))
    at.turn()
    at.forgets_actions = True
    at.turn()
    assert at.state.target_rung == 1
    at.forgets_actions = False
    at.replace_listener()
    at.run_until_serves("spare", 6)
    assert "model-corrupt" in at.state.reason


def test_a_listener_killed_after_it_asked_for_the_fallback_leaves_all_that_is_known() -> None:
    at = world(Simulated(fails=CORRUPT))
    while not at.count(SetRung):
        at.turn()
    assert at.a.is_on_fallback
    at.replace_listener()
    at.run_until_serves("spare", 6)
    assert "model-corrupt" in at.state.reason


# --- the fallback itself -------------------------------------------------------------------------


def test_a_fallback_that_crashes_is_started_again_as_any_model() -> None:
    at = failed_over(CORRUPT)
    at.crash()
    at.run_until_serves("spare", 10)
    assert at.state.last_failure is not None
    assert at.state.last_failure.failure_class is FailureClass.MODEL_CORRUPT


def test_where_the_fallback_is_given_up_too_both_reasons_are_said() -> None:
    at = world(Simulated(fails=CORRUPT, fallback_fails=CRASH)).run(25)
    assert at.state.phase is Phase.FAILED
    assert at.state.reason.startswith("fallback spare: crashed; 3 failures within 60 s")
    assert at.state.reason.endswith("itself: model-corrupt")
    assert at.count(Start) == 1 + RESTART.intensity


def test_where_both_are_given_up_the_model_itself_is_tried_after_its_cooldown() -> None:
    at = world(Simulated(fails=CRASH, fallback_fails=CORRUPT)).run(20)
    assert at.state.phase is Phase.FAILED
    at.a.fails = ""
    at.run_until_serves("itself", COOLDOWN_SECONDS + 6)


def test_where_both_fail_for_ever_starts_become_rare() -> None:
    at = world(Simulated(fails=CRASH, fallback_fails=CRASH)).run(HEALTHY_SECONDS)
    since = at.at
    at.run(COOLDOWN_SECONDS * 60)
    rounds = 6  # of the model itself; each gives its fallback another chance, too
    assert at.count(Start, since) <= 60 + rounds * RESTART.intensity


# --- whatever happens ----------------------------------------------------------------------------

EVENTS = st.sampled_from(
    [
        "crash", "break", "corrupt", "starve", "mend", "replaced", "spoil", "unspoil", "busy",
        "idle", "stop", "start", "enable", "disable", "less", "more", "killed", "forgotten",
        "swap", "immovable", "restart",
    ]
)  # fmt: skip


def _happen(at: World, event: str) -> None:
    one = at.a
    match event:
        case "crash" if one.state is ProcessState.RUNNING:
            at.crash()
        case "break" | "corrupt" | "starve" | "mend":
            logs = {"break": CRASH, "corrupt": CORRUPT, "starve": OOM, "mend": ""}
            one.fails = logs[event]
        case "replaced":
            one.stamp += 1
        case "spoil" | "unspoil":
            one.fallback_fails = CRASH if event == "spoil" else ""
        case "busy" | "idle":
            one.busy = event == "busy"
        case "stop" if one.pid:
            at.stop()
        case "start" if not one.pid and at.at - one.ended_at >= one.seconds:
            at.start()
        case "enable" | "disable":
            at.enable(enabled=event == "enable")
        case "less" | "more":
            at.stranger = 7 if event == "less" else 0
        case "killed":  # what was decided and written down was not carried out
            at.forgets_actions = True
            at.turn()
            at.forgets_actions = False
            at.replace_listener()
        case "forgotten":
            at.states = {}
            at.turn()
        case "swap":
            one.swapped = not one.swapped
        case "immovable":
            one.movable = not one.movable
        case "restart":
            at.restart_supervisord()


@settings(max_examples=300, deadline=None)
@given(
    when_full=st.sampled_from(WhenFull),
    sizes=st.sampled_from([(4, 1), (4, 2, 1), (9, 4, 2, 1)]),
    seconds=st.sampled_from([0.0, 4.0]),
    events=st.lists(st.tuples(EVENTS, st.integers(1, 30)), max_size=14),
)
def test_whatever_happens_a_model_that_is_well_serves_itself_in_the_end(
    when_full: WhenFull,
    sizes: tuple[int, ...],
    seconds: float,
    events: Sequence[tuple[str, int]],
) -> None:
    """No restart storm and no busy model cut on the way; each transition has a reason."""
    at = World({"a": Simulated(sizes=sizes, seconds=seconds)}, when_full, total=10)
    at.turn()
    for event, turns in events:
        _happen(at, event)
        since = at.at
        for _ in range(turns):
            at.turn()
        storm = sum(isinstance(action, Start) for when, action in at.actions if when > since)
        assert storm <= 2 + turns * TURN_SECONDS / 3 + 2 * RESTART.intensity
    at.stranger, at.a.busy, at.a.fails, at.a.fallback_fails = 0, False, "", ""
    at.a.swapped, at.a.movable = False, True
    at.run(10)
    at.enable()
    at.turn()
    at.run(COOLDOWN_SECONDS * 64 * 2 + 400, step=5.0)
    assert at.a.serves == "itself"
    assert at.a.rung == 0
    assert at.state.phase is Phase.READY
    assert at.state.failover is None
