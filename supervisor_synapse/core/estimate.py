"""Header and arguments → bytes on each device and on the host, before anything is loaded.

Placement and caches follow llama.cpp's own arithmetic and are exact. Scratch is the widest step of
the model's graph, fitted to what the engine allocates: a few hundredths off, and more where a
backend works in a way of its own; one load or dry run calibrates it.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
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

# Backends that compute with the host's weights where a batch is worth the copy (`--op-offload`).
_BORROWING = frozenset({"CUDA", "ROCm", "Vulkan"})
_LENT_TOKENS = 32

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
    _take(taken, _job(profile(header), load), scratch_elements)
    if draft is not None:
        _take(taken, _job(profile(draft[0]), draft[1]), None)
    taken[next((name for name in load.devices if name != HOST), HOST)].weights += projector_bytes
    cached = load.prompt_cache_bytes
    if cached is None:
        cached = prompt_cache_bytes(sum([found.kv for found in taken.values()]))
    host = taken.pop(HOST)
    host.overhead += cached
    source = Source.HEADER if scratch_elements is None else Source.CALIBRATED
    parts = [found.part(name) for name, found in taken.items()]
    return Estimate((*parts, host.part(HOST)), source)


def calibrate(header: Header, load: Load, compute_bytes: int) -> int:
    """The model's scratch in elements a token, from the compute bytes of one load or dry run.

    `compute_bytes`: where the output layer lies, as the engine told them. What is found serves for
    any other context, number of slots or batch.
    """
    job = _job(profile(header), load)
    stretch = job.stretches[-1]
    rest = compute_bytes - _input_bytes(job, stretch.kinds) - _scan_bytes(job, stretch.kinds)
    elements = -(-rest // (_F32_BYTES * job.tokens))
    if stretch.device == HOST:
        elements -= job.model.width
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


@lru_cache(maxsize=1024)
def _backend(device: str) -> str:
    return device.rstrip("0123456789")


# --- placement -----------------------------------------------------------------------------------

_Kinds = tuple[tuple[Kind, int], ...]  # with how many there are of each


class _Stretch(NamedTuple):
    """Layers from `first` to before `last` on one device."""

    device: str
    first: int
    last: int
    kinds: _Kinds  # of those that compute


class _Job(NamedTuple):
    """A model and a load, with what follows from both."""

    model: Profile
    load: Load
    devices: tuple[str, ...]  # each once, without the host
    stretches: tuple[_Stretch, ...]  # in order; the last one ends with the output layer
    slots: int
    tokens: int  # in one batch of the graph
    streams: int  # caches of their own: one for all slots, or one each
    full_cells: int  # of one stream
    window_cells: int  # of one stream: for the windows of its slots, and one batch
    has_outputs: bool  # one for every token, not only for the last one of a slot

    def cells(self, kind: Kind) -> int:
        """Of one stream, in the cache of such a layer."""
        return self.window_cells if kind.windowed else self.full_cells

    def seen(self, kind: Kind) -> int:
        """Cells that a token may attend to."""
        return self.cells(kind) if self.model.has_cache else self.tokens


def _job(model: Profile, load: Load) -> _Job:
    devices = tuple(dict.fromkeys([name for name in load.devices if name != HOST]))
    slots = max(load.parallel, 1)
    tokens = max(min(load.ubatch, load.context), 1)
    streams = 1 if load.unified else slots
    full = window = _pad(_pad(load.context) // streams)
    if model.window and not load.swa_full:
        window = _pad(min(full, model.window * (slots if load.unified else 1) + tokens))
    return _Job(
        model, load, devices, _stretches(model, load, devices), slots, tokens, streams, full,
        window, model.gives_embeddings or load.embeddings,
    )  # fmt: skip


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _stretches(model: Profile, load: Load, devices: tuple[str, ...]) -> tuple[_Stretch, ...]:
    """llama_model::load_tensors: the last `gpu_layers` go to the devices.

    Each to the first one whose cumulated part of the split is above the layer's place among them.
    """
    count = model.layers + 1
    offloaded = count if load.gpu_layers is None else min(max(load.gpu_layers, 0), count)
    if not devices or not offloaded:
        return (_Stretch(HOST, 0, count, model.kinds_between(0, model.computing)),)
    if len(devices) == 1 and offloaded == count:
        return (_Stretch(devices[0], 0, count, model.kinds_between(0, model.computing)),)
    start = count - offloaded
    ends = [start + end for end in _ends(load.split[: len(devices)], len(devices), offloaded)]
    places = zip((HOST, *devices), [0, start, *ends], [start, *ends], strict=False)
    return tuple(
        _Stretch(device, first, last, model.kinds_between(first, min(last, model.computing)))
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


# --- weights and caches --------------------------------------------------------------------------


def _take(taken: dict[str, _Taken], job: _Job, scratch_elements: int | None) -> None:
    """Add one model's buffers."""
    for name in (*job.devices, HOST):
        if name not in taken:
            taken[name] = _Taken()
    _take_weights(taken, job)
    _take_caches(taken, job)
    _take_scratch(taken, job, scratch_elements)


