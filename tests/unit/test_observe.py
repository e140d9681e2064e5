"""What a run leaves behind is looked for, ended and told; what is a stranger's is only told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from supervisor_synapse.adapters import processes
from supervisor_synapse.adapters.supervisord import Process
from supervisor_synapse.core.model import ProcessState
from supervisor_synapse.core.settings import ProbePolicy
from supervisor_synapse.core.state import Seen
from supervisor_synapse.observe import Observer, Wanted, used_since
from tests.ports import free_port
from tests.unit.builders import program

# Leads a group, as a launcher does; its child heeds no TERM, and may leave the group.
_RUN = (
    "import os, signal, sys\n"
    "if not os.fork():\n"
    "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "    print(os.getpid(), flush=True)\n"
    "    signal.pause()\n"
    "signal.pause()\n"
)
_DEADLINE_SECONDS = 20.0


class Run:
    """A process that leads a group of its own, and one that it started."""

    def __init__(self, port: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _RUN, "--", "llama-server", "--port", str(port)],
            stdout=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        """Its leader ends and is buried, as supervisord does it."""
        self.process.kill()
        self.process.wait(_DEADLINE_SECONDS)


@contextlib.contextmanager
def running(port: int = 8100) -> Iterator[Run]:
    run = Run(port)
    try:
        yield run
    finally:
        run.end()
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.child, signal.SIGKILL)
        assert run.process.stdout is not None
        run.process.stdout.close()


def is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# --- a group whose leader is gone -----------------------------------------------------------------


def test_what_is_left_of_a_group_is_found_by_the_number_of_its_leader() -> None:
    with running() as run:
        run.end()
        assert processes.group_of(run.pid) == {run.child}


def test_a_group_whose_leader_lives_is_none_of_what_is_left() -> None:
    """Its number may be someone else's by now."""
    with running() as run:
        assert processes.group_of(run.pid) == frozenset()


def test_a_zombie_is_not_left_of_a_group() -> None:
    """It holds nothing; who has to bury it will."""
    with running() as run, subprocess.Popen(["/bin/sleep", "60"], process_group=run.pid) as other:
        run.end()
        assert processes.group_of(run.pid) == {run.child, other.pid}
        other.kill()
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while processes.group_of(run.pid) != {run.child}:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_a_group_that_there_is_none_of_nothing_is_left() -> None:
    assert processes.group_of(2**22 + 7) == frozenset()


def test_all_are_killed_and_those_that_are_gone_are_passed_over() -> None:
    with running() as run:
        run.end()
        processes.kill_all(frozenset({2**22 + 7, run.child}))
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not is_dead(run.child):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes.kill_all(frozenset({run.child}))


# --- a stop is verified ---------------------------------------------------------------------------


def process_of(pid: int) -> Process:
    """supervisord's word about a run that is up."""
    return Process("a", "a", ProcessState.RUNNING, pid, 1000, 0, 1001, 0, "", "/dev/null")


async def _seen_after_the_end(run: Run, port: int) -> tuple[list[Seen], float]:
    """What is seen of a run from its end on until it is verified, and how long that took."""
    observer = Observer(lambda: None)
    meant, wanted = program(name="a", port=port), {"a": Wanted(True, "chosen")}
    up = process_of(run.pid)
    looks = []
    try:
        await observer.look([meant], {"a": up}, wanted, {}, ProbePolicy())
        run.end()
        down, begun = replace(up, state=ProcessState.STOPPED, pid=0), time.monotonic()
        while not looks or looks[-1].is_leaving:
            assert time.monotonic() - begun < _DEADLINE_SECONDS
            looks += await observer.look([meant], {"a": down}, wanted, {}, ProbePolicy())
            await asyncio.sleep(0.02)
        return looks, time.monotonic() - begun
    finally:
        observer.close()


def test_a_stop_is_verified_only_when_what_it_left_is_ended() -> None:
    port = free_port()
    with running(port) as run:
        looks, _ = asyncio.run(_seen_after_the_end(run, port))
        assert looks[0].is_leaving
        assert is_dead(run.child)
        assert looks[-1].residue == ""


def test_a_clean_stop_is_verified_at_once() -> None:
    port = free_port()
    with running(port) as run:
        os.kill(run.child, signal.SIGKILL)
        looks, seconds = asyncio.run(_seen_after_the_end(run, port))
        assert looks[-1].residue == ""
        assert seconds < 1.0


def test_a_port_that_is_still_listened_on_is_told_and_its_holder_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with running(port) as run:
            looks, _ = asyncio.run(_seen_after_the_end(run, port))
        assert looks[-1].residue.startswith(f"port {port} is listened on by ")
        assert f"(pid {os.getpid()})" in looks[-1].residue


@pytest.mark.parametrize(
    ("lines", "used"),
    [
        (b"", False),
        (b"0.02 I srv  update_slots: all slots are idle\n" * 3, False),
        (b"0.02 I slot launch_slot_: processing task\n0.03 I srv  all slots are idle\n", True),
        (b"half of a li", False),
        (b"x\n" * 20_000, True),
    ],
)
def test_our_own_questions_are_no_use_of_a_server(tmp_path: Path, lines: bytes, used: bool) -> None:
    """Only whole lines count, and each of them once."""
    log = tmp_path / "m.log"
    log.write_bytes(b"loaded\n")
    reached, at_first = used_since(log, -1)
    assert (reached, at_first) == (7, True)
    log.write_bytes(b"loaded\n" + lines)
    reached, found = used_since(log, reached)
    assert found is used
    assert used_since(log, reached) == (reached, False)
