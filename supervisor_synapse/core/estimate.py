"""Header and arguments → bytes on each device and on the host, before anything is loaded.

Placement and caches follow llama.cpp's own arithmetic and are exact. Scratch is the widest step of
the model's graph in elements a token, fitted to what the engine allocates: a few hundredths off,
and more where a backend works in its own way; a load or a dry run calibrates it.

The profile of a header, which no argument changes, is kept: a plan asks for many loads of each.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

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


class _Windows(NamedTuple):
    """Which layers have a window, where the header gives its size but no list of them."""

    period: int  # one layer of so many sees everything; 0: none does
    full_first: bool = False  # it is the first one, not the last


# By what each architecture does in llama.cpp; for others a window alone means nothing.
_WINDOWS = {
    "afmoe": _Windows(4), "cohere2": _Windows(4), "exaone4": _Windows(4),
    "exaone-moe": _Windows(4), "gemma-embedding": _Windows(6), "gemma2": _Windows(2),
    "gemma3": _Windows(6), "gemma3n": _Windows(5), "gpt-oss": _Windows(2),
    "laguna": _Windows(4, full_first=True), "llama4": _Windows(4),
    "modern-bert": _Windows(3, full_first=True), "olmo2": _Windows(4), "plamo3": _Windows(8),
    "smallthinker": _Windows(4, full_first=True),
}  # fmt: skip
_FIXED_WINDOW = {"llama4": 8192, "smallthinker": 4096}  # whatever the header says, if it says any

# Architectures that llama.cpp gives no cache: they see all their input at once.
_WITHOUT_CACHE = frozenset(
    {
        "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada",
        "llada-moe", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1",
        "wavtokenizer-dec",
    }
)  # fmt: skip
_WITHOUT_OUTPUT = frozenset(name for name in _WITHOUT_CACHE if "bert" in name)
_WITHOUT_LOGITS = _WITHOUT_OUTPUT | {"gemma-embedding"}

# Gated delta nets: every fourth layer attends unless the header says otherwise.
_DELTA_NETS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_DELTA_NET_INTERVAL = 4
# Behind the attention of the last layer only tokens that have an output go on, but not in these.
_FEEDS_EVERY_TOKEN = frozenset({"gpt-oss", *_DELTA_NETS})
_RECURRENT_BESIDE_ATTENTION = frozenset({"falcon-h1"})  # both in every layer
# A layer without attention recurs only where it does not feed forward.
_RECURRENT_OR_FEEDING = frozenset({"nemotron_h", "nemotron_h_moe"})
_CACHES_OF_GEMMA3N = 20  # layers; the others use theirs

# What a server process takes beside its buffers; by backend, until a load has been measured.
_OVERHEAD_BYTES = {
    "CPU": 48 * MIB, "CUDA": 550 * MIB, "ROCm": 450 * MIB, "MTL": 512 * MIB, "Metal": 512 * MIB,
    "Vulkan": 64 * MIB, "RPC": 8 * MIB,
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

    `header` holds the weights of all shards. `scratch_elements`: what `calibrate` gave for this
    model; the source is then CALIBRATED.
    """
    parts = _buffers(header, load, scratch_elements)
    if draft is not None:
        parts = _sum(parts, _buffers(*draft, None))
    main = next(iter(_devices(load)), HOST)
    parts = _sum(parts, {main: Part(main, weights_bytes=projector_bytes)})
    cached = load.prompt_cache_bytes
    if cached is None:
        cached = prompt_cache_bytes(sum(part.kv_bytes for part in parts.values()))
    parts = _sum(parts, {name: Part(name, overhead_bytes=_overhead(name)) for name in parts})
    parts = _sum(parts, {HOST: Part(HOST, overhead_bytes=cached)})
    source = Source.HEADER if scratch_elements is None else Source.CALIBRATED
    return Estimate((*(part for name, part in parts.items() if name != HOST), parts[HOST]), source)


