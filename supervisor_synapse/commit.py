"""Changes of a deployment, each whole or not at all: written ahead, then carried out.

    1  the new blocks and the generation are kept in var/lib/generations
    2  the registry names the generation, and the programs of which supervisord is still to be told
    3  what is known of the blocks (trials.json)
    4  the blocks in etc/conf.d
    5  supervisord is told by the listener, one model after the other, and each is crossed off

Killed before step 2, nothing has happened. Killed after it, whoever comes next carries on at
step 3 (`complete`), from what was kept in step 1. All of it under one lock, which nobody holds for
long.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from supervisor_synapse.adapters import conf_d, generations, registry, store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import Kept
from supervisor_synapse.adapters.registry import Entry, Registry
from supervisor_synapse.core import trials
from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Failure
from supervisor_synapse.core.trials import Generation, Standing

_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of a deployment: the registry after it, and the blocks that it writes."""

    registry: Registry
    written: tuple[Kept, ...] = ()
    standing: tuple[Kept, ...] = ()  # those that stay as they are
    renewed: tuple[str, ...] = ()  # of these: to be made new in supervisord all the same
    removed: tuple[str, ...] = ()
    forced: frozenset[str] = frozenset()  # digests of edited blocks that are overwritten


@contextlib.contextmanager
def locked(deployment: Deployment) -> Iterator[None]:
    """Nobody else changes the deployment meanwhile.

    Raises:
        TransientError: somebody does.
    """
    with store.exclusive(deployment.lock, "another change of this deployment", _LOCK_SECONDS):
        yield


def commit(
    deployment: Deployment, step: Step, generation: Generation | None, *, tell: bool
) -> Generation | None:
    """Carry out a change, up to telling supervisord. For whoever holds the lock. The generation as
    it was written down.

    Without a `generation` the blocks say what they said before, on another port or rung. Not
    `tell`: there is no supervisord; it will read the files.

    Raises:
        OSError: nothing has happened; where not even that could be written, `complete` does the
            rest when there is room.
    """
    known = generations.standings(deployment)
    generations.keep(deployment, (*step.written, *step.standing))
    if generation is not None:
        stay = {name: one.digest for name, one in known.items() if name not in step.removed}
        new = {block.name: block.digest for block in (*step.standing, *step.written)}
        number = _number(deployment, generation.number, known)
        generation = replace(generation, number=number, blocks=stay | new)
        step = replace(step, registry=replace(step.registry, generation=number))
        generations.record(deployment, generation)
    digests = {block.name: block.digest for block in (*step.standing, *step.written)}
    untold = dict(step.registry.untold)
    untold |= {name: digests.get(name, "") for name in step.renewed if name in digests}
    untold |= {block.name: block.digest for block in step.written}
    untold |= dict.fromkeys(step.removed, "")
    entries = _with_forced(step)
    after = replace(step.registry, entries=entries, untold=untold)
    before = registry.load(deployment.registry)
    if not registry.is_same(before, after):
        registry.save(deployment.registry, after)
    there = {name: _content(deployment, name) for name in untold}
    try:
        _carry_out(deployment, after, generation)
    except OSError:
        with contextlib.suppress(OSError):  # else it is carried out when there is room
            _undo(deployment, there, known, before)
        raise
    _know_the_rest(deployment, step)
    # All blocks stand: from now on only the newest text is ours, and a hand edit back to an older
    # one is an edit like any other.
    settled = registry.settled(after if tell else replace(after, untold={}))
    if settled != after:
        registry.save(deployment.registry, settled)
    if generation is not None:
        generations.prune(deployment, generations.standings(deployment))
    return generation


def _content(deployment: Deployment, name: str) -> str | None:
    """The text of a block; None where there is none, or it is not ours to write again."""
    path = deployment.block(name)
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _undo(
    deployment: Deployment,
    there: Mapping[str, str | None],
    known: trials.Standings,
    before: Registry,
) -> None:
    """Somebody was told that it failed: it must not come about later, when he is not looking.

    The registry comes last: as long as it names the change, whoever comes next carries that out.
    """
    for name, text in there.items():
        now = _content(deployment, name)
        if text is None and now is not None:
            deployment.block(name).unlink()
        elif text is not None and now != text:
            store.write_text(deployment.block(name), text)
    if generations.standings(deployment) != known:
        generations.save_standings(deployment, known)
    if registry.load(deployment.registry) != before:
        registry.save(deployment.registry, before)


def _number(deployment: Deployment, meant: int, known: trials.Standings) -> int:
    """The number of a new generation: where the registry was lost, others have the one meant, and
    what it brings would pass for known.
    """
    used = [0, *generations.numbers(deployment), *(one.generation for one in known.values())]
    is_free = max(used) <= meant and all(one.generation < meant for one in known.values())
    return meant if is_free else max(used) + 1


def _with_forced(step: Step) -> dict[str, Entry]:
    """Until all blocks stand, an edited one that is overwritten counts as ours: whoever carries on
    has to know it, too.
    """
    names = {block.name for block in step.written}
    return {
        key: replace(entry, digests=(*entry.digests, *sorted(step.forced)))
        if entry.name in names
        else entry
        for key, entry in step.registry.entries.items()
    }


