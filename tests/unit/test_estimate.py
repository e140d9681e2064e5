"""Bytes before anything is loaded: by the published arithmetic, and against the real engine."""

from __future__ import annotations

import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.estimate import Load, estimate, prompt_cache_bytes
from supervisor_synapse.core.model import Header, Part
from tests.conftest import Engine, free_port
from tests.gguf_factory import write_model
from tests.unit.builders import GIB, KIB, MIB, header

F16 = 2
GEMMA = {"architecture": "gemma3", "layers": 6, "sliding_window": 512}


def taken(made: Header, load: Load, projector_bytes: int = 0) -> Part:
    """What is taken where the model computes: on its one device, else on the host."""
    return estimate(made, load, projector_bytes=projector_bytes).parts[0]


def on(device: str) -> tuple[str, ...]:
    return () if device == "CPU" else (device,)


def kv(made: Header, **load: Any) -> int:
    return taken(made, Load(**({"context": 4096, "parallel": 4} | load))).kv_bytes


# --- the cache -----------------------------------------------------------------------------------


def test_each_layer_keeps_keys_and_values_of_each_cell() -> None:
    """2 layers × 4096 cells × (16 + 16) × 2 heads × 2 bytes."""
    assert kv(header()) == 2 * 4096 * (16 + 16) * 2 * F16


def test_slots_share_one_cache() -> None:
    assert kv(header(), parallel=1) == kv(header(), parallel=64)


@pytest.mark.parametrize(
    ("context", "cells"), [(1, 256), (256, 256), (257, 512), (4000, 4096), (4096, 4096)]
)
def test_cells_come_in_steps_of_256(context: int, cells: int) -> None:
    assert kv(header(), context=context) == 2 * cells * (16 + 16) * 2 * F16


def test_a_layer_may_have_heads_of_its_own() -> None:
    """A layer without heads for keys and values keeps no cache."""
    assert kv(header(layers=3, heads_kv=(4, 0, 1))) == 4096 * (16 + 16) * (4 + 0 + 1) * F16


def test_heads_for_keys_and_values_are_all_heads_where_the_header_names_none() -> None:
    assert kv(header(heads_kv=())) == 2 * 4096 * (16 + 16) * 4 * F16


def test_the_header_says_how_wide_a_head_is() -> None:
    assert kv(header(key_length=24, value_length=40)) == 2 * 4096 * (24 + 40) * 2 * F16


def test_latent_attention_keeps_one_compressed_row_in_keys_alone() -> None:
    made = header(heads=(16,), heads_kv=(1,), kv_lora_rank=512, key_length=576, value_length=512)
    assert kv(made) == 2 * 4096 * 576 * F16


def test_an_encoder_keeps_no_cache() -> None:
    assert kv(header(causal_attention=False)) == 0


@pytest.mark.parametrize(
    ("architecture", "period"),
    [
        ("gemma3", 6), ("gpt-oss", 2), ("gemma2", 2), ("gemma3n", 5), ("llama4", 4),
        ("cohere2", 4), ("exaone4", 4), ("olmo2", 4),
    ],
)  # fmt: skip
def test_all_but_each_last_layer_of_a_period_keep_only_their_window(
    architecture: str, period: int
) -> None:
    """The windows of all slots and one ubatch, in steps of 256."""
    made = header(architecture=architecture, layers=2 * period + 1, sliding_window=512)
    windowed = 2 * (period - 1) + 1
    cells = windowed * (512 * 4 + 512) + 2 * 32768
    assert kv(made, context=32768) == cells * (16 + 16) * 2 * F16


@pytest.mark.parametrize(
    ("pattern", "windowed"),
    [((3,), 4), ((2,), 3), ((1, 1, 0, 1, 0, 0), 3), ((0, 0, 0, 0, 0, 0), 0), ((1,), 0)],
)
def test_a_pattern_in_the_header_says_which_layers_have_a_window(
    pattern: tuple[int, ...], windowed: int
) -> None:
    made = header(
        architecture="gemma3", layers=6, sliding_window=1024, sliding_window_pattern=pattern
    )
    cells = windowed * (1024 * 4 + 512) + (6 - windowed) * 32768
    assert kv(made, context=32768) == cells * (16 + 16) * 2 * F16


def test_a_window_without_a_pattern_is_no_window() -> None:
    """phi3 names one that llama.cpp does not use."""
    assert kv(header(architecture="phi3", sliding_window=512)) == kv(header())


def test_a_window_wider_than_the_context_saves_nothing() -> None:
    assert kv(header(**GEMMA), context=1024) == kv(header(layers=6), context=1024)


