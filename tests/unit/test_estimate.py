"""Bytes before anything is loaded, by the published arithmetic.

Against the real engine: tests/integration/test_estimates.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.core.estimate import (
    HOST,
    Load,
    calibrate,
    estimate,
    margin_bytes,
    projector_bytes,
    prompt_cache_bytes,
)
from supervisor_synapse.core.model import Estimate, Header, Part, Source
from tests.unit.builders import GIB, MIB, header, taking

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


MLA = {
    "architecture": "deepseek2", "heads": (16,), "heads_kv": (1,), "kv_lora_rank": 512,
    "key_length": 576, "value_length": 512, "key_length_mla": 192, "value_length_mla": 128,
}  # fmt: skip


def test_latent_attention_keeps_one_compressed_row_in_keys_alone() -> None:
    assert kv(header(**MLA)) == 2 * 4096 * 576 * F16


def test_an_older_file_of_a_model_with_latent_attention_keeps_all_of_it() -> None:
    """Without the lengths behind the compression the engine keeps keys and values as they are."""
    made = header(**MLA | {"key_length_mla": 0, "value_length_mla": 0})
    assert kv(made) == 2 * 4096 * (576 + 512) * F16


@pytest.mark.parametrize("architecture", ["bert", "gemma-embedding", "modern-bert"])
def test_an_encoder_keeps_no_cache(architecture: str) -> None:
    assert kv(header(architecture=architecture, causal_attention=False)) == 0


def test_slots_apart_have_a_cache_each_in_steps_of_256() -> None:
    assert kv(header(), context=4096, parallel=4, unified=False) == kv(header(), context=4096)
    assert kv(header(), context=4000, parallel=3, unified=False) == kv(header(), context=3 * 1536)


@pytest.mark.parametrize(
    ("keys", "values", "row"),
    [
        ("f16", "f16", 2 * 64), ("bf16", "f32", 2 * 32 + 4 * 32), ("q8_0", "q8_0", 2 * 34),
        ("q4_0", "q5_1", 18 + 24), ("iq4_nl", "q4_1", 18 + 20), ("q5_0", "unheard of", 22 + 64),
    ],
)  # fmt: skip
def test_a_cache_type_says_what_a_row_takes(keys: str, values: str, row: int) -> None:
    """Two heads of 16 are one block of 32."""
    assert kv(header(), cache_type_k=keys, cache_type_v=values) == 2 * 4096 * row


def test_the_last_layers_may_use_the_caches_of_those_before() -> None:
    assert kv(header(layers=6, shared_kv_layers=2)) == kv(header(layers=4))
    assert kv(header(layers=30, architecture="gemma3n")) == kv(header(layers=20))


def test_heads_may_be_of_another_width_where_there_is_a_window() -> None:
    """Of six layers of Gemma, five have a window."""
    made = header(**GEMMA, window_key_length=8, window_value_length=4)
    row = 5 * (512 * 4 + 512) * (8 + 4) + 32768 * (16 + 16)
    assert kv(made, context=32768) == row * 2 * F16


def test_a_full_cache_for_windows_is_as_large_as_any() -> None:
    assert kv(header(**GEMMA), context=32768, swa_full=True) == kv(header(layers=6), context=32768)


def test_each_slot_apart_has_a_window_of_its_own() -> None:
    made = header(**GEMMA)
    windowed = 4 * (512 + 512)
    expected = (5 * windowed + 32768) * (16 + 16) * 2 * F16
    assert kv(made, context=32768, parallel=4, unified=False) == expected


@pytest.mark.parametrize(
    ("architecture", "period"),
    [
        ("gemma3", 6), ("gpt-oss", 2), ("gemma2", 2), ("gemma3n", 5), ("cohere2", 4),
        ("exaone4", 4), ("olmo2", 4), ("plamo3", 8), ("laguna", 4), ("afmoe", 4),
    ],
)  # fmt: skip
def test_all_but_each_last_layer_of_a_period_keep_only_their_window(
    architecture: str, period: int
) -> None:
    """The windows of all slots and one ubatch, in steps of 256."""
    made = header(architecture=architecture, layers=2 * period, sliding_window=512)
    cells = 2 * (period - 1) * (512 * 4 + 512) + 2 * 32768
    assert kv(made, context=32768) == cells * (16 + 16) * 2 * F16


@pytest.mark.parametrize(
    ("architecture", "windowed"), [("gemma3", 2), ("laguna", 1)], ids=["last", "first"]
)
def test_the_layer_that_sees_all_comes_last_or_first_of_a_period(
    architecture: str, windowed: int
) -> None:
    """Of two layers of a longer period."""
    made = header(architecture=architecture, sliding_window=512)
    cells = windowed * (512 * 4 + 512) + (2 - windowed) * 32768
    assert kv(made, context=32768) == cells * (16 + 16) * 2 * F16


def test_some_architectures_have_a_window_of_their_own_whatever_the_header_says() -> None:
    made = header(architecture="llama4", layers=4, sliding_window=512)
    cells = 3 * (8192 * 2 + 512) + 65536
    assert kv(made, context=65536, parallel=2) == cells * (16 + 16) * 2 * F16


@pytest.mark.parametrize(
    ("pattern", "windowed"),
    [((0,), 6), ((3,), 4), ((2,), 3), ((1, 1, 0, 1, 0, 0), 3), ((0, 0, 0, 0, 0, 0), 0), ((1,), 0)],
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


def state(made: Header, parallel: int = 1) -> int:
    return taken(made, Load(4096, parallel)).recurrent_bytes


MAMBA = (4, 128, 16, 8, 1)
MAMBA_STATE = 4 * ((4 - 1) * (128 + 2 * 16) + 16 * 128)


@pytest.mark.parametrize(
    ("changes", "recurrent", "attending"),
    [
        ({"architecture": "mamba", "heads": (0,), "heads_kv": ()}, 8, 0),
        ({"architecture": "falcon-h1"}, 8, 8),
        ({"architecture": "qwen3next"}, 6, 2),
        ({"architecture": "qwen35", "attention_interval": 2}, 4, 4),
        ({"architecture": "new", "recurrent_layers": (1, 1, 1, 0) * 2}, 6, 2),
        ({"architecture": "granitehybrid", "heads_kv": (0, 0, 0, 2) * 2}, 6, 2),
        (
            {"architecture": "nemotron_h", "heads_kv": (0, 0, 2, 0) * 2,
             "feed_forward_length": (0, 128, 0, 128) * 2}, 2, 2,
        ),
    ],
)  # fmt: skip
def test_layers_recur_attend_or_do_both(
    changes: dict[str, Any], recurrent: int, attending: int
) -> None:
    made = header(layers=8, recurrent_state=MAMBA, **changes)
    assert state(made) == recurrent * MAMBA_STATE
    assert kv(made) == attending * 4096 * (16 + 16) * 2 * F16


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({"wkv_head_size": 16, "token_shifts": 2}, 2 * 64 + 64 * 16),
        ({"short_convolution": 3, "heads_kv": (0,)}, 64 * 2),
        ({"kda_head_size": 8, "heads_kv": (0,), "recurrent_state": (4, 0, 0, 0, 0)},
         3 * 3 * 4 * 8 + 8 * 8 * 4),
    ],
    ids=["rwkv", "lfm2", "kimi"],
)  # fmt: skip
def test_other_recurrences_keep_states_of_their_own(changes: dict[str, Any], elements: int) -> None:
    made = header(**{"heads": (4,), "heads_kv": (0,)} | changes)
    assert state(made, parallel=3) == 2 * 3 * 4 * elements


# --- placement -----------------------------------------------------------------------------------

LAYERS = header(
    layers=4, block_bytes=(1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB),
    expert_bytes=(0, 1 * MIB, 3 * MIB, 7 * MIB),
    tensor_bytes=115 * MIB, embedding_bytes=10 * MIB, input_bytes=20 * MIB, experts=8,
)  # fmt: skip


def placed(made: Header = LAYERS, **load: Any) -> dict[str, int]:
    """MiB of weights by device, where there are any."""
    parts = estimate(made, Load(**({"context": 4096, "parallel": 4} | load))).parts
    return {part.device: part.weights_bytes // MIB for part in parts if part.weights_bytes}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, {"CUDA0": 95, "CPU": 20}), (99, {"CUDA0": 95, "CPU": 20}),
        (5, {"CUDA0": 95, "CPU": 20}), (4, {"CUDA0": 94, "CPU": 21}),
        (2, {"CUDA0": 88, "CPU": 27}), (1, {"CUDA0": 80, "CPU": 35}), (0, {"CPU": 115}),
        (-1, {"CPU": 115}),
    ],
)  # fmt: skip
def test_the_last_layers_are_offloaded_and_the_output_layer_is_one(
    layers: int | None, expected: dict[str, int]
) -> None:
    """What turns tokens into the first layer's input never leaves the host."""
    assert placed(devices=("CUDA0",), gpu_layers=layers) == expected


