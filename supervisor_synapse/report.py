"""Values -> what a person reads: aligned tables, in colour on a terminal only."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from supervisor_synapse.adapters import config_files
from supervisor_synapse.adapters.history import Line
from supervisor_synapse.core import bars, trials
from supervisor_synapse.core import plan as plans
from supervisor_synapse.core.bars import Kind, Part
from supervisor_synapse.core.findings import Examination, Finding, Severity
from supervisor_synapse.core.model import Device, DeviceRow, Phase, Program, Role, Row
from supervisor_synapse.core.trials import Generation, Standing, Standings

_WIDTH_WITHOUT_TERMINAL = 160
_ANY_HEIGHT = 25
_NARROWEST_ON_ONE_LINE = 100
_INDENT = "    "
_NARROWEST_FOLD = 24

_VERDICTS = ("rejected", "on trial", "not proved", "good")  # the worst first
_MOST_NAMED = 8

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
    """`below`: how it reads in the line under the row, where it goes in a narrow terminal."""

    title: str
    right: bool = False
    folds: bool = False  # the one that gives way, the last
    below: str = ""


_Line = list[str | Text]


def mib(size_bytes: int | None) -> str:
    """Bytes as in every reason; a dash where they are not known."""
    return "-" if size_bytes is None else plans.mib(size_bytes)


def models_table(rows: Sequence[Row]) -> str:
    """The table of `supervisorctl models`."""
    columns = (
        _Column("NAME"), _Column("TIER"), _Column("PHASE"), _Column("PORT", right=True),
        _Column("CONTEXT", right=True, below="context {}"), _Column("DEVICE", below="on {}"),
        _Column("MEMORY", right=True), _Column("SLOTS", right=True),
        _Column("REASON", folds=True, below="{}"),
    )  # fmt: skip
    lines: list[_Line] = [
        [
            row.name, row.tier.label, _phase(row.phase), str(row.port), str(row.context),
            row.device, _memory(row), _slots(row), row.explanation,
        ]
        for row in rows
    ]  # fmt: skip
    return _table(columns, lines)


def ready_table(rows: Sequence[Row]) -> str:
    """What `synapse up` ends with: where the models answer."""
    columns = (
        _Column("NAME"), _Column("TIER"), _Column("PHASE"), _Column("PORT", right=True),
        _Column("URL"), _Column("REASON", folds=True, below="{}"),
    )  # fmt: skip
    lines: list[_Line] = [
        [row.name, row.tier.label, _phase(row.phase), str(row.port), row.url, row.explanation]
        for row in rows
    ]
    return _table(columns, lines)


def plan_table(waves: Sequence[Sequence[Program]], others: Sequence[Program]) -> str:
    """What would start, in which waves, and what would not."""
    columns = (
        _Column("WAVE"), _Column("NAME"), _Column("TIER"), _Column("ROLE", below="{}"),
        _Column("DEVICE", below="on {}"), _Column("CONTEXT", right=True, below="context {}"),
        _Column("MEMORY", right=True), _Column("FROM", below="memory by {}"),
        _Column("PORT", right=True), _Column("WHY", folds=True, below="{}"),
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


_NARROWEST_BAR, _WIDEST_BAR = 20, 72
_MODEL_STYLES = ("green", "cyan", "blue")  # neighbours in a bar differ
_KIND_STYLES = {
    Kind.OTHERS: "magenta", Kind.FREE: "dim", Kind.RESERVE: "dim", Kind.UNKNOWN: "red",
}  # fmt: skip
_KIND_NAMES = {
    Kind.OTHERS: "others", Kind.FREE: "free", Kind.RESERVE: "reserve", Kind.UNKNOWN: "not known",
}  # fmt: skip


def memory_bars(devices: Sequence[DeviceRow]) -> str:
    """Of each device a bar of its memory, and who has it: `supervisorctl devices`."""
    width = shutil.get_terminal_size().columns if _is_terminal() else _WIDTH_WITHOUT_TERMINAL
    name_width = max((len(_shown(device.name)) for device in devices), default=0)
    return "\n".join(
        line for device in devices for line in _memory_lines(device, name_width, width)
    )


def _memory_lines(device: DeviceRow, name_width: int, width: int) -> list[str]:
    parts = bars.parts(device)
    styles = _part_styles(parts)
    name, numbers = _shown(device.name).ljust(name_width), _numbers(device)
    beside = len(f"{name}  []  {numbers}")
    lines = [Text(name)]
    if width - beside < _NARROWEST_BAR:
        lines = [Text(f"{name}  {numbers}"), Text(_INDENT[2:])]
        beside = len(f"{_INDENT}[]")
        numbers = ""
    room = max(min(width - beside, _WIDEST_BAR), _NARROWEST_BAR // 2)
    lines[-1].append("  [").append_text(_bar(parts, styles, room)).append("]")
    lines[-1].append(f"  {numbers}" if numbers else "")
    lines += [Text(line) for line in _folded(_shown(device.description), width)]
    if device.problem:
        problem = _folded(_shown(f"does not answer: {device.problem}"), width)
        lines += [Text(line, style="red") for line in problem]
    lines += _legend(parts, styles)
    return [_rendered(line) for line in lines]


def _numbers(device: DeviceRow) -> str:
    left = "left: not known" if device.room_bytes is None else f"{mib(device.room_bytes)} left"
    return f"{mib(device.total_bytes)}, {left}"


def _part_styles(parts: Sequence[Part]) -> list[str]:
    models = list(dict.fromkeys(part.model for part in parts if part.model))
    return [
        _MODEL_STYLES[models.index(part.model) % len(_MODEL_STYLES)]
        if part.model
        else _KIND_STYLES[part.kind]
        for part in parts
    ]


def _bar(parts: Sequence[Part], styles: Sequence[str], width: int) -> Text:
    bar = Text()
    shared = bars.cells([part.size_bytes for part in parts], width)
    for part, style, count in zip(parts, styles, shared, strict=True):
        bar.append(part.kind.value * count, style=style)
    return bar


def _legend(parts: Sequence[Part], styles: Sequence[str]) -> list[Text]:
    """A line for each part of the bar; what a model has and what it may still take are one."""
    by_name: dict[str, list[Part]] = {}
    style_of: dict[str, str] = {}
    for part, style in zip(parts, styles, strict=True):
        # No model is named so: their names hold no blank before them.
        name = part.model or f" {_KIND_NAMES[part.kind]}"
        by_name.setdefault(name, []).append(part)
        style_of[name] = style
    widest = max((len(_shown(name).strip()) for name in by_name), default=0)
    lines = []
    for name, found in by_name.items():
        signs = "".join(part.kind.value for part in found).ljust(2)
        sizes = ", ".join(_size(part) for part in found)
        line = Text(_INDENT).append(signs, style=style_of[name])
        lines.append(line.append(f"  {_shown(name).strip().ljust(widest)}  {sizes}"))
    return lines


def _size(part: Part) -> str:
    return mib(part.size_bytes) + (" to come" if part.kind is Kind.TO_COME else "")


def history_table(lines: Sequence[Line]) -> str:
    """The transitions, oldest first: `supervisorctl history`."""
    columns = (
        _Column("WHEN"), _Column("MODEL"), _Column("CHANGE"), _Column("CLASS", below="{}"),
        _Column("WHY", folds=True, below="{}"),
    )  # fmt: skip
    cells: list[_Line] = [
        [
            _local_time(line.at), line.model, _change(line), line.failure_class or "",
            _why_changed(line),
        ]
        for line in lines
    ]  # fmt: skip
    return _table(columns, cells)


def _local_time(at: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (ValueError, OverflowError, OSError):
        return "-"


def _change(line: Line) -> Text:
    """`loading -> ready`."""
    style = next((style for phase, style in _STYLES.items() if phase.value == line.after), "")
    return Text(f"{_shown(line.before or '-')} -> ").append(_shown(line.after), style=style)


def _why_changed(line: Line) -> str:
    """The class has a column of its own, and evidence is not said twice."""
    reason = line.reason.removeprefix(f"{line.failure_class}: ")
    evidence = "" if line.evidence in reason else line.evidence
    return ": ".join(part for part in (reason, evidence) if part)


def generations_table(
    generations: Sequence[Generation], standings: Standings, name: str | None = None
) -> str:
    """What was applied, newest last; of one model, how far each of its blocks is trusted."""
    columns = (
        _Column("GENERATION", right=True), _Column("WHEN"), _Column("BY"), _Column("STATE"),
        _Column("WHAT", folds=True, below="{}"),
    )  # fmt: skip
    lines: list[_Line] = [
        [
            str(one.number), _local_time(one.at),
            one.surface, _verdict(one, standings, name), _what(one, name),
        ]
        for one in generations
    ]  # fmt: skip
    return _table(columns, lines)


def _verdict(generation: Generation, standings: Standings, name: str | None) -> str:
    """Of the least trusted block that a generation brought; and whether it is the applied one."""
    names = [name] if name else [*generation.added, *generation.changed]
    found = []
    is_applied = False
    for one in names:
        standing, digest = standings.get(one), generation.blocks.get(one)
        if standing is None or digest is None:
            continue
        found.append(trials.verdict(standing, digest))
        is_applied = is_applied or standing.digest == digest
    worst = next((word for word in _VERDICTS if word in found), "-")
    return f"{worst}, applied" if is_applied else worst


def _what(generation: Generation, name: str | None) -> str:
    """`+ a, ~ b, - c: why`."""
    marks = (("+", generation.added), ("~", generation.changed), ("-", generation.removed))
    words = [f"{mark} {one}" for mark, names in marks for one in names if name in (None, one)]
    shown = ", ".join(words[:_MOST_NAMED])
    if len(words) > _MOST_NAMED:
        shown += f" and {len(words) - _MOST_NAMED} more"
    return f"{shown}: {generation.why}" if generation.why else shown


def generations_json(
    generations: Iterable[Generation], standings: Standings
) -> list[dict[str, object]]:
    """The objects of `generations --json`, oldest first."""
    return [
        {
            "generation": one.number, "at": one.at, "by": one.surface, "why": one.why,
            "added": list(one.added), "changed": list(one.changed),
            "removed": list(one.removed),
            "blocks": {
                name: {
                    "digest": digest,
                    "state": trials.verdict(standings.get(name, Standing()), digest),
                    "applied": standings.get(name, Standing()).digest == digest,
                }
                for name, digest in one.blocks.items()
            },
        }
        for one in generations
    ]  # fmt: skip


_EXAMPLES: dict[Role, tuple[str, dict[str, object]]] = {
    Role.EMBEDDING: ("/v1/embeddings", {"input": "Hello"}),
    Role.RERANKER: ("/v1/rerank", {"query": "Hello", "documents": ["Hello there", "Good bye"]}),
}
_CHAT: tuple[str, dict[str, object]] = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32},
)


def example(rows: Iterable[Row]) -> Row | None:
    """The model to try first: of those that are ready, one that talks, where there is one."""
    ready = [row for row in rows if row.phase is Phase.READY]
    talking = (row for row in ready if row.role in (Role.TEXT, Role.VISION))
    return next(talking, next(iter(ready), None))


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


_ENGINE = "--"  # in a command: the launcher's words stand before it, the engine's after
_DIFF_STYLES = {"+": "green", "-": "red", "~": "yellow"}
_Flag = tuple[bool, str]  # whether it is the engine's; its name, or nothing for a program


def block_diff(name: str, before: str | None, after: str | None) -> str:
    """What would change in one block: a head line, and below it only what differs.

    `before` and `after` are the texts of its file, None where there is none. Nothing where both are
    the same. In colour on a terminal only.
    """
    if before == after:
        return ""
    sign = "+" if before is None else "-" if after is None else "~"
    lines = [(sign, f"{sign} {name}")]
    if before is not None and after is not None:
        changed = list(_changed_options(name, _options(before), _options(after)))
        lines += changed or [("~", f"{_INDENT}comments or layout only")]
    return "\n".join(_coloured(_shown(line), _DIFF_STYLES[sign]) for sign, line in lines)


def _options(text: str) -> dict[tuple[str, str], str]:
    """(Section, key) -> value; of a key that stands twice the last one counts."""
    found = config_files.options_of(text)
    return {(option.section, option.name): option.value for option in found}


def _changed_options(
    name: str, before: Mapping[tuple[str, str], str], after: Mapping[tuple[str, str], str]
) -> Iterator[tuple[str, str]]:
    for section, key in dict.fromkeys((*before, *after)):
        old, new = before.get((section, key)), after.get((section, key))
        where = "" if section == f"program:{name}" else f"[{section}] "
        if old == new:
            continue
        if key == "command" and old is not None and new is not None:
            yield from _changed_words(where, old, new)
        elif old is None:
            yield "+", f"{_INDENT}+ {where}{_setting(key, new)}".rstrip()
        elif new is None:
            yield "-", f"{_INDENT}- {where}{_setting(key, old)}".rstrip()
        else:
            yield "~", f"{_INDENT}{where}{key}: {_on_one_line(old)} -> {_on_one_line(new)}"


def _setting(key: str, value: str | None) -> str:
    """A section itself has no key."""
    return f"{key}: {_on_one_line(value or '')}" if key else ""


def _on_one_line(value: str) -> str:
    return " ".join(value.split("\n")).strip()


def _changed_words(where: str, before: str, after: str) -> Iterator[tuple[str, str]]:
    """Flag by flag; what stands there several times is compared as a whole."""
    old, new = _flags(before), _flags(after)
    differs = False
    for flag in dict.fromkeys((*old, *new)):
        gone, come = _beyond(old.get(flag, []), new.get(flag, []))
        differs = differs or bool(gone or come)
        _, name = flag
        if len(gone) == len(come) == 1:
            old_value, new_value = gone[0] or "no value", come[0] or "no value"
            yield "~", _INDENT + where + " ".join(filter(None, (name, old_value, "->", new_value)))
            continue
        for sign, values in (("-", gone), ("+", come)):
            for value in values:
                said = " ".join(filter(None, (name, value)))
                yield sign, f"{_INDENT}{sign} {where}{said}"
    if not differs:
        yield "~", f"{_INDENT}{where}command: the same words, in another order or layout"


def _flags(command: str) -> dict[_Flag, list[str]]:
    """Each flag of a command with the values that it has, one text for each time it stands there.

    The program that a part begins with has no flag.
    """
    found: dict[_Flag, list[str]] = {}
    is_engine, flag, values = False, "", list[str]()

    def end() -> None:
        if flag or values:
            found.setdefault((is_engine, flag), []).append(shlex.join(values))

    for word in _words(command):
        if word == _ENGINE and not is_engine:
            end()
            is_engine, flag, values = True, "", []
        elif _FLAG.match(word):
            end()
            flag, values = word, []
        else:
            values.append(word)
    end()
    return found


_FLAG = re.compile(r"--?[A-Za-z]")


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed: a person's edit, shown as it stands
        words = command.split()
    return [word.replace("%%", "%") for word in words]


def _beyond(old: Sequence[str], new: Sequence[str]) -> tuple[list[str], list[str]]:
    """What only the one has, and what only the other."""
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    return list(gone.elements()), list(come.elements())


def _coloured(line: str, style: str) -> str:
    return _rendered(Text(line, style=style))


def _rendered(line: Text) -> str:
    """In colour on a terminal only."""
    if not _is_terminal():
        return line.plain
    text = io.StringIO()
    _console(text, _WIDTH_WITHOUT_TERMINAL).print(line, soft_wrap=True, end="")
    return text.getvalue()


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _console(file: io.StringIO, width: int) -> Console:
    """Without any escape in a pipe, in a dumb terminal, and for who wants no colour.

    The height is named because rich asks a dumb terminal for neither, and takes 80 columns.
    """
    is_plain = not _is_terminal() or bool(os.environ.get("NO_COLOR"))
    return Console(
        file=file, width=width, height=_ANY_HEIGHT, force_terminal=_is_terminal(),
        color_system=None if is_plain else "auto", highlight=False, no_color=is_plain,
    )  # fmt: skip


def _table(columns: Sequence[_Column], lines: Sequence[Sequence[str | Text]]) -> str:
    """In a terminal it fits where it can; elsewhere each row is one line, for whoever filters."""
    cells = [
        [cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in line] for line in lines
    ]
    if not _is_terminal():
        return _drawn(columns, cells, _narrowest(columns, cells, fold=False))
    width = shutil.get_terminal_size().columns
    if width < max(_NARROWEST_ON_ONE_LINE, _narrowest(columns, cells)):
        return _on_two_lines(columns, cells, width)
    return _drawn(columns, cells, width)


def _on_two_lines(columns: Sequence[_Column], lines: Sequence[Sequence[Text]], width: int) -> str:
    """What goes `below` stands under its row, folded; the rest is a table of one line a row."""
    above = [index for index, column in enumerate(columns) if not column.below]
    short = [[line[index] for index in above] for line in lines]
    head, *rows = _drawn([columns[index] for index in above], short, width).split("\n")
    if len(above) == len(columns) or len(rows) != len(lines):
        return "\n".join([head, *rows])
    shown = [head]
    for row, line in zip(rows, lines, strict=True):
        shown += [row, *_folded(_said_below(columns, line), width)]
    return "\n".join(shown)


def _said_below(columns: Sequence[_Column], line: Sequence[Text]) -> str:
    """`context 4096, on CPU: answers 1.2 s after its start`."""
    *facts, why = [
        column.below.format(cell.plain)
        for column, cell in zip(columns, line, strict=True)
        if column.below
    ]
    return ": ".join(part for part in (", ".join(facts), why) if part)


def _folded(text: str, width: int) -> list[str]:
    room = max(width - len(_INDENT), _NARROWEST_FOLD)
    wrapped = Text(text).wrap(Console(width=width), room, overflow="fold")
    return [_INDENT + line.plain.rstrip() for line in wrapped if line.plain.strip()]


def _drawn(columns: Sequence[_Column], lines: Sequence[Sequence[Text]], width: int) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.right else "left",
            no_wrap=not column.folds, overflow="fold",
        )  # fmt: skip
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    console = _console(text, max(width, _narrowest(columns, lines)))
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def _narrowest(
    columns: Sequence[_Column], lines: Sequence[Sequence[Text]], *, fold: bool = True
) -> int:
    """The width in which nothing is cut; a narrower terminal wraps the lines.

    Half a port number would be worse than a line that goes on in the next.
    """
    width = 2 * (len(columns) - 1)
    for index, column in enumerate(columns):
        widest = max((line[index].cell_len for line in lines), default=0)
        folds = fold and column.folds
        width += max(len(column.title), min(widest, _NARROWEST_FOLD) if folds else widest)
    return width


def _shown(text: str) -> str:
    """Text from outside as one line that cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- what an examination found -------------------------------------------------------------------