def calibrate(header: Header, load: Load, compute_bytes: int) -> int:
    """The model's scratch in elements per token, from the compute bytes of one load.

    `compute_bytes`: where the output layer lies, as the engine told them. What is found serves for
    any other context, number of slots or batch.
    """
    stretch = _stretches(header, load)[-1]
    rest = compute_bytes - _input_bytes(header, load, (stretch,))
    elements = -(-rest // (_F32_BYTES * _tokens(load)))
    if stretch.device == HOST:
        elements -= header.embedding_length
    return max(elements, 0)


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
    stretches = _stretches(header, load)
    weights = _weights(header, load, stretches)
    kv, recurrent = _caches(header, load, stretches)
    compute = _compute(header, load, stretches, scratch_elements)
    return {
        name: Part(name, weights[name], kv[name], recurrent[name], compute[name])
        for name in (*_devices(load), HOST)
    }


# --- layers --------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What memory depends on in one layer; most models have two or three kinds."""

    attends: bool
    windowed: bool
    keys: int  # elements in one cell of its cache; 0 where it keeps none of its own
    values: int
    queries: int  # elements of one token
    recurs: bool
    has_experts: bool
    feed_forward: int


@dataclass(frozen=True, slots=True)
class _Profile:
    """A header's layers, summed up from the first: element i is the sum over those before i."""

    kinds: tuple[_Kind, ...]
    counts: tuple[tuple[int, ...], ...]  # of each kind
    block_bytes: tuple[int, ...]
    expert_bytes: tuple[int, ...]


@lru_cache(maxsize=1024)
def _profile(header: Header) -> _Profile:
    layers = [_kind(header, layer) for layer in range(header.layers)]
    kinds = tuple(dict.fromkeys(layers))
    return _Profile(
        kinds,
        tuple(_sums(int(layer == kind) for layer in layers) for kind in kinds),
        _sums(_padded(header.block_bytes, header.layers)),
        _sums(_padded(header.expert_bytes, header.layers)),
    )


def _sums(values: Iterator[int] | Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))


def _padded(values: tuple[int, ...], count: int) -> list[int]:
    return [values[index] if index < len(values) else 0 for index in range(count)]


def _kind(header: Header, layer: int) -> _Kind:
    recurs, attends = _is_recurrent(header, layer), _attends(header, layer)
    windowed = attends and _is_windowed(header, layer)
    keys, values = (0, 0)
    if attends and _keeps_cache(header, layer):
        keys, values = _cell(header, layer, windowed=windowed)
    has_experts = bool(header.experts)
    if any(header.expert_bytes):
        has_experts = _at(header.expert_bytes, layer) > 0
    width = header.key_length_mla or header.key_length or _default_head(header)
    return _Kind(
        attends=attends, windowed=windowed, keys=keys, values=values,
        queries=_at(header.heads, layer) * width if attends else 0, recurs=recurs,
        has_experts=has_experts, feed_forward=_at(header.feed_forward_length, layer),
    )  # fmt: skip


def _at(values: tuple[int, ...], layer: int) -> int:
    """A per-layer value, where one value may stand for all layers."""
    if not values:
        return 0
    return values[layer] if layer < len(values) else values[-1]


def _is_recurrent(header: Header, layer: int) -> bool:
    if header.recurrent_layers:
        return bool(_at(header.recurrent_layers, layer))
    if not any(_state_elements(header)):
        return False
    if header.attention_interval or header.architecture in _DELTA_NETS:
        interval = header.attention_interval or _DELTA_NET_INTERVAL
        return (layer + 1) % interval != 0
    if header.architecture in _RECURRENT_BESIDE_ATTENTION:
        return True
    if header.architecture in _RECURRENT_OR_FEEDING and _at(header.feed_forward_length, layer):
        return False
    return _heads_kv(header, layer) == 0


def _attends(header: Header, layer: int) -> bool:
    if _is_recurrent(header, layer):
        return header.architecture in _RECURRENT_BESIDE_ATTENTION
    return _heads_kv(header, layer) > 0


def _heads_kv(header: Header, layer: int) -> int:
    return _at(header.heads_kv or header.heads, layer)


def _default_head(header: Header) -> int:
    heads = _at(header.heads, 0)
    return header.embedding_length // heads if heads else 0


def _keeps_cache(header: Header, layer: int) -> bool:
    """Encoders keep none; some layers use the cache of one before them, or only serve to draft."""
    if header.architecture in _WITHOUT_CACHE:
        return False
    if header.architecture == "gemma3n":
        return layer < _CACHES_OF_GEMMA3N
    return layer < header.layers - header.shared_kv_layers - header.predicting_layers


def _cell(header: Header, layer: int, *, windowed: bool) -> tuple[int, int]:
    """Elements of one cell's keys and values in one layer."""
    heads, default = _heads_kv(header, layer), _default_head(header)
    key, value = header.key_length or default, header.value_length or default
    if windowed:
        key, value = header.window_key_length or key, header.window_value_length or value
    if header.key_length_mla and header.value_length_mla:  # one compressed row, in keys alone
        value = 0
    return heads * key, heads * value


