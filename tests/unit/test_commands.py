"""Commands and swaps, played with a real disk against the simulated supervisord of test_decide.

What the listener would do in each turn is done here: advance, heed, look, decide, act, remember.
Between any two of these it may die, the disk may be full, or a look may fail.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as HypPhase
from hypothesis import strategies as st

from supervisor_synapse.adapters import intent, journal
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.supervisord import Request
from supervisor_synapse.commands import Answer, Commands
from supervisor_synapse.core.model import Phase, Program
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.state import Action, Start
from supervisor_synapse.core.swap import Step, Swap
from supervisor_synapse.errors import ConfigError
from tests.unit.builders import program
from tests.unit.test_decide import CORRUPT, QUICK, World

AT_REST = (Phase.STOPPED, Phase.DISABLED, Phase.FAILED)
SERVING = (Phase.READY, Phase.LOADING, Phase.UNHEALTHY, Phase.DRAINING, Phase.STOPPING)
SETTLES_WITHIN_SECONDS = 400.0


@dataclass(slots=True)
class Line:
    """What a client sees of its command."""

    request: Request
    answers: list[Answer] = field(default_factory=list)

    @property
    def answer(self) -> Answer:
        assert self.answers, f"{self.request} was not answered"
        return self.answers[0]


class Fleet:
    """A listener's commands on disk, the world they act on, and the clients that wait."""

    def __init__(self, folder: Path, *names: str, enabled: str = "a", fits: bool = True) -> None:
        self.deployment = Deployment(folder)
        self.deployment.lib.mkdir(parents=True, exist_ok=True)
        self.world = World(*(names or ("a", "b")), policy=QUICK)
        self.programs: dict[str, Program] = {
            name: program(name=name, enabled=name in enabled, reason="chosen by settings")
            for name in self.world.models
        }
        self.fits: Callable[[Program], bool] = lambda meant: fits
        self.lines: list[Line] = []
        self.both_ran = False
        self._posted = 0
        self._saved = self.world.states
        self.commands = self._new_listener()

    # --- what others do ---------------------------------------------------------------------------

    def ask(self, verb: str, model: str, other: str = "") -> Line:
        self._posted += 1
        line = Line(Request(f"e-{self._posted}", verb, model, other))
        self.lines.append(line)
        return line

    def swap(self, old: str = "a", new: str = "b") -> Line:
        return self.ask("swap", old, new)

    def crash(self, *, with_state: bool = True) -> None:
        """The listener dies now; what it did not write down is lost."""
        self.world.states = self._saved if with_state else {}
        self.world.restart_listener(with_state=with_state)
        self.commands = self._new_listener()

    def restart_supervisord(self) -> None:
        """All processes end with it, all programs are fresh, and clients have lost theirs."""
        for name in list(self.world.models):
            self.world.die(name)
            self.world.replace_program(name)
        self.lines = [line for line in self.lines if line.answers]
        self.crash()

    def _new_listener(self) -> Commands:
        """One that can read what it may not be able to write."""
        blocked = [path for path in self._files() if path.is_dir()]
        for path in blocked:
            self.unblock(path)
        commands = Commands(self.deployment, lambda meant: self.fits(meant), self.roll_back)
        for path in blocked:
            self.block(path)
        self.world.states = commands.take_up(self.world.states)
        return commands

    def roll_back(self, name: str, to: int, command: str) -> str:
        """As if the former block stood already."""
        return f"{name}: back to {to} for {command}"

    @contextlib.contextmanager
    def unwritable(self, *paths: Path) -> Iterator[None]:
        """These files cannot be replaced, whatever else can."""
        for path in paths:
            self.block(path)
        try:
            yield
        finally:
            for path in paths:
                self.unblock(path)

    def _files(self) -> tuple[Path, ...]:
        return (self.deployment.journal, self.deployment.intent)

    def mend(self) -> None:
        for path in self._files():
            self.unblock(path)

    def block(self, path: Path) -> None:
        """A folder stands where the file would go."""
        kept = path.with_suffix(".kept")
        if not path.is_dir():
            if path.exists():
                path.rename(kept)
            (path / "x").mkdir(parents=True)

    def unblock(self, path: Path) -> None:
        kept = path.with_suffix(".kept")
        if path.is_dir():
            (path / "x").rmdir()
            path.rmdir()
            if kept.exists():
                kept.rename(path)

    # --- time -------------------------------------------------------------------------------------

    def hear(self) -> None:
        """The first half of a turn: swaps go on, and what waits is heeded in its order."""
        try:
            self.world.states, answers = self.commands.advance(self.world.states, self.programs)
        except OSError:
            answers = []
        for answer in answers:
            self._give(answer)
        for line in [line for line in self.lines if not line.answers]:
            self.world.states, said = self.commands.heed(
                line.request, self.world.states, self.programs
            )
            if said is not None:
                self._give(said)

    def _give(self, answer: Answer) -> None:
        for line in self.lines:
            if line.request.id == answer.command:
                line.answers.append(answer)

    def tick(self, seconds: float = 0.25) -> None:
        """A whole turn."""
        self.hear()
        for name, meant in self.programs.items():
            wanted = self.commands.wanted(meant)
            self.world[name].enabled, self.world[name].why = wanted.enabled, wanted.why
        self.world.tick(seconds)
        self._saved = self.world.states
        self.both_ran = self.both_ran or all(one.is_alive for one in self.world.models.values())

    def run(self, seconds: float, step: float = 0.25) -> Fleet:
        end = self.world.monotonic + seconds
        while self.world.monotonic < end:
            self.tick(step)
        return self

    def run_until(self, condition: Callable[[], object], within: float = 120.0) -> Fleet:
        end = self.world.monotonic + within
        while not condition():
            assert self.world.monotonic < end, f"not within {within} s: {self.told()}"
            self.tick()
        return self

    def up(self, *names: str) -> Fleet:
        """Bring up what is enabled, and by hand what is named."""
        self.tick()
        for name in names:
            self.world.begin(name)
        wanted = [*names, *(name for name, meant in self.programs.items() if meant.enabled)]
        return self.run_until(lambda: all(self.phase(name) is Phase.READY for name in wanted))

    def at_step(self, step: Step) -> Fleet:
        """Until the journal says so."""
        return self.run_until(lambda: [one.step for one in self.under_way()] == [step])

    def over(self, line: Line) -> Answer:
        self.run_until(lambda: line.answers)
        return line.answer

    # --- what is ----------------------------------------------------------------------------------

    def phase(self, name: str) -> Phase:
        return self.world.states[name].phase

    def under_way(self) -> tuple[Swap, ...]:
        return journal.load(self.deployment.journal)

    def intent(self) -> dict[str, bool]:
        return intent.load(self.deployment.intent)

    def told(self) -> object:
        return self.world.phases(), self.under_way(), self.lines

    def starts(self, name: str) -> int:
        return len(self.world[name].ran)

    def assert_serves(self, *names: str) -> None:
        """These serve, the others have no process, nothing is under way; and it stays so."""
        for name in self.world.models:
            rests = self.phase(name) in AT_REST and not self.world[name].is_alive
            assert self.phase(name) is Phase.READY if name in names else rests, self.told()
        assert self.under_way() == ()
        quiet = len(self.world.transitions)
        self.run(90.0, step=3.0)
        assert len(self.world.transitions) == quiet, "it was no rest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# --- a swap that goes well ------------------------------------------------------------------------


