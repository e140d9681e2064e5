"""Runs one command and ends it in time, also when nobody is left who waits for it.

    python hook_guard.py CONTROL SECONDS COMMAND [ARGUMENT ...]

The command leads a process group of its own. It is over when that group is empty, so what it put
into the background has its time too. What is left of the group after SECONDS, or when the other end
of the file descriptor CONTROL is closed (by the death of whoever asked), is killed. Standard
library only, imports nothing of the package, and as little as it can: it is started for each
notice. Exit status: the command's, 128 and its signal, 127 where it could not be run, 124 where
something had to be killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

TIMED_OUT = 124
_NOT_RUN = 127
_SIGNALLED = 128
_POLL_SECONDS = 0.03


def main(arguments: list[str]) -> int:
    """Run the command; the exit status to end with."""
    control, seconds, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    os.set_inheritable(control, False)
    deadline = time.monotonic() + seconds
    leader = os.fork()
    if leader == 0:
        _become(command)
    with contextlib.suppress(OSError):  # done by the command itself already
        os.setpgid(leader, leader)
    return _watch(leader, control, deadline)


def _become(command: list[str]) -> None:
    """Never returns. Python ignores these signals, and so would the command."""
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execv(command[0], command)  # noqa: S606 - no shell: that is what is wanted
    except OSError as error:
        os.write(2, f"cannot run {command[0]!a}: {error.strerror}\n".encode())
    os._exit(_NOT_RUN)


def _watch(leader: int, control: int, deadline: float) -> int:
    status: int | None = None
    parent = select.poll()
    parent.register(control, select.POLLIN)
    while True:
        status = _status(leader) if status is None else status
        if status is not None and not _has_members(leader):
            return status
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0 or parent.poll(min(left_seconds, _POLL_SECONDS) * 1000):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(leader, signal.SIGKILL)
            return TIMED_OUT


def _status(leader: int) -> int | None:
    """Its exit status; None while it runs."""
    pid, raw = os.waitpid(leader, os.WNOHANG)
    if pid == 0:
        return None
    code = os.waitstatus_to_exitcode(raw)
    return code if code >= 0 else _SIGNALLED - code


def _has_members(group: int) -> bool:
    """Whether anybody is left; the group's number is not given away while somebody is."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # all that is left changed its user, or (on macOS) are zombies
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
