"""Where a model's layers lie: profile and devices → all of it that no context and no batch changes.

Follows llama.cpp's own arithmetic. Sizes are elements (of a token) or bytes.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from supervisor_synapse.core.layers import Kind, Kinds, Profile, masks

HOST = "CPU"

# Backends that compute asynchronously: with several devices, batches follow each other closely.
_PIPELINED = frozenset({"CUDA", "ROCm", "Vulkan"})
_PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES

# Backends that compute with the host's weights where a batch is worth the copy (`--op-offload`).
_BORROWING = frozenset({"CUDA", "ROCm", "Vulkan"})


class Steps(NamedTuple):
    """What the graph does in some layers, as far as they compute."""

    attending: tuple[Kind, ...]
    masks: tuple[Kind, ...]  # of these, one with a window and one without
    compute: bool
    recur: bool
    widest: int  # elements of the widest step, with flash attention
    expert_fed: int  # where experts feed forward: elements beside what they give


class Stretch(NamedTuple):
    """Layers that follow each other on one device."""

    device: str
    has_output: bool  # the output layer is the last of them
    kinds: Kinds
    steps: Steps
    handed: int  # elements that the first layer takes over
    widest: int  # elements of the widest step, with flash attention


class Layout(NamedTuple):
    """A model's layers in their places."""

    devices: tuple[str, ...]  # each once, without the host
    stretches: tuple[Stretch, ...]  # in order; the last one ends with the output layer
    weights: Mapping[str, int]  # bytes by device, the host last
    has_outputs: bool  # one for every token, not only for the last one of a slot
    copies: int  # of all inputs
    lent_bytes: int  # the host's weights that the first device has room for
    looked_up: int  # elements of the host's widest step, where no stretch lies there


@lru_cache(maxsize=1024)
def layout(
    model: Profile,
    named: tuple[str, ...],
    split: tuple[float, ...],
    gpu_layers: int | None,
    experts_on_host: int,
    has_outputs: bool,
) -> Layout:
    """The arguments are those of a load. Kept: a plan asks for several contexts of each."""
    devices = tuple(dict.fromkeys([name for name in named if name != HOST]))
    places = _places(model, devices, split, gpu_layers)
    is_whole = (gpu_layers is None or gpu_layers > model.layers) and not experts_on_host
    return Layout(
        devices=devices,
        stretches=_stretches(model, places, model.feeds_every_token or has_outputs),
        weights=_weights(model, devices, places, experts_on_host),
        has_outputs=has_outputs,
        copies=_pipeline_copies(devices) if is_whole else 1,
        lent_bytes=_lent_bytes(model, devices, places[0], experts_on_host),
        looked_up=_looked_up(model, experts_on_host),
    )


@lru_cache(maxsize=1024)
def backend_of(device: str) -> str:
    """`CUDA` of `CUDA0`."""
    return device.rstrip("0123456789")


class _Place(NamedTuple):
    """Layers from `first` to before `last` on one device."""

    device: str
    first: int
    last: int


def _places(
    model: Profile, devices: tuple[str, ...], split: tuple[float, ...], gpu_layers: int | None
) -> list[_Place]:
    """llama_model::load_tensors: the last `gpu_layers` go to the devices.

    Each to the first one whose cumulated part of the split is above the layer's place among them.
    """
    count = model.layers + 1
    offloaded = count if gpu_layers is None else min(max(gpu_layers, 0), count)
    if not devices or not offloaded:
        return [_Place(HOST, 0, count)]
    start = count - offloaded
    ends = [start + end for end in _ends(split[: len(devices)], len(devices), offloaded)]
    places = []
    first = 0
    for device, last in zip((HOST, *devices), (start, *ends), strict=True):
        if first < last:
            places.append(_Place(device, first, last))
            first = last
    return places


@lru_cache(maxsize=1024)
def _ends(split: tuple[float, ...], devices: int, layers: int) -> tuple[int, ...]:
    """Behind which of `layers` each device's part ends, in single precision as llama.cpp has it."""
    if devices == 1:
        return (layers,)
    parts = [_single(max(part, 0.0)) for part in split] + [0.0] * (devices - len(split))
    if not any(parts):
        parts = [1.0] * devices
    sums = list(accumulate(parts, lambda total, part: _single(total + part)))
    bounds = [_single(part / sums[-1]) for part in sums]
    return tuple([bisect_left(_shares(layers), bound) for bound in bounds])


