"""Header and arguments → bytes on each device and on the host, before anything is loaded.

The arithmetic of placement and caches is llama.cpp's own; scratch follows the widest step of the
model's graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from supervisor_synapse.core.model import Estimate, Header, Part, Source
from supervisor_synapse.core.settings import MIB

HOST = "CPU"

_RECURRENT_ELEMENT_BYTES = 4  # f32
_CELL_PADDING = 256

# Elements and bytes of one block of a cache type.
_CACHE_BLOCKS = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24),
    "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip

# How often a full-attention layer comes where the header gives a window but no pattern.
_DEFAULT_WINDOW_PERIOD = {
    "gemma2": 2, "gpt-oss": 2, "llama4": 4, "cohere2": 4, "exaone4": 4, "olmo2": 4,
    "gemma3n": 5, "gemma3": 6, "gemma-embedding": 6,
}  # fmt: skip

# What a server process takes beside its buffers; by backend, until a load has been measured.
_OVERHEAD_BYTES = {
    "CPU": 48 * MIB, "CUDA": 550 * MIB, "ROCm": 450 * MIB, "MTL": 512 * MIB, "Metal": 512 * MIB,
    "Vulkan": 64 * MIB, "RPC": 64 * MIB,
}  # fmt: skip
_UNKNOWN_BACKEND_OVERHEAD_BYTES = 256 * MIB

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


def estimate(
    header: Header,
    load: Load,
    *,
    projector_bytes: int = 0,
    draft: tuple[Header, Load] | None = None,
    scratch_elements: int | None = None,
) -> Estimate:
    """Bytes on each device of `load`, in order, and on the host, which comes last.

    `header` holds the weights of all shards. `scratch_elements`: what `calibrate` gave for this
    model; the source is then CALIBRATED.
    """
    parts = _buffers(header, load, scratch_elements)
    if draft is not None:
        parts = _sum(parts, _buffers(*draft, None))
    main = load.devices[0] if _offloads(load) else HOST
    parts = _sum(parts, {main: Part(main, weights_bytes=projector_bytes)})
    cached = load.prompt_cache_bytes
    if cached is None:
        cached = prompt_cache_bytes(sum(part.kv_bytes for part in parts.values()))
    parts = _sum(parts, {name: Part(name, overhead_bytes=_overhead(name)) for name in parts})
    parts = _sum(parts, {HOST: Part(HOST, overhead_bytes=cached)})
    source = Source.HEADER if scratch_elements is None else Source.CALIBRATED
    return Estimate(tuple(parts[name] for name in (*_devices(load), HOST)), source)


def calibrate(header: Header, load: Load, compute_bytes: int) -> int:
    """The model's scratch in elements per token, from the compute bytes of one load.

    `compute_bytes`: of the device that holds the output layer, as the engine told them.
    """
    fixed = _fixed_compute(header, load)
    return max(-(-(compute_bytes - fixed) // (4 * _ubatch(load))), 0)


def margin_bytes(estimate: Estimate, device: str) -> int:
    """What to keep free on a device beside the estimate, by how much its source is worth."""
    return estimate.on(device) * _MARGIN_PERCENT[estimate.source] // 100 + _LEAST_MARGIN_BYTES


def prompt_cache_bytes(kv_bytes: int) -> int:
    """Host memory for prompts kept between requests: room for two full contexts, within reason.

    Always set on the command line: llama-server's own default is 8 GiB for each server.
    """
    return min(max(2 * kv_bytes, 16 * MIB), 1024 * MIB)


def _overhead(device: str) -> int:
    backend = device.rstrip("0123456789")
    return _OVERHEAD_BYTES.get(backend, _UNKNOWN_BACKEND_OVERHEAD_BYTES)


def _sum(some: Mapping[str, Part], more: Mapping[str, Part]) -> dict[str, Part]:
    """Parts added device by device."""
    total = dict(some)
    for name, part in more.items():
        known = total.get(name, Part(name))
        total[name] = Part(
            name,
            known.weights_bytes + part.weights_bytes,
            known.kv_bytes + part.kv_bytes,
            known.recurrent_bytes + part.recurrent_bytes,
            known.compute_bytes + part.compute_bytes,
            known.overhead_bytes + part.overhead_bytes,
        )
    return total


def _buffers(header: Header, load: Load, scratch_elements: int | None) -> dict[str, Part]:
    """What one model takes, less what the process takes beside."""
    places = _placement(header, load)
    weights = _weights(header, load, places)
    kv, recurrent = _caches(header, load, places)
    compute = _compute(header, load, places, scratch_elements)
    return {
        name: Part(name, weights[name], kv[name], recurrent[name], compute[name])
        for name in (*_devices(load), HOST)
    }


# --- placement -----------------------------------------------------------------------------------


def _devices(load: Load) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in load.devices if name != HOST))


def _offloads(load: Load) -> bool:
    return bool(_devices(load)) and load.gpu_layers != 0


def _placement(header: Header, load: Load) -> tuple[str, ...]:
    """The device of each layer; that of the output layer comes last.

    llama_model::load_tensors: the last `gpu_layers` go to the devices, each to the first one whose
    cumulated part of the split is above the layer's place among them.
    """
    count = header.layers + 1
    offloaded = count if load.gpu_layers is None else min(max(load.gpu_layers, 0), count)
    devices = _devices(load)
    if not devices or not offloaded:
        return (HOST,) * count
    bounds = _bounds(load.split, len(devices))
    on_devices = (
        devices[min(bisect_right(bounds, Fraction(place, offloaded)), len(devices) - 1)]
        for place in range(offloaded)
    )
    return (HOST,) * (count - offloaded) + tuple(on_devices)


def _bounds(split: Sequence[float], devices: int) -> list[Fraction]:
    """Where each device's part of the layers ends, of 1."""
    parts = [Fraction(max(part, 0.0)) for part in split[:devices]]
    parts += [Fraction(0)] * (devices - len(parts))
    if not any(parts):
        parts = [Fraction(1)] * devices
    return [end / sum(parts) for end in accumulate(parts)]


