"""Header and arguments → bytes on each device and on the host, before anything is loaded.

Placement and caches follow llama.cpp's own arithmetic and are exact. Scratch is the widest step of
the model's graph, fitted to what the engine allocates: a few hundredths off, and more where a
backend works in a way of its own; one load or dry run calibrates it.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from supervisor_synapse.core.layers import Kind, Profile, profile
from supervisor_synapse.core.model import Estimate, Header, Part, Source
from supervisor_synapse.core.settings import MIB

HOST = "CPU"

_F32_BYTES = 4
_F16_BYTES = 2
_CELL_PADDING = 256

# Elements and bytes of one block of a cache type.
_CACHE_BLOCKS = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24),
    "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip

# What a server process takes beside its buffers; by backend, until a load has been measured.
_OVERHEAD_BYTES = {
    "CPU": 48 * MIB, "CUDA": 550 * MIB, "ROCm": 450 * MIB, "MTL": 512 * MIB, "Metal": 512 * MIB,
    "Vulkan": 64 * MIB, "RPC": 8 * MIB,
}  # fmt: skip
_UNKNOWN_BACKEND_OVERHEAD_BYTES = 256 * MIB

# Backends that compute asynchronously: with several devices, batches follow each other closely.
_PIPELINED = frozenset({"CUDA", "ROCm", "Vulkan"})
_PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES

# What is added to an estimate before it is held against what is free.
_MARGIN_PERCENT = {
    Source.LEARNED: 2, Source.DRY_RUN: 2, Source.CALIBRATED: 5, Source.HEADER: 6,
}  # fmt: skip
_LEAST_MARGIN_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class Load:
    """The arguments that memory depends on."""

    context: int
    parallel: int
    ubatch: int = 512
    devices: tuple[str, ...] = ()  # offloaded to, in order; () = the host alone
    split: tuple[float, ...] = ()  # each device's part of the layers; () = equal parts
    gpu_layers: int | None = None  # the output layer counts as one; None: all
    unified: bool = True  # slots share one cache of `context` cells
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True
    swa_full: bool = False  # layers with a window keep the whole context
    expert_layers_on_host: int = 0  # the experts of the first so many layers
    prompt_cache_bytes: int | None = None  # None: what `prompt_cache_bytes` gives
    embeddings: bool = False  # every token has an output; so too where the header names a pooling


def estimate(
    header: Header,
    load: Load,
    *,
    projector_bytes: int = 0,
    draft: tuple[Header, Load] | None = None,
    scratch_elements: int | None = None,
) -> Estimate:
    """Bytes on each device of `load`, in order, and on the host, which comes last.

    `header` holds the weights of all shards. `projector_bytes`: what that function gives.
    `scratch_elements`: what `calibrate` gave for this model; the source is then CALIBRATED.
    """
    taken: dict[str, _Taken] = {}
    _take(taken, profile(header), load, scratch_elements)
    if draft is not None:
        _take(taken, profile(draft[0]), draft[1], None)
    taken[next(iter(_devices(load)), HOST)].weights += projector_bytes
    cached = load.prompt_cache_bytes
    if cached is None:
        cached = prompt_cache_bytes(sum(found.kv for found in taken.values()))
    taken[HOST].overhead += cached
    source = Source.HEADER if scratch_elements is None else Source.CALIBRATED
    names = sorted(taken, key=lambda name: name == HOST)
    return Estimate(tuple(taken[name].part(name) for name in names), source)


def calibrate(header: Header, load: Load, compute_bytes: int) -> int:
    """The model's scratch in elements a token, from the compute bytes of one load or dry run.

    `compute_bytes`: where the output layer lies, as the engine told them. What is found serves for
    any other context, number of slots or batch.
    """
    model = profile(header)
    stretch = _stretches(model, load)[-1]
    rest = compute_bytes - _input_bytes(model, load, (stretch,)) - _scan_bytes(model, load, stretch)
    elements = -(-rest // (_F32_BYTES * _tokens(load)))
    if stretch.device == HOST:
        elements -= model.width
    return max(elements, 0)


def margin_bytes(estimate: Estimate, device: str) -> int:
    """What to keep free on a device beside the estimate, by how much its source is worth."""
    return estimate.on(device) * _MARGIN_PERCENT[estimate.source] // 100 + _LEAST_MARGIN_BYTES


def prompt_cache_bytes(kv_bytes: int) -> int:
    """Host memory for prompts kept between requests: room for two full contexts, within reason.

    Always set on the command line: llama-server's own default is 8 GiB for each server.
    """
    return min(max(2 * kv_bytes, 16 * MIB), 1024 * MIB)


def projector_bytes(header: Header) -> int:
    """A projector's weights, and its scratch for one image."""
    patches, width, feed_forward = header.image
    return header.tensor_bytes + _F32_BYTES * patches * max(5 * width, 3 * width + feed_forward)


