"""var/lib/memory.json: what loads took, for the plans and admissions after them. Its sole writer.

A footprint is known by all that memory depends on: the files, the arguments but for those that
only say where and how it is served, the engine's build, and the devices. Whatever changes there is
another key, so that nothing has to be invalidated: what was not learned anew for longest is
forgotten when the file is full. (The engine's settings in the environment are not looked at.)

A learned footprint is the largest of the last few loads, device by device. Loads that placed
another number of layers are of another kind, and replace it; a figure that was out of all reason is
gone a few loads later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import Device, Estimate, FileIdentity, Part, Source
from supervisor_synapse.core.settings import MIB
from supervisor_synapse.errors import TransientError

_HOST = "CPU"
_REMEMBERED_LOADS = 5
_MOST_ENTRIES = 2000  # of each kind: some hundred models, each with its ladder
_MOST_PARTS = 64
_LARGEST_BYTES = 1 << 50
# What a driver takes for a process beside what it shows as its own: 24 to 32 MiB on an H100.
_UNSHOWN_BYTES = 32 * MIB
_SIZES = tuple(entry.name for entry in fields(Part) if entry.name != "device")


@dataclass(frozen=True, slots=True)
class Load:
    """What one load took; `overhead_bytes` counts for the `measured` devices only."""

    parts: tuple[Part, ...]
    offloaded: int | None  # layers on devices
    measured: tuple[str, ...] = ()  # devices whose driver told what the process holds there


@dataclass(frozen=True, slots=True)
class Footprint:
    """The last loads of one key, newest last, or the engine's word for one."""

    loads: tuple[Load, ...]
    source: Source
    at: float  # wall clock, seconds since the epoch


@dataclass(frozen=True, slots=True)
class Scratch:
    """The calibrated scratch of one model (see core/estimate.py)."""

    elements: int
    at: float  # wall clock, seconds since the epoch


@dataclass(frozen=True, slots=True)
class Footprints:
    """All that is remembered, what was learned last at the end. Whoever learns gets a new one."""

    by_key: Mapping[str, Footprint] = field(default_factory=dict)
    scratches: Mapping[str, Scratch] = field(default_factory=dict)


_FOOTPRINTS = TypeAdapter(Footprints)
_T = TypeVar("_T", Footprint, Scratch)


# --- values ---------------------------------------------------------------------------------------


def learn(
    footprints: Footprints,
    key: str,
    loaded: Loaded,
    driver_bytes: Mapping[str, int],
    *,
    at: float,
) -> Footprints:
    """With one more real load. Only for one that came up as it was asked to.

    `driver_bytes`: by device, all that its driver says the process holds there; what exceeds the
    buffers is overhead, also on a device that has none of them. A load that cannot be true is not
    learned: a model may forge its log.
    """
    load = Load(_with_overheads(loaded.parts, driver_bytes), loaded.offloaded, tuple(driver_bytes))
    if not _is_reasonable(load):
        return footprints
    before = footprints.by_key.get(key)
    alike = [
        known
        for known in (before.loads if before and before.source is Source.LEARNED else ())
        if known.offloaded == load.offloaded
    ]
    loads = (*alike, load)[-_REMEMBERED_LOADS:]
    return _with_footprint(footprints, key, Footprint(loads, Source.LEARNED, at))


def learn_dry_run(footprints: Footprints, key: str, told: Loaded, *, at: float) -> Footprints:
    """With the engine's own word; a real load's stands above it."""
    before = footprints.by_key.get(key)
    load = Load(told.parts, told.offloaded)
    if not _is_reasonable(load) or (before is not None and before.source is Source.LEARNED):
        return footprints
    return _with_footprint(footprints, key, Footprint((load,), Source.DRY_RUN, at))


def known(footprints: Footprints, key: str, otherwise: Estimate | None = None) -> Estimate | None:
    """What is known of a key, or None.

    `otherwise`, an estimate for the same, gives the overheads that no driver told, and bounds what
    is added to those that one did. On the host it gives them where they are larger: the prompt
    cache grows only after the load.
    """
    footprint = footprints.by_key.get(key)
    if footprint is None:
        return None
    overheads = {part.device: part.overhead_bytes for part in (otherwise or Estimate()).parts}
    measured = {device for load in footprint.loads for device in load.measured}
    parts: dict[str, Part] = {}
    for part in (part for load in footprint.loads for part in load.parts):
        parts[part.device] = _larger(parts.get(part.device, Part(part.device)), part)
    for device, overhead_bytes in overheads.items():
        part = parts.get(device, Part(device))
        if device != _HOST and device in measured:
            overhead_bytes = min(overhead_bytes, part.overhead_bytes + _UNSHOWN_BYTES)
        larger = max(part.overhead_bytes, overhead_bytes)
        parts[device] = replace(part, overhead_bytes=larger)
    return Estimate(tuple(part for part in parts.values() if part.total_bytes), footprint.source)


