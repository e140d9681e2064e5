"""What there is, and what shall become of it: a value that somebody else carries out.

Only looks, and changes nothing but caches. So a dry run, a plan and an apply read the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from supervisor_synapse import figures, links, render
from supervisor_synapse.adapters import (
    config_files,
    demo_model,
    generations,
    hfcache,
    intent,
    registry,
    sockets,
)
from supervisor_synapse.adapters import (
    deployment as deployments,
)
from supervisor_synapse.adapters import (
    engine as engines,
)
from supervisor_synapse.adapters.conf_d import command_words
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import digest
from supervisor_synapse.adapters.gpu import cpu
from supervisor_synapse.adapters.header_cache import HeaderCache
from supervisor_synapse.adapters.registry import Entry, Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core.admission import needs_of
from supervisor_synapse.core.arguments import Served, parse_served
from supervisor_synapse.core.catalog import Model, build_catalog, printable
from supervisor_synapse.core.changes import Changes, Deployed, compare
from supervisor_synapse.core.estimate import HOST
from supervisor_synapse.core.model import (
    Device,
    Engine,
    Failure,
    FailureClass,
    Part,
    Problem,
    Program,
)
from supervisor_synapse.core.plan import (
    Choice,
    Plan,
    World,
    make_plan,
    mib,
    unmatched_sections,
)
from supervisor_synapse.core.settings import Reserve, Settings
from supervisor_synapse.core.trials import Rejected, Standings
from supervisor_synapse.errors import ConfigError, ShuttingDown, TransientError

_LONGEST_REASON = 400
_FILE_OPTIONS = frozenset({"-m", "--model", "-mm", "--mmproj"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What shall become of the deployment, and how that differs from what is deployed."""

    blocks: Mapping[str, render.Block]
    links: Mapping[Path, str]  # under var/models → the file meant
    changes: Changes
    registry: Registry  # as it shall be saved
    earlier: Registry  # as it was
    refused: Mapping[str, tuple[render.Block, Failure]] = field(default_factory=dict)
    # changed blocks that cannot work: they are not tried
    not_tried: tuple[str, ...] = ()  # names of these, and of those that failed before
    switched_on: tuple[str, ...] = ()  # programs that the settings enable since now
    switched_off: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery(Change):
    """What was found, too, and what was planned from it."""

    plan: Plan
    problems: tuple[Problem, ...]
    engine: Engine
    devices: tuple[Device, ...]