@dataclass(slots=True)
class _Taken:
    """Bytes on one device, summed up."""

    weights: int = 0
    kv: int = 0
    recurrent: int = 0
    compute: int = 0
    overhead: int = 0

    def part(self, device: str) -> Part:
        overhead = self.overhead + _overhead(device)
        return Part(device, self.weights, self.kv, self.recurrent, self.compute, overhead)


def _overhead(device: str) -> int:
    return _OVERHEAD_BYTES.get(_backend(device), _UNKNOWN_BACKEND_OVERHEAD_BYTES)


def _backend(device: str) -> str:
    return device.rstrip("0123456789")


def _take(
    taken: dict[str, _Taken], model: Profile, load: Load, scratch_elements: int | None
) -> None:
    """Add one model's buffers."""
    for name in (*_devices(load), HOST):
        taken.setdefault(name, _Taken())
    stretches = _stretches(model, load)
    _take_weights(taken, model, load, stretches)
    _take_caches(taken, model, load, stretches)
    _take_scratch(taken, model, load, stretches, scratch_elements)


# --- placement -----------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    """Layers from `first` to before `last` on one device."""

    device: str
    first: int
    last: int
    kinds: tuple[tuple[Kind, int], ...]  # with how many there are of each


def _devices(load: Load) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in load.devices if name != HOST))


def _stretches(model: Profile, load: Load) -> tuple[_Stretch, ...]:
    """Where the layers lie, in their order; the last stretch ends with the output layer.

    llama_model::load_tensors: the last `gpu_layers` go to the devices, each to the first one whose
    cumulated part of the split is above the layer's place among them.
    """
    count = model.layers + 1
    devices = _devices(load)
    offloaded = count if load.gpu_layers is None else min(max(load.gpu_layers, 0), count)
    if not devices or not offloaded:
        return (_Stretch(HOST, 0, count, model.kinds_between(0, count)),)
    start = count - offloaded
    ends = [start + end for end in _ends(load.split[: len(devices)], len(devices), offloaded)]
    places = zip((HOST, *devices), [0, start, *ends], [start, *ends], strict=False)
    return tuple(
        _Stretch(device, first, last, model.kinds_between(first, last))
        for device, first, last in places
        if first < last
    )


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
    shares = [_single(layer / layers) for layer in range(layers)]
    return tuple(bisect_left(shares, bound) for bound in bounds)


