"""Models, settings and memory → what shall run, where, and why. A plan is a value.

Stable by construction: what was chosen before (port, place, context, enabled by fit, rung of the
ladder) is kept as long as what it was made from is the same, so that looking twice changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from supervisor_synapse.core import ladder, ports
from supervisor_synapse.core.arguments import load_of
from supervisor_synapse.core.candidates import (
    Candidate,
    candidate_of,
    family_of,
    is_by_fit,
    may_run,
    rank_of,
    repo_file,
    why_not,
)
from supervisor_synapse.core.catalog import Model, printable
from supervisor_synapse.core.estimate import HOST, margin_bytes
from supervisor_synapse.core.model import Device, Problem, Program, Variant
from supervisor_synapse.core.placement import Choice as Choice
from supervisor_synapse.core.placement import (
    Configuration,
    Placement,
    Search,
    as_edited,
)
from supervisor_synapse.core.placement import World as World
from supervisor_synapse.core.settings import Enable, Settings

# Of a device that is not listed: whatever was planned for it may have fitted.
_UNKNOWN_BYTES = 1 << 62


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
        (candidate_of(model, settings, world.intent) for model in models), key=lambda c: c.order
    )
    lost = _lost_devices(candidates, world)
    world = replace(world, devices=(*lost, *world.devices))
    asking = [ports.Asking(c.model, c.said.port, may_run(c, settings.enable)) for c in candidates]
    given, problems = ports.choose(asking, settings, world.earlier, world.port_is_free)
    fleet = {
        c.model.key: _asked(c, given[c.model.key], settings, world)
        for c in candidates
        if c.model.key in given
    }
    outcome = _place_wanted(fleet, settings, world)
    alone = _budget(settings, world, {device.name: device.total_bytes for device in world.devices})
    placed = {
        key: outcome.placed.get(key) or _place(one, alone, frozenset(), world)
        for key, one in fleet.items()
    }
    ladders = ladder.of_fleet(
        {key: one.search for key, one in fleet.items()},
        {key: found.placement for key, found in placed.items()},
    )
    programs = []
    choices = {}
    for key, one in fleet.items():
        program = _program(one, placed[key], ladders[key], outcome, settings)
        programs.append(program)
        choices[key] = _choice(one, placed[key], program, outcome, settings)
    problems += _lost_fallbacks(one.candidate for one in fleet.values())
    problems += _idle_fallbacks(programs)
    problems += [_without_devices(lost)] if lost else []
    return Plan(tuple(programs), choices, tuple(problems))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model that asks for a place."""

    search: Search
    port: int
    earlier: Choice | None  # what was chosen from the same
    edited: Configuration | None  # what its block says, where that was edited by hand

    @property
    def candidate(self) -> Candidate:
        return self.search.candidate

    @property
    def was_fitted(self) -> bool:
        return self.earlier is not None and self.earlier.fitted


def _asked(candidate: Candidate, port: int, settings: Settings, world: World) -> _Asked:
    edited = world.edited.get(candidate.model.key)
    return _Asked(
        search=Search(candidate, port, settings, world), port=port,
        earlier=_earlier(candidate, world),
        edited=None if edited is None else as_edited(candidate.model, edited, world),
    )  # fmt: skip


