"""What makes an architecture: the keys and tensors of a model that llama.cpp loads, by its name.

Shapes are those of llama.cpp's own loader for each; a matrix is (rows, columns), columns being
what the engine calls the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
Value = bool | int | float | str | Sequence[Any] | None

_SPREAD = 0.05  # standard deviation of the weights


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; not every architecture has all of them."""

    layers: int
    embedding: int
    heads: int
    heads_kv: int
    head: int  # width of one
    feed_forward: int
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    shared_experts: int = 0
    sliding_window: int = 0
    # MLA: widths of the compressed row, of the queries', and of the part of a head that turns.
    kv_rank: int = 0
    q_rank: int = 0
    rope: int = 0
    # Recurrent: kernel, width, state, heads (time_step_rank) and groups of the scan.
    scan: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    attention_interval: int = 0  # each so many layers one with attention, the others recurrent
    predicting: int = 0  # the last so many layers predict further tokens

    @property
    def q(self) -> int:
        return self.head * self.heads

    @property
    def kv(self) -> int:
        return self.head * self.heads_kv

    def is_recurrent(self, layer: int) -> bool:
        return bool(self.attention_interval) and (layer + 1) % self.attention_interval != 0


class Random:
    """Seeded weights; a seed of None gives zeros, which cost nothing to make."""

    def __init__(self, seed: int | None) -> None:
        self._generator = None if seed is None else np.random.default_rng(seed)

    def matrix(self, *shape: int) -> NDArray[np.float32]:
        if self._generator is None:
            return np.zeros(shape, dtype=np.float32)
        return self._generator.standard_normal(shape, dtype=np.float32) * np.float32(_SPREAD)


def ones(size: int) -> NDArray[np.float32]:
    return np.ones(size, dtype=np.float32)


def zeros(*size: int) -> NDArray[np.float32]:
    return np.zeros(size, dtype=np.float32)


_Block = Callable[[Shape, Random, int], Tensors]


# --- attention -----------------------------------------------------------------------------------


def _projections(shape: Shape, random: Random) -> Tensors:
    return {
        "attn_norm.weight": ones(shape.embedding),
        "attn_q.weight": random.matrix(shape.q, shape.embedding),
        "attn_k.weight": random.matrix(shape.kv, shape.embedding),
        "attn_v.weight": random.matrix(shape.kv, shape.embedding),
        "attn_output.weight": random.matrix(shape.embedding, shape.q),
    }


def _head_norms(shape: Shape) -> Tensors:
    return {"attn_q_norm.weight": ones(shape.head), "attn_k_norm.weight": ones(shape.head)}


def _post_norms(shape: Shape) -> Tensors:
    return {
        "post_attention_norm.weight": ones(shape.embedding),
        "post_ffw_norm.weight": ones(shape.embedding),
    }


def _biases(shape: Shape) -> Tensors:
    return {
        "attn_q.bias": zeros(shape.q),
        "attn_k.bias": zeros(shape.kv),
        "attn_v.bias": zeros(shape.kv),
    }


def _latent(shape: Shape, random: Random) -> Tensors:
    """MLA, its two up-projections apart as the engine wants them for the compressed cache."""
    plain = shape.head - shape.rope
    tensors: Tensors = {
        "attn_norm.weight": ones(shape.embedding),
        "attn_kv_a_mqa.weight": random.matrix(shape.kv_rank + shape.rope, shape.embedding),
        "attn_kv_a_norm.weight": ones(shape.kv_rank),
        "attn_k_b.weight": random.matrix(shape.heads, shape.kv_rank, plain),
        "attn_v_b.weight": random.matrix(shape.heads, shape.head, shape.kv_rank),
        "attn_output.weight": random.matrix(shape.embedding, shape.q),
        "attn_q_a.weight": random.matrix(shape.q_rank, shape.embedding),
        "attn_q_a_norm.weight": ones(shape.q_rank),
        "attn_q_b.weight": random.matrix(shape.q, shape.q_rank),
    }
    return tensors


# --- recurrence ----------------------------------------------------------------------------------


def _mamba1(shape: Shape, random: Random) -> Tensors:
    kernel, inner, state, rank, _ = shape.scan
    return {
        "attn_norm.weight": ones(shape.embedding),
        "ssm_in.weight": random.matrix(2 * inner, shape.embedding),
        "ssm_conv1d.weight": random.matrix(inner, kernel),
        "ssm_conv1d.bias": zeros(inner),
        "ssm_x.weight": random.matrix(rank + 2 * state, inner),
        "ssm_dt.weight": random.matrix(inner, rank),
        "ssm_dt.bias": zeros(inner),
        "ssm_a": -np.ones((inner, state), dtype=np.float32),
        "ssm_d": ones(inner),
        "ssm_out.weight": random.matrix(shape.embedding, inner),
    }


