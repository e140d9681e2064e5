"""Asks the engine what a model would take, without loading it.

    llama-server --model FILE <the real arguments> --fit on --log-verbosity 5 --port 0 …

The engine lays out the model, its caches and its scratch on the real devices without memory for
them, prints a table, and would then load. It is killed at the line after the table: by then it has
read the header and made a context in each driver, and nothing more.

One at a time, over all threads and processes that name the same lock: what a driver takes for a
context (CUDA: up to 550 MiB) is gone again before the next one asks. Each has a process group of
its own, which is killed whatever happens; on Linux the kernel does so where we die first.

At verbosity 4 the scratch is rounded and the buffer for what comes out is left out, which is 4 MiB
for 262,144 tokens and four slots. `--no-warmup` is not given: it would leave a projector's scratch
out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from supervisor_synapse.adapters import store
from supervisor_synapse.adapters.engine import without_flags
from supervisor_synapse.core.load_log import Loaded, ends_dry_run, parse_dry_run
from supervisor_synapse.core.model import Engine
from supervisor_synapse.core.settings import MIB
from supervisor_synapse.errors import TransientError

LEAST_FREE_BYTES = 600 * MIB  # a context and the vocabulary, with room

_ANSWER_SECONDS = 30.0  # a vocabulary of 262,144 takes one; a driver that wakes up, several
_KILL_SECONDS = 5.0  # a driver may take its time to give memory back
_LOCK_POLL_SECONDS = 0.02
_LARGEST_OUTPUT_BYTES = 4 * MIB
_LONGEST_LINE = 4096
_PR_SET_PDEATHSIG = 1

# What is asked for by us, would send the table elsewhere, or is nobody's business here.
_DROPPED_WITH_VALUE = frozenset({
    "--port", "--host", "--fit", "-fit", "--log-verbosity", "--verbosity", "-lv", "--log-file",
    "--log-colors", "--api-key", "--api-key-file", "--ssl-key-file", "--ssl-cert-file",
    "--model", "-m",
})  # fmt: skip
_DROPPED = frozenset({"--log-disable", "--verbose", "--log-verbose", "-v", "--no-warmup"})
_DROPPED_VARIABLES = (
    "LLAMA_LOG_", "LLAMA_ARG_LOG_", "LLAMA_API_KEY", "LLAMA_ARG_API_KEY", "LLAMA_ARG_SSL_",
)  # fmt: skip


def ask(
    engine: Engine,
    model_path: str,
    arguments: Sequence[str],
    *,
    free_bytes: int,
    lock: Path,
    seconds: float = _ANSWER_SECONDS,
) -> Loaded | None:
    """What the engine says that the model would take, started with these arguments.

    `free_bytes`: the least that is free on any device of the engine's, the host included; below
    `LEAST_FREE_BYTES` nothing is asked. `lock` is made where it does not exist. None where nothing
    could be told within `seconds`, whatever the reason; the wait for others is part of them.
    """
    if free_bytes < LEAST_FREE_BYTES or "--fit" not in engine.flags:
        return None
    deadline = time.monotonic() + seconds
    try:
        with contextlib.ExitStack() as held:
            _take(held, lock, deadline)
            return parse_dry_run(_output(command(engine, model_path, arguments), deadline))
    except (OSError, TransientError, subprocess.SubprocessError):
        return None


def command(engine: Engine, model_path: str, arguments: Sequence[str]) -> list[str]:
    """The command line that asks: the real one, but for what must not be shared with it."""
    own = ["--fit", "on", "--log-verbosity", "5", "--host", "127.0.0.1", "--port", "0"]
    if "--offline" in engine.flags:
        own.append("--offline")
    kept = without_flags(arguments, _DROPPED_WITH_VALUE, _DROPPED)
    return [engine.path, "--model", model_path, *kept, *own]


def _take(held: contextlib.ExitStack, lock: Path, deadline: float) -> None:
    """Hold the lock file until `held` is closed.

    Raises:
        TransientError: others held it until the deadline.
    """
    while True:
        try:
            held.enter_context(store.exclusive(lock))
            return
        except TransientError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOCK_POLL_SECONDS)


def _output(words: Sequence[str], deadline: float) -> str:
    """What a process prints up to the line that ends a dry run, or to the deadline; it is killed.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        bufsize=0, env=_environment(os.environ), start_new_session=True,
        # Only a call that was looked up before the fork: other threads may hold any lock there.
        preexec_fn=_death_signal(os.getpid()),
    )  # fmt: skip
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    with process.stdout as pipe:
        try:
            printed = _read(pipe.fileno(), deadline)
        finally:
            _end(process)
    return printed.decode("utf-8", "replace")


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_DROPPED_VARIABLES)
    }
    return kept | {"GGML_NO_BACKTRACE": "1"}  # a crash would call a debugger


def _read(descriptor: int, deadline: float) -> bytes:
    """At least up to the line that ends a dry run; less at end of file or the deadline."""
    printed, line = bytearray(), b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(printed) < _LARGEST_OUTPUT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            break
        chunk = os.read(descriptor, 65536)
        if not chunk:
            break
        printed += chunk
        *lines, line = (line[:_LONGEST_LINE] + chunk).split(b"\n")
        if any(map(_is_last, lines)):
            break
    return bytes(printed)


def _is_last(line: bytes) -> bool:
    return b"fit" in line and ends_dry_run(line.decode("utf-8", "replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the whole group, and reap its leader. Until then nobody else can have its number."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def _death_signal(parent: int) -> Callable[[], None] | None:
    """Makes the kernel kill a child when the thread that made it ends; Linux only."""
    if sys.platform != "linux":
        return None
    zero = ctypes.c_ulong(0)
    kill = ctypes.c_ulong(signal.SIGKILL)
    prctl = ctypes.CDLL(None).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, kill, zero, zero, zero)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