def test_an_output_layer_that_is_the_token_embedding_too_is_copied_to_its_device() -> None:
    tied = replace(LAYERS, has_output=False)
    assert placed(tied, devices=("CUDA0",)) == {"CUDA0": 105, "CPU": 20}
    assert placed(tied, devices=("CUDA0",), gpu_layers=0) == {"CPU": 115}


def test_experts_of_the_first_layers_stay_on_the_host() -> None:
    assert placed(devices=("CUDA0",), expert_layers_on_host=3) == {"CUDA0": 91, "CPU": 24}
    assert placed(devices=("CUDA0",), expert_layers_on_host=99) == {"CUDA0": 84, "CPU": 31}


def test_layers_that_predict_further_tokens_are_not_loaded() -> None:
    assert placed(replace(LAYERS, predicting_layers=1)) == {"CPU": 107}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ((1.0, 1.0), {"CUDA0": 7, "CUDA1": 88, "CPU": 20}),
        ((), {"CUDA0": 7, "CUDA1": 88, "CPU": 20}),
        ((3.0, 1.0), {"CUDA0": 15, "CUDA1": 80, "CPU": 20}),
        ((0.0, 1.0), {"CUDA1": 95, "CPU": 20}),
        ((1.0, 0.0), {"CUDA0": 95, "CPU": 20}),
        ((1.0,), {"CUDA0": 95, "CPU": 20}),
    ],
)  # fmt: skip
def test_devices_share_layers_by_the_split(
    split: tuple[float, ...], expected: dict[str, int]
) -> None:
    """Of five with the output layer, equal parts give three to the first."""
    assert placed(devices=("CUDA0", "CUDA1"), split=split) == expected


