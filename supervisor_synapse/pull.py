"""`synapse pull REPO[:QUANT]`: says what will be downloaded and whether it fits, then does it.

Only the disk can refuse: what memory does not hold today another day may, and the plan decides.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import hfcache, hub
from supervisor_synapse.adapters.gpu import cpu
from supervisor_synapse.core.catalog import PLAIN_REPO, printable
from supervisor_synapse.core.model import Device
from supervisor_synapse.core.offers import (
    HubFile,
    Offer,
    asked_for,
    offers,
    preferred,
    projector_of,
)
from supervisor_synapse.core.plan import mib
from supervisor_synapse.core.settings import MIB, Settings
from supervisor_synapse.errors import ApplyError, ConfigError

_WANTED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}")
_SPARE_BYTES = 8 * MIB  # a file system that is full to the brim serves nobody
_MOST_NAMED = 12
_ANSWER_SECONDS = 10.0
# Beside its weights a model takes scratch and a context, of which only its header would tell.
_BESIDE_WEIGHTS = 1.15
_BESIDE_BYTES = 256 * MIB

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be downloaded, and from where to where."""

    listing: hub.Listing
    offer: Offer
    projector: HubFile | None
    others: tuple[Offer, ...]
    cache: Path

    @property
    def files(self) -> tuple[HubFile, ...]:
        return self.offer.files if self.projector is None else (*self.offer.files, self.projector)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What is not here yet."""
        return hub.missing_bytes(self.cache, self.listing.repo, self.files)


def parse(what: str) -> tuple[str, str]:
    """`REPO[:QUANT]` -> repo, quantization ("" where none was named).

    Raises:
        ConfigError: it is neither.
    """
    repo, colon, wanted = what.removeprefix("hf.co/").partition(":")
    if not PLAIN_REPO.fullmatch(repo) or "/" not in repo:
        raise ConfigError(f"{what!a} names no repo: OWNER/NAME, or OWNER/NAME:Q4_K_M")
    if colon and not _WANTED.fullmatch(wanted):
        raise ConfigError(f"{wanted!a} is no quantization, such as Q4_K_M, nor a file's name")
    return repo, wanted


def choose(what: str, settings: Settings) -> Choice:
    """Ask the hub what there is, and choose.

    Raises:
        ConfigError: there is no such repo, nothing of it can be served, or not what was asked for.
        TransientError: the hub does not answer.
    """
    repo, wanted = parse(what)
    hub.require_online()
    listing = hub.look(repo)
    offered = offers(listing.files)
    if not offered:
        raise ConfigError(
            f"{repo} holds no GGUF model that is whole; look for a repo with GGUF in its name"
        )
    found = asked_for(offered, wanted) if wanted else preferred(offered)
    if not found:
        raise ConfigError(f"{repo} has no {wanted!a}; it has: {_listed(offered)}")
    if len(found) > 1:
        names = ", ".join(f"{repo}:{printable(one.stem)}" for one in found[:_MOST_NAMED])
        raise ConfigError(f"{repo} has several models of that kind; name one: {names}")
    others = tuple(one for one in offered if one is not found[0])
    cache = Path(settings.cache_dirs[0] if settings.cache_dirs else hfcache.default_cache_dir())
    return Choice(listing, found[0], projector_of(listing.files), others, cache)


def _listed(offered: Sequence[Offer]) -> str:
    shown = [f"{printable(one.label)} ({mib(one.size_bytes)})" for one in offered[:_MOST_NAMED]]
    more = len(offered) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def told(choice: Choice, devices: Sequence[Device], settings: Settings) -> tuple[str, ...]:
    """What will be done, in lines for a person."""
    count = len(choice.offer.files)
    parts = "1 file" if count == 1 else f"{count} files"
    beside = f" and {printable(choice.projector.path)}" if choice.projector else ""
    lines = [
        f"{choice.listing.repo}: {printable(choice.offer.label)}, {parts}{beside}, "
        f"{mib(choice.size_bytes)}"
    ]
    if choice.others:
        lines.append(f"also there: {_listed(choice.others)}")
    missing = choice.missing_bytes
    if missing:
        free = free_bytes(choice.cache)
        lines.append(f"to download: {mib(missing)} into {choice.cache} ({mib(free)} free)")
    else:
        lines.append(f"all of it is in {choice.cache} already")
    return (*lines, *memory_lines(choice.size_bytes, devices, settings))


def require_room(choice: Choice) -> None:
    """Refuse what the disk does not hold.

    Raises:
        ApplyError: says how much is missing.
    """
    missing, free = choice.missing_bytes, free_bytes(choice.cache)
    if missing and missing + _SPARE_BYTES > free:
        raise ApplyError(
            f"cannot download {mib(missing)}: the disk of {choice.cache} has {mib(free)} free; "
            "free some (`hf cache ls`, `hf cache prune`), choose a smaller quantization, or name "
            "another folder as cache_dirs in synapse.conf"
        )


def free_bytes(folder: Path) -> int:
    """What is free on the file system of a folder, which need not exist yet."""
    place = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(place).free


def devices_of(settings: Settings) -> tuple[Device, ...]:
    """The memory there is; that of the host alone where there is no engine to tell of others."""
    try:
        engine = engines.find(settings.engine, _ANSWER_SECONDS)
        return (*engines.devices(engine, settings.rpc, _ANSWER_SECONDS), cpu.read())
    except ConfigError:
        return (cpu.read(),)


def memory_lines(size_bytes: int, devices: Sequence[Device], settings: Settings) -> tuple[str, ...]:
    """Whether memory would hold so much, as far as a size tells; a warning where it would not."""
    need = int(size_bytes * _BESIDE_WEIGHTS) + _BESIDE_BYTES
    rooms = [
        (device, device.total_bytes - settings.memory_reserve.of(device.total_bytes))
        for device in devices
    ]
    line = f"memory: about {mib(need)} by its size; " + ", ".join(
        f"{device.name} has {mib(device.free_bytes)} free of {mib(device.total_bytes)}"
        for device in devices
    )
    if need > sum(room for _, room in rooms):
        return line, "warning: more than all memory of this machine: it would not be started"
    if all(need > room for _, room in rooms):
        return line, "it fits on no single device: its layers would be spread"
    if all(need > device.free_bytes for device in devices):
        return line, "there is not so much free now: it would wait, or take less"
    return (line,)


def bring(choice: Choice, say: Say) -> None:
    """Download what is missing, the whole of it or nothing that is served.

    Raises:
        ConfigError, TransientError, ApplyError: as `hub.bring`; what came so far is kept.
    """
    for file in choice.files:
        hub.bring(choice.cache, choice.listing, file)
    for file in hub.served_beside(choice.cache, choice.listing, choice.files):
        hub.bring(choice.cache, choice.listing, file)
        say(f"{printable(file.path)}: kept, it is the same in this revision")
    hub.point_main(choice.cache, choice.listing)