@lru_cache(maxsize=128)
def _shares(layers: int) -> tuple[float, ...]:
    """How many of `layers` lie before each."""
    return tuple([_single(layer / layers) for layer in range(layers)])


def _single(value: float) -> float:
    """Rounded to 32 bits."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


# --- weights -------------------------------------------------------------------------------------


def _weights(
    model: Profile, devices: tuple[str, ...], places: Iterable[_Place], experts_on_host: int
) -> dict[str, int]:
    """Blocks by layer, inputs on the host, and what else there is with the output."""
    found = dict.fromkeys((*devices, HOST), 0)
    found[HOST] = model.input_bytes
    output = HOST
    for device, first, last in places:
        kept = model.between(model.expert_bytes, first, min(last, experts_on_host))
        blocks = model.between(model.block_bytes, first, last)
        found[device] += blocks - kept
        found[HOST] += kept
        output = device
    found[output] += model.output_bytes
    if output != HOST:
        found[output] += model.copied_bytes
    return found


def _lent_bytes(
    model: Profile, devices: tuple[str, ...], begin: _Place, experts_on_host: int
) -> int:
    """The largest of the weights on the host: a device may compute with it in the host's stead.

    By the engine's scheduler, such weights are copied to the device one after another.
    """
    if not devices or backend_of(devices[0]) not in _BORROWING:
        return 0
    last = max(begin.last if begin.device == HOST else 0, experts_on_host)
    return max(model.largest_bytes[:last], default=0)


# --- steps ---------------------------------------------------------------------------------------


def _stretches(model: Profile, places: Iterable[_Place], feeds_all: bool) -> tuple[Stretch, ...]:
    """`feeds_all`: the last layer feeds all tokens forward, not only those with an output."""
    stretches = []
    handed = 0
    for device, first, last in places:
        kinds = model.kinds_between(first, last)
        steps = _steps(model, *_at_work(model, kinds, first, last, feeds_all))
        widest = max(steps.widest, steps.expert_fed + handed)
        stretches.append(Stretch(device, last > model.layers, kinds, steps, handed, widest))
        handed = _handed(model, last, feeds_all) if device == HOST else 0
    return tuple(stretches)


def _at_work(
    model: Profile, kinds: Kinds, first: int, last: int, feeds_all: bool
) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Which of `kinds` compute, and which of these feed all tokens forward."""
    if last > model.computing < model.layers:
        kinds = model.kinds_between(first, model.computing)
    computing = tuple([kind for kind, _ in kinds])
    if not kinds or last < model.computing or feeds_all:
        return computing, computing
    ending = model.each[model.computing - 1]
    return computing, tuple([kind for kind, count in kinds if count > 1 or kind is not ending])


@lru_cache(maxsize=1024)
def _steps(model: Profile, kinds: tuple[Kind, ...], feeding: tuple[Kind, ...]) -> Steps:
    """Kept: most of a model's stretches have layers of the same kinds."""
    attending = tuple([kind for kind in kinds if kind.attends])
    attended = [model.beside + kind.attended for kind in attending]
    fed = [model.beside + kind.fed + kind.given for kind in feeding]
    expert_fed = [model.beside + kind.fed for kind in feeding if kind.has_experts]
    return Steps(
        attending=attending,
        masks=masks(kinds),
        compute=bool(kinds),
        recur=any(kind.recurs for kind in kinds),
        widest=max([0, *attended, *fed]),
        expert_fed=max(expert_fed, default=0),
    )


def _handed(model: Profile, last: int, feeds_all: bool) -> int:
    """Elements of a token that the host hands on: the sum over experts is left to the device."""
    if last > model.layers:
        return 0
    kind = model.each[last - 1]
    if last == model.layers and not kind.recurs and not feeds_all:
        return 0
    return 2 * model.width + (model.handed if kind.has_experts else 0)


def _looked_up(model: Profile, experts_on_host: int) -> int:
    """Embeddings are looked up on the host, and experts that are kept there are in use."""
    widest = model.looked_up * model.width
    if not experts_on_host:
        return widest
    kept = model.kinds_between(0, experts_on_host)
    fed = [model.width + kind.fed + kind.given for kind, _ in kept if kind.has_experts]
    return max([widest, *fed])


def _pipeline_copies(devices: tuple[str, ...]) -> int:
    """Several batches are under way at once over several devices, each with inputs of its own."""
    is_pipelined = len(devices) > 1 and all(backend_of(name) in _PIPELINED for name in devices)
    return _PIPELINE_COPIES if is_pipelined else 1
