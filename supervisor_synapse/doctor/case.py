"""What checks look at: each fact is taken once, when the first check asks for it. Only reads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from supervisor_synapse import config
from supervisor_synapse.adapters import (
    config_files,
    header_cache,
    hfcache,
    processes,
    registry,
    snapshots,
)
from supervisor_synapse.adapters.conf_d import command_words
from supervisor_synapse.adapters.config_files import Option
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.hfcache import Scan
from supervisor_synapse.adapters.processes import Running
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Absent, Process, Refused, Supervisord
from supervisor_synapse.core.arguments import Served, parse_served
from supervisor_synapse.core.catalog import RESERVED_NAMES
from supervisor_synapse.core.model import Snapshot
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.errors import ConfigError, ShuttingDown, TransientError

SERVER = "llama-server"

_ANSWER_SECONDS = 5.0
_LARGEST_BYTES = 1024 * 1024

_T = TypeVar("_T")


def server_words(command: tuple[str, ...]) -> tuple[str, ...]:
    """What a launcher runs: the engine and its arguments; () where it is no launcher's command."""
    return command[command.index("--") + 1 :] if "--" in command else ()


@dataclass(frozen=True, slots=True)
class Block:
    """One file of etc/conf.d; `text` is empty where it cannot be read."""

    name: str
    path: Path
    text: str
    command: tuple[str, ...]

    @property
    def programs(self) -> tuple[str, ...]:
        """What it executes."""
        return (*self.command[:1], *server_words(self.command)[:1])

    @property
    def server(self) -> tuple[str, ...]:
        """The engine and its arguments; () where it runs something else, as the gateway's does."""
        return () if self.name in RESERVED_NAMES else server_words(self.command)

    @property
    def runs(self) -> tuple[str, ...]:
        """What stays of its command once a launcher has started it."""
        return server_words(self.command) or self.command

    @property
    def served(self) -> Served | None:
        """Where it answers, by its own words."""
        nowhere = Served("127.0.0.1", 0, "", 0, 0, None, 0)
        return parse_served(self.command, nowhere)


@dataclass(frozen=True, slots=True)
class Answers:
    """What supervisord says; `trouble` where it is there and does not say it."""

    is_up: bool = False
    trouble: str = ""
    pid: int = 0
    version: str = ""
    api_version: str | None = None  # of our plugin; None: it is not loaded
    processes: Mapping[str, Process] | None = None
    commands: Mapping[str, str] | None = None
    snapshot: Snapshot | None = None
    age_seconds: float | None = None  # of the snapshot, or since the listener's last sign of life


class Case:
    """One deployment, as it is now. Checks in several threads may ask at the same time."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self._known: dict[str, Any] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def once(self, name: str, take: Callable[[], _T]) -> _T:
        """A fact, taken by `take` when it is first asked for; who asks meanwhile waits for it."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._known:
                self._known[name] = take()
            return self._known[name]  # type: ignore[no-any-return]

    @property
    def is_laid_down(self) -> bool:
        return self.deployment.main_config.exists()

    @property
    def settings(self) -> Settings:
        """As they stand; those that were applied where they are broken."""
        return self.once("settings", self._take_settings)[0]

    @property
    def settings_problems(self) -> tuple[str, ...]:
        return self.once("settings", self._take_settings)[1]

    def _take_settings(self) -> tuple[Settings, tuple[str, ...]]:
        try:
            return config.load(self.deployment.settings), ()
        except ConfigError as broken:
            return self.registry.settings, tuple(broken.problems)

    @property
    def registry(self) -> Registry:
        """What was applied; an empty one where there is none, or it cannot be used."""
        return self.once("registry", lambda: registry.peek(self.deployment.registry)) or Registry()

    @property
    def main(self) -> str:
        """The text of the main file."""
        return self.once("main", lambda: text_of(self.deployment.main_config))

    @property
    def options(self) -> tuple[Option, ...]:
        """Sections and options of the main file."""
        return self.once("options", lambda: tuple(config_files.options_of(self.main)))

    def options_of(self, section: str) -> dict[str, str] | None:
        """What a section of the main file says; None where it is not there."""
        found = [option for option in self.options if option.section == section]
        return {option.name: option.value for option in found if option.name} if found else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All of etc/conf.d, by name."""
        return self.once("blocks", self._take_blocks)

    def _take_blocks(self) -> tuple[Block, ...]:
        found = []
        for path in sorted(self.deployment.blocks.glob("*.conf")):
            text = text_of(path)
            found.append(Block(path.stem, path, text, tuple(command_words(text))))
        return tuple(found)

    @property
    def scan(self) -> Scan:
        """The caches and folders of models, with their headers."""
        return self.once("scan", self._take_scan)

    def _take_scan(self) -> Scan:
        headers = header_cache.peek(self.deployment.headers)
        return hfcache.scan(self.settings.cache_dirs, self.settings.model_dirs, headers)

    @property
    def cache_dirs(self) -> tuple[Path, ...]:
        """The hub caches that are searched."""
        return tuple(map(Path, self.settings.cache_dirs or (hfcache.default_cache_dir(),)))

    @property
    def processes(self) -> tuple[Running, ...]:
        """All that run on this machine."""
        return self.once("processes", processes.every)

    def process(self, pid: int) -> Running | None:
        return next((one for one in self.processes if one.pid == pid), None)

    def record_of(self, process: Running) -> str:
        """Which run of a model a process belongs to; "" where to none."""
        name = f"record {process.pid}"
        return self.once(name, lambda: processes.variable(process.pid, "SYNAPSE_RECORD"))

    def is_below(self, process: Running, ancestor: int) -> bool:
        """Whether a process descends from another one."""
        seen: set[int] = set()
        found: Running | None = process
        while found is not None and found.pid not in seen:
            if ancestor in (found.pid, found.parent):
                return True
            seen.add(found.pid)
            found = self.process(found.parent)
        return False

    @property
    def supervisord(self) -> Answers:
        return self.once("supervisord", self._take_answers)

    def _take_answers(self) -> Answers:
        rpc = Supervisord(self.deployment.socket, _ANSWER_SECONDS)
        try:
            return _answers(rpc)
        except Absent:
            return Answers()
        except ShuttingDown:
            return Answers(trouble="supervisord is shutting down")
        except TransientError as silent:
            return Answers(trouble=str(silent))


def _answers(rpc: Supervisord) -> Answers:
    version, pid = rpc.version(), rpc.pid()
    table = {process.name: process for process in rpc.processes()}
    commands = rpc.commands()
    try:
        api_version = str(rpc.call("synapse.getAPIVersion"))
    except Refused:
        return Answers(True, "", pid, version, None, table, commands)
    text = str(rpc.call("synapse.models"))
    snapshot = None
    with contextlib.suppress(TransientError):
        snapshot = snapshots.load(text) if text else None
    return Answers(
        True, "", pid, version, api_version, table, commands, snapshot,
        snapshots.age_seconds(text) if text else None,
    )  # fmt: skip


def text_of(path: Path) -> str:
    """The text of a regular file; "" where it cannot be had. A named pipe is not waited for."""
    try:
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES)
    except OSError:
        return ""
    return content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