def discover(
    deployment: Deployment,
    settings: Settings,
    rpc: Supervisord | None = None,
    forced: Iterable[str] = (),
    *,
    demo: bool = False,
) -> Discovery:
    """Look at everything; change nothing but caches.

    `demo`: serve the generated model although there are others; remembered until it is gone.

    Raises:
        ConfigError: settings, engine, templates or permissions must be mended first.
    """
    engine = engines.find(settings.engine)
    _require_readable(deployment)
    earlier = registry.load(deployment.registry)
    running = _running(rpc, earlier)
    found = hfcache.scan(settings.cache_dirs, settings.model_dirs, HeaderCache(deployment.headers))
    catalog = build_catalog(found.files, earlier.names())
    read = (*engines.devices(engine, settings.rpc), cpu.read())
    devices = _with_our_own(read, running)
    demo = (demo or earlier.demo) and any(one.repo == demo_model.REPO for one in catalog.models)
    models = catalog.models if demo else _without_demo(catalog.models)
    on_disk = blocks_on_disk(deployment)
    deployed = deployed_as(on_disk, earlier)
    forced = frozenset(forced)
    forgotten = _forgotten(deployment, catalog.models, earlier)
    ours = {program.port for program in running}
    if rpc is not None:
        ours |= {choice.port for choice in forgotten.values()}
    known = figures.read(deployment, engine, devices, models, earlier.programs)
    world = World(
        devices=devices, engine=engine, earlier=earlier.choices() | forgotten,
        port_is_free=port_check(settings.host, ours), intent=intent.load(deployment.intent),
        known=known.known, scratch=known.scratch,
        edited=_edited(on_disk, deployed, earlier, forced),
    )  # fmt: skip
    ask = partial(
        figures.ask, deployment=deployment, models={model.key: model for model in models},
        free_bytes=min(device.free_bytes for device in read), is_serving=bool(running),
    )  # fmt: skip
    plan = _planned(models, settings, world, known, ask)
    plan, needed = links.reachable(plan, deployment, earlier.paths())
    looked = (*found.problems, *catalog.problems)
    sight = _Sight(found.unread, looked, frozenset(model.key for model in models))
    meant = _meant(
        deployment, settings, engine, devices, earlier, plan, sight, deployed, forced,
        world.port_is_free,
    )  # fmt: skip
    problems = [
        *_lost_registry(deployment), *_missing_cache(settings, models), *looked, *plan.problems,
        *meant.problems, *unmatched_sections(settings, (*catalog.models, *meant.plan.programs)),
        *_unusable_hooks(settings),
    ]  # fmt: skip
    after = _registered(earlier, meant.plan, meant.blocks, meant.changes, settings)
    kept_devices = tuple(replace(device, free_bytes=0) for device in devices)
    return Discovery(
        plan=meant.plan, blocks=meant.blocks, changes=meant.changes,
        links={**links.kept_as_they_are(deployment, meant.plan, plan), **needed},
        problems=tuple(problems), engine=engine, devices=devices,
        registry=replace(
            after, demo=demo, devices=kept_devices, successors=_successors(earlier, meant.plan)
        ),
        earlier=earlier, refused=meant.refused, not_tried=meant.not_tried,
        switched_on=_switched(earlier, meant.plan, on=True),
        switched_off=_switched(earlier, meant.plan, on=False),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sight:
    """What could not be seen, or not for what it is."""

    unread: tuple[str, ...]  # folders
    problems: tuple[Problem, ...]
    keys: frozenset[str]  # of the models that were seen


@dataclass(frozen=True, slots=True)
class _Meant:
    """The blocks that shall be, beside those that are; what stays as it is, and why."""

    plan: Plan
    blocks: Mapping[str, render.Block]
    changes: Changes
    problems: tuple[Problem, ...]
    refused: Mapping[str, tuple[render.Block, Failure]]
    not_tried: tuple[str, ...]


def _meant(
    deployment: Deployment,
    settings: Settings,
    engine: Engine,
    devices: tuple[Device, ...],
    earlier: Registry,
    plan: Plan,
    sight: _Sight,
    deployed: Mapping[str, Deployed],
    forced: Iterable[str],
    port_is_free: Callable[[int], bool],
) -> _Meant:
    """Compare what is planned with what is deployed; what is in doubt stays as it is."""
    around = surroundings(deployment, settings, engine.path)
    templates = render.Templates(deployment.templates)
    blocks, refused = _render(templates, plan.programs, around, earlier.digests())
    known = generations.standings(deployment)
    refusal = partial(
        _refusal, engine=engine, devices=devices, reserve=settings.memory_reserve,
        port_is_free=port_is_free,
    )  # fmt: skip
    blocks, not_tried, failing = _tried(blocks, plan, known, refusal, deployed, forced)
    refused |= {name: _not_tried(name, why) for name, why in not_tried.items()}
    none_found = not plan.programs
    plan = _without_refused(plan, blocks, deployed, earlier)
    unseen = _out_of_sight(plan, sight, deployed, earlier, deployment.links)
    unplanned = _unplanned(plan, sight, deployed, earlier)
    unseen_names = {program.name for program in (*unseen, *unplanned)}
    as_they_are = unseen_names | refused.keys()
    changes = compare(
        _digests(blocks),
        {name: block for name, block in deployed.items() if name not in as_they_are},
        forced,
    )
    plan = _with_kept(plan, (*unseen, *unplanned), earlier)
    plan = _with_edits_told(deployment, plan, blocks, changes)
    changes = replace(changes, kept=tuple(sorted({*changes.kept, *unseen_names})))
    problems = [*map(_unseen, unseen), *refused.values()]
    if changes.removed and none_found:
        problems.append(_all_gone(changes.removed))
        changes = replace(changes, removed=(), kept=changes.kept + changes.removed)
    failed = tuple(name for name, why in not_tried.items() if why.failure is not None)
    return _Meant(plan, blocks, changes, tuple(problems), failing, failed)


_Ask = Callable[[figures.Figures, Sequence[Program]], figures.Figures]


def _planned(
    models: Sequence[Model], settings: Settings, world: World, known: figures.Figures, ask: _Ask
) -> Plan:
    """The plan; where the formula leaves in doubt what fits, made again with the engine's word."""
    plan = make_plan(models, settings, world)
    doubtful = figures.in_doubt(plan.programs, world.devices, settings.memory_reserve)
    told = ask(known, doubtful)
    if told is known:
        return plan
    return make_plan(models, settings, replace(world, known=told.known, scratch=told.scratch))


def generate_demo(settings: Settings) -> Path:
    """A small model of our own, put into the first cache that is searched.

    Raises:
        ConfigError: the cache cannot be written.
    """
    cache = Path(settings.cache_dirs[0] if settings.cache_dirs else hfcache.default_cache_dir())
    return demo_model.generate(cache)


def _running(rpc: Supervisord | None, earlier: Registry) -> tuple[Program, ...]:
    """Those of our programs that supervisord runs now."""
    if rpc is None:
        return ()
    try:
        up = {process.name for process in rpc.processes() if process.pid}
    except (TransientError, ShuttingDown):
        return ()
    return tuple(program for program in earlier.programs if program.name in up)


def _with_our_own(devices: tuple[Device, ...], running: tuple[Program, ...]) -> tuple[Device, ...]:
    """What our own running models hold is counted as free: it is theirs to keep."""
    held: dict[str, int] = {}
    for part in (part for program in running for part in program.estimate.parts):
        held[part.device] = held.get(part.device, 0) + _held_bytes(part)
    return tuple(
        replace(
            device,
            free_bytes=min(device.free_bytes + held.get(device.name, 0), device.total_bytes),
        )
        for device in devices
    )


def _held_bytes(part: Part) -> int:
    """How much less is free by it: weights on the host are pages of a file, which stay free."""
    return part.total_bytes - (part.weights_bytes if part.device == HOST else 0)


def port_check(host: str, ours: set[int]) -> Callable[[int], bool]:
    """Whether a port can be had; those of our own running models can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def is_free(port: int) -> bool:
        if port in ours:
            return True
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections in TIME_WAIT do not keep a server from binding, and must not here.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
        return True

    return is_free


def _without_demo(models: tuple[Model, ...]) -> tuple[Model, ...]:
    """The generated model is served only where there is nothing else."""
    real = tuple(model for model in models if model.repo != demo_model.REPO)
    return real or models


def surroundings(deployment: Deployment, settings: Settings, engine: str) -> render.Surroundings:
    around = render.Surroundings(
        launcher=deployments.launcher_command(), engine=engine, stop=settings.stop,
        directory=str(deployment.prefix), log_folder=str(deployment.log),
        run_folder=str(deployment.run),
    )  # fmt: skip
    render.require_safe(around)
    return around


def _render(
    templates: render.Templates,
    programs: Iterable[Program],
    around: render.Surroundings,
    checked: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, render.Block], dict[str, Problem]]:
    """Blocks by name, and why others were refused. A template that does not render costs all.

    A text with a digest in `checked` was parsed back when it was first rendered.
    """
    blocks: dict[str, render.Block] = {}
    refused: dict[str, Problem] = {}
    for program in programs:
        try:
            block = render.render_program(templates, program, around)
        except render.ValueRefused as error:
            refused[program.name] = Problem(program.name, str(error), "give its file another name")
            continue
        try:
            if digest(block.text) not in checked.get(block.name, ()):
                config_files.check_block(block, render.BLOCK_KEYS)
        except ConfigError as error:
            why = printable(str(error), _LONGEST_REASON)
            refused[block.name] = Problem(block.name, why, "mend etc/templates/program.conf.j2")
        else:
            blocks[block.name] = block
    return blocks, refused


def _tried(
    blocks: Mapping[str, render.Block],
    plan: Plan,
    known: Standings,
    refusal: Callable[[Program], Failure | None],
    deployed: Mapping[str, Deployed],
    forced: Iterable[str],
) -> tuple[dict[str, render.Block], dict[str, Rejected], dict[str, tuple[render.Block, Failure]]]:
    """Blocks that may stand; why others are not tried; and those of them that are refused only now.

    A model that has nothing good to go back to is started all the same: its own failure tells more.
    """
    force = set(forced)
    programs = {program.name: program for program in plan.programs}
    kept, not_tried, refused = {}, {}, {}
    for name, block in blocks.items():
        standing, there, named = known.get(name), deployed.get(name), digest(block.text)
        is_changed = there is not None and there.digest != named
        rejection = None
        if is_changed and standing is not None and standing.good and name not in force:
            before = standing.rejection(named)
            rejection = before if before is not None and before.was_tried else None
            failure = None if rejection else refusal(programs[name])
            if failure is not None:
                rejection = Rejected(named, standing.generation, failure, was_tried=False)
                refused[name] = (block, failure)
        if rejection is None:
            kept[name] = block
        else:
            not_tried[name] = rejection
    return kept, not_tried, refused


def _refusal(
    program: Program,
    engine: Engine,
    devices: Iterable[Device],
    reserve: Reserve,
    port_is_free: Callable[[int], bool],
) -> Failure | None:
    """Why a program cannot work on this machine now: its port, by the engine's own word on its
    arguments, or by what it needs. It is not started for that.
    """
    if not port_is_free(program.port):
        who = sockets.foreign_listener(program.port, 0) or "somebody else"
        words = f"port {program.port} is in use by {who}"
        return Failure(FailureClass.PORT_IN_USE, words, time.time())
    said = engines.refusal(engine, program.arguments)
    if said:
        return Failure(FailureClass.BAD_ARGUMENT, said, time.time())
    short = [
        f"needs {mib(needed)} of {device.name}, which has {mib(device.total_bytes)}"
        for device in devices
        for name, needed in needs_of(program.estimate)
        if name == device.name and needed > device.total_bytes - reserve.of(device.total_bytes)
    ]
    return Failure(FailureClass.OUT_OF_MEMORY, "; ".join(short), time.time()) if short else None


def _not_tried(name: str, why: Rejected) -> Problem:
    if why.failure is None:
        words = "somebody went back from what synapse.conf says by command; its block stays"
        return Problem(name, words, f"change synapse.conf, or `synapse discover --force {name}`")
    words = f"{why.failure.failure_class.value}: {why.failure.message}"
    when = "failed before" if why.was_tried else "cannot work"
    return Problem(
        name, f"what synapse.conf says now {when}, and is not tried: {words}; its block stays",
        f"change it, or `synapse discover --force {name}`",
    )  # fmt: skip


def _without_refused(
    plan: Plan,
    blocks: Mapping[str, render.Block],
    deployed: Mapping[str, Deployed],
    earlier: Registry,
) -> Plan:
    """The plan without programs that got no block; one that is deployed stays as it was."""
    before = {program.key: program for program in earlier.programs}
    programs = []
    choices = dict(plan.choices)
    for program in plan.programs:
        if program.name in blocks:
            programs.append(program)
        elif program.name in deployed and program.key in before:
            programs.append(before[program.key])
            choices[program.key] = earlier.entries[program.key].choice
    return replace(plan, programs=tuple(programs), choices=choices)


def _out_of_sight(
    plan: Plan,
    sight: _Sight,
    deployed: Mapping[str, Deployed],
    earlier: Registry,
    folder: Path,
) -> tuple[Program, ...]:
    """Programs whose file could not be looked at: an unmounted disk removes nothing.

    Nor does a file that is there and was found damaged: what serves it has it in memory, and goes
    on.
    """
    roots = {Path(way(root)) for root in sight.unread for way in (str, os.path.realpath)}

    def is_unseen(program: Program) -> bool:
        path = links.real_model_path(program, folder)
        told = any(program.file in problem.subject for problem in sight.problems)
        is_damaged = told and os.path.lexists(path)
        return is_damaged or not roots.isdisjoint(path.parents)

    return tuple(
        program
        for program in earlier.programs
        if program.key not in plan.choices and program.name in deployed and is_unseen(program)
    )


def _unplanned(
    plan: Plan, sight: _Sight, deployed: Mapping[str, Deployed], earlier: Registry
) -> tuple[Program, ...]:
    """Programs whose model is there and got no place in the plan, which says why: they go on."""
    return tuple(
        program
        for program in earlier.programs
        if program.key in sight.keys - plan.choices.keys() and program.name in deployed
    )


def _unseen(program: Program) -> Problem:
    return Problem(
        program.name,
        "left as it is, since its file could not be looked at",
        "check that its disk is mounted, mend the file, or take its folder out of synapse.conf",
    )


def _with_kept(plan: Plan, kept: tuple[Program, ...], earlier: Registry) -> Plan:
    """The plan with programs that stay as they were, in their place by priority."""
    programs = sorted((*plan.programs, *kept), key=lambda program: program.priority)
    choices = {program.key: earlier.entries[program.key].choice for program in kept}
    return replace(plan, programs=tuple(programs), choices={**plan.choices, **choices})


def _with_edits_told(
    deployment: Deployment, plan: Plan, blocks: Mapping[str, render.Block], changes: Changes
) -> Plan:
    """What was edited by hand runs, and answers, as it was edited, not as planned."""
    edited = set(changes.kept).intersection(blocks)
    programs = []
    for program in plan.programs:
        if program.name in edited:
            text = deployment.block(program.name).read_text("utf-8", "replace")
            reason = f"edited by hand, see its block; {program.reason}"
            program = replace(answering(program, text), reason=reason)
        programs.append(program)
    return replace(plan, programs=tuple(programs))


def _digests(blocks: Mapping[str, render.Block]) -> dict[str, str]:
    return {name: digest(block.text) for name, block in blocks.items()}


def blocks_on_disk(deployment: Deployment) -> dict[str, bytes]:
    """The blocks on disk, by the name of their file."""
    return {path.stem: _block_bytes(path) for path in sorted(deployment.blocks.glob("*.conf"))}


def deployed_as(blocks: Mapping[str, bytes], earlier: Registry) -> dict[str, Deployed]:
    written = earlier.digests()
    return {
        name: Deployed(hashlib.sha256(text).hexdigest(), written.get(name, ()))
        for name, text in blocks.items()
    }


def _edited(
    blocks: Mapping[str, bytes],
    deployed: Mapping[str, Deployed],
    earlier: Registry,
    forced: Container[str],
) -> dict[str, tuple[str, ...]]:
    """What blocks that were edited by hand, and stay so, tell the server, by model key."""
    found = {}
    for key, entry in earlier.entries.items():
        block = deployed.get(entry.name)
        if block is None or block.is_ours or not block.written or entry.name in forced:
            continue
        arguments = arguments_in(blocks[entry.name].decode("utf-8", "replace"))
        if arguments is not None:
            found[key] = arguments
    return found


def arguments_in(block: str) -> tuple[str, ...] | None:
    """What the command of a block tells llama-server, beside the files; None: it runs no such."""
    words = command_words(block)
    if "--" not in words:
        return None
    words = words[words.index("--") + 2 :]
    files = {at + step for at, word in enumerate(words) if word in _FILE_OPTIONS for step in (0, 1)}
    return tuple(word for at, word in enumerate(words) if at not in files)


def _block_bytes(path: Path) -> bytes:
    """The content of a block on disk.

    Raises:
        ConfigError: supervisord could not read it either; it takes such a one for removed.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: is not a regular file; remove it")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; chmod u+r {path}") from None


