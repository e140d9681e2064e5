"""What the header formula says a load takes, and what it takes by the engine's own log.

Models of twenty shapes × contexts, slots, cache types, full and partial offload, two devices; and
the real 270M model. Beside it, for what lies wholly on one device, the formulas of other programs
on the same loads. Run: python -m tests.bench.bench_memory
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.estimate import Load, calibrate, estimate, margin_bytes
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import Header, Part
from tests import loads, real_model
from tests.bench import peers
from tests.bench.table import Figure, show
from tests.conftest import Engine
from tests.loads import SHAPES, Shape

_MIB = 2**20
_ROUNDING_BYTES = 0.03 * _MIB
_ONE, _TWO = ("RPC0",), ("RPC0", "RPC1")

_LOADS = (
    Load(4096, 4),
    Load(4096, 1, devices=_ONE),
    Load(8192, 4, devices=_ONE),
    Load(32768, 1, devices=_ONE),
    Load(32768, 4, devices=_ONE, unified=False),
    Load(16384, 2, devices=_ONE, cache_type_k="q8_0", cache_type_v="q8_0"),
    Load(8192, 2, devices=_ONE, ubatch=1024),
    Load(4096, 16, devices=_ONE),
    Load(4096, 2, devices=_ONE, gpu_layers=3),
    Load(8192, 2, devices=_ONE, gpu_layers=6),
    Load(4096, 1, devices=_ONE, gpu_layers=0),
)
_ON_TWO = (
    Load(8192, 4, devices=_TWO, split=(1, 1)),
    Load(8192, 4, devices=_TWO, split=(1, 3)),
    Load(4096, 2, devices=_TWO, split=(2, 1), gpu_layers=6),
)
_WITH_WINDOW = (Load(16384, 2, devices=_ONE, swa_full=True),)
_WITH_EXPERTS = (Load(4096, 2, devices=_ONE, expert_layers_on_host=3),)
_EMBEDDING = (
    Load(2048, 4, 2048),
    Load(2048, 4, 2048, devices=_ONE),
    Load(512, 2, devices=_ONE),
    Load(2048, 2, devices=_ONE, gpu_layers=4),
)
_REAL = tuple(
    Load(context, 4, devices=devices) for context in (2048, 8192, 32768) for devices in ((), _ONE)
)
_CALIBRATED_BY = Load(2048, 1, devices=_ONE)


def _loads_of(shape: Shape) -> Iterator[Load]:
    if shape.kind == "encoder":
        yield from _EMBEDDING
        return
    yield from _LOADS
    if not shape.is_recurrent:
        yield from _ON_TWO
    if shape.kind == "window":
        yield from _WITH_WINDOW
    if "experts" in shape.options and not shape.is_recurrent:
        yield from _WITH_EXPERTS


@dataclass
class Worst:
    """The largest errors seen, each as a part of what was taken."""

    inexact: int = 0  # weights, caches or states off by more than the log's rounding
    short: int = 0  # devices that took more than estimate and margin
    whole: dict[str, float] = field(default_factory=dict)  # by kind
    partial: dict[str, float] = field(default_factory=dict)
    calibrated: float = 0.0
    peers: dict[str, float] = field(default_factory=dict)


def _parts(header: Header, load: Load, loaded: Loaded) -> Iterator[tuple[Part, Part, int]]:
    """Estimated and taken on each device, without overheads, and the margin."""
    made = estimate(header, load)
    by_device = {part.device: part for part in loaded.parts}
    for part in made.parts:
        margin = margin_bytes(made, part.device)
        yield part, by_device.get(part.device, Part(part.device)), margin


def _error(header: Header, load: Load, loaded: Loaded, scratch: int | None = None) -> float:
    made = estimate(header, load, scratch_elements=scratch)
    estimated = sum(part.total_bytes - part.overhead_bytes for part in made.parts)
    taken = sum(part.total_bytes for part in loaded.parts)
    return (estimated - taken) / taken


def _judge(shape: Shape, header: Header, load: Load, loaded: Loaded, worst: Worst) -> float:
    for ours, theirs, margin in _parts(header, load, loaded):
        worst.inexact += sum(
            abs(getattr(ours, name) - getattr(theirs, name)) > _ROUNDING_BYTES
            for name in ("weights_bytes", "kv_bytes", "recurrent_bytes")
        )
        worst.short += theirs.total_bytes > ours.total_bytes - ours.overhead_bytes + margin
    error = _error(header, load, loaded)
    is_partial = loads.goal(shape, load) > loads.goal(shape, Load(1, 1))
    is_partial |= load.gpu_layers is not None or load.expert_layers_on_host > 0
    kinds = worst.partial if is_partial else worst.whole
    kinds[shape.kind] = max(kinds.get(shape.kind, 0.0), abs(error))
    return error


def _is_on_one(load: Load) -> bool:
    """The whole model on one device."""
    return load.devices == _ONE and load.gpu_layers is None and not load.expert_layers_on_host


def _peers(facts: peers.Facts, load: Load, loaded: Loaded, worst: Worst) -> list[str]:
    """Their errors, where everything lies on one device: they tell of no other case."""
    if not _is_on_one(load):
        return [""] * len(peers.FORMULAS)
    taken = next(part.total_bytes for part in loaded.parts if part.device == "RPC0")
    cells = []
    for name, formula in peers.FORMULAS.items():
        error = (formula(facts, load) - taken) / taken
        worst.peers[name] = max(worst.peers.get(name, 0.0), abs(error))
        cells.append(f"{error:+.0%}")
    return cells


def _row(name: str, load: Load, loaded: Loaded, error: float, others: Sequence[str]) -> None:
    taken = sum(part.total_bytes for part in loaded.parts) / _MIB
    cells = [f"{taken:8.1f}", f"{error:+7.2%}", *(f"{other:>11}" for other in others)]
    print(f"  {name:<16} {loads.label(load):<44} " + " ".join(cells), flush=True)


def _calibrate(
    engine: Engine, path: Path, header: Header, endpoints: Sequence[str], shape: Shape
) -> int | None:
    """From one load; None where the model embeds, which is served in one way only."""
    if shape.kind == "encoder":
        return None
    loaded = loads.load_for_real(engine, path, _CALIBRATED_BY, endpoints)
    compute = next(part.compute_bytes for part in loaded.parts if part.device == "RPC0")
    return calibrate(header, _CALIBRATED_BY, compute)


def _bench_shape(
    engine: Engine, shape: Shape, folder: Path, endpoints: Sequence[str], worst: Worst
) -> None:
    path = shape.write(folder)
    header, facts = gguf_header.read(path), peers.read(path)
    scratch = _calibrate(engine, path, header, endpoints, shape)
    for load in _loads_of(shape):
        loaded = loads.load_for_real(
            engine, path, load, endpoints, embeddings=shape.kind == "encoder"
        )
        error = _judge(shape, header, load, loaded, worst)
        if scratch is not None and _is_on_one(load):
            again = _error(header, load, loaded, scratch)
            worst.calibrated = max(worst.calibrated, abs(again))
        _row(shape.name, load, loaded, error, _peers(facts, load, loaded, worst))
    path.unlink()


def _bench_real(engine: Engine, endpoints: Sequence[str], worst: Worst) -> None:
    path = real_model.original()
    header, facts = gguf_header.read(path), peers.read(path)
    shape = Shape("gemma-3-270m", "window", header.architecture)
    for load in _REAL:
        loaded = loads.load_for_real(engine, path, load, endpoints)
        error = _judge(shape, header, load, loaded, worst)
        _row(shape.name, load, loaded, error, _peers(facts, load, loaded, worst))


def _engine() -> Engine:
    found = engines.find("auto")
    return Engine(found.path, dict(os.environ))


def main() -> int:
    engine, worst = _engine(), Worst()
    print("What loads take, MiB by the engine's own log, and how far off each formula is")
    names = " ".join(f"{name:>11}" for name in peers.FORMULAS)
    print(f"  {'model':<16} {'load':<44} {'taken':>8} {'ours':>7} {names}")
    with (
        tempfile.TemporaryDirectory(prefix="syn") as name,
        loads.rpc_devices(engine, 2) as endpoints,
    ):
        for shape in SHAPES:
            _bench_shape(engine, shape, Path(name), endpoints, worst)
        _bench_real(engine, endpoints, worst)
    figures = [
        Figure("weights, caches, states off by more than rounding", worst.inexact, "", 0),
        Figure("devices that took more than estimate and margin", worst.short, "", 0),
    ]
    for kind, error in worst.whole.items():
        goal = 100 * loads.goal(Shape("", kind, ""), Load(1, 1))
        figures.append(Figure(f"worst of {kind}, whole", 100 * error, "%", goal))
    for kind, error in worst.partial.items():
        goal = 100 * loads.goal(Shape("", kind, ""), Load(1, 1, devices=_ONE, gpu_layers=1))
        figures.append(Figure(f"worst of {kind}, partly on the host", 100 * error, "%", goal))
    figures.append(Figure("worst after one load calibrated it", 100 * worst.calibrated, "%", 5))
    for name, error in worst.peers.items():
        figures.append(Figure(f"worst of {name}", 100 * error, "%"))
    return 0 if show("Estimates from the header alone", figures) else 1


if __name__ == "__main__":
    sys.exit(main())