def test_where_both_fit_there_is_no_moment_without_a_server(folder: Path) -> None:
    fleet = Fleet(folder).up()
    fleet.world["b"].loads_seconds = 5.0
    line = fleet.swap()
    while not line.answers:
        fleet.tick()
        assert Phase.READY in (fleet.phase("a"), fleet.phase("b"))
    assert line.answer == Answer("e-1", True, "b serves, a is stopped")
    fleet.assert_serves("b")


def test_where_both_do_not_fit_the_old_one_is_verified_stopped_before_the_new_one_starts(
    folder: Path,
) -> None:
    fleet = Fleet(folder, fits=False).up()
    fleet.world["a"].verify_seconds = 3.0
    line = fleet.swap()
    assert fleet.over(line).ok
    assert not fleet.both_ran
    started, ended = fleet.world["b"].ran[0], fleet.world["a"].ended_at
    assert started - ended >= 3.0
    fleet.assert_serves("b")


def test_the_answer_comes_only_when_all_is_done(folder: Path) -> None:
    fleet = Fleet(folder).up()
    fleet.world["a"].drain_seconds, fleet.world["a"].verify_seconds = 20.0, 5.0
    line = fleet.swap()
    fleet.at_step(Step.OLD_LEAVES).run(20.0)
    assert not line.answers
    assert fleet.over(line).ok
    fleet.assert_serves("b")


def test_what_a_swap_reached_holds_after_a_restart_of_everything(folder: Path) -> None:
    fleet = Fleet(folder).up()
    assert fleet.over(fleet.swap()).ok
    fleet.restart_supervisord()
    fleet.run(20.0).assert_serves("b")


def test_whoever_is_asked_why_says_that_it_is_being_swapped(folder: Path) -> None:
    fleet = Fleet(folder, fits=False).up()
    fleet.swap()
    fleet.tick()
    assert fleet.commands.wanted(fleet.programs["a"]).why == "is being swapped with b"
    assert fleet.commands.wanted(fleet.programs["b"]).why == "is being swapped with a"


def test_what_cannot_be_measured_is_taken_not_to_fit(folder: Path) -> None:
    """An engine that is broken breaks no command, and no turn."""
    fleet = Fleet(folder).up()

    def cannot(meant: Program) -> bool:
        raise ConfigError("cannot find llama-server")

    fleet.fits = cannot
    assert fleet.over(fleet.swap()).ok
    assert not fleet.both_ran


