"""Processes of this machine: what a launcher runs, and the memory that it holds."""

from __future__ import annotations

import psutil


def command(pid: int) -> tuple[str, ...]:
    """The command line of a process; empty where there is none to be had."""
    try:
        return tuple(psutil.Process(pid).cmdline())
    except (psutil.Error, OSError):
        return ()


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process and its children; None where it cannot be read.

    Shared and file-backed pages count: a model's weights are mapped from its file.
    """
    try:
        process = psutil.Process(pid)
        family = [process, *_children(process)]
        return sum(member.memory_info().rss for member in family)
    except (psutil.Error, OSError):
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    """The children, from one small file where the kernel lists them (a scan of /proc elsewhere)."""
    try:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            pids = [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return process.children(recursive=True)
    found = []
    for pid in pids:
        try:
            found.append(psutil.Process(pid))
        except psutil.Error:
            continue
    return found
