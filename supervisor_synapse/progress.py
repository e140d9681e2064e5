"""Shows models on their way to ready: bars on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from supervisor_synapse import lifecycle
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core.model import Phase, Row

_BAR_COLUMNS = 20  # beside a name, a phase and a time in a terminal of 80
_ALMOST = 0.97  # a bar is full only when the model answers


def show_until_settled(
    rpc: Supervisord, interrupts: lifecycle.Interrupts, expected: frozenset[str]
) -> tuple[Row, ...]:
    """Follow the fleet until all of `expected` are ready or have failed; the last rows seen."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return _follow(rpc, interrupts, expected, _Lines())
    with Progress(
        TextColumn("{task.description}"), BarColumn(_BAR_COLUMNS),
        TextColumn("{task.fields[phase]}"), TimeElapsedColumn(), console=console, transient=True,
    ) as bars:  # fmt: skip
        return _follow(rpc, interrupts, expected, _Bars(bars))


def show_changes(rpc: Supervisord, interrupts: lifecycle.Interrupts, rows: tuple[Row, ...]) -> None:
    """A line for each change, until supervisord ends or somebody interrupts."""
    lines = _Lines(rows)
    for snapshot in lifecycle.watch(rpc, interrupts):
        lines.show(snapshot.models)


def _follow(
    rpc: Supervisord,
    interrupts: lifecycle.Interrupts,
    expected: frozenset[str],
    view: _Lines | _Bars,
) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = ()
    for snapshot in lifecycle.watch(rpc, interrupts):
        rows = snapshot.models
        view.show(rows)
        if lifecycle.is_settled(rows, expected):
            break
    return rows


class _Lines:
    """One line on stderr when a model's phase changes."""

    def __init__(self, rows: tuple[Row, ...] = ()) -> None:
        self._phases = {row.name: row.phase for row in rows}

    def show(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            known = self._phases.get(row.name)
            self._phases[row.name] = row.phase
            if row.phase is not known and (known or row.phase is not Phase.DISABLED):
                print(f"{row.name}: {row.phase.value} ({row.explanation})", file=sys.stderr)
        sys.stderr.flush()


class _Bars:
    """One bar for each enabled model; how full: memory taken of memory expected."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def show(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            if row.phase is Phase.DISABLED:
                continue
            if row.name not in self._tasks:
                self._tasks[row.name] = self._bars.add_task(row.name, total=1.0, phase="")
            self._bars.update(
                self._tasks[row.name], completed=_fraction(row), phase=row.phase.value
            )


def _fraction(row: Row) -> float:
    if row.phase is Phase.READY:
        return 1.0
    taken = row.measured_bytes or 0
    return min(taken / max(row.estimated_bytes, 1), _ALMOST)
