"""Processes of this machine: what a launcher runs, and the memory that it holds."""

from __future__ import annotations

import contextlib
import os

import psutil


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
