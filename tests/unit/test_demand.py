"""Models that come when they are asked for: who makes room, who does not, and who goes again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor_synapse.core.demand import wanted
from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.settings import WhenFull
from supervisor_synapse.core.state import Policy
from tests.unit.test_act import Simulated, World


def world(**models: Simulated) -> World:
    return World(models, WhenFull.WAIT, total=8)


def ask(there: World, name: str, turns: int = 3, seconds: float = 1.5) -> None:
    """Somebody waits for a model for so many turns."""
    for _ in range(turns):
        there.states = wanted(there.states, name, there.at)
        there.turn(seconds)


def phases(there: World) -> dict[str, Phase]:
    return {name: state.phase for name, state in there.states.items()}


def settle(there: World, turns: int = 5) -> None:
    for _ in range(turns):
        there.turn()


def three_where_two_fit() -> World:
    there = world(a=Simulated((4,)), b=Simulated((4,)), c=Simulated((4,)))
    settle(there)
    assert phases(there) == {"a": Phase.READY, "b": Phase.READY, "c": Phase.DEFERRED}
    return there


def test_what_is_asked_for_takes_the_place_of_who_was_idle_longest() -> None:
    there = three_where_two_fit()
    there.models["a"].busy = True
    settle(there, 2)
    there.models["a"].busy = False  # used last
    settle(there, 1)
    ask(there, "c")
    assert phases(there) == {"a": Phase.READY, "b": Phase.DEFERRED, "c": Phase.READY}


def test_round_robin_each_is_answered_in_turn() -> None:
    there = three_where_two_fit()
    for name in ("c", "a", "b", "c", "a", "b"):
        ask(there, name)
        assert phases(there)[name] is Phase.READY


def test_who_was_served_does_not_take_the_place_back() -> None:
    there = world(a=Simulated((8,)), b=Simulated((8,)))
    settle(there)
    ask(there, "b")
    assert phases(there) == {"a": Phase.DEFERRED, "b": Phase.READY}
    ask(there, "a", turns=3, seconds=0.3)  # so soon that the word for `b` is fresh
    assert phases(there)["a"] is Phase.READY
    there.seen.clear()
    for _ in range(10):
        there.turn(0.3)
    assert there.seen == []
    assert phases(there) == {"a": Phase.READY, "b": Phase.DEFERRED}


def test_whoever_goes_away_evicts_nothing() -> None:
    there = three_where_two_fit()
    there.states = wanted(there.states, "c", there.at - 10)
    settle(there)
    assert phases(there)["c"] is Phase.DEFERRED
    assert "Stop a" not in there.seen
    assert "Stop b" not in there.seen


@pytest.mark.parametrize("change", [{"pinned": True}, {"busy": True}, {"priority": 1}])
def test_pinned_busy_and_more_important_models_stay(change: dict[str, object]) -> None:
    there = world(
        a=replace(Simulated((4,)), **change), b=replace(Simulated((4,)), **change),
        c=Simulated((4,), priority=20),
    )  # fmt: skip
    settle(there)
    ask(there, "c")
    assert phases(there) == {"a": Phase.READY, "b": Phase.READY, "c": Phase.DEFERRED}


def test_a_disabled_model_does_not_come_however_often_it_is_asked_for() -> None:
    there = world(a=Simulated((4,), enabled=False))
    settle(there)
    ask(there, "a")
    assert phases(there) == {"a": Phase.DISABLED}


def test_who_made_room_comes_back_by_itself_only_where_there_is_room() -> None:
    there = three_where_two_fit()
    ask(there, "c")
    settle(there, 10)
    assert sorted(phases(there).values(), key=str) == [Phase.DEFERRED, Phase.READY, Phase.READY]
    there.total = 12
    settle(there)
    assert set(phases(there).values()) == {Phase.READY}


# --- models that nobody uses ----------------------------------------------------------------------


def sleepy(**models: Simulated) -> World:
    there = world(**models)
    there.idle_stop_seconds = 10
    settle(there)
    return there


def test_what_nobody_uses_goes_and_comes_when_it_is_asked_for() -> None:
    there = sleepy(a=Simulated((4,)))
    settle(there, 10)
    assert phases(there) == {"a": Phase.DEFERRED}
    settle(there, 10)
    assert there.models["a"].pid == 0, "memory alone does not bring it back"
    ask(there, "a")
    assert phases(there) == {"a": Phase.READY}


def test_what_is_used_stays() -> None:
    there = sleepy(a=Simulated((4,), busy=True), b=Simulated((4,), pinned=True))
    settle(there, 20)
    assert phases(there) == {"a": Phase.READY, "b": Phase.READY}


def test_a_model_that_was_asked_for_is_idle_anew_after_it_came() -> None:
    there = sleepy(a=Simulated((4,)))
    settle(there, 10)
    ask(there, "a")
    settle(there, 3)
    assert phases(there) == {"a": Phase.READY}
    settle(there, 10)
    assert phases(there) == {"a": Phase.DEFERRED}


def test_a_dormant_model_that_is_disabled_stays_so() -> None:
    there = sleepy(a=Simulated((4,)))
    settle(there, 10)
    there.models["a"].enabled = False
    settle(there, 2)
    assert phases(there) == {"a": Phase.DISABLED}


def test_by_default_nothing_is_stopped_for_want_of_use() -> None:
    assert Policy().idle_stop_seconds == 0
    there = world(a=Simulated((4,)))
    settle(there, 1000)
    assert phases(there) == {"a": Phase.READY}