def _require_readable(deployment: Deployment) -> None:
    """Refuse to take for absent what is only out of reach: it would be written over.

    Raises:
        ConfigError: one line for each, with the command that mends it.
    """
    folders = [
        f"cannot look into {folder}: chmod u+rwx {folder}"
        for folder in (deployment.blocks, deployment.lib, deployment.links, deployment.run)
        if folder.exists() and not os.access(folder, os.R_OK | os.X_OK)
    ]
    if folders:
        raise ConfigError(folders)
    path = deployment.registry
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is not a regular file; move it away")
    if path.exists() and not os.access(path, os.R_OK):
        raise ConfigError(f"cannot read {path}: chmod u+rw {path}")


def _missing_cache(settings: Settings, models: Sequence[Model]) -> list[Problem]:
    """Where nothing was found: that the default cache, which need not exist, does not."""
    if settings.cache_dirs or models:
        return []
    folder = hfcache.default_cache_dir()
    if os.path.isdir(folder):
        return []
    return [
        Problem(
            printable(folder), "this cache does not exist, and no other place holds a model",
            "download a model with `synapse pull REPO`, or name the folders that hold models as "
            "cache_dirs or model_dirs in synapse.conf",
        )
    ]  # fmt: skip


def _unusable_hooks(settings: Settings) -> list[Problem]:
    """Else they would show only when they are first needed."""
    notify = settings.notify
    if not notify.command and not notify.url_header_file:
        return []
    from supervisor_synapse.adapters import hooks  # not small, and seldom needed

    found = hooks.problems(notify.command, notify.url_header_file)
    return [Problem("[notify]", reason) for reason in found]