def test_estimates_name_each_device_once_and_the_host_last() -> None:
    load = Load(4096, 4, devices=("CUDA1", "CPU", "CUDA0", "CUDA1"))
    parts = estimate(LAYERS, load).parts
    assert [part.device for part in parts] == ["CUDA1", "CUDA0", "CPU"]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(0, 100), offloaded=st.integers(1, 110),
    split=st.lists(st.floats(0, 100, width=32), min_size=2, max_size=8),
)  # fmt: skip
def test_a_layer_goes_where_single_precision_puts_it(
    layers: int, offloaded: int, split: list[float]
) -> None:
    """As llama.cpp compares a layer's place with the cumulated split."""
    devices = tuple(f"CUDA{number}" for number in range(len(split)))
    made = header(layers=layers, heads=(1,), heads_kv=(1,), key_length=1, value_length=1)
    load = Load(256, 1, devices=devices, split=tuple(split), gpu_layers=offloaded)
    count = min(offloaded, layers + 1)
    parts = np.array(split, dtype=np.float32)
    sums = np.cumsum(parts if parts.any() else np.ones_like(parts), dtype=np.float32)
    places = [np.float32(np.float32(place) / np.float32(count)) for place in range(count)]
    owners = [int(np.searchsorted(sums / sums[-1], place, side="right")) for place in places]
    expected = Counter(devices[owner] for owner in owners[: count - 1])
    found = {p.device: p.kv_bytes // (256 * 2 * F16) for p in estimate(made, load).parts}
    assert {name: found[name] for name in devices} == {name: expected[name] for name in devices}


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


PLACES = 24 * 512  # of each token of a batch: itself, its position, its places in the cache


def scratch(made: Header, **load: Any) -> int:
    """Elements a token on the one device, less the mask of a full cache and the places."""
    found = compute(made, **({"devices": ("RPC0",)} | load)) - 2 * 512 * 32768 - PLACES
    assert found % (4 * 512) == 0
    return found // (4 * 512)


def test_scratch_is_the_widest_step_of_a_layer() -> None:
    """Gate, projection and product beside the input, its normed copy and the queries."""
    assert scratch(header()) == 3 * 128 + 2 * 64 + 64
    assert scratch(header(key_length=32)) == 3 * 128 + 2 * 64 + 4 * 32
    assert scratch(header(feed_forward_length=(8,))) == 4 * 64


def test_without_a_gate_only_the_projection_is_kept() -> None:
    assert scratch(header(ungated=True, feed_forward_length=(256,))) == 256 + 2 * 64


def test_the_host_also_holds_the_embeddings_that_it_looks_up() -> None:
    made = header(vocabulary_size=0)
    assert scratch(made, devices=()) == scratch(made) + 64


def test_windowed_and_full_layers_have_a_mask_each() -> None:
    windowed = 2 * 512 * (512 * 4 + 512)
    assert compute(header(**GEMMA)) == compute(header(layers=6)) + windowed


def test_a_window_that_is_not_used_needs_no_mask_of_its_own() -> None:
    assert compute(header(architecture="phi3", sliding_window=512)) == compute(header())


def test_slots_apart_need_a_mask_of_one_of_them() -> None:
    together, apart = (compute(header(), unified=unified) for unified in (True, False))
    assert together - apart == 2 * 512 * (32768 - 32768 // 4)


@pytest.mark.parametrize(
    ("used", "expert", "widest"),
    [(8, 768, 3 * 8 * 768), (2, 16, 3 * 2 * 16 + 2 * 64)],
    ids=["wide", "narrow"],
)
def test_experts_widen_the_activations_by_those_in_use(used: int, expert: int, widest: int) -> None:
    """What they give needs room of its own where it is wider than gate and projection."""
    made = header(experts=64, experts_used=used, expert_feed_forward_length=expert)
    assert scratch(made) == widest + 3 * 64


def test_without_flash_attention_every_head_heeds_every_cell() -> None:
    with_it, without = (compute(header(), flash_attention=on) for on in (True, False))
    assert without - with_it > 4 * 512 * 4 * 32768


def test_latent_attention_has_a_wide_step() -> None:
    """Sixteen heads of 192 and of the row of 576."""
    assert scratch(header(**MLA)) == 3 * 64 + 2 * 16 * 192 + 16 * (2 * 512 + 64)


def test_more_slots_need_more_scratch_where_layers_recur() -> None:
    made = header(heads=(0,), heads_kv=(), recurrent_state=MAMBA)
    one, four = (compute(made, parallel=slots) for slots in (1, 4))
    assert four - one >= 3 * 4 * 16 * 128


def test_every_token_has_an_output_where_embeddings_are_asked_for() -> None:
    """Of a vocabulary of a million words."""
    made = header(vocabulary_size=1_000_000)
    embedding = replace(made, pooling=3)
    assert compute(embedding) == compute(made, embeddings=True)
    assert compute(embedding) - compute(made) > 4 * 500 * 1_000_000


def test_the_last_layer_feeds_only_tokens_that_have_an_output() -> None:
    """With it alone on a device there is little to do but attention."""
    made = header(layers=4, feed_forward_length=(4096,))
    last, two = (compute(made, devices=("RPC0",), gpu_layers=count) for count in (2, 3))
    assert two - last > 4 * 512 * 2 * 4096


def test_experts_that_stay_on_the_host_have_their_scratch_there() -> None:
    made = replace(LAYERS, experts_used=4, expert_feed_forward_length=512)
    on_host = [
        estimate(made, Load(4096, 1, devices=("RPC0",), expert_layers_on_host=count)).parts[-1]
        for count in (0, 2)
    ]
    assert on_host[1].compute_bytes - on_host[0].compute_bytes >= 4 * 512 * (3 * 4 * 512 - 64)


@pytest.mark.parametrize(
    ("devices", "copies"),
    [(("CUDA0", "CUDA1"), 4), (("CUDA0", "RPC0"), 1), (("RPC0", "RPC1"), 1)],
)
def test_batches_that_follow_each_other_over_devices_have_inputs_of_their_own(
    devices: tuple[str, ...], copies: int
) -> None:
    made = header(layers=8)
    one = estimate(made, Load(32768, 1, devices=devices[:1])).parts[0].compute_bytes
    each = estimate(made, Load(32768, 1, devices=devices)).parts[0].compute_bytes
    inputs = 2 * 512 * 32768 + PLACES + 4 * 512 * 64
    assert each - one == (copies - 1) * inputs


def test_a_device_that_computes_for_the_host_needs_room_for_one_of_its_weights() -> None:
    """An RPC device leaves them alone."""
    partly = {"context": 4096, "parallel": 1, "gpu_layers": 2}
    for device, room in (("CUDA0", 4 * MIB // 3), ("RPC0", 0)):
        made = replace(LAYERS, expert_bytes=(), experts=0)
        few = estimate(made, Load(devices=(device,), **partly)).parts[0].compute_bytes
        host = estimate(made, Load(devices=("RPC0",), **partly)).parts[0].compute_bytes
        assert few - host >= room
        assert few == host or device == "CUDA0"


def test_a_device_that_only_computes_for_the_host_is_not_taken_for_idle() -> None:
    load = Load(4096, 1, devices=("CUDA0",), gpu_layers=0)
    assert estimate(LAYERS, load).parts[0].compute_bytes > 4 * 512 * 3 * 128
    short = replace(load, ubatch=8)
    assert estimate(LAYERS, short).parts[0].compute_bytes == 0


# --- drafts, projectors, calibration and margins -------------------------------------------------


def test_a_draft_is_taken_beside_the_model_wherever_it_lies() -> None:
    main, draft = Load(4096, 4, devices=("CUDA0",)), Load(4096, 4)
    alone, both = (
        estimate(LAYERS, main, draft=beside) for beside in (None, (header(layers=1), draft))
    )
    assert both.on("CUDA0") == alone.on("CUDA0")
    drafted = taken(header(layers=1), draft)
    grown = both.parts[-1].weights_bytes - alone.parts[-1].weights_bytes
    assert grown == drafted.weights_bytes
    assert both.parts[-1].kv_bytes == drafted.kv_bytes


def test_a_draft_may_lie_on_a_device_that_the_model_does_not_use() -> None:
    made = estimate(LAYERS, Load(4096, 4), draft=(header(), Load(4096, 4, devices=("CUDA0",))))
    assert [part.device for part in made.parts] == ["CUDA0", "CPU"]


def test_a_projector_needs_scratch_for_the_patches_of_an_image() -> None:
    made = header(tensor_bytes=5 * MIB, image=(1024, 768, 3072))
    assert projector_bytes(made) == 5 * MIB + 4 * 1024 * 7 * 768
    assert projector_bytes(replace(made, image=(1024, 768, 768))) == 5 * MIB + 4 * 1024 * 5 * 768


def test_a_projector_lies_on_the_first_device_even_of_a_model_on_the_host() -> None:
    made = estimate(LAYERS, Load(4096, 4, devices=("CUDA0",), gpu_layers=0), projector_bytes=MIB)
    assert made.parts[0].weights_bytes == MIB


@pytest.mark.parametrize("devices", [(), ("RPC0",), ("RPC0", "RPC1")])
def test_calibration_gives_back_what_it_was_given(devices: tuple[str, ...]) -> None:
    known = Load(2048, 1, devices=devices)
    last = -1 if len(devices) != 1 else 0
    compute_bytes = estimate(header(layers=8), known).parts[last].compute_bytes
    if len(devices) == 2:
        compute_bytes = estimate(header(layers=8), known).parts[1].compute_bytes
    elements = calibrate(header(layers=8), known, compute_bytes)
    again = estimate(header(layers=8), known, scratch_elements=elements)
    assert again.source is Source.CALIBRATED
    near = pytest.approx(estimate(header(layers=8), known).total_bytes, rel=0.001)
    assert again.total_bytes == near


def test_calibration_outlives_another_context_and_batch() -> None:
    """An engine that needs half as much again is known from one load."""
    made, known = header(), Load(2048, 1, devices=("RPC0",))
    inputs = 2 * 512 * 2048 + PLACES
    elements = calibrate(made, known, inputs + 4 * 512 * 900)
    assert elements == 900
    wanted = Load(65536, 4, ubatch=256, devices=("RPC0",))
    found = estimate(made, wanted, scratch_elements=elements).parts[0]
    assert found.compute_bytes == 2 * 256 * 65536 + 24 * 256 + 4 * 256 * 900


def test_calibration_never_goes_below_nothing() -> None:
    assert calibrate(header(), Load(2048, 1), 0) == 0


@pytest.mark.parametrize(
    ("source", "percent"),
    [(Source.LEARNED, 2), (Source.DRY_RUN, 2), (Source.CALIBRATED, 5), (Source.HEADER, 6)],
)
def test_a_margin_is_as_large_as_its_source_is_uncertain(source: Source, percent: int) -> None:
    made = taking(1000 * MIB, "CUDA0", source)
    assert margin_bytes(made, "CUDA0") == percent * 10 * MIB + 4 * MIB
    assert margin_bytes(made, HOST) == 4 * MIB
    assert margin_bytes(Estimate(), HOST) == 4 * MIB


# --- what always holds ---------------------------------------------------------------------------

_COUNT = st.integers(0, 2**20)
_HEADERS = st.builds(
    header,
    architecture=st.sampled_from(
        ["llama", "gemma3", "phi3", "qwen3next", "deepseek2", "mamba", "bert", "falcon-h1",
         "gpt-oss", "nemotron_h", "gemma3n", ""]
    ),
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
    pooling=st.sampled_from([None, 0, 1, 4]), ungated=st.booleans(),
    key_length_mla=st.integers(0, 256), value_length_mla=st.integers(0, 256),
    predicting_layers=st.integers(0, 90), shared_kv_layers=st.integers(0, 90),
    attention_interval=st.integers(0, 5), short_convolution=st.integers(0, 4),
    wkv_head_size=st.integers(0, 4), token_shifts=st.integers(0, 2),
    kda_head_size=st.integers(0, 4), shared_experts=st.integers(0, 1),
    recurrent_layers=st.lists(st.integers(0, 1), max_size=4).map(tuple),
    block_bytes=st.lists(st.integers(0, MIB), max_size=90).map(tuple),
    expert_bytes=st.lists(st.integers(0, 1), max_size=90).map(tuple),
).map(
    lambda made: replace(made, expert_bytes=tuple(map(min, made.expert_bytes, made.block_bytes)))
)  # fmt: skip
_LOADS = st.builds(
    Load, context=st.integers(1, 2**24), parallel=st.integers(1, 256),
    ubatch=st.integers(1, 2048), devices=st.sampled_from(["CPU", "CUDA0", "RPC3", "7"]).map(on),
)  # fmt: skip
_ANYWHERE = st.builds(
    Load, context=st.integers(0, 2**24), parallel=st.integers(0, 256),
    ubatch=st.integers(0, 2048),
    devices=st.lists(st.sampled_from(["CUDA0", "CUDA1", "RPC0", "CPU"]), max_size=3).map(tuple),
    split=st.lists(st.floats(-1, 100), max_size=4).map(tuple),
    gpu_layers=st.none() | st.integers(-1, 100), unified=st.booleans(),
    cache_type_k=st.sampled_from(["f16", "q8_0", "q4_0", "?"]), flash_attention=st.booleans(),
    swa_full=st.booleans(), expert_layers_on_host=st.integers(0, 100), embeddings=st.booleans(),
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


@settings(max_examples=200, deadline=None)
@given(made=_HEADERS, load=_ANYWHERE, elements=st.none() | st.integers(0, 2**20))
def test_wherever_layers_lie_all_of_them_lie_somewhere(
    made: Header, load: Load, elements: int | None
) -> None:
    """Weights once (a copy of the output beside), caches and states as on the host alone."""
    found = estimate(made, load, scratch_elements=elements)
    alone = estimate(made, replace(load, devices=()))
    assert [part.device for part in found.parts].count(HOST) == 1
    weights, once = (sum(part.weights_bytes for part in one.parts) for one in (found, alone))
    assert once <= weights <= once + made.embedding_bytes
    for name in ("kv_bytes", "recurrent_bytes"):
        assert sum(getattr(part, name) for part in found.parts) == getattr(alone.parts[-1], name)
    sizes = [
        size
        for part in found.parts
        for size in (part.weights_bytes, part.compute_bytes, part.overhead_bytes)
    ]
    assert all(type(size) is int and size >= 0 for size in sizes)
