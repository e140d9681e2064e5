"""`supervisorctl discover`: starts supervisord's program, and shows its log as it grows."""

from __future__ import annotations

import functools
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from supervisor.states import STOPPED_STATES, ProcessStates
from supervisor.xmlrpc import Faults

from supervisor_synapse.plugin.ctl_link import Failed, Link

PROGRAM = "discover"

_LONGEST_SECONDS = 3600.0  # the headers of a large cache on a slow disk
_POLL_SECONDS = 0.2
_CHUNK_BYTES = 65536
_LONGEST_CHARACTER_BYTES = 4
_NO_PROGRAM = (
    "supervisord has no such program: run `synapse discover` in a shell, or give supervisord.conf "
    "the section [program:discover] that `synapse init` lays down"
)

Say = Callable[[str], None]


def discover(link: Link, say: Say) -> None:
    """Start a run, or join the one under way; `say` what it says.

    Raises:
        Failed: it ended otherwise than well, or cannot be followed.
    """
    offset = link.asked(_log_size, about=PROGRAM, missing=_NO_PROGRAM)
    if not link.asked(_start, about=PROGRAM, missing=_NO_PROGRAM):
        say(f"{PROGRAM} runs already; what it says from now on:")
    _follow(link, offset, say)


def _follow(link: Link, offset: int, say: Say) -> None:
    deadline, rest = time.monotonic() + _LONGEST_SECONDS, ""
    while time.monotonic() < deadline:
        # In this order: the log of a run that has ended is complete.
        info = link.asked(lambda proxy: proxy.supervisor.getProcessInfo(PROGRAM))
        text, end = _read_log(link, offset)
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            say(line)
        if end != offset:
            offset = end
        elif info["state"] in STOPPED_STATES:
            if rest:
                say(rest)
            _require_success(info)
            return
        else:
            time.sleep(_POLL_SECONDS)
    raise Failed(f"{PROGRAM}: ERROR (no end after {_LONGEST_SECONDS:.0f} s)")


def _read_log(link: Link, offset: int) -> tuple[str, int]:
    """What the log holds beyond `offset`, a part of it, and where that ends."""
    size = link.asked(_log_size)
    offset = offset if offset <= size else 0  # it was rotated
    length = min(size - offset, _CHUNK_BYTES)
    for shorter in _lengths(length):
        text = link.asked(functools.partial(_read, offset, shorter))
        if text is not None:
            return text, offset + shorter
    return "", offset + length


def _lengths(length: int) -> Iterator[int]:
    """A length, and those that end one of a few bytes before it."""
    for cut in range(_LONGEST_CHARACTER_BYTES):
        if length > cut:
            yield length - cut


def _read(offset: int, length: int, proxy: Any) -> str | None:
    """None where a character may end behind this part; supervisord cannot say so."""
    try:
        return str(proxy.supervisor.readProcessStdoutLog(PROGRAM, offset, length))
    except xmlrpc.client.ProtocolError as error:
        if error.errcode != HTTPStatus.INTERNAL_SERVER_ERROR:
            raise
        return None


def _log_size(proxy: Any) -> int:
    _, size, _ = proxy.supervisor.tailProcessStdoutLog(PROGRAM, 0, 0)
    return int(size)


def _start(proxy: Any) -> bool:
    """Start a discovery; False where one runs already."""
    try:
        proxy.supervisor.startProcess(PROGRAM, False)
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != Faults.ALREADY_STARTED:
            raise
        return False
    return True


def _require_success(info: Any) -> None:
    if info["state"] == ProcessStates.EXITED and info["exitstatus"] == 0:
        return
    why = {
        ProcessStates.EXITED: f"exit status {info['exitstatus']}",
        ProcessStates.STOPPED: "it was stopped",
    }.get(info["state"], info["spawnerr"] or info["statename"])
    raise Failed(f"{PROGRAM}: ERROR ({why})")