# --- a new one that does not become ready ---------------------------------------------------------


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("log", [CORRUPT, "it broke"])
def test_a_new_one_that_does_not_become_ready_brings_the_old_one_back(
    folder: Path, fits: bool, log: str
) -> None:
    fleet = Fleet(folder, fits=fits).up()
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, log
    said = fleet.over(fleet.swap())
    assert not said.ok
    assert "b did not become ready" in said.message
    fleet.assert_serves("a")
    assert fleet.both_ran == fits
    assert fleet.starts("a") == (1 if fits else 2)
    assert fleet.intent() == {}


def test_a_new_one_that_hangs_is_stopped_and_verified_before_the_old_one_comes_back(
    folder: Path,
) -> None:
    """It still holds the memory that the old one needs."""
    fleet = Fleet(folder, fits=False).up()
    fleet.world["b"].loads_seconds, fleet.world["b"].verify_seconds = 1e9, 3.0
    line = fleet.swap()
    fleet.run_until(lambda: fleet.world["b"].is_alive)
    fleet.world["b"].sick = Verdict.STUCK
    said = fleet.over(line)
    assert not said.ok
    assert said.message.endswith("; a is back")
    assert not fleet.both_ran
    assert fleet.world["a"].ran[-1] - fleet.world["b"].ended_at >= 3.0
    fleet.assert_serves("a")


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("enabled", ["a", "ab"])
def test_a_new_one_that_is_stopped_by_hand_midway_stays_stopped(
    folder: Path, fits: bool, enabled: str
) -> None:
    """Also where settings had chosen it: it is not started again beside the old one."""
    fleet = Fleet(folder, enabled=enabled, fits=fits).up()
    if enabled == "ab":
        fleet.world.stop("b")
        fleet.run(5.0)
    fleet.world["b"].loads_seconds = 30.0
    line = fleet.swap()
    ran = fleet.starts("b")
    fleet.run_until(lambda: fleet.starts("b") > ran).run(2.0)
    fleet.world.stop("b")
    said = fleet.over(line)
    assert not said.ok
    assert "b did not become ready (stopped by hand)" in said.message
    fleet.assert_serves("a")


def test_a_new_one_that_failed_is_not_tried_again_beside_the_old_one(folder: Path) -> None:
    """Settings had chosen both, and memory holds one."""
    fleet = Fleet(folder, enabled="ab", fits=False)
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.1, CORRUPT
    fleet.tick()
    fleet.run(20.0)
    assert (fleet.phase("a"), fleet.phase("b")) == (Phase.READY, Phase.FAILED)
    fleet.world["b"].dies_after = 0.5
    fleet.world["b"].log = "it broke"
    assert not fleet.over(fleet.swap()).ok
    fleet.world["b"].dies_after = None
    fleet.assert_serves("a")


def test_where_the_new_one_dies_while_the_old_one_drains_the_old_one_comes_back(
    folder: Path,
) -> None:
    """Nobody is told that a model serves which does not."""
    fleet = Fleet(folder).up()
    fleet.world["a"].drain_seconds = 10.0
    line = fleet.swap()
    fleet.at_step(Step.OLD_LEAVES)
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.1, CORRUPT
    said = fleet.over(line)
    assert not said.ok
    fleet.assert_serves("a")


def test_where_neither_comes_up_both_reasons_are_told(folder: Path) -> None:
    fleet = Fleet(folder, fits=False).up()
    for name in "ab":
        fleet.world[name].dies_after, fleet.world[name].log = 0.2, CORRUPT
    said = fleet.over(fleet.swap())
    assert not said.ok
    assert said.message.count("did not become ready (model-corrupt") == 2
    fleet.assert_serves()


def test_an_old_one_that_is_stopped_by_hand_while_it_comes_back_ends_the_swap(folder: Path) -> None:
    fleet = Fleet(folder, fits=False).up()
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
    fleet.world["a"].loads_seconds = 30.0
    line = fleet.swap()
    fleet.at_step(Step.OLD_RETURNS)
    fleet.run_until(lambda: fleet.world["a"].is_alive).run(1.0)
    fleet.world.stop("a")
    said = fleet.over(line)
    assert "a did not become ready (stopped by hand)" in said.message
    fleet.assert_serves()


def test_an_old_one_that_is_stopped_by_hand_before_stays_stopped_when_the_new_one_fails(
    folder: Path,
) -> None:
    fleet = Fleet(folder).up()
    fleet.world["b"].loads_seconds = 30.0
    line = fleet.swap()
    fleet.run(3.0)
    fleet.world.stop("a")
    fleet.run(3.0)
    fleet.world.die("b", 1, CORRUPT)
    assert not fleet.over(line).ok
    fleet.assert_serves()
    assert fleet.starts("a") == 1


# --- models in any phase --------------------------------------------------------------------------


def test_a_swap_with_itself_changes_nothing(folder: Path) -> None:
    fleet = Fleet(folder).up()
    said = fleet.over(fleet.swap("a", "a"))
    assert not said.ok
    fleet.assert_serves("a")
    assert fleet.intent() == {}


