"""var/lib/registry.json: what was discovered and chosen, so that looking again changes nothing.

Names, ports and choices of models that are gone are kept: one that comes back is itself again.
Written by discovery alone; the listener and the commands read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store
from supervisor_synapse.core.model import Device, Program
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.settings import Settings

_VERSION = 1
_MOST_DIGESTS = 8
_NO_PORT = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that was found at some time."""

    name: str
    key: str
    choice: Choice
    digests: tuple[str, ...]  # sha256 of what discovery writes; with older ones until that is done
    present: bool  # found the last time


@dataclass(frozen=True, slots=True)
class Registry:
    """All entries by model key, and the programs in the order in which they start.

    `settings` are those that were applied: a synapse.conf that broke since changes nothing.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    programs: tuple[Program, ...] = ()
    settings: Settings = field(default_factory=Settings)
    generation: int = 0
    demo: bool = False  # the generated model is wanted beside others
    devices: tuple[Device, ...] = ()  # as the engine listed them; what was free then is left out
    successors: Mapping[str, str] = field(default_factory=dict)
    # models that the settings replace by another quantization → that
    untold: Mapping[str, str] = field(default_factory=dict)
    # programs of which supervisord is still to be told → digest of the block; "": it is removed
    version: int = _VERSION

    def names(self) -> dict[str, str]:
        """Model key → program name."""
        return {key: entry.name for key, entry in self.entries.items()}

    def choices(self) -> dict[str, Choice]:
        """Model key → what was chosen for it.

        One that was away while its port went to another has no claim to it any more.
        """
        in_use = {entry.choice.port for entry in self.entries.values() if entry.present}
        return {
            key: replace(entry.choice, port=_NO_PORT)
            if not entry.present and entry.choice.port in in_use
            else entry.choice
            for key, entry in self.entries.items()
        }

    def digests(self) -> dict[str, tuple[str, ...]]:
        """Program name → what discovery wrote for it."""
        return {entry.name: entry.digests for entry in self.entries.values()}

    def paths(self) -> dict[str, str]:
        """Model key → the path by which its own file is served."""
        return {
            program.key: program.ladder[0].model_path if program.ladder else program.model_path
            for program in self.programs
        }


_REGISTRY = TypeAdapter(Registry)


def with_digest(digests: tuple[str, ...], digest: str) -> tuple[str, ...]:
    """`digest` first, each once, the oldest forgotten."""
    return (digest, *(d for d in digests if d != digest))[:_MOST_DIGESTS]


def load(path: Path) -> Registry:
    """The registry; an empty one where there is none.

    One that does not validate, or is of another version, is set aside: nobody writes over it.
    """
    value = store.read_json(path)
    if value is None:
        return Registry()
    try:
        registry = _REGISTRY.validate_python(value)
    except ValidationError:
        registry = None
    if registry is None or registry.version != _VERSION:
        store.set_aside(path)
        return Registry()
    return registry


def peek(path: Path) -> Registry | None:
    """The registry as it stands, which is left where it is; None where it cannot be used."""
    try:
        registry = _REGISTRY.validate_json(path.read_bytes())
    except FileNotFoundError:
        return Registry()
    except (OSError, ValueError, RecursionError):
        return None
    return registry if registry.version == _VERSION else None


def told(registry: Registry, name: str) -> Registry:
    """The registry when supervisord has taken up what became of a program."""
    rest = {one: digest for one, digest in registry.untold.items() if one != name}
    return replace(registry, untold=rest)


def settled(registry: Registry) -> Registry:
    """The registry when all blocks stand: only the newest text of each is ours."""
    entries = {
        key: replace(entry, digests=entry.digests[:1]) for key, entry in registry.entries.items()
    }
    return replace(registry, entries=entries)


def is_same(one: Registry, other: Registry) -> bool:
    """Whether nothing differs but the reasons, which name the memory that was free just then."""
    return _without_reasons(one) == _without_reasons(other)


def _without_reasons(registry: Registry) -> Registry:
    programs = tuple(replace(program, reason="") for program in registry.programs)
    return replace(registry, programs=programs)


def save(path: Path, registry: Registry) -> None:
    """Write the registry, whole or not at all.

    Raises:
        OSError: nothing was changed.
    """
    store.write_json(path, _REGISTRY.dump_python(registry, mode="json"))
