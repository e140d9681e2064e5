"""Where models lie: on which devices, with how many layers and how much context; and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.arguments import load_of
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.estimate import Load, estimate, margin_bytes
from supervisor_synapse.core.model import Device, Estimate, Part, Program, Source
from supervisor_synapse.core.plan import Plan, World, make_plan
from supervisor_synapse.core.settings import Enable, Reserve, Settings
from supervisor_synapse.report import mib
from tests.conftest import Engine as ServedEngine
from tests.conftest import Serve
from tests.gguf_factory import write_model
from tests.integration.rpc_devices import rpc_device
from tests.unit.builders import FLAGS, GIB, MIB, engine, gpu, host, model, section
from tests.unit.builders import world as plain_world

NOTHING_KEPT = Settings(memory_reserve=Reserve(0))
ENGINE = engine(flags=FLAGS | {"--fit", "--log-verbosity", "--tensor-split", "--rpc"})
LAYERS = 32


def large(name: str = "large", block_mib: int = 100, **changes: Any) -> Model:
    """A model of 32 layers of so many MiB each, and their caches: 8 KiB a cell of the context."""
    size_bytes = (LAYERS * block_mib + 200) * MIB
    values: dict[str, Any] = {
        "name": name, "layers": LAYERS, "heads": (32,), "heads_kv": (8,),
        "embedding_length": 1024, "feed_forward_length": (4096,), "size_bytes": size_bytes,
        "block_bytes": (block_mib * MIB,) * LAYERS, "embedding_bytes": 100 * MIB,
        "context_length": 131072,
    }  # fmt: skip
    return model(**(values | changes))


def world(*devices: Device, **changes: Any) -> World:
    """With an engine that can split, and a host with plenty of memory unless one is given."""
    every = devices if any(one.is_host for one in devices) else (*devices, host(256 * GIB))
    return plain_world(**({"devices": every, "engine": ENGINE} | changes))


def again(plan: Plan, before: World, **changes: Any) -> World:
    return replace(before, earlier=plan.choices, **changes)


def planned(
    models: Sequence[Model], found: World, settings: Settings = NOTHING_KEPT
) -> dict[str, Program]:
    return {program.name: program for program in make_plan(models, settings, found).programs}


def one(made: Model, found: World, settings: Settings = NOTHING_KEPT) -> Program:
    return planned([made], found, settings)[made.name]


def taken(made: Model, load: Load) -> dict[str, int]:
    """What must be free by device, with the margin."""
    return needs(estimate(made.header, load))


def needs(found: Estimate) -> dict[str, int]:
    return {
        part.device: part.total_bytes + margin_bytes(found, part.device) for part in found.parts
    }


def whole(made: Model, context: int, device: str = "CUDA0") -> int:
    """Bytes that must be free on one device for all of it."""
    return taken(made, Load(context, 4, devices=(device,)))[device]


def told(program: Program, option: str) -> str | None:
    words = program.arguments
    return words[words.index(option) + 1] if option in words else None


# --- one device ----------------------------------------------------------------------------------


def test_a_model_lies_on_a_device_with_all_its_layers_and_says_so() -> None:
    found = one(large(), world(gpu("CUDA0", 24 * GIB)))
    assert (found.device, found.context, found.enabled) == ("CUDA0", 16384, True)
    assert told(found, "--device") == "CUDA0"
    assert told(found, "--gpu-layers") == "33"
    assert told(found, "--fit") == "off"
    assert told(found, "--tensor-split") is None
    on_device = mib(found.estimate.on("CUDA0"))
    assert found.reason == f"fits: {on_device} of 24.0 GiB left on CUDA0; context 16384 of 131072"


def test_models_are_packed_onto_the_fewest_devices() -> None:
    """One that is in use is filled up before another is begun, with the roomiest."""
    devices = (gpu("CUDA0", 8 * GIB), gpu("CUDA1", 20 * GIB), gpu("CUDA2", 12 * GIB))
    models = [large(f"m{n}") for n in range(5)]
    each = whole(models[0], 16384)
    assert 20 * GIB // each == 4
    found = planned(models, world(*devices))
    assert [found[f"m{n}"].device for n in range(5)] == ["CUDA1"] * 4 + ["CUDA2"]


def test_of_devices_in_use_the_one_with_the_least_room_that_is_enough_is_taken() -> None:
    said = (section("a", device="CUDA0"), section("b", device="CUDA1"))
    small = {"size_bytes": 5 * MIB, "context_length": 2048}
    models = [model(name=name, **small) for name in "ab"] + [large(f"m{n}") for n in range(2)]
    tight = whole(models[2], 16384) + 2 * GIB
    devices = (gpu("CUDA0", 24 * GIB), gpu("CUDA1", tight), gpu("CUDA2", 80 * GIB))
    found = planned(models, world(*devices), replace(NOTHING_KEPT, models=said))
    assert [found[f"m{n}"].device for n in range(2)] == ["CUDA1", "CUDA0"]


def test_another_device_is_begun_before_a_context_is_cut() -> None:
    models = [large(f"m{n}") for n in range(2)]
    room = whole(models[0], 16384) + whole(models[0], 8192)
    found = planned(models, world(gpu("CUDA0", room), gpu("CUDA1", room - 1)))
    assert [(p.device, p.context) for p in found.values()] == [("CUDA0", 16384), ("CUDA1", 16384)]
    found = planned(models, world(gpu("CUDA0", room)))
    assert [(p.device, p.context) for p in found.values()] == [("CUDA0", 16384), ("CUDA0", 8192)]


def test_all_layers_with_the_smallest_context_come_before_a_part_of_them_with_more() -> None:
    made = large()
    found = one(made, world(gpu("CUDA0", whole(made, 2048))))
    assert (found.context, told(found, "--gpu-layers")) == (2048, "33")


def test_one_device_with_the_smallest_context_comes_before_two_with_more() -> None:
    made = large()
    found = one(made, world(*(gpu(f"CUDA{n}", whole(made, 2048)) for n in range(2))))
    assert (found.device, found.context) == ("CUDA0", 2048)


def test_what_is_kept_on_the_host_must_fit_there() -> None:
    made = large()
    part = taken(made, Load(2048, 4, devices=("CUDA0",)))["CPU"]
    device = gpu("CUDA0", 80 * GIB)
    assert one(made, world(device, host(part))).context == 2048
    found = one(made, world(device, host(part - 1)))
    assert not found.enabled
    assert found.reason.startswith("does not fit: needs ")
    assert found.reason.endswith(f"{mib(part - 1)} left on CPU")


def test_memory_of_a_device_that_is_the_hosts_counts_there_too() -> None:
    made = large(block_mib=300)
    devices = (gpu("MTL0", 16 * GIB), host(20 * GIB, 14 * GIB))
    found = planned([made, replace(made, name="other", key="other")], world(*devices))
    assert [p.enabled for p in found.values()] == [True, False]


# --- several devices -----------------------------------------------------------------------------


def test_what_does_not_fit_on_one_device_is_split_by_their_room() -> None:
    made = large()
    found = one(made, world(gpu("CUDA0", 3 * GIB), gpu("CUDA1", 4 * GIB)))
    assert (found.device, told(found, "--device")) == ("CUDA0,CUDA1", "CUDA0,CUDA1")
    parts = [int(part) for part in str(told(found, "--tensor-split")).split(",")]
    assert sum(parts) == LAYERS + 1
    assert parts[0] < parts[1]
    assert told(found, "--gpu-layers") == "33"
    assert needs(found.estimate)["CUDA0"] <= 3 * GIB
    assert needs(found.estimate)["CUDA1"] <= 4 * GIB
    assert found.reason.startswith("split over CUDA0,CUDA1: ")
    for name, room in (("CUDA0", 3), ("CUDA1", 4)):
        assert f"{mib(found.estimate.on(name))} of {mib(room * GIB)} left on {name}" in found.reason


def test_as_few_devices_are_split_over_as_it_takes_the_roomiest() -> None:
    made = large(context_length=2048)
    devices = [gpu(f"CUDA{n}", size * 100 * MIB) for n, size in enumerate((30, 21, 31, 20))]
    assert one(made, world(*devices)).device == "CUDA0,CUDA2"
    made = large(block_mib=150, context_length=2048)
    assert one(made, world(*devices)).device == "CUDA0,CUDA1,CUDA2"


def test_layers_are_moved_until_a_large_output_layer_fits() -> None:
    """It lies on the last device, where a split by room alone would have too much."""
    made = large(tensor_bytes=5000 * MIB, size_bytes=5000 * MIB, context_length=2048)
    devices = [gpu(f"CUDA{n}", 3400 * MIB) for n in range(2)]
    found = one(made, world(*devices))
    assert found.device == "CUDA0,CUDA1"
    first, last = map(int, str(told(found, "--tensor-split")).split(","))
    assert first > last + 8
    assert all(needs(found.estimate)[d.name] <= d.free_bytes for d in devices)


def test_an_engine_that_cannot_be_told_how_splits_nothing() -> None:
    found = one(
        large(), world(gpu("CUDA0", 3 * GIB), gpu("CUDA1", 4 * GIB), engine=engine(flags=FLAGS))
    )
    assert told(found, "--device") == "CUDA1"


# --- a part of the layers ------------------------------------------------------------------------


def test_as_many_layers_as_fit_lie_on_the_device_and_the_rest_on_the_host() -> None:
    made = large()
    room = 2 * GIB
    found = one(made, world(gpu("CUDA0", room)))
    layers = int(str(told(found, "--gpu-layers")))
    assert 0 < layers < 33

    def on_device(count: int, context: int) -> int:
        load = Load(context, 4, devices=("CUDA0",), gpu_layers=count)
        return taken(made, load)["CUDA0"]

    assert on_device(layers, found.context) <= room < on_device(layers + 1, 2048)
    assert found.context == 16384 or on_device(layers, 2 * found.context) > room
    assert found.reason.startswith(f"{layers} of 33 layers on CUDA0: ")
    assert f"context {found.context} of 131072" in found.reason


def test_a_part_of_the_layers_is_spread_over_several_devices_where_more_fit_so() -> None:
    made = large(block_mib=400)
    alone = int(str(told(one(made, world(gpu("CUDA0", 5 * GIB))), "--gpu-layers")))
    found = one(made, world(gpu("CUDA0", 5 * GIB), gpu("CUDA1", 5 * GIB)))
    assert found.device == "CUDA0,CUDA1"
    assert int(str(told(found, "--gpu-layers"))) > alone + 5


def test_where_no_layer_fits_on_a_device_the_host_takes_them_all() -> None:
    found = one(large(), world(gpu("CUDA0", 24 * GIB, 100 * MIB)))
    assert (found.device, found.enabled, found.context) == ("CPU", True, 16384)
    assert (told(found, "--device"), told(found, "--gpu-layers")) == ("none", "0")
    assert "CUDA0" in found.reason
    assert mib(found.estimate.on("CPU")) in found.reason


def test_what_fits_nowhere_is_planned_for_the_roomiest_device_and_says_what_is_missing() -> None:
    made = large()
    little = (gpu("CUDA0", 24 * GIB, GIB), gpu("CUDA1", 24 * GIB, 2 * GIB), host(64 * GIB, GIB))
    found = one(made, world(*little), replace(NOTHING_KEPT, enable=Enable.ALL))
    assert (found.enabled, found.device, found.context) == (True, "CUDA1", 2048)
    on_device = mib(found.estimate.on("CUDA1"))
    assert found.reason.startswith(f"does not fit: needs {on_device} at context 2048 and ")
    assert found.reason.endswith(" to spare, 2048 MiB left on CUDA1")


# --- what the settings say -----------------------------------------------------------------------


@pytest.mark.parametrize("said", [{"device": "none"}, {"gpu_layers": 0}])
def test_a_model_kept_off_the_devices_lives_on_the_host(said: dict[str, Any]) -> None:
    settings = replace(NOTHING_KEPT, models=(section("*", **said),))
    found = one(large(), world(gpu("CUDA0", 24 * GIB)), settings)
    assert (found.device, told(found, "--device")) == ("CPU", "none")
    assert found.reason.startswith("fits: ")


def test_a_number_of_layers_is_kept_as_said() -> None:
    settings = replace(NOTHING_KEPT, models=(section("*", gpu_layers=12),))
    found = one(large(), world(gpu("CUDA0", 24 * GIB)), settings)
    assert (found.device, told(found, "--gpu-layers")) == ("CUDA0", "12")
    assert found.reason.startswith("12 of 33 layers on CUDA0: ")
    found = one(large(), world(gpu("CUDA0", GIB)), settings)
    assert (found.enabled, told(found, "--gpu-layers")) == (False, "12")
    settings = replace(NOTHING_KEPT, models=(section("*", gpu_layers=99),))
    found = one(large(), world(gpu("CUDA0", 24 * GIB)), settings)
    assert told(found, "--gpu-layers") == "99"
    assert found.reason.startswith("fits: ")


def test_a_device_is_kept_as_said_however_little_fits_there() -> None:
    devices = (gpu("CUDA0", 80 * GIB), gpu("CUDA1", 2 * GIB))
    settings = replace(NOTHING_KEPT, models=(section("*", device="CUDA1"),))
    found = one(large(), world(*devices), settings)
    assert found.device == "CUDA1"
    assert 0 < int(str(told(found, "--gpu-layers"))) < 33
    found = one(large(), world(devices[0], gpu("CUDA1", GIB // 4)), settings)
    assert (found.enabled, told(found, "--device")) == (False, "CUDA1")


def test_several_devices_that_are_named_are_all_used() -> None:
    devices = [gpu(f"CUDA{n}", 24 * GIB) for n in range(3)]
    settings = replace(NOTHING_KEPT, models=(section("*", device="CUDA2,CUDA0"),))
    found = one(large(), world(*devices), settings)
    assert (found.device, told(found, "--device")) == ("CUDA2,CUDA0", "CUDA2,CUDA0")
    assert told(found, "--tensor-split") is not None


def test_a_device_that_is_not_there_is_named() -> None:
    settings = replace(NOTHING_KEPT, models=(section("*", device="CUDA7"),))
    found = one(large(), world(gpu("CUDA0", 24 * GIB)), settings)
    assert not found.enabled
    assert found.reason == "does not fit: there is no device CUDA7 here"


def test_a_context_is_kept_as_said() -> None:
    made = large()
    settings = replace(NOTHING_KEPT, models=(section("*", context=12345),))
    found = one(made, world(gpu("CUDA0", whole(made, 2048))), settings)
    assert found.context == 12345
    assert 0 < int(str(told(found, "--gpu-layers"))) < 33  # rather than a smaller context


def test_arguments_of_the_users_own_count() -> None:
    made = large()
    settings = replace(NOTHING_KEPT, models=(section("*", args=("-ctk", "q4_0", "-ctv", "q4_0")),))
    room = world(gpu("CUDA0", whole(made, 8192)))
    assert one(made, room).context == 8192
    found = one(made, room, settings)
    assert found.context == 16384
    assert found.estimate == estimate(made.header, load_of(found.arguments))


@pytest.mark.parametrize(("device", "rpc"), [("RPC0", "a:1,b:2"), ("CUDA0", None)])
def test_only_who_uses_them_is_told_of_rpc_servers(device: str, rpc: str | None) -> None:
    said = (section("*", device=device),)
    settings = replace(NOTHING_KEPT, rpc=("a:1", "b:2"), models=said)
    found = one(large(), world(gpu("CUDA0", 24 * GIB), gpu("RPC0", 24 * GIB)), settings)
    assert told(found, "--rpc") == rpc


def test_a_machine_without_devices_is_told_of_none() -> None:
    found = one(large(), world())
    assert found.device == "CPU"
    assert not {"--device", "--gpu-layers", "--fit"} & set(found.arguments)


# --- what is known, and what was edited ----------------------------------------------------------


def test_what_is_known_of_a_file_and_its_arguments_beats_the_formula() -> None:
    made = large()
    asked: list[tuple[str, tuple[str, ...]]] = []

    def known(asking: Model, arguments: tuple[str, ...], _: Estimate) -> Estimate | None:
        asked.append((asking.key, arguments))
        if load_of(arguments).context != 8192:
            return None
        return Estimate((Part("CUDA0", 5 * MIB), Part("CPU", 5 * MIB)), Source.LEARNED)

    found = one(made, world(gpu("CUDA0", whole(made, 2048)), known=known))
    assert (found.context, found.estimate.on("CUDA0")) == (8192, 5 * MIB)
    assert found.estimate_source == "learned"
    assert (made.key, found.arguments) in asked


def test_a_block_edited_by_hand_takes_what_it_says() -> None:
    made = large()
    other = large("other")
    words = ("--ctx-size", "131072", "-np", "2", "-kvu", "-dev", "CUDA0", "-ngl", "99")
    load = load_of(words)
    room = taken(made, load)["CUDA0"] + whole(other, 4096)
    before = world(gpu("CUDA0", room), edited={made.key: words})
    found = planned([made, other], before)
    assert (found["large"].context, found["large"].parallel) == (131072, 2)
    assert found["large"].estimate == estimate(made.header, load)
    assert found["large"].reason.startswith("fits: ")
    assert found["large"].ladder == ()
    assert found["other"].context == 4096
    assert told(found["large"], "--ctx-size") != "131072"  # what would be ours


# --- looking twice -------------------------------------------------------------------------------


def test_a_place_is_kept_while_strangers_hold_the_memory() -> None:
    made = large(block_mib=300)
    before = world(gpu("CUDA0", 8 * GIB), gpu("CUDA1", 7 * GIB))
    first = make_plan([made], NOTHING_KEPT, before)
    assert first.programs[0].device == "CUDA0,CUDA1"
    busy = (gpu("CUDA0", 8 * GIB, GIB), gpu("CUDA1", 7 * GIB, 6 * GIB), host())
    later = make_plan([made], NOTHING_KEPT, again(first, before, devices=busy))
    assert later.programs[0].arguments == first.programs[0].arguments
    assert later.programs[0].enabled


def test_what_had_to_lie_on_the_host_is_placed_anew_when_a_device_is_added() -> None:
    made = large()
    before = world(gpu("CUDA0", 2 * GIB))
    first = make_plan([made], NOTHING_KEPT, before)
    more = (*before.devices, gpu("CUDA1", 24 * GIB))
    later = make_plan([made], NOTHING_KEPT, again(first, before, devices=more))
    assert later.programs[0].device == "CUDA1"
    latest = make_plan(
        [made], NOTHING_KEPT, again(later, before, devices=(*more, gpu("CUDA2", 80 * GIB)))
    )
    assert latest.programs[0].device == "CUDA1"


def test_a_driver_that_fails_moves_nothing_to_the_host() -> None:
    """Where no device is listed at all, those that were chosen are waited for."""
    models = [large("on"), large("off")]
    settings = replace(NOTHING_KEPT, models=(section("off", device="none"),))
    before = world(gpu("CUDA0", 24 * GIB))
    first = make_plan(models, settings, before)
    later = make_plan(models, settings, again(first, before, devices=(host(256 * GIB),)))
    assert [p.arguments for p in later.programs] == [p.arguments for p in first.programs]
    assert later.choices == first.choices
    found = {program.name: program for program in later.programs}
    assert found["on"].reason.endswith(", 0 MiB left on CUDA0")
    assert found["off"].reason.startswith("fits: ")
    (problem,) = later.problems
    assert problem.subject == "CUDA0"
    back = make_plan(models, settings, again(later, before))
    assert (back.programs, back.choices) == (first.programs, first.choices)


def test_a_device_that_is_gone_while_others_are_there_is_replaced() -> None:
    before = world(gpu("CUDA0", 24 * GIB), gpu("CUDA1", 80 * GIB))
    first = make_plan([large()], NOTHING_KEPT, before)
    assert first.programs[0].device == "CUDA1"
    later = make_plan([large()], NOTHING_KEPT, again(first, before, devices=before.devices[::2]))
    assert (later.programs[0].device, later.problems) == ("CUDA0", ())


# --- whatever the fleet --------------------------------------------------------------------------

_FLEET = st.lists(
    st.builds(
        lambda n, block, billions, layers, kv, output: model(
            name=f"m{n}", parameters=billions * 10**9, layers=layers,
            size_bytes=(block * layers + output + 20) * MIB, block_bytes=(block * MIB,) * layers,
            embedding_bytes=10 * MIB, heads=(32,), heads_kv=(kv,), embedding_length=4096,
            context_length=65536,
        ),
        st.integers(0, 40), st.integers(1, 200), st.sampled_from([1, 14, 70]),
        st.integers(1, 40), st.sampled_from([1, 8, 32]), st.sampled_from([1, 500]),
    ),
    min_size=1, max_size=8, unique_by=lambda made: made.name,
)  # fmt: skip
_GPUS = st.lists(
    st.tuples(st.sampled_from(["CUDA", "RPC", "MTL"]), st.integers(0, 12_000)), max_size=4
).map(lambda found: tuple(gpu(f"{kind}{n}", 12_000 * MIB, free * MIB)
                          for n, (kind, free) in enumerate(found)))  # fmt: skip
_SAID = st.lists(
    st.builds(
        section, st.sampled_from(["m1*", "*2", "m3*"]),
        gpu_layers=st.sampled_from([None, 0, 7, 99]),
        device=st.sampled_from([None, "CUDA0", "CUDA0,RPC1", "none"]),
        context=st.sampled_from([None, 3000]),
        args=st.sampled_from([None, ("-ctk", "q8_0"), ("--cache-ram", "0"), ("-ub", "64")]),
        enabled=st.sampled_from([None, True]),
    ),
    max_size=2,
)  # fmt: skip


def settings_of(said: Sequence[Any], enable: Enable, reserve_mib: int) -> Settings:
    return Settings(enable=enable, models=tuple(said), memory_reserve=Reserve(reserve_mib * MIB))


def of_the_host(found: Estimate) -> int:
    """What lies in the host's memory, with the margins: there is no other on Apple's machines."""
    return sum(size for name, size in needs(found).items() if name[:3] in ("CPU", "MTL"))


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    fleet=_FLEET, gpus=_GPUS, said=_SAID, enable=st.sampled_from(Enable),
    free=st.integers(0, 24_000), reserve=st.sampled_from([0, 512]),
)  # fmt: skip
def test_what_is_planned_never_takes_more_than_there_is_and_never_changes_by_itself(
    fleet: list[Model], gpus: tuple[Device, ...], said: list[Any], enable: Enable, free: int,
    reserve: int,
) -> None:  # fmt: skip
    settings = settings_of(said, enable, reserve)
    before = world(*gpus, host(24_000 * MIB, free * MIB))
    plan = make_plan(fleet, settings, before)
    fitting = [p for p in plan.programs if plan.choices[p.key].placed]
    for device in gpus:
        used = sum(needs(p.estimate).get(device.name, 0) for p in fitting)
        assert used <= max(device.free_bytes - reserve * MIB, 0)
    assert sum(of_the_host(p.estimate) for p in fitting) <= max((free - reserve) * MIB, 0)
    for program in plan.programs:
        assert_is_what_it_is_told(program, fleet, before)
    twice = make_plan(fleet, settings, again(plan, before))
    assert twice == plan
    full = tuple(replace(device, free_bytes=0) for device in before.devices)
    later = make_plan(fleet, settings, again(plan, before, devices=full))
    placed = {program.key: program.arguments for program in fitting}
    assert {p.key: p.arguments for p in later.programs if p.key in placed} == placed


def assert_is_what_it_is_told(program: Program, fleet: list[Model], before: World) -> None:
    """The estimate is that of the arguments, and the device that of the estimate."""
    (made,) = (one for one in fleet if one.key == program.key)
    load = load_of(program.arguments)
    found = estimate(made.header, replace(load, prompt_cache_bytes=None))
    if load.prompt_cache_bytes == 0:
        found = estimate(made.header, load)
    assert found == program.estimate
    assert (",".join(load.devices) or "CPU") == program.device or load.gpu_layers == 0
    if len(load.devices) > 1:
        assert sum(load.split) == min(load.gpu_layers or 0, made.header.layers + 1)
    assert load.context == program.context
    assert ("--fit" in program.arguments) is ("--device" in program.arguments)
    if any(not device.is_host for device in before.devices):
        assert "--device" in program.arguments


@hypothesis_settings(max_examples=150, deadline=None)
@given(fleet=_FLEET, gpus=_GPUS, free=st.integers(0, 24_000))
def test_what_comes_first_and_fits_is_never_passed_over(
    fleet: list[Model], gpus: tuple[Device, ...], free: int
) -> None:
    """Whoever is not enabled would not have fitted beside those before it, on any one device."""
    before = world(*gpus, host(24_000 * MIB, free * MIB))
    plan = make_plan(fleet, NOTHING_KEPT, before)
    room = {device.name: device.free_bytes for device in before.devices}
    models = {made.key: made for made in fleet}

    def order(program: Program) -> tuple[int, int, str]:
        return program.priority, program.size_bytes, program.key

    for program in sorted(plan.programs, key=order):
        if program.enabled:
            for name, size in needs(program.estimate).items():
                room[name] -= size
                room["CPU"] -= size if name.startswith("MTL") else 0
            continue
        made = models[program.key]
        for device in (*gpus, None):
            where = () if device is None else (device.name,)
            found = taken(made, Load(program_floor(program), 4, devices=where))
            in_host = sum(size for name, size in found.items() if name[:3] in ("CPU", "MTL"))
            fits = in_host <= room["CPU"] and all(found[name] <= room[name] for name in where)
            assert not fits


def program_floor(program: Program) -> int:
    """The smallest context of its tier."""
    return {10: 2048, 20: 4096, 30: 4096}[program.priority]


# --- the real engine -----------------------------------------------------------------------------


def real_model(path: Path, **options: Any) -> Model:
    """A generated model that the engine loads."""
    write_model(path, **({"layers": 12, "embedding": 512, "vocabulary": 500} | options))
    header = gguf_header.read(path)
    return model(name="m", path=str(path), header=header, size_bytes=path.stat().st_size)


def without_port(arguments: Sequence[str]) -> tuple[str, ...]:
    at = arguments.index("--port")
    return (*arguments[:at], *arguments[at + 2 :])


@pytest.mark.parametrize(
    ("room_mib", "layers"), [((38, 42), (13, 13)), ((38, 9), (1, 12))], ids=["split", "in part"]
)
def test_the_real_engine_lays_the_layers_where_the_plan_says_and_has_room_there(
    serve: Serve, llama_server: ServedEngine, tmp_path: Path,
    room_mib: tuple[int, int], layers: tuple[int, int],
) -> None:  # fmt: skip
    made = real_model(tmp_path / "m.gguf")
    with rpc_device(room_mib[0] * MIB) as first, rpc_device(room_mib[1] * MIB) as second:
        settings = replace(NOTHING_KEPT, rpc=(first.endpoint, second.endpoint))
        devices = [
            gpu(f"RPC{n}", device.total_bytes, device.free_bytes)
            for n, device in enumerate((first, second))
        ]
        found = one(made, world(*devices, engine=engines.find(llama_server.path)), settings)
        count = int(str(told(found, "--gpu-layers")))
        assert layers[0] <= count <= layers[1]
        serve(tmp_path / "m.gguf", *without_port(found.arguments), "-lv", "5")
        for number, device in enumerate((first, second)):
            assert device.used_bytes <= found.estimate.on(f"RPC{number}")
    log = (tmp_path / "m.gguf.log").read_text("utf-8", "replace")
    lies = re.findall(r"layer +\d+ assigned to device (\w+)", log)
    split = told(found, "--tensor-split")
    parts = [int(part) for part in split.split(",")] if split else [count]
    expected = ["CPU"] * (made.header.layers + 1 - count)
    for name, part in zip(str(told(found, "--device")).split(","), parts, strict=True):
        expected += [name] * part
    assert lies[: len(expected)] == expected


def test_a_device_that_only_the_settings_name_was_never_there_to_be_lost() -> None:
    """A slip of the pen moves no other model off what it was planned for."""
    fleet = [model(name="m0"), model(name="m1")]
    settings = settings_of([section("m1", gpu_layers=0, device="CUDA0")], Enable.ALL, 0)
    before = world()
    plan = make_plan(fleet, settings, before)
    assert make_plan(fleet, settings, again(plan, before)) == plan


def test_an_engine_that_cannot_be_told_a_device_is_planned_for_all_the_same() -> None:
    old = engine(flags=FLAGS - {"--device"})
    before = world(gpu("CUDA0"), host(), engine=old)
    plan = make_plan([model(name="m0")], Settings(enable=Enable.ALL), before)
    assert plan.programs[0].enabled