def _mamba2(shape: Shape, random: Random) -> Tensors:
    kernel, inner, state, heads, groups = shape.scan
    convolved = inner + 2 * groups * state
    return {
        "attn_norm.weight": ones(shape.embedding),
        "ssm_in.weight": random.matrix(inner + convolved + heads, shape.embedding),
        "ssm_conv1d.weight": random.matrix(convolved, kernel),
        "ssm_conv1d.bias": zeros(convolved),
        "ssm_dt.bias": zeros(heads),
        "ssm_a": -np.ones((heads, 1), dtype=np.float32),
        "ssm_d": np.ones((heads, 1), dtype=np.float32),
        "ssm_norm.weight": np.ones((groups, inner // groups), dtype=np.float32),
        "ssm_out.weight": random.matrix(shape.embedding, inner),
    }


def _delta_net(shape: Shape, random: Random) -> Tensors:
    kernel, inner, state, heads, groups = shape.scan
    convolved = inner + 2 * groups * state
    return {
        "attn_norm.weight": ones(shape.embedding),
        "attn_qkv.weight": random.matrix(convolved, shape.embedding),
        "attn_gate.weight": random.matrix(inner, shape.embedding),
        "ssm_conv1d.weight": random.matrix(convolved, kernel),
        "ssm_dt.bias": zeros(heads),
        "ssm_a": -ones(heads),
        "ssm_ba.weight": random.matrix(2 * heads, shape.embedding),
        "ssm_norm.weight": ones(state),
        "ssm_out.weight": random.matrix(shape.embedding, inner),
    }


def _short_convolution(shape: Shape, random: Random) -> Tensors:
    return {
        "attn_norm.weight": ones(shape.embedding),
        "shortconv.in_proj.weight": random.matrix(3 * shape.embedding, shape.embedding),
        "shortconv.conv.weight": random.matrix(shape.embedding, shape.scan[0]),
        "shortconv.out_proj.weight": random.matrix(shape.embedding, shape.embedding),
    }


# --- feed forward --------------------------------------------------------------------------------


def _dense(shape: Shape, random: Random, suffix: str = "", width: int | None = None) -> Tensors:
    inner = shape.feed_forward if width is None else width
    return {
        f"ffn_gate{suffix}.weight": random.matrix(inner, shape.embedding),
        f"ffn_up{suffix}.weight": random.matrix(inner, shape.embedding),
        f"ffn_down{suffix}.weight": random.matrix(shape.embedding, inner),
    }


def _experts(shape: Shape, random: Random) -> Tensors:
    width, inner = shape.embedding, shape.expert_feed_forward
    return {
        "ffn_gate_inp.weight": random.matrix(shape.experts, width),
        "ffn_gate_exps.weight": random.matrix(shape.experts, inner, width),
        "ffn_up_exps.weight": random.matrix(shape.experts, inner, width),
        "ffn_down_exps.weight": random.matrix(shape.experts, width, inner),
    }


def _normed(shape: Shape, random: Random) -> Tensors:
    """Experts where there are any, behind a norm."""
    fed = _experts(shape, random) if shape.experts else _dense(shape, random)
    return {"ffn_norm.weight": ones(shape.embedding)} | fed


# --- blocks --------------------------------------------------------------------------------------


def _llama(shape: Shape, random: Random, layer: int) -> Tensors:
    return _projections(shape, random) | _normed(shape, random)


def _qwen2(shape: Shape, random: Random, layer: int) -> Tensors:
    return _llama(shape, random, layer) | _biases(shape)


def _qwen3(shape: Shape, random: Random, layer: int) -> Tensors:
    return _llama(shape, random, layer) | _head_norms(shape)


def _olmoe(shape: Shape, random: Random, layer: int) -> Tensors:
    norms = {"attn_q_norm.weight": ones(shape.q), "attn_k_norm.weight": ones(shape.kv)}
    return _llama(shape, random, layer) | norms


def _gemma2(shape: Shape, random: Random, layer: int) -> Tensors:
    return _llama(shape, random, layer) | _post_norms(shape)


def _gemma3(shape: Shape, random: Random, layer: int) -> Tensors:
    return _qwen3(shape, random, layer) | _post_norms(shape)


def _phi3(shape: Shape, random: Random, layer: int) -> Tensors:
    width, inner = shape.embedding, shape.feed_forward
    return {
        "attn_norm.weight": ones(width),
        "attn_qkv.weight": random.matrix(shape.q + 2 * shape.kv, width),
        "attn_output.weight": random.matrix(width, shape.q),
        "ffn_norm.weight": ones(width),
        "ffn_up.weight": random.matrix(2 * inner, width),
        "ffn_down.weight": random.matrix(width, inner),
    }


def _gpt_oss(shape: Shape, random: Random, layer: int) -> Tensors:
    inner = shape.expert_feed_forward
    return (
        _projections(shape, random)
        | _biases(shape)
        | _experts(shape, random)
        | {
            "attn_output.bias": zeros(shape.embedding),
            "attn_sinks.weight": zeros(shape.heads),
            "post_attention_norm.weight": ones(shape.embedding),
            "ffn_gate_inp.bias": zeros(shape.experts),
            "ffn_gate_exps.bias": zeros(shape.experts, inner),
            "ffn_up_exps.bias": zeros(shape.experts, inner),
            "ffn_down_exps.bias": zeros(shape.experts, shape.embedding),
        }
    )


def _deepseek2(shape: Shape, random: Random, layer: int) -> Tensors:
    """The first layer is dense."""
    tensors = _latent(shape, random) | {"ffn_norm.weight": ones(shape.embedding)}
    if layer == 0 or not shape.experts:
        return tensors | _dense(shape, random)
    shared = shape.shared_experts * shape.expert_feed_forward
    return tensors | _experts(shape, random) | _dense(shape, random, "_shexp", shared)


def _glm4moe(shape: Shape, random: Random, layer: int) -> Tensors:
    """The first layer is dense."""
    width = shape.embedding
    tensors = _projections(shape, random) | _biases(shape)
    tensors |= {"post_attention_norm.weight": ones(width)}
    if layer == 0:
        return tensors | _dense(shape, random)
    if layer >= shape.layers - shape.predicting:
        tensors |= {"nextn.eh_proj.weight": random.matrix(width, 2 * width)}
        for name in ("enorm", "hnorm", "shared_head_norm"):
            tensors |= {f"nextn.{name}.weight": ones(width)}
    return (
        tensors
        | _experts(shape, random)
        | _dense(shape, random, "_shexp", shape.expert_feed_forward)
        | {"exp_probs_b.bias": zeros(shape.experts)}
    )


def _qwen3next(shape: Shape, random: Random, layer: int) -> Tensors:
    if shape.is_recurrent(layer):
        mixed = _delta_net(shape, random)
    else:  # the queries' projection also gives a gate
        gated = {"attn_q.weight": random.matrix(2 * shape.q, shape.embedding)}
        mixed = _projections(shape, random) | _head_norms(shape) | gated
    shared = _dense(shape, random, "_shexp", shape.expert_feed_forward)
    return (
        mixed
        | _experts(shape, random)
        | shared
        | {
            "ffn_gate_inp_shexp.weight": ones(shape.embedding),
            "post_attention_norm.weight": ones(shape.embedding),
        }
    )


def _granitehybrid(shape: Shape, random: Random, layer: int) -> Tensors:
    mixed = _mamba2 if shape.is_recurrent(layer) else _projections
    return mixed(shape, random) | _normed(shape, random)


def _falcon_h1(shape: Shape, random: Random, layer: int) -> Tensors:
    """Both in each layer; its second norm has no suffix."""
    tensors = _mamba2(shape, random) | _llama(shape, random, layer)
    return tensors | {"ffn_norm": tensors.pop("ffn_norm.weight")}


def _lfm2(shape: Shape, random: Random, layer: int) -> Tensors:
    if shape.is_recurrent(layer):
        mixed = _short_convolution(shape, random)
    else:
        mixed = _projections(shape, random) | _head_norms(shape)
    return mixed | _normed(shape, random)


_BLOCKS: Mapping[str, _Block] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3moe": _qwen3, "olmoe": _olmoe,
    "gemma2": _gemma2, "gemma3": _gemma3, "gemma-embedding": _gemma3, "phi3": _phi3,
    "gpt-oss": _gpt_oss, "deepseek2": _deepseek2, "glm4moe": _glm4moe, "qwen3next": _qwen3next,
    "granitehybrid": _granitehybrid, "falcon-h1": _falcon_h1, "lfm2": _lfm2,
    "mamba": lambda shape, random, layer: _mamba1(shape, random),
    "mamba2": lambda shape, random, layer: _mamba2(shape, random),
}  # fmt: skip
ARCHITECTURES = tuple(_BLOCKS)


def block(architecture: str, shape: Shape, random: Random, layer: int) -> Tensors:
    """The tensors of one layer, by their names behind `blk.i.`."""
    return _BLOCKS[architecture](shape, random, layer)


def final_norm(architecture: str) -> str:
    return "token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight"


# --- keys ----------------------------------------------------------------------------------------

_STATES_HEAD_LENGTH = (
    "qwen3", "qwen3moe", "gemma2", "gemma3", "gemma-embedding", "glm4moe", "gpt-oss", "qwen3next",
)  # fmt: skip


def keys(architecture: str, shape: Shape) -> dict[str, Value]:
    """What the architecture states of its shape; None where it does not."""
    stated: dict[str, Value] = {
        "embedding_length": shape.embedding,
        "block_count": shape.layers,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": _heads_kv(architecture, shape),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": shape.sliding_window or None,
    }
    if shape.experts:
        stated |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.experts_used,
            "expert_feed_forward_length": shape.expert_feed_forward,
            "expert_shared_count": shape.shared_experts or None,
        }
    if architecture in _STATES_HEAD_LENGTH or shape.head * shape.heads != shape.embedding:
        stated |= {"attention.key_length": shape.head, "attention.value_length": shape.head}
    if shape.kv_rank:
        stated |= _latent_keys(shape)
    if architecture == "lfm2":
        stated |= {"shortconv.l_cache": shape.scan[0]}
    elif any(shape.scan):
        names = ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")
        stated |= {f"ssm.{name}": size for name, size in zip(names, shape.scan, strict=True)}
    if architecture == "qwen3next":
        stated |= {
            "full_attention_interval": shape.attention_interval,
            "expert_shared_feed_forward_length": shape.expert_feed_forward,
            "rope.dimension_count": shape.head,
        }
    if architecture == "glm4moe":
        stated |= _gating_keys() | {"nextn_predict_layers": shape.predicting or None}
        stated |= {"leading_dense_block_count": 1, "rope.dimension_count": shape.head // 2}
    if architecture == "phi3":
        stated |= {"rope.dimension_count": shape.head}
    if architecture in ("mamba", "mamba2"):
        stated |= {"attention.head_count": 0, "attention.head_count_kv": None}
        stated |= {"feed_forward_length": 0}
    return stated


def _heads_kv(architecture: str, shape: Shape) -> Value:
    """One for all layers, or none for those without attention."""
    if architecture == "deepseek2":
        return 1  # one compressed row
    if architecture not in ("granitehybrid", "lfm2"):
        return shape.heads_kv
    return [0 if shape.is_recurrent(layer) else shape.heads_kv for layer in range(shape.layers)]


def _latent_keys(shape: Shape) -> dict[str, Value]:
    return {
        "leading_dense_block_count": 1,
        "attention.kv_lora_rank": shape.kv_rank,
        "attention.q_lora_rank": shape.q_rank,
        "attention.key_length": shape.kv_rank + shape.rope,
        "attention.value_length": shape.kv_rank,
        "attention.key_length_mla": shape.head,
        "attention.value_length_mla": shape.head,
        "rope.dimension_count": shape.rope,
        **_gating_keys(),
    }


def _gating_keys() -> dict[str, Value]:
    return {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.0}


_WITH_EXPERTS = ("deepseek2", "glm4moe", "qwen3next", "olmoe", "qwen3moe", "gpt-oss")


def fitted(architecture: str, shape: Shape) -> Shape:
    """The shape with what the architecture cannot do without, where it is not given."""
    width = shape.embedding
    if architecture in _WITH_EXPERTS:
        shape = replace(shape, experts=shape.experts or 4)
    if architecture in ("deepseek2", "glm4moe"):
        shape = replace(shape, shared_experts=shape.shared_experts or 1)
    if architecture == "deepseek2" and not shape.kv_rank:
        shape = replace(shape, kv_rank=width // 2, q_rank=width // 2, rope=shape.head // 2)
    if architecture == "mamba" and not any(shape.scan):
        shape = replace(shape, scan=(4, 2 * width, 16, max(width // 16, 1), 0))
    if architecture in ("mamba2", "granitehybrid", "falcon-h1") and not any(shape.scan):
        shape = replace(shape, scan=(4, 2 * width, 32, 2 * width // 32, 1))
    if architecture == "qwen3next" and not any(shape.scan):
        shape = replace(shape, scan=(4, width, 32, width // 32, max(width // 64, 1)))
    if architecture == "lfm2" and not any(shape.scan):
        shape = replace(shape, scan=(3, 0, 0, 0, 0))
    if architecture in ("qwen3next", "granitehybrid", "lfm2") and not shape.attention_interval:
        shape = replace(shape, attention_interval=4)
    return shape
