"""Remembers what headers said, by file identity, in var/lib/headers.json. Only ever saves time.

Whatever is wrong with the file on disk, the answer is that of the header reader: a cache that is
torn, foreign or of another reader is rebuilt, and one that cannot be written is done without.

Values are checked here against the annotations of `Header`, as strictly as pydantic would: that
takes 0.1 s to be imported and built, a third of what a look at fifty known models may take.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from supervisor_synapse.adapters import gguf_header, store
from supervisor_synapse.core.catalog import printable
from supervisor_synapse.core.model import FileIdentity, Header, Problem
from supervisor_synapse.errors import CatalogError

_Found = Header | str  # or why there is no header


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
        self._seen: dict[FileIdentity, _Found] = {}

    def knows(self, identity: FileIdentity) -> bool:
        """Whether `header` can answer without reading the file."""
        return identity in self._seen or identity in self._kept

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
        entries = sorted(_encoded(identity, found) for identity, found in self._seen.items())
        try:
            store.write_json(self._path, {"reader": _reader(), "files": entries})
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


def peek(path: Path) -> HeaderCache:
    """What is remembered, for somebody who only looks: nothing is written, or set aside."""
    cache = HeaderCache(None)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and value.get("reader") == _reader():
            cache._kept = _decoded(value.get("files"))
    return cache


def _load(path: Path) -> dict[FileIdentity, _Found]:
    value = store.read_json(path)
    if not isinstance(value, dict) or value.get("reader") != _reader():
        return {}
    try:
        return _decoded(value.get("files"))
    except ValueError:
        store.set_aside(path)
        return {}


# --- entries: [device, inode, size, time, header by field or the reason why there is none] -------


def _encoded(identity: FileIdentity, found: _Found) -> list[Any]:
    content = found if isinstance(found, str) else _header_to_json(found)
    return [identity.device, identity.inode, identity.size_bytes, identity.mtime_ns, content]


def _header_to_json(header: Header) -> dict[str, Any]:
    """Fields by name, less those that have their default."""
    stated = {
        field.name: getattr(header, field.name)
        for field in fields(Header)
        if getattr(header, field.name) != field.default
    }
    return {
        name: value.value if isinstance(value, Enum) else value for name, value in stated.items()
    }


def _decoded(value: object) -> dict[FileIdentity, _Found]:
    """Raises ValueError where anything is not as `_encoded` would have it."""
    entries: dict[FileIdentity, _Found] = {}
    for entry in _typed(value, tuple[list[Any], ...]):
        *numbers, content = entry
        if [type(number) for number in numbers] != [int] * len(fields(FileIdentity)):
            raise ValueError("not an entry")
        identity = FileIdentity(*numbers)
        if isinstance(content, dict):
            entries[identity] = _header_from_json(content)
        else:
            entries[identity] = cast(str, _typed(content, str))
    return entries


def _header_from_json(content: Mapping[str, object]) -> Header:
    types = _types()
    if not types.keys() >= content.keys() >= {"kind", "architecture"}:
        raise ValueError("not the fields of a header")
    return Header(**{name: _typed(value, types[name]) for name, value in content.items()})


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Header)


def _typed(value: object, wanted: Any) -> Any:
    """`value`, as JSON has it, in the type `wanted`; ValueError where it is of another.

    Numbers are never negative here, and a boolean is none.
    """
    if wanted is int:
        if type(value) is int and value >= 0:
            return value
    elif get_origin(wanted) is tuple:
        if isinstance(value, list):
            return _typed_tuple(value, get_args(wanted))
    elif isinstance(wanted, UnionType):
        return None if value is None else _typed(value, _without_none(wanted))
    elif isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted(value)
    elif type(value) is (get_origin(wanted) or wanted):
        return value
    raise ValueError(f"not of type {wanted}")


def _typed_tuple(values: list[Any], types: tuple[Any, ...]) -> tuple[Any, ...]:
    if types[1:] == (...,):
        return tuple(_typed(value, types[0]) for value in values)
    return tuple(_typed(value, wanted) for value, wanted in zip(values, types, strict=True))


def _without_none(union: UnionType) -> Any:
    """The other member of `X | None`, the only kind of union that a header has."""
    (member,) = set(get_args(union)) - {NoneType}
    return member


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
