"""The gateway, as the listener looks after it: HAProxy's configuration as the settings and the
models have it, its maps as the world is, and HAProxy alive.

Level-triggered, like everything here: each look compares what should be with what is. It runs on a
thread of its own; the loop only hands over what it knows, and the newest of that counts. Whatever
goes wrong costs the gateway alone, never a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import haproxy, store
from supervisor_synapse.adapters.deployment import Deployment, launcher_command
from supervisor_synapse.adapters.haproxy import Haproxy, Runtime
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.core.gateway import GatewayPaths, Tables, Upstream, Verdict, tables
from supervisor_synapse.core.model import ProcessState, Program, Row
from supervisor_synapse.core.settings import GatewaySettings
from supervisor_synapse.errors import ConfigError, SynapseError, TransientError

PROGRAM = "gateway"

_LOOK_SECONDS = 1.0  # between two looks while nothing changes
_RPC_SECONDS = 5.0
_SILENT_LOOKS = 2  # without an answer: it is frozen
_REPAIR_SECONDS = 2.0  # between two attempts to have it run; each one doubles that
_LONGEST_REPAIR_SECONDS = 60.0
_FIND_SECONDS = 60.0  # between two looks for a haproxy that was not there
_ADDRESS = re.compile(r"^(    server model )\S+", re.MULTILINE)

_log = logging.getLogger("synapse")


@dataclass(frozen=True, slots=True)
class View:
    """What the loop knows of what concerns the gateway."""

    settings: GatewaySettings
    programs: tuple[Program, ...]
    rows: tuple[Row, ...]
    verdicts: Mapping[str, Verdict]
    process: Process | None  # supervisord's program of that name


class Gateway:
    """One deployment's gateway. `tell` is for the event loop; the rest runs on its thread."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, "gateway")
        self._rpc = Supervisord(deployment.socket, _RPC_SECONDS)
        self._runtime = Runtime(deployment.gateway_socket)
        self._newest: View | None = None
        self._last: tuple[View | None, float] = (None, 0.0)
        self._task: asyncio.Task[None] | None = None
        self._haproxy: tuple[Haproxy | None, float] = (None, -_FIND_SECONDS)
        self._pushed: tuple[int, Tables | None] = (0, None)  # to which worker
        self._checked: tuple[int, int, int] | None = None  # the configuration that was found good
        self._silent_looks = 0
        self._repair_at, self._repair_seconds = 0.0, _REPAIR_SECONDS
        self._complaint = ""

    def tell(self, view: View) -> None:
        """Hand over what is known now."""
        self._newest = view
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._newest is not None:
                view, self._newest = self._newest, None
                await loop.run_in_executor(self._thread, self._look, view)
        finally:
            self._task = None

    # --- on the thread ------------------------------------------------------------------------

    def _look(self, view: View) -> None:
        seen, at = self._last
        now = time.monotonic()
        if seen == view and now - at < _LOOK_SECONDS:
            return
        self._last = (view, now)
        try:
            self._keep(view)
            self._complaint = ""
        except (SynapseError, OSError) as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        """Once, as long as it stays the same."""
        if reason != self._complaint:
            _log.warning("gateway", extra={"reason": reason})
        self._complaint = reason

    def _keep(self, view: View) -> None:
        binary = self._find(view.settings)
        if binary is None:
            self._withdraw(view)
            return
        self._write(view, binary)
        if self._is_running(view, binary):
            self._push(view)

    def _find(self, settings: GatewaySettings) -> Haproxy | None:
        """The HAProxy to be used; None where the gateway is off."""
        if settings.enabled is False:
            return None
        found, at = self._haproxy
        now = time.monotonic()
        if found is None and now - at >= _FIND_SECONDS:
            found = haproxy.find()
            self._haproxy = (found, now)
        if found is not None and not found.problem:
            return found
        if settings.enabled:
            why = f"{found.path}: {found.problem}" if found else "there is no haproxy on PATH"
            raise ConfigError(f"the gateway is enabled, but {why}")
        return None

    def _withdraw(self, view: View) -> None:
        """Nothing of the gateway stays where it is off."""
        block = self._block_path
        if block.exists() and self._is_ours(block):
            block.unlink()
        if view.process is not None and not block.exists():
            self._rpc.reread()
            self._rpc.stop(PROGRAM)
            if view.process.state in _AT_REST:
                self._rpc.remove(PROGRAM)

    # --- files

    @property
    def _block_path(self) -> Path:
        return self._deployment.blocks / f"{PROGRAM}.conf"

    def _write(self, view: View, binary: Haproxy) -> None:
        """The files as they should be; an edit of the user's that works is kept."""
        from supervisor_synapse import render  # not small, and needed only where there is a gateway

        templates = render.Templates(self._deployment.templates)
        self._deployment.gateway.mkdir(mode=0o700, exist_ok=True)
        paths = self._paths()
        self._put(Path(paths.lua), templates.render(render.GATEWAY_LUA, {}))
        found = _tables(view)
        for path, entries in ((paths.routes_map, found.routes), (paths.models_map, found.models)):
            if not os.path.exists(path):
                store.write_text(Path(path), haproxy.map_text(entries))
        self._put_config(render.render_gateway(templates, view.settings, _upstreams(view), paths),
                         binary, view)  # fmt: skip
        block = render.render_gateway_block(
            templates,
            (*launcher_command(), "--drain", "0", "--term", "2", "--record",
             str(self._deployment.run / f"{PROGRAM}.run"), "--", binary.path, "-W", "-db", "-f",
             str(self._deployment.gateway_config)),
            str(self._deployment.prefix), str(self._deployment.log / f"{PROGRAM}.log"),
            view.settings,
        )  # fmt: skip
        is_new = not self._block_path.exists()
        if is_new or self._is_ours(self._block_path):
            self._put(self._block_path, block)
        if view.process is None:
            self._rpc.reread()
            self._rpc.add(PROGRAM)

    def _paths(self) -> GatewayPaths:
        deployment = self._deployment
        return GatewayPaths(
            socket=str(deployment.gateway_socket),
            again_socket=str(deployment.run / "gateway-again.sock"),
            supervisord_socket=str(deployment.socket),
            routes_map=str(deployment.gateway / "routes.map"),
            models_map=str(deployment.gateway / "models.map"),
            lua=str(deployment.gateway / "gateway.lua"),
        )

    def _put(self, path: Path, text: str) -> bool:
        """Write a file of ours where it says something else; whether that was so."""
        if _text(path) == text:
            return False
        self._note(path, text)
        store.write_text(path, text)
        return True

    def _note(self, path: Path, text: str) -> None:
        """By its digest a file is known for ours, so an edit is seen; before it is written."""
        store.write_text(self._mark(path), _digest(text))

    def _is_ours(self, path: Path) -> bool:
        text = _text(path)
        return text is not None and _text(self._mark(path)) == _digest(text)

    def _mark(self, path: Path) -> Path:
        return self._deployment.gateway / f"{path.name}.sha256"

    def _put_config(self, text: str, binary: Haproxy, view: View) -> None:
        path = self._deployment.gateway_config
        before = _text(path)
        if before is not None and not self._is_ours(path):
            self._judge_edit(path, before, text, binary)
            return
        if before == text:
            return
        self._require_good(path, text, binary)
        self._put(path, text)
        self._tell_changed(before, text, view)

    def _judge_edit(self, path: Path, edited: str, ours: str, binary: Haproxy) -> None:
        """An edit that HAProxy takes stays, and ours lies beside it; another one is set aside."""
        stamp = _stamp(path)
        if stamp == self._checked:
            return
        problem = haproxy.check(binary, path)
        if problem:
            os.replace(path, path.with_name(f"{path.name}.rejected"))
            self._put(path, ours)
            _log.warning("gateway", extra={"reason": f"{path.name} was rejected: {problem}"})
        else:
            store.write_text(path.with_name(f"{path.name}.new"), ours)
            _log.info("gateway", extra={"reason": f"{path.name} was edited by hand, and is kept"})
        self._reload()
        self._checked = _stamp(path)

    def _require_good(self, path: Path, text: str, binary: Haproxy) -> None:
        """Ask HAProxy before anything is replaced.

        Raises:
            ConfigError: its reason.
        """
        trial = path.with_name(f".{path.name}.trial")
        store.write_text(trial, text)
        try:
            problem = haproxy.check(binary, trial)
        finally:
            trial.unlink(missing_ok=True)
        if problem:
            raise ConfigError(f"haproxy does not take its configuration: {problem}")

    def _tell_changed(self, before: str | None, text: str, view: View) -> None:
        """Where only addresses have changed, nothing is loaded anew."""
        if before is None or view.process is None or not view.process.pid:
            return
        if _ADDRESS.sub(r"\1", before) == _ADDRESS.sub(r"\1", text):
            for upstream in _upstreams(view):
                self._runtime.move(upstream.name, upstream.host, upstream.port)
            return
        self._reload()

    def _reload(self) -> None:
        """A new worker takes over; the old one ends what it has under way."""
        self._rpc.signal(PROGRAM, "USR2")

    # --- the process

    def _is_running(self, view: View, binary: Haproxy) -> bool:
        process = view.process
        if process is None:
            return False
        if process.state in _AT_REST:
            is_by_hand = process.state is ProcessState.STOPPED and process.start > 0
            if not is_by_hand and self._may_repair():
                self._rpc.start(PROGRAM)
            return False
        if process.state is not ProcessState.RUNNING:
            return False
        try:
            pid = self._runtime.pid()
        except TransientError:
            self._silent_looks += 1
            if self._silent_looks >= _SILENT_LOOKS and self._may_repair():
                _log.warning("gateway", extra={"reason": "it does not answer; it is killed"})
                self._rpc.signal(PROGRAM, "KILL")
            raise
        self._silent_looks, self._repair_seconds = 0, _REPAIR_SECONDS
        if pid != self._pushed[0]:
            self._pushed = (pid, None)
        return True

    def _may_repair(self) -> bool:
        """What cannot work (its port is taken) is tried ever less often."""
        now = time.monotonic()
        if now < self._repair_at:
            return False
        self._repair_at = now + self._repair_seconds
        self._repair_seconds = min(2 * self._repair_seconds, _LONGEST_REPAIR_SECONDS)
        return True

    def _push(self, view: View) -> None:
        """The maps as they should be; on disk too, for a HAProxy that is started anew."""
        found = _tables(view)
        pid, before = self._pushed
        if found == before:
            return
        paths = self._paths()
        for path, entries in ((paths.routes_map, found.routes), (paths.models_map, found.models)):
            self._runtime.replace_map(Path(path), entries)
            with contextlib.suppress(OSError):
                store.write_text(Path(path), haproxy.map_text(entries))
        self._pushed = (pid, found)


_AT_REST = frozenset(
    {ProcessState.STOPPED, ProcessState.EXITED, ProcessState.FATAL}
)  # fmt: skip


def _tables(view: View) -> Tables:
    return tables(view.programs, view.rows, view.verdicts)


def _upstreams(view: View) -> list[Upstream]:
    """Where the servers are told to listen, in a stable order."""
    return sorted(_addresses(view.programs, view.rows), key=lambda one: one.name)


def _addresses(programs: Iterable[Program], rows: Iterable[Row]) -> Iterable[Upstream]:
    ports = {row.name: row.port for row in rows}
    for program in programs:
        yield Upstream(program.name, program.host, ports.get(program.name, program.port))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
