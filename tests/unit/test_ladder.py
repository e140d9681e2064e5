"""The ladder of a model: what it is made of, in which order, and how it is climbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.core.arguments import load_of
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.estimate import estimate
from supervisor_synapse.core.ladder import MOST_RUNGS, name_of, takes_less
from supervisor_synapse.core.model import Program, Role, Tier, Variant
from supervisor_synapse.core.plan import Plan, make_plan, on_rung, with_port, with_rung
from supervisor_synapse.core.settings import Settings
from tests.conftest import Engine, Serve
from tests.integration.harness import wait_until
from tests.integration.rpc_devices import rpc_device
from tests.unit.builders import GIB, MIB, gpu, host, section
from tests.unit.test_placement import (
    _FLEET,
    _GPUS,
    NOTHING_KEPT,
    again,
    large,
    real_model,
    told,
    without_port,
    world,
)

GPU = gpu("CUDA0", 24 * GIB)


def quantization(name: str, block_mib: int, **changes: Any) -> Model:
    """One of several of the same model."""
    values = {"key": name, "repo": "o/m", "quantization": name.upper(), "parameters": 3 * 10**9}
    return large(f"m-{name}", block_mib, **(values | changes))


def planned(
    models: Sequence[Model], said: Sequence[Any] = (), devices: Sequence[Any] = (GPU,)
) -> dict[str, Program]:
    settings = replace(NOTHING_KEPT, models=tuple(said))
    plan = make_plan(models, settings, world(*devices))
    return {program.name: program for program in plan.programs}


def labels(program: Program) -> list[str]:
    return [variant.label for variant in program.ladder]


def on_devices(variant: Variant) -> int:
    return variant.estimate.total_bytes - variant.estimate.on("CPU")


# --- what it is made of --------------------------------------------------------------------------


def test_a_ladder_goes_over_smaller_contexts_to_fewer_layers_down_to_the_host() -> None:
    program = planned([large()])["large"]
    assert labels(program) == [
        "as configured", "context 8192", "context 4096", "context 2048",
        "24 of 33 layers on CUDA0", "16 of 33 layers on CUDA0", "8 of 33 layers on CUDA0",
        "on the host",
    ]  # fmt: skip
    assert [v.context for v in program.ladder] == [16384, 8192, 4096] + [2048] * 5
    assert [v.device for v in program.ladder] == ["CUDA0"] * 7 + ["CPU"]
    assert all(v.key == program.key for v in program.ladder)
    assert told(with_rung(program, 5), "--gpu-layers") == "16"
    assert told(with_rung(program, 7), "--device") == "none"


def test_each_rung_takes_what_its_own_arguments_take() -> None:
    program = planned([large()])["large"]
    assert (program.arguments, program.estimate) == (
        program.ladder[0].arguments, program.ladder[0].estimate,
    )  # fmt: skip
    for variant in program.ladder:
        load = replace(load_of(variant.arguments), prompt_cache_bytes=None)
        assert variant.estimate == estimate(large().header, load)


def test_a_context_that_was_said_goes_down_to_one_that_is_still_of_use() -> None:
    (program,) = planned([large()], [section("*", context=9000, gpu_layers=0)]).values()
    assert labels(program) == ["as configured", "context 4352", "context 2048"]
    (program,) = planned([large()], [section("*", context=1000, gpu_layers=0)]).values()
    assert program.ladder == ()


def test_a_number_of_layers_that_was_said_goes_down_from_there() -> None:
    (program,) = planned([large()], [section("*", context=2048, gpu_layers=8)]).values()
    assert labels(program) == [
        "as configured", "6 of 33 layers on CUDA0", "4 of 33 layers on CUDA0",
        "2 of 33 layers on CUDA0", "on the host",
    ]  # fmt: skip


def test_a_split_keeps_its_proportions() -> None:
    devices = (gpu("CUDA0", 3 * GIB), gpu("CUDA1", 4 * GIB))
    (program,) = planned([large(context_length=2048)], devices=devices).values()
    first, second = map(int, str(told(program, "--tensor-split")).split(","))
    half = with_rung(program, 2)
    assert half.ladder[2].label == "16 of 33 layers on CUDA0,CUDA1"
    parts = [int(part) for part in str(told(half, "--tensor-split")).split(",")]
    assert sum(parts) == 16
    assert parts[0] == 16 * first // (first + second)


def test_smaller_quantizations_come_after_the_host_the_next_one_first() -> None:
    models = [quantization("q8_0", 200), quantization("q4_k_m", 100), quantization("q2_k", 50),
              quantization("f16", 400)]  # fmt: skip
    said = [section("*", gpu_layers=0, context=4096), section("*q8_0", enabled=True)]
    program = planned(models, said)["m-q8_0"]
    assert labels(program) == [
        "as configured", "context 2048", "m-q4_k_m at context 2048", "m-q2_k at context 2048",
    ]  # fmt: skip
    assert [v.key for v in program.ladder[2:]] == ["q4_k_m", "q2_k"]
    assert [v.model_path for v in program.ladder[2:]] == [
        "/models/m-q4_k_m.gguf", "/models/m-q2_k.gguf",
    ]  # fmt: skip


def test_a_smaller_quantization_lies_on_the_same_devices() -> None:
    models = [quantization("q8_0", 200), quantization("q4_k_m", 100)]
    program = planned(models, [section("*q8_0", enabled=True)])["m-q8_0"]
    assert labels(program) == [
        "as configured", "context 8192", "context 4096", "context 2048",
        "24 of 33 layers on CUDA0", "16 of 33 layers on CUDA0", "on the host",
        "m-q4_k_m at context 2048",
    ]  # fmt: skip
    assert program.ladder[-1].device == "CUDA0"
    assert program.ladder[-1].estimate.total_bytes < program.ladder[-2].estimate.total_bytes


def test_a_quantization_that_the_settings_disable_is_no_rung() -> None:
    models = [quantization("q8_0", 200), quantization("q4_k_m", 100)]
    program = planned(models, [section("*q4*", enabled=False)])["m-q8_0"]
    assert "q4_k_m" not in " ".join(labels(program))


def test_the_fallback_comes_last_as_it_is_served_itself_but_in_the_models_place() -> None:
    models = [large("big", 300), large("small", 20, role=Role.EMBEDDING, projector="/p.gguf")]
    said = [
        section("big", fallback="small", alias="main", port=9000, sleep_idle_seconds=9),
        section("small", context=512, parallel=7, args=("-fa", "off"), sleep_idle_seconds=3),
    ]
    found = planned(models, said)
    last = found["big"].ladder[-1]
    assert last.label == "fallback small"
    assert (last.key, last.context, last.device) == (models[1].key, 512, "CUDA0")
    assert (last.model_path, last.projector_path) == ("/models/small.gguf", "/p.gguf")
    assert last.estimate == found["small"].estimate
    stands_in = with_rung(found["big"], len(found["big"].ladder) - 1)
    for option, value in (("--alias", "main"), ("--port", "9000"), ("--parallel", "7"),
                          ("--sleep-idle-seconds", "9"), ("-fa", "off")):  # fmt: skip
        assert told(stands_in, option) == value
    assert "--embeddings" in stands_in.arguments
    assert "--embeddings" not in found["big"].arguments


@pytest.mark.parametrize("fallback", ["big", "none-such"])
def test_a_model_does_not_fall_back_on_itself_or_on_nothing(fallback: str) -> None:
    program = planned([large("big")], [section("big", fallback=fallback)])["big"]
    assert labels(program)[-1] == "on the host"


def test_a_fallback_that_takes_no_less_is_no_rung() -> None:
    program = planned([large("a"), large("b", 500)], [section("a", fallback="b")])["a"]
    assert labels(program)[-1] == "on the host"


def test_a_ladder_has_at_most_eight_rungs_and_keeps_the_last_of_each_kind() -> None:
    models = [
        *(quantization(f"q{n}", 20 * n, parameters=10**11, context_length=2**20)
          for n in range(1, 9)),
        large("spare", 5, context_length=2048),
    ]  # fmt: skip
    said = [section("*q8", enabled=True, tier=Tier.POWERFUL, fallback="spare")]
    found = labels(planned(models, said)["m-q8"])
    assert len(found) == MOST_RUNGS
    assert found[0] == "as configured"
    for label in ("context 4096", "on the host", "m-q1 at context 4096", "fallback spare"):
        assert label in found


def test_what_is_free_plays_no_part() -> None:
    """The same placement, the same ladder, whatever is free."""
    settings = NOTHING_KEPT
    before = world(GPU)
    first = make_plan([large()], settings, before)
    busy = again(first, before, devices=(gpu("CUDA0", 24 * GIB, 0), host(8 * GIB, 0)))
    assert make_plan([large()], settings, busy).programs[0].ladder == first.programs[0].ladder


# --- how it is climbed ---------------------------------------------------------------------------


def stepped(plan: Plan, rung: int) -> Plan:
    """The plan after its first program was put on a rung."""
    program = with_rung(plan.programs[0], rung)
    choices = {**plan.choices, program.key: on_rung(plan.choices[program.key], program)}
    return replace(plan, programs=(program, *plan.programs[1:]), choices=choices)


@pytest.mark.parametrize("rung", range(8))
def test_a_rung_once_deployed_is_kept(rung: int) -> None:
    before = world(GPU)
    plan = stepped(make_plan([large()], NOTHING_KEPT, before), rung)
    later = make_plan([large()], NOTHING_KEPT, again(plan, before))
    assert later.choices == plan.choices
    assert [replace(p, reason="") for p in later.programs] == [
        replace(p, reason="") for p in plan.programs
    ]
    if rung:
        label = plan.programs[0].ladder[rung].label
        assert later.programs[0].reason.startswith(f"stepped down to {label}; ")


@pytest.mark.parametrize(
    "said", [{"args": ("-fa", "off")}, {"context": 4096}, {"alias": "x"}, {"parallel": 2}]
)
def test_where_the_settings_say_something_else_it_begins_at_the_top(said: dict[str, Any]) -> None:
    before = world(GPU)
    plan = stepped(make_plan([large()], NOTHING_KEPT, before), 2)
    settings = replace(NOTHING_KEPT, models=(section("*", **said),))
    (program,) = make_plan([large()], settings, again(plan, before)).programs
    assert program.rung == 0


def test_a_rung_that_is_no_more_is_left_for_the_top() -> None:
    models = [large("big", 300), large("small", 20)]
    settings = replace(NOTHING_KEPT, models=(section("big", fallback="small"),))
    before = world(GPU)
    first = make_plan(models, settings, before)
    big = next(i for i, program in enumerate(first.programs) if program.name == "big")
    ordered = replace(first, programs=(first.programs[big], *first.programs[:big]))
    plan = stepped(ordered, len(first.programs[big].ladder) - 1)
    kept = make_plan(models, settings, again(plan, before))
    assert next(p for p in kept.programs if p.name == "big").model_path == "/models/small.gguf"
    alone = make_plan(models[:1], settings, again(plan, before))
    assert (alone.programs[0].rung, alone.programs[0].model_path) == (0, "/models/big.gguf")


def test_what_a_model_takes_on_its_rung_is_not_given_to_another() -> None:
    """Neither are there, nor is there room for the rung on which it began."""
    made, other = large(block_mib=200), large("other", 200)
    before = world(gpu("CUDA0", 24 * GIB))
    plan = stepped(make_plan([made], NOTHING_KEPT, before), 5)
    held = plan.programs[0].estimate.on("CUDA0")
    squeezed = (gpu("CUDA0", 24 * GIB, held + 2 * GIB), host(256 * GIB))
    later = make_plan([made, other], NOTHING_KEPT, again(plan, before, devices=squeezed))
    found = next(program for program in later.programs if program.name == "other")
    assert found.enabled
    assert 0 < found.estimate.on("CUDA0") <= 2 * GIB


def test_another_port_is_another_port_on_every_rung() -> None:
    program = with_port(planned([large()])["large"], 9999)
    assert {told(with_rung(program, rung), "--port") for rung in range(8)} == {"9999"}
    before = planned([large()])["large"]
    assert [name_of(v) for v in program.ladder] == [name_of(v) for v in before.ladder]
    assert len({name_of(v) for v in before.ladder}) == len(before.ladder)


# --- whatever the fleet --------------------------------------------------------------------------


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    fleet=_FLEET, gpus=_GPUS,
    said=st.lists(
        st.builds(
            section, st.sampled_from(["m1*", "*2", "*"]), fallback=st.sampled_from(["m1", "m2"]),
            context=st.sampled_from([None, 100_000, 300]), gpu_layers=st.sampled_from([None, 5]),
        ),
        max_size=2,
    ),
)  # fmt: skip
def test_every_ladder_strictly_descends(
    fleet: list[Model], gpus: tuple[Any, ...], said: list[Any]
) -> None:
    fleet = [replace(made, repo="o/m") for made in fleet]
    settings = Settings(models=tuple(said))
    plan = make_plan(fleet, settings, world(*gpus))
    for program in plan.programs:
        assert len(program.ladder) != 1
        assert len(program.ladder) <= MOST_RUNGS
        for above, below in pairwise(program.ladder):
            assert takes_less(below, above)
            if below.key == above.key:
                assert (on_devices(below), below.estimate.on("CPU")) < (
                    on_devices(above), above.estimate.on("CPU"),
                )  # fmt: skip
            else:
                assert below.estimate.total_bytes < above.estimate.total_bytes
            assert {"--alias", program.alias, str(program.port)} <= set(below.arguments)
        for variant in program.ladder:
            assert load_of(variant.arguments).context == variant.context
            assert variant.estimate.total_bytes // MIB > 0


# --- the real engine -----------------------------------------------------------------------------


def test_the_real_engine_takes_less_of_a_device_on_each_rung(
    serve: Serve, llama_server: Engine, tmp_path: Path
) -> None:
    """And no more of it than the rung's estimate says."""
    made = real_model(tmp_path / "m.gguf", context=16384)
    used = []
    with rpc_device(GIB) as device:
        settings = replace(NOTHING_KEPT, rpc=(device.endpoint,))
        where = world(gpu("RPC0", GIB), engine=engines.find(llama_server.path))
        (program,) = make_plan([made], settings, where).programs
        assert len(program.ladder) == MOST_RUNGS
        for variant in program.ladder:
            server = serve(tmp_path / "m.gguf", *without_port(variant.arguments))
            used.append(device.used_bytes)
            assert used[-1] <= variant.estimate.on("RPC0")
            server.end()
            wait_until(lambda: device.used_bytes == 0, 10)
    assert used == sorted(set(used), reverse=True)
    assert used[-1] == 0
