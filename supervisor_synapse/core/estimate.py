"""Header and arguments → bytes, before anything is loaded.

The placement and cache arithmetic is llama.cpp's own, for its default cache type (f16) and
flash attention; figures are for a model that lies wholly on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from supervisor_synapse.core.model import Estimate, Header, Part, Source
from supervisor_synapse.core.settings import MIB

_CACHE_ELEMENT_BYTES = 2  # f16
_RECURRENT_ELEMENT_BYTES = 4  # f32
_CELL_PADDING = 256

# How often a full-attention layer comes where the header gives a window but no pattern.
_DEFAULT_WINDOW_PERIOD = {
    "gemma2": 2, "gpt-oss": 2, "llama4": 4, "cohere2": 4, "exaone4": 4, "olmo2": 4,
    "gemma3n": 5, "gemma3": 6, "gemma-embedding": 6,
}  # fmt: skip

# What a server process takes beside its buffers; by backend, until a load has been measured.
_OVERHEAD_BYTES = {
    "CPU": 48 * MIB, "CUDA": 550 * MIB, "ROCm": 450 * MIB, "MTL": 512 * MIB, "Metal": 512 * MIB,
    "Vulkan": 64 * MIB,
}  # fmt: skip
_UNKNOWN_BACKEND_OVERHEAD_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Load:
    """The arguments that memory depends on. Slots share one cache of `context` cells."""

    context: int
    parallel: int
    ubatch: int = 512
    device: str = "CPU"


def estimate(header: Header, load: Load, projector_bytes: int = 0) -> Estimate:
    """Bytes on `load.device` for the whole model (weights of all shards in `header`)."""
    backend = load.device.rstrip("0123456789")
    cells = _layer_cells(header, load)
    kv_bytes = sum(count * _row_bytes(header, layer) for layer, count in enumerate(cells) if count)
    on_host = backend == "CPU"
    overhead = _OVERHEAD_BYTES.get(backend, _UNKNOWN_BACKEND_OVERHEAD_BYTES)
    part = Part(
        device=load.device,
        weights_bytes=_weights(header, on_host=on_host) + projector_bytes,
        kv_bytes=kv_bytes,
        recurrent_bytes=_recurrent(header, load.parallel),
        compute_bytes=_compute(header, load),
        overhead_bytes=overhead + (prompt_cache_bytes(kv_bytes) if on_host else 0),
    )
    return Estimate((part,), Source.HEADER)


def prompt_cache_bytes(kv_bytes: int) -> int:
    """Host memory for prompts kept between requests: room for two full contexts, within reason.

    Always set on the command line: llama-server's own default is 8 GiB for each server.
    """
    return min(max(2 * kv_bytes, 16 * MIB), 1024 * MIB)


def _weights(header: Header, *, on_host: bool) -> int:
    """On a device the token embedding stays on the host, unless it serves as the output too."""
    if on_host or not header.has_output:
        return header.tensor_bytes
    return header.tensor_bytes - header.embedding_bytes


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING


def _full_cells(load: Load) -> int:
    return _pad(load.context)


def _window_cells(header: Header, load: Load) -> int:
    wanted = header.sliding_window * load.parallel + load.ubatch
    return _pad(min(_full_cells(load), wanted))


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


def _layer_cells(header: Header, load: Load) -> list[int]:
    """Cache cells of each layer; 0 for a layer without attention."""
    full, window = _full_cells(load), _window_cells(header, load)
    return [
        0 if not _has_cache(header, layer) else window if _is_windowed(header, layer) else full
        for layer in range(header.layers)
    ]


def _has_cache(header: Header, layer: int) -> bool:
    """Encoders without causal attention keep no cache; recurrent layers keep a state instead."""
    if header.causal_attention is False:
        return False
    return _at(header.heads_kv or header.heads, layer) > 0


def _row_bytes(header: Header, layer: int) -> int:
    """One cell's keys and values in one layer."""
    heads = _at(header.heads, 0)
    default = header.embedding_length // heads if heads else 0
    if header.kv_lora_rank:  # MLA keeps one compressed row, in K alone
        return (header.key_length or default) * _CACHE_ELEMENT_BYTES
    heads_kv = _at(header.heads_kv or header.heads, layer)
    width = (header.key_length or default) + (header.value_length or default)
    return heads_kv * width * _CACHE_ELEMENT_BYTES


def _recurrent(header: Header, parallel: int) -> int:
    conv_kernel, inner, state, _, groups = header.recurrent_state
    if not inner:
        return 0
    layers = sum(not _has_cache(header, layer) for layer in range(header.layers))
    convolution = max(conv_kernel - 1, 0) * (inner + 2 * groups * state)
    return _RECURRENT_ELEMENT_BYTES * parallel * layers * (convolution + state * inner)


def _mask_cells(header: Header, load: Load) -> int:
    """Cells over all caches: layers with a window share one, the others another."""
    kinds = {
        _is_windowed(header, layer) for layer in range(header.layers) if _has_cache(header, layer)
    }
    full, window = _full_cells(load), _window_cells(header, load)
    return sum(window if windowed else full for windowed in kinds)


def _compute(header: Header, load: Load) -> int:
    """Scratch for one ubatch: the attention mask of each cache, and the widest activations."""
    ubatch = min(load.ubatch, load.context)
    feed_forward = max(header.feed_forward_length, default=0)
    width = header.embedding_length
    if header.experts:
        used, expert = header.experts_used, header.expert_feed_forward_length or feed_forward
        activations = max(
            3 * used * expert + 3 * width, 2 * used * width + used * expert + 2 * width
        )
    else:
        activations = 3 * feed_forward + 3 * width
    logits = 4 * load.parallel * header.vocabulary_size
    return 2 * ubatch * _mask_cells(header, load) + 4 * ubatch * activations + logits
