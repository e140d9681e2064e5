"""The gateway, as the listener looks after it: HAProxy's configuration as the settings and the
models have it, its maps as the world is, and HAProxy alive.

Level-triggered, like everything here: each look compares what should be with what is. It runs on a
thread of its own; the loop only hands over what it knows, and the newest of that counts. Whatever
goes wrong costs the gateway alone, never a model; and a gateway that runs is looked after though
its files cannot be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import haproxy
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.haproxy import Haproxy, Runtime
from supervisor_synapse.adapters.supervisord import Process, Refused, Supervisord
from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.gateway import Tables, Upstream, Verdict, tables
from supervisor_synapse.core.model import Phase, ProcessState, Program, Row
from supervisor_synapse.core.settings import GatewaySettings
from supervisor_synapse.errors import ConfigError, ShuttingDown, SynapseError, TransientError
from supervisor_synapse.gateway_files import PROGRAM, Files, NotOurs, Wanted

__all__ = ["PROGRAM", "Gateway", "View"]

_LOOK_SECONDS = 1.0  # between two looks while nothing changes
_RPC_SECONDS = 5.0
_SILENT_SECONDS = 2.0  # without an answer: it is frozen
_REPAIR_SECONDS = 2.0  # between two attempts to have it run; each one doubles that
_LONGEST_REPAIR_SECONDS = 60.0
_FIND_SECONDS = 60.0  # between two looks for a haproxy that was not there
_STUCK_SECONDS = 3.0  # a ready model that is still taken out was forgotten
_LOG_BYTES = 4096  # of the end of its log, to say why it does not start

_AT_REST = frozenset({ProcessState.STOPPED, ProcessState.EXITED, ProcessState.FATAL})
_ON_THEIR_WAY_OUT = frozenset({Phase.DRAINING, Phase.STOPPING})

_log = logging.getLogger("synapse")


@dataclass(frozen=True, slots=True)
class View:
    """What the loop knows of what concerns the gateway."""

    settings: GatewaySettings
    programs: tuple[Program, ...]
    rows: tuple[Row, ...]
    verdicts: Mapping[str, Verdict]
    process: Process | None  # supervisord's program of that name


class _Patience:
    """What cannot work is tried ever less often."""

    def __init__(self) -> None:
        self._next_at, self._seconds = 0.0, _REPAIR_SECONDS

    def may_try(self) -> bool:
        now = time.monotonic()
        if now < self._next_at:
            return False
        self._next_at = now + self._seconds
        self._seconds = min(2 * self._seconds, _LONGEST_REPAIR_SECONDS)
        return True

    def has_worked(self) -> None:
        self._seconds = _REPAIR_SECONDS


class Gateway:
    """One deployment's gateway. `tell` is for the event loop; the rest runs on its thread."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, "gateway")
        self._rpc = Supervisord(deployment.socket, _RPC_SECONDS)
        self._runtime = Runtime(deployment.gateway_socket)
        self._files = Files(deployment)
        self._newest: View | None = None
        self._last: tuple[View | None, float] = (None, 0.0)
        self._task: asyncio.Task[None] | None = None
        self._haproxy: tuple[Haproxy | None, float] = (None, -_FIND_SECONDS)
        self._known_pid = 0  # of a process that is ours
        self._worker = _Worker()
        self._asked_to_load: tuple[int, str] = (0, "")  # which worker, and what
        self._silent_since: float | None = None
        self._starting, self._loading = _Patience(), _Patience()
        self._stuck_since: dict[str, float] = {}
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
                await loop.run_in_executor(self._thread, self.look, view)
        except Exception:
            _log.exception("gateway")
        finally:
            self._task = None

    # --- on the thread ------------------------------------------------------------------------

    def look(self, view: View) -> None:
        """See what is there, and do what is to be done. What fails is said, and tried again."""
        seen, at = self._last
        now = time.monotonic()
        if seen == view and now - at < _LOOK_SECONDS:
            return
        self._last = (view, now)
        problems = self._keep(view)
        if problems:
            self._complain("; ".join(problems))
        elif view.process is None or view.process.state is ProcessState.RUNNING:
            self._complaint = ""

    def _complain(self, reason: str) -> None:
        """Once, as long as it stays the same."""
        if reason != self._complaint:
            _log.warning("gateway", extra={"reason": reason})
        self._complaint = reason

    def _keep(self, view: View) -> list[str]:
        """Why it is not as it should be."""
        problems = []
        binary = self._find()
        is_off = self._is_off(view, binary)
        try:
            self._require_ours(view)
            if is_off:
                self._withdraw(view)
                return []
        except NotOurs as error:
            return [] if is_off else [str(error)]
        except ShuttingDown:
            return []
        except (SynapseError, OSError) as error:
            return [str(error)]
        is_written = False
        try:
            self._write(view, binary)
            is_written = True
        except (SynapseError, OSError) as error:
            problems.append(str(error))
        try:
            self._look_after(view, is_written)
        except (SynapseError, OSError) as error:
            problems.append(str(error))
        return problems

    # --- whether there is to be one

    def _require_ours(self, view: View) -> None:
        """A program of that name that somebody else made is neither stopped, nor started, nor
        signalled.
        """
        self._files.require_ours()
        process = view.process
        if process is None or (process.pid and process.pid == self._known_pid):
            return
        command = self._rpc.commands().get(PROGRAM, "")
        if process.group != PROGRAM or self._files.record not in command:
            raise NotOurs("supervisord")
        self._known_pid = process.pid

    def _find(self) -> Haproxy | None:
        """The HAProxy on this machine; one that has gone, or was of no use, is looked for anew."""
        found, at = self._haproxy
        now = time.monotonic()
        if not _is_fit(found) and now - at >= _FIND_SECONDS:
            found = haproxy.find()
            self._haproxy = (found, now)
        return found

    def _is_off(self, view: View, binary: Haproxy | None) -> bool:
        """One that runs is not given up because its file is away for a moment."""
        if view.settings.enabled is None:
            is_running = view.process is not None and view.process.pid > 0
            return not _is_fit(binary) and not is_running
        return not view.settings.enabled

    def _withdraw(self, view: View) -> None:
        """Nothing of the gateway stays where it is off."""
        self._files.withdraw()
        if view.process is None:
            return
        if view.process.state not in _AT_REST:
            self._rpc.stop(PROGRAM)
            return
        with contextlib.suppress(Refused):  # a broken file of others does not keep it
            self._rpc.reread()
        self._rpc.remove(PROGRAM)

    # --- files

    def _write(self, view: View, binary: Haproxy | None) -> None:
        if binary is None or not _is_fit(binary):
            raise ConfigError(f"cannot set up the gateway: {_unfitness(binary)}")
        wanted = Wanted(view.settings, tuple(_upstreams(view)))
        self._files.write(wanted, _tables(view), binary)
        if view.process is None:
            self._rpc.reread()
            self._rpc.add(PROGRAM)

    # --- the process

    def _look_after(self, view: View, is_written: bool) -> None:
        pid = self._worker_pid(view)
        if pid is None:
            return
        if pid != self._worker.pid:
            self._worker = _Worker(pid)
            self._take_out_again(view)
        if is_written:
            self._have_loaded(view, pid)
        self._move(view)
        self._push(view)
        self._bring_back_forgotten(view)

    def _worker_pid(self, view: View) -> int | None:
        """Of the worker that answers; None while there is none, which is mended.

        Raises:
            ConfigError: it does not start; says why.
            TransientError: it does not answer.
        """
        process = view.process
        if process is None:
            return None
        if process.state in _AT_REST:
            self._start(view, process)
        if process.state is not ProcessState.RUNNING:
            return None
        try:
            pid = self._runtime.pid()
        except TransientError:
            self._suspect()
            raise
        self._silent_since = None
        self._starting.has_worked()
        return pid

    def _start(self, view: View, process: Process) -> None:
        """Unless somebody has stopped it by hand. With the block that stands there now."""
        if process.state is ProcessState.STOPPED and process.start > 0:
            return
        if self._starting.may_try():
            if PROGRAM in self._rpc.reread().changed:
                self._rpc.remove(PROGRAM)
                self._rpc.add(PROGRAM)
            self._files.loaded = self._files.to_load(view.settings)
            self._rpc.start(PROGRAM)
        if process.state is not ProcessState.STOPPED:
            why = _last_words(self._deployment.log_file(PROGRAM)) or process.spawnerr
            raise ConfigError(f"haproxy does not start: {why}")

    def _suspect(self) -> None:
        """Silent for long: frozen, and so killed; supervisord starts it again."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        if now - self._silent_since >= _SILENT_SECONDS and self._starting.may_try():
            _log.warning("gateway", extra={"reason": "it does not answer; it is killed"})
            self._rpc.signal(PROGRAM, "KILL")
            self._silent_since = None

    def _have_loaded(self, view: View, pid: int) -> None:
        """A new worker takes over where the configuration, the Lua or the keys have changed; the
        old one ends what it has under way.

        Raises:
            ConfigError: a new worker was asked for, and there is none.
        """
        wanted = self._files.to_load(view.settings)
        if wanted == self._files.loaded:
            return
        asked_of, asked = self._asked_to_load
        if asked == wanted and pid != asked_of:
            self._files.loaded = wanted
            self._loading.has_worked()
            return
        if asked != wanted:
            self._loading.has_worked()
        is_overdue = asked == wanted
        if self._loading.may_try():
            self._asked_to_load = (pid, wanted)
            self._files.loaded = ""  # nobody knows, until there is a new one
            self._rpc.signal(PROGRAM, "USR2")
            if is_overdue:
                why = _last_words(self._deployment.log_file(PROGRAM))
                raise ConfigError(f"haproxy goes on with its former configuration: {why or '?'}")

    # --- what the worker is told

    def _take_out_again(self, view: View) -> None:
        """A new worker does not know which models are on their way out."""
        for row in view.rows:
            if row.phase in _ON_THEIR_WAY_OUT:
                with contextlib.suppress(haproxy.Unknown):
                    self._runtime.drain(row.name)

    def _move(self, view: View) -> None:
        """Servers listen where the models do now; an edited configuration may lack some."""
        for upstream in _upstreams(view):
            if upstream not in self._worker.moved:
                with contextlib.suppress(haproxy.Unknown):
                    self._runtime.move(upstream.name, upstream.host, upstream.port)
                self._worker.moved = {
                    *(one for one in self._worker.moved if one.name != upstream.name), upstream,
                }  # fmt: skip

    def _push(self, view: View) -> None:
        """The maps as they should be; on disk too, for a HAProxy that is started anew."""
        found = _tables(view)
        if found == self._worker.told:
            return
        paths = self._files.paths
        for path, entries in ((paths.routes_map, found.routes), (paths.models_map, found.models)):
            self._runtime.replace_map(Path(path), entries)
        self._worker.told = found
        with contextlib.suppress(OSError):  # told next time, and what runs has it
            self._files.write_maps(found)

    def _bring_back_forgotten(self, view: View) -> None:
        """A launcher that did not reach HAProxy when its server began could not bring it back."""
        now = time.monotonic()
        if now < self._worker.look_at:
            return
        self._worker.look_at = now + _LOOK_SECONDS
        servers = self._runtime.servers()
        stuck = {
            row.name
            for row in view.rows
            if row.phase is Phase.READY and row.name in servers and servers[row.name].is_draining
        }
        self._stuck_since = {name: self._stuck_since.get(name, now) for name in stuck}
        for name, since in self._stuck_since.items():
            if now - since >= _STUCK_SECONDS:
                self._runtime.admit(name)


class _Worker:
    """What one worker of HAProxy's has been told; another one has what stands in its files."""

    def __init__(self, pid: int = 0) -> None:
        self.pid = pid
        self.told: Tables | None = None
        self.moved: set[Upstream] = set()
        self.look_at = 0.0


def _is_fit(binary: Haproxy | None) -> bool:
    return binary is not None and not binary.problem and os.access(binary.path, os.X_OK)


def _unfitness(binary: Haproxy | None) -> str:
    if binary is None:
        return "there is no haproxy on PATH"
    return f"{binary.path}: {binary.problem or 'it is there no more'}"


def _tables(view: View) -> Tables:
    return tables(view.programs, view.rows, view.verdicts)


def _upstreams(view: View) -> list[Upstream]:
    """Where the servers are told to listen, in a stable order."""
    return sorted(_addresses(view.programs, view.rows), key=lambda one: one.name)


def _addresses(programs: Iterable[Program], rows: Iterable[Row]) -> Iterable[Upstream]:
    ports = {row.name: row.port for row in rows}
    for program in programs:
        yield Upstream(program.name, program.host, ports.get(program.name, program.port))


def _last_words(log: Path) -> str:
    """The last that HAProxy, or the launcher in its place, complained of."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    complaints = [line for line in lines if "[ALERT]" in line or "in use" in line]
    telling = [line for line in complaints if not any(word in line for word in haproxy.SUMMARIES)]
    return printable((telling or complaints or [""])[-1])
