"""Whether a blob of a hub cache still holds what its name says: streamed, a few MiB at a time.

A blob is named by its content: sha256 for large files (LFS), git's own hash for small ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_CHUNK_BYTES = 4 * 1024 * 1024


def can_tell(name: str) -> bool:
    """Whether a blob of this name can be compared with its content."""
    return bool(_SHA256.fullmatch(name) or _GIT.fullmatch(name))


def is_whole(path: Path, name: str, read: Callable[[int], None] = lambda _: None) -> bool:
    """Whether the content of `path` is what a blob of this name holds.

    `read` is told of each so many bytes that were read.

    Raises:
        OSError: it cannot be read.
        ValueError: a blob of this name cannot be compared.
    """
    if _SHA256.fullmatch(name):
        return sha256_of(path, read) == name
    if not _GIT.fullmatch(name):
        raise ValueError(f"{name!a} names no content")
    start = hashlib.sha1(f"blob {os.stat(path).st_size}\0".encode(), usedforsecurity=False)
    return _digest(path, start, read) == name


def sha256_of(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """The sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    return _digest(path, hashlib.sha256(), read)


def _digest(path: Path, digest: hashlib._Hash, read: Callable[[int], None]) -> str:
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()