def _take_weights(taken: dict[str, _Taken], job: _Job) -> None:
    """Blocks by layer, inputs on the host, and what else there is with the output."""
    model, on_host = job.model, job.load.expert_layers_on_host
    host, output = taken[HOST], job.stretches[-1].device
    for device, first, last, _ in job.stretches:
        kept = model.between(model.expert_bytes, first, min(last, on_host)) if on_host else 0
        taken[device].weights += model.between(model.block_bytes, first, last) - kept
        host.weights += kept
    host.weights += model.input_bytes
    taken[output].weights += model.output_bytes
    if output != HOST:
        taken[output].weights += model.copied_bytes


def _take_caches(taken: dict[str, _Taken], job: _Job) -> None:
    """Keys and values, and recurrent state."""
    state = _F32_BYTES * job.slots * sum(job.model.state)
    for device, first, last, _ in job.stretches:
        for kind, count in job.model.kinds_between(first, last):
            if kind.keys or kind.values:
                cells = count * job.streams * job.cells(kind)
                taken[device].kv += cells * _row_bytes(job.load, kind)
            if kind.recurs:
                taken[device].recurrent += count * state


def _row_bytes(load: Load, kind: Kind) -> int:
    keys = _type_bytes(load.cache_type_k, kind.keys)
    return keys + _type_bytes(load.cache_type_v, kind.values)


