"""HAProxy: which one there is, whether it takes a configuration, and its runtime socket."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.errors import TransientError

OLDEST = (2, 6)

_VERSION = re.compile(r"HAProxy version (\d+)\.(\d+)\S*")
_ASK_SECONDS = 5.0
_CHECK_SECONDS = 20.0
_TIMEOUT_SECONDS = 1.0
_LARGEST_ANSWER_BYTES = 4 * 1024 * 1024


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
    alerts = [line for line in lines if "[ALERT]" in line]
    return "; ".join(alerts or lines)[:1000] or f"exit status {done.returncode}"


@dataclass(frozen=True, slots=True)
class Server:
    """One model's server as HAProxy sees it."""

    is_up: bool
    is_draining: bool
    in_flight: int


class Runtime:
    """HAProxy's runtime socket. A connection for each command; for one thread."""

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
        return {
            line["pxname"]: Server(
                line["status"].startswith(("UP", "DRAIN")), line["status"].startswith("DRAIN"),
                int(line["scur"]),
            )
            for line in csv.DictReader(io.StringIO(text))
            if line.get("svname") == "model"
        }  # fmt: skip

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
            raise TransientError(f"haproxy did not take another address: {said.strip()[:200]}")

    def replace_map(self, path: Path, entries: Mapping[str, str]) -> None:
        """All of a map at once. Keys have no blanks; values are one line of ASCII."""
        said = self.ask(f"prepare map {path}")
        match = re.search(r"New version created: (\d+)", said)
        if match is None:
            raise TransientError(f"haproxy has no map {path}: {said.strip()[:200]}")
        version = match[1]
        if entries:
            self._do(f"add map @{version} {path} <<\n{map_text(entries)}")
        self._do(f"commit map @{version} {path}")

    def _do(self, command: str) -> None:
        """A command that says nothing where all is well."""
        said = self.ask(command).strip()
        if said:
            raise TransientError(f"haproxy: {said[:200]}")

    def ask(self, command: str) -> str:
        """What it answers to one command."""
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
                link.settimeout(self._timeout_seconds)
                link.connect(self._path)
                link.sendall(command.encode("ascii") + b"\n")
                return _read(link).decode("utf-8", "replace")
        except OSError as error:
            raise TransientError(f"haproxy does not answer: {error}") from None


def map_text(entries: Mapping[str, str]) -> str:
    """The lines of a map, as they stand in its file and in a command."""
    return "".join(f"{key} {_one_line(value)}\n" for key, value in entries.items())


def _one_line(value: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in value)


def _read(link: socket.socket) -> bytes:
    parts: list[bytes] = []
    left = _LARGEST_ANSWER_BYTES
    while left > 0 and (part := link.recv(min(left, 65536))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
