"""var/run/ledger.json: the listener's word for the launcher, whether a model may start now.

The launcher reads it (launcher.py, which imports nothing of ours), and goes ahead without one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor_synapse import launcher

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Process:
    """A process, and not another one that has got its number since."""

    pid: int
    started: int  # clock ticks since the boot, as /proc has it; 0 where there is no /proc


@dataclass(frozen=True, slots=True)
class Entry:
    """One model."""

    admitted: bool  # its memory is reserved, or it runs: whatever starts it needs no more
    needs: Mapping[str, int]  # bytes by device, the margin included
    could_stop: str = ""  # for a person: what would make room, "a (500 MiB), b (1200 MiB)"


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a launcher must know to take no memory that is someone else's."""

    listener: Process  # the word holds while it lives
    room: Mapping[str, int]  # bytes by device; one that cannot be read is left out: closed
    counted: tuple[Process, ...] = ()  # launchers whose models are measured or reserved in `room`
    models: Mapping[str, Entry] = field(default_factory=dict)  # by name; any other may start


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no launcher claims memory; where the lock is not to be had soon, all the same."""
    lock = launcher.take_lock(f"{path}.lock")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def claimants(path: Path) -> frozenset[Process]:
    """Launchers that claimed memory by the ledger's word, and live."""
    try:
        text = path.with_name(f"{path.name}.claims").read_bytes()
    except OSError:
        return frozenset()
    return frozenset(
        Process(claim.pid, claim.started)
        for claim in launcher.parse_claims(text)
        if launcher.is_alive(claim.pid, claim.started)
    )


def process_of(pid: int) -> Process:
    """The process that has this number now."""
    return Process(pid, launcher.ticks_of(pid))


def save(path: Path, ledger: Ledger) -> None:
    """Replace the file, so that a reader sees all of it or all of the former.

    Nothing is synced to the disk: the file speaks of processes that live, and none outlives a
    loss of power.

    Raises:
        OSError: nothing was changed.
    """
    new = _new(path)
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(_text(ledger))
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def remove(path: Path) -> None:
    """Leave no word: from now on launchers go ahead.

    Raises:
        OSError: it is still there.
    """
    for file in (_new(path), path):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


def _new(path: Path) -> Path:
    """One name for all attempts: what a killed listener left is taken up by the next."""
    return path.with_name(f"{path.name}.new")


def _text(ledger: Ledger) -> str:
    value = {
        "version": _VERSION,
        "listener": {"pid": ledger.listener.pid, "started": ledger.listener.started},
        "room": dict(ledger.room),
        "counted": [[process.pid, process.started] for process in ledger.counted],
        "models": {name: _entry(entry) for name, entry in ledger.models.items()},
    }
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n"


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "admitted": entry.admitted, "needs": dict(entry.needs), "could_stop": entry.could_stop,
    }  # fmt: skip
