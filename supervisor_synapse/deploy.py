"""Discovery → disk → supervisord: carries out what `discovery` found, and no more."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from supervisor_synapse import discovery, render
from supervisor_synapse.adapters import (
    config_files,
    registry,
    store,
    supervisord,
)
from supervisor_synapse.adapters import (
    deployment as deployments,
)
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core.changes import Changes
from supervisor_synapse.core.model import UNDER_WAY, ProcessState
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.discovery import Change, digest
from supervisor_synapse.errors import ApplyError, ConfigError, ShuttingDown

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 600.0  # a rolled model may load from a slow disk; then the next one goes on

Report = Callable[[str], None]


def initialize(deployment: Deployment) -> tuple[Path, ...]:
    """Lay down what is missing of the deployment; the files that were written."""
    templates = render.Templates(deployment.templates)
    main = render.render_main(
        templates, str(deployment.prefix), deployments.own_command(), str(deployment.socket)
    )
    files = {deployment.main_config: main, deployment.settings: render.shipped_settings()}
    return deployments.lay_down(deployment, files)


def apply(deployment: Deployment, found: Change, rpc: Supervisord | None, report: Report) -> None:
    """Carry out a discovery; where nothing changed no file is touched.

    The registry is written before the blocks, so that a block written by an apply that was
    killed is still known as ours.

    Raises:
        ConfigError: supervisord's parser would not take the result; nothing was changed.
        ApplyError: a file could not be written, or supervisord did not follow.
        TransientError: another discovery is at work.
    """
    try:
        with store.exclusive(deployment.discovery_lock):
            _write(deployment, found, report)
            if rpc is not None:
                _tell_supervisord(rpc, found, report)
            _drop_old_links(deployment, found.links)
    except OSError as error:
        where = error.filename2 or error.filename or deployment.prefix
        raise ApplyError(
            f"cannot write {str(where)!a}: {error.strerror}; what runs goes on as it is; free "
            "disk space or mend the permissions, then run `synapse discover` again"
        ) from None


def _write(deployment: Deployment, found: Change, report: Report) -> None:
    changes = found.changes
    written = [found.blocks[name] for name in (*changes.added, *changes.changed)]
    if changes:
        _parse_back(deployment, found, written)
    _make_links(deployment, found.links)
    before = registry.load(deployment.registry)
    if not registry.is_same(before, found.registry):
        registry.save(deployment.registry, found.registry)
    for block in written:
        store.write_text(deployment.block(block.name), block.text)
    for name in changes.removed:
        deployment.block(name).unlink(missing_ok=True)
    _leave_beside(deployment, found, before, report)
    # All blocks stand: from now on only the newest text is ours, and a hand edit back to an older
    # one is an edit like any other.
    settled = registry.settled(found.registry)
    if settled != found.registry:
        registry.save(deployment.registry, settled)


def move_port(deployment: Deployment, name: str) -> None:
    """Give one program, which does not run, another free port; all else stays as it was applied.

    Raises:
        ConfigError: its port is not ours to choose, or there is none left.
        ApplyError, TransientError: it could not be carried out.
    """
    moved = discovery.with_another_port(deployment, name)
    apply(deployment, moved, Supervisord(deployment.socket), lambda line: None)


def set_rung(deployment: Deployment, name: str, rung: int) -> None:
    """Serve one program, which does not run, as another rung of its ladder says.

    Raises:
        ConfigError: there is no such rung, or its block was edited by hand.
        ApplyError, TransientError: it could not be carried out.
    """
    stepped = discovery.with_another_rung(deployment, name, rung)
    apply(deployment, stepped, Supervisord(deployment.socket), lambda line: None)


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


def _make_links(deployment: Deployment, links: Mapping[Path, str]) -> None:
    """Point each link at its file, atomically; one that is right already is not touched."""
    for link, target in links.items():
        with contextlib.suppress(OSError):
            if os.readlink(link) == target:
                continue
        link.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)


def _drop_old_links(deployment: Deployment, links: Mapping[Path, str]) -> None:
    """Remove links that no block needs; nothing but links is ever removed there."""
    in_use = "\n".join(
        path.read_text(errors="replace") for path in deployment.blocks.glob("*.conf")
    )
    for path in (*deployment.links.glob("*"), *deployment.links.glob("*/*")):
        if path.is_symlink() and path not in links and str(path) not in in_use:
            path.unlink(missing_ok=True)
    for folder in deployment.links.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # not empty: still needed
                folder.rmdir()


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


def _tell_supervisord(rpc: Supervisord, found: Change, report: Report) -> None:
    """Added, changed, removed: only these groups are touched, changed ones one at a time."""
    bound = _stop_bound(found.registry.settings)
    try:
        changes = _with_arrears(found, rpc.reread())
        for name in changes.removed:
            _stop(rpc, name, bound)
            rpc.remove(name)
            report(f"{name}: removed")
        for name in found.switched_off:
            _stop(rpc, name, bound)
            report(f"{name}: stopped, its model is no longer enabled")
        for name in changes.added:
            rpc.add(name)
            report(f"{name}: added")
        for name in sorted({*found.switched_on} - {*changes.added, *changes.changed}):
            _make_fresh(rpc, name)
        for name in changes.changed:
            was_up = _stop(rpc, name, bound)
            rpc.remove(name)
            added_at = time.time()
            rpc.add(name)
            report(f"{name}: changed")
            if was_up:
                _await_settled(rpc, name, added_at)
    except supervisord.Refused as refused:
        raise ApplyError(f"supervisord did not take the change: {refused}") from None
    except ShuttingDown:
        raise ApplyError("supervisord is shutting down; it will read the files next time") from None


def _with_arrears(found: Change, seen: supervisord.Reread) -> Changes:
    """The changes, and those of an earlier apply that did not reach supervisord."""
    changes = found.changes
    settled = {*changes.unchanged}
    gone = {entry.name for entry in found.registry.entries.values() if not entry.present}
    gone -= {*changes.kept}
    return replace(
        changes,
        added=tuple(sorted({*changes.added} | (seen.added & settled))),
        changed=tuple(sorted({*changes.changed} | (seen.changed & settled))),
        removed=tuple(sorted({*changes.removed} | (seen.removed & gone))),
    )


def _stop_bound(settings: Settings) -> float:
    """Seconds after which supervisord itself has killed whatever it was asked to stop."""
    return settings.stop.longest_seconds + 30.0


def _stop(rpc: Supervisord, name: str, bound_seconds: float) -> bool:
    """Stop a program and wait for it; whether it ran.

    Raises:
        ApplyError: it is still there long after supervisord killed it.
    """
    deadline = time.monotonic() + bound_seconds
    ran = False
    while (process := rpc.process(name)) is not None and process.pid:
        ran = True
        if process.state is not ProcessState.STOPPING:
            rpc.stop(name)
        if time.monotonic() > deadline:
            raise ApplyError(f"cannot stop {name}: pid {process.pid} outlived being killed")
        time.sleep(_POLL_SECONDS)
    return ran


def _make_fresh(rpc: Supervisord, name: str) -> None:
    """Forget that a stopped program was ever stopped, so that the listener brings it up."""
    process = rpc.process(name)
    if process is not None and not process.pid:
        rpc.remove(name)
        rpc.add(name)


def _await_settled(rpc: Supervisord, name: str, since: float) -> None:
    """Wait until the listener, looking after `since`, has the model ready or given up."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        try:
            snapshot = rpc.snapshot()
        except supervisord.Refused:
            return  # the plugin is not loaded: there is no listener to wait for
        if snapshot is not None and snapshot.at > since:
            phases = {row.name: row.phase for row in snapshot.models}
            if phases.get(name) not in UNDER_WAY:
                return
        time.sleep(_POLL_SECONDS)