def _single(value: float) -> float:
    """Rounded to 32 bits."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _take_weights(
    taken: dict[str, _Taken], model: Profile, load: Load, stretches: Sequence[_Stretch]
) -> None:
    """Blocks by layer, inputs on the host, and what else there is with the output."""
    host, output = taken[HOST], stretches[-1].device
    for device, first, last, _ in stretches:
        experts_end = min(last, load.expert_layers_on_host)
        kept = model.between(model.expert_bytes, first, experts_end)
        taken[device].weights += model.between(model.block_bytes, first, last) - kept
        host.weights += kept
    host.weights += model.input_bytes
    taken[output].weights += model.output_bytes
    if output != HOST:
        taken[output].weights += model.copied_bytes


# --- caches --------------------------------------------------------------------------------------


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _slots(load: Load) -> int:
    return max(load.parallel, 1)


def _streams(load: Load) -> int:
    """Caches of their own: one for all slots, or one each."""
    return 1 if load.unified else _slots(load)


def _tokens(load: Load) -> int:
    """In one batch of the graph."""
    return max(min(load.ubatch, load.context), 1)


def _cells(model: Profile, load: Load, *, windowed: bool) -> int:
    """Of one stream; with a window: for the windows of its slots, and one batch."""
    full = _pad(_pad(load.context) // _streams(load))
    if not windowed or load.swa_full:
        return full
    slots = _slots(load) if load.unified else 1
    return _pad(min(full, model.window * slots + _tokens(load)))


def _take_caches(
    taken: dict[str, _Taken], model: Profile, load: Load, stretches: Sequence[_Stretch]
) -> None:
    """Keys and values, and recurrent state."""
    state = _F32_BYTES * _slots(load) * sum(model.state)
    for device, _, _, kinds in stretches:
        for kind, count in kinds:
            if kind.keys or kind.values:
                cells = count * _streams(load) * _cells(model, load, windowed=kind.windowed)
                taken[device].kv += cells * _row_bytes(load, kind)
            if kind.recurs:
                taken[device].recurrent += count * state


def _row_bytes(load: Load, kind: Kind) -> int:
    keys = _type_bytes(load.cache_type_k, kind.keys)
    return keys + _type_bytes(load.cache_type_v, kind.values)


def _type_bytes(cache_type: str, elements: int) -> int:
    block, size = _CACHE_BLOCKS.get(cache_type, _CACHE_BLOCKS["f16"])
    return -(-elements // block) * size


# --- scratch -------------------------------------------------------------------------------------


def _take_scratch(
    taken: dict[str, _Taken],
    model: Profile,
    load: Load,
    stretches: Sequence[_Stretch],
    scratch_elements: int | None,
) -> None:
    """What the graph of one batch takes on each device, and the host's copy of what comes out."""
    row = _F32_BYTES * _tokens(load) * model.width
    handed = 0
    for stretch in stretches:
        found = taken[stretch.device]
        widest = _widest_bytes(model, load, stretch, handed, scratch_elements)
        if stretch.device == HOST:
            widest += row  # the embeddings, which the host looks up
        if stretch.last > model.layers:
            widest = max(widest, _output_bytes(model, load))
        found.compute += widest
        if stretch.device != HOST:
            inputs = _input_bytes(model, load, (stretch,))
            found.compute += inputs + _pipeline_bytes(model, load, inputs + row)
        handed = _handed(model, load, stretch)
    host, inputs = taken[HOST], _input_bytes(model, load, stretches)  # it sees to all of them
    host.compute += inputs + _pipeline_bytes(model, load, inputs)
    if stretches[0].device != HOST:
        host.compute += _host_bytes(model, load)
    host.compute += _output_copy_bytes(model, load)


def _widest_bytes(
    model: Profile, load: Load, stretch: _Stretch, handed: int, scratch_elements: int | None
) -> int:
    """The widest step of the layers in a stretch, the first of which takes over `handed`.

    Beside each step lie the layer's input, its normed copy and the room that queries leave.
    """
    per_element = _F32_BYTES * _tokens(load)
    kinds = stretch.kinds
    scan = _scan_bytes(model, load, stretch)
    if scratch_elements is not None and kinds:
        return per_element * max(scratch_elements, handed) + scan
    kept = 2 * model.width + model.queries
    steps = [handed]
    steps += [kept + _attended(model, load, kind) for kind, _ in kinds if kind.attends]
    steps += [
        kept + kind.fed + max(kind.given, handed * kind.has_experts)
        for kind, _ in _feeding(model, load, stretch)
    ]
    recurrence = per_element * (kept + model.scan[0]) + scan if scan else 0
    return max(per_element * max(steps), recurrence)


