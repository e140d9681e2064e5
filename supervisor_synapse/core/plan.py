"""Models, settings and memory → what shall run, where, and why. A plan is a value.

Stable by construction: a choice made before (port, context, enabled by fit) is kept as long as
what it was made from is the same, so that looking twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from supervisor_synapse.core.arguments import Serving, embedding_batch, server_arguments
from supervisor_synapse.core.catalog import Model, printable
from supervisor_synapse.core.estimate import Load, estimate
from supervisor_synapse.core.model import Device, Engine, Estimate, Problem, Program, Role
from supervisor_synapse.core.settings import Enable, ModelSettings, Settings, TierRule

# One quantization of a repo is brought up: the best known balance of size and quality first.
_PREFERRED_QUANTIZATIONS = (
    "Q4_K_M", "Q5_K_M", "Q4_K_S", "Q5_K_S", "IQ4_NL", "IQ4_XS", "Q4_K_L", "Q4_0", "Q4_1", "MXFP4",
    "MXFP4_MOE", "Q6_K", "Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "F16", "BF16", "Q2_K", "F32",
)  # fmt: skip
_DEFAULT_PARALLEL = 4
_SMALLEST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Choice:
    """What an earlier plan chose for a model, and from what (`basis`)."""

    port: int
    context: int
    device: str
    fitted: bool  # enabled because it fitted
    basis: str
    placed: bool = False  # enabled, and there was memory for it when this was chosen


@dataclass(frozen=True, slots=True)
class World:
    """What a plan is made from beside the models and the settings."""

    devices: tuple[Device, ...]  # free counts what our own running models hold as free
    engine: Engine
    earlier: Mapping[str, Choice]  # by key
    port_is_free: Callable[[int], bool]
    intent: Mapping[str, bool] = field(default_factory=dict)  # enabled or disabled by command


@dataclass(frozen=True, slots=True)
class Plan:
    """All programs, in the order in which they start; and what could not be planned."""

    programs: tuple[Program, ...]
    choices: Mapping[str, Choice]
    problems: tuple[Problem, ...]

    def waves(self, max_parallel: int) -> list[list[Program]]:
        """The enabled programs in groups that load together.

        A picture for people: in fact each start waits only for a free loading place.
        """
        enabled = [program for program in self.programs if program.enabled]
        return [enabled[i : i + max_parallel] for i in range(0, len(enabled), max_parallel)]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model with what the settings say of it."""

    model: Model
    said: ModelSettings
    rule: TierRule
    is_commanded: bool  # enabled or disabled by command

    @property
    def order(self) -> tuple[int, int, str]:
        return (self.rule.priority, self.model.size_bytes, self.model.name)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A place for a model, or the nearest to one."""

    device: Device
    context: int
    estimate: Estimate
    fits: bool

    @property
    def needs_bytes(self) -> int:
        """On the device."""
        return self.estimate.on(self.device.name)


def with_port(program: Program, port: int) -> Program:
    """The same program on another port, on every rung."""
    ladder = tuple(
        replace(variant, arguments=_on_port(variant.arguments, port)) for variant in program.ladder
    )
    return replace(program, port=port, arguments=_on_port(program.arguments, port), ladder=ladder)


def _on_port(arguments: tuple[str, ...], port: int) -> tuple[str, ...]:
    words = list(arguments)
    words[words.index("--port") + 1] = str(port)
    return tuple(words)


def with_rung(program: Program, rung: int) -> Program:
    """The same program as another rung of its ladder serves it: same name, port and alias."""
    variant = program.ladder[rung]
    return replace(
        program, rung=rung, context=variant.context, device=variant.device,
        arguments=variant.arguments, estimate=variant.estimate, model_path=variant.model_path,
        projector_path=variant.projector_path, shards=variant.shards,
    )  # fmt: skip


def repo_file(model: Model | Program) -> str:
    """What `[model:GLOB]` matches beside the program name."""
    return f"{model.repo}/{model.file}" if model.repo else model.file


def mib(size_bytes: int) -> str:
    """Bytes for a person: whole MiB; GiB with one decimal from 10 GiB; KiB below 1 MiB."""
    if size_bytes >= 10 * 2**30:
        return f"{size_bytes / 2**30:.1f} GiB"
    if 0 < size_bytes < 2**20:
        return f"{size_bytes / 2**10:.0f} KiB"
    return f"{size_bytes / 2**20:.0f} MiB"


def unmatched_sections(settings: Settings, models: Iterable[Model | Program]) -> list[Problem]:
    """`[model:GLOB]` sections that are about none of `models`: a slip of the pen, perhaps.

    Where there is no model at all, that is the news, and nothing is said here.
    """
    known = [(model.name, repo_file(model)) for model in models]
    globs = dict.fromkeys(
        rule.glob
        for rule in settings.models
        if known and not any(rule.matches(*names) for names in known)
    )
    return [
        Problem(
            printable(f"[model:{glob}]"), "matches no model",
            "give it a name that `synapse plan` shows, or a pattern such as qwen*",
        )
        for glob in globs
    ]  # fmt: skip


def make_plan(models: Sequence[Model], settings: Settings, world: World) -> Plan:
    """Choose for each model, in order of priority, then size.

    Models that shall run are placed first; what is left over is planned as if alone, so that it
    can be started by hand.
    """
    candidates = sorted(
        (_candidate(model, settings, world.intent) for model in models), key=lambda c: c.order
    )
    ports, problems = _ports(candidates, settings, world)
    outcome = _place_wanted(candidates, settings, world)
    programs = []
    choices = {}
    for candidate in candidates:
        key = candidate.model.key
        if key not in ports:
            continue
        fit = outcome.fits.get(key) or _place(candidate, world, _alone(world, settings))
        enabled = key in outcome.fits
        reason = outcome.reasons.get(key) or _why_not(candidate, settings)
        programs.append(
            _program(
                candidate, settings, world.engine, ports[key], fit, enabled=enabled, reason=reason
            )
        )
        choices[key] = Choice(
            port=ports[key], context=fit.context, device=fit.device.name,
            fitted=enabled and _is_by_fit(candidate, settings), basis=_basis(candidate),
            placed=enabled and (fit.fits or _keeps_its_place(candidate, world, fit)),
        )  # fmt: skip
    return Plan(tuple(programs), choices, tuple(problems))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Where the models that shall run were placed, by key; and why others were not."""

    fits: Mapping[str, _Fit]
    reasons: Mapping[str, str]