def test_recurrent_layers_keep_a_state_for_each_slot_instead_of_cells() -> None:
    """4 bytes × slots × (convolution + state) for each layer without attention."""
    made = header(layers=4, heads_kv=(0, 0, 0, 2), recurrent_state=(4, 128, 16, 8, 1))
    found = taken(made, Load(4096, 3))
    assert found.recurrent_bytes == 4 * 3 * 3 * ((4 - 1) * (128 + 2 * 1 * 16) + 16 * 128)
    assert found.kv_bytes == 4096 * (16 + 16) * 2 * F16


# --- weights, scratch and the rest ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "has_output", "counted"),
    [
        ("CPU", True, 100), ("CPU", False, 100), ("CUDA0", False, 100), ("CUDA0", True, 90),
        ("Vulkan1", True, 90),
    ],
)  # fmt: skip
def test_the_token_embedding_stays_on_the_host_unless_it_is_the_output_too(
    device: str, has_output: bool, counted: int
) -> None:
    made = header(has_output=has_output, tensor_bytes=100 * MIB, embedding_bytes=10 * MIB)
    assert taken(made, Load(4096, 4, devices=on(device))).weights_bytes == counted * MIB


def test_a_projector_lies_beside_the_weights() -> None:
    with_it, without = (taken(header(), Load(4096, 4), size) for size in (7 * MIB, 0))
    assert with_it.weights_bytes - without.weights_bytes == 7 * MIB
    assert with_it.total_bytes - without.total_bytes == 7 * MIB


@pytest.mark.parametrize(
    ("device", "mib"), [("CUDA0", 550), ("ROCm1", 450), ("Metal", 512), ("Vulkan12", 64)]
)
def test_a_process_takes_memory_beside_its_buffers(device: str, mib: int) -> None:
    assert taken(header(), Load(4096, 4, devices=on(device))).overhead_bytes == mib * MIB


def test_an_unknown_backend_is_not_taken_for_free() -> None:
    assert taken(header(), Load(4096, 4, devices=("XPU0",))).overhead_bytes >= 64 * MIB


def test_prompts_kept_on_the_host_are_counted_there() -> None:
    made = header(layers=32, heads=(32,), heads_kv=(8,), embedding_length=4096)
    small, large = (taken(made, Load(context, 4)) for context in (256, 32768))
    grown = large.overhead_bytes - small.overhead_bytes
    assert grown == prompt_cache_bytes(large.kv_bytes) - prompt_cache_bytes(small.kv_bytes) > 0


def test_kept_prompts_stay_within_reason() -> None:
    """llama-server's own default is 8 GiB for each server."""
    assert 0 < prompt_cache_bytes(0) <= 64 * MIB
    assert prompt_cache_bytes(100 * MIB) == 200 * MIB
    assert prompt_cache_bytes(2**50) <= GIB


def compute(made: Header, **load: Any) -> int:
    """Without the logits, which a vocabulary of none leaves out."""
    return taken(made, Load(**({"context": 32768, "parallel": 4} | load))).compute_bytes


def test_scratch_is_the_mask_and_the_widest_activations() -> None:
    """2·ub·cells + 4·ub·(3·ff + 3·d)."""
    assert compute(header(vocabulary_size=0)) == 2 * 512 * 32768 + 4 * 512 * (3 * 128 + 3 * 64)


def test_windowed_and_full_layers_have_a_mask_each() -> None:
    made = header(**GEMMA, vocabulary_size=0)
    mask = 2 * 512 * (32768 + 512 * 4 + 512)
    assert compute(made) == mask + 4 * 512 * (3 * 128 + 3 * 64)


def test_a_window_that_is_not_used_needs_no_mask_of_its_own() -> None:
    assert compute(header(architecture="phi3", sliding_window=512)) == compute(header())


@pytest.mark.parametrize(
    ("used", "expert", "widest"),
    [(8, 768, 3 * 8 * 768 + 3 * 64), (2, 32, 2 * 2 * 64 + 2 * 32 + 2 * 64)],
)
def test_experts_widen_the_activations_by_those_in_use(used: int, expert: int, widest: int) -> None:
    made = header(
        experts=64, experts_used=used, expert_feed_forward_length=expert, vocabulary_size=0
    )
    assert compute(made) == 2 * 512 * 32768 + 4 * 512 * widest


# --- what always holds ---------------------------------------------------------------------------