def learn_scratch(footprints: Footprints, key: str, elements: int, *, at: float) -> Footprints:
    """With the calibrated scratch of a model, see `scratch_key`; the latest stands."""
    scratch = Scratch(elements, at)
    if not _is_a_size(elements):
        return footprints
    return replace(footprints, scratches=_with_latest(footprints.scratches, key, scratch))


def scratch_elements(footprints: Footprints, key: str) -> int | None:
    """The calibrated scratch of a model, or None."""
    scratch = footprints.scratches.get(key)
    return scratch.elements if scratch else None


def merged(footprints: Footprints, newer: Footprints) -> Footprints:
    """With what `newer` has and this has not. Of loads that both know, this one knows better."""
    for key, footprint in newer.by_key.items():
        if key not in footprints.by_key:
            footprints = _with_footprint(footprints, key, footprint)
    new = {key: one for key, one in newer.scratches.items() if footprints.scratches.get(key) != one}
    for key, scratch in new.items():
        scratches = _with_latest(footprints.scratches, key, scratch)
        footprints = replace(footprints, scratches=scratches)
    return footprints


def _with_footprint(footprints: Footprints, key: str, footprint: Footprint) -> Footprints:
    return replace(footprints, by_key=_with_latest(footprints.by_key, key, footprint))


def _with_latest(entries: Mapping[str, _T], key: str, latest: _T) -> dict[str, _T]:
    """By the order of learning: a clock that was set back does not forget the wrong ones."""
    others = [name for name in entries if name != key][-(_MOST_ENTRIES - 1) :]
    return {name: entries[name] for name in others} | {key: latest}


def _with_overheads(parts: tuple[Part, ...], driver_bytes: Mapping[str, int]) -> tuple[Part, ...]:
    by_device = {device: Part(device) for device in driver_bytes}
    by_device |= {part.device: replace(part, overhead_bytes=0) for part in parts}
    return tuple(
        replace(part, overhead_bytes=max(driver_bytes.get(device, 0) - part.total_bytes, 0))
        for device, part in by_device.items()
    )


def _larger(one: Part, other: Part) -> Part:
    """Field by field."""
    sizes = {name: max(getattr(one, name), getattr(other, name)) for name in _SIZES}
    return Part(one.device, **sizes)


# --- keys -----------------------------------------------------------------------------------------

# What memory does not depend on. With a value:
_UNIMPORTANT_WITH_VALUE = frozenset({
    "--host", "--port", "--alias", "--api-key", "--api-key-file", "--cache-ram", "--path",
    "--api-prefix", "--ssl-key-file", "--ssl-cert-file", "--timeout", "--threads-http",
    "--sleep-idle-seconds", "--slot-save-path", "--media-path", "--log-file", "--log-colors",
    "--log-verbosity", "--tags", "--chat-template", "--chat-template-file",
    "--chat-template-kwargs", "--reasoning-format", "--reasoning-budget", "--temp", "--top-k",
    "--top-p", "--min-p", "--seed", "--n-predict", "--repeat-penalty", "--presence-penalty",
    "--frequency-penalty", "--model",
})  # fmt: skip
# Without one:
_UNIMPORTANT = frozenset({
    "--metrics", "--slots", "--no-slots", "--props", "--webui", "--no-webui", "--jinja",
    "--no-jinja", "--log-disable", "--log-prefix", "--no-log-prefix", "--log-timestamps",
    "--no-log-timestamps", "--verbose", "--offline", "--prefill-assistant",
    "--no-prefill-assistant",
})  # fmt: skip
# The file counts, whatever path leads to it.
_FILES = frozenset({"--mmproj", "--model-draft"})
_SYNONYMS = {
    "-a": "--alias", "-cram": "--cache-ram", "-to": "--timeout", "-lv": "--log-verbosity",
    "--verbosity": "--log-verbosity", "-v": "--verbose", "--log-verbose": "--verbose",
    "-m": "--model", "-mm": "--mmproj", "-md": "--model-draft",
    "--spec-draft-model": "--model-draft", "-c": "--ctx-size", "-np": "--parallel",
    "-ngl": "--gpu-layers", "--n-gpu-layers": "--gpu-layers", "-dev": "--device",
    "-ts": "--tensor-split", "-sm": "--split-mode", "-mg": "--main-gpu", "-fa": "--flash-attn",
    "-ctk": "--cache-type-k", "-ctv": "--cache-type-v", "-b": "--batch-size",
    "-ub": "--ubatch-size", "-kvu": "--kv-unified", "-no-kvu": "--no-kv-unified",
    "-ncmoe": "--n-cpu-moe", "-cmoe": "--cpu-moe", "-ot": "--override-tensor", "-s": "--seed",
    "-n": "--n-predict", "--predict": "--n-predict", "--temperature": "--temp", "-fit": "--fit",
    "-fitt": "--fit-target", "-fitc": "--fit-ctx",
}  # fmt: skip
_NEGATIVE = re.compile(r"-[0-9.]", re.ASCII)


