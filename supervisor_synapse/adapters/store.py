"""State on disk: written whole or not at all, and a torn file costs only itself.

Every file under var/lib goes through `write_json`/`read_json`. A file that does not parse is
set aside as `<name>.corrupt` and treated as absent, so that whoever owns it rebuilds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from supervisor_synapse.errors import TransientError

_log = logging.getLogger("synapse")

_T = TypeVar("_T")

_LARGEST_STATE_BYTES = 64 * 1024 * 1024
_LOCK_POLL_SECONDS = 0.01


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace `path` by `text` (UTF-8): temporary file beside it, fsync, rename, fsync the folder.

    Raises:
        OSError: nothing was changed (disk full, read-only, missing folder).
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are left to their ways."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Like `write_text`, for a JSON value. ASCII only, so that any reader can show it."""
    write_text(path, json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def read_json(path: Path) -> object | None:
    """The JSON value in `path`; None where there is none, or where it was torn and set aside."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):  # a named pipe is not waited for
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            value: object = json.loads(_bounded(file))
        except OSError:
            return None
        except (ValueError, RecursionError):
            value = None
    if value is None:
        _set_aside_same(path, info)
    return value


def load_state(path: Path, load: Callable[[Path], _T]) -> _T:
    """What is remembered in a file; that it was torn, and so set aside, is said."""
    was_there = path.exists()
    found = load(path)
    if was_there and not path.exists():
        _log.warning("state was torn and is set aside", extra={"path": f"{path}.corrupt"})
    return found


def _bounded(file: BinaryIO) -> bytes:
    data = file.read(_LARGEST_STATE_BYTES + 1)
    if len(data) > _LARGEST_STATE_BYTES:
        raise ValueError("too large to be ours")
    return data


def _set_aside_same(path: Path, read: os.stat_result) -> None:
    """Unless another process has rebuilt it meanwhile."""
    with contextlib.suppress(OSError):
        now = path.stat()
        if (now.st_ino, now.st_mtime_ns) == (read.st_ino, read.st_mtime_ns):
            set_aside(path)


def set_aside(path: Path) -> None:
    """Keep what cannot be used as `<name>.corrupt`, out of the way of its rebuilding."""
    with contextlib.suppress(OSError):
        os.replace(path, path.with_name(path.name + ".corrupt"))


@contextlib.contextmanager
def exclusive(
    path: Path, whose: str = "another discovery", wait_seconds: float = 0
) -> Iterator[None]:
    """Hold the lock file `path` for the block; it is freed by the kernel if we die.

    Raises:
        TransientError: another process (`whose`, in words) holds it, and has for `wait_seconds`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_seconds
    try:
        while not _lock(descriptor):
            if time.monotonic() >= deadline:
                raise TransientError(f"cannot lock {path}: {whose} is running; wait for it to end")
            time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
