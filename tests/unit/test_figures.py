"""What is known of the memory that models take, and of which the engine is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from supervisor_synapse import figures
from supervisor_synapse.adapters import dry_run, footprints
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.estimate import Load, estimate
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import Part, Program, Source
from supervisor_synapse.core.settings import Reserve
from tests.unit.builders import GIB, MIB, engine, gpu, host, model, program, taking

NO_RESERVE = Reserve(bytes=0)
DEVICES = (gpu("CUDA0", GIB), host())
ON_GPU = (
    "--ctx-size", "4096", "--parallel", "1", "--gpu-layers", "99", "--device", "CUDA0",
)  # fmt: skip
TOLD = Loaded(
    (
        Part("CUDA0", weights_bytes=90 * MIB, kv_bytes=4 * MIB, compute_bytes=40 * MIB),
        Part("CPU", weights_bytes=10 * MIB),
    ),
    3,
    3,
)


def asking(name: str, size_bytes: int, **changes: object) -> Program:
    return program(name=name, key=name, estimate=taking(size_bytes, "CUDA0"), **changes)


def doubtful(*programs: Program, reserve: Reserve = NO_RESERVE) -> list[str]:
    return [one.name for one in figures.in_doubt(programs, DEVICES, reserve)]


def test_where_there_is_room_nobody_is_asked() -> None:
    assert doubtful(asking("a", 300 * MIB), asking("b", 400 * MIB)) == []


def test_where_a_device_is_full_all_on_it_are_asked_the_largest_first() -> None:
    elsewhere = program(name="c", estimate=taking(300 * MIB, "CPU"))
    assert doubtful(asking("a", 300 * MIB), asking("b", 650 * MIB), elsewhere) == ["b", "a"]


def test_the_reserve_is_nothing_that_may_be_taken() -> None:
    assert doubtful(asking("a", 300 * MIB), reserve=Reserve(bytes=GIB - 320 * MIB)) == ["a"]


@pytest.mark.parametrize("source", [Source.LEARNED, Source.DRY_RUN, Source.CALIBRATED])
def test_what_is_known_better_than_by_the_formula_is_not_asked_again(source: Source) -> None:
    known = replace(asking("a", 0), estimate=taking(990 * MIB, "CUDA0", source))
    assert doubtful(known) == []


def test_what_shall_not_run_takes_nothing_and_is_not_asked() -> None:
    assert doubtful(asking("a", 990 * MIB, enabled=False), asking("b", 300 * MIB)) == []


# --- the engine's word --------------------------------------------------------------------------


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    found = Deployment(tmp_path / "p")
    for folder in found.folders():
        folder.mkdir(exist_ok=True)
    return found


@pytest.fixture
def served(tmp_path: Path) -> Model:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    return model(path=str(path), key="m")


class Engine:
    """Tells the same of each model, and keeps what it was asked."""

    def __init__(self, told: Loaded | None = TOLD, takes_seconds: float = 0.0) -> None:
        self.told, self.takes_seconds, self.now = told, takes_seconds, 0.0
        self.asked: list[str] = []

    def ask(self, _engine: object, path: str, *_: object, **__: object) -> Loaded | None:
        self.asked.append(path)
        self.now += self.takes_seconds
        return self.told

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], Engine]:
    def put(told: Engine) -> Engine:
        monkeypatch.setattr(dry_run, "ask", told.ask)
        monkeypatch.setattr(figures.time, "monotonic", told.monotonic)
        return told

    return put


def asked(deployment: Deployment, *models: Model, is_serving: bool = False) -> figures.Figures:
    known = figures.read(deployment, engine(), DEVICES, models, [])
    programs = [
        program(name=one.key, key=one.key, arguments=ON_GPU, device="CUDA0") for one in models
    ]
    return figures.ask(
        known, programs, {one.key: one for one in models}, deployment,
        free_bytes=GIB, is_serving=is_serving,
    )  # fmt: skip


def test_its_word_beats_the_formula_and_is_kept(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    answering(Engine())
    formula = taking(50 * MIB, "CUDA0")
    known = asked(deployment, served).known(served, ON_GPU, formula)
    assert known is not None
    assert known.source is Source.DRY_RUN
    assert known.on("CUDA0") == 134 * MIB
    again = figures.read(deployment, engine(), DEVICES, [served], [])
    assert again.known(served, ON_GPU, formula) == known


def test_another_context_is_reckoned_with_the_scratch_that_it_told(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    answering(Engine())
    found = asked(deployment, served)
    load = Load(2048, 1, devices=("CUDA0",), gpu_layers=99)
    made = estimate(served.header, load, scratch_elements=found.scratch(served, load))
    assert made.source is Source.CALIBRATED
    compute = made.parts[0].compute_bytes
    assert compute == pytest.approx(40 * MIB, rel=0.1)


@pytest.mark.parametrize(
    "load",
    [
        Load(2048, 1),
        Load(2048, 1, devices=("Vulkan0",)),
        Load(2048, 1, devices=("CUDA0",), gpu_layers=1),
        Load(2048, 1, devices=("CUDA0",), flash_attention=False),
        Load(2048, 1, devices=("CUDA0",), cache_type_k="q8_0"),
        Load(2048, 1, devices=("CUDA0",), expert_layers_on_host=1),
    ],
    ids=["host", "other backend", "in part", "no flash attention", "other cache", "experts"],
)
def test_what_computes_otherwise_has_another_scratch(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine], load: Load
) -> None:
    answering(Engine())
    assert asked(deployment, served).scratch(served, load) is None


def test_a_load_calibrates_as_well(deployment: Deployment, served: Model) -> None:
    """One that was learned by the listener, of what is deployed."""
    key = footprints.footprint_key(
        footprints.identities([served.path]), ON_GPU, engine().version, DEVICES
    )
    learned = footprints.learn(footprints.Footprints(), key, TOLD, {}, at=1.0)
    footprints.update(deployment.footprints, lambda _: learned)
    deployed = program(key=served.key, arguments=ON_GPU)
    found = figures.read(deployment, engine(), DEVICES, [served], [deployed])
    assert found.scratch(served, Load(2048, 1, devices=("CUDA0",))) is not None


def test_all_are_asked_within_a_bounded_time(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    slow = answering(Engine(told=None, takes_seconds=20.0))
    models = [replace(served, key=str(number)) for number in range(5)]
    assert asked(deployment, *models).learned == footprints.Footprints()
    assert len(slow.asked) == 2


def test_what_cannot_be_written_down_still_counts_now(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    answering(Engine())
    shutil.rmtree(deployment.lib)
    assert asked(deployment, served).known(served, ON_GPU, taking(MIB, "CUDA0")) is not None


def test_a_file_that_is_gone_tells_nothing(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    answering(Engine())
    gone = replace(served, path=served.path + ".gone")
    assert asked(deployment, gone).known(gone, ON_GPU, taking(MIB, "CUDA0")) is None


def test_remote_devices_that_may_be_taken_are_left_alone(
    deployment: Deployment, served: Model, answering: Callable[[Engine], Engine]
) -> None:
    """Such a server answers one engine at a time: the question would wait for a model to end."""
    remote = program(key=served.key, arguments=ON_GPU, device="RPC0")
    known = figures.read(deployment, engine(), DEVICES, [served], [])
    for is_serving, times in ((True, 0), (False, 1)):
        put = answering(Engine())
        figures.ask(
            known, [remote], {served.key: served}, deployment,
            free_bytes=GIB, is_serving=is_serving,
        )  # fmt: skip
        assert len(put.asked) == times


def test_merging_keeps_what_a_load_taught() -> None:
    loaded = footprints.learn(footprints.Footprints(), "k", TOLD, {}, at=1.0)
    told = footprints.learn_dry_run(footprints.Footprints(), "k", TOLD, at=2.0)
    told = footprints.learn_scratch(told, "s", 700, at=2.0)
    merged = footprints.merged(loaded, told)
    assert merged.by_key["k"].source is Source.LEARNED
    assert footprints.scratch_elements(merged, "s") == 700
    assert footprints.merged(merged, told) == merged
