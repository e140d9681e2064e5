"""Discovery → disk → supervisord: carries out what `discovery` found, and no more."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from supervisor_synapse import commit as commits
from supervisor_synapse import links, render
from supervisor_synapse.adapters import (
    config_files,
    generations,
    registry,
    store,
    supervisord,
)
from supervisor_synapse.adapters import (
    deployment as deployments,
)
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.generations import digest
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core import trials
from supervisor_synapse.core.model import UNDER_WAY, Phase
from supervisor_synapse.core.trials import Generation, Rejected, Standing
from supervisor_synapse.discovery import Change
from supervisor_synapse.errors import ApplyError, ConfigError, ShuttingDown, TransientError

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 660.0  # a model may load from a slow disk; the listener gives it 600
_SILENT_SECONDS = 30.0
_NOT_SETTLED = UNDER_WAY | {Phase.BACKOFF, Phase.UNHEALTHY}

Report = Callable[[str], None]


def initialize(deployment: Deployment) -> tuple[Path, ...]:
    """Lay down what is missing of the deployment; the files that were written."""
    templates = render.Templates(deployment.templates)
    main = render.render_main(
        templates, str(deployment.prefix), deployments.own_command(), str(deployment.socket)
    )
    files = {deployment.main_config: main, deployment.settings: render.shipped_settings()}
    return deployments.lay_down(deployment, files)


def apply(
    deployment: Deployment,
    found: Change,
    rpc: Supervisord | None,
    report: Report,
    *,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> tuple[str, ...]:
    """Carry out a discovery; where nothing changed no file is touched.

    The files are written at once; the listener has supervisord take them up, changed models one
    after the other, and that is waited for, unless somebody interrupts. Returned are the models
    whose new blocks were refused, or failed.

    Raises:
        ConfigError: supervisord's parser would not take the result; nothing was changed.
        ApplyError: a file could not be written, or nobody takes up what was.
        TransientError: another discovery is at work.
        Overtaken: the deployment was changed meanwhile; discover again.
    """
    try:
        with store.exclusive(deployment.discovery_lock):
            with commits.locked(deployment):
                was_up = _write(deployment, found, rpc, report)
            if rpc is not None:
                _await_taken_up(deployment, found, rpc, was_up, report, is_interrupted)
            return _failed(deployment, found, report)
    except OSError as error:
        where = error.filename2 or error.filename or deployment.prefix
        raise ApplyError(
            f"cannot write {str(where)!a}: {error.strerror}; what runs goes on as it is; free "
            "disk space or mend the permissions, then run `synapse discover` again"
        ) from None


class Overtaken(TransientError):
    """What a discovery looked at is no longer so."""


def _write(
    deployment: Deployment, found: Change, rpc: Supervisord | None, report: Report
) -> frozenset[str]:
    """Write what was found; the programs that ran before."""
    changes = found.changes
    before = registry.load(deployment.registry)
    if before != found.earlier:
        raise Overtaken("the deployment was changed meanwhile; run `synapse discover` again")
    commits.complete(deployment)
    written = [found.blocks[name] for name in (*changes.added, *changes.changed)]
    if changes:
        _parse_back(deployment, found, written)
    links.make(deployment, found.links)
    was_up = _that_run(rpc)
    missed, left = _arrears(deployment.main_config, rpc, found)
    _refuse(deployment, found)
    forced = _keep_theirs(deployment, found, report)
    texts = {name: block.text for name, block in found.blocks.items()}
    step = commits.Step(
        registry=found.registry, removed=(*changes.removed, *left),
        written=commits.kept_of(found.registry, texts, (*changes.added, *changes.changed)),
        standing=commits.kept_of(found.registry, texts, changes.unchanged),
        renewed=(*found.switched_on, *missed) if rpc is not None else (), forced=forced,
    )  # fmt: skip
    generation = None
    if changes:
        generation = Generation(
            found.registry.generation, time.time(), trials.DISCOVER, _why(found), {},
            changes.added, changes.changed, changes.removed,
        )  # fmt: skip
    commits.commit(deployment, step, generation, tell=rpc is not None)
    _leave_beside(deployment, found, before, report)
    links.drop_unused(deployment, found.links)
    return was_up


def _keep_theirs(deployment: Deployment, found: Change, report: Report) -> frozenset[str]:
    """Edited blocks that are overwritten by force are left beside; their digests."""
    ours = found.earlier.digests()
    forced = set()
    for name in found.changes.changed:
        path = deployment.block(name)
        content = path.read_bytes()
        edited = commits.digest_of(content)
        if edited not in ours.get(name, ()):
            forced.add(edited)
            beside = path.with_name(f"{path.name}.old")
            store.write_text(beside, content.decode("utf-8", "replace"))
            report(f"{name}: what was edited by hand is kept in {beside}")
    return frozenset(forced)


def _why(found: Change) -> str:
    """What made these changes, as far as it shows, for a person."""
    changes = found.changes
    reasons = []
    if found.registry.settings != found.earlier.settings:
        reasons.append("synapse.conf changed")
    if changes.added or changes.removed:
        reasons.append("models came or went")
    if changes.changed and not reasons:
        reasons.append("what blocks are made of changed: a template, the engine, a file")
    return ", ".join(reasons)


def _arrears(
    main_config: Path, rpc: Supervisord | None, found: Change
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Programs that did not change, and of which supervisord does not hold what it should; and
    those that it still holds though they were removed.

    Raises:
        ConfigError: supervisord cannot read its files; names each that is broken.
    """
    if rpc is None:
        return (), ()
    try:
        seen = rpc.reread()
    except supervisord.Refused as refused:
        broken = config_files.broken_files(main_config)
        raise ConfigError([str(one) for one in broken] or [str(refused)]) from None
    gone = {entry.name for entry in found.registry.entries.values() if not entry.present}
    gone -= {*found.changes.kept, *found.changes.removed}
    missed = (seen.added | seen.changed) & {*found.changes.unchanged}
    return tuple(sorted(missed)), tuple(sorted(seen.removed & gone))


