"""Single models rendered anew, or read from blocks that were edited: for the listener.

Each takes the lock for a moment and is whole or not at all (commit.py). None waits for a process:
what runs is stopped by the listener first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from supervisor_synapse import commit as commits
from supervisor_synapse import discovery, rollback
from supervisor_synapse.adapters import generations, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import Kept
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core import trials
from supervisor_synapse.core.trials import Generation, Standing
from supervisor_synapse.discovery import Change


def move_port(deployment: Deployment, name: str) -> None:
    """Give one program, which does not run, another free port; all else stays as it was applied.

    Raises:
        ConfigError: its port is not ours to choose, or there is none left.
        ApplyError, TransientError: it could not be carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        _render_anew(deployment, name, discovery.with_another_port(deployment, name))


def set_rung(deployment: Deployment, name: str, rung: int) -> None:
    """Serve one program, which does not run, as another rung of its ladder says.

    Raises:
        ConfigError: there is no such rung, or its block was edited by hand.
        ApplyError, TransientError: it could not be carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        _render_anew(deployment, name, discovery.with_another_rung(deployment, name, rung))


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
        edited = discovery.as_edited(deployment, earlier, {name: texts[name] for name in changed})
        after = rollback.with_programs(earlier, edited)
        is_ours = {name: digests[name] in earlier.digests().get(name, ()) for name in changed}
        after = replace(after, generation=commits.next_generation(deployment, earlier))
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
