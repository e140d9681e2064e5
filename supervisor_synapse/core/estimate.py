"""Header and arguments → bytes on each device and on the host, before anything is loaded.

Placement and caches follow llama.cpp's own arithmetic and are exact. Scratch is the widest step of
the model's graph, fitted to what the engine allocates: a few hundredths off, and more where a
backend works in a way of its own; one load or dry run calibrates it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from supervisor_synapse.core.layers import Kind, Profile, profile
from supervisor_synapse.core.layout import HOST as HOST
from supervisor_synapse.core.layout import Layout, Steps, Stretch, backend_of, layout
from supervisor_synapse.core.model import Estimate, Header, Part, Source
from supervisor_synapse.core.settings import MIB

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

# A batch of so many is worth a copy of the host's weights on a device (`--op-offload`).
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
    beside = None if draft is None else (profile(draft[0]), draft[1])
    return of_profile(
        profile(header),
        load,
        projector_bytes=projector_bytes,
        draft=beside,
        scratch_elements=scratch_elements,
    )


def of_profile(
    model: Profile,
    load: Load,
    *,
    projector_bytes: int = 0,
    draft: tuple[Profile, Load] | None = None,
    scratch_elements: int | None = None,
) -> Estimate:
    """The same of a profile, for who asks for many loads of one model."""
    taken: dict[str, _Taken] = {}
    _take(taken, _job(model, load), scratch_elements)
    if draft is not None:
        _take(taken, _job(*draft), None)
    next(iter(taken.values())).weights += projector_bytes
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
    stretch = job.layout.stretches[-1]
    rest = compute_bytes - _input_bytes(job, stretch.steps.masks) - _scan_bytes(job, stretch.steps)
    elements = -(-rest // (_F32_BYTES * job.tokens))
    if stretch.device == HOST:
        elements -= job.model.width
    return max(elements, 0)


def margin_bytes(estimate: Estimate, device: str) -> int:
    """What to keep free on a device beside the estimate, by how much its source is worth."""
    return margin_of(estimate.on(device), estimate.source)


def margin_of(size_bytes: int, source: Source) -> int:
    """The same for so many bytes."""
    return size_bytes * _MARGIN_PERCENT[source] // 100 + _LEAST_MARGIN_BYTES


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


@lru_cache(maxsize=1024)
def _overhead(device: str) -> int:
    return _OVERHEAD_BYTES.get(backend_of(device), _UNKNOWN_BACKEND_OVERHEAD_BYTES)


# --- one model -----------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A model and a load, with what follows from both."""

    model: Profile
    load: Load
    layout: Layout
    slots: int
    tokens: int  # in one batch of the graph
    streams: int  # caches of their own: one for all slots, or one each
    full_cells: int  # of one stream
    window_cells: int  # of one stream: for the windows of its slots, and one batch

    def cells(self, kind: Kind) -> int:
        """Of one stream, in the cache of such a layer."""
        return self.window_cells if kind.windowed else self.full_cells

    def seen(self, kind: Kind) -> int:
        """Cells that a token may attend to."""
        return self.cells(kind) if self.model.has_cache else self.tokens


