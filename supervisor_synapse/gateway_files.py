"""What stands on disk for the gateway: HAProxy's configuration, its Lua and maps, and its block.

What we wrote is known by its digest, so that an edit is seen. An edit that works is kept; what does
not work is set aside, and ours stands in its place. Nothing is replaced by what HAProxy would not
take. A block called `gateway` that never was ours is somebody else's, and is not touched.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from supervisor_synapse.adapters import config_files, haproxy, store
from supervisor_synapse.adapters.deployment import Deployment, launcher_command
from supervisor_synapse.adapters.haproxy import Haproxy
from supervisor_synapse.core.gateway import GatewayPaths, Tables, Upstream
from supervisor_synapse.core.settings import GatewaySettings
from supervisor_synapse.errors import ConfigError

PROGRAM = "gateway"

_STILL_SECONDS = 1.5  # a file that was not written to for so long is no longer being saved
_AGAIN_SECONDS = 5.0  # between two looks at what HAProxy did not take
_LARGEST_FILE_BYTES = 16 * 1024 * 1024
_BIND = re.compile(r"^    bind \[?([0-9A-Fa-f.:]+?)\]?:([0-9]+)( |$)", re.MULTILINE)
_ADDRESS = re.compile(r"^(    server model )\S+", re.MULTILINE)

_log = logging.getLogger("synapse")

_Stamp = tuple[int, int, int]


class NotOurs(ConfigError):
    """A program of our name was made by somebody else, and is left alone."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: a program called {PROGRAM} that is not ours is left alone, so there is no "
            "gateway; give it another name, or say [gateway] enabled = false"
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the files are made of."""

    settings: GatewaySettings
    upstreams: tuple[Upstream, ...]


@dataclass(frozen=True, slots=True)
class _Texts:
    """The files as they should be."""

    lua: str
    config: str
    block: str


@dataclass(slots=True)
class _Edit:
    """A file as it was last seen, and what was found out about it."""

    stamp: _Stamp | None = None
    since: float = 0.0  # monotonic
    is_judged: bool = False


@dataclass(slots=True)
class _Rendered:
    """The files, and what they were made from."""

    key: object = None
    texts: _Texts = field(default_factory=lambda: _Texts("", "", ""))


class Files:
    """The files of one deployment's gateway. For one thread."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._rendered = _Rendered()
        self._edits: dict[Path, _Edit] = {}
        self._refused: tuple[object, float, str] = (None, 0.0, "")

    @property
    def block(self) -> Path:
        return self._deployment.blocks / f"{PROGRAM}.conf"

    @property
    def record(self) -> str:
        """Names our run, and so stands in the command of our program and in no other."""
        return str(self._deployment.record(PROGRAM))

    @property
    def paths(self) -> GatewayPaths:
        deployment = self._deployment
        return GatewayPaths(
            socket=str(deployment.gateway_socket),
            again_socket=str(deployment.run / "gateway-again.sock"),
            supervisord_socket=str(deployment.socket),
            routes_map=str(deployment.gateway / "routes.map"),
            models_map=str(deployment.gateway / "models.map"),
            lua=str(deployment.gateway / "gateway.lua"),
        )

    # --- writing

    def write(self, wanted: Wanted, tables: Tables, binary: Haproxy) -> None:
        """All of them as they should be.

        Raises:
            ConfigError: HAProxy would not take the configuration, or keys are not private; what
                stands there is left.
            OSError: a file could not be written.
        """
        self._deployment.gateway.mkdir(mode=0o700, exist_ok=True)
        texts = self._texts(wanted, binary)
        self._put(Path(self.paths.lua), texts.lua)
        self.write_maps(tables, only_missing=True)
        for secret in secrets_of(wanted.settings):
            require_private(secret)
        self._put_config(texts.config, binary)
        self._put_block(texts.block)

    def write_maps(self, tables: Tables, *, only_missing: bool = False) -> None:
        """What a HAProxy that is started anew begins with."""
        paths = self.paths
        for path, entries in ((paths.routes_map, tables.routes), (paths.models_map, tables.models)):
            if not (only_missing and os.path.exists(path)):
                store.write_text(Path(path), haproxy.map_text(entries))

    def _texts(self, wanted: Wanted, binary: Haproxy) -> _Texts:
        from supervisor_synapse import render  # not small, and needed only where there is a gateway

        names = (render.GATEWAY_TEMPLATE, render.GATEWAY_LUA, render.GATEWAY_BLOCK_TEMPLATE)
        overrides = tuple(_stamp(self._deployment.templates / name) for name in names)
        key = (wanted, binary.path, overrides)
        if key != self._rendered.key:
            templates = render.Templates(self._deployment.templates)
            texts = _Texts(
                templates.render(render.GATEWAY_LUA, {}),
                render.render_gateway(templates, wanted.settings, wanted.upstreams, self.paths),
                render.render_gateway_block(
                    templates, self._command(binary), str(self._deployment.prefix),
                    str(self._deployment.log_file(PROGRAM)), wanted.settings,
                ),
            )  # fmt: skip
            self._rendered = _Rendered(key, texts)
        return self._rendered.texts

    def _command(self, binary: Haproxy) -> tuple[str, ...]:
        return (
            *launcher_command(), "--drain", "0", "--term", "2", "--record", self.record, "--",
            binary.path, "-W", "-db", "-f", str(self._deployment.gateway_config),
        )  # fmt: skip

    def _put(self, path: Path, text: str) -> None:
        """Write a file of ours where it says something else."""
        before = _text(path)
        if before == text:
            return
        # Both, as we may die between the two.
        known = [text] if before is None or not self.is_ours(path) else [text, before]
        store.write_text(self._mark(path), "\n".join(map(_digest, known)))
        store.write_text(path, text)

    def is_ours(self, path: Path) -> bool:
        """Whether it is as we wrote it."""
        text, mark = _text(path), _text(self._mark(path))
        return text is not None and mark is not None and _digest(text) in mark.split()

    def _mark(self, path: Path) -> Path:
        return self._deployment.gateway / f"{path.name}.sha256"

    def _is_edit_to_judge(self, path: Path) -> bool:
        """Whether an edited file is not being written any more, and was not looked at yet."""
        now, stamp = time.monotonic(), _stamp(path)
        seen = self._edits.get(path)
        if seen is None or seen.stamp != stamp:
            self._edits[path] = _Edit(stamp, now)
            return False
        return not seen.is_judged and now - seen.since >= _STILL_SECONDS

    # --- HAProxy's configuration

    def _put_config(self, text: str, binary: Haproxy) -> None:
        path = self._deployment.gateway_config
        before = _text(path)
        if before == text:
            return
        if before is not None and not self.is_ours(path):
            self._keep_edit(path, text, binary)
            return
        self._require_good(text, binary)
        _require_free(before, text)
        self._put(path, text)

    def _keep_edit(self, path: Path, ours: str, binary: Haproxy) -> None:
        """An edit that HAProxy takes stays, and ours lies beside it; another one is set aside."""
        if self._is_edit_to_judge(path):
            problem = haproxy.check(binary, path)
            if problem:
                self._require_good(ours, binary)
                self._set_aside(path, ours, problem)
                return
            _log.info("gateway", extra={"reason": f"{path.name} was edited by hand, and is kept"})
            self._edits[path].is_judged = True
        beside = path.with_name(f"{path.name}.new")
        if self._edits[path].is_judged and _text(beside) != ours:
            store.write_text(beside, ours)

    def _set_aside(self, path: Path, ours: str, problem: str) -> None:
        os.replace(path, path.with_name(f"{path.name}.rejected"))
        self._put(path, ours)
        _log.warning("gateway", extra={"reason": f"{path.name} was rejected: {problem}"})

    def _require_good(self, text: str, binary: Haproxy) -> None:
        """Ask HAProxy before anything is replaced.

        Raises:
            ConfigError: its reason.
        """
        about, now = (text, binary), time.monotonic()
        asked, at, problem = self._refused
        if asked != about or now - at >= _AGAIN_SECONDS:
            problem = self._problem(text, binary)
            self._refused = (about, now, problem) if problem else (None, 0.0, "")
        if problem:
            raise ConfigError(f"haproxy does not take its configuration: {problem}")

    def _problem(self, text: str, binary: Haproxy) -> str:
        path = self._deployment.gateway_config
        trial = path.with_name(f".{path.name}.trial")
        store.write_text(trial, text)
        try:
            return haproxy.check(binary, trial)
        finally:
            trial.unlink(missing_ok=True)

    @property
    def loaded(self) -> str:
        """What was on disk, as `to_load` told it, when the worker that runs began; or before."""
        return _text(self._note) or ""

    @loaded.setter
    def loaded(self, digest: str) -> None:
        store.write_text(self._note, digest)

    @property
    def _note(self) -> Path:
        return self._deployment.gateway / "loaded.sha256"

    def to_load(self, settings: GatewaySettings) -> str:
        """A digest of all that HAProxy reads when it begins, but for what it is told later."""
        config = _text(self._deployment.gateway_config) or ""
        parts = [_ADDRESS.sub(r"\1", config), _text(Path(self.paths.lua)) or ""]
        parts += [f"{path} {_stamp(path)}" for path in secrets_of(settings)]
        return _digest("\n".join(parts))

    # --- its block

    def _put_block(self, text: str) -> None:
        """Ours, or an edit of it that supervisord can read."""
        path = self.block
        if _text(path) is None or self.is_ours(path):
            self._put(path, text)
        elif self._is_edit_to_judge(path):
            problem = self._block_problem()
            if problem:
                self._set_aside(path, text, problem)
            else:
                self._edits[path].is_judged = True

    def _block_problem(self) -> str:
        """Why supervisord cannot read it; empty where it can."""
        broken = config_files.broken_files(self._deployment.main_config)
        return next((str(one) for one in broken if one.path == self.block), "")

    def require_ours(self) -> None:
        """Refuse to touch a block that somebody else made.

        Raises:
            ConfigError: it is not ours; says how to mend that.
        """
        text = _text(self.block)
        if text is None:
            if os.path.lexists(self.block):
                raise ConfigError(f"{self.block} cannot be read; the gateway waits for that")
            return
        was_ours = self._mark(self.block).exists()
        if self.record in text or self.is_ours(self.block):
            return
        if was_ours and self._block_problem():
            return  # a broken edit, which is set aside
        raise NotOurs(str(self.block))

    def withdraw(self) -> None:
        """The block goes; one that was edited by hand is kept beside."""
        if self.is_ours(self.block):
            self.block.unlink()
        elif self.block.exists():
            os.replace(self.block, self.block.with_name(f"{self.block.name}.old"))


def _require_free(before: str | None, text: str) -> None:
    """Refuse to move to a port that is taken: HAProxy would be deaf for a moment, to find out.

    Raises:
        ConfigError: names the port.
    """
    there = _BIND.search(text)
    was = _BIND.search(before or "")
    if there is None or was is None or there[0] == was[0]:
        return
    host, port = there[1], int(there[2])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As HAProxy does: its own worker on the same port is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"the gateway stays where it is: cannot listen on {host}:{port}: {error.strerror}"
            ) from None


def secrets_of(settings: GatewaySettings) -> tuple[Path, ...]:
    """The files with keys that HAProxy reads."""
    named = (settings.api_key_file, settings.tls_certificate)
    return tuple(Path(name) for name in named if name)


def require_private(path: Path) -> None:
    """Refuse keys that others can read, or that are not there.

    Raises:
        ConfigError: says how to mend it.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{path}: is not a regular file")
    if info.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path}: belongs to user {info.st_uid}, not to you: chown it")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"{path}: others may read or write the keys in it: chmod 600 {path}")


def _text(path: Path) -> str | None:
    """What stands in a regular file; a named pipe is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return file.read(_LARGEST_FILE_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