@pytest.mark.parametrize(("old", "new"), [("nobody", "b"), ("a", "nobody"), ("a", "")])
def test_a_swap_with_a_model_that_there_is_none_of_changes_nothing(
    folder: Path, old: str, new: str
) -> None:
    fleet = Fleet(folder).up()
    said = fleet.over(fleet.swap(old, new))
    assert not said.ok
    fleet.assert_serves("a")


@pytest.mark.parametrize("fits", [True, False])
def test_where_the_old_one_does_not_run_the_new_one_is_only_started(
    folder: Path, fits: bool
) -> None:
    fleet = Fleet(folder, enabled="", fits=fits)
    fleet.tick()
    assert fleet.over(fleet.swap()).ok
    fleet.assert_serves("b")
    assert fleet.starts("a") == 0


@pytest.mark.parametrize("fits", [True, False])
def test_an_old_one_that_did_not_run_is_not_brought_back(folder: Path, fits: bool) -> None:
    """Neither one that is disabled, nor one that had crashed, by hand, before."""
    fleet = Fleet(folder, enabled="", fits=fits)
    fleet.tick()
    fleet.world.begin("a")
    fleet.tick()
    fleet.world.die("a", 1, CORRUPT)
    fleet.run(5.0)
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
    assert not fleet.over(fleet.swap()).ok
    assert fleet.starts("a") == 1
    fleet.run(60.0)
    assert not fleet.world["a"].is_alive
    assert not fleet.world["b"].is_alive


def test_a_new_one_that_had_failed_is_tried_once_more(folder: Path) -> None:
    fleet = Fleet(folder, enabled="ab")
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.1, CORRUPT
    fleet.tick()
    fleet.run(20.0)
    assert fleet.phase("b") is Phase.FAILED
    fleet.world["b"].dies_after = None
    assert fleet.over(fleet.swap()).ok
    fleet.assert_serves("b")


def test_a_new_one_that_crashed_while_it_drained_is_given_its_chance(folder: Path) -> None:
    fleet = Fleet(folder, enabled="ab").up()
    fleet.world["b"].busy = True
    fleet.ask("drain", "b")
    fleet.run(2.0)
    fleet.world.die("b", 1, CORRUPT)
    fleet.world["b"].busy = False
    fleet.run(5.0)
    assert fleet.over(fleet.swap()).ok
    fleet.assert_serves("b")


def test_a_new_one_that_runs_already_goes_on_and_the_old_one_leaves(folder: Path) -> None:
    fleet = Fleet(folder, enabled="ab", fits=False).up()
    assert fleet.over(fleet.swap()).ok
    fleet.assert_serves("b")
    assert fleet.starts("b") == 1


@pytest.mark.parametrize("fits", [True, False])
def test_an_old_one_that_is_on_its_way_out_is_not_started_again(folder: Path, fits: bool) -> None:
    fleet = Fleet(folder, fits=fits).up()
    fleet.world["a"].drain_seconds = 5.0
    fleet.world.stop("a")
    fleet.run(1.0)
    fleet.world["b"].loads_seconds = 10.0
    assert fleet.over(fleet.swap()).ok
    assert fleet.starts("a") == 1
    fleet.assert_serves("b")


@pytest.mark.parametrize("fits", [True, False])
def test_an_old_one_that_was_stopped_by_hand_stays_so_whatever_becomes_of_the_swap(
    folder: Path, fits: bool
) -> None:
    fleet = Fleet(folder, fits=fits).up()
    fleet.world.stop("a")
    fleet.run(5.0)
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
    assert not fleet.over(fleet.swap()).ok
    fleet.run(30.0)
    assert (fleet.phase("a"), fleet.starts("a")) == (Phase.STOPPED, 1)


def test_an_old_one_that_drains_serves_until_the_new_one_is_ready(folder: Path) -> None:
    fleet = Fleet(folder).up()
    fleet.world["a"].busy = True
    fleet.ask("drain", "a")
    fleet.run(1.0)
    line = fleet.swap()
    while fleet.phase("b") is not Phase.READY:
        fleet.tick()
        assert fleet.world["a"].is_alive
    assert fleet.over(line).ok
    fleet.assert_serves("b")


def test_a_new_one_that_drains_comes_back(folder: Path) -> None:
    """The newer word wins."""
    fleet = Fleet(folder, enabled="ab").up()
    fleet.world["b"].drain_seconds = 5.0
    fleet.ask("drain", "b")
    fleet.run(1.0)
    assert fleet.over(fleet.swap()).ok
    fleet.assert_serves("b")


