"""What is known of the memory that models take, best first; the formula tells the rest.

    learned     what earlier loads took
    dry run     what the engine says, asked without loading
    calibrated  the formula, with the model's scratch from a load or a dry run of it on one device

The engine is asked only where it matters: of what shall run on a device that is full, or so nearly
so that the formula's error could decide. One model after the other, all of them within a bounded
time; whatever it does not tell, the formula does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from supervisor_synapse.adapters import dry_run, footprints
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.footprints import Footprints
from supervisor_synapse.core import admission
from supervisor_synapse.core.arguments import load_of
from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.estimate import HOST, Load, calibrate
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import (
    Device,
    Engine,
    Estimate,
    FileIdentity,
    Program,
    Source,
    Variant,
)
from supervisor_synapse.core.settings import Reserve
from supervisor_synapse.errors import TransientError

_ASKING_SECONDS = 30.0  # for all models together
_IN_DOUBT_PERCENT = 90  # of what may be taken of a device
_REMOTE = "RPC"  # such a server answers nobody while it serves somebody


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one engine and its devices, the host among them."""

    learned: Footprints
    engine: Engine
    devices: tuple[Device, ...]
    on_disk: Footprints = field(default_factory=Footprints)
    _files: dict[str, tuple[FileIdentity, ...]] = field(default_factory=dict)
    _scratch_keys: dict[tuple[str, ...], str | None] = field(default_factory=dict)

    def known(self, model: Model, arguments: tuple[str, ...], formula: Estimate) -> Estimate | None:
        """What a load or the engine told of this model with these very arguments."""
        if not self.learned.by_key:
            return None
        key = self._key(model, arguments)
        return footprints.known(self.learned, key, formula) if key else None

    def scratch(self, model: Model, load: Load) -> int | None:
        """The model's scratch for such a load, in elements a token (see core/estimate.py)."""
        if not self.learned.scratches or not _is_plain(load, model):
            return None
        key = self._scratch_key(model, load)
        return footprints.scratch_elements(self.learned, key) if key else None

    def with_told(self, model: Model, arguments: Sequence[str], told: Loaded, at: float) -> Figures:
        """With the engine's word for a model with these arguments."""
        key = self._key(model, arguments)
        if key is None:
            return self
        learned = footprints.learn_dry_run(self.learned, key, told, at=at)
        return replace(self, learned=learned).calibrated(model, arguments, at)

    def calibrated(self, model: Model, arguments: Sequence[str], at: float) -> Figures:
        """With the model's scratch, where it is known what it took with these arguments, all on
        one device: that leaves no doubt about what the scratch was of.
        """
        load = load_of(arguments, trained_context=model.header.context_length)
        if len(load.devices) > 1 or not _is_plain(load, model):
            return self
        key, scratch_key = self._key(model, arguments), self._scratch_key(model, load)
        found = footprints.known(self.learned, key) if key else None
        if found is None or scratch_key is None:
            return self
        where = load.devices[0] if load.devices else HOST
        compute_bytes = sum(part.compute_bytes for part in found.parts if part.device == where)
        elements = calibrate(model.header, load, compute_bytes)
        if elements in (0, footprints.scratch_elements(self.learned, scratch_key)):
            return self
        learned = footprints.learn_scratch(self.learned, scratch_key, elements, at=at)
        return replace(self, learned=learned)

    def _key(self, model: Model, arguments: Sequence[str]) -> str | None:
        """None where a file cannot be looked at."""
        files = self._identities(model)
        if not files:
            return None
        return footprints.footprint_key(files, arguments, self.engine.version, self.devices)

    def _scratch_key(self, model: Model, load: Load) -> str | None:
        where = load.devices[0].rstrip("0123456789") if load.devices else HOST
        traits = (where, load.cache_type_k, load.cache_type_v)
        if (model.key, *traits) not in self._scratch_keys:
            files = self._identities(model)
            key = footprints.scratch_key(files, self.engine.version, *traits) if files else None
            self._scratch_keys[model.key, *traits] = key
        return self._scratch_keys[model.key, *traits]

    def _identities(self, model: Model) -> tuple[FileIdentity, ...]:
        if model.key not in self._files:
            files = (*(model.shards or (model.path,)), *filter(None, [model.projector]))
            self._files[model.key] = footprints.identities(files)
        return self._files[model.key]