_COUNT = st.integers(0, 2**20)
_HEADERS = st.builds(
    header,
    architecture=st.sampled_from(["llama", "gemma3", "phi3", "qwen3moe", "deepseek2", "mamba", ""]),
    layers=st.integers(0, 80), embedding_length=_COUNT,
    feed_forward_length=st.lists(_COUNT, max_size=3).map(tuple),
    heads=st.lists(st.integers(0, 128), max_size=3).map(tuple),
    heads_kv=st.lists(st.integers(0, 128), max_size=3).map(tuple),
    key_length=_COUNT, value_length=_COUNT, kv_lora_rank=st.integers(0, 512),
    sliding_window=st.integers(0, 2**17),
    sliding_window_pattern=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    experts=st.integers(0, 256), experts_used=st.integers(0, 256),
    expert_feed_forward_length=_COUNT, vocabulary_size=_COUNT,
    recurrent_state=st.tuples(*[st.integers(0, 256)] * 5),
    causal_attention=st.sampled_from([None, True, False]), has_output=st.booleans(),
)  # fmt: skip
_LOADS = st.builds(
    Load, context=st.integers(1, 2**24), parallel=st.integers(1, 256),
    ubatch=st.integers(1, 2048), devices=st.sampled_from(["CPU", "CUDA0", "RPC3", "7"]).map(on),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(made=_HEADERS, load=_LOADS, more=st.integers(1, 2**16))
def test_more_of_anything_never_takes_less(made: Header, load: Load, more: int) -> None:
    """And no header, however odd, breaks the arithmetic or gives memory back."""
    base = taken(made, load, 0)
    parts = (base.weights_bytes, base.kv_bytes, base.recurrent_bytes, base.compute_bytes)
    assert all(type(part) is int and part >= 0 for part in parts)
    assert base.overhead_bytes > 0
    assert base.total_bytes == sum(parts) + base.overhead_bytes
    for name in ("context", "parallel", "ubatch"):
        grown = {
            key: getattr(load, key) + (more if key == name else 0)
            for key in ("context", "parallel", "ubatch")
        }
        assert taken(made, Load(**grown, devices=load.devices)).total_bytes >= base.total_bytes
    assert taken(made, load, more).total_bytes == base.total_bytes + more


# --- the real engine -----------------------------------------------------------------------------

_ANSWER_SECONDS = 30.0
_BUFFER = re.compile(
    r": +(?:CPU|CPU_Mapped) (model|KV|RS|compute) buffer size = +([\d.]+) MiB", re.IGNORECASE
)


def measure(engine: Engine, model: Path, load: Load) -> dict[str, float]:
    """MiB by kind of buffer in a real load; the engine is ended as soon as it has said so."""
    command = [
        engine.path, "--model", str(model), "--host", "127.0.0.1", "--port", str(free_port()),
        "--ctx-size", str(load.context), "--parallel", str(load.parallel), "--kv-unified",
        "--ubatch-size", str(load.ubatch), "--device", "none", "--no-warmup", "-fit", "off",
        "-lv", "4",
    ]  # fmt: skip
    found: dict[str, float] = {}
    with subprocess.Popen(
        command, env=engine.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            for line in _lines(process):
                buffer = _BUFFER.search(line)
                if buffer is not None:
                    kind, mib = buffer[1].lower(), float(buffer[2])
                    found[kind] = found.get(kind, 0.0) + mib
                if "compute" in found:
                    break
        finally:
            process.kill()
    return found


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout is not None
    deadline = time.monotonic() + _ANSWER_SECONDS
    text = b""
    while time.monotonic() < deadline:
        if not select.select([process.stdout], [], [], deadline - time.monotonic())[0]:
            break
        piece = process.stdout.read1(65536)  # type: ignore[attr-defined]
        *whole, text = (text + piece).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
        if not piece:
            return
    raise AssertionError("the engine said nothing of its memory")


@pytest.mark.parametrize(
    ("shape", "load"),
    [
        ({}, Load(4096, 4)),
        ({}, Load(1000, 1, ubatch=128)),
        ({"architecture": "qwen2", "heads": 8, "heads_kv": 8}, Load(32768, 2)),
        ({"architecture": "qwen3", "heads_kv": 1}, Load(16384, 4)),
        ({"architecture": "qwen3moe", "experts": 8, "experts_used": 4}, Load(16384, 4)),
        ({**GEMMA, "layers": 12}, Load(32768, 4)),
        ({**GEMMA, "layers": 7}, Load(2048, 4)),
    ],
    ids=repr,
)
def test_the_real_engine_takes_what_was_estimated(
    llama_server: Engine, tmp_path: Path, shape: dict[str, Any], load: Load
) -> None:
    """Cache and weights to the rounding of its log; scratch within a twentieth and one MiB."""
    wide = {"embedding": 256, "feed_forward": 1024, "context": 32768} | shape
    path = write_model(tmp_path / "model.gguf", **wide)
    expected = taken(gguf_header.read(path), load)
    found = measure(llama_server, path, load)
    assert found["kv"] == pytest.approx(expected.kv_bytes / MIB, abs=0.02)
    assert found["model"] == pytest.approx(expected.weights_bytes / MIB, abs=0.05)
    assert found["compute"] == pytest.approx(expected.compute_bytes / MIB, rel=0.05, abs=1.0)
    assert expected.compute_bytes > 64 * KIB