def _place_wanted(candidates: Sequence[_Candidate], settings: Settings, world: World) -> _Outcome:
    """Give memory to those that may run, best first; one quantization a repo when chosen by fit."""
    budget = {
        device.name: device.free_bytes - settings.memory_reserve.of(device.total_bytes)
        for device in world.devices
    }
    fits: dict[str, _Fit] = {}
    reasons: dict[str, str] = {}
    repos_served: set[str] = set()
    for candidate in _by_preference(candidates, settings.enable, world):
        key, repo = candidate.model.key, _family(candidate.model)
        by_fit = _is_by_fit(candidate, settings)
        if by_fit and repo in repos_served:
            reasons[key] = "another quantization of this repo is enabled"
            continue
        fit = _place(candidate, world, budget)
        if by_fit and not fit.fits and not _was_fitted(candidate, world):
            reasons[key] = _does_not_fit(fit, budget)
            continue
        fits[key] = fit
        reasons[key] = _fits(fit, budget) if fit.fits else _does_not_fit(fit, budget)
        repos_served.add(repo)
        if fit.fits:
            for part in fit.estimate.parts:
                if part.device in budget:
                    budget[part.device] -= part.total_bytes
    return _Outcome(fits, reasons)


def _candidate(model: Model, settings: Settings, intent: Mapping[str, bool]) -> _Candidate:
    """A command wins over synapse.conf."""
    said = settings.for_model(model.name, repo_file(model))
    commanded = intent.get(model.name)
    if commanded is not None:
        said = replace(said, enabled=commanded)
    tier = said.tier
    rule = settings.rule(tier) if tier else settings.tier_of(model.header.parameters)
    return _Candidate(model, said, rule, commanded is not None)


