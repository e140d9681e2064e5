"""Estimates from the header alone, held against what the real engine says that it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.estimate import (
    HOST,
    Load,
    calibrate,
    estimate,
    margin_bytes,
    projector_bytes,
)
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import Estimate, Part, Source
from tests import gguf_factory, loads
from tests.conftest import Engine
from tests.loads import SHAPES, Shape
from tests.unit.builders import MIB

_ROUNDING_BYTES = 0.03 * MIB  # each line of the log is rounded to 0.01 MiB
_ONE = ("RPC0",)
_TWO = ("RPC0", "RPC1")

_WHOLE = (Load(4096, 4), Load(8192, 2, devices=_ONE), Load(4096, 2, devices=_ONE, gpu_layers=5))
_EMBEDDING = (Load(2048, 4, 2048), Load(512, 2, devices=_ONE))
_TWO_DEVICES = (
    Load(8192, 4, devices=_TWO, split=(2, 1)),
    Load(4096, 4, devices=_TWO, split=(1, 2), gpu_layers=6),
)
# What else changes memory, on one shape for which it matters.
_VARIED = (
    ("llama", Load(16384, 4, devices=_ONE, unified=False)),
    ("llama", Load(4096, 2, devices=_ONE, flash_attention=False)),
    ("llama", Load(4096, 1, devices=_ONE, gpu_layers=0)),
    ("llama", Load(300, 1)),
    ("qwen3", Load(8192, 2, devices=_ONE, ubatch=1024)),
    ("qwen3", Load(16384, 1, devices=_ONE, cache_type_k="q8_0", cache_type_v="q8_0")),
    ("qwen3", Load(16384, 1, devices=_ONE, cache_type_k="q4_0", cache_type_v="q5_1")),
    ("qwen2", Load(8192, 1, cache_type_k="f32", cache_type_v="bf16")),
    ("gemma3", Load(16384, 2, devices=_ONE, swa_full=True)),
    ("gemma3", Load(16384, 4, devices=_ONE, unified=False)),
    ("gpt-oss", Load(32768, 1, devices=_ONE)),
    ("qwen3moe", Load(4096, 4, devices=_ONE, expert_layers_on_host=3)),
    ("deepseek2", Load(32768, 4, devices=_ONE)),
    ("qwen3next", Load(4096, 16, devices=_ONE)),
    ("mamba2", Load(4096, 16, devices=_ONE)),
)


def _cases() -> Iterator[tuple[Shape, Load]]:
    shapes = {shape.name: shape for shape in SHAPES}
    for shape in SHAPES:
        for load in _EMBEDDING if shape.kind == "encoder" else _WHOLE:
            yield shape, load
    for name in ("llama", "gemma3", "olmoe"):
        for load in _TWO_DEVICES:
            yield shapes[name], load
    for name, load in _VARIED:
        yield shapes[name], load


_each_case = pytest.mark.parametrize(
    ("shape", "load"),
    [pytest.param(*case, id=f"{case[0].name}: {loads.label(case[1])}") for case in _cases()],
)


@pytest.fixture(scope="module")
def endpoints(llama_server: Engine) -> Iterator[Sequence[str]]:
    with loads.rpc_devices(llama_server, 2) as found:
        yield found


@dataclass(frozen=True)
class Taken:
    estimated: Estimate
    loaded: Loaded

    def parts(self) -> Iterator[tuple[Part, Part]]:
        """What was estimated, and what was taken, on each device."""
        for part in self.estimated.parts:
            found = [one for one in self.loaded.parts if one.device == part.device]
            yield replace(part, overhead_bytes=0), found[0] if found else Part(part.device)

    @property
    def error(self) -> float:
        """Of the sum over all devices, as a part of it."""
        estimated = sum(ours.total_bytes for ours, _ in self.parts())
        taken = sum(part.total_bytes for part in self.loaded.parts)
        return (estimated - taken) / taken


@pytest.fixture(scope="module")
def taken(
    llama_server: Engine, endpoints: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Shape, Load], Taken]:
    """Each load is measured once, for whatever is asked of it."""
    folder = tmp_path_factory.mktemp("shapes")
    known: dict[tuple[str, Load], Taken] = {}

    def take(shape: Shape, load: Load) -> Taken:
        if (shape.name, load) not in known:
            path = shape.write(folder)
            loaded = loads.load_for_real(
                llama_server, path, load, endpoints, embeddings=shape.kind == "encoder"
            )
            known[shape.name, load] = Taken(estimate(gguf_header.read(path), load), loaded)
        return known[shape.name, load]

    return take


Take = Callable[[Shape, Load], Taken]


@_each_case
def test_weights_caches_and_states_are_exact_on_every_device(
    taken: Take, shape: Shape, load: Load
) -> None:
    for ours, theirs in taken(shape, load).parts():
        for name in ("weights_bytes", "kv_bytes", "recurrent_bytes"):
            expected = pytest.approx(getattr(theirs, name), abs=_ROUNDING_BYTES)
            assert getattr(ours, name) == expected, (ours.device, name)


@_each_case
def test_the_whole_is_as_near_as_it_must_be(taken: Take, shape: Shape, load: Load) -> None:
    assert abs(taken(shape, load).error) <= loads.goal(shape, load)


@_each_case
def test_no_device_takes_more_than_the_estimate_and_its_margin(
    taken: Take, shape: Shape, load: Load
) -> None:
    found = taken(shape, load)
    for ours, theirs in found.parts():
        allowed = ours.total_bytes + margin_bytes(found.estimated, ours.device)
        assert theirs.total_bytes <= allowed, ours.device


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmoe", "deepseek2", "qwen3next", "mamba2"])
def test_one_load_calibrates_all_others_on_the_same_devices(
    taken: Take, tmp_path: Path, name: str
) -> None:
    """From a short context to a long one, with more slots and another batch."""
    shape = next(shape for shape in SHAPES if shape.name == name)
    known, wanted = Load(2048, 1, devices=_ONE), Load(16384, 4, ubatch=256, devices=_ONE)
    header = gguf_header.read(shape.write(tmp_path))
    compute = next(
        part.compute_bytes for part in taken(shape, known).loaded.parts if part.device == "RPC0"
    )
    made = estimate(header, wanted, scratch_elements=calibrate(header, known, compute))
    assert made.source is Source.CALIBRATED
    assert abs(Taken(made, taken(shape, wanted).loaded).error) <= 0.02


def test_a_draft_model_is_taken_beside_the_model(
    llama_server: Engine, endpoints: Sequence[str], tmp_path: Path
) -> None:
    main, draft = (shape.write(tmp_path) for shape in SHAPES[:2])
    load = Load(8192, 2, devices=_ONE)
    made = estimate(gguf_header.read(main), load, draft=(gguf_header.read(draft), load))
    words = ("--model-draft", str(draft), "--gpu-layers-draft", "99")
    loaded = loads.load_for_real(llama_server, main, load, endpoints, *words)
    found = Taken(made, loaded)
    assert abs(found.error) <= 0.02
    for ours, theirs in found.parts():
        assert ours.kv_bytes == pytest.approx(theirs.kv_bytes, abs=_ROUNDING_BYTES)
        assert ours.weights_bytes == pytest.approx(theirs.weights_bytes, abs=_ROUNDING_BYTES)


@pytest.mark.parametrize("devices", [(), _ONE], ids=["host", "device"])
def test_a_projector_is_taken_beside_the_model_with_its_scratch(
    llama_server: Engine, endpoints: Sequence[str], tmp_path: Path, devices: tuple[str, ...]
) -> None:
    main = gguf_factory.write_model(
        tmp_path / "main.gguf", architecture="gemma3", layers=6, embedding=512, context=8192,
        feed_forward=2048, sliding_window=512, seed=None, vocabulary=5000, tied=True,
    )  # fmt: skip
    projector = gguf_factory.write_vision_projector(
        tmp_path / "mmproj.gguf", 512, layers=4, embedding=384, heads=6, feed_forward=1536,
        image_size=448, seed=None,
    )  # fmt: skip
    load = Load(4096, 1, devices=devices)
    beside = projector_bytes(gguf_header.read(projector))
    made = estimate(gguf_header.read(main), load, projector_bytes=beside)
    words = ("--mmproj", str(projector), "--warmup")
    found = Taken(made, loads.load_for_real(llama_server, main, load, endpoints, *words))
    assert abs(found.error) <= 0.03
    assert beside > projector.stat().st_size


@pytest.mark.real
@pytest.mark.parametrize("context", [2048, 16384, 32768])
def test_the_real_model_takes_what_was_estimated(
    llama_server: Engine, endpoints: Sequence[str], real_model: Path, context: int
) -> None:
    header = gguf_header.read(real_model)
    for load in (Load(context, 4), Load(context, 4, devices=_ONE)):
        loaded = loads.load_for_real(llama_server, real_model, load, endpoints)
        found = Taken(estimate(header, load), loaded)
        assert abs(found.error) <= 0.02
        for ours, theirs in found.parts():
            assert ours.kv_bytes == pytest.approx(theirs.kv_bytes, abs=_ROUNDING_BYTES)
            if ours.device != HOST:
                expected = pytest.approx(theirs.weights_bytes, abs=_ROUNDING_BYTES)
                assert ours.weights_bytes == expected
