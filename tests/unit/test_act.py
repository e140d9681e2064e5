"""Memory decides who starts: deferred, degraded, evicted, refused, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.core.admission import Claim, Rung
from supervisor_synapse.core.decide import decide
from supervisor_synapse.core.failures import REFUSED_STATUS, Ending
from supervisor_synapse.core.model import DeviceReading, Incarnation, Phase, ProcessState
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.settings import Reserve, WhenFull
from supervisor_synapse.core.state import (
    Decision,
    ModelState,
    Now,
    Policy,
    Seen,
    SetRung,
    Start,
    Stop,
)

DEVICE = "CUDA0"
OOM = "E ggml_backend: failed to allocate CUDA0 buffer of size 1"


@dataclass
class Simulated:
    """One model: what it asks of the device, and how it goes."""

    sizes: tuple[int, ...]  # of its rungs
    priority: int = 10
    pinned: bool = False
    enabled: bool = True
    busy: bool = False
    movable: bool = True
    breaks: frozenset[int] = frozenset()  # rungs on which it runs out of memory as it loads
    rung: int = 0
    state: ProcessState = ProcessState.STOPPED
    pid: int = 0
    run: int = 0
    ending: Ending | None = None


@dataclass
class World:
    """supervisord with one device, which does at once what it is told."""

    models: dict[str, Simulated]
    when_full: WhenFull
    total: int = 8
    stranger: int = 0
    readable: bool = True
    deaf: bool = False  # it takes no stop
    idle_stop_seconds: float = 0.0
    at: float = 1000.0
    states: Mapping[str, ModelState] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)  # every action, in words

    @property
    def taken(self) -> int:
        return sum(one.sizes[one.rung] for one in self.models.values() if one.pid)

    def look(self) -> list[Seen]:
        """In the order in which models start."""
        order = sorted(self.models, key=lambda name: (self.models[name].priority, name))
        return [self._seen(name, self.models[name]) for name in order]

    def _seen(self, name: str, one: Simulated) -> Seen:
        rungs = tuple(Rung(f"rung {n}", ((DEVICE, size),)) for n, size in enumerate(one.sizes))
        held = ((DEVICE, one.sizes[one.rung]),) if one.pid else ()
        claim = Claim(rungs, one.rung, held, one.priority, one.pinned)
        return Seen(
            name, one.enabled, "by settings", one.state,
            Incarnation(one.pid, one.run) if one.pid else None, one.run,
            verdict=Verdict.READY if one.pid else Verdict.UNKNOWN, busy=one.busy,
            ending=one.ending, claim=claim,
        )  # fmt: skip

    def turn(self, seconds: float = 1.5) -> Decision:
        self.at += seconds
        free = max(self.total - self.taken - self.stranger, 0) if self.readable else None
        readings = (DeviceReading(DEVICE, self.total, free),)
        policy = Policy(
            max_parallel=99, reserve=Reserve(0), when_full=self.when_full, climb_after_seconds=10,
            idle_stop_seconds=self.idle_stop_seconds,
        )  # fmt: skip
        now = Now(self.at, self.at)
        decision = decide(self.states, self.look(), now, policy, readings)
        self.states = decision.states
        for action in decision.actions:
            self._obey(action)
        return decision

    def _obey(self, action: object) -> None:
        self.seen.append(f"{type(action).__name__} {getattr(action, 'name', '')}")
        match action:
            case Start(name=name):
                self._start(name, self.models[name])
            case Stop(name=name):
                one = self.models[name]
                # What was disabled drains first, which is not simulated.
                assert not (one.busy and one.enabled), "a busy model is not stopped for others"
                if self.deaf:
                    return
                one.pid, one.state = 0, ProcessState.STOPPED
            case SetRung(name=name, rung=rung):
                one = self.models[name]
                assert not one.pid, "only what does not run is replaced"
                if one.movable:
                    one.rung, one.run, one.state = rung, 0, ProcessState.STOPPED

    def _start(self, name: str, one: Simulated) -> None:
        one.run = int(self.at * 10)
        if one.rung in one.breaks:
            one.state, one.ending = ProcessState.EXITED, Ending(1, OOM)
            return
        one.pid, one.state, one.ending = one.run, ProcessState.RUNNING, None

    def settle(self, turns: int = 12) -> dict[str, Phase]:
        for _ in range(turns):
            self.turn()
        return self.phases

    @property
    def phases(self) -> dict[str, Phase]:
        return {name: state.phase for name, state in self.states.items()}


def world(when_full: WhenFull, total: int = 8, **models: Simulated) -> World:
    return World(models, when_full, total)


def test_what_does_not_fit_is_deferred_with_the_numbers_and_holds_nobody_back() -> None:
    at = world(WhenFull.WAIT, a=Simulated((6,)), b=Simulated((4,)), c=Simulated((2,)))
    assert at.settle() == {"a": Phase.READY, "b": Phase.DEFERRED, "c": Phase.READY}
    assert "on CUDA0" in at.states["b"].reason
    assert "left" in at.states["b"].reason
    at.models["a"].enabled = False
    assert at.settle()["b"] is Phase.READY


def test_nothing_starts_on_a_device_that_cannot_be_read() -> None:
    at = world(WhenFull.WAIT, a=Simulated((1,)))
    at.readable = False
    assert at.settle() == {"a": Phase.DEFERRED}
    at.readable = True
    assert at.settle() == {"a": Phase.READY}


def test_memory_of_strangers_is_respected() -> None:
    at = world(WhenFull.WAIT, a=Simulated((5,)))
    at.stranger = 4
    assert at.settle() == {"a": Phase.DEFERRED}
    at.stranger = 3
    assert at.settle() == {"a": Phase.READY}


def test_the_first_rung_that_fits_is_deployed_before_the_start() -> None:
    at = world(WhenFull.DEGRADE, a=Simulated((9, 6, 5)), b=Simulated((4, 3, 2)))
    assert at.settle() == {"a": Phase.READY, "b": Phase.READY}
    assert (at.models["a"].rung, at.models["b"].rung) == (1, 2)
    assert "stepped down to rung 2" in at.states["b"].reason


def test_a_block_that_is_not_ours_stays_and_its_model_waits() -> None:
    at = world(WhenFull.DEGRADE, a=Simulated((9, 6), movable=False))
    assert at.settle(30) == {"a": Phase.DEFERRED}
    assert at.seen.count("SetRung a") == 1


def test_out_of_memory_goes_down_one_rung_at_a_time() -> None:
    at = world(WhenFull.DEGRADE, a=Simulated((5, 4, 3), breaks=frozenset({0, 1})))
    assert at.settle(20) == {"a": Phase.READY}
    assert at.models["a"].rung == 2
    assert [word for word in at.seen if word.startswith("SetRung")] == ["SetRung a"] * 2
    assert at.states["a"].falls == 2


def test_below_the_last_rung_it_is_a_failure_like_others() -> None:
    at = world(WhenFull.DEGRADE, a=Simulated((5, 4), breaks=frozenset({0, 1})))
    at.settle(40)
    assert at.phases["a"] in (Phase.BACKOFF, Phase.FAILED)


def test_it_climbs_back_when_memory_has_returned_and_stays_so() -> None:
    at = world(WhenFull.DEGRADE, a=Simulated((8, 2)))
    at.stranger = 5
    assert at.settle() == {"a": Phase.READY}
    assert at.models["a"].rung == 1
    at.stranger, at.total = 0, 10
    for _ in range(3):  # not at once
        at.turn()
    assert at.models["a"].rung == 1
    at.models["a"].busy = True  # and not while it works
    at.settle(20)
    assert at.models["a"].rung == 1
    at.models["a"].busy = False
    assert at.settle(20) == {"a": Phase.READY}
    assert at.models["a"].rung == 0


@pytest.mark.parametrize(
    "spared", [{"pinned": True}, {"busy": True}, {"priority": 10}], ids=["pinned", "busy", "equal"]
)
def test_some_are_never_evicted(spared: dict[str, bool | int]) -> None:
    low = replace(Simulated((6,), priority=30), **spared)  # type: ignore[arg-type]
    at = world(WhenFull.EVICT, low=low, top=Simulated((6,), enabled=False))
    at.settle()
    at.models["top"].enabled = True
    assert at.settle() == {"low": Phase.READY, "top": Phase.DEFERRED}


def test_an_idle_and_less_important_model_makes_room_and_comes_back() -> None:
    at = world(WhenFull.EVICT, low=Simulated((6,), priority=30), top=Simulated((6,), enabled=False))
    at.settle()
    at.models["top"].enabled = True
    assert at.settle() == {"low": Phase.DEFERRED, "top": Phase.READY}
    at.models["top"].enabled = False
    assert at.settle() == {"low": Phase.READY, "top": Phase.DISABLED}


def test_a_stop_that_was_not_taken_is_asked_for_again() -> None:
    at = world(WhenFull.EVICT, low=Simulated((6,), priority=30), top=Simulated((6,), enabled=False))
    at.settle()
    at.models["top"].enabled, at.deaf = True, True
    assert at.settle()["top"] is Phase.PENDING
    assert at.seen.count("Stop low") > 1
    at.deaf = False
    assert at.settle() == {"low": Phase.DEFERRED, "top": Phase.READY}


def test_under_pressure_the_least_important_idle_model_goes() -> None:
    at = world(WhenFull.EVICT, total=100, low=Simulated((20,), priority=30), top=Simulated((20,)))
    at.settle()
    at.stranger = 60
    readings = (DeviceReading(DEVICE, 100, 0),)
    policy = Policy(reserve=Reserve(10), when_full=WhenFull.EVICT)
    decision = decide(at.states, at.look(), Now(at.at + 1, at.at), policy, readings)
    assert [action.name for action in decision.actions if isinstance(action, Stop)] == ["low"]


def test_a_refused_model_is_left_alone_until_it_is_enabled_again() -> None:
    at = world(WhenFull.REFUSE, a=Simulated((9,)))
    assert at.settle() == {"a": Phase.FAILED}
    assert "refused: needs" in at.states["a"].reason
    at.total = 16
    assert at.settle() == {"a": Phase.FAILED}
    at.states = {"a": replace(at.states["a"], is_refused=False, resume=True)}
    assert at.settle() == {"a": Phase.READY}


@pytest.mark.parametrize(("enabled", "phase"), [(True, Phase.PENDING), (False, Phase.DISABLED)])
def test_a_start_that_the_launcher_refused_is_no_failure(enabled: bool, phase: Phase) -> None:
    seen = Seen(
        "a", enabled, "by settings", ProcessState.EXITED, None, 5,
        ending=Ending(REFUSED_STATUS, "synapse-run: a does not fit: needs 9 MiB on CUDA0"),
    )  # fmt: skip
    decision = decide({}, [seen], Now(1000.0, 1000.0), Policy())
    state = decision.states["a"]
    assert state.phase is phase
    assert state.retries.failures == ()


SIMULATED = st.builds(
    Simulated,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(
        lambda sizes: tuple(sorted(sizes, reverse=True))
    ),
    priority=st.sampled_from([10, 20, 30]),
    pinned=st.booleans(),
    breaks=st.frozensets(st.integers(0, 3), max_size=2),
)
EVENTS = st.sampled_from(["more", "less", "enable", "disable", "busy", "idle", "blind", "crash"])


@settings(max_examples=150, deadline=None)
@given(
    when_full=st.sampled_from(WhenFull),
    models=st.lists(SIMULATED, min_size=1, max_size=5),
    events=st.lists(st.tuples(EVENTS, st.integers(0, 4)), max_size=12),
)
def test_whatever_happens_what_is_committed_fits_and_everybody_settles(
    when_full: WhenFull, models: Sequence[Simulated], events: Sequence[tuple[str, int]]
) -> None:
    """Committed memory never exceeds the device by our doing, nothing pinned or busy goes, and
    every model ends in a settled phase with a reason.
    """
    at = World({f"m{n}": replace(one) for n, one in enumerate(models)}, when_full, 12)
    for event, which in [*events, ("more", 0), ("idle", 0)]:
        one = list(at.models.values())[which % len(models)]
        match event:
            case "more" | "less":
                at.stranger = 0 if event == "more" else 5
            case "enable" | "disable":
                one.enabled = event == "enable"
            case "busy" | "idle":
                one.busy = event == "busy"
            case "blind":
                at.readable = not at.readable
            case "crash":
                if one.pid:
                    one.pid, one.state, one.ending = 0, ProcessState.EXITED, Ending(-1, "")
        for _ in range(3):
            before = at.taken
            pinned = [m for m in at.models.values() if m.pid and m.enabled and m.pinned]
            at.turn()
            assert at.taken <= max(at.total - at.stranger, before)
            assert at.taken <= at.total
            assert when_full is WhenFull.DEGRADE or all(m.pid for m in pinned)
    at.readable = True
    for one in at.models.values():
        one.busy = False
    at.settle(40)
    under_way = {Phase.LOADING, Phase.VERIFYING, Phase.STOPPING, Phase.DRAINING}
    assert not under_way.intersection(at.phases.values())
    assert all(state.reason for state in at.states.values())
