"""Checks of who else may change what is executed, or what decides that, and who may give orders."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import supervisor_synapse
from supervisor_synapse.adapters import deployment as deployments
from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.core.findings import Finding, error, fine
from supervisor_synapse.doctor.case import Case
from supervisor_synapse.errors import ConfigError

_MOST_BESIDE = 500
_MOST_NAMED = 3


def check_deployment(case: Case) -> Iterator[Finding]:
    """The prefix, what supervisord reads and includes, and the folders above."""
    deployment = case.deployment
    if not deployment.prefix.exists():
        return
    paths = [
        *deployment.folders(), deployment.main_config, deployment.settings,
        *sorted(deployment.blocks.glob("*.conf")), *sorted(deployment.templates.glob("*.j2")),
    ]  # fmt: skip
    for path in paths:
        yield from _file(path)
    for folder in deployment.prefix.parents:
        yield from _folder(folder)
    yield fine(str(deployment.prefix), f"{len(paths)} files and folders are yours alone to write")


def check_programs(case: Case) -> Iterator[Finding]:
    """Programs that are started: the files, and every folder on the way to them."""
    programs = set(_programs(case))
    folders: set[Path] = set()
    for program in sorted(programs):
        path, real = Path(os.path.abspath(program)), Path(os.path.realpath(program))
        if not real.exists():
            if path.is_absolute():
                yield error(
                    "program-missing", str(path), "is named in a block, and is not there",
                    "`synapse discover` renders the block anew",
                )  # fmt: skip
            continue
        yield from _file(real)
        yield from _libraries(real.parent)
        folders.update((*path.parents, *real.parents))
    folders.update(Path(supervisor_synapse.__file__).resolve().parents)
    for folder in sorted(folders):
        yield from _folder(folder)
    yield fine("programs", f"{len(programs)} programs, and the folders above them")


def _programs(case: Case) -> Iterator[str]:
    yield sys.executable
    yield deployments.own_command()[0]
    yield deployments.launcher_command()[0]
    with contextlib.suppress(ConfigError):  # another check's business
        yield engines.locate(case.settings.engine)
    for block in case.blocks:
        yield from (word for word in block.programs if word.startswith("/"))


def _libraries(folder: Path) -> Iterator[Finding]:
    """What lies beside a program and may be loaded into it."""
    found = []
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= _MOST_BESIDE:
                break
            is_library = ".so" in entry.name or entry.name.endswith(".dylib")
            if is_library and entry.is_file() and entry.stat().st_mode & 0o022:
                found.append(entry.name)
    if found:
        yield error(
            "permission-writable", str(folder),
            f"others may write to libraries beside a program: {', '.join(found[:_MOST_NAMED])}",
            f"chmod go-w {folder}/*",
        )  # fmt: skip


def _file(path: Path) -> Iterator[Finding]:
    """A file or folder of which each writer counts."""
    info = _stat(path)
    if info is None:
        return
    yield from _owner(path, info)
    if info.st_mode & 0o022:
        yield error(
            "permission-writable", str(path),
            "group or others may write here, and programs are started from it",
            f"chmod go-w {path}",
        )  # fmt: skip


def _folder(path: Path) -> Iterator[Finding]:
    """A folder on the way: only who may exchange what is in it counts.

    Package managers let a group write to theirs on some systems.
    """
    info = _stat(path)
    if info is None:
        return
    yield from _owner(path, info)
    if info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX:
        yield error(
            "permission-writable", str(path),
            "others may write to a folder that leads to programs which are started",
            f"chmod o-w {path}",
        )  # fmt: skip


def _owner(path: Path, info: os.stat_result) -> Iterator[Finding]:
    if info.st_uid not in (os.getuid(), 0):
        yield error(
            "permission-foreign", str(path),
            f"belongs to user {info.st_uid}, who may change what is started",
            f"chown {os.getuid()} {path}",
        )  # fmt: skip


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def check_socket(case: Case) -> Iterator[Finding]:
    """Who may give orders to supervisord."""
    said = case.options_of("unix_http_server")
    if said is None:
        return
    main = case.deployment.main_config
    mode = said.get("chmod", "0700")
    if _is_open(mode) and not said.get("password"):
        yield error(
            "socket-open", f"{main} [unix_http_server]",
            f"chmod={mode} lets others give orders to supervisord", "chmod=0700",
        )  # fmt: skip
    info = _stat(case.deployment.socket)
    if info is not None and info.st_mode & 0o077 and not _is_open(mode):
        yield error(
            "socket-open", str(case.deployment.socket),
            f"has mode {stat.S_IMODE(info.st_mode):04o}: others may give orders to supervisord",
            f"chmod 0700 {case.deployment.socket}",
        )  # fmt: skip
    yield fine(str(case.deployment.socket), f"mode {mode}")


def _is_open(mode: str) -> bool:
    try:
        return bool(int(mode, 8) & 0o077)
    except ValueError:
        return False


def others_may_read(paths: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Those that somebody else may read, with their modes."""
    for path in paths:
        info = _stat(path)
        if info is not None and info.st_mode & 0o077:
            yield path, stat.S_IMODE(info.st_mode)
