"""What other programs would estimate for a model that lies wholly on one device.

Their published formulas, restated: bytes of buffers on the device, less the constants that they add
for the process and for safety, as ours here are less the overhead.

- Ollama: fs/ggml/ggml.go, `GraphSize`, and llm/memory.go; beside it the plainer rule of weights and
  cache alone.
- xllamacpp: src/xllamacpp/memory.py, `estimate_gpu_layers`, which follows an earlier Ollama.
- gguf-parser-go: file_estimate__llamacpp.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from supervisor_synapse.core.estimate import Load

_BATCH = 512
_F16 = 2.0
_OLLAMA_ELEMENT = {"q8_0": 1.0, "q4_0": 0.5, "f32": 4.0}


@dataclass(frozen=True)
class Facts:
    """What the formulas ask of a file. `tensors`: dimensions (slowest first) and bytes by name."""

    keys: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    vocabulary: int

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    def number(self, key: str, default: int = 0) -> int:
        """One value; the largest where there is one for each layer."""
        value = self.keys.get(f"{self.architecture}.{key}", default)
        return max(value) if isinstance(value, list) else int(value)

    def each(self, key: str, default: int) -> list[int]:
        value = self.keys.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, list) else [int(value)] * self.layers

    @property
    def layers(self) -> int:
        return self.number("block_count")

    @property
    def head(self) -> int:
        return self.number("embedding_length") // max(self.number("attention.head_count", 1), 1)

    @property
    def key_length(self) -> int:
        return self.number("attention.key_length", self.head)

    @property
    def value_length(self) -> int:
        return self.number("attention.value_length", self.head)

    def bytes_of(self, *prefixes: str) -> int:
        return sum(size for name, (_, size) in self.tensors.items() if name.startswith(prefixes))


def read(path: Path) -> Facts:
    """By the gguf package, as xllamacpp does."""
    reader = gguf.GGUFReader(path)
    keys: dict[str, Any] = {}
    for name, found in reader.fields.items():
        if not name.startswith(("tokenizer.", "GGUF.")):
            keys[name] = found.contents()
    tensors = {
        tensor.name: (tuple(int(size) for size in reversed(tensor.shape)), int(tensor.n_bytes))
        for tensor in reader.tensors
    }
    return Facts(keys, tensors, len(reader.fields["tokenizer.ggml.tokens"].data))


# --- Ollama and xllamacpp ------------------------------------------------------------------------


def _graph_bytes(facts: Facts, context: int, kv: float) -> float:
    """Of a full offload; where the architecture is none of theirs, a part of the cache."""
    width, heads = facts.number("embedding_length"), facts.number("attention.head_count", 1)
    heads_kv, words = facts.number("attention.head_count_kv", 1), facts.vocabulary
    batch = min(_BATCH, context)
    last = 4.0 * batch * (width + words)
    match facts.architecture:
        case "llama" | "llama4":
            return max(last, 4.0 * batch * (1 + 4 * width + context * (1 + heads)))
        case "gemma" | "gemma2" | "gemma3":
            turned = 2 * facts.key_length * heads
            return max(last, 4.0 * batch * (2 + context * (1 + heads) + 2 * width + turned))
        case "qwen2":
            return max(last, 4.0 * batch * (1 + 2 * width + context * (1 + heads)))
        case "deepseek2":
            turned = 2 * facts.key_length * heads_kv
            return max(
                4.0 * batch * (3 * width + words),
                4.0 * batch * (3 * width + 2 + context * (1 + heads_kv) + turned),
            )
    least = max(min(facts.each("attention.head_count_kv", 1)), 1)
    return heads / least * kv / 6


def _window_cells(facts: Facts, load: Load) -> int:
    return load.parallel * facts.number("attention.sliding_window") + min(_BATCH, load.context)


def _ollama_caches(facts: Facts, load: Load) -> list[float]:
    element = _OLLAMA_ELEMENT.get(load.cache_type_k, _F16)
    row = (facts.key_length + facts.value_length) * element
    heads = facts.each("attention.head_count", 1)
    heads_kv = facts.each("attention.head_count_kv", 1)
    caches = []
    for layer in range(facts.layers):
        if heads[layer] and heads_kv[layer]:
            cells = load.context
            if facts.architecture == "gemma3" and (layer + 1) % 6:
                cells = _window_cells(facts, load)
            if facts.architecture == "gpt-oss" and layer % 2 == 0:
                cells = load.parallel * 4096 + _BATCH
            caches.append(cells * row * heads_kv[layer])
        else:
            caches.append(4.0 * _state_elements(facts))
    return caches


def _state_elements(facts: Facts) -> int:
    inner, state = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    kernel, groups = facts.number("ssm.conv_kernel"), facts.number("ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner


def ollama(facts: Facts, load: Load) -> float:
    caches = _ollama_caches(facts, load)
    graph = _graph_bytes(facts, load.context, sum(caches))
    if facts.architecture == "gpt-oss":
        graph = float((4 * load.parallel + (load.context >> 10) + 110) * 2**20)
    output = facts.bytes_of("output_norm") + (
        facts.bytes_of("output.") or facts.bytes_of("token_embd.")
    )
    buffer = facts.bytes_of("blk.0.") + caches[0]
    return facts.bytes_of("blk.") + sum(caches) + output + buffer + graph


def weights_and_cache(facts: Facts, load: Load) -> float:
    return facts.bytes_of("") + sum(_ollama_caches(facts, load))


def xllamacpp(facts: Facts, load: Load) -> float:
    element = {"q8_0": 1.0, "q4_0": 0.5}.get(load.cache_type_k, _F16)
    row = (facts.key_length + facts.value_length) * element
    row *= facts.number("attention.head_count_kv", 1)
    is_windowed = [
        facts.architecture == "gemma3" and (layer + 1) % 6 != 0 for layer in range(facts.layers)
    ]
    caches = [
        row * (_window_cells(facts, load) if windowed else load.context) for windowed in is_windowed
    ]
    graph = _graph_bytes(facts, load.context, sum(caches))
    output = facts.bytes_of("output", "token_embd")  # the embedding always, too
    buffer = facts.bytes_of("blk.0.") + caches[0]
    return facts.bytes_of("blk.") + sum(caches) + output + buffer + graph


# --- gguf-parser-go ------------------------------------------------------------------------------

_ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}


def gguf_parser(facts: Facts, load: Load) -> float:
    """With flash attention, as the engine has it here."""
    context, tokens = -(-load.context // 256) * 256, min(load.context, load.ubatch)
    output = facts.bytes_of("output") or facts.bytes_of("output_norm")
    if not facts.bytes_of("output."):
        output += facts.bytes_of("token_embd")
    width = facts.number("embedding_length")
    weights = facts.bytes_of("blk.") + output
    copied = 4 * tokens * (width + facts.vocabulary)
    inputs = 4 * tokens * (width + 1 + context)
    last = 4 * tokens * (width + facts.vocabulary)
    cache = _parser_cache(facts, load, context)
    return weights + copied + inputs + last + cache + _parser_step(facts, load, context, tokens)


def _parser_cache(facts: Facts, load: Load, context: int) -> float:
    if facts.number("ssm.inner_size") and not facts.number("attention.head_count_kv"):
        return 4.0 * _state_elements(facts) * load.parallel * facts.layers
    heads = facts.number("attention.head_count_kv", 1)
    keys = facts.number("attention.key_length_mla") or facts.key_length
    values = facts.number("attention.value_length_mla") or facts.value_length
    row = heads * (
        keys * _ELEMENT_BYTES[load.cache_type_k] + values * _ELEMENT_BYTES[load.cache_type_v]
    )
    state = 4.0 * _state_elements(facts) * load.parallel * facts.layers
    window = facts.number("attention.sliding_window")
    if not window:
        return state + row * context * facts.layers
    cells = min(context, -(-(window * load.parallel + load.ubatch) // 256) * 256)
    period = {"gemma3": 6, "gpt-oss": 2, "gemma2": 2}.get(facts.architecture, 1)
    windowed = sum(layer % period < period - 1 for layer in range(facts.layers))
    return state + row * (cells * windowed + context * (facts.layers - windowed))


def _parser_step(facts: Facts, load: Load, context: int, tokens: int) -> float:
    """Of the last layer, the larger of attention and feed forward."""
    last = f"blk.{facts.layers - 1}."
    block = {
        name.removeprefix(last): found
        for name, found in facts.tensors.items()
        if name.startswith(last)
    }
    if facts.number("ssm.inner_size") and not facts.number("attention.head_count_kv"):
        return _parser_scan(facts, load, block, tokens)
    heads = facts.number("attention.head_count_kv", 1)
    attention = 2.0 * context * tokens + context * heads * (
        facts.key_length * _ELEMENT_BYTES[load.cache_type_k]
        + facts.value_length * _ELEMENT_BYTES[load.cache_type_v]
    )
    attention += _rows(block, r"attn_norm\.weight", tokens)
    attention += sum(
        size for name, (_, size) in block.items() if re.fullmatch(r"attn_(q|qkv|q_b)\.weight", name)
    )
    fed = _rows(block, r"(attn_norm|ffn_norm|ffn_gate|ffn_up)\.weight", tokens)
    if facts.number("expert_count"):
        count, used = facts.number("expert_count"), facts.number("expert_used_count")
        width = facts.number("embedding_length")
        fed += 4.0 * (count * width + count * tokens + width * used * tokens)
    return max(attention, fed)


def _parser_scan(
    facts: Facts, load: Load, block: dict[str, tuple[tuple[int, ...], int]], tokens: int
) -> float:
    inner, state = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    kernel, groups = facts.number("ssm.conv_kernel"), facts.number("ssm.group_count")
    convolved = max(kernel - 1, 0) * (inner + 2 * groups * state) * load.parallel
    total = 4.0 * convolved + _rows(block, r"(attn_norm|ssm_in|ssm_dt)\.weight", tokens)
    total += 4.0 * (inner * tokens + kernel * inner * load.parallel)
    return total + 4.0 * (inner * tokens + state * inner * load.parallel)


def _rows(block: dict[str, tuple[tuple[int, ...], int]], pattern: str, tokens: int) -> float:
    """What matrices of these names give for a batch."""
    shapes: Iterable[tuple[int, ...]] = (
        shape for name, (shape, _) in block.items() if re.fullmatch(pattern, name)
    )
    return sum(4.0 * shape[0] * tokens for shape in shapes)


FORMULAS: dict[str, Callable[[Facts, Load], float]] = {
    "Ollama": ollama, "plain": weights_and_cache, "xllamacpp": xllamacpp,
    "gguf-parser": gguf_parser,
}  # fmt: skip