def of_program(
    learned: Footprints, one: Program | Variant, engine: Engine, devices: Sequence[Device]
) -> Estimate | None:
    """What is known of what a program, or a rung of its ladder, is served with."""
    key = key_of(one, engine, devices)
    return footprints.known(learned, key, one.estimate) if key else None


def key_of(one: Program | Variant, engine: Engine, devices: Sequence[Device]) -> str | None:
    """Names what a footprint holds for; None where a file cannot be looked at."""
    first = one.shards or (one.model_path,)
    files = (*first, *([one.projector_path] if one.projector_path else []))
    identities = footprints.identities(files)
    if not identities:
        return None
    return footprints.footprint_key(identities, one.arguments, engine.version, devices)


def _is_plain(load: Load, model: Model) -> bool:
    """Whether the model lies whole on devices, or whole on the host, and computes as usual."""
    every = model.header.layers + 1
    is_whole = not load.devices or load.gpu_layers is None or load.gpu_layers >= every
    return is_whole and load.flash_attention and not load.expert_layers_on_host


# --- reading and asking -------------------------------------------------------------------------


def read(
    deployment: Deployment,
    engine: Engine,
    devices: tuple[Device, ...],
    models: Iterable[Model],
    programs: Iterable[Program],
) -> Figures:
    """All that is known, with what the deployed programs of these models tell of their scratch."""
    on_disk = footprints.load(deployment.footprints)
    figures = Figures(on_disk, engine, devices, on_disk)
    if not figures.learned.by_key:
        return figures
    by_key = {model.key: model for model in models}
    now = time.time()
    for program in programs:
        model = by_key.get(program.key)
        if model is not None and not program.rung:  # another rung may be another file
            figures = figures.calibrated(model, program.arguments, now)
    return figures


def in_doubt(
    programs: Iterable[Program], devices: Iterable[Device], reserve: Reserve
) -> tuple[Program, ...]:
    """Enabled programs of which the formula alone tells, on devices where its error could decide,
    the largest first.
    """
    enabled = [program for program in programs if program.enabled]
    asked: dict[str, int] = {}
    for program in enabled:
        for name, size in admission.needs_of(program.estimate):
            asked[name] = asked.get(name, 0) + size
    budgets = {one.name: one.free_bytes - reserve.of(one.total_bytes) for one in devices}
    full = {
        name
        for name, size in asked.items()
        if 100 * size >= _IN_DOUBT_PERCENT * max(budgets.get(name, 0), 0)
    }
    doubtful = [
        program
        for program in enabled
        if program.estimate.source is Source.HEADER
        and not program.rung  # which may be another file
        and any(part.device in full for part in program.estimate.parts)
    ]
    return tuple(sorted(doubtful, key=lambda one: -one.estimate.total_bytes))


def ask(
    figures: Figures,
    programs: Iterable[Program],
    models: Mapping[str, Model],
    deployment: Deployment,
    *,
    free_bytes: int,
    is_serving: bool,
) -> Figures:
    """With what the engine says of these programs; what is new is written down.

    `models`: by key; `free_bytes`: see `dry_run.ask`; `is_serving`: programs of ours are up, so
    that remote devices may be taken.
    """
    deadline = time.monotonic() + _ASKING_SECONDS
    for program in programs:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        if is_serving and _REMOTE in program.device:
            continue
        model = models[program.key]
        told = dry_run.ask(
            figures.engine, model.path, _arguments(model, program), free_bytes=free_bytes,
            lock=deployment.run / "dry-run.lock", seconds=left,
        )  # fmt: skip
        if told is not None:
            figures = figures.with_told(model, program.arguments, told, time.time())
    _keep(deployment, figures)
    return figures


def _arguments(model: Model, program: Program) -> tuple[str, ...]:
    projector = ("--mmproj", model.projector) if model.projector else ()
    return (*program.arguments, *projector)


def _keep(deployment: Deployment, figures: Figures) -> None:
    """Where it cannot be written down, it is found anew another time."""
    if figures.learned is figures.on_disk:
        return
    with contextlib.suppress(OSError, TransientError):
        footprints.update(deployment.footprints, partial(footprints.merged, newer=figures.learned))