def _weights(header: Header, load: Load, places: Sequence[str]) -> Counter[str]:
    """Blocks by layer, the token embedding on the host, and what else there is with the output."""
    found: Counter[str] = Counter()
    for layer, size in enumerate(header.block_bytes):
        found[places[min(layer, len(places) - 1)]] += size
    output = places[-1]
    rest = header.tensor_bytes - header.embedding_bytes - sum(header.block_bytes)
    found[output] += max(rest, 0)
    found[HOST] += header.embedding_bytes
    if not header.has_output and output != HOST:
        found[output] += header.embedding_bytes  # it serves as the output too: a copy
    return found


# --- caches --------------------------------------------------------------------------------------


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _streams(load: Load) -> int:
    """Caches of their own: one for all slots, or one each."""
    return 1 if load.unified else max(load.parallel, 1)


def _full_cells(load: Load) -> int:
    """Of one stream."""
    return _pad(_pad(load.context) // _streams(load))


def _window_cells(header: Header, load: Load) -> int:
    """Of one stream: the windows of its slots, and one ubatch."""
    full = _full_cells(load)
    if load.swa_full:
        return full
    slots = load.parallel if load.unified else 1
    return _pad(min(full, header.sliding_window * slots + _ubatch(load)))


def _ubatch(load: Load) -> int:
    return max(min(load.ubatch, load.context), 1)


def _at(values: tuple[int, ...], layer: int) -> int:
    """A per-layer value, where one value may stand for all layers."""
    if not values:
        return 0
    return values[layer] if layer < len(values) else values[-1]


def _is_windowed(header: Header, layer: int) -> bool:
    if not header.sliding_window:
        return False
    pattern = header.sliding_window_pattern
    if len(pattern) > 1:
        return bool(_at(pattern, layer))
    period = pattern[0] if pattern else _DEFAULT_WINDOW_PERIOD.get(header.architecture, 0)
    return period > 0 and layer % period < period - 1


def _layer_cells(header: Header, load: Load, layer: int) -> int:
    """Cells of one stream; 0 for a layer without attention."""
    if not _has_cache(header, layer):
        return 0
    return _window_cells(header, load) if _is_windowed(header, layer) else _full_cells(load)


def _has_cache(header: Header, layer: int) -> bool:
    """Encoders without causal attention keep no cache; recurrent layers keep a state instead."""
    if header.causal_attention is False:
        return False
    return _at(header.heads_kv or header.heads, layer) > 0


def _caches(header: Header, load: Load, places: Sequence[str]) -> tuple[Counter[str], Counter[str]]:
    """Keys and values, and recurrent state, by device."""
    kv: Counter[str] = Counter()
    recurrent: Counter[str] = Counter()
    for layer in range(header.layers):
        if _has_cache(header, layer):
            cells = _streams(load) * _layer_cells(header, load, layer)
            kv[places[layer]] += cells * _row_bytes(header, load, layer)
        else:
            recurrent[places[layer]] += load.parallel * _state_bytes(header)
    return kv, recurrent


def _type_bytes(cache_type: str, elements: int) -> int:
    block, size = _CACHE_BLOCKS.get(cache_type, _CACHE_BLOCKS["f16"])
    return -(-elements // block) * size


def _row_bytes(header: Header, load: Load, layer: int) -> int:
    """One cell's keys and values in one layer."""
    heads = _at(header.heads, 0)
    default = header.embedding_length // heads if heads else 0
    if header.kv_lora_rank:  # MLA keeps one compressed row, in K alone
        return _type_bytes(load.cache_type_k, header.key_length or default)
    heads_kv = _at(header.heads_kv or header.heads, layer)
    keys = _type_bytes(load.cache_type_k, heads_kv * (header.key_length or default))
    return keys + _type_bytes(load.cache_type_v, heads_kv * (header.value_length or default))


def _state_bytes(header: Header) -> int:
    """One slot's recurrent state in one layer."""
    conv_kernel, inner, state, _, groups = header.recurrent_state
    if not inner:
        return 0
    convolution = max(conv_kernel - 1, 0) * (inner + 2 * groups * state)
    return _RECURRENT_ELEMENT_BYTES * (convolution + state * inner)


# --- scratch -------------------------------------------------------------------------------------


def _mask_cells(header: Header, load: Load) -> int:
    """Cells over all caches: layers with a window share one, the others another."""
    kinds = {
        _is_windowed(header, layer) for layer in range(header.layers) if _has_cache(header, layer)
    }
    full, window = _full_cells(load), _window_cells(header, load)
    return _streams(load) * sum(window if windowed else full for windowed in kinds)


def _fixed_compute(header: Header, load: Load) -> int:
    """What no calibration changes: the mask of each cache, and the logits."""
    return 2 * _ubatch(load) * _mask_cells(header, load) + _logits(header, load)


def _logits(header: Header, load: Load) -> int:
    return 4 * load.parallel * header.vocabulary_size


def _scratch_elements(header: Header) -> int:
    """The widest activations of one token."""
    feed_forward = max(header.feed_forward_length, default=0)
    width = header.embedding_length
    if header.experts:
        used, expert = header.experts_used, header.expert_feed_forward_length or feed_forward
        return max(3 * used * expert + 3 * width, 2 * used * width + used * expert + 2 * width)
    return 3 * feed_forward + 3 * width


def _compute(
    header: Header, load: Load, places: Sequence[str], scratch_elements: int | None
) -> Counter[str]:
    """Scratch for one ubatch on every device that computes."""
    elements = _scratch_elements(header) if scratch_elements is None else scratch_elements
    scratch = _fixed_compute(header, load) + 4 * _ubatch(load) * elements
    return Counter(dict.fromkeys(set(places), scratch))