def _type_bytes(cache_type: str, elements: int) -> int:
    block, size = _CACHE_BLOCKS.get(cache_type, _CACHE_BLOCKS["f16"])
    return -(-elements // block) * size


# --- scratch -------------------------------------------------------------------------------------


def _take_scratch(taken: dict[str, _Taken], job: _Job, scratch_elements: int | None) -> None:
    """What the graph of one batch takes on each device, and the host's copy of what comes out."""
    found = dict.fromkeys((*job.devices, HOST), 0)
    row = _F32_BYTES * job.tokens * job.model.width
    copies = _pipeline_copies(job)
    handed = 0
    for stretch in job.stretches:
        widest = _widest_bytes(job, stretch, handed, scratch_elements)
        if stretch.device == HOST:
            widest += row  # the embeddings, which the host looks up
            handed = _handed(job, stretch)
        if stretch.last > job.model.layers:
            widest = max(widest, _output_bytes(job))
        found[stretch.device] = widest
        if stretch.device != HOST:
            found[stretch.device] += copies * (_input_bytes(job, stretch.kinds) + row) - row
            handed = 0
    inputs = _input_bytes(job, job.model.kinds_between(0, job.model.computing))
    lent, first = _lent_bytes(job), next(iter(found))
    if lent and _backend(first) in _BORROWING:
        found[first] = max(found[first], found[HOST] + inputs) + lent
    if job.stretches[0].device != HOST:
        found[HOST] = _host_bytes(job)
    found[HOST] += copies * inputs + _output_copy_bytes(job)  # it sees to all inputs
    for name, size in found.items():
        taken[name].compute += size


def _widest_bytes(job: _Job, stretch: _Stretch, handed: int, scratch_elements: int | None) -> int:
    """The widest step of the layers in a stretch, the first of which takes over `handed`.

    Beside each step lie the layer's input, its normed copy and the room that queries leave.
    """
    model, kinds = job.model, stretch.kinds
    per_element = _F32_BYTES * job.tokens
    scan = _scan_bytes(job, kinds)
    if scratch_elements is not None and kinds:
        return per_element * max(scratch_elements, handed) + scan
    kept = 2 * model.width + model.queries
    steps = [handed]
    steps += [kept + _attended(job, kind) for kind, _ in kinds if kind.attends]
    steps += [
        kept + kind.fed + max(kind.given, handed if kind.has_experts else 0)
        for kind, _ in _feeding(job, stretch)
    ]
    recurrence = per_element * (kept + model.scan[0]) + scan if scan else 0
    return max(per_element * max(steps), recurrence)


def _scan_bytes(job: _Job, kinds: _Kinds) -> int:
    """What a recurrent layer needs for each slot beside what it needs for each token."""
    of_slot = job.model.scan[1]
    if not of_slot or not any(kind.recurs for kind, _ in kinds):
        return 0
    return _F32_BYTES * job.slots * of_slot


def _feeding(job: _Job, stretch: _Stretch) -> _Kinds:
    """Kinds of layers that feed all tokens forward: the last one only those with an output."""
    model = job.model
    feeds_all = model.feeds_every_token or job.has_outputs
    if feeds_all or stretch.last < model.computing:
        return stretch.kinds
    return model.kinds_between(stretch.first, model.computing - 1)


def _attended(job: _Job, kind: Kind) -> int:
    """Without flash attention: how much each head heeds each cell."""
    widest = max(kind.latent, kind.queries)
    if job.load.flash_attention:
        return widest
    return job.model.heads * job.seen(kind) + widest


def _handed(job: _Job, stretch: _Stretch) -> int:
    """Elements of a token that the host hands on: the sum over experts is left to the device."""
    model, last = job.model, stretch.last
    if last > model.layers:
        return 0
    ((kind, _),) = model.kinds_between(last - 1, last)
    goes_on = kind.recurs or model.feeds_every_token or job.has_outputs
    if last == model.layers and not goes_on:
        return 0
    return 2 * model.width + (model.handed if kind.has_experts else 0)


def _input_bytes(job: _Job, kinds: _Kinds) -> int:
    """Masks (one for layers with a window, one for the others), positions, and places in caches."""
    tokens = job.tokens
    total = 24 * tokens
    for kind in {kind.windowed: kind for kind, _ in kinds if kind.attends}.values():
        if job.load.flash_attention:
            total += _F16_BYTES * tokens * job.seen(kind)
        else:  # values lie crosswise: a place for each element
            total += _F32_BYTES * tokens * job.seen(kind) + 8 * tokens * kind.values
    return total


def _pipeline_copies(job: _Job) -> int:
    """Several batches are under way at once over several devices, each with inputs of its own."""
    load = job.load
    is_pipelined = (
        len(job.devices) > 1
        and (load.gpu_layers is None or load.gpu_layers > job.model.layers)
        and not load.expert_layers_on_host
        and all(_backend(device) in _PIPELINED for device in job.devices)
    )
    return _PIPELINE_COPIES if is_pipelined else 1


def _lent_bytes(job: _Job) -> int:
    """The largest of the weights on the host: a device may compute with it in the host's stead.

    By the engine's scheduler, such weights are copied to the device one after another.
    """
    if job.tokens < _LENT_TOKENS:
        return 0
    first = job.stretches[0]
    last = max(first.last if first.device == HOST else 0, job.load.expert_layers_on_host)
    return job.model.largest_bytes[min(last, job.model.layers)]


def _host_bytes(job: _Job) -> int:
    """Where no layer lies on the host: embeddings are looked up, and experts kept there in use."""
    model = job.model
    widest = model.looked_up * model.width
    if job.load.expert_layers_on_host:
        kept = model.kinds_between(0, job.load.expert_layers_on_host)
        fed = [model.width + kind.fed + kind.given for kind, _ in kept if kind.has_experts]
        widest = max([widest, *fed])
    return _F32_BYTES * job.tokens * widest


def _output_bytes(job: _Job) -> int:
    """The last step: of one token a slot, or of every token where embeddings are asked for."""
    outputs = job.tokens if job.has_outputs else job.slots
    return _F32_BYTES * outputs * (job.model.words + job.model.width)


def _output_copy_bytes(job: _Job) -> int:
    width = job.model.width if job.has_outputs else 0
    return _F32_BYTES * job.slots * (job.model.vocabulary + width)