def test_an_old_one_that_was_started_by_hand_is_by_hand_again_after_a_failed_swap(
    folder: Path,
) -> None:
    fleet = Fleet(folder, enabled="", fits=False).up("a")
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
    assert not fleet.over(fleet.swap()).ok
    fleet.assert_serves("a")


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_start_by_hand_of_what_has_to_leave_does_not_hold_up_the_swap(
    folder: Path, name: str
) -> None:
    """While a swap is under way it has the word; else it would never end."""
    fleet = Fleet(folder, fits=False).up()
    if name == "b":
        fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
        fleet.world["a"].loads_seconds = 20.0
    else:
        fleet.world["b"].loads_seconds = 20.0
    line = fleet.swap()
    fleet.at_step(Step.NEW_ALONE if name == "a" else Step.OLD_RETURNS).run(3.0)
    fleet.world["b"].dies_after = None
    fleet.world.begin(name)
    fleet.over(line)
    fleet.assert_serves("b" if name == "a" else "a")


# --- several commands at once ---------------------------------------------------------------------


def test_commands_about_a_model_that_is_being_swapped_wait_and_the_last_has_the_last_word(
    folder: Path,
) -> None:
    fleet = Fleet(folder).up()
    lines = [fleet.swap(), fleet.ask("disable", "b"), fleet.ask("enable", "a")]
    fleet.tick()
    assert [bool(line.answers) for line in lines] == [False, False, False]
    fleet.run_until(lambda: all(line.answers for line in lines)).run(20.0)
    assert all(line.answer.ok for line in lines)
    fleet.assert_serves("a")


def test_a_command_does_not_overtake_one_that_waits(folder: Path) -> None:
    """`disable c` was asked after the swap to c, which waits for another swap."""
    fleet = Fleet(folder, "a", "b", "c").up()
    lines = [fleet.swap("a", "b"), fleet.swap("b", "c"), fleet.ask("disable", "c")]
    fleet.run_until(lambda: all(line.answers for line in lines)).run(20.0)
    assert [line.answer.ok for line in lines] == [True, True, True]
    fleet.assert_serves()


def test_a_command_about_another_model_does_not_wait(folder: Path) -> None:
    fleet = Fleet(folder, "a", "b", "c").up()
    fleet.world["b"].loads_seconds = 60.0
    fleet.swap("a", "b")
    line = fleet.ask("enable", "c")
    fleet.tick()
    assert line.answer.ok
    fleet.run_until(lambda: fleet.phase("c") is Phase.READY, 10.0)


def test_two_swaps_of_the_same_models_follow_each_other(folder: Path) -> None:
    fleet = Fleet(folder).up()
    first, second = fleet.swap("a", "b"), fleet.swap("b", "a")
    assert fleet.over(second).ok
    assert first.answer.ok
    fleet.assert_serves("a")


def test_two_swaps_of_different_models_go_on_together(folder: Path) -> None:
    fleet = Fleet(folder, "a", "b", "c", "d", enabled="ac").up()
    lines = [fleet.swap("a", "b"), fleet.swap("c", "d")]
    fleet.tick()
    assert len(fleet.under_way()) == 2
    fleet.run_until(lambda: all(line.answers for line in lines))
    fleet.assert_serves("b", "d")


def test_a_swap_whose_answer_got_lost_is_not_done_again(folder: Path) -> None:
    """The client asks as long as it has no answer, and gets the one that there was."""
    fleet = Fleet(folder).up()
    fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
    line = fleet.swap()
    said = fleet.over(line)
    line.answers.clear()
    assert fleet.over(line) == said
    assert fleet.starts("b") == 1


@pytest.mark.parametrize("verb", ["enable", "disable"])
def test_a_command_is_answered_when_it_is_written_down(folder: Path, verb: str) -> None:
    fleet = Fleet(folder).up()
    line = fleet.ask(verb, "b")
    fleet.hear()
    assert line.answer == Answer("e-1", True, f"b: {verb}d")
    assert fleet.intent() == {"b": verb == "enable"}


def test_drain_says_what_happens_and_what_does_not_run_cannot_be_drained(folder: Path) -> None:
    fleet = Fleet(folder).up()
    doom(fleet, "b")
    fleet.ask("enable", "b")
    fleet.run_until(lambda: fleet.phase("b") is Phase.FAILED)
    line, other = fleet.ask("drain", "a"), fleet.ask("drain", "b")
    fleet.hear()
    assert line.answer == Answer("e-2", True, "a: stops when it is idle")
    assert other.answer == Answer("e-3", False, "b: does not run")
    fleet.run(10.0)
    assert fleet.phase("a") is Phase.STOPPED


def test_a_model_that_is_stopped_and_stays_so_needs_no_drain(folder: Path) -> None:
    """Whoever asks again after the first drain is over has what was wanted."""
    fleet = Fleet(folder).up()
    fleet.over(fleet.ask("drain", "a"))
    fleet.run_until(lambda: fleet.phase("a") is Phase.STOPPED)
    again, never = fleet.ask("drain", "a"), fleet.ask("drain", "b")
    fleet.hear()
    assert again.answer == Answer("e-2", True, "a: is stopped already")
    assert never.answer == Answer("e-3", True, "b: is stopped already")
    fleet.assert_serves()


def test_a_model_that_is_about_to_start_cannot_be_drained(folder: Path) -> None:
    fleet = Fleet(folder).up()
    fleet.ask("enable", "b")
    line = fleet.ask("drain", "b")
    fleet.hear()
    assert line.answer == Answer("e-2", False, "b: does not run")
    fleet.run(10.0).assert_serves("a", "b")