def _lost_registry(deployment: Deployment) -> list[Problem]:
    """Said until there is a registry again."""
    aside = deployment.registry.with_name(deployment.registry.name + ".corrupt")
    if deployment.registry.exists() or not aside.exists():
        return []
    return [
        Problem(
            str(deployment.registry),
            f"could not be used and was set aside as {aside.name}; "
            "ports are taken from the blocks in etc/conf.d, the rest is chosen anew",
            "`synapse discover --force MODEL`, where a block is kept as edited by hand",
        )
    ]


def _forgotten(
    deployment: Deployment, models: Iterable[Model], earlier: Registry
) -> dict[str, Choice]:
    """What blocks on disk say of models that the registry does not know: their ports.

    So a registry that was lost costs no model its port, nor its block the name of being ours.
    """
    found = {}
    for model in models:
        path = deployment.block(model.name)
        if model.key in earlier.entries or not path.exists():
            continue
        port = _port_in(_block_bytes(path).decode("utf-8", "replace"))
        if port is not None:
            found[model.key] = Choice(port, context=0, device="", fitted=False, basis="")
    return found


def _port_in(block: str) -> int | None:
    """What the command of a block gives as its port."""
    command = re.search(r"^command=(.*)$", block, re.MULTILINE)
    said = re.search(r" --port (\d{4,5})( |$)", command[1]) if command else None
    return int(said[1]) if said else None