def _family(model: Model) -> str:
    """Quantizations of one model: the same repo, architecture, and number of parameters."""
    if model.repo is None:
        return model.key
    return f"{model.repo}\0{model.header.architecture}\0{model.header.parameters}"


def _is_by_fit(candidate: _Candidate, settings: Settings) -> bool:
    """Whether memory alone decides if it is enabled."""
    return candidate.said.enabled is None and settings.enable is Enable.FIT


def _by_preference(
    candidates: Sequence[_Candidate], enable: Enable, world: World
) -> list[_Candidate]:
    """Those that may run, in the order in which memory is given to them.

    Said outright comes before chosen by fit; among the quantizations of a repo the one that was
    chosen before comes first, else the usual one.
    """

    def rank(candidate: _Candidate) -> int:
        quantization = candidate.model.quantization
        if quantization in _PREFERRED_QUANTIZATIONS:
            return _PREFERRED_QUANTIZATIONS.index(quantization)
        return len(_PREFERRED_QUANTIZATIONS)

    smallest: dict[str, int] = {}
    for candidate in candidates:
        family = _family(candidate.model)
        size = candidate.model.size_bytes
        smallest[family] = min(smallest.get(family, size), size)
    may_run = [c for c in candidates if _may_run(c, enable)]
    return sorted(
        may_run,
        key=lambda c: (
            c.said.enabled is not True, c.rule.priority, smallest[_family(c.model)],
            _family(c.model), not _was_fitted(c, world), rank(c), c.order,
        ),
    )  # fmt: skip


def _may_run(candidate: _Candidate, enable: Enable) -> bool:
    if candidate.said.enabled is not None:
        return candidate.said.enabled
    return enable is not Enable.NONE and candidate.model.role is not Role.DRAFT


def _why_not(candidate: _Candidate, settings: Settings) -> str:
    if candidate.is_commanded:
        return "disabled by command"
    if candidate.said.enabled is False:
        return "enabled = false in synapse.conf"
    if candidate.model.role is Role.DRAFT:
        return "a draft model is served beside its main model, not alone"
    return f"enable = {settings.enable.value} in synapse.conf"


def _basis(candidate: _Candidate) -> str:
    """What a choice depends on; when it changes, the choice is made anew."""
    said, rule, model = candidate.said, candidate.rule, candidate.model
    parts = (
        model.size_bytes, model.header.context_length, said.context, said.parallel, said.device,
        said.gpu_layers, rule.min_context, rule.max_context,
    )  # fmt: skip
    return ",".join(str(part) for part in parts)


def _earlier(candidate: _Candidate, world: World) -> Choice | None:
    """What was chosen before, if it was chosen from the same."""
    earlier = world.earlier.get(candidate.model.key)
    return earlier if earlier is not None and earlier.basis == _basis(candidate) else None


def _was_fitted(candidate: _Candidate, world: World) -> bool:
    earlier = _earlier(candidate, world)
    return earlier is not None and earlier.fitted


def _keeps_its_place(candidate: _Candidate, world: World, fit: _Fit) -> bool:
    """Whether `fit` is what was chosen before, when there was memory for it."""
    earlier = _earlier(candidate, world)
    return (
        earlier is not None
        and earlier.placed
        and (earlier.context, earlier.device) == (fit.context, fit.device.name)
    )