_SEVERITY_STYLES = {
    Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan",
    Severity.OK: "green",
}  # fmt: skip
_WORD_COLUMNS = 9  # "WARNING  "


def examination_text(examination: Examination, *, verbose: bool = False) -> str:
    """What is wrong, the worst first, each with how to mend it; what is well as a count."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    least = Severity.OK if verbose else Severity.NOTE
    lines = [
        line
        for finding in examination.findings
        if finding.severity >= least
        for line in _finding_lines(finding, width)
    ]
    if verbose:
        versions = (f"{name} {version or '-'}" for name, version in examination.versions)
        lines += ["", *Text(", ".join(versions)).wrap(Console(width=width), width)]
    return "\n".join([*map(str, lines), *([""] if lines else []), _counted(examination)])


def _finding_lines(finding: Finding, width: int) -> Iterator[str]:
    """The word stands by itself on the left, so that it can be looked for."""
    indent = " " * _WORD_COLUMNS
    room = max(width - _WORD_COLUMNS, _NARROWEST_FOLD)
    word = _coloured(finding.severity.name, _SEVERITY_STYLES[finding.severity])
    first, *rest = _wrapped(f"{finding.subject}: {finding.message}", room)
    yield f"{word}{' ' * (_WORD_COLUMNS - len(finding.severity.name))}{first}"
    mend = _wrapped(f"mend: {finding.mend}", room) if finding.mend else []
    copied = [f"    {line}" for line in finding.lines]  # whole, to be copied
    yield from (f"{indent}{line}" for line in (*rest, *mend, *copied))


def _wrapped(text: str, room: int) -> list[str]:
    wrapped = Text(text).wrap(Console(width=room), room, overflow="fold")
    return [line.plain.rstrip() for line in wrapped if line.plain.strip()]


def _counted(examination: Examination) -> str:
    """`1 error, 2 notes; 19 of 22 checks found nothing.`"""
    counts = Counter(finding.severity for finding in examination.findings)
    said = [
        f"{counts[severity]} {severity.name.lower()}{'' if counts[severity] == 1 else 's'}"
        for severity in (Severity.ERROR, Severity.WARNING, Severity.NOTE)
        if counts[severity]
    ]
    well = sum(check.severity is Severity.OK for check in examination.checks)
    every = len(examination.checks)
    if not said:
        return f"Nothing is wrong: {every} checks."
    return f"{', '.join(said)}; {well} of {every} checks found nothing."


def examination_json(examination: Examination) -> dict[str, object]:
    """The object of `doctor --json`: findings, the worst first, without what is well."""
    return {
        "ok": examination.is_well,
        "findings": [
            _finding_json(check, finding)
            for check, finding in examination.attributed
            if finding.severity > Severity.OK
        ],
        "checks": [
            {"name": check.check, "severity": check.severity.name.lower()}
            for check in examination.checks
        ],
        "versions": dict(examination.versions),
    }


def _finding_json(check: str, finding: Finding) -> dict[str, object]:
    return {
        "id": finding.id, "severity": finding.severity.name.lower(), "check": check,
        "subject": finding.subject, "message": finding.message, "mend": finding.mend,
        "lines": list(finding.lines),
    }  # fmt: skip
