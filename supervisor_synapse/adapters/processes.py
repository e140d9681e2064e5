"""Processes of this machine: what a launcher runs, what it holds, and how it is ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import psutil

_PR_SET_PDEATHSIG = 1


def command(pid: int) -> tuple[str, ...]:
    """The command line of a process; empty where there is none to be had."""
    try:
        return tuple(psutil.Process(pid).cmdline())
    except (psutil.Error, OSError):
        return ()


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process and its descendants; None where it cannot be read.

    Shared and file-backed pages count: a model's weights are mapped from its file.
    """
    try:
        process = psutil.Process(pid)
        return process.memory_info().rss + sum(map(_rss, _descendants(process)))
    except (psutil.Error, OSError):
        return None


def family(pid: int) -> frozenset[int]:
    """The process and its descendants; empty where it has ended."""
    try:
        process = psutil.Process(pid)
        return frozenset({pid, *(child.pid for child in _descendants(process))})
    except (psutil.Error, OSError):
        return frozenset()


def is_halted(pid: int) -> bool:
    """Whether the process or one below it was stopped by a signal (SIGSTOP)."""
    return any(_status(member) == psutil.STATUS_STOPPED for member in family(pid))


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except (psutil.Error, OSError):
        return ""


def footprint(pid: int) -> tuple[int, int]:
    """Resident memory and bytes read so far, of a process and its descendants: both grow while a
    model loads. 0 where the system does not say.
    """
    members = family(pid)
    return (resident_bytes(pid) or 0, sum(map(_bytes_read, members)))


def _bytes_read(pid: int) -> int:
    try:
        counters = psutil.Process(pid).io_counters()  # type: ignore[attr-defined,unused-ignore]
    except (psutil.Error, OSError, AttributeError):  # not there on macOS
        return 0
    return int(counters.read_bytes + getattr(counters, "read_chars", 0))


def group_of(leader: int) -> frozenset[int]:
    """Living members of the process group that `leader`, which was waited for, had led.

    A number is not given away while a group has it, so what is left of a run is found by it; and
    where it was given away, nothing was left.
    """
    if psutil.pid_exists(leader):
        return frozenset()
    members = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(pid) == leader and _status(pid) != psutil.STATUS_ZOMBIE:
                members.add(pid)
    if psutil.pid_exists(leader):  # given away meanwhile, so that these are a stranger's
        return frozenset()
    return frozenset(members)


def kill_all(pids: frozenset[int]) -> None:
    """SIGKILL; one that is gone, or changed its user, is passed over."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def kill_group(pid: int, parent: int) -> bool:
    """SIGKILL the process group that `pid` leads, if it still is the child of `parent`.

    A child that was not waited for keeps its number, so that no stranger can have it.
    """
    try:
        process = psutil.Process(pid)
        if process.ppid() != parent or os.getpgid(pid) != pid:
            return False
        os.killpg(pid, signal.SIGKILL)
    except (psutil.Error, OSError):
        return False
    return True


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # ended meanwhile
        return 0


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    """From small files where the kernel lists the children (a scan of /proc elsewhere)."""
    try:
        return _listed_descendants(process.pid)
    except (OSError, ValueError):
        return process.children(recursive=True)


def _listed_descendants(pid: int) -> list[psutil.Process]:
    """A wrapper may stand between a launcher and its server, so children's children count."""
    found, waiting = [], _listed_children(pid)
    while waiting:
        child = waiting.pop()
        with contextlib.suppress(psutil.Error, OSError):
            found.append(psutil.Process(child))
            waiting += _listed_children(child)
    return found


def _listed_children(pid: int) -> list[int]:
    """Those of every thread: the kernel keeps them apart."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            found += [int(word) for word in file.read().split()]
    return found


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even if it is frozen then.

    Linux only; elsewhere the end of stdin must do.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)
    if os.getppid() != parent:
        os._exit(0)


@dataclass(frozen=True, slots=True)
class Running:
    """One process as everybody may see it; an empty command is one that is hidden from us."""

    pid: int
    parent: int
    user: int
    command: tuple[str, ...]
    started_at: float  # wall clock

    @property
    def program(self) -> str:
        """The name of the file that it runs."""
        return os.path.basename(self.command[0]) if self.command else ""


def every() -> tuple[Running, ...]:
    """All processes there are; one that ends meanwhile is left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError), process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            user, parent = process.uids().real, process.ppid()
            command = _visible_command(process)
            found.append(Running(process.pid, parent, user, command, process.create_time()))
    return tuple(found)


def _visible_command(process: psutil.Process) -> tuple[str, ...]:
    try:
        return tuple(process.cmdline())
    except (psutil.Error, OSError):
        return ()


def variable(pid: int, name: str) -> str:
    """A variable that a process was started with; "" where there is none, or it is hidden."""
    try:
        return str(psutil.Process(pid).environ().get(name, ""))
    except (psutil.Error, OSError, ValueError):
        return ""
