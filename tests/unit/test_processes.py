"""What the machine says of processes; a process that is gone is no error."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from supervisor_synapse.adapters import processes

_HOLD = "x = b'x' * {size}; print('ready', flush=True); input()"
_MIB = 1024 * 1024


@contextlib.contextmanager
def holding(size_bytes: int, *, wrapped: int = 0, thread: bool = False) -> Iterator[int]:
    """The pid of a process that holds so much, itself or through so many that wait for a child."""
    code = _HOLD.format(size=size_bytes)
    for _ in range(wrapped):
        call = f"subprocess.run([sys.executable, '-S', '-c', {code!r}])"
        if thread:
            call = f"t = threading.Thread(target=lambda: {call}); t.start(); t.join()"
        code = f"import subprocess, sys, threading; {call}"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.communicate(b"\n", timeout=10)


def gone() -> int:
    """The pid of a process that has ended and was buried."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        process.wait(10)
    return process.pid


def test_the_command_of_a_process_is_its_words() -> None:
    with holding(1) as pid:
        assert processes.command(pid) == (sys.executable, "-S", "-c", _HOLD.format(size=1))


def test_a_process_that_is_gone_has_no_command_and_no_memory() -> None:
    pid = gone()
    assert processes.command(pid) == ()
    assert processes.resident_bytes(pid) is None


def test_a_zombie_has_no_command_and_breaks_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert processes.command(process.pid) == ()
    assert not processes.resident_bytes(process.pid)
    process.wait()


def test_no_process_has_number_zero() -> None:
    """supervisord's pid of what does not run."""
    assert processes.command(0) == ()
    assert not processes.resident_bytes(0)


def test_a_process_holds_what_it_took() -> None:
    with holding(40 * _MIB) as pid:
        held = processes.resident_bytes(pid)
    assert held is not None
    assert 40 * _MIB < held < 80 * _MIB


@pytest.mark.parametrize("wrapped", [1, 2])
@pytest.mark.parametrize("thread", [False, True])
def test_what_its_descendants_hold_counts(wrapped: int, thread: bool) -> None:
    """A wrapper script may stand between the launcher and the server."""
    with holding(60 * _MIB, wrapped=wrapped, thread=thread) as pid:
        held = processes.resident_bytes(pid)
    assert held is not None
    assert held > 60 * _MIB
