"""Blocks that shall be × blocks on disk → what must be done. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deployed:
    """One block as it stands on disk, by digest; `written`: what discovery ever wrote for it."""

    digest: str
    written: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Not edited by hand since discovery wrote it."""
        return self.digest in self.written


@dataclass(frozen=True, slots=True)
class Changes:
    """Program names by what must be done to their blocks."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # edited by hand: ours goes beside, as .conf.new

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def compare(
    desired: Mapping[str, str], deployed: Mapping[str, Deployed], forced: Iterable[str] = ()
) -> Changes:
    """Program name → digest of the block meant × blocks on disk.

    A block edited by hand wins, unless it is `forced`. One that discovery never wrote, under a
    name that no model has, is somebody else's program and is not looked at.
    """
    force = set(forced)
    changes: dict[str, list[str]] = {name: [] for name in Changes.__dataclass_fields__}
    for name, digest in desired.items():
        block = deployed.get(name)
        if block is None:
            changes["added"].append(name)
        elif block.digest == digest:
            changes["unchanged"].append(name)
        elif block.is_ours or name in force:
            changes["changed"].append(name)
        else:
            changes["kept"].append(name)
    for name, block in deployed.items():
        if name not in desired and block.written:
            changes["removed" if block.is_ours else "kept"].append(name)
    return Changes(**{name: tuple(sorted(names)) for name, names in changes.items()})
