"""The program blocks in etc/conf.d as they stand there, each read when it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NO_FILE = "-"  # in place of a digest: something is there

_COMMAND = re.compile(r"^command\s*=\s*(.*?)(\s;.*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """One file; `stamp`: modification time and inode."""

    stamp: tuple[int, int]
    digest: str  # sha256 of its content; "" where it cannot be read


def scan(folder: Path, before: Mapping[str, OnDisk]) -> dict[str, OnDisk]:
    """The blocks by program name; those that are as they were `before` are not read again.

    Raises:
        OSError: the folder cannot be looked into.
    """
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(".conf"):
                continue
            name = entry.name.removesuffix(".conf")
            with contextlib.suppress(OSError):
                status = os.stat(entry.path)
                stamp = (status.st_mtime_ns, status.st_ino)
                known = before.get(name)
                if known is None or known.stamp != stamp:
                    known = OnDisk(stamp, _digest(entry.path, status))
                found[name] = known
    return found


def digest_there(path: Path) -> str:
    """The sha256 of one block; "" where there is none, `NO_FILE` where it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return _digest(str(path), status) or NO_FILE


def _digest(path: str, status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):  # a named pipe is not waited for
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def command_words(block: str) -> list[str]:
    """The words of a block's command; [] where it has none that can be read."""
    command = _COMMAND.search(block)
    try:
        return shlex.split(command[1].replace("%%", "%")) if command else []
    except ValueError:
        return []