@pytest.mark.parametrize("fits", [True, False])
def test_a_swap_asked_for_again_when_it_is_done_changes_nothing(folder: Path, fits: bool) -> None:
    fleet = Fleet(folder, fits=fits).up()
    first, again = fleet.over(fleet.swap()), fleet.over(fleet.swap())
    assert (again.ok, again.message) == (first.ok, first.message)
    assert fleet.starts("b") == 1
    fleet.assert_serves("b")


@pytest.mark.parametrize("verb", ["enable", "disable"])
def test_a_command_asked_for_again_says_the_same_and_changes_nothing(
    folder: Path, verb: str
) -> None:
    fleet = Fleet(folder).up()
    said = {fleet.over(fleet.ask(verb, "a")).message for _ in range(2)}
    assert said == {f"a: {verb}d"}
    fleet.run(10.0)
    assert fleet.starts("a") == 1


def test_a_drain_of_a_model_that_stops_takes_back_an_earlier_enable(folder: Path) -> None:
    fleet = Fleet(folder).up()
    fleet.world["a"].drain_seconds = 5.0
    fleet.world.stop("a")
    fleet.tick()
    lines = [fleet.ask("enable", "a"), fleet.ask("drain", "a")]
    fleet.run(10.0)
    assert [line.answer.ok for line in lines] == [True, True]
    fleet.assert_serves()


def test_an_unknown_verb_is_refused(folder: Path) -> None:
    fleet = Fleet(folder).up()
    assert not fleet.over(fleet.ask("explode", "a")).ok
    fleet.assert_serves("a")


# --- the disk -------------------------------------------------------------------------------------


def test_a_swap_that_cannot_be_written_down_is_refused_and_changes_nothing(folder: Path) -> None:
    fleet = Fleet(folder).up()
    with fleet.unwritable(fleet.deployment.journal):
        said = fleet.over(fleet.swap())
    assert not said.ok
    assert "cannot write it down" in said.message
    fleet.assert_serves("a")


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("what", ["journal", "intent", "both"])
@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_disk_that_is_full_from_some_step_on_only_delays_a_swap(
    folder: Path, fits: bool, what: str, dies: bool, fails: bool
) -> None:
    """From each step in turn; with a listener that dies between the write that came and the next.

    Never do both run where both do not fit.
    """
    steps = [Step.NEW_FIRST, Step.OLD_LEAVES] if fits else [Step.OLD_LEAVES, Step.NEW_ALONE]
    if fails:
        steps = [steps[0], Step.NEW_LEAVES, *([] if fits else [Step.OLD_RETURNS])]
    for step in steps:
        with tempfile.TemporaryDirectory() as name:
            fleet = Fleet(Path(name), fits=fits).up()
            if fails:
                fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
                fleet.world["b"].verify_seconds = 1.0
            line = fleet.swap()
            fleet.at_step(step)
            lib = fleet.deployment
            paths = {"journal": [lib.journal], "intent": [lib.intent]}
            with fleet.unwritable(*paths.get(what, [lib.journal, lib.intent])):
                fleet.run(30.0)
            if dies:
                fleet.crash()
            said = fleet.over(line)
            assert fits or not fleet.both_ran
            assert said.ok != fails
            fleet.assert_serves("a" if fails else "b")


def test_two_swaps_that_end_on_a_full_disk_are_both_answered_when_it_is_mended(
    folder: Path,
) -> None:
    fleet = Fleet(folder, "a", "b", "c", "d", enabled="ac").up()
    lines = [fleet.swap("a", "b"), fleet.swap("c", "d")]
    fleet.run_until(lambda: [one.step for one in fleet.under_way()] == [Step.OLD_LEAVES] * 2)
    with fleet.unwritable(fleet.deployment.journal):
        fleet.run(10.0)
    fleet.run_until(lambda: all(line.answers for line in lines), 5.0)
    assert all(line.answer.ok for line in lines)
    fleet.assert_serves("b", "d")


@pytest.mark.parametrize("verb", ["enable", "disable"])
def test_a_command_that_cannot_be_written_down_is_refused(folder: Path, verb: str) -> None:
    fleet = Fleet(folder).up()
    with fleet.unwritable(fleet.deployment.intent):
        said = fleet.over(fleet.ask(verb, "a" if verb == "disable" else "b"))
        fleet.run(5.0)
    assert not said.ok
    fleet.assert_serves("a")


def test_a_registry_that_cannot_be_read_ends_no_swap_and_forgets_no_command(folder: Path) -> None:
    """Then nothing is known of any model."""
    fleet = Fleet(folder, "a", "b", "c").up()
    fleet.over(fleet.ask("enable", "c"))
    line = fleet.swap()
    fleet.at_step(Step.OLD_LEAVES)
    programs, fleet.programs = fleet.programs, {}
    for _ in range(3):
        fleet.hear()
    fleet.programs = programs
    assert fleet.over(line).ok
    assert fleet.intent() == {"a": False, "b": True, "c": True}


