"""Single models rendered anew, or read from blocks that were edited: for the listener.

Each takes the lock for a moment and is whole or not at all (commit.py). None waits for a process:
what runs is stopped by the listener first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from supervisor_synapse import commit as commits
from supervisor_synapse import discovery, figures, links, render, rollback
from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import generations, hfcache, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import Kept, digest
from supervisor_synapse.adapters.gpu import cpu
from supervisor_synapse.adapters.header_cache import HeaderCache
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core import trials
from supervisor_synapse.core.candidates import repo_file
from supervisor_synapse.core.catalog import Model, build_catalog
from supervisor_synapse.core.changes import Deployed, compare
from supervisor_synapse.core.model import Program
from supervisor_synapse.core.placement import as_edited as as_configured
from supervisor_synapse.core.plan import (
    Choice,
    World,
    as_it_runs,
    on_rung,
    with_port,
    with_rung,
)
from supervisor_synapse.core.trials import Generation, Standing
from supervisor_synapse.discovery import Change
from supervisor_synapse.errors import ConfigError


def move_port(deployment: Deployment, name: str) -> None:
    """Give one program, which does not run, another free port; all else stays as it was applied.

    Raises:
        ConfigError: its port is not ours to choose, or there is none left.
        ApplyError, TransientError: it could not be carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        _render_anew(deployment, name, _with_another_port(deployment, name))


def set_rung(deployment: Deployment, name: str, rung: int) -> None:
    """Serve one program, which does not run, as another rung of its ladder says.

    Raises:
        ConfigError: there is no such rung, or its block was edited by hand.
        ApplyError, TransientError: it could not be carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        _render_anew(deployment, name, _with_another_rung(deployment, name, rung))


def _render_anew(deployment: Deployment, name: str, change: Change) -> None:
    texts = {block.name: block.text for block in change.blocks.values()}
    written = commits.kept_of(change.registry, texts, change.changes.changed)
    commits.commit(
        deployment, commits.Step(registry=change.registry, written=written), None, tell=True
    )
    rollback.tell(deployment, Supervisord(deployment.socket), (name,))


def adopt(deployment: Deployment, seen: Mapping[str, str]) -> None:
    """Blocks that were edited by hand, and that supervisord has taken up, are a generation.

    `seen`: their digests by name; one that was edited again since then is left for later.

    Raises:
        OSError, TransientError: it was not written down.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        earlier = registry.load(deployment.registry)
        known = generations.standings(deployment)
        programs = {program.name: program for program in earlier.programs}
        texts = {}
        for name, digest in seen.items():
            path = deployment.block(name)
            if name in programs and path.is_file():
                # Byte for byte: a block is known by them, whatever ends its lines.
                content = path.read_bytes()
                if commits.digest_of(content) == digest:
                    texts[name] = content.decode("utf-8")
        digests = {name: generations.digest(text) for name, text in texts.items()}
        changed = tuple(
            name for name, now in digests.items() if known.get(name, Standing()).digest != now
        )
        if not changed:
            return
        edited = _as_edited(deployment, earlier, {name: texts[name] for name in changed})
        after = rollback.with_programs(earlier, edited)
        is_ours = {name: digests[name] in earlier.digests().get(name, ()) for name in changed}
        after = replace(after, generation=earlier.generation + 1)
        written = tuple(_kept(after, name, texts[name], is_ours=is_ours[name]) for name in changed)
        generation = Generation(
            after.generation, time.time(), trials.UPDATE, _why_adopted(is_ours), {},
            changed=changed,
        )  # fmt: skip
        # Supervisord holds it already.
        step = commits.Step(registry=after, standing=written)
        commits.commit(deployment, step, generation, tell=True)


def _why_adopted(is_ours: Mapping[str, bool]) -> str:
    by_hand = [name for name, ours in is_ours.items() if not ours]
    return "edited by hand" if by_hand else "found as it stands"


def _kept(found: Registry, name: str, text: str, *, is_ours: bool) -> Kept:
    program = next(one for one in found.programs if one.name == name)
    return Kept(name, text, is_ours, program, found.entries[program.key].choice)


def _with_another_port(deployment: Deployment, name: str) -> Change:
    """What was applied, but for one program another free port.

    Raises:
        ConfigError: its port is not ours to choose, or there is none left.
    """
    earlier = registry.load(deployment.registry)
    program = _program_called(name, earlier)
    if earlier.settings.for_model(name, repo_file(program)).port is not None:
        raise ConfigError(f"{name}: port {program.port} is set in synapse.conf, and is taken")
    moved = with_port(program, _free_port(earlier))
    choice = replace(earlier.entries[program.key].choice, port=moved.port)
    return _with_one_changed(deployment, earlier, moved, choice, "choose another port there")


