"""Who listens on a port: llama-server shares a port without a word (SO_REUSEPORT), and a stranger
that was there first answers probes just as well.
"""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

from supervisor_synapse.adapters import processes
from supervisor_synapse.launcher import tcp_rows

_LISTEN = 0x0A  # as /proc/net/tcp has it (net/tcp_states.h)


def foreign_listener(port: int, pid: int) -> str:
    """Who else than `pid` and its descendants listens on `port`; "" where nobody is known to.

    Other users' processes show their sockets on Linux, not their names; elsewhere they may be
    hidden altogether.
    """
    ours = processes.family(pid)
    if sys.platform == "linux":
        listening = {inode for state, inode in tcp_rows(port) if state == _LISTEN}
        if listening <= set().union(*map(_socket_inodes, ours)):
            return ""
    return _foreign(port, ours)


def _socket_inodes(pid: int) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):  # gone
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError, ValueError):
                kind, _, inode = os.readlink(entry.path).partition(":[")
                if kind == "socket":
                    found.add(int(inode.rstrip("]")))
    return found


def _foreign(port: int, ours: frozenset[int]) -> str:
    """By a look at every process there is, which takes long where there are many."""
    try:
        listeners = [
            connection
            for connection in psutil.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
        ]
    except (psutil.Error, OSError):
        return ""  # not for us to see on this system: no evidence
    for connection in listeners:
        if connection.pid not in ours:
            return _describe(connection.pid)
    return ""


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"{psutil.Process(pid).name()!a} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"
