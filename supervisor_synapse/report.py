"""Values → what a person reads: aligned tables, in colour on a terminal only."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervisor_synapse.core.model import Device, Phase, Program, Role, Row

_WIDTH_WITHOUT_TERMINAL = 160
_NARROWEST_FOLD = 24

_STYLES = {
    Phase.READY: "green",
    Phase.LOADING: "cyan",
    Phase.PENDING: "cyan",
    Phase.DEFERRED: "yellow",
    Phase.UNHEALTHY: "red",
    Phase.FAILED: "bold red",
    Phase.BACKOFF: "yellow",
    Phase.DRAINING: "yellow",
    Phase.STOPPING: "yellow",
    Phase.VERIFYING: "yellow",
    Phase.STOPPED: "dim",
    Phase.DISABLED: "dim",
}


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    right: bool = False
    folds: bool = False  # the one that gives way on a narrow terminal


_Line = list[str | Text]


def mib(size_bytes: int | None) -> str:
    """Bytes as whole MiB, or GiB with one decimal from 10 GiB."""
    if size_bytes is None:
        return "-"
    if size_bytes >= 10 * 2**30:
        return f"{size_bytes / 2**30:.1f} GiB"
    return f"{size_bytes / 2**20:.0f} MiB"


def models_table(rows: Sequence[Row]) -> str:
    """The table of `supervisorctl models`."""
    columns = (
        _Column("NAME"), _Column("TIER"), _Column("PHASE"), _Column("PORT", right=True),
        _Column("CONTEXT", right=True), _Column("DEVICE"), _Column("MEMORY", right=True),
        _Column("SLOTS", right=True), _Column("READY IN", right=True),
        _Column("REASON", folds=True),
    )  # fmt: skip
    lines: list[_Line] = [
        [
            row.name, row.tier.label, _phase(row.phase), str(row.port), str(row.context),
            row.device, _memory(row), _slots(row), _seconds(row.ready_seconds), reason(row),
        ]
        for row in rows
    ]  # fmt: skip
    return _table(columns, lines)


def ready_table(rows: Sequence[Row]) -> str:
    """What `synapse up` ends with: where the models answer."""
    columns = (
        _Column("NAME"), _Column("TIER"), _Column("PHASE"), _Column("PORT", right=True),
        _Column("URL"), _Column("REASON", folds=True),
    )  # fmt: skip
    lines: list[_Line] = [
        [row.name, row.tier.label, _phase(row.phase), str(row.port), row.url, reason(row)]
        for row in rows
    ]
    return _table(columns, lines)


def plan_table(waves: Sequence[Sequence[Program]], others: Sequence[Program]) -> str:
    """What would start, in which waves, and what would not."""
    columns = (
        _Column("WAVE"), _Column("NAME"), _Column("TIER"), _Column("ROLE"),
        _Column("DEVICE"), _Column("CONTEXT", right=True), _Column("MEMORY", right=True),
        _Column("FROM"), _Column("PORT", right=True), _Column("WHY", folds=True),
    )  # fmt: skip
    numbered = [(str(i), program) for i, wave in enumerate(waves, 1) for program in wave]
    lines = [
        [
            wave, program.name, program.tier.label, program.role.value, program.device,
            str(program.context), mib(program.estimate_bytes), program.estimate_source,
            str(program.port), program.reason,
        ]
        for wave, program in [*numbered, *(("-", program) for program in others)]
    ]  # fmt: skip
    return _table(columns, lines)


def devices_table(devices: Iterable[Device]) -> str:
    """The memory that a plan is made for."""
    columns = (
        _Column("DEVICE"), _Column("TOTAL", right=True), _Column("FREE", right=True),
        _Column("WHAT", folds=True),
    )  # fmt: skip
    lines = [
        [device.name, mib(device.total_bytes), mib(device.free_bytes), device.description]
        for device in devices
    ]
    return _table(columns, lines)


_EXAMPLES: dict[Role, tuple[str, dict[str, object]]] = {
    Role.EMBEDDING: ("/v1/embeddings", {"input": "Hello"}),
    Role.RERANKER: ("/v1/rerank", {"query": "Hello", "documents": ["Hello there", "Good bye"]}),
}
_CHAT: tuple[str, dict[str, object]] = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32},
)


def curl_line(row: Row) -> str:
    """A request that this model answers, to be pasted into a shell."""
    path, body = _EXAMPLES.get(row.role, _CHAT)
    text = shlex.quote(json.dumps({"model": row.alias, **body}))
    return f"curl -s {row.url}{path} -H 'Content-Type: application/json' -d {text}"


def _phase(phase: Phase) -> Text:
    return Text(phase.value, style=_STYLES[phase])


def _memory(row: Row) -> str:
    """Measured where it is known, else what was estimated."""
    if row.measured_bytes is not None:
        return mib(row.measured_bytes)
    return f"~{mib(row.estimated_bytes)}"


def _slots(row: Row) -> str:
    return f"{'-' if row.slots_busy is None else row.slots_busy}/{row.slots_total}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def reason(row: Row) -> str:
    """Why a model is as it is, with the evidence where it failed."""
    if row.phase is Phase.FAILED and row.last_failure is not None:
        return f"{row.reason}: {row.last_failure.message}"
    return row.reason


def _table(columns: Sequence[_Column], lines: Sequence[Sequence[str | Text]]) -> str:
    cells = [
        [cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in line] for line in lines
    ]
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.right else "left",
            no_wrap=not column.folds, overflow="fold",
        )  # fmt: skip
    for line in cells:
        table.add_row(*line)
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else _WIDTH_WITHOUT_TERMINAL
    width = max(width, _narrowest(columns, cells))
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=is_terminal, color_system="auto", highlight=False,
        no_color=None if is_terminal else True,
    )  # fmt: skip
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def _narrowest(columns: Sequence[_Column], lines: Sequence[Sequence[Text]]) -> int:
    """The width in which nothing is cut; a narrower terminal wraps the lines.

    Half a port number would be worse than a line that goes on in the next.
    """
    width = 2 * (len(columns) - 1)
    for index, column in enumerate(columns):
        widest = max((line[index].cell_len for line in lines), default=0)
        width += max(len(column.title), min(widest, _NARROWEST_FOLD) if column.folds else widest)
    return width


def _shown(text: str) -> str:
    """Text from outside as one line that cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
