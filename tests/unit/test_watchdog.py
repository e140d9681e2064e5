"""The watchdog inside supervisord: kills a listener that is frozen or deaf, and no other."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from supervisor.dispatchers import EventListenerStates
from supervisor.states import ProcessStates

from supervisor_synapse.plugin.watchdog import Watchdog

TICK_SECONDS = 5.0


@dataclass
class Clock:
    """What the watchdog takes for the time."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Process:
    """A listener as supervisord has it."""

    pid: int = 100
    state: int = ProcessStates.RUNNING
    listener_state: int = EventListenerStates.READY
    signals: list[int] = field(default_factory=list)

    def get_state(self) -> int:
        return self.state

    def signal(self, number: int) -> None:
        self.signals.append(number)


@dataclass
class Group:
    processes: dict[str, Any]


@dataclass
class Logger:
    lines: list[str] = field(default_factory=list)

    def warn(self, line: str) -> None:
        self.lines.append(line)

    critical = warn


@dataclass
class Options:
    logger: Logger = field(default_factory=Logger)


@dataclass
class Supervisord:
    process_groups: dict[str, Any]
    options: Options = field(default_factory=Options)


class Scene:
    """One supervisord that ticks every 5 s, and its listener."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.process = Process()
        self.supervisord = Supervisord({"synapse": Group({"synapse": self.process})})
        self.watchdog = Watchdog(self.supervisord, self.clock)

    def tick(self, count: int = 1, *, beats: bool, after: float = TICK_SECONDS) -> Scene:
        for _ in range(count):
            self.clock.now += after - 1.0
            if beats:
                self.watchdog.hear()
            self.clock.now += 1.0
            self.watchdog.on_tick(object())
        return self

    @property
    def is_killed(self) -> bool:
        return signal.SIGKILL in self.process.signals

    @property
    def log(self) -> list[str]:
        return self.supervisord.options.logger.lines


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_listener_that_beats_is_left_alone(scene: Scene) -> None:
    scene.tick(1000, beats=True)
    assert not scene.process.signals
    assert not scene.log


def test_a_silent_listener_is_killed_within_two_ticks_and_the_log_says_so(scene: Scene) -> None:
    """By a signal and not by a stop, after which it would stay stopped."""
    scene.tick(3, beats=True).tick(2, beats=False)
    assert set(scene.process.signals) == {signal.SIGKILL}
    assert "silent" in scene.log[0]


def test_a_listener_whose_stdout_was_polluted_is_killed_though_it_beats(scene: Scene) -> None:
    """supervisord will never speak to it again, and still calls it RUNNING."""
    scene.tick(3, beats=True)
    scene.process.listener_state = EventListenerStates.UNKNOWN
    scene.tick(1, beats=True)
    assert scene.is_killed
    assert "stdout" in scene.log[0]


def test_a_listener_that_was_just_started_gets_its_time(scene: Scene) -> None:
    """Whatever the one before it left unheard."""
    scene.tick(2, beats=True).tick(1, beats=False)
    scene.process.pid = 101
    scene.process.signals.clear()
    scene.tick(1, beats=False)
    assert not scene.is_killed
    scene.tick(20, beats=True)
    assert not scene.is_killed


def test_a_new_listener_that_never_speaks_is_killed_too(scene: Scene) -> None:
    scene.tick(2, beats=True)
    scene.process.pid = 101
    scene.tick(4, beats=False)
    assert scene.is_killed


@pytest.mark.parametrize("away", [11.0, 60.0, 36000.0])
def test_a_supervisord_that_was_held_up_does_not_blame_the_listener(
    scene: Scene, away: float
) -> None:
    """A suspended machine, or a frozen supervisord: beats could not be heard."""
    scene.tick(3, beats=True).tick(1, beats=False, after=away)
    assert not scene.is_killed
    scene.tick(10, beats=True)
    assert not scene.is_killed
    scene.tick(2, beats=False)
    assert scene.is_killed


@pytest.mark.parametrize(
    "state",
    [
        ProcessStates.STOPPED, ProcessStates.STARTING, ProcessStates.STOPPING,
        ProcessStates.EXITED, ProcessStates.FATAL, ProcessStates.BACKOFF, ProcessStates.UNKNOWN,
    ],
)  # fmt: skip
def test_a_listener_that_does_not_run_is_not_signalled(scene: Scene, state: int) -> None:
    """Stopped by hand, it stays stopped."""
    scene.process.state = state
    scene.tick(10, beats=False)
    assert not scene.process.signals


def test_without_a_listener_there_is_nothing_to_do(scene: Scene) -> None:
    scene.supervisord.process_groups.clear()
    scene.tick(5, beats=False)
    assert not scene.log


def _broken_state() -> int:
    raise RuntimeError("broken")


def _refused_signal(number: int) -> None:
    raise OSError("no such process")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda scene: setattr(scene.process, "get_state", _broken_state),
        lambda scene: setattr(scene.process, "signal", _refused_signal),
        lambda scene: scene.supervisord.process_groups.update(synapse=None),
        lambda scene: setattr(scene.supervisord, "process_groups", 7),
    ],
    ids=["state", "signal", "no group", "no groups"],
)
def test_nothing_leaves_the_tick(scene: Scene, break_it: Callable[[Scene], object]) -> None:
    """supervisord's own loop is above it."""
    scene.tick(2, beats=True)
    break_it(scene)
    scene.tick(4, beats=False)


def test_each_new_listener_gets_twice_the_time_of_one_that_was_killed(scene: Scene) -> None:
    """On a machine out of breath, one that needs 30 s to its first word must get them."""
    scene.tick(2, beats=True)
    lived = []
    for pid in range(101, 106):
        scene.process.pid, begun = pid, scene.clock.now
        scene.process.signals.clear()
        for _ in range(30):
            if scene.is_killed:
                break
            scene.tick(1, beats=False)
        lived.append(scene.clock.now - begun)
    assert lived == sorted(lived)
    assert lived[0] <= 15.0
    assert lived[-1] >= 60.0
    scene.process.pid = 200
    scene.process.signals.clear()
    scene.tick(20, beats=True)  # all is well again, and so is the old patience
    scene.tick(2, beats=False)
    assert scene.is_killed