# --- whoever dies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_listener_that_dies_in_any_turn_is_carried_on_with(
    folder: Path, fits: bool, with_state: bool, fails: bool
) -> None:
    """Before and after it has heard what was asked; its successor has its state, or has none."""
    for turn in range(28):
        with tempfile.TemporaryDirectory() as name:
            fleet = Fleet(Path(name), fits=fits).up()
            if fails:
                fleet.world["b"].dies_after, fleet.world["b"].log = 0.2, CORRUPT
            line = fleet.swap()
            for _ in range(turn // 2):
                fleet.tick()
            if turn % 2:
                fleet.hear()  # the journal is written, the state is not
            fleet.crash(with_state=with_state)
            said = fleet.over(line)
            fleet.run(5.0)
            assert said.ok != fails, (turn, said)
            assert fits or not fleet.both_ran
            fleet.assert_serves("a" if fails else "b")


@pytest.mark.parametrize("fits", [True, False])
def test_a_look_that_fails_in_any_turn_is_no_evidence_against_the_new_one(
    folder: Path, fits: bool
) -> None:
    """supervisord did not answer after a step was asked for: what was is not what is."""
    for turn in range(20):
        with tempfile.TemporaryDirectory() as name:
            fleet = Fleet(Path(name), fits=fits).up()
            line = fleet.swap()
            for _ in range(turn):
                fleet.tick()
            for _ in range(5):
                fleet.hear()
            assert fleet.over(line).ok, turn
            fleet.assert_serves("b")


@pytest.mark.parametrize("fits", [True, False])
def test_a_supervisord_that_is_restarted_in_any_turn_ends_with_one_of_the_two(
    folder: Path, fits: bool
) -> None:
    for turn in range(20):
        with tempfile.TemporaryDirectory() as name:
            fleet = Fleet(Path(name), fits=fits).up()
            fleet.swap()
            for _ in range(turn):
                fleet.tick()
            fleet.restart_supervisord()
            fleet.run(30.0)
            assert fits or not fleet.both_ran
            fleet.assert_serves("b" if fleet.intent() else "a")
            assert fleet.intent() or turn == 0


def test_a_model_that_was_stopped_by_hand_while_nobody_listened_stays_stopped(folder: Path) -> None:
    """A new listener that takes up the swap does not take that for a start that got lost."""
    fleet = Fleet(folder).up()
    fleet.world["b"].loads_seconds = 30.0
    line = fleet.swap()
    fleet.run(3.0)
    fleet.world.stop("b")
    fleet.world.pass_time(5.0)
    fleet.crash()
    said = fleet.over(line)
    assert "stopped by hand" in said.message
    fleet.assert_serves("a")


def test_a_torn_journal_leaves_what_held_before(folder: Path) -> None:
    fleet = Fleet(folder, fits=False).up()
    fleet.swap()
    fleet.at_step(Step.NEW_ALONE)
    fleet.deployment.journal.write_text("[{")
    fleet.lines.clear()
    fleet.crash()
    fleet.run(20.0).assert_serves("a")


# --- whatever happens -----------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Fleet], object]] = {
    "listener dies": lambda fleet: fleet.crash(),
    "listener dies, state lost": lambda fleet: fleet.crash(with_state=False),
    "listener dies after hearing": lambda fleet: (fleet.hear(), fleet.crash()),
    "look fails": lambda fleet: fleet.hear(),
    "supervisord restarts": lambda fleet: fleet.restart_supervisord(),
    "journal unwritable": lambda fleet: fleet.block(fleet.deployment.journal),
    "intent unwritable": lambda fleet: fleet.block(fleet.deployment.intent),
    "disk mended": lambda fleet: fleet.mend(),
    "old dies": lambda fleet: fleet.world.die("a"),
    "new dies": lambda fleet: fleet.world.die("b"),
    "old hangs": lambda fleet: setattr(fleet.world["a"], "sick", Verdict.WEDGED),
    "new hangs": lambda fleet: setattr(fleet.world["b"], "sick", Verdict.WEDGED),
    "new is broken": lambda fleet: doom(fleet, "b"),
    "new is slow": lambda fleet: setattr(fleet.world["b"], "loads_seconds", 8.0),
    "old drains long": lambda fleet: setattr(fleet.world["a"], "drain_seconds", 8.0),
    "slow to go": lambda fleet: [setattr(fleet.world[n], "verify_seconds", 2.0) for n in "ab"],
}
HANDS: dict[str, Callable[[Fleet], object]] = {
    "start a by hand": lambda fleet: fleet.world.begin("a"),
    "start b by hand": lambda fleet: fleet.world.begin("b"),
    "stop a by hand": lambda fleet: fleet.world.stop("a"),
    "stop b by hand": lambda fleet: fleet.world.stop("b"),
}
COMMANDS: dict[str, Callable[[Fleet], object]] = {
    "swap back": lambda fleet: fleet.swap("b", "a"),
    "swap": lambda fleet: fleet.swap("a", "b"),
    "enable a": lambda fleet: fleet.ask("enable", "a"),
    "disable a": lambda fleet: fleet.ask("disable", "a"),
    "enable b": lambda fleet: fleet.ask("enable", "b"),
    "disable b": lambda fleet: fleet.ask("disable", "b"),
    "drain a": lambda fleet: fleet.ask("drain", "a"),
    "drain b": lambda fleet: fleet.ask("drain", "b"),
}
PHASES = (HypPhase.reuse, HypPhase.generate)  # without shrinking, which takes minutes
PAUSES = st.sampled_from((0.0, 0.25, 1.0, 5.0))