def complete(deployment: Deployment) -> None:
    """Carry on where somebody was killed; for whoever holds the lock, before a change of his own.

    Raises:
        OSError: it is still not done.
    """
    found = registry.load(deployment.registry)
    generation = generations.load(deployment, found.generation)
    if generation is not None:
        generation = _what_is_sure(deployment, found, generation)
    elif not found.untold:
        return
    is_done = _carry_out(deployment, found, generation)
    settled = registry.settled(found)
    if is_done and settled != found:
        registry.save(deployment.registry, settled)


def _what_is_sure(deployment: Deployment, found: Registry, generation: Generation) -> Generation:
    """Of a generation: where trials.json was lost, a block may have been rendered anew since."""
    known = generations.standings(deployment)

    def is_sure(name: str) -> bool:
        is_told_of = name in known or name in found.untold
        return is_told_of or conf_d.digest_there(deployment.block(name)) == generation.blocks.get(
            name
        )

    return replace(
        generation, added=tuple(filter(is_sure, generation.added)),
        changed=tuple(filter(is_sure, generation.changed)),
    )  # fmt: skip


def _carry_out(
    deployment: Deployment,
    found: Registry,
    generation: Generation | None,
) -> bool:
    """Steps 3 and 4; what is done already is left alone. Whether no block that it takes is lost."""
    known = generations.standings(deployment)
    after = known if generation is None else trials.taken_up(known, generation)
    for name, digest in found.untold.items():
        standing = after.get(name)
        if digest and standing is not None and standing.digest != digest:
            after = {**after, name: trials.rendered_anew(standing, digest)}
    if after != known:
        generations.save_standings(deployment, after)
    failures = {} if generation is None else generation.failures
    ours = found.digests()
    is_done = True
    for name, digest in found.untold.items():
        mine = (*ours.get(name, ()), *_digests(known.get(name)), *_digests(after.get(name)))
        there = conf_d.digest_there(deployment.block(name))
        if there and there not in mine:
            continue  # edited by hand since: that is looked at by itself
        if digest and there != digest:
            is_done = _write(deployment, name, digest, failures.get(name)) and is_done
        elif not digest:
            deployment.block(name).unlink(missing_ok=True)
    return is_done


def _digests(standing: Standing | None) -> tuple[str, ...]:
    """Of all blocks of a model that we know."""
    if standing is None:
        return ()
    good = (one.digest for one in standing.good)
    rejected = (one.digest for one in standing.rejected)
    return (standing.digest, *good, *rejected)


def _write(deployment: Deployment, name: str, digest: str, why: Failure | None) -> bool:
    """Put a kept block in place of what is there; that is left beside where it failed. Whether it
    is kept.
    """
    path = deployment.block(name)
    kept = generations.kept(deployment, digest)
    if kept is None:
        return False
    if why is not None and path.exists():
        _reject_what_is_there(deployment, name, why)
    store.write_text(path, kept.text)
    return True


def _reject_what_is_there(deployment: Deployment, name: str, why: Failure) -> None:
    text = deployment.block(name).read_text("utf-8", "replace")
    beside = reject(deployment, name, text, why)
    standing = generations.standings(deployment).get(name)
    if standing is not None and standing.refused is not None:
        after = trials.rejected(standing, standing.refused, beside)
        keep_standings(deployment, {name: after})


def _know_the_rest(deployment: Deployment, step: Step) -> None:
    """Blocks of which nothing is known yet, as after an upgrade."""
    known = generations.standings(deployment)
    new = {
        block.name: Standing(block.digest, step.registry.generation)
        for block in step.standing
        if block.name not in known
    }
    if new:
        generations.save_standings(deployment, known | new)


def reject(deployment: Deployment, name: str, text: str, why: Failure) -> str:
    """Leave a block that failed beside, with the reason on top; the digest of all that.

    Raises:
        OSError: nothing was changed.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(why.at))
    head = (
        f"; Rejected at {when}: {why.failure_class.value}\n"
        f"; {printable(why.message)}\n"
        "; The same content is not tried again. Mend it, copy it back as "
        f"{name}.conf, then: supervisorctl update\n"
    )
    store.write_text(deployment.rejected(name), head + text)
    return generations.digest(head + text)


def keep_standings(deployment: Deployment, changed: Mapping[str, Standing]) -> None:
    """Write what has become of some models' blocks; for whoever holds the lock.

    Raises:
        OSError: nothing was changed.
    """
    known = generations.standings(deployment)
    after = known | dict(changed)
    if after != known:
        generations.save_standings(deployment, after)


def kept_of(found: Registry, texts: Mapping[str, str], names: Iterable[str]) -> tuple[Kept, ...]:
    """Blocks as they are to be kept, of the programs `names`; `texts` are discovery's own."""
    programs = {program.name: program for program in found.programs}
    return tuple(
        Kept(name, texts[name], True, programs[name], found.entries[programs[name].key].choice)
        for name in names
        if name in programs and name in texts
    )


def digest_of(content: bytes) -> str:
    """Names the content of a block on disk."""
    return hashlib.sha256(content).hexdigest()