def _job(model: Profile, load: Load) -> _Job:
    slots = max(load.parallel, 1)
    tokens = max(min(load.ubatch, load.context), 1)
    streams = 1 if load.unified else slots
    full = window = _pad(_pad(load.context) // streams)
    if model.window and not load.swa_full:
        window = _pad(min(full, model.window * (slots if load.unified else 1) + tokens))
    laid = layout(
        model, load.devices, load.split, load.gpu_layers, load.expert_layers_on_host,
        model.gives_embeddings or load.embeddings,
    )  # fmt: skip
    return _Job(model, load, laid, slots, tokens, streams, full, window)


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _take(taken: dict[str, _Taken], job: _Job, scratch_elements: int | None) -> None:
    """Add one model's buffers."""
    for name, size in job.layout.weights.items():
        if name not in taken:
            taken[name] = _Taken()
        taken[name].weights += size
    _take_caches(taken, job)
    _take_scratch(taken, job, scratch_elements)


# --- caches --------------------------------------------------------------------------------------


def _take_caches(taken: dict[str, _Taken], job: _Job) -> None:
    """Keys and values, and recurrent state."""
    types = job.load.cache_type_k, job.load.cache_type_v
    for stretch in job.layout.stretches:
        for kind, count in stretch.kinds:
            cells = count * job.streams * job.cells(kind)
            taken[stretch.device].kv += cells * _row_bytes(*types, kind.keys, kind.values)
            if kind.recurs:
                state = _F32_BYTES * job.slots * sum(job.model.state)
                taken[stretch.device].recurrent += count * state


@lru_cache(maxsize=1024)
def _row_bytes(type_k: str, type_v: str, keys: int, values: int) -> int:
    return _type_bytes(type_k, keys) + _type_bytes(type_v, values)


def _type_bytes(cache_type: str, elements: int) -> int:
    block, size = _CACHE_BLOCKS.get(cache_type, _CACHE_BLOCKS["f16"])
    return -(-elements // block) * size


# --- scratch -------------------------------------------------------------------------------------


def _take_scratch(taken: dict[str, _Taken], job: _Job, scratch_elements: int | None) -> None:
    """What the graph of one batch takes on each device, and the host's copy of what comes out."""
    laid = job.layout
    found = dict.fromkeys(laid.weights, 0)
    row = _F32_BYTES * job.tokens * job.model.width
    for stretch in laid.stretches:
        widest = _widest_bytes(job, stretch, scratch_elements)
        if stretch.device == HOST:
            widest += row  # the embeddings, which the host looks up
        if stretch.has_output:
            widest = max(widest, _output_bytes(job))
        if stretch.device != HOST:
            widest += laid.copies * (_input_bytes(job, stretch.steps.masks) + row) - row
        found[stretch.device] = widest
    inputs = _input_bytes(job, job.model.masks)
    if laid.lent_bytes and job.tokens >= _LENT_TOKENS:
        first = laid.devices[0]
        found[first] = max(found[first], found[HOST] + inputs) + laid.lent_bytes
    if laid.stretches[0].device != HOST:
        found[HOST] = _F32_BYTES * job.tokens * laid.looked_up
    found[HOST] += laid.copies * inputs + _output_copy_bytes(job)  # it sees to all inputs
    for name, size in found.items():
        taken[name].compute += size


def _widest_bytes(job: _Job, stretch: Stretch, scratch_elements: int | None) -> int:
    """The widest step of the layers in a stretch."""
    per_element = _F32_BYTES * job.tokens
    steps = stretch.steps
    scan = _scan_bytes(job, steps)
    if scratch_elements is not None and steps.compute:
        return per_element * max(scratch_elements, stretch.handed) + scan
    widest = stretch.widest
    if not job.load.flash_attention:
        widest = max([widest, *[_heeded(job, kind) for kind in steps.attending]])
    recurrence = per_element * (job.model.beside + job.model.scan[0]) + scan if scan else 0
    return max(per_element * widest, recurrence)


def _heeded(job: _Job, kind: Kind) -> int:
    """Without flash attention each head keeps how much it heeds each cell."""
    return job.model.beside + kind.attended + job.model.heads * job.seen(kind)


def _scan_bytes(job: _Job, steps: Steps) -> int:
    """What a recurrent layer needs for each slot beside what it needs for each token."""
    return _F32_BYTES * job.slots * job.model.scan[1] if steps.recur else 0


def _input_bytes(job: _Job, masks: Iterable[Kind]) -> int:
    """Masks (one for layers with a window, one for the others), positions, and places in caches."""
    tokens = job.tokens
    total = 24 * tokens
    for kind in masks:
        if job.load.flash_attention:
            total += _F16_BYTES * tokens * job.seen(kind)
        else:  # values lie crosswise: a place for each element
            total += _F32_BYTES * tokens * job.seen(kind) + 8 * tokens * kind.values
    return total


def _output_bytes(job: _Job) -> int:
    """The last step: of one token a slot, or of every token where embeddings are asked for."""
    outputs = job.tokens if job.layout.has_outputs else job.slots
    return _F32_BYTES * outputs * (job.model.words + job.model.width)


def _output_copy_bytes(job: _Job) -> int:
    width = job.model.width if job.layout.has_outputs else 0
    return _F32_BYTES * job.slots * (job.model.vocabulary + width)
