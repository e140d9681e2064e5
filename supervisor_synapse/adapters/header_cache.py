"""Remembers what headers said, by file identity, in var/lib/headers.json. Only ever saves time.

Whatever is wrong with the file on disk, the answer is that of the header reader: a cache that is
torn, foreign or of another reader is rebuilt, and one that cannot be written is done without.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import gguf_header, store
from supervisor_synapse.core.catalog import printable
from supervisor_synapse.core.model import FileIdentity, Header, Problem
from supervisor_synapse.errors import CatalogError


@dataclass(frozen=True, slots=True)
class _Entry:
    identity: FileIdentity
    found: Header | str  # or why there is no header


_ENTRIES = TypeAdapter(list[_Entry])


def identity_of(status: os.stat_result) -> FileIdentity:
    """What `stat` says of a file's content."""
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class HeaderCache:
    """Headers by identity. Holds what is kept on disk, and what this run has seen.

    Threads may call `header` at the same time: at worst a header is read twice.
    """

    def __init__(
        self,
        path: Path | None = None,
        read: Callable[[str], Header] = gguf_header.read,
    ) -> None:
        """`path` None: nothing is kept beyond this run. `read` raises CatalogError."""
        self._path = path
        self._read = read
        self._kept = _load(path) if path else {}
        self._seen: dict[FileIdentity, Header | str] = {}

    def header(self, path: str, identity: FileIdentity) -> Header:
        """The header of the file at `path`, whose identity the caller has just taken.

        Raises:
            CatalogError: it has none that can be used.
        """
        found = self._seen.get(identity) or self._kept.get(identity)
        if found is None:
            return self._read_anew(path, identity)
        self._seen[identity] = found
        if isinstance(found, str):
            raise CatalogError(found)
        return found

    def save(self) -> Problem | None:
        """Keep what this run has seen, and only that; nothing is written where nothing is new."""
        if self._path is None or self._seen == self._kept or not self._path.parent.is_dir():
            return None
        entries = [_Entry(identity, found) for identity, found in self._seen.items()]
        entries.sort(key=lambda entry: (entry.identity.device, entry.identity.inode))
        value = {
            "reader": _reader(),
            "files": _ENTRIES.dump_python(entries, mode="json", exclude_defaults=True),
        }
        try:
            store.write_json(self._path, value)
        except OSError as error:
            return Problem(
                printable(str(self._path)),
                f"cannot be written: {error.strerror or 'unknown error'}; "
                "headers will be read again the next time",
                "free disk space, or mend the permissions",
            )
        self._kept = dict(self._seen)
        return None

    def _read_anew(self, path: str, identity: FileIdentity) -> Header:
        try:
            header = self._read(path)
        except CatalogError as error:
            # Permissions and I/O errors may pass without the file's identity changing.
            if not isinstance(error.__context__, OSError):
                self._keep(path, identity, str(error))
            raise
        self._keep(path, identity, header)
        return header

    def _keep(self, path: str, identity: FileIdentity, found: Header | str) -> None:
        """Unless the file was changed while it was read."""
        try:
            unchanged = identity_of(os.stat(path)) == identity
        except OSError:
            return
        if unchanged:
            self._seen[identity] = found


def _load(path: Path) -> dict[FileIdentity, Header | str]:
    value = store.read_json(path)
    if not isinstance(value, dict) or value.get("reader") != _reader():
        return {}
    try:
        entries = _ENTRIES.validate_python(value.get("files"))
    except ValidationError:
        store.set_aside(path)
        return {}
    return {entry.identity: entry.found for entry in entries}


def _reader() -> list[object]:
    """What a header depends on beside the file: the facts kept, the reader, gguf's tables.

    By size and time of the code, so that neither an update nor an edit needs a version bumped.
    """
    code = [gguf_header.__file__]
    package = importlib.util.find_spec("gguf")
    if package is not None and package.origin is not None:
        code.append(str(Path(package.origin).with_name("constants.py")))
    return [[field.name for field in fields(Header)], *map(_state, code)]


def _state(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
