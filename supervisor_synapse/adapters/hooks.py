"""Tells somebody outside by a command; webhooks.py posts to a URL. What goes wrong is a value.

Each call is bounded in time, in what it reads and in what it leaves behind; it blocks, so it
belongs on a thread. No text from outside becomes a word of a command line: a notice is JSON, on
stdin or as the body. Keys stand in a file of their own, and in no command line, log or answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import hook_guard
from supervisor_synapse.adapters.deployment import require_private
from supervisor_synapse.core.failures import printable
from supervisor_synapse.errors import ConfigError

_GUARD = Path(hook_guard.__file__)
_GRACE_SECONDS = 5.0  # the guard keeps the time; this is for a machine out of breath
_KEPT_OUTPUT_BYTES = 2048
_SOON_SECONDS = 0.05
_LARGEST_HEADER_FILE_BYTES = 16 * 1024
_HEADER = re.compile(r"([A-Za-z0-9-]{1,64}):[ \t]*([\x20-\x7e]{1,4096})")
_OWN_HEADERS = frozenset(
    {"host", "content-length", "content-type", "transfer-encoding", "connection"}
)

# What a command may need to find its way; all else may hold a key, and stays here.
_VARIABLES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM",
    "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went; no `problem`: well. `may_pass`: the same once more may go better."""

    problem: str = ""
    output: str = ""  # what a command had printed, or a server answered, when it failed
    may_pass: bool = False


# --- a command -----------------------------------------------------------------------------------


def run_command(words: Sequence[str], text: str, seconds: float, folder: Path) -> Outcome:
    """Run a program in `folder` with `text` on its stdin, for at most so long.

    It and what it started are killed after that, or when this process dies.
    """
    problem = command_problem(words)
    if problem:
        return Outcome(problem)
    with _guarded(words, seconds, folder) as guard:
        _hand_over(guard, text)
        output = _output(guard, time.monotonic() + seconds + _GRACE_SECONDS)
        status = _end_of(guard)
    if status == 0:
        return Outcome()
    return Outcome(_in_words(status, seconds), printable(output.decode("utf-8", "replace")))


def command_problem(words: Sequence[str]) -> str:
    """Why a command must or can not be run, and how to mend it; "" where it can."""
    program = words[0]
    try:
        if not stat.S_ISREG(os.stat(program).st_mode) or not os.access(program, os.X_OK):
            return f"{program}: is no program: chmod u+x {program}"
        require_private([Path(program)])
    except OSError as error:
        return f"{program}: {error.strerror}"
    except ConfigError as error:
        return str(error)
    return _replaceable(program)


def _replaceable(program: str) -> str:
    """Neither the program nor what its name leads to may be exchanged by just anybody."""
    for folder in sorted({os.path.dirname(program), os.path.dirname(os.path.realpath(program))}):
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return (
                f"{folder}: others may write to the folder of a command that is run: "
                f"chmod o-w {folder}"
            )
    return ""


@contextlib.contextmanager
def _guarded(
    words: Sequence[str], seconds: float, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The guard, with the command below it; nothing of either is left at the end."""
    control, ours = os.pipe()
    command = [sys.executable, "-I", "-S", str(_GUARD), str(control), str(seconds), *words]
    try:
        guard = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=(control,), start_new_session=True, cwd=folder, env=environment(folder),
        )  # fmt: skip
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(control)
    with guard:
        try:
            yield guard
        finally:
            os.close(ours)


def environment(folder: Path) -> dict[str, str]:
    """Ours, without anything that may be a secret; and where the deployment is."""
    kept = {k: v for k, v in os.environ.items() if k in _VARIABLES or k.startswith("LC_")}
    return kept | {"SYNAPSE_PREFIX": str(folder)}


def _hand_over(guard: subprocess.Popen[bytes], text: str) -> None:
    """A command that does not read, or has ended, is none the worse for it."""
    assert guard.stdin is not None  # noqa: S101 - a pipe was asked for
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.write(text.encode("ascii"))
        guard.stdin.flush()
    with contextlib.suppress(BrokenPipeError):
        guard.stdin.close()


def _output(guard: subprocess.Popen[bytes], deadline: float) -> bytes:
    """The last of what was printed; all is read, so that nobody waits for us."""
    assert guard.stdout is not None  # noqa: S101 - a pipe was asked for
    kept = b""
    with selectors.DefaultSelector() as pipe:
        pipe.register(guard.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if pipe.select(_SOON_SECONDS):
                piece = os.read(guard.stdout.fileno(), 65536)
                if not piece:
                    break
                kept = (kept + piece)[-_KEPT_OUTPUT_BYTES:]
            elif guard.poll() is not None:  # who holds the pipe now has left the group
                break
    return kept


def _end_of(guard: subprocess.Popen[bytes]) -> int:
    try:
        return guard.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        guard.kill()
        return hook_guard.TIMED_OUT


def _in_words(status: int, seconds: float) -> str:
    if status == hook_guard.TIMED_OUT:
        return f"had not ended after {seconds:g} s, and was killed"
    return f"ended with status {status}"


# --- a webhook -----------------------------------------------------------------------------------


def read_headers(path: Path) -> dict[str, str]:
    """The header lines of a file that is for our eyes only.

    Raises:
        ConfigError: it is not, or it holds something else; never quotes what it holds.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _require_secret(path, os.fstat(descriptor))
            content = file.read(_LARGEST_HEADER_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    if len(content) > _LARGEST_HEADER_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {_LARGEST_HEADER_FILE_BYTES} bytes")
    return _parsed_headers(path, content.decode("utf-8", "replace"))


def _require_secret(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{path}: is not a regular file")
    if info.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path}: belongs to user {info.st_uid}, not to you: chown it")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"{path}: others may read or write the keys in it: chmod 600 {path}")


def _parsed_headers(path: Path, text: str) -> dict[str, str]:
    headers = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _HEADER.fullmatch(line.rstrip())
        if match is None:
            raise ConfigError(f"{path}, line {number}: is not `Name: value` in plain ASCII")
        if match[1].lower() in _OWN_HEADERS:
            raise ConfigError(f"{path}, line {number}: {match[1]} is not for you to set")
        headers[match[1]] = match[2]
    return headers


def problems(command: Sequence[str], header_file: str) -> tuple[str, ...]:
    """What keeps hooks from being used as the settings name them, each with how to mend it."""
    found = [command_problem(command)] if command else []
    if header_file:
        try:
            read_headers(Path(header_file))
        except ConfigError as error:
            found.append(str(error))
    return tuple(problem for problem in found if problem)