def _window(header: Header) -> int:
    """Tokens that a layer with a window sees."""
    if header.sliding_window:
        return _FIXED_WINDOW.get(header.architecture, header.sliding_window)
    return 0


def _is_windowed(header: Header, layer: int) -> bool:
    if not header.sliding_window:
        return False
    pattern = header.sliding_window_pattern
    if len(pattern) > 1:
        return bool(_at(pattern, layer))
    known = _WINDOWS.get(header.architecture, _Windows(1))
    period = pattern[0] if pattern else known.period
    if period == 0:
        return True
    return layer % period != (0 if known.full_first else period - 1)


# --- placement -----------------------------------------------------------------------------------


class _Stretch(NamedTuple):
    """Layers from `first` to before `last` on one device."""

    device: str
    first: int
    last: int


def _devices(load: Load) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in load.devices if name != HOST))


def _stretches(header: Header, load: Load) -> tuple[_Stretch, ...]:
    """Where the layers lie, in their order; the last stretch ends with the output layer.

    llama_model::load_tensors: the last `gpu_layers` go to the devices, each to the first one whose
    cumulated part of the split is above the layer's place among them.
    """
    count = header.layers + 1
    devices = _devices(load)
    offloaded = count if load.gpu_layers is None else min(max(load.gpu_layers, 0), count)
    if not devices or not offloaded:
        return (_Stretch(HOST, 0, count),)
    start = count - offloaded
    ends = [start + end for end in _ends(load.split[: len(devices)], len(devices), offloaded)]
    on_devices = zip(devices, [start, *ends], ends, strict=False)
    stretches = [_Stretch(HOST, 0, start), *(_Stretch(*found) for found in on_devices)]
    return tuple(stretch for stretch in stretches if stretch.first < stretch.last)


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


def _weights(header: Header, load: Load, stretches: Sequence[_Stretch]) -> Counter[str]:
    """Blocks by layer, inputs on the host, and what else there is with the output."""
    profile = _profile(header)
    found: Counter[str] = Counter()
    for device, first, last in stretches:
        blocks = _within(profile.block_bytes, first, last)
        kept = _within(profile.expert_bytes, first, min(last, load.expert_layers_on_host))
        found[device] += blocks - kept
        found[HOST] += kept
    output = stretches[-1].device
    inputs = max(header.input_bytes, header.embedding_bytes)
    found[HOST] += inputs
    found[output] += max(header.tensor_bytes - inputs - profile.block_bytes[-1], 0)
    if not header.has_output and output != HOST and header.architecture not in _WITHOUT_OUTPUT:
        found[output] += header.embedding_bytes  # it serves as the output too: a copy
    return found


def _within(sums: Sequence[int], first: int, last: int) -> int:
    """The sum over layers from `first` to before `last`; the output layer counts nothing."""
    most = len(sums) - 1
    return sums[min(max(last, first), most)] - sums[min(first, most)]


# --- caches --------------------------------------------------------------------------------------


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _streams(load: Load) -> int:
    """Caches of their own: one for all slots, or one each."""
    return 1 if load.unified else max(load.parallel, 1)