def _with_another_rung(deployment: Deployment, name: str, rung: int) -> Change:
    """What was applied, but for one program another rung of its ladder.

    Raises:
        ConfigError: there is no such rung, or its block was edited by hand.
    """
    earlier = registry.load(deployment.registry)
    program = _program_called(name, earlier)
    if not 0 <= rung < len(program.ladder):
        raise ConfigError(f"{name}: its ladder has {len(program.ladder)} rungs, and no {rung}")
    stepped = with_rung(program, rung)
    choice = on_rung(earlier.entries[program.key].choice, stepped)
    return _with_one_changed(deployment, earlier, stepped, choice, "give it less to hold there")


def _program_called(name: str, earlier: Registry) -> Program:
    program = next((program for program in earlier.programs if program.name == name), None)
    if program is None:
        raise ConfigError(f"{name}: there is no such model")
    return program


def _with_one_changed(
    deployment: Deployment, earlier: Registry, program: Program, choice: Choice, advice: str
) -> Change:
    """What was applied, but for one program.

    Raises:
        ConfigError: its block is not ours to change; `advice` tells what to do about that.
    """
    name, settings = program.name, earlier.settings
    around = discovery.surroundings(deployment, settings, engines.locate(settings.engine))
    block = render.render_program(render.Templates(deployment.templates), program, around)
    deployed = discovery.deployed_as(discovery.blocks_on_disk(deployment), earlier)
    changes = compare({name: digest(block.text)}, _only(name, deployed))
    if not (changes.changed or changes.unchanged):
        raise ConfigError(f"{name}: its block was edited by hand: {advice}")
    programs = tuple(program if one.name == name else one for one in earlier.programs)
    entry = earlier.entries[program.key]
    entry = replace(
        entry, choice=choice, digests=registry.with_digest(entry.digests, digest(block.text))
    )
    entries = {**earlier.entries, program.key: entry}
    after = replace(earlier, entries=entries, programs=programs)
    as_they_are = links.current(deployment)
    return Change(
        blocks={name: block}, links=as_they_are, changes=changes, registry=after, earlier=earlier
    )


def _only(name: str, deployed: Mapping[str, Deployed]) -> dict[str, Deployed]:
    return {key: value for key, value in deployed.items() if key == name}


def _free_port(earlier: Registry) -> int:
    """The first port of the range that no model of ours has and no stranger listens on."""
    settings = earlier.settings
    taken = {choice.port for choice in earlier.choices().values()}
    is_free = discovery.port_check(settings.host, set())
    for port in range(settings.first_port, settings.last_port + 1):
        if port not in taken and is_free(port):
            return port
    raise ConfigError(
        f"no port is left in {settings.first_port}-{settings.last_port}: widen port_range"
    )


def _as_edited(
    deployment: Deployment, earlier: Registry, texts: Mapping[str, str]
) -> dict[str, Program]:
    """Programs by name, as blocks that were edited by hand (`texts`, by name) say.

    What they take is estimated where their models can be found; else it stays as it was.
    """
    arguments = {
        program.key: said
        for program in earlier.programs
        if program.name in texts
        and (said := discovery.arguments_in(texts[program.name])) is not None
    }
    try:
        world, models = _as_applied(deployment, earlier)
    except ConfigError:
        return {}
    found = {}
    for program in earlier.programs:
        model, said = models.get(program.key), arguments.get(program.key)
        if model is not None and said is not None:
            edited = as_it_runs(program, as_configured(model, said, world))
            edited = discovery.answering(edited, texts[program.name])
            reason = "edited by hand, see its block"
            found[program.name] = replace(edited, rung=0, reason=reason)
    return found


def _as_applied(deployment: Deployment, earlier: Registry) -> tuple[World, dict[str, Model]]:
    """What the applied plan was made from, as far as estimates need it; and the models by key.

    Raises:
        ConfigError: there is no engine.
    """
    settings = earlier.settings
    engine = engines.find(settings.engine)
    found = hfcache.scan(settings.cache_dirs, settings.model_dirs, HeaderCache(deployment.headers))
    models = build_catalog(found.files, earlier.names()).models
    devices = earlier.devices or (cpu.read(),)
    known = figures.read(deployment, engine, devices, models, earlier.programs)
    world = World(
        devices=devices, engine=engine, earlier={}, port_is_free=lambda port: True,
        known=known.known, scratch=known.scratch,
    )  # fmt: skip
    return world, {model.key: model for model in models}