def _scan_bytes(model: Profile, load: Load, stretch: _Stretch) -> int:
    """What a recurrent layer needs for each slot beside what it needs for each token."""
    if not any(kind.recurs for kind, _ in stretch.kinds):
        return 0
    return _F32_BYTES * _slots(load) * model.scan[1]


def _feeding(model: Profile, load: Load, stretch: _Stretch) -> Iterable[tuple[Kind, int]]:
    """Kinds of layers that feed all tokens forward: the last one only those with an output."""
    feeding = model.computing
    if not (model.feeds_every_token or load.embeddings):
        feeding -= 1
    return model.kinds_between(stretch.first, min(stretch.last, feeding))


def _seen(model: Profile, load: Load, *, windowed: bool) -> int:
    """Cells that a token may attend to."""
    return _cells(model, load, windowed=windowed) if model.has_cache else _tokens(load)


def _attended(model: Profile, load: Load, kind: Kind) -> int:
    """Without flash attention: how much each head heeds each cell."""
    widest = max(kind.latent, kind.queries)
    if load.flash_attention:
        return max(widest, kind.values + kind.keys // 2)
    seen = _seen(model, load, windowed=kind.windowed)
    return model.heads * seen + widest


def _handed(model: Profile, load: Load, stretch: _Stretch) -> int:
    """Elements of a token that the host hands on: the sum over experts is left to the device."""
    if stretch.device != HOST or stretch.last > model.layers:
        return 0
    ((kind, _),) = model.kinds_between(stretch.last - 1, stretch.last)
    goes_on = kind.recurs or model.feeds_every_token or load.embeddings
    if stretch.last == model.layers and not goes_on:
        return 0
    return 2 * model.width + model.handed * kind.has_experts


def _input_bytes(model: Profile, load: Load, stretches: Iterable[_Stretch]) -> int:
    """Masks (one for layers with a window, one for the others), positions, and places in caches."""
    tokens = _tokens(load)
    kinds = {
        kind.windowed: kind for stretch in stretches for kind, _ in stretch.kinds if kind.attends
    }
    total = 24 * tokens
    for windowed, kind in kinds.items():
        seen = _seen(model, load, windowed=windowed)
        if load.flash_attention:
            total += _F16_BYTES * tokens * seen
        else:  # values lie crosswise: a place for each element
            total += _F32_BYTES * tokens * seen + 8 * tokens * kind.values
    return total


def _pipeline_bytes(model: Profile, load: Load, input_bytes: int) -> int:
    """Several batches are under way at once over several devices, each with inputs of its own."""
    devices = _devices(load)
    is_pipelined = (
        len(devices) > 1
        and (load.gpu_layers is None or load.gpu_layers > model.layers)
        and not load.expert_layers_on_host
        and all(_backend(device) in _PIPELINED for device in devices)
    )
    return (_PIPELINE_COPIES - 1) * input_bytes if is_pipelined else 0


def _host_bytes(model: Profile, load: Load) -> int:
    """Where no layer lies on the host: embeddings are looked up, and experts kept there in use."""
    kept = model.kinds_between(0, load.expert_layers_on_host)
    fed = [model.width + kind.fed + kind.given for kind, _ in kept if kind.has_experts]
    return _F32_BYTES * _tokens(load) * max([model.looked_up * model.width, *fed])


def _output_bytes(model: Profile, load: Load) -> int:
    """The last step: of one token a slot, or of every token where embeddings are asked for."""
    gives_embeddings = model.gives_embeddings or load.embeddings
    outputs = _tokens(load) if gives_embeddings else _slots(load)
    return _F32_BYTES * outputs * (model.words + model.width)


def _output_copy_bytes(model: Profile, load: Load) -> int:
    gives_embeddings = model.gives_embeddings or load.embeddings
    return _F32_BYTES * _slots(load) * (model.vocabulary + model.width * gives_embeddings)