def _that_run(rpc: Supervisord | None) -> frozenset[str]:
    if rpc is None:
        return frozenset()
    return frozenset(process.name for process in rpc.processes() if process.pid)


def _refuse(deployment: Deployment, found: Change) -> None:
    """Note what was refused before it was tried, and leave it beside. Where all is as it is meant
    to be again, what was refused once is no longer told.
    """
    known = generations.standings(deployment)
    after = {
        name: trials.as_meant(known[name])
        for name in found.changes.unchanged
        if name in known and name not in found.not_tried
    }
    for name, (block, failure) in found.refused.items():
        standing = after.get(name, known.get(name, Standing()))
        rejection = Rejected(
            digest(block.text), found.earlier.generation, failure, was_tried=False, is_meant=True
        )
        if standing.rejection(rejection.digest) is None:
            beside = commits.reject(deployment, name, block.text, failure)
            after[name] = trials.rejected(standing, rejection, beside)
    commits.keep_standings(deployment, after)


def _await_taken_up(
    deployment: Deployment,
    found: Change,
    rpc: Supervisord,
    was_up: frozenset[str],
    report: Report,
    is_interrupted: Callable[[], bool],
) -> None:
    """Until the listener has had supervisord take up all that changed, and what ran runs again.

    Raises:
        ApplyError: there is no listener that does.
    """
    changes = found.changes
    words = dict.fromkeys(changes.added, "added")
    words |= dict.fromkeys(changes.changed, "changed")
    words |= dict.fromkeys(changes.removed, "removed")
    waiting = {*registry.load(deployment.registry).untold}
    settling = {*changes.changed} & was_up
    moved_at, stamp, told_at = time.monotonic(), None, time.time()
    while (waiting or settling) and not is_interrupted():
        if time.monotonic() - moved_at > _SETTLE_SECONDS:
            report(f"still on its way: {', '.join(sorted(waiting | settling))}")
            return
        seen = _stamp(deployment)
        if seen != stamp:
            stamp = seen
            now = registry.load(deployment.registry).untold
            for name in sorted(waiting - set(now)):
                report(f"{name}: {words.get(name, 'taken up')}")
                moved_at, told_at = time.monotonic(), time.time()
            waiting &= set(now)
        settled = _settled(rpc, settling - waiting, told_at)
        if settled:
            settling -= settled
            moved_at = time.monotonic()
        time.sleep(_POLL_SECONDS)