def _cells(header: Header, load: Load, *, windowed: bool) -> int:
    """Of one stream; with a window: for the windows of its slots, and one batch."""
    full = _pad(_pad(load.context) // _streams(load))
    if not windowed or load.swa_full:
        return full
    slots = max(load.parallel, 1) if load.unified else 1
    return _pad(min(full, _window(header) * slots + _tokens(load)))


def _tokens(load: Load) -> int:
    """In one batch of the graph."""
    return max(min(load.ubatch, load.context), 1)


def _caches(
    header: Header, load: Load, stretches: Sequence[_Stretch]
) -> tuple[Counter[str], Counter[str]]:
    """Keys and values, and recurrent state, by device."""
    kv: Counter[str] = Counter()
    recurrent: Counter[str] = Counter()
    state = _F32_BYTES * max(load.parallel, 1) * sum(_state_elements(header))
    for device, kind, count in _kinds(_profile(header), stretches):
        cells = _streams(load) * _cells(header, load, windowed=kind.windowed)
        keys = _type_bytes(load.cache_type_k, kind.keys)
        kv[device] += count * cells * (keys + _type_bytes(load.cache_type_v, kind.values))
        recurrent[device] += count * state * kind.recurs
    return kv, recurrent


def _kinds(profile: _Profile, stretches: Sequence[_Stretch]) -> Iterator[tuple[str, _Kind, int]]:
    """Which kinds of layers lie where, and how many of each."""
    for device, first, last in stretches:
        for kind, counts in zip(profile.kinds, profile.counts, strict=True):
            if count := _within(counts, first, last):
                yield device, kind, count


def _type_bytes(cache_type: str, elements: int) -> int:
    block, size = _CACHE_BLOCKS.get(cache_type, _CACHE_BLOCKS["f16"])
    return -(-elements // block) * size


def _state_elements(header: Header) -> tuple[int, int]:
    """One slot's recurrent state in one layer: of the convolution, and of the scan."""
    width = header.embedding_length
    kernel, inner, state, _, groups = header.recurrent_state
    if header.wkv_head_size:
        return header.token_shifts * width, width * header.wkv_head_size
    if header.short_convolution:
        return width * (header.short_convolution - 1), 0
    if header.kda_head_size:
        heads = _at(header.heads, 0)
        convolved = 3 * max(kernel - 1, 0) * heads * header.kda_head_size
        return convolved, header.kda_head_size**2 * heads
    return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner


# --- scratch -------------------------------------------------------------------------------------


def _compute(
    header: Header, load: Load, stretches: Sequence[_Stretch], scratch_elements: int | None
) -> Counter[str]:
    """What the graph of one batch takes on each device, and the host's copy of what comes out."""
    found: Counter[str] = Counter()
    handed = 0
    for stretch in stretches:
        widest = _widest_bytes(header, load, stretch, handed, scratch_elements)
        if stretch is stretches[-1]:
            widest = max(widest, _output_bytes(header, load))
        found[stretch.device] = widest
        if stretch.device != HOST:
            found[stretch.device] += _input_bytes(header, load, (stretch,))
        handed = _handed_elements(header, load, stretch)
    per_element = _F32_BYTES * _tokens(load)
    if stretches[0].device == HOST:
        found[HOST] += per_element * header.embedding_length
    else:
        found[HOST] = per_element * _host_elements(header, load)
    found[HOST] += _input_bytes(header, load, stretches)  # the host sees to all of them
    found[HOST] += _output_copy_bytes(header, load)
    return found


def _host_elements(header: Header, load: Load) -> int:
    """Of a token, where no layer lies on the host: embeddings, and experts kept there."""
    width = header.embedding_length
    rows = 3 if header.architecture in _WITHOUT_OUTPUT else 2
    kept = _kinds_in(header, _Stretch(HOST, 0, load.expert_layers_on_host))
    fed = (_fed_elements(header, kind, 0) for kind in kept if kind.has_experts)
    return max(rows * width, max(fed, default=0) + width)


def _widest_bytes(
    header: Header, load: Load, stretch: _Stretch, handed: int, scratch_elements: int | None
) -> int:
    """The widest step of the layers in a stretch, the first of which takes over `handed`."""
    per_element = _F32_BYTES * _tokens(load)
    kinds = _kinds_in(header, stretch)
    if scratch_elements is not None and kinds:
        return per_element * max(scratch_elements, handed)
    fed = stretch
    if not _feeds_every_token(header, load):
        fed = stretch._replace(last=min(stretch.last, header.layers - 1))
    kept = 2 * header.embedding_length + _queries(header)
    steps = [per_element * handed]
    steps += [_mixing_bytes(header, load, kind, kept) for kind in kinds]
    steps += [
        per_element * (kept + _fed_elements(header, kind, handed))
        for kind in _kinds_in(header, fed)
    ]
    return max(steps)


def _feeds_every_token(header: Header, load: Load) -> bool:
    """In the last layer, too."""
    return header.architecture in _FEEDS_EVERY_TOKEN or _gives_embeddings(header, load)


def _kinds_in(header: Header, stretch: _Stretch) -> list[_Kind]:
    return [kind for _, kind, _ in _kinds(_profile(header), (stretch,))]


def _queries(header: Header) -> int:
    """Elements of one token, in the widest layer: that room stays between what else there is."""
    return max((kind.queries for kind in _profile(header).kinds), default=0)


def _handed_elements(header: Header, load: Load, stretch: _Stretch) -> int:
    """Of a token, what the host hands on: the sum over experts is left to the device."""
    if stretch.device != HOST or stretch.last > header.layers:
        return 0
    (last,) = _kinds_in(header, stretch._replace(first=stretch.last - 1))
    if stretch.last == header.layers and not (last.recurs or _feeds_every_token(header, load)):
        return 0
    return (2 + header.experts_used * last.has_experts) * header.embedding_length


def _input_bytes(header: Header, load: Load, stretches: Sequence[_Stretch]) -> int:
    """Masks (one for layers with a window, one for the others), positions and places in caches."""
    tokens, profile = _tokens(load), _profile(header)
    kinds = {kind.windowed: kind for _, kind, _ in _kinds(profile, stretches) if kind.attends}
    total = 24 * tokens
    for windowed, kind in kinds.items():
        seen = tokens if not kind.keys else _cells(header, load, windowed=windowed)
        if load.flash_attention:
            total += _F16_BYTES * tokens * seen
        else:  # values lie crosswise: a place for each element
            total += _F32_BYTES * tokens * seen + 8 * tokens * kind.values
    return total


def _gives_embeddings(header: Header, load: Load) -> bool:
    return load.embeddings or bool(header.pooling)


def _output_bytes(header: Header, load: Load) -> int:
    """The last step: of one token a slot, or of every token where embeddings are asked for."""
    outputs = _tokens(load) if _gives_embeddings(header, load) else max(load.parallel, 1)
    words = 0 if header.architecture in _WITHOUT_LOGITS else header.vocabulary_size
    return _F32_BYTES * outputs * (words + header.embedding_length)


def _output_copy_bytes(header: Header, load: Load) -> int:
    words = 0 if header.architecture in _WITHOUT_OUTPUT else header.vocabulary_size
    width = words + header.embedding_length * _gives_embeddings(header, load)
    return _F32_BYTES * max(load.parallel, 1) * width


def _mixing_bytes(header: Header, load: Load, kind: _Kind, kept: int) -> int:
    """The widest step of a layer's attention or recurrence.

    `kept`: elements of a token beside it, which are the layer's input, its normed copy and the
    room that queries leave.
    """
    per_element = _F32_BYTES * _tokens(load)
    steps = [0]
    if kind.attends:
        steps.append(per_element * (kept + _attention_elements(header, load, kind)))
    if kind.recurs:
        scan, slot = _scan_elements(header)
        per_slot = _F32_BYTES * max(load.parallel, 1)
        steps.append(per_element * (kept + scan) + per_slot * slot)
    return max(steps)


def _fed_elements(header: Header, kind: _Kind, handed: int) -> int:
    """Gate, projection and product; with experts, of those in use, and what they give."""
    if not kind.has_experts:
        return kind.feed_forward * (1 if header.ungated else 3)
    used, width = header.experts_used, header.embedding_length
    inner = header.expert_feed_forward_length or kind.feed_forward
    given = used * width if width > 2 * inner else 0  # else it fits where gate and projection were
    return 3 * used * inner + max(given, handed)


def _attention_elements(header: Header, load: Load, kind: _Kind) -> int:
    rank, heads = header.kv_lora_rank, max(header.heads, default=0)
    if rank and not kind.values:  # MLA: queries, compressed and then not
        turned = max(header.key_length - rank, 0)
        latent = heads * (2 * rank + turned) + kind.queries + header.embedding_length
    else:
        latent = 0
    if load.flash_attention:
        return max(latent, kind.queries, kind.values + kind.keys // 2)
    seen = _cells(header, load, windowed=kind.windowed) if kind.keys else _tokens(load)
    return heads * seen + max(latent, kind.queries)


def _scan_elements(header: Header) -> tuple[int, int]:
    """Of a token, and of a slot, in one recurrent layer."""
    _, inner, state, rank, groups = header.recurrent_state
    convolution, scan = _state_elements(header)
    if header.kda_head_size:
        inner = max(header.heads, default=0) * header.kda_head_size
        return 9 * inner, 2 * scan
    if header.wkv_head_size:
        return 8 * header.embedding_length, convolution + scan
    if header.short_convolution:
        return 5 * header.embedding_length, 2 * convolution
    convolved = inner + 2 * groups * state
    if header.architecture in _DELTA_NETS:
        return 2 * convolved + 3 * inner, 2 * scan
    if groups:  # Mamba 2
        return inner + convolved + rank + 2 * convolved + inner, scan + 2 * convolution
    return 5 * inner, scan + 2 * convolution
