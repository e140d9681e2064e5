"""What supervisorctl shows of what the listener told: text that came in, what is said of it.

Pure but for the tables, which look at the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.adapters.history import Line
from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Row, Snapshot
from supervisor_synapse.errors import TransientError
from supervisor_synapse.plugin.ctl_commands import LOOK, STALE_SECONDS
from supervisor_synapse.plugin.ctl_link import Failed


@dataclass(frozen=True, slots=True)
class Shown:
    """`out` is for stdout; the rest is said beside it."""

    out: str = ""
    failures: tuple[str, ...] = ()
    remark: str = ""


def models(text: str, wanted: Sequence[str], *, as_json: bool) -> Shown:
    """Of what `synapse.models` answered, all or those that are wanted.

    Raises:
        Failed: it cannot be read, or nothing is known yet of those that are wanted.
    """
    rows = _snapshot(text).models
    known = {row.name for row in rows}
    chosen = [row for row in rows if not wanted or row.name in wanted]
    missing = [f"{name}: ERROR (no such model)" for name in wanted if name not in known]
    if not text and wanted:
        missing = [_remark(text)]
    return Shown(
        _as_json(snapshots.public(chosen)) if as_json else _models_table(chosen, bool(text)),
        tuple(missing), "" if not text and wanted else _remark(text),
    )  # fmt: skip


def _models_table(rows: Sequence[Row], has_reported: bool) -> str:
    if not rows:
        return "No models. `synapse discover` looks for some." if has_reported else ""
    from supervisor_synapse import report  # a tenth of a second, for those who need it

    return report.models_table(rows)


def devices(text: str, *, as_json: bool) -> Shown:
    """Of what `synapse.models` answered.

    Raises:
        Failed: it cannot be read.
    """
    rows = _snapshot(text).devices
    if as_json:
        return Shown(_as_json(snapshots.public_devices(rows)), remark=_remark(text))
    if not rows:
        return Shown("No devices are known yet." if text else "", remark=_remark(text))
    from supervisor_synapse import report

    return Shown(report.memory_bars(rows), remark=_remark(text))


def history(text: str, *, as_json: bool) -> Shown:
    """Of what `synapse.history` answered.

    Raises:
        Failed: it cannot be read.
    """
    try:
        found = json.loads(text)
        lines = [_line(item) for item in found]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise Failed(f"cannot read the history: {printable(str(error))}") from None
    if as_json:
        return Shown(_as_json(found))
    if not lines:
        return Shown("No transitions yet.")
    from supervisor_synapse import report

    return Shown(report.history_table(lines))


def _line(item: Any) -> Line:
    return Line(
        at=float(item["when"]), model=str(item["model"]), before=_text(item.get("from")),
        after=str(item["to"]), reason=str(item["reason"]),
        failure_class=_text(item.get("class")), evidence=str(item.get("evidence") or ""),
    )  # fmt: skip


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def names(text: str) -> list[str]:
    """The models that there are.

    Raises:
        Failed: it cannot be read, or is not known yet.
    """
    if not text:
        raise Failed(_remark(text))
    return [row.name for row in _snapshot(text).models]


def _snapshot(text: str) -> Snapshot:
    if not text:
        return Snapshot(0.0, ())
    try:
        return snapshots.load(text)
    except TransientError as error:
        raise Failed(str(error)) from None


def _remark(text: str) -> str:
    """Where there is no snapshot, or an old one."""
    age = snapshots.age_seconds(text) if text else None
    if not text:
        return f"The listener has not reported yet. {LOOK}"
    if age is not None and age > STALE_SECONDS:
        return f"The listener last reported {age:.0f} s ago: this may be outdated. {LOOK}"
    return ""


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2)
