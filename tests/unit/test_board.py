"""What the plugin keeps: the newest of everything, and never more than is bounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from supervisor_synapse.plugin.board import Board


class Supervisord:
    """Held weakly by the watchdog, so the test holds it."""

    process_groups: dict[str, Any]

    def __init__(self) -> None:
        self.process_groups = {}
        self.options = SimpleNamespace()


HOST = Supervisord()


def line(model: str, when: float, **more: object) -> dict[str, object]:
    return {"when": when, "model": model, "from": "loading", "to": "ready", **more}


def test_the_history_of_all_stands_in_the_order_of_time() -> None:
    board = Board(HOST)
    board.record([line("a", 1.0), line("b", 2.0), line("a", 3.0)], anew=True)
    assert [(one["model"], one["when"]) for one in board.history()] == [
        ("a", 1.0), ("b", 2.0), ("a", 3.0),
    ]  # fmt: skip
    assert [one["when"] for one in board.history("a")] == [1.0, 3.0]
    assert [one["when"] for one in board.history(most=1)] == [3.0]


def test_a_model_that_changes_all_the_time_does_not_push_the_others_out() -> None:
    board = Board(HOST)
    board.record([line("calm", 1.0)], anew=True)
    board.record([line("wild", float(at)) for at in range(2, 1000)], anew=False)
    assert [one["when"] for one in board.history("calm")] == [1.0]
    assert len(board.history("wild")) == 50


def test_a_listener_that_begins_anew_replaces_what_was_there() -> None:
    board = Board(HOST)
    board.record([line("a", 1.0)], anew=True)
    board.record([line("b", 2.0)], anew=True)
    assert [one["model"] for one in board.history(most=100)] == ["b"]


def test_models_without_end_are_forgotten_in_turn() -> None:
    board = Board(HOST)
    board.record([line(f"m{number}", float(number)) for number in range(1500)], anew=True)
    assert len(board.history(most=10_000)) == 1000
    assert board.history("m0") == []
    assert board.history("m1499")


def test_long_evidence_is_cut_and_other_words_are_kept() -> None:
    board = Board(HOST)
    board.record([line("a", 1.0, evidence="x" * 10_000, reason="why")], anew=True)
    (kept,) = board.history("a")
    assert kept["evidence"] == "x" * 500
    assert kept["reason"] == "why"


def test_before_the_listener_spoke_there_is_nothing() -> None:
    board = Board(HOST)
    assert board.models(HOST) == board.devices() == board.history() == []