def _place(candidate: _Candidate, world: World, budget: Mapping[str, int]) -> _Fit:
    """The largest context that fits on the device with the most room; what was chosen before first.

    An earlier choice that fitted is kept even while others hold the memory: the model then waits
    for it instead of being rendered anew. Where nothing fits, the smallest footprint there is.
    """
    devices = _devices(candidate, world.devices, budget)
    contexts = _contexts(candidate)
    earlier = _earlier(candidate, world)
    if earlier is not None:
        for device in devices:
            if device.name == earlier.device and earlier.context in contexts:
                fit = _fit(candidate, device, earlier.context, budget)
                if fit.fits or (earlier.placed and fit.needs_bytes <= device.total_bytes):
                    return fit
    for context in contexts:
        for device in devices:
            fit = _fit(candidate, device, context, budget)
            if fit.fits:
                return fit
    return _fit(candidate, devices[0], contexts[-1], budget)


def _devices(
    candidate: _Candidate, devices: Sequence[Device], budget: Mapping[str, int]
) -> list[Device]:
    """Where the model may live, most room first; the host only where there is nothing better."""
    named = (candidate.said.device or "").split(",")[0]
    host = [device for device in devices if device.is_host]
    if named == "none" or candidate.said.gpu_layers == 0:
        return host
    by_name = [device for device in devices if device.name == named]
    if by_name:
        return by_name
    better = [device for device in devices if not device.is_host]
    return sorted(better, key=lambda device: -budget[device.name]) or host


def _contexts(candidate: _Candidate) -> list[int]:
    """Context sizes to try, largest first."""
    trained = candidate.model.header.context_length or candidate.rule.max_context
    if candidate.said.context is not None:
        return [candidate.said.context]
    largest = max(min(trained, candidate.rule.max_context), 1)
    floor = max(min(trained, candidate.rule.min_context), 1)
    contexts = [largest]
    while contexts[-1] // 2 >= max(floor, _SMALLEST_CONTEXT):
        half = contexts[-1] // 2 // _SMALLEST_CONTEXT * _SMALLEST_CONTEXT
        contexts.append(max(half, floor))
    if contexts[-1] > floor:
        contexts.append(floor)
    return contexts


def _fit(candidate: _Candidate, device: Device, context: int, budget: Mapping[str, int]) -> _Fit:
    model = candidate.model
    ubatch = embedding_batch(context) if model.role in (Role.EMBEDDING, Role.RERANKER) else 512
    load = Load(
        context, _parallel(candidate), ubatch, devices=() if device.is_host else (device.name,)
    )
    needed = estimate(model.header, load, projector_bytes=model.projector_bytes)
    fits = all(needed.on(name) <= left for name, left in budget.items())
    return _Fit(device, context, needed, fits)


def _parallel(candidate: _Candidate) -> int:
    return candidate.said.parallel or _DEFAULT_PARALLEL


def _alone(world: World, settings: Settings) -> dict[str, int]:
    """The budget of a machine on which nothing else of ours runs."""
    return {
        device.name: device.total_bytes - settings.memory_reserve.of(device.total_bytes)
        for device in world.devices
    }


def _fits(fit: _Fit, budget: Mapping[str, int]) -> str:
    needs, left = fit.needs_bytes, budget[fit.device.name]
    return f"fits: {mib(needs)} of {mib(left)} left on {fit.device.name}"


def _does_not_fit(fit: _Fit, budget: Mapping[str, int]) -> str:
    needs, left = fit.needs_bytes, max(budget[fit.device.name], 0)
    return (
        f"does not fit: needs {mib(needs)} at context {fit.context}, "
        f"{mib(left)} left on {fit.device.name}"
    )