def _stamp(deployment: Deployment) -> tuple[int, int]:
    status = deployment.registry.stat()
    return status.st_mtime_ns, status.st_ino


def _settled(rpc: Supervisord, names: set[str], since: float) -> set[str]:
    """Those that are ready or have been given up, as the listener saw them after `since`.

    Raises:
        ApplyError: there is no listener, or it does not report.
    """
    try:
        snapshot = rpc.snapshot()
    except supervisord.Refused:
        raise ApplyError(
            "supervisord runs without [rpcinterface:synapse], so nobody takes up the change; "
            "it is written, and holds from supervisord's next start on"
        ) from None
    except ShuttingDown:
        raise ApplyError("supervisord is shutting down; it will read the files next time") from None
    except TransientError:
        return set()
    if snapshot is not None and time.time() - snapshot.at > _SILENT_SECONDS:
        raise ApplyError(
            f"the listener has not reported for {_SILENT_SECONDS:.0f} s; it will take up the "
            "change when it is back; see var/log/synapse.log"
        )
    if snapshot is None or snapshot.at <= since:
        return set()
    phases = {row.name: row.phase for row in snapshot.models}
    return {name for name in names if phases.get(name) not in _NOT_SETTLED}


def _failed(deployment: Deployment, found: Change, report: Report) -> tuple[str, ...]:
    """Models whose new blocks were refused or taken back."""
    known = generations.standings(deployment)
    failed = list(found.not_tried)
    for name, block in found.blocks.items():
        standing = known.get(name)
        rejection = standing.rejection(digest(block.text)) if standing else None
        if rejection is not None and rejection.failure is not None:
            failed.append(name)
            why = rejection.failure
            report(
                f"{name}: rejected: {why.failure_class.value}: {why.message}; the former block "
                f"serves; the rejected one is {deployment.rejected(name)}"
            )
    return tuple(failed)


def _parse_back(deployment: Deployment, found: Change, written: list[render.Block]) -> None:
    """The whole configuration as it would be, read by supervisord's own parser."""
    gone = {*found.changes.removed, *(block.name for block in written)}
    with tempfile.TemporaryDirectory(prefix="candidates.", dir=deployment.run) as folder:
        candidates = Path(folder)
        for path in deployment.blocks.glob("*.conf"):
            if path.stem not in gone:
                shutil.copyfile(path, candidates / path.name)
        for block in written:
            (candidates / f"{block.name}.conf").write_text(block.text, encoding="utf-8")
        try:
            config_files.parse_back(deployment.main_config, candidates, written)
        except ConfigError as error:
            raise ConfigError(_blamed(deployment, written) or str(error)) from None


def _blamed(deployment: Deployment, written: Iterable[render.Block]) -> str | None:
    """Which of our blocks supervisord's parser rejects when it stands alone, and why.

    The parser does not always name the file.
    """
    for block in written:
        with tempfile.TemporaryDirectory(prefix="alone.", dir=deployment.run) as folder:
            (Path(folder) / f"{block.name}.conf").write_text(block.text, encoding="utf-8")
            try:
                config_files.parse_back(deployment.main_config, Path(folder), [block])
            except ConfigError as error:
                return (
                    f"the block of {block.name} cannot be used: {error}; nothing was changed; "
                    "mend etc/templates/program.conf.j2"
                )
    return None


def _leave_beside(deployment: Deployment, found: Change, before: Registry, report: Report) -> None:
    """Where the user edited a block and ours changed too, ours goes beside it."""
    known = before.digests()
    for path in deployment.blocks.glob("*.conf.new"):
        if path.name.removesuffix(".conf.new") not in found.changes.kept:
            path.unlink(missing_ok=True)  # taken, or no longer of use
    for name in found.changes.kept:
        block, beside = found.blocks.get(name), deployment.blocks / f"{name}.conf.new"
        if block is None:
            report(f"{name}: its model was not found; its block was kept")
            continue
        if digest(block.text) not in known.get(name, ()):
            store.write_text(beside, block.text)
        if beside.exists():
            report(
                f"{name}: edited by hand, kept; what discovery would write is in {beside} "
                f"(`synapse discover --force {name}` takes it)"
            )
