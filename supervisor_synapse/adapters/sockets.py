"""Who listens on a port: llama-server shares a port without a word (SO_REUSEPORT), and a stranger
that was there first answers probes just as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass

import psutil

from supervisor_synapse.adapters import processes
from supervisor_synapse.launcher import tcp_rows

_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - looked for, not bound
_LISTEN = 0x0A  # as /proc/net/tcp has it (net/tcp_states.h)


def foreign_listener(port: int, pid: int) -> str:
    """Who else than `pid` and its descendants answers on `port`; "" where nobody is known to.

    A stranger with the same port of another address takes nothing from us.
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
            (one.laddr.ip, one.pid)
            for one in psutil.net_connections(kind="tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
        ]
    except (psutil.Error, OSError):
        return ""  # not for us to see on this system: no evidence
    addresses = {address for address, pid in listeners if pid in ours}
    for address, pid in listeners:
        if pid not in ours and _is_rival(address, addresses):
            return _describe(pid)
    return ""


def _is_rival(address: str, ours: set[str]) -> bool:
    """Whether who listens there may get what is meant for us: the most specific address wins."""
    return not ours or address in ours or bool(ours & _ANY)


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"{psutil.Process(pid).name()!a} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"


@dataclass(frozen=True, slots=True)
class Listener:
    """Who listens on a port. `pid` is None where that is another user's process."""

    port: int
    address: str
    pid: int | None

    def reaches(self, host: str) -> bool:
        """Whether what is meant for an address of this machine may end here."""
        return self.address == host or self.address in _ANY or host in _ANY


def listeners() -> tuple[Listener, ...] | None:
    """Everybody who listens on a TCP port; None where that is not for us to see (macOS)."""
    try:
        return tuple(
            Listener(one.laddr.port, one.laddr.ip, one.pid)
            for one in psutil.net_connections(kind="tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr
        )
    except (psutil.Error, OSError):
        return None


def describe(pid: int | None) -> str:
    """Name and number of a process, for a person."""
    return _describe(pid)