def _earlier(candidate: Candidate, world: World) -> Choice | None:
    """What was chosen before, if it was chosen from the same."""
    earlier = world.earlier.get(candidate.model.key)
    return earlier if earlier is not None and earlier.basis == _basis(candidate) else None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Where the models that shall run were placed, by key; and why others were not."""

    placed: Mapping[str, Configuration]
    fitting: frozenset[str]  # of them: those for which there is room
    reasons: Mapping[str, str]


def _place_wanted(fleet: Mapping[str, _Asked], settings: Settings, world: World) -> _Outcome:
    """Give memory to those that may run, best first; one quantization a repo when chosen by fit."""
    room = _budget(settings, world, {device.name: device.free_bytes for device in world.devices})
    used: set[str] = set()
    placed: dict[str, Configuration] = {}
    fitting: set[str] = set()
    reasons: dict[str, str] = {}
    repos_served: set[str] = set()
    for one in _by_preference(fleet.values(), settings.enable):
        model = one.candidate.model
        by_fit = is_by_fit(one.candidate, settings)
        if by_fit and family_of(model) in repos_served:
            reasons[model.key] = "another quantization of this repo is enabled"
            continue
        found = _place(one, room, used, world)
        runs = one.edited or found
        fits = runs.lacking(room) is None
        reasons[model.key] = _why(one, runs, room)
        if by_fit and not fits and not one.was_fitted:
            continue
        placed[model.key] = found
        repos_served.add(family_of(model))
        if fits:
            fitting.add(model.key)
            used.update(runs.placement.devices)
        _take(room, runs.needs() if fits else _held_on_a_rung(one, room))
    return _Outcome(placed, frozenset(fitting), reasons)


def _budget(settings: Settings, world: World, sizes: Mapping[str, int]) -> dict[str, int]:
    """What may be taken of each device, of so much: not the reserve."""
    return {
        device.name: sizes[device.name] - settings.memory_reserve.of(device.total_bytes)
        for device in world.devices
    }


def _take(room: dict[str, int], needs: Mapping[str, int]) -> None:
    for name, size in needs.items():
        room[name] -= size


def _held_on_a_rung(one: _Asked, room: Mapping[str, int]) -> Mapping[str, int]:
    """What a model that stepped down its ladder takes there, when there is no room for rung 0."""
    held = dict(one.earlier.takes) if one.earlier else {}
    return held if all(size <= room.get(name, 0) for name, size in held.items()) else {}


def _place(one: _Asked, room: Mapping[str, int], used: Set[str], world: World) -> Configuration:
    """What was chosen before, else the best that fits; where nothing does, what comes nearest.

    An earlier choice that fitted is kept even while others hold the memory: the model then waits
    for it instead of being rendered anew.
    """
    if one.earlier is not None and one.search.can_be_kept(one.earlier):
        kept = one.search.configuration(one.earlier.placement)
        if kept.lacking(room) is None or (one.earlier.placed and _is_possible(kept, world)):
            return kept
    return one.search.best(room, used) or one.search.nearest(room)


def _is_possible(configuration: Configuration, world: World) -> bool:
    """Whether it would fit on this machine, were nothing else there."""
    totals = {device.name: device.total_bytes for device in world.devices}
    parts = configuration.estimate.parts
    return all(part.total_bytes <= totals.get(part.device, 0) for part in parts)


def _by_preference(fleet: Iterable[_Asked], enable: Enable) -> list[_Asked]:
    """Those that may run, in the order in which memory is given to them.

    Said outright comes before chosen by fit; among the quantizations of a repo the one that was
    chosen before comes first, else the usual one.
    """

    smallest: dict[str, int] = {}
    asking = []
    for one in fleet:
        model = one.candidate.model
        family = family_of(model)
        smallest[family] = min(smallest.get(family, model.size_bytes), model.size_bytes)
        if may_run(one.candidate, enable):
            asking.append(one)

    def order(one: _Asked) -> tuple[object, ...]:
        candidate, family = one.candidate, family_of(one.candidate.model)
        return (
            candidate.said.enabled is not True, candidate.rule.priority, smallest[family], family,
            not one.was_fitted, rank_of(candidate.model.quantization), candidate.order,
        )  # fmt: skip

    return sorted(asking, key=order)


def _basis(candidate: Candidate) -> str:
    """What a choice depends on; when it changes, the choice is made anew."""
    said, rule, model = candidate.said, candidate.rule, candidate.model
    parts = (
        model.size_bytes, model.header.context_length, said.context, said.parallel, said.device,
        said.gpu_layers, rule.min_context, rule.max_context, *(said.args or ()),
    )  # fmt: skip
    return ",".join(str(part) for part in parts)


def _why(one: _Asked, runs: Configuration, room: Mapping[str, int]) -> str:
    """One line with the numbers: where it is placed, or what is missing."""
    lacking = runs.lacking(room)
    if lacking is not None and lacking not in room:
        return f"does not fit: there is no device {lacking} here"
    placement, needed = runs.placement, runs.estimate
    if lacking is not None:
        return (
            f"does not fit: needs {mib(needed.on(lacking))} at context {placement.context} and "
            f"{mib(margin_bytes(needed, lacking))} to spare, {mib(max(room[lacking], 0))} left on "
            f"{lacking}"
        )
    names = placement.devices or (HOST,)
    taken = ", ".join(f"{mib(needed.on(name))} of {mib(room[name])} left on {name}"
                      for name in names)  # fmt: skip
    trained = one.candidate.model.header.context_length
    of_trained = f" of {trained}" if trained else ""
    return f"{_manner(one, placement)}: {taken}; context {placement.context}{of_trained}"


def _manner(one: _Asked, placement: Placement) -> str:
    every = one.candidate.all_layers
    if placement.devices and placement.layers < every:
        return f"{placement.layers} of {every} layers on {placement.where}"
    if len(placement.devices) > 1:
        return f"split over {placement.where}"
    if not placement.devices and one.search.layers and one.search.offered:
        return f"on the host, with too little room on {one.search.offered}"
    return "fits"


def _program(
    one: _Asked, placed: Configuration, rungs: tuple[Variant, ...], outcome: _Outcome,
    settings: Settings,
) -> Program:  # fmt: skip
    model, candidate = one.candidate.model, one.candidate
    program = Program(
        name=model.name, key=model.key, repo=model.repo, file=model.file,
        tier=candidate.rule.tier, role=model.role, priority=candidate.rule.priority,
        enabled=model.key in outcome.placed,
        reason=outcome.reasons.get(model.key) or why_not(candidate, settings),
        host=settings.host, port=one.port, alias=candidate.alias,
        context=placed.placement.context, parallel=candidate.parallel,
        device=placed.placement.where, estimate=placed.estimate, size_bytes=model.size_bytes,
        quantization=model.quantization, parameters=model.header.parameters,
        model_path=model.path, projector_path=model.projector, shards=model.shards,
        arguments=placed.arguments, fallback=candidate.said.fallback,
        pinned=bool(candidate.said.pinned), ladder=rungs,
    )  # fmt: skip
    if one.edited is not None:
        return as_it_runs(program, one.edited)
    rung = _deployed_rung(one, rungs)
    if not rung:
        return program
    reason = f"stepped down to {rungs[rung].label}; {program.reason}"
    return with_rung(replace(program, reason=reason), rung)


def as_it_runs(program: Program, edited: Configuration) -> Program:
    """What a block that was edited by hand says; the arguments stay those that would be ours."""
    placement = edited.placement
    return replace(
        program, context=placement.context, parallel=load_of(edited.arguments).parallel,
        device=placement.where, estimate=edited.estimate, ladder=(),
    )  # fmt: skip


def _deployed_rung(one: _Asked, rungs: tuple[Variant, ...]) -> int:
    """The rung that says what the deployed one says; 0 where there is none any more."""
    if one.earlier is None or not one.earlier.rung:
        return 0
    names = [ladder.name_of(variant) for variant in rungs]
    return names.index(one.earlier.variant) if one.earlier.variant in names else 0


def _choice(
    one: _Asked, placed: Configuration, program: Program, outcome: _Outcome, settings: Settings
) -> Choice:
    key, placement = program.key, placed.placement
    keeps = one.earlier is not None and one.earlier.placed and one.earlier.placement == placement
    choice = Choice(
        port=program.port, context=placement.context, device=placement.where,
        layers=placement.layers, split=placement.split, offered=one.search.offered,
        fitted=program.enabled and is_by_fit(one.candidate, settings),
        placed=program.enabled and (key in outcome.fitting or keeps), basis=_basis(one.candidate),
    )  # fmt: skip
    return on_rung(choice, program) if program.rung else choice


def on_rung(choice: Choice, program: Program) -> Choice:
    """The choice of a program, with the rung on which that is deployed."""
    if not program.rung:
        return replace(choice, rung=0, variant="", takes=())
    variant = program.ladder[program.rung]
    takes = tuple((part.device, part.total_bytes) for part in variant.estimate.parts)
    return replace(choice, rung=program.rung, variant=ladder.name_of(variant), takes=takes)


def _lost_devices(candidates: Iterable[Candidate], world: World) -> tuple[Device, ...]:
    """Devices that models were planned for, where the engine lists none at all any more.

    A driver that fails makes no model move to the host: no evidence, no change.
    """
    if world.offloading:
        return ()
    seen: dict[str, None] = {}
    for candidate in candidates:
        choice = _earlier(candidate, world)
        if choice is None or not choice.placed:
            continue
        # That the settings name a device does not show that there was one.
        was_listed = candidate.said.device is None
        names = choice.offered.split(",") if was_listed else choice.placement.devices
        seen |= dict.fromkeys(filter(None, names))
    return tuple(Device(name, _UNKNOWN_BYTES, free_bytes=0) for name in seen)


def _without_devices(lost: Sequence[Device]) -> Problem:
    return Problem(
        ",".join(device.name for device in lost),
        "the engine lists no device any more; models that were planned with them stay as they are",
        "mend the driver; where the devices are gone for good, set device = none for these models",
    )


def _idle_fallbacks(programs: Sequence[Program]) -> list[Problem]:
    """`fallback`s that never serve, since they would stand no lower on a ladder."""
    names = {program.name for program in programs}
    return [
        Problem(
            program.name,
            f"its fallback {program.fallback} takes no less memory than the model itself can be "
            "served with, and never serves in its place",
            "name a smaller model as its fallback",
        )
        for program in programs
        if program.fallback in names
        and program.fallback != program.name
        and not ladder.fallback_of(program)
    ]


def _lost_fallbacks(candidates: Iterable[Candidate]) -> list[Problem]:
    """`fallback`s that name no model."""
    every = list(candidates)
    names = {candidate.model.name for candidate in every}
    return [
        Problem(
            candidate.model.name, f"its fallback {candidate.said.fallback} is no model here",
            "give it a name that `synapse plan` shows",
        )
        for candidate in every
        if candidate.said.fallback is not None and candidate.said.fallback not in names
    ]  # fmt: skip
