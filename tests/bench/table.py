"""Prints the figures of a benchmark, with the goal beside each."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured value; `goal` is the most that it may be (None: for information)."""

    what: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def is_met(self) -> bool:
        return self.goal is None or self.value <= self.goal


def show(title: str, figures: list[Figure]) -> bool:
    """Print an aligned table; whether every goal was met."""
    print(f"\n{title}")
    width = max(len(figure.what) for figure in figures)
    for figure in figures:
        goal = "" if figure.goal is None else f"goal <= {figure.goal:g} {figure.unit}"
        verdict = "" if figure.goal is None else ("ok" if figure.is_met else "MISSED")
        print(
            f"  {figure.what:<{width}}  {figure.value:>9.3f} {figure.unit:<4} {goal:<18} {verdict}"
        )
    sys.stdout.flush()
    return all(figure.is_met for figure in figures)
