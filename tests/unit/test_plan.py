"""What shall run, where and why; and how that differs from what is deployed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supervisor_synapse import cli, deploy, discovery, report, revise
from supervisor_synapse.adapters import footprints, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.registry import Entry, Registry
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.core.candidates import repo_file
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.changes import Changes, Deployed, compare
from supervisor_synapse.core.estimate import Load, estimate, margin_bytes
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import ProcessState, Program, Role, Source, Tier
from supervisor_synapse.core.plan import Plan, World, make_plan, unmatched_sections
from supervisor_synapse.core.settings import (
    DEFAULT_TIERS,
    Enable,
    ModelRule,
    ModelSettings,
    Reserve,
    Settings,
)
from supervisor_synapse.errors import ConfigError, TransientError
from tests.gguf_factory import write_model
from tests.unit.builders import (
    FLAGS,
    GIB,
    MIB,
    gpu,
    host,
    model,
    section,
    taking,
    world,
)

ALL = Settings(enable=Enable.ALL)


def planned(
    models: Sequence[Model], settings: Settings | None = None, **changes: Any
) -> dict[str, Program]:
    """Programs by name."""
    plan = make_plan(models, settings or Settings(), world(**changes))
    assert not plan.problems
    return {program.name: program for program in plan.programs}


def enabled(plan: Plan | Mapping[str, Program]) -> list[str]:
    programs = plan.programs if isinstance(plan, Plan) else plan.values()
    return [program.name for program in programs if program.enabled]


def again(plan: Plan, **changes: Any) -> World:
    """The world at the next look: what was chosen is known."""
    return world(**({"earlier": plan.choices} | changes))


def need(made: Model, context: int, parallel: int = 4) -> int:
    """Bytes that it takes of the host."""
    return estimate(made.header, Load(context, parallel)).on("CPU")


def room_for(made: Model, context: int) -> int:
    """Bytes that must be free for it on the host."""
    taken = estimate(made.header, Load(context, 4))
    return taken.on("CPU") + margin_bytes(taken, "CPU")


def with_room(size_bytes: int) -> dict[str, Any]:
    """A host with so much room beside the reserve."""
    return {"devices": (host(64 * GIB, size_bytes + 512 * MIB),)}


# --- tiers and order -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("billions", "tier"),
    [
        (0, Tier.FAST), (1, Tier.FAST), (7, Tier.FAST), (7.000000001, Tier.BALANCED),
        (15, Tier.BALANCED), (15.000000001, Tier.POWERFUL), (1000, Tier.POWERFUL),
    ],
)  # fmt: skip
def test_a_tier_takes_models_up_to_its_parameters(billions: float, tier: Tier) -> None:
    made = model(parameters=int(billions * 10**9))
    assert planned([made])[made.name].tier is tier


def test_a_section_may_choose_the_tier_with_its_priority_and_context() -> None:
    settings = Settings(models=(section("tiny*", tier=Tier.POWERFUL),))
    found = planned([model(context_length=2**20)], settings)["tiny-q4_k_m"]
    assert (found.tier, found.priority, found.context) == (Tier.POWERFUL, 30, 32768)


def test_programs_start_by_tier_then_size_then_name() -> None:
    models = [
        model(name="powerful", parameters=30 * 10**9, size_bytes=MIB),
        model(name="balanced", parameters=14 * 10**9, size_bytes=MIB),
        model(name="fast-large", parameters=10**9, size_bytes=300 * MIB),
        model(name="fast-b", parameters=3 * 10**9, size_bytes=200 * MIB),
        model(name="fast-a", parameters=7 * 10**9, size_bytes=200 * MIB),
    ]
    expected = ["fast-a", "fast-b", "fast-large", "balanced", "powerful"]
    for shuffled in (models, models[::-1]):
        assert list(planned(shuffled)) == expected


def test_the_order_of_the_tiers_is_that_of_their_priorities() -> None:
    fast, balanced, powerful = DEFAULT_TIERS
    settings = Settings(tiers=(replace(fast, priority=50), balanced, powerful))
    models = [model(name="fast"), model(name="powerful", parameters=10**12)]
    assert list(planned(models, settings)) == ["powerful", "fast"]


def test_waves_show_the_enabled_in_order_so_many_at_once() -> None:
    models = [model(name=f"m{number}") for number in range(7)]
    settings = Settings(models=(section("m3", enabled=False),))
    waves = make_plan(models, settings, world()).waves(3)
    names = [[program.name for program in wave] for wave in waves]
    assert names == [["m0", "m1", "m2"], ["m4", "m5", "m6"]]
    assert make_plan([], settings, world()).waves(3) == []


# --- context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "context"),
    [(512, 512), (2048, 2048), (8192, 8192), (16384, 16384), (131072, 16384), (0, 16384)],
)
def test_the_context_is_the_trained_one_up_to_that_of_the_tier(trained: int, context: int) -> None:
    """Where the header does not say, the tier alone does."""
    assert planned([model(context_length=trained)])["tiny-q4_k_m"].context == context


def test_a_section_may_choose_any_context() -> None:
    settings = Settings(models=(section("tiny*", context=100_000),))
    assert planned([model()], settings)["tiny-q4_k_m"].context == 100_000


def test_the_context_is_cut_until_the_model_fits() -> None:
    made = model(layers=32, heads=(32,), heads_kv=(8,), embedding_length=4096)
    for context in (16384, 8192, 4096, 2048):
        found = planned([made], **with_room(room_for(made, context)))[made.name]
        assert (found.enabled, found.context) == (True, context)
        assert found.estimate_bytes // MIB == need(made, context) // MIB
    found = planned([made], **with_room(room_for(made, 2048) - 1))[made.name]
    assert not found.enabled


@hypothesis_settings(max_examples=120, deadline=None)
@given(
    trained=st.integers(0, 2**20), least=st.integers(256, 40_000), most=st.integers(256, 40_000),
    room=st.integers(0, 2 * GIB),
)  # fmt: skip
def test_a_context_is_never_beyond_the_trained_nor_outside_the_tiers_bounds(
    trained: int, least: int, most: int, room: int
) -> None:
    least, most = sorted((least, most))
    rule = replace(DEFAULT_TIERS[0], min_context=least, max_context=most)
    settings = replace(ALL, tiers=(rule, *DEFAULT_TIERS[1:]))
    made = model(context_length=trained, layers=32, heads=(32,), embedding_length=4096)
    context = planned([made], settings, **with_room(room))[made.name].context
    assert min(least, trained or least) <= context <= min(most, trained or most)


# --- which are enabled ---------------------------------------------------------------------------


def test_as_many_are_enabled_as_memory_holds_by_priority() -> None:
    small = [model(name=f"small{n}", size_bytes=100 * MIB, parameters=10**9) for n in range(3)]
    large = model(name="large", size_bytes=900 * MIB, parameters=10**12)
    last = model(name="last", size_bytes=950 * MIB, parameters=10**12, context_length=2048)
    room = sum(room_for(one, 16384) for one in small) + room_for(large, 4096)
    found = planned([large, last, *small], **with_room(room))
    assert enabled(found) == ["small0", "small1", "small2", "large"]
    assert found["small0"].reason.startswith("fits: ")
    assert found["last"].reason.startswith("does not fit: needs ")


def test_what_is_too_large_does_not_hold_back_a_smaller_one_behind_it() -> None:
    models = [
        model(name="huge", size_bytes=2 * GIB, parameters=10**9),
        model(name="later", size_bytes=100 * MIB, parameters=10**12),
    ]
    assert enabled(planned(models, **with_room(GIB))) == ["later"]


def test_the_reserve_of_a_device_stays_free() -> None:
    made = model(context_length=2048)
    for reserve, kept in ((Reserve(3 * GIB), 3 * GIB), (Reserve(0, 0.25), 2 * GIB)):
        settings = Settings(memory_reserve=reserve)
        enough = kept + room_for(made, 2048)
        for free, fits in ((enough, True), (enough - 1, False)):
            found = planned([made], settings, devices=(host(8 * GIB, free),))
            assert found[made.name].enabled is fits


def repo(quantization: str, **changes: Any) -> Model:
    """One quantization of a repo that has several."""
    name = f"m-{quantization.lower()}"
    return model(**({"name": name, "key": name, "repo": "o/m", "quantization": quantization}
                    | changes))  # fmt: skip


def test_one_quantization_of_a_repo_is_enabled_the_usual_one_first() -> None:
    models = [
        repo("F16", size_bytes=800 * MIB), repo("Q2_K", size_bytes=50 * MIB),
        repo("Q4_K_M"), repo("Q8_0", size_bytes=200 * MIB), repo("IQ1_XXL", size_bytes=30 * MIB),
    ]  # fmt: skip
    found = planned(models)
    assert enabled(found) == ["m-q4_k_m"]
    assert found["m-f16"].reason == "another quantization of this repo is enabled"


def test_where_the_usual_quantization_does_not_fit_a_smaller_one_is_enabled() -> None:
    models = [repo("Q4_K_M", size_bytes=GIB), repo("Q2_K", size_bytes=100 * MIB)]
    assert enabled(planned(models, **with_room(900 * MIB))) == ["m-q2_k"]


def test_different_models_of_one_repo_are_not_quantizations_of_each_other() -> None:
    models = [repo("Q4_K_M"), repo("Q8_0", parameters=3 * 10**9), repo("F16", architecture="bert")]
    assert len(enabled(planned(models))) == 3


def test_files_of_no_repo_are_each_a_model_of_their_own() -> None:
    models = [replace(repo(quantization), repo=None) for quantization in ("Q4_K_M", "Q8_0")]
    assert len(enabled(planned(models))) == 2


def test_a_quantization_enabled_by_name_takes_the_place_of_the_usual_one() -> None:
    settings = Settings(models=(section("*q8_0", enabled=True),))
    assert enabled(planned([repo("Q4_K_M"), repo("Q8_0")], settings)) == ["m-q8_0"]


def test_all_enables_all_but_drafts_whether_they_fit_or_not() -> None:
    models = [model(name="a", size_bytes=100 * GIB), repo("Q4_K_M"), repo("Q8_0"),
              model(name="draft", role=Role.DRAFT)]  # fmt: skip
    found = planned(models, ALL, **with_room(GIB))
    assert set(enabled(found)) == {"a", "m-q4_k_m", "m-q8_0"}
    assert "does not fit" in found["a"].reason
    assert "draft" in found["draft"].reason


def test_none_enables_only_what_a_section_does() -> None:
    settings = Settings(enable=Enable.NONE, models=(section("b", enabled=True),))
    found = planned([model(name="a"), model(name="b")], settings)
    assert enabled(found) == ["b"]
    assert found["a"].reason == "enable = none in synapse.conf"


@pytest.mark.parametrize("enable", list(Enable))
def test_a_section_has_the_last_word(enable: Enable) -> None:
    said = (section("on*", enabled=True), section("off", enabled=False))
    models = [model(name="on-draft", role=Role.DRAFT), model(name="off"),
              model(name="on-huge", size_bytes=2**40)]  # fmt: skip
    found = planned(models, Settings(enable=enable, models=said))
    assert set(enabled(found)) == {"on-draft", "on-huge"}
    assert found["off"].reason == "enabled = false in synapse.conf"


def test_memory_goes_first_to_what_is_enabled_by_name() -> None:
    large = model(name="large", parameters=10**12, size_bytes=900 * MIB, context_length=2048)
    settings = Settings(models=(section("large", enabled=True),))
    found = planned([model(name="small"), large], settings, **with_room(room_for(large, 2048)))
    assert enabled(found) == ["large"]
    assert found["large"].reason.startswith("fits: ")


def test_every_program_says_why_with_the_numbers() -> None:
    models = [model(name="a"), model(name="b", size_bytes=2**40)]
    for program in planned(models).values():
        assert report.mib(program.estimate_bytes) in program.reason
        assert "CPU" in program.reason


def test_memory_is_told_in_the_units_of_the_tables() -> None:
    (program,) = planned([model(size_bytes=12 * GIB)]).values()
    assert " of 63.5 GiB left on CPU" in program.reason
    assert report.mib(program.estimate_bytes).endswith(" GiB")


@pytest.mark.parametrize(
    ("globs", "named"),
    [
        (["a", "*", "owner/A/*", "B*"], []),
        (["a", "qwen*", "b", "qwen*", "c-[0-9]"], ["[model:qwen*]", "[model:c-[0-9]]"]),
        (["\x1b[2J"], ["[model:\\x1b[2J]"]),
    ],
)
def test_a_section_that_matches_no_model_is_named_once(globs: list[str], named: list[str]) -> None:
    settings = Settings(models=tuple(section(glob, parallel=2) for glob in globs))
    problems = unmatched_sections(settings, [model(name="a"), model(name="b")])
    assert [problem.subject for problem in problems] == named
    assert all("matches no model" in str(problem) for problem in problems)


def test_where_there_is_no_model_sections_are_not_blamed() -> None:
    assert unmatched_sections(Settings(models=(section("a"),)), []) == []


def test_a_discovery_tells_of_a_section_that_matches_nothing(deployment: Deployment) -> None:
    put(deployment, "a")
    rules = (section("a", parallel=2), section("b", parallel=2))
    found, _ = look_and_apply(deployment, settings_of(deployment, models=rules))
    assert [p.subject for p in found.problems if p.subject.startswith("[")] == ["[model:b]"]


def test_a_program_that_is_not_enabled_is_ready_to_be_started_by_hand() -> None:
    """Planned as if alone: with the context that it would have."""
    settings = Settings(models=(section("tiny*", enabled=False),))
    found = planned([model()], settings, **with_room(0))["tiny-q4_k_m"]
    assert (found.enabled, found.context, found.port) == (False, 16384, 8100)


# --- what a program is told ----------------------------------------------------------------------


def test_a_program_carries_what_its_settings_say() -> None:
    said = section(
        "o/*", alias="My/Alias:1", port=9000, parallel=2, gpu_layers=7, fallback="other",
        sleep_idle_seconds=60, pinned=True, args=("--flash-attn", "on"),
    )  # fmt: skip
    settings = Settings(models=(said, section("*/other*", port=9001, fallback=None)))
    models = [repo("Q4_K_M"), model(name="other", key="other", repo="o/other")]
    (found, *_) = make_plan(models, settings, world()).programs
    assert (found.alias, found.port, found.parallel) == ("My/Alias:1", 9000, 2)
    assert (found.fallback, found.pinned) == ("other", True)
    assert found.arguments[-2:] == ("--flash-attn", "on")
    line = " ".join(found.arguments)
    for words in ("--alias My/Alias:1", "--port 9000", "--parallel 2", "--gpu-layers 7",
                  "--sleep-idle-seconds 60", f"--ctx-size {found.context}"):  # fmt: skip
        assert words in line


def test_a_fallback_that_is_no_model_is_told() -> None:
    settings = Settings(models=(section("a", fallback="b"), section("c", fallback="a")))
    lost, idle = make_plan([model(name="a"), model(name="c")], settings, world()).problems
    assert lost.subject == "a"
    assert "fallback b" in lost.reason
    assert idle.subject == "c"
    assert "fallback a takes no less memory" in idle.reason


def test_a_model_answers_to_its_name_unless_a_section_says_otherwise() -> None:
    found = planned([model()])["tiny-q4_k_m"]
    assert found.alias == found.name
    assert found.url == "http://127.0.0.1:8100"


def test_a_glob_matches_the_name_or_repo_and_file() -> None:
    assert repo_file(model()) == "owner/tiny-q4_k_m/tiny-q4_k_m.gguf"
    assert repo_file(model(repo=None)) == "tiny-q4_k_m.gguf"


def test_an_embedding_model_takes_a_whole_input_at_once_and_memory_is_counted_for_that() -> None:
    made = model(role=Role.EMBEDDING, context_length=2048)
    found = planned([made])[made.name]
    assert {"--embeddings", "--ubatch-size"} <= set(found.arguments)
    assert (
        found.estimate_bytes
        == estimate(made.header, Load(2048, 4, 2048, embeddings=True)).total_bytes
    )


def test_a_projector_is_served_and_counted() -> None:
    made = model(role=Role.VISION, projector="/models/mmproj.gguf", projector_bytes=500 * MIB)
    found = planned([made])[made.name]
    assert found.projector_path == "/models/mmproj.gguf"
    assert found.estimate_bytes == need(made, 16384) + 500 * MIB


# --- ports ---------------------------------------------------------------------------------------


def ports(plan: Plan) -> dict[str, int]:
    return {program.name: program.port for program in plan.programs}


def named(letters: Iterable[str]) -> list[Model]:
    return [model(name=letter) for letter in letters]


def test_ports_are_the_lowest_free_ones_of_the_range() -> None:
    plan = make_plan(named("abc"), ALL, world(port_is_free=lambda port: port != 8101))
    assert ports(plan) == {"a": 8100, "b": 8102, "c": 8103}


def test_a_port_is_kept_when_other_models_come_and_go() -> None:
    first = make_plan(named("bd"), ALL, world())
    more = make_plan(named("abcde"), ALL, again(first))
    assert {name: ports(more)[name] for name in "bd"} == ports(first)
    fewer = make_plan(named("d"), ALL, again(more))
    assert ports(fewer) == {"d": ports(first)["d"]}


def test_a_port_that_someone_else_has_taken_is_given_up() -> None:
    first = make_plan(named("ab"), ALL, world())
    plan = make_plan(named("ab"), ALL, again(first, port_is_free=lambda port: port != 8100))
    assert ports(plan) == {"a": 8102, "b": 8101}


def test_a_port_outside_a_new_range_is_given_up() -> None:
    first = make_plan(named("ab"), ALL, world())
    plan = make_plan(named("ab"), replace(ALL, first_port=8101), again(first))
    assert ports(plan) == {"a": 8102, "b": 8101}


def test_a_model_that_was_away_finds_its_port_free_as_long_as_there_are_others() -> None:
    narrow = replace(ALL, last_port=8102)
    first = make_plan(named("a"), narrow, world())
    away = make_plan(named("bc"), narrow, again(first))
    assert ports(away) == {"b": 8101, "c": 8102}
    crowded = make_plan(
        named("bcd"), narrow, again(away, earlier={**first.choices, **away.choices})
    )
    assert ports(crowded) == {"b": 8101, "c": 8102, "d": 8100}


def test_a_configured_port_is_taken_even_from_one_who_had_it() -> None:
    first = make_plan(named("ab"), ALL, world())
    settings = replace(ALL, models=(section("b", port=8100),))
    plan = make_plan(named("ab"), settings, again(first))
    assert ports(plan) == {"a": 8101, "b": 8100}
    assert not plan.problems


def test_a_port_configured_for_two_is_a_problem_of_the_second_alone() -> None:
    plan = make_plan(named("abc"), replace(ALL, models=(section("[ab]", port=9000),)), world())
    assert ports(plan) == {"a": 9000, "c": 8100}
    (problem,) = plan.problems
    assert problem.subject == "b"
    assert "9000" in problem.reason
    assert problem.remedy


def test_a_narrow_range_costs_those_that_shall_not_run() -> None:
    settings = Settings(first_port=8100, last_port=8101, models=(section("[ab]", enabled=False),))
    plan = make_plan(named("abcd"), settings, world())
    assert ports(plan) == {"c": 8100, "d": 8101}
    assert [problem.subject for problem in plan.problems] == ["a", "b"]
    assert all("port_range" in problem.remedy for problem in plan.problems)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.sets(st.sampled_from("abcdefghij")), min_size=1, max_size=6),
    width=st.integers(1, 12), busy=st.sets(st.integers(8100, 8112)),
    fixed=st.dictionaries(st.sampled_from("abcdefghij"), st.integers(8095, 8115), max_size=3),
)  # fmt: skip
def test_ports_are_unique_free_and_stable_whatever_comes_and_goes(
    runs: list[set[str]], width: int, busy: set[int], fixed: dict[str, int]
) -> None:
    """A model found twice in a row keeps its port, whoever returns; who gets none is named."""
    said = tuple(section(name, port=port) for name, port in fixed.items())
    settings = replace(ALL, last_port=8100 + width - 1, models=said)
    known = Registry()
    before: dict[str, int] = {}
    for names in runs:
        plan = make_plan(
            named(sorted(names)), settings,
            world(earlier=known.choices(), port_is_free=lambda port: port not in busy),
        )  # fmt: skip
        found = ports(plan)
        assert len(set(found.values())) == len(found)
        assert {problem.subject for problem in plan.problems} == names - found.keys()
        for name, port in found.items():
            chosen = fixed.get(name)
            assert port == chosen or (chosen is None and port not in busy)
            if chosen is None:
                assert 8100 <= port < 8100 + width
            if name in before and before[name] not in fixed.values():
                assert port == before[name]
        before = found
        known = _remembered(known, plan)


def _remembered(known: Registry, plan: Plan) -> Registry:
    """What is known after a discovery: those that are away keep their place."""
    entries = {key: replace(entry, present=False) for key, entry in known.entries.items()}
    for program in plan.programs:
        choice = plan.choices[program.key]
        entries[program.key] = Entry(program.name, program.key, choice, (), present=True)
    return Registry(entries)


def test_a_model_that_comes_back_does_not_take_its_port_from_one_that_runs_on_it() -> None:
    narrow = replace(ALL, last_port=8101)
    known = Registry()
    for letters, expected in (
        ("ab", {"a": 8100, "b": 8101}), ("c", {"c": 8100}), ("ac", {"a": 8101, "c": 8100}),
    ):  # fmt: skip
        plan = make_plan(named(letters), narrow, world(earlier=known.choices()))
        assert ports(plan) == expected
        known = _remembered(known, plan)


# --- looking twice changes nothing ---------------------------------------------------------------

HEAVY = {"layers": 32, "heads": (32,), "heads_kv": (8,), "embedding_length": 4096}


@pytest.mark.parametrize(
    "settings",
    [Settings(), ALL, Settings(models=(section("*", enabled=True),))],
    ids=["fit", "all", "by name"],
)
def test_a_context_once_chosen_is_kept_while_others_hold_the_memory(settings: Settings) -> None:
    """Free memory is never the same twice; the model then waits instead of being rendered anew."""
    made = model(**HEAVY)
    first = make_plan([made], settings, world(**with_room(room_for(made, 8192))))
    assert first.programs[0].context == 8192
    for room in (room_for(made, 4096), 0, 60 * GIB):
        later = make_plan([made], settings, again(first, **with_room(room)))
        assert later.programs[0].context == 8192
        assert later.programs[0].enabled
        assert later.programs[0].arguments == first.programs[0].arguments
        first = later


def test_a_model_that_did_not_fit_is_enabled_as_soon_as_there_is_memory() -> None:
    made = model(**HEAVY)
    first = make_plan([made], Settings(), world(**with_room(0)))
    assert not enabled(first)
    later = make_plan([made], Settings(), again(first, **with_room(room_for(made, 4096))))
    assert enabled(later) == [made.name]
    assert later.programs[0].context == 4096


@pytest.mark.parametrize(
    "changes", [{"size_bytes": 101 * MIB}, {"context_length": 4096}], ids=["file", "header"]
)
def test_another_file_under_the_same_key_is_chosen_for_anew(changes: dict[str, Any]) -> None:
    made = model(**HEAVY)
    first = make_plan([made], Settings(), world(**with_room(room_for(made, 2048))))
    later = make_plan([model(**(HEAVY | changes))], Settings(), again(first))
    assert later.programs[0].context > 2048


@pytest.mark.parametrize(
    "said",
    [{"parallel": 2}, {"gpu_layers": 3}, {"context": 300}, {"tier": Tier.POWERFUL}],
    ids=repr,
)
def test_what_the_settings_say_anew_is_chosen_for_anew(said: dict[str, Any]) -> None:
    made = model(**HEAVY)
    first = make_plan([made], Settings(), world(**with_room(room_for(made, 2048))))
    later = make_plan([made], Settings(models=(section("*", **said),)), again(first))
    assert later.programs[0].context == said.get("context", 32768 if "tier" in said else 16384)


def test_a_model_enabled_by_fit_stays_so_when_one_before_it_comes() -> None:
    second = model(name="second", parameters=10**12, context_length=2048)
    room = with_room(room_for(second, 2048))
    first = make_plan([second], Settings(), world(**room))
    later = make_plan([model(name="newcomer"), second], Settings(), again(first, **room))
    assert "second" in enabled(later)


def test_a_quantization_that_comes_later_does_not_take_the_place_of_the_one_that_runs() -> None:
    first = make_plan([repo("Q8_0")], Settings(), world())
    assert enabled(first) == ["m-q8_0"]
    later = make_plan([repo("Q8_0"), repo("Q4_K_M")], Settings(), again(first))
    assert enabled(later) == ["m-q8_0"]
    assert enabled(make_plan([repo("Q4_K_M")], Settings(), again(later))) == ["m-q4_k_m"]


def test_what_ran_because_all_were_enabled_must_fit_when_that_is_over() -> None:
    huge, small = model(name="huge", size_bytes=2**40), model(name="small")
    first = make_plan([huge, small], ALL, world())
    assert set(enabled(first)) == {"huge", "small"}
    assert enabled(make_plan([huge, small], Settings(), again(first))) == ["small"]


def test_a_machine_with_less_memory_than_before_gets_a_smaller_context() -> None:
    made = model(**HEAVY)
    first = make_plan([made], ALL, world(devices=(host(64 * GIB),)))
    smaller = host(room_for(made, 4096) + 512 * MIB)
    later = make_plan([made], ALL, again(first, devices=(smaller,)))
    assert later.programs[0].context == 4096


_FLEET = st.lists(
    st.builds(
        lambda n, size, billions, quantization, layers: model(
            name=f"m{n}", key=f"m{n}", repo=f"o/{n % 5}", size_bytes=size * MIB,
            parameters=billions * 10**9, quantization=quantization, layers=layers,
            heads=(32,), heads_kv=(8,), embedding_length=4096,
        ),
        st.integers(0, 30), st.integers(1, 4000), st.sampled_from([1, 14, 70]),
        st.sampled_from(["Q4_K_M", "Q8_0", "F16", "odd"]), st.integers(1, 40),
    ),
    max_size=10, unique_by=lambda made: made.name,
)  # fmt: skip
_SAID = st.lists(
    st.builds(
        lambda glob, enabled: section(glob, enabled=enabled),
        st.sampled_from(["m1*", "*2", "o/3/*"]), st.sampled_from([True, False, None]),
    ),
    max_size=2,
)  # fmt: skip


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    fleet=_FLEET,
    said=_SAID,
    enable=st.sampled_from(Enable),
    frees=st.tuples(*[st.integers(0, 64)] * 3),
)
def test_looking_again_changes_nothing_while_there_is_not_less_memory(
    fleet: list[Model], said: list[Any], enable: Enable, frees: tuple[int, int, int]
) -> None:
    """The same models, settings and memory: the same programs, to the letter but for the reason.

    And with whatever memory is free: nothing that had its place is told anything else.
    """
    settings = Settings(enable=enable, models=tuple(said))

    def free(gib: int) -> dict[str, Any]:
        return {"devices": (host(64 * GIB, gib * GIB), gpu("CUDA0", 24 * GIB, min(gib, 24) * GIB))}

    first = make_plan(fleet, settings, world(**free(frees[0])))
    second = make_plan(fleet, settings, again(first, **free(frees[0])))
    assert [replace(p, reason="") for p in second.programs] == [
        replace(p, reason="") for p in first.programs
    ]
    assert second.choices == first.choices
    plan = second
    for gib in frees[1:]:
        later = make_plan(fleet, settings, again(plan, **free(gib)))
        placed = {key for key, choice in plan.choices.items() if choice.placed}
        before = {p.key: replace(p, reason="") for p in plan.programs if p.key in placed}
        after = {p.key: replace(p, reason="") for p in later.programs if p.key in placed}
        assert after == before
        plan = later


# --- blocks meant × blocks on disk ---------------------------------------------------------------


def on_disk(digest: str, *written: str) -> Deployed:
    return Deployed(digest, written)


@pytest.mark.parametrize(
    ("desired", "block", "outcome"),
    [
        ("new", None, "added"),
        ("same", on_disk("same", "same"), "unchanged"),
        ("same", on_disk("same"), "unchanged"),
        ("new", on_disk("old", "old"), "changed"),
        ("new", on_disk("older", "old", "older"), "changed"),
        ("new", on_disk("edited", "old"), "kept"),
        ("new", on_disk("edited", "new", "old"), "kept"),
        ("new", on_disk("foreign"), "kept"),
        (None, on_disk("old", "old"), "removed"),
        (None, on_disk("edited", "old"), "kept"),
        (None, on_disk("foreign"), None),
    ],
)  # fmt: skip
def test_a_block_is_ours_to_change_as_long_as_nobody_has_edited_it(
    desired: str | None, block: Deployed | None, outcome: str | None
) -> None:
    """What discovery never wrote, under a name that no model has, is not looked at."""
    found = compare({"a": desired} if desired else {}, {"a": block} if block else {})
    assert found == Changes(**({outcome: ("a",)} if outcome else {}))
    assert bool(found) is (outcome in ("added", "changed", "removed"))


@pytest.mark.parametrize("written", [("old",), ()], ids=["edited", "foreign"])
def test_force_overwrites_a_hand_edit_of_that_model_alone(written: tuple[str, ...]) -> None:
    desired = {"a": "new", "b": "new"}
    deployed = {name: Deployed("edited", written) for name in desired}
    found = compare(desired, deployed, forced=["a", "unknown"])
    assert found == Changes(changed=("a",), kept=("b",))


def test_force_changes_nothing_that_is_as_it_should_be_and_removes_no_edit() -> None:
    found = compare({"a": "x"}, {"a": on_disk("x", "x"), "b": on_disk("e", "o")}, ["a", "b"])
    assert found == Changes(unchanged=("a",), kept=("b",))


_DIGESTS = st.sampled_from(["d1", "d2", "d3"])
_NAMES = st.sampled_from("abcdef")


@given(
    desired=st.dictionaries(_NAMES, _DIGESTS),
    deployed=st.dictionaries(
        _NAMES, st.builds(Deployed, _DIGESTS, st.lists(_DIGESTS, max_size=2).map(tuple))
    ),
    forced=st.sets(_NAMES),
)
def test_applying_the_changes_leads_to_what_was_meant_and_keeps_every_edit(
    desired: dict[str, str], deployed: dict[str, Deployed], forced: set[str]
) -> None:
    found = compare(desired, deployed, forced)
    outcomes = [name for kind in Changes.__dataclass_fields__ for name in getattr(found, kind)]
    assert len(set(outcomes)) == len(outcomes)
    after = {name: block.digest for name, block in deployed.items() if name not in found.removed}
    after |= {name: desired[name] for name in (*found.added, *found.changed)}
    for name, block in deployed.items():
        if block.digest not in block.written and name not in forced:
            assert after[name] == block.digest
    for name in desired.keys() - set(found.kept):
        assert after[name] == desired[name]
    written = {
        name: Deployed(digest, (desired.get(name, ""), *deployed[name].written))
        if name in deployed
        else Deployed(digest, (digest,))
        for name, digest in after.items()
    }
    assert not compare(desired, written, ())


# --- on disk -------------------------------------------------------------------------------------


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    """Laid down, with an engine that only tells what it is, and a cache elsewhere."""
    return laid_down(tmp_path)


def laid_down(folder: Path) -> Deployment:
    script = folder / "llama-server"
    script.write_text(f"#!/bin/sh\necho 'version: 1'\necho '{' '.join(sorted(FLAGS))}'\n")
    script.chmod(0o700)
    made = Deployment(folder / "prefix")
    deploy.initialize(made)
    return made


def settings_of(deployment: Deployment, **changes: Any) -> Settings:
    here = deployment.prefix.parent
    values: dict[str, Any] = {
        "cache_dirs": (str(here / "hub"),), "model_dirs": (str(here / "models"),),
        "engine": str(here / "llama-server"), "enable": Enable.ALL, "memory_reserve": Reserve(0),
    }  # fmt: skip
    return Settings(**(values | changes))


def put(deployment: Deployment, *names: str, seed: int = 0) -> None:
    for name in names:
        write_model(deployment.prefix.parent / "models" / f"{name}.gguf", seed=seed)


def look_and_apply(
    deployment: Deployment, settings: Settings | None = None, forced: Iterable[str] = ()
) -> tuple[discovery.Discovery, list[str]]:
    """One discovery, carried out without a supervisord; and what it said."""
    said: list[str] = []
    found = discovery.discover(deployment, settings or settings_of(deployment), None, forced)
    deploy.apply(deployment, found, None, said.append)
    return found, said


def conf_d(deployment: Deployment) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(deployment.blocks.iterdir())}


def test_discovering_twice_changes_nothing(deployment: Deployment) -> None:
    """Not even when a file was written."""

    def files() -> dict[Path, int]:
        found = (path for path in deployment.prefix.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in found}

    put(deployment, "a", "b")
    first, _ = look_and_apply(deployment)
    assert first.changes == Changes(added=("a", "b"))
    before = files()
    second, said = look_and_apply(deployment)
    assert second.changes == Changes(unchanged=("a", "b"))
    assert said == []
    assert files() == before
    assert _without_reasons(second.registry) == _without_reasons(first.registry)


def _without_reasons(value: Registry) -> Registry:
    return replace(value, programs=tuple(replace(p, reason="") for p in value.programs))


def test_models_are_added_changed_and_removed_each_for_itself(deployment: Deployment) -> None:
    put(deployment, "a", "b")
    look_and_apply(deployment)
    before = conf_d(deployment)
    put(deployment, "c")
    (deployment.prefix.parent / "models" / "a.gguf").unlink()
    said = section("b", parallel=2)
    found, _ = look_and_apply(deployment, settings_of(deployment, models=(said,)))
    assert found.changes == Changes(added=("c",), changed=("b",), removed=("a",))
    after = conf_d(deployment)
    assert after.keys() == {"b.conf", "c.conf"}
    assert "--parallel 2" in after["b.conf"]
    assert after["b.conf"] != before["b.conf"]


def edit(deployment: Deployment, name: str) -> str:
    path = deployment.block(name)
    path.write_text(path.read_text().replace("priority=", "umask=022\npriority="))
    return path.read_text()


def test_a_hand_edit_is_kept_and_ours_goes_beside_it_only_when_it_changed(
    deployment: Deployment,
) -> None:
    put(deployment, "a", "b")
    look_and_apply(deployment)
    edited = edit(deployment, "a")
    found, said = look_and_apply(deployment)
    assert found.changes == Changes(unchanged=("b",), kept=("a",))
    assert conf_d(deployment).keys() == {"a.conf", "b.conf"}
    assert said == []
    changed = settings_of(deployment, models=(section("a", parallel=2),))
    _, said = look_and_apply(deployment, changed)
    files = conf_d(deployment)
    assert files["a.conf"] == edited
    assert "--parallel 2" in files["a.conf.new"]
    assert [line.partition(":")[0] for line in said] == ["a"]
    assert "a.conf.new" in said[0]
    beside = (deployment.blocks / "a.conf.new").stat()
    found, said = look_and_apply(deployment, changed)
    assert len(said) == 1  # it waits
    assert "--force a" in said[0]
    assert (deployment.blocks / "a.conf.new").stat() == beside
    (program,) = (one for one in found.plan.programs if one.name == "a")
    assert program.reason.startswith("edited by hand")
    look_and_apply(deployment, changed, forced=["a"])
    assert conf_d(deployment).keys() == {"a.conf", "a.conf.old", "b.conf"}
    assert "--parallel 2" in conf_d(deployment)["a.conf"]


def test_a_hand_edit_back_to_an_older_text_is_an_edit_too(deployment: Deployment) -> None:
    put(deployment, "a")
    look_and_apply(deployment)
    older = conf_d(deployment)["a.conf"]
    changed = settings_of(deployment, models=(section("a", parallel=2),))
    look_and_apply(deployment, changed)
    deployment.block("a").write_text(older)
    found, _ = look_and_apply(deployment, changed)
    assert found.changes == Changes(kept=("a",))
    assert conf_d(deployment)["a.conf"] == older


def test_a_served_model_whose_file_is_damaged_is_left_alone(deployment: Deployment) -> None:
    """What serves it has it in memory; that it could not be started again is said."""
    put(deployment, "a", "b")
    look_and_apply(deployment)
    before = conf_d(deployment)
    file = deployment.prefix.parent / "models" / "a.gguf"
    file.write_bytes(file.read_bytes()[:200])
    found, _ = look_and_apply(deployment)
    assert found.changes == Changes(unchanged=("b",), kept=("a",))
    assert sum("a.gguf" in problem.subject for problem in found.problems) == 1
    assert any(problem.subject == "a" for problem in found.problems)
    assert conf_d(deployment) == before


def test_force_takes_a_hand_edit_back(deployment: Deployment) -> None:
    put(deployment, "a")
    look_and_apply(deployment)
    ours = conf_d(deployment)["a.conf"]
    theirs = edit(deployment, "a")
    found, _ = look_and_apply(deployment, forced=["a"])
    assert found.changes == Changes(changed=("a",))
    assert conf_d(deployment) == {"a.conf": ours, "a.conf.old": theirs}


def test_an_edited_block_stays_when_its_model_is_gone_and_that_is_said(
    deployment: Deployment,
) -> None:
    put(deployment, "a", "b")
    look_and_apply(deployment)
    edited = edit(deployment, "a")
    (deployment.prefix.parent / "models" / "a.gguf").unlink()
    found, said = look_and_apply(deployment)
    assert found.changes == Changes(unchanged=("b",), kept=("a",))
    assert conf_d(deployment)["a.conf"] == edited
    assert any(line.startswith("a: ") for line in said)


def test_a_program_of_the_users_own_is_not_touched(deployment: Deployment) -> None:
    put(deployment, "a")
    own = "[program:mine]\ncommand=/bin/true\n"
    (deployment.blocks / "mine.conf").write_text(own)
    (deployment.blocks / "mine.conf").chmod(0o600)
    found, _ = look_and_apply(deployment)
    assert found.changes == Changes(added=("a",))
    assert conf_d(deployment)["mine.conf"] == own


def test_a_cache_that_is_suddenly_empty_removes_nothing_and_says_so(
    deployment: Deployment,
) -> None:
    """It may not be mounted."""
    put(deployment, "a", "b")
    look_and_apply(deployment)
    before = conf_d(deployment)
    models = deployment.prefix.parent / "models"
    models.rename(models.with_name("unmounted"))
    for _ in range(2):
        found, _ = look_and_apply(deployment)
        assert not found.changes
        assert set(found.changes.kept) == {"a", "b"}
        assert any("mounted" in problem.remedy for problem in found.problems)
        assert conf_d(deployment) == before
    models.with_name("unmounted").rename(models)
    found, _ = look_and_apply(deployment)
    assert found.changes == Changes(unchanged=("a", "b"))


def test_a_folder_that_cannot_be_seen_costs_its_models_nothing_while_others_are_found(
    deployment: Deployment,
) -> None:
    """A disk that is not mounted: what lies on it goes on as it was, and that is said."""
    put(deployment, "a", "b")
    disk = deployment.prefix.parent / "disk"
    write_model(disk / "c.gguf")
    both = settings_of(deployment, model_dirs=(str(deployment.prefix.parent / "models"), str(disk)))
    look_and_apply(deployment, both)
    before = conf_d(deployment)
    disk.rename(disk.with_name("unmounted"))
    (deployment.prefix.parent / "models" / "b.gguf").unlink()
    found, _ = look_and_apply(deployment, both)
    assert found.changes.removed == ("b",)
    assert found.changes.kept == ("c",)
    assert any(p.subject == "c" and "mounted" in p.remedy for p in found.problems)
    assert conf_d(deployment) == {name: text for name, text in before.items() if name != "b.conf"}
    assert [program.name for program in found.registry.programs] == ["a", "c"]
    disk.with_name("unmounted").rename(disk)
    found, _ = look_and_apply(deployment, both)
    assert not found.changes


def test_a_command_wins_over_what_discovery_would_choose(deployment: Deployment) -> None:
    put(deployment, "a", "b")
    look_and_apply(deployment)
    deployment.intent.write_text('{"a": false}')
    found, _ = look_and_apply(deployment)
    programs = {program.name: program for program in found.plan.programs}
    assert not programs["a"].enabled
    assert programs["a"].reason == "disabled by command"
    assert programs["b"].enabled
    assert not found.changes
    assert found.switched_off == ("a",)


def test_another_port_is_given_and_nothing_else_is_touched(deployment: Deployment) -> None:
    put(deployment, "a", "b")
    found, _ = look_and_apply(deployment)
    ports = {program.name: program.port for program in found.plan.programs}
    before = conf_d(deployment)
    with pytest.raises(TransientError, match="cannot reach supervisord"):
        revise.move_port(deployment, "a")  # the files are in place; none is there to be told
    after, _ = look_and_apply(deployment)
    moved = {program.name: program.port for program in after.plan.programs}
    assert moved["b"] == ports["b"]
    assert moved["a"] not in ports.values()
    assert not after.changes
    assert conf_d(deployment)["b.conf"] == before["b.conf"]
    assert f"--port {moved['a']} " in conf_d(deployment)["a.conf"]


@pytest.mark.parametrize("whose", ["settings", "a hand edit"])
def test_a_port_that_the_user_chose_is_not_moved(deployment: Deployment, whose: str) -> None:
    put(deployment, "a")
    settings = settings_of(deployment)
    if whose == "settings":
        rule = ModelRule("a", ModelSettings(port=18321), frozenset({"port"}))
        settings = replace(settings, models=(rule,))
    look_and_apply(deployment, settings)
    if whose == "a hand edit":
        edit(deployment, "a")
    before = conf_d(deployment)
    with pytest.raises(ConfigError, match="port"):
        revise.move_port(deployment, "a")
    assert conf_d(deployment) == before


def put_large(deployment: Deployment, *names: str) -> None:
    """Models with a context that can be cut."""
    for seed, name in enumerate(names):
        path = deployment.prefix.parent / "models" / f"{name}.gguf"
        write_model(path, context=16384, seed=seed)


def set_rung(deployment: Deployment, name: str, rung: int) -> None:
    """The files are in place then; no supervisord is there to be told."""
    with pytest.raises(TransientError, match="cannot reach supervisord"):
        revise.set_rung(deployment, name, rung)


def test_another_rung_is_deployed_and_kept_and_nothing_else_is_touched(
    deployment: Deployment,
) -> None:
    put_large(deployment, "a", "b")
    look_and_apply(deployment)
    before = conf_d(deployment)
    assert "--ctx-size 16384 " in before["a.conf"]
    set_rung(deployment, "a", 2)
    stepped = conf_d(deployment)
    assert stepped["a.conf"] == before["a.conf"].replace("--ctx-size 16384 ", "--ctx-size 4096 ")
    assert stepped["b.conf"] == before["b.conf"]
    deployed = registry.load(deployment.registry)
    found, said = look_and_apply(deployment)
    assert not found.changes
    assert said == []
    (program,) = (program for program in found.plan.programs if program.name == "a")
    assert (program.rung, program.context) == (2, 4096)
    assert program.reason.startswith("stepped down to context 4096; ")
    told = replace(deployed, untold={})  # there is no supervisord: it will read the files
    assert _without_reasons(registry.load(deployment.registry)) == _without_reasons(told)
    set_rung(deployment, "a", 0)
    assert conf_d(deployment) == before


def test_a_port_is_moved_on_every_rung(deployment: Deployment) -> None:
    put_large(deployment, "a")
    look_and_apply(deployment)
    set_rung(deployment, "a", 1)
    with pytest.raises(TransientError):
        revise.move_port(deployment, "a")
    assert "--ctx-size 8192 " in conf_d(deployment)["a.conf"]
    assert "--port 8101 " in conf_d(deployment)["a.conf"]
    assert not look_and_apply(deployment)[0].changes


@pytest.mark.parametrize(
    ("name", "rung", "why"),
    [("a", 4, "4 rungs"), ("a", -1, "no -1"), ("none-such", 0, "no such model")],
)
def test_a_rung_that_there_is_not_is_refused(
    deployment: Deployment, name: str, rung: int, why: str
) -> None:
    put_large(deployment, "a")
    look_and_apply(deployment)
    before = conf_d(deployment)
    with pytest.raises(ConfigError, match=why):
        revise.set_rung(deployment, name, rung)
    assert conf_d(deployment) == before


def test_a_block_edited_by_hand_stays_on_its_rung(deployment: Deployment) -> None:
    put_large(deployment, "a")
    look_and_apply(deployment)
    edited = edit(deployment, "a")
    with pytest.raises(ConfigError, match="edited by hand"):
        revise.set_rung(deployment, "a", 1)
    assert conf_d(deployment)["a.conf"] == edited


def test_a_model_that_stepped_down_to_its_fallback_finds_its_own_file_again(
    deployment: Deployment,
) -> None:
    """Though it is served through a link that no block names meanwhile."""
    put(deployment, "small")
    put_large(deployment, "a %(b)s")
    named = look_and_apply(deployment)[0].changes.added
    (name,) = {*named} - {"small"}
    settings = settings_of(deployment, models=(section(name, fallback="small"),))
    look_and_apply(deployment, settings)
    before = conf_d(deployment)
    link = deployment.links / f"{name}.gguf"
    assert str(link) in before[f"{name}.conf"]
    program = next(p for p in registry.load(deployment.registry).programs if p.name == name)
    assert program.ladder[-1].label == "fallback small"
    set_rung(deployment, name, len(program.ladder) - 1)
    assert "/small.gguf" in conf_d(deployment)[f"{name}.conf"]
    assert link.is_symlink()
    with pytest.raises(TransientError):
        revise.move_port(deployment, "small")
    assert not look_and_apply(deployment, settings)[0].changes
    assert link.is_symlink()
    set_rung(deployment, name, 0)
    assert conf_d(deployment)[f"{name}.conf"] == before[f"{name}.conf"]


def test_a_block_edited_by_hand_is_planned_for_as_it_runs(deployment: Deployment) -> None:
    put_large(deployment, "a")
    look_and_apply(deployment)
    block = deployment.block("a")
    text = block.read_text()
    block.write_text(text.replace("--ctx-size 16384", "-c 300").replace("--parallel 4", "-np 2"))
    for _ in range(2):
        (program,) = look_and_apply(deployment)[0].plan.programs
        assert (program.context, program.parallel, program.ladder) == (300, 2, ())
        assert program.reason.startswith("edited by hand")
        assert "; context 300 of 16384" in program.reason
    (program,) = look_and_apply(deployment, forced=["a"])[0].plan.programs
    assert (program.context, program.parallel, len(program.ladder)) == (16384, 4, 4)


@pytest.mark.parametrize(
    "line", ["command=/bin/true", "command=/bin/sh -c 'x", "command =", "; no command"]
)
def test_an_edited_block_that_runs_something_else_is_planned_as_ours(
    deployment: Deployment, line: str
) -> None:
    put_large(deployment, "a")
    look_and_apply(deployment)
    block = deployment.block("a")
    block.write_text(re.sub("^command=.*$", line, block.read_text(), flags=re.MULTILINE))
    (program,) = look_and_apply(deployment)[0].plan.programs
    assert program.context == 16384


@dataclass(frozen=True)
class Running:
    """A supervisord in which these programs run."""

    names: tuple[str, ...]

    def processes(self) -> list[Process]:
        return [
            Process(name, name, ProcessState.RUNNING, 4711, 1, 0, 2, 0, "", "")
            for name in self.names
        ]


def test_what_our_own_models_hold_is_theirs_to_keep(deployment: Deployment) -> None:
    """Of the host all but their weights, which are pages of files and counted as free anyhow."""
    put_large(deployment, "a", "b")
    look_and_apply(deployment)
    running = cast(Supervisord, Running(("a",)))
    before = psutil.virtual_memory()
    found = discovery.discover(deployment, settings_of(deployment), running)
    (program,) = (one for one in found.plan.programs if one.name == "a")
    (part,) = program.estimate.parts
    held = part.total_bytes - part.weights_bytes
    (device,) = found.devices
    assert held > 60 * MIB
    assert abs(device.free_bytes - min(before.available + held, before.total)) < 40 * MIB


def test_a_plan_tells_in_json_what_each_model_takes_where(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = laid_down(tmp_path_factory.mktemp("p"))
    put_large(deployment, "a")
    here = deployment.prefix.parent
    deployment.settings.write_text(
        f"[synapse]\ncache_dirs = {here}/hub\nmodel_dirs = {here}/models\n"
        f"engine = {here}/llama-server\n"
    )
    assert cli.main(["--prefix", str(deployment.prefix), "plan", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["models"]
    total = told["memory"]["estimated"]
    assert told["memory"] == {"estimated": total, "source": "header", "devices": {"CPU": total}}
    assert (told["rung"], told["ladder"][:2]) == (0, ["as configured", "context 8192"])


def test_what_is_known_of_a_model_reaches_the_plan(deployment: Deployment) -> None:
    put(deployment, "a")
    learned = taking(7 * MIB, source=Source.LEARNED)
    found = discovery.discover(deployment, settings_of(deployment))
    (program,) = found.plan.programs
    key = footprints.footprint_key(
        footprints.identities([program.model_path]), program.arguments, found.engine.version,
        found.devices,
    )  # fmt: skip
    loaded = Loaded(learned.parts, None, None)
    footprints.update(
        deployment.footprints,
        lambda before: footprints.learn(before, key, loaded, {"CPU": 9 * MIB}, at=1.0),
    )
    (program,) = discovery.discover(deployment, settings_of(deployment)).plan.programs
    assert program.estimate.source is Source.LEARNED
    (part,) = program.estimate.parts
    assert part.weights_bytes == 7 * MIB


def test_switching_a_model_on_and_off_leaves_its_block_as_it_is(deployment: Deployment) -> None:
    put(deployment, "a", "b")
    look_and_apply(deployment)
    before = conf_d(deployment)
    off = settings_of(deployment, models=(section("a", enabled=False),))
    found, _ = look_and_apply(deployment, off)
    assert (found.switched_on, found.switched_off) == ((), ("a",))
    assert found.changes == Changes(unchanged=("a", "b"))
    assert look_and_apply(deployment, off)[0].switched_off == ()
    found, _ = look_and_apply(deployment)
    assert (found.switched_on, found.switched_off) == (("a",), ())
    assert conf_d(deployment) == before


def test_a_model_that_was_not_deployed_before_is_not_switched(deployment: Deployment) -> None:
    put(deployment, "a")
    off = settings_of(deployment, models=(section("a", enabled=False),))
    found, _ = look_and_apply(deployment, off)
    assert (found.switched_on, found.switched_off) == ((), ())


def test_a_lost_registry_overwrites_no_block(deployment: Deployment) -> None:
    """Nobody can tell any more which of them were edited."""
    put(deployment, "a", "b")
    look_and_apply(deployment)
    edited = edit(deployment, "a")
    deployment.registry.write_bytes(b"{torn")
    found, _ = look_and_apply(deployment)
    assert found.changes == Changes(unchanged=("b",), kept=("a",))
    assert conf_d(deployment)["a.conf"] == edited


def test_a_hostile_file_name_is_served_through_a_link_with_a_plain_name(
    deployment: Deployment,
) -> None:
    put(deployment, "plain", "x\n[program:evil]\ncommand=sh", "y %(here)s ;]", "z\udcff")
    found, _ = look_and_apply(deployment)
    assert len(found.changes.added) == 4
    text = "".join(conf_d(deployment).values())
    assert re.findall(r"^\[.*", text, re.MULTILINE) == [
        f"[program:{name}]" for name in sorted(found.changes.added)
    ]
    assert "%(" not in text
    assert text.isascii()
    links = [path for path in deployment.links.iterdir() if path.is_symlink()]
    assert len(links) == 3
    for link in links:
        assert link.name.isascii()
        assert str(link) in text
        assert link.resolve(strict=True).read_bytes()[:4] == b"GGUF"
    assert not look_and_apply(deployment)[0].changes


def test_a_broken_template_leaves_everything_as_it_was(deployment: Deployment) -> None:
    put(deployment, "a")
    look_and_apply(deployment)
    before = conf_d(deployment)
    template = deployment.templates / "program.conf.j2"
    template.write_text("{{ nothing }}")
    template.chmod(0o600)
    with pytest.raises(ConfigError, match=r"program\.conf\.j2"):
        look_and_apply(deployment)
    assert conf_d(deployment) == before
