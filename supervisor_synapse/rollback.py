"""What becomes of applied blocks: taken up, proved, set aside, rolled back. For the listener, and
for `synapse rollback`.

Each takes the lock for a moment and is whole or not at all (commit.py). None waits for a process:
what runs is stopped by the listener first. Imports nothing of discovery, which is not small.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from supervisor_synapse import commit as commits
from supervisor_synapse.adapters import conf_d, config_files, generations, registry, store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import Kept
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core import trials
from supervisor_synapse.core.model import Failure, FailureClass, Program
from supervisor_synapse.core.trials import Generation, Good, Rejected, Standing
from supervisor_synapse.errors import ConfigError, RollbackFailed, TransientError

# What a block says of its program; the rest (why it is enabled, its tier …) is of today.
_OF_THE_BLOCK = (
    "host", "port", "alias", "context", "parallel", "device", "estimate", "size_bytes",
    "quantization", "model_path", "projector_path", "shards", "arguments", "ladder", "rung",
)  # fmt: skip


def renew(deployment: Deployment, names: Sequence[str]) -> None:
    """Have supervisord take up what has become of programs; one that runs stays as it is.

    Raises:
        OSError, TransientError: it was not taken up, or not for certain.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        tell(deployment, Supervisord(deployment.socket), names)


def tell(deployment: Deployment, rpc: Supervisord, names: Sequence[str]) -> None:
    """The same, for whoever holds the lock."""
    rpc.reread()
    told = []
    for name in names:
        process = rpc.process(name)
        if process is not None and process.pid:
            continue
        if process is not None:
            rpc.remove(name)
        if deployment.block(name).exists():
            rpc.add(name)
        told.append(name)
    _forget_untold(deployment, told)


def told_of(deployment: Deployment, names: Sequence[str]) -> None:
    """Supervisord holds of these programs what it shall hold, as it seemed to somebody who looked.

    Perhaps while their blocks were still to be written, or after somebody was killed before that:
    so it is looked at again.

    Raises:
        OSError, TransientError: it was not written down.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        reread = Supervisord(deployment.socket).reread()
        waiting = reread.added | reread.changed | reread.removed
        _forget_untold(deployment, [name for name in names if name not in waiting])


def _forget_untold(deployment: Deployment, names: Sequence[str]) -> None:
    found = registry.load(deployment.registry)
    after = found
    for name in names:
        after = registry.told(after, name)
    if after != found:
        registry.save(deployment.registry, after)


def bless(deployment: Deployment, name: str, digest: str) -> None:
    """The block of a model has proved itself, unless it is another one by now.

    Raises:
        OSError, TransientError: it was not written down.
    """
    with commits.locked(deployment):
        standing = generations.standings(deployment).get(name)
        if standing is not None and standing.digest == digest:
            commits.keep_standings(deployment, {name: trials.proven(standing)})


def set_aside(deployment: Deployment, name: str, broken: str, failure: Failure) -> str:
    """Put the applied block in place of one that supervisord cannot read, which is left beside.

    Only while that (`broken`, its digest) is what is there: somebody may be mending it.

    Raises:
        RollbackFailed: the applied one is not kept.
        OSError, TransientError: it was not carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        standing = generations.standings(deployment).get(name)
        kept = None if standing is None else generations.kept(deployment, standing.digest)
        if kept is None or standing is None:
            raise RollbackFailed(f"{name}: there is no former block to put in its place")
        path = deployment.block(name)
        if not path.is_file():
            raise RollbackFailed(f"{name}: {path} is not a regular file; remove it")
        content = path.read_bytes()
        digest = commits.digest_of(content)
        if digest != broken:
            return f"{name}: has another block by now"
        rejection = Rejected(digest, standing.generation, failure, was_tried=False)
        beside = commits.reject(deployment, name, content.decode("utf-8", "replace"), failure)
        standing = trials.rejected(standing, rejection, beside)
        commits.keep_standings(deployment, {name: standing})
        found = registry.load(deployment.registry)
        untold = {**found.untold, name: standing.digest}  # it may have been taken for removed
        registry.save(deployment.registry, replace(found, untold=untold))
        store.write_text(path, kept.text)
        return f"{name}: {path.name} set aside: {failure.message}"


def set_broken_aside(deployment: Deployment) -> list[str]:
    """Models' blocks with which supervisord would not start; what was done, in words. What is not
    ours to mend, or cannot be, stays: supervisord's start will tell.
    """
    ours = {
        deployment.block(program.name): program.name
        for program in registry.load(deployment.registry).programs
    }
    said = []
    for one in config_files.broken_files(deployment.main_config):
        name = ours.get(one.path)
        if name is None:
            continue
        failure = Failure(FailureClass.BAD_ARGUMENT, str(one), time.time())
        with contextlib.suppress(RollbackFailed, TransientError, OSError):
            broken = conf_d.digest_there(one.path)
            said.append(set_aside(deployment, name, broken, failure))
    return said