def doom(fleet: Fleet, name: str) -> None:
    fleet.world[name].dies_after, fleet.world[name].log = 0.2, CORRUPT


def play(fleet: Fleet, history: list[tuple[str, float]]) -> None:
    events = FAULTS | HANDS | COMMANDS
    for event, seconds in history:
        events[event](fleet)
        if seconds:
            fleet.run(seconds)
    fleet.mend()


def settle(fleet: Fleet) -> None:
    """Everybody has an answer, nothing is under way, and every model is at the right rest."""
    fleet.tick()
    fleet.run_until(
        lambda: (
            not fleet.under_way()
            and all(line.answers for line in fleet.lines)
            and all(fleet.phase(name) in (Phase.READY, *AT_REST) for name in "ab")
        ),
        SETTLES_WITHIN_SECONDS,
    )


_quietly = settings(
    max_examples=50, deadline=None, phases=PHASES, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@_quietly
@given(
    history=st.lists(st.tuples(st.sampled_from(sorted(FAULTS)), PAUSES), max_size=12),
    fits=st.booleans(),
)
def test_whatever_fails_a_swap_ends_with_one_of_the_two(
    history: list[tuple[str, float]], fits: bool
) -> None:
    """The new one where it says so, else the old one; the other has no process."""
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(Path(name), fits=fits).up()
        line = fleet.swap()
        play(fleet, history)
        settle(fleet)
        fleet.run(QUICK.restart.cooldown_seconds * 2, step=1.0)  # an open breaker tries once more
        assert fits or not fleet.both_ran
        if line.answers and fleet.phase("b") is not Phase.FAILED:  # at a start after the swap
            fleet.assert_serves("b" if line.answer.ok else "a")
        serving = [one for one in "ab" if fleet.phase(one) is Phase.READY]
        failed = [one for one in "ab" if fleet.phase(one) is Phase.FAILED]
        assert len(serving) == 1 or (not serving and failed), fleet.told()
        assert sum(one.is_alive for one in fleet.world.models.values()) == len(serving)


@_quietly
@given(
    history=st.lists(
        st.tuples(st.sampled_from(sorted(FAULTS | HANDS | COMMANDS)), PAUSES), max_size=16
    ),
    fits=st.booleans(),
)
def test_whatever_is_asked_and_whatever_fails_everybody_gets_an_answer_and_all_settles(
    history: list[tuple[str, float]], fits: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(Path(name), fits=fits).up()
        fleet.swap()
        play(fleet, history)
        settle(fleet)
        assert all(len(line.answers) == 1 for line in fleet.lines)


@_quietly
@given(
    asked=st.lists(st.sampled_from(sorted(COMMANDS)), min_size=1, max_size=8),
    pauses=st.lists(PAUSES, min_size=8, max_size=8),
    fits=st.booleans(),
)
def test_whoever_asks_at_once_the_last_has_the_last_word(
    asked: list[str], pauses: list[float], fits: bool
) -> None:
    """Of each model what the last command that named it, and was not refused, asked for."""
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(Path(name), fits=fits).up()
        runs = {"a": True, "b": False}
        for event, seconds in zip(asked, pauses, strict=False):
            COMMANDS[event](fleet)
            if seconds:
                fleet.run(seconds)
        settle(fleet)
        for event, line in zip(asked, fleet.lines, strict=True):
            refused = {"drain a": "a: does not run", "drain b": "b: does not run"}.get(event)
            assert line.answer.ok or line.answer.message == refused
            runs |= _asks_for(event) if line.answer.ok else {}
        fleet.run(5.0)
        fleet.assert_serves(*(one for one in "ab" if runs[one]))


def _asks_for(event: str) -> dict[str, bool]:
    verb, _, model = event.partition(" ")
    if verb == "swap":
        return {"a": model == "back", "b": model != "back"}
    return {model: verb == "enable"}


def test_the_simulation_starts_nothing_by_itself(folder: Path) -> None:
    """Each run of a model was asked for by the listener: these tests would not see others."""
    fleet = Fleet(folder).up()
    fleet.over(fleet.swap())
    starts: list[Action] = [action for _, action in fleet.world.actions]
    asked = [action.name for action in starts if isinstance(action, Start)]
    assert {name: asked.count(name) for name in "ab"} == {n: fleet.starts(n) for n in "ab"}
