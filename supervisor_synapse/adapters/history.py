"""var/log/history.jsonl: every transition, one JSON object a line, newest last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LARGEST_BYTES = 10 * 1024 * 1024
_TAIL_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One transition; `at` is wall clock, seconds since the epoch.

    `pid` and `started` (supervisord's wall clock) name the incarnation, where there is one.
    """

    at: float
    model: str
    before: str | None
    after: str
    reason: str
    pid: int | None = None
    started: int | None = None
    failure_class: str | None = None
    evidence: str = ""


def append(path: Path, lines: list[Line]) -> None:
    """Add `lines`; a file that has grown large becomes `<name>.1` first.

    Raises:
        OSError: nothing, or only some of it, was written; readers skip a torn line.
    """
    text = "".join(json.dumps(public(line)) + "\n" for line in lines)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > _LARGEST_BYTES:
            os.replace(path, path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _write(descriptor, ("\n" if _is_torn(descriptor) else "") + text)
    finally:
        os.close(descriptor)


def _is_torn(descriptor: int) -> bool:
    """Whether the last line has no end, as after a full disk; the next must not be glued to it."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write(descriptor: int, text: str) -> None:
    """All of `text`: a disk that fills up takes the first part without an error."""
    rest = text.encode("ascii")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def recent(path: Path, most: int) -> list[dict[str, object]]:
    """The last `most` objects of the file, oldest first; fewer where it was just begun anew, none
    where it cannot be read. A torn line is left out.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    return _objects(text.split("\n"))[-most:]


def _objects(lines: Iterable[str]) -> list[dict[str, object]]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("model"), str):
                found.append(value)
    return found


def public(line: Line) -> dict[str, object]:
    """The object that stands in the file."""
    run = None if line.pid is None else {"pid": line.pid, "started": line.started}
    return {
        "when": line.at, "model": line.model, "incarnation": run, "from": line.before,
        "to": line.after, "reason": line.reason, "class": line.failure_class,
        "evidence": line.evidence,
    }  # fmt: skip