def roll_back(
    deployment: Deployment,
    name: str,
    *,
    to: int = 0,
    left: str = "",
    failure: Failure | None = None,
    command: str = "",
) -> str:
    """Put a former good block in place of the applied one; what was done, in words.

    `to`: a generation, 0: the last good one. `left`: only while this block (its digest) is the
    applied one. `failure`: why; then that block is left beside, and not tried again. `command`: its
    id; carried out before, nothing is done.

    Raises:
        RollbackFailed: there is nothing good to go back to, or it is not kept.
        ConfigError: there is no such model or generation; or the block was edited since.
        OSError, TransientError: it was not carried out.
    """
    with commits.locked(deployment):
        commits.complete(deployment)
        earlier = registry.load(deployment.registry)
        known = generations.standings(deployment)
        standing = known.get(name)
        current = next((one for one in earlier.programs if one.name == name), None)
        if standing is None or current is None:
            raise ConfigError(f"{name}: there is no such model")
        if left and standing.digest != left:
            return f"{name}: has another block by now"
        done_before = _carried_out(deployment, earlier, command) if command else None
        if done_before is not None:
            return _said(name, done_before)
        kept = _to_go_back_to(deployment, name, standing, to)
        there = _require_as_applied(deployment, name, standing, kept)
        if there == standing.digest == kept.digest:
            return f"{name}: its block is that of generation {to} already"
        number = earlier.generation + 1
        after = _gone_back(earlier, current, kept, number)
        why, failures = "by command", {}
        if failure is not None:
            why = f"{failure.failure_class.value}: {failure.message}"
            failures = {name: failure}
        generation = Generation(
            number, time.time(), trials.ROLLBACK, why, {}, changed=(name,), failures=failures,
            command=command,
        )  # fmt: skip
        is_up = Supervisord(deployment.socket).is_up()
        step = commits.Step(registry=after, written=(kept,))
        done = commits.commit(deployment, step, generation, tell=is_up)
        if is_up and failure is not None:  # it does not run
            tell(deployment, Supervisord(deployment.socket), (name,))
        return _said(name, done or generation)


def _carried_out(deployment: Deployment, earlier: Registry, command: str) -> Generation | None:
    """What a command has brought about already; a generation that is newer than the registry was
    never applied.
    """
    found = generations.every(deployment)
    of_it = (one for one in found if one.command == command and one.number <= earlier.generation)
    return next(of_it, None)


def _said(name: str, generation: Generation) -> str:
    return f"{name}: has its former block again, as generation {generation.number}"


def _to_go_back_to(deployment: Deployment, name: str, standing: Standing, to: int) -> Kept:
    good = _good_in(deployment, name, standing, to) if to else standing.former
    if good is None:
        raise RollbackFailed(
            f"{name}: there is no other block that was good; `synapse generations {name}` shows all"
        )
    kept = generations.kept(deployment, good.digest)
    if kept is None:
        raise RollbackFailed(f"{name}: its block of generation {good.generation} is lost")
    return kept


def _good_in(deployment: Deployment, name: str, standing: Standing, to: int) -> Good:
    generation = generations.load(deployment, to)
    digest = "" if generation is None else generation.blocks.get(name, "")
    if not digest:
        raise ConfigError(
            f"{name}: generation {to} is not kept, or has no such model; "
            f"`synapse generations {name}` lists them"
        )
    good = next((one for one in standing.good if one.digest == digest), None)
    if good is None:
        raise RollbackFailed(f"{name}: its block of generation {to} was never good")
    return good


def _require_as_applied(deployment: Deployment, name: str, standing: Standing, kept: Kept) -> str:
    """What somebody is editing just now is not overwritten. The digest of what is there."""
    path = deployment.block(name)
    there = conf_d.digest_there(path)
    if there not in ("", standing.digest, kept.digest):
        raise ConfigError(
            f"{name}: {path} was edited since it was applied: supervisorctl update takes it up"
        )
    return there


def _gone_back(earlier: Registry, current: Program, kept: Kept, number: int) -> Registry:
    """The registry with what it held of a program when the block was applied."""
    said = {field: getattr(kept.program, field) for field in _OF_THE_BLOCK}
    program = replace(current, **said)
    entry = earlier.entries[current.key]
    digests = (kept.digest,) if kept.is_ours else entry.digests
    entry = replace(entry, choice=kept.choice, digests=digests)
    after = with_programs(earlier, {current.name: program})
    entries = {**earlier.entries, current.key: entry}
    return replace(after, entries=entries, generation=number)


def with_programs(earlier: Registry, changed: Mapping[str, Program]) -> Registry:
    """The registry with these programs, by name, in place of what it held of them."""
    programs = tuple(changed.get(one.name, one) for one in earlier.programs)
    return replace(earlier, programs=programs)
