"""HAProxy: which one there is, whether it takes a configuration, and its runtime socket."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.errors import TransientError

OLDEST = (2, 6)

# Alerts that only say that there were others.
SUMMARIES = ("Some protocols failed", "Error(s) found in configuration", "Fatal errors found")

_VERSION = re.compile(r"HAProxy version (\d+)\.(\d+)\S*")
_ASK_SECONDS = 5.0
_CHECK_SECONDS = 20.0
_TIMEOUT_SECONDS = 1.0
_MOST_AT_ONCE_BYTES = 12 * 1024  # of a command; HAProxy's buffers hold 16 KiB at least
_LARGEST_ANSWER_BYTES = 4 * 1024 * 1024


class Unknown(TransientError):
    """HAProxy has no such backend."""


@dataclass(frozen=True, slots=True)
class Haproxy:
    """One that can serve as the gateway, or why it cannot."""

    path: str
    version: tuple[int, int]
    problem: str = ""


def find() -> Haproxy | None:
    """The one on PATH (or where distributions put it); None where there is none."""
    path = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        return None
    try:
        said = subprocess.run(
            [path, "-vv"], capture_output=True, timeout=_ASK_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        ).stdout.decode("utf-8", "replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Haproxy(path, (0, 0), f"it does not say its version: {error}")
    return parse_version(path, said)


def parse_version(path: str, said: str) -> Haproxy:
    """What `haproxy -vv` says, as far as we need it."""
    match = _VERSION.search(said)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < OLDEST:
        return Haproxy(path, version, "it is older than 2.6")
    missing = [feature for feature in ("LUA", "PROMEX") if f"+{feature}" not in said.split()]
    if missing:
        return Haproxy(path, version, f"it was built without {' and '.join(missing)}")
    return Haproxy(path, version)


def check(haproxy: Haproxy, config: Path) -> str:
    """Why it does not take this configuration; empty where it does."""
    try:
        done = subprocess.run(
            [haproxy.path, "-c", "-f", str(config)], capture_output=True,
            timeout=_CHECK_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{haproxy.path} could not check it: {error}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    alerts = [
        line for line in lines
        if "[ALERT]" in line and not any(word in line for word in SUMMARIES)
    ]  # fmt: skip
    return "; ".join(alerts or lines)[:1000] or f"exit status {done.returncode}"


@dataclass(frozen=True, slots=True)
class Server:
    """One model's server as HAProxy sees it."""

    is_up: bool
    is_draining: bool
    in_flight: int


class Runtime:
    """HAProxy's runtime socket. A connection for each command; for one thread.

    An answer takes no longer than `timeout_seconds`, however it comes.
    """

    def __init__(self, path: Path, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._path, self._timeout_seconds = str(path), timeout_seconds

    def pid(self) -> int:
        """Of the worker that answers; another one has what stands in its files.

        Raises:
            TransientError: nobody answers; as for all methods.
        """
        match = re.search(r"^Pid: (\d+)$", self.ask("show info"), re.MULTILINE)
        if match is None:
            raise TransientError("haproxy does not say its pid")
        return int(match[1])

    def servers(self) -> dict[str, Server]:
        """By program: its server `model`."""
        text = self.ask("show stat -1 4 -1").removeprefix("# ")
        try:
            return {
                line["pxname"]: _server(line)
                for line in csv.DictReader(io.StringIO(text))
                if line.get("svname") == "model"
            }
        except (KeyError, ValueError, AttributeError, csv.Error) as error:
            raise TransientError(f"cannot read haproxy's statistics: {error!a}") from None

    def drain(self, program: str) -> None:
        """New requests get no server of it; those under way go on."""
        self._do(f"set server {program}/model state drain")

    def admit(self, program: str) -> None:
        """It takes requests again as soon as it is up."""
        self._do(f"set server {program}/model state ready")

    def move(self, program: str, host: str, port: int) -> None:
        """Its server listens elsewhere from now on."""
        said = self.ask(f"set server {program}/model addr {host} port {port}")
        if "changed" not in said and "no need" not in said:
            raise _refusal(said)

    def replace_map(self, path: Path, entries: Mapping[str, str]) -> None:
        """All of a map at once. Keys have no blanks; values are one line of ASCII."""
        where = str(path).replace(" ", "\\ ")
        said = self.ask(f"prepare map {where}")
        match = re.search(r"New version created: (\d+)", said)
        if match is None:
            raise TransientError(f"haproxy has no map {path}: {_shown(said)}")
        version = match[1]
        try:
            for part in _parts(map_text(entries)):
                self._do(f"add map @{version} {where} <<\n{part}")
            self._do(f"commit map @{version} {where}")
        except TransientError:
            with contextlib.suppress(TransientError):  # else it would be kept for ever
                self.ask(f"clear map @{version} {where}")
            raise

    def _do(self, command: str) -> None:
        """A command that says nothing where all is well."""
        said = self.ask(command).strip()
        if said:
            raise _refusal(said)

    def ask(self, command: str) -> str:
        """What it answers to one command."""
        until = time.monotonic() + self._timeout_seconds
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
                link.settimeout(self._timeout_seconds)
                link.connect(self._path)
                link.sendall(command.encode("ascii", "replace") + b"\n")
                return _read(link, until).decode("utf-8", "replace")
        except OSError as error:
            raise TransientError(f"haproxy does not answer: {error}") from None


def map_text(entries: Mapping[str, str]) -> str:
    """The lines of a map, as they stand in its file and in a command."""
    return "".join(f"{key} {_one_line(value)}\n" for key, value in entries.items())


def _one_line(value: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in value)


def _parts(text: str) -> list[str]:
    """The lines of a map in pieces that are not too large for one command."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        if parts and len(parts[-1]) + len(line) <= _MOST_AT_ONCE_BYTES:
            parts[-1] += line
        else:
            parts.append(line)
    return parts


def _server(line: Mapping[str, str]) -> Server:
    status = line["status"]
    return Server(status.startswith(("UP", "DRAIN")), status.startswith("DRAIN"), int(line["scur"]))


def _refusal(said: str) -> TransientError:
    kind = Unknown if said.startswith(("No such backend", "No such server")) else TransientError
    return kind(f"haproxy: {_shown(said)}")


def _shown(said: str) -> str:
    return _one_line(said.strip())[:200]


def _read(link: socket.socket, until: float) -> bytes:
    """All that comes; one that dribbles does not hold us up.

    Raises:
        OSError: it did not end in time, or is larger than any answer.
    """
    parts: list[bytes] = []
    left = _LARGEST_ANSWER_BYTES
    while part := link.recv(65536):
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise OSError("it does not stop")
        rest = until - time.monotonic()
        if rest <= 0:
            raise TimeoutError("timed out")
        link.settimeout(rest)
    return b"".join(parts)