class _Argument(NamedTuple):
    flag: str
    values: tuple[str, ...]


def identities(files: Iterable[str]) -> tuple[FileIdentity, ...]:
    """Names the bytes of a model's files; () where one cannot be looked at."""
    found = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            return ()
        found.append(FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def footprint_key(
    files: Iterable[FileIdentity],
    arguments: Sequence[str],
    engine_version: str,
    devices: Iterable[Device],
) -> str:
    """Names all that a footprint depends on. `files`: each of the model's, its shards, projector
    and draft, in any order; `devices`: what the engine sees, the host or not.
    """
    seen = sorted(
        (device.name, device.description, device.total_bytes)
        for device in devices
        if not device.is_host
    )
    return _digest([_listed(files), normalised(arguments), engine_version, seen])


def scratch_key(files: Iterable[FileIdentity], engine_version: str, *traits: str) -> str:
    """Names what a calibrated scratch holds for: `traits` are those of a configuration beyond
    which it must not be carried over (flash attention, cache types …).
    """
    return _digest([_listed(files), engine_version, list(traits)])


def normalised(arguments: Sequence[str]) -> list[list[str]]:
    """Arguments that memory may depend on, by flag; what is not known may matter, and is kept."""
    kept = (_reduced(argument) for argument in _split(arguments))
    return sorted(([one.flag, *one.values] for one in kept if one), key=lambda words: words[0])


def _split(arguments: Sequence[str]) -> Iterator[_Argument]:
    """Flags by their usual names, with what follows; `--flag=value` as two words."""
    flag, values = "", list[str]()
    for word in arguments:
        if not word.startswith("-") or _NEGATIVE.match(word):
            values.append(word)
            continue
        if flag or values:
            yield _Argument(flag, tuple(values))
        name, is_whole, value = word.partition("=")
        flag, values = _SYNONYMS.get(name, name), [value] if is_whole else []
    if flag or values:
        yield _Argument(flag, tuple(values))


def _reduced(argument: _Argument) -> _Argument | None:
    """Without the value that belongs to a flag of no importance; others may follow by mistake."""
    flag, values = argument
    if flag in _UNIMPORTANT_WITH_VALUE:
        rest = values[1:]
    elif flag in _UNIMPORTANT:
        rest = values
    elif flag in _FILES:
        return _Argument(flag, values[1:])
    else:
        return argument
    return _Argument("", rest) if rest else None


def _listed(files: Iterable[FileIdentity]) -> list[list[int]]:
    return sorted([one.device, one.inode, one.size_bytes, one.mtime_ns] for one in files)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


# --- the file -------------------------------------------------------------------------------------


def load(path: Path) -> Footprints:
    """What is remembered; a file that does not validate is set aside, and nothing is."""
    value = store.read_json(path)
    if value is None:
        return Footprints()
    try:
        found = _FOOTPRINTS.validate_python(value)
        _require_reason(found)
    except (ValidationError, ValueError):
        store.set_aside(path)
        return Footprints()
    return found


def update(path: Path, change: Callable[[Footprints], Footprints]) -> Footprints:
    """Read, change and write what is remembered, while no other process does; the result.

    Nothing is written where nothing was changed.

    Raises:
        TransientError: another process writes it just now; nothing was changed.
        OSError: it cannot be written; nothing was changed.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(store.exclusive(path.with_name(f".{path.name}.lock")))
        except TransientError:
            raise TransientError(f"cannot write {path}: another process is writing it") from None
        before = load(path)
        after = change(before)
        if after != before:
            store.write_json(path, _FOOTPRINTS.dump_python(after, mode="json"))
        return after


def _require_reason(footprints: Footprints) -> None:
    """Raises ValueError where anything is not as we could have written it."""
    for footprint in footprints.by_key.values():
        if not (footprint.loads and all(map(_is_reasonable, footprint.loads))):
            raise ValueError("not the loads of a footprint")
    if not all(_is_a_size(scratch.elements) for scratch in footprints.scratches.values()):
        raise ValueError("not a scratch")


def _is_reasonable(load: Load) -> bool:
    """Nothing negative, nor beyond what any machine has, nor of more devices than one has."""
    sizes = (getattr(part, name) for part in load.parts for name in _SIZES)
    return len(load.parts) <= _MOST_PARTS and all(map(_is_a_size, sizes))


def _is_a_size(number: int) -> bool:
    return 0 <= number <= _LARGEST_BYTES