def _program(
    candidate: _Candidate, settings: Settings, engine: Engine, port: int, fit: _Fit,
    *, enabled: bool, reason: str,
) -> Program:  # fmt: skip
    model, said = candidate.model, candidate.said
    on_device = said.device or (None if fit.device.is_host else fit.device.name)
    serving = Serving(
        host=settings.host, port=port, alias=said.alias or model.name, role=model.role,
        context=fit.context, parallel=_parallel(candidate), device=on_device,
        gpu_layers=said.gpu_layers, sleep_idle_seconds=said.sleep_idle_seconds or 0,
        kv_bytes=fit.estimate.kv_bytes, extra=said.args or (),
    )  # fmt: skip
    return Program(
        name=model.name, key=model.key, repo=model.repo, file=model.file,
        tier=candidate.rule.tier, role=model.role, priority=candidate.rule.priority,
        enabled=enabled, reason=reason, host=settings.host, port=port, alias=serving.alias,
        context=fit.context, parallel=serving.parallel, device=fit.device.name,
        estimate=fit.estimate, size_bytes=model.size_bytes, quantization=model.quantization,
        parameters=model.header.parameters, model_path=model.path,
        projector_path=model.projector, shards=model.shards,
        arguments=server_arguments(serving, engine), fallback=said.fallback,
        pinned=bool(said.pinned),
    )  # fmt: skip


def _ports(
    candidates: Sequence[_Candidate], settings: Settings, world: World
) -> tuple[dict[str, int], list[Problem]]:
    """A port for each model: as configured, as before, else the lowest free one.

    Those that may run are served first, so that a narrow range costs the others.
    """
    ports: dict[str, int] = {}
    problems: list[Problem] = []
    in_range = range(settings.first_port, settings.last_port + 1)
    for candidate in candidates:
        port = candidate.said.port
        if port is not None and port in ports.values():
            problems.append(
                Problem(
                    candidate.model.name,
                    f"port {port} is given to two models",
                    "give each a port of its own in synapse.conf, or none",
                )
            )
        elif port is not None:
            ports[candidate.model.key] = port
    for candidate in candidates:
        earlier = world.earlier.get(candidate.model.key)
        if (
            earlier is not None and candidate.said.port is None and earlier.port in in_range
            and earlier.port not in ports.values() and world.port_is_free(earlier.port)
        ):  # fmt: skip
            ports[candidate.model.key] = earlier.port
    taken = set(ports.values())
    keys = {candidate.model.key for candidate in candidates}
    absent = {choice.port for key, choice in world.earlier.items() if key not in keys}
    # A model that is away for a while finds its port free, as long as there are others.
    in_order = sorted((port for port in in_range if port not in taken), key=lambda p: p in absent)
    free = (port for port in in_order if world.port_is_free(port))
    without = [c for c in candidates if c.model.key not in ports and c.said.port is None]
    for candidate in sorted(without, key=lambda c: not _may_run(c, settings.enable)):
        port = next(free, None)
        if port is None:
            problems.append(
                Problem(
                    candidate.model.name,
                    f"no port left in {settings.first_port}-{settings.last_port}",
                    "widen port_range in synapse.conf",
                )
            )
        else:
            ports[candidate.model.key] = port
    return ports, problems


@dataclass(frozen=True, slots=True)
class Deployed:
    """One block as it stands on disk, by digest; `written`: what discovery ever wrote for it."""

    digest: str
    written: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """Not edited by hand since discovery wrote it."""
        return self.digest in self.written


@dataclass(frozen=True, slots=True)
class Changes:
    """Program names by what must be done to their blocks."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # edited by hand: ours goes beside, as .conf.new

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def compare(
    desired: Mapping[str, str], deployed: Mapping[str, Deployed], forced: Iterable[str] = ()
) -> Changes:
    """Program name → digest of the block meant × blocks on disk.

    A block edited by hand wins, unless it is `forced`. One that discovery never wrote, under a
    name that no model has, is somebody else's program and is not looked at.
    """
    force = set(forced)
    changes: dict[str, list[str]] = {name: [] for name in Changes.__dataclass_fields__}
    for name, digest in desired.items():
        block = deployed.get(name)
        if block is None:
            changes["added"].append(name)
        elif block.digest == digest:
            changes["unchanged"].append(name)
        elif block.is_ours or name in force:
            changes["changed"].append(name)
        else:
            changes["kept"].append(name)
    for name, block in deployed.items():
        if name not in desired and block.written:
            changes["removed" if block.is_ours else "kept"].append(name)
    return Changes(**{name: tuple(sorted(names)) for name, names in changes.items()})