def _all_gone(removed: tuple[str, ...]) -> Problem:
    return Problem(
        "discovery",
        f"no model is left where there were {len(removed)}; nothing was removed",
        "check that the cache is mounted; to remove them all the same, delete their files in "
        "etc/conf.d and run supervisorctl update",
    )


def _registered(
    earlier: Registry,
    plan: Plan,
    blocks: Mapping[str, render.Block],
    changes: Changes,
    settings: Settings,
) -> Registry:
    """The registry after this discovery; models that were not found keep their place in it."""
    entries = {key: replace(entry, present=False) for key, entry in earlier.entries.items()}
    for program in plan.programs:
        known = earlier.entries.get(program.key)
        digests = known.digests if known else ()
        block = blocks.get(program.name)
        if block is not None:
            digests = registry.with_digest(digests, digest(block.text))
        entries[program.key] = Entry(
            name=program.name, key=program.key, choice=plan.choices[program.key],
            digests=digests, present=True,
        )  # fmt: skip
    programs = plan.programs if plan.programs else earlier.programs
    generation = earlier.generation + (1 if changes else 0)
    return Registry(entries, programs, settings, generation, untold=earlier.untold)


def _switched(earlier: Registry, plan: Plan, *, on: bool) -> tuple[str, ...]:
    """Programs that were deployed before, and are enabled (or not) only now."""
    before = {program.name: program.enabled for program in earlier.programs}
    return tuple(
        program.name
        for program in plan.programs
        if program.enabled is on and before.get(program.name, on) is not on
    )


def answering(program: Program, text: str) -> Program:
    """The program where its block has it answer."""
    planned = Served(
        program.host, program.port, program.alias, program.context, program.parallel, None, 0
    )
    served = parse_served(command_words(text), planned) or planned
    return replace(program, host=served.host, port=served.port, alias=served.alias)


def _successors(earlier: Registry, plan: Plan) -> dict[str, str]:
    """Models that the settings replace by another quantization: the old one → the new one.

    Those of earlier discoveries hold until the settings say otherwise.
    """
    programs = {program.name: program for program in plan.programs}
    found = {
        old: new
        for old, new in earlier.successors.items()
        if old in programs and new in programs
        and programs[new].enabled and not programs[old].enabled
    }  # fmt: skip
    switched_off = _switched(earlier, plan, on=False)
    before = {program.name for program in earlier.programs if program.enabled}
    for old in switched_off:
        for program in plan.programs:
            is_new = program.enabled and program.name not in before
            if is_new and _is_same_model(programs[old], program):
                found[old] = program.name
    return found


def _is_same_model(one: Program, other: Program) -> bool:
    return (
        one.repo is not None
        and (one.repo, one.role, one.parameters) == (other.repo, other.role, other.parameters)
    )  # fmt: skip
