"""The listener's loop: observe, decide, act, publish. The sole owner of changing state.

Events only wake the loop; each turn reads the whole truth from supervisord and the servers. What
waits for others (XML-RPC, probes, memory) runs on threads, so that the loop never blocks and
stdin is always read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from supervisor_synapse import effects
from supervisor_synapse.adapters import history, processes, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.events import Connection, Event
from supervisor_synapse.adapters.http import Endpoint, Prober, Reading
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.core.arguments import Served, parse_served
from supervisor_synapse.core.decide import (
    Decision,
    ModelState,
    Now,
    Policy,
    Seen,
    Transition,
    decide,
)
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.model import (
    Health,
    Incarnation,
    Phase,
    ProcessState,
    Program,
    Row,
    Snapshot,
)
from supervisor_synapse.errors import ShuttingDown, TransientError

_RPC_TIMEOUT_SECONDS = 5.0
_IDLE_TICK_SECONDS = 1.0
_BUSY_TICK_SECONDS = 0.1  # while something is on its way
_LOADING_PROBE_SECONDS = 0.1
_HEARTBEAT_SECONDS = 5.0  # a snapshot is published at least so often
_MEMORY_SECONDS = 10.0
_MOST_PROBES = 16
_LOG_TAIL_BYTES = 16 * 1024
_LARGEST_KEY_FILE_BYTES = 4096

_UNDER_WAY = frozenset(
    {Phase.PENDING, Phase.LOADING, Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING}
)

_log = logging.getLogger("synapse")

_A = TypeVar("_A")
_T = TypeVar("_T")


@dataclass(slots=True)
class _Watched:
    """What the loop holds of one incarnation: its prober and the newest readings."""

    incarnation: Incarnation
    served: Served
    prober: Prober
    reading: Reading | None = None
    probed_at: float = 0.0
    probe: asyncio.Task[None] | None = None
    memory_bytes: int | None = None
    measured_at: float = 0.0


@dataclass(slots=True)
class _World:
    """The registry as last read, and what it said of programs that run."""

    registry: Registry = field(default_factory=Registry)
    stamp: tuple[int, int] = (0, 0)  # of the file: mtime and inode


class Listener:
    """Brings enabled models up and tells what is. One in each supervisord."""

    def __init__(self, deployment: Deployment, stdin: int = 0, stdout: int = 1) -> None:
        self._deployment = deployment
        self._stdin, self._stdout = stdin, stdout
        self._rpc = Supervisord(deployment.socket, _RPC_TIMEOUT_SECONDS)
        self._rpc_thread = ThreadPoolExecutor(1, "rpc")
        self._probe_threads = ThreadPoolExecutor(_MOST_PROBES, "probe")
        self._wake = asyncio.Event()
        self._end: str | None = None
        self._world = _World()
        self._states: Mapping[str, ModelState] = {}
        self._watched: dict[str, _Watched] = {}
        self._endings: dict[str, tuple[Incarnation, Ending]] = {}
        self._published = (0.0, "")

    async def run(self) -> None:
        """Until supervisord ends or stops us."""
        stdin = open(self._stdin, "rb", buffering=0, closefd=False)  # noqa: ASYNC230, SIM115 - a pipe
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: Connection(self._stdout, self._on_event, self._on_end), stdin
        )
        _log.info("listening", extra={"prefix": str(self._deployment.prefix)})
        while self._end is None:
            self._wake.clear()
            await self._turn()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._pause())
        _log.info("ended", extra={"reason": self._end})

    def _on_event(self, event: Event) -> None:
        if event.name == "SUPERVISOR_STATE_CHANGE_STOPPING":
            self._end = "supervisord is stopping"
        self._wake.set()

    def _on_end(self, reason: str) -> None:
        self._end = self._end or reason
        self._wake.set()

    def _pause(self) -> float:
        """A little uneven, so that many listeners do not beat in step."""
        under_way = any(state.phase in _UNDER_WAY for state in self._states.values())
        pause = _BUSY_TICK_SECONDS if under_way else _IDLE_TICK_SECONDS
        return pause * random.uniform(0.9, 1.1)  # noqa: S311 - not a secret

    async def _turn(self) -> None:
        """Observe, decide, act, publish; what fails is logged, and the next turn tries anew."""
        try:
            self._read_registry()
            seen = await self._observe()
            decision = decide(self._states, seen, _now(), self._policy())
            self._states = decision.states
            self._record(decision.transitions)
            await self._act(decision)
            await self._publish(seen)
        except ShuttingDown as error:
            self._on_end(str(error))
        except TransientError as error:
            _log.warning("turn failed", extra={"reason": str(error)})
        except Exception:
            _log.exception("turn failed")

    def _policy(self) -> Policy:
        settings = self._world.registry.settings
        return Policy(settings.max_parallel, settings.probe.failure_threshold)

    def _read_registry(self) -> None:
        try:
            status = self._deployment.registry.stat()
        except OSError:
            return  # none yet, or not now: what was read last is good
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._world.stamp:
            self._world = _World(registry.load(self._deployment.registry), stamp)

    # --- observe ------------------------------------------------------------------------------

    async def _observe(self) -> list[Seen]:
        found = {process.name: process for process in await self._call(self._rpc.processes)}
        programs = [p for p in self._world.registry.programs if p.name in found]
        self._forget(found)
        for program in programs:
            await self._watch(program, found[program.name])
        self._probe_due()
        await self._await_first_probes()
        return [await self._see(program, found[program.name]) for program in programs]

    def _forget(self, found: Mapping[str, Process]) -> None:
        """Drop what belongs to runs that are over."""
        for name, watched in list(self._watched.items()):
            process = found.get(name)
            if process is None or _incarnation(process) != watched.incarnation:
                watched.prober.close()
                del self._watched[name]
        for name in [name for name in self._endings if name not in found]:
            del self._endings[name]

    async def _watch(self, program: Program, process: Process) -> None:
        """Begin to watch a run that is new."""
        incarnation = _incarnation(process)
        if incarnation is None or program.name in self._watched:
            return
        words = await self._aside(processes.command, incarnation.pid)
        served = parse_served(words, _planned(program))
        if served is None:
            return  # not yet executed; the next look will tell
        key = await self._aside(_api_key, served.api_key_file)
        endpoint = Endpoint(_url(served), key)
        timeout = self._world.registry.settings.probe.timeout_seconds
        self._watched[program.name] = _Watched(incarnation, served, Prober(endpoint, timeout))

    def _probe_due(self) -> None:
        """Start every probe that is due and not under way."""
        now = time.monotonic()
        period = self._world.registry.settings.probe.period_seconds
        for name, watched in self._watched.items():
            ready = watched.reading is not None and watched.reading.health is Health.READY
            wait = period if ready else _LOADING_PROBE_SECONDS
            if watched.probe is None and now - watched.probed_at >= wait:
                watched.probed_at = now
                watched.probe = asyncio.create_task(self._probe(name, watched))

    async def _await_first_probes(self) -> None:
        """A run that has never been probed is judged only after a first answer, if it is quick."""
        first = [w.probe for w in self._watched.values() if w.reading is None and w.probe]
        if first:
            await asyncio.wait(first, timeout=_BUSY_TICK_SECONDS)

    async def _probe(self, name: str, watched: _Watched) -> None:
        loop = asyncio.get_running_loop()
        try:
            reading = await loop.run_in_executor(
                self._probe_threads,
                lambda: watched.prober.probe(with_slots=not watched.served.sleeps),
            )
            if watched.reading is None or reading.health is not watched.reading.health:
                self._wake.set()
            watched.reading = reading
            await self._measure(watched)
        except Exception:
            _log.exception("probe failed", extra={"model": name})
        finally:
            watched.probe = None

    async def _measure(self, watched: _Watched) -> None:
        """The memory of the run, now and then; often while it loads."""
        now = time.monotonic()
        ready = watched.reading is not None and watched.reading.health is Health.READY
        if now - watched.measured_at >= (_MEMORY_SECONDS if ready else _BUSY_TICK_SECONDS):
            watched.measured_at = now
            pid = watched.incarnation.pid
            watched.memory_bytes = await self._aside(processes.resident_bytes, pid)

    async def _see(self, program: Program, process: Process) -> Seen:
        watched = self._watched.get(program.name)
        reading = watched.reading if watched else None
        return Seen(
            name=program.name,
            enabled=program.enabled,
            state=process.state,
            incarnation=_incarnation(process),
            fresh=not process.start,
            health=reading.health if reading else Health.UNKNOWN,
            busy=bool(reading and reading.slots_busy),
            ending=await self._ending(process),
            spawn_error=process.spawnerr,
        )

    async def _ending(self, process: Process) -> Ending | None:
        """How a process ended, read once for each run."""
        if process.state is not ProcessState.EXITED:
            return None
        run = Incarnation(0, process.start)
        known = self._endings.get(process.name)
        if known is None or known[0] != run:
            tail = await self._aside(_log_tail, Path(process.logfile))
            known = (run, Ending(process.exitstatus, tail))
            self._endings[process.name] = known
        return known[1]

    # --- act and tell ---------------------------------------------------------------------------

    async def _act(self, decision: Decision) -> None:
        for action in decision.actions:
            refusal = await self._call(partial(effects.perform, action, self._rpc))
            if refusal:
                _log.warning("start refused", extra={"model": action.name, "reason": refusal})
        if decision.actions:
            self._wake.set()

    def _record(self, transitions: Iterable[Transition]) -> None:
        """History and log: one line for each transition."""
        lines = []
        for change in transitions:
            before = change.before.value if change.before else None
            lines.append(
                history.Line(
                    time.time(), change.model, before, change.after.value, change.reason,
                    change.evidence,
                )
            )  # fmt: skip
            _log.info(
                "transition",
                extra={
                    "model": change.model, "from": before, "to": change.after.value,
                    "reason": change.reason, "evidence": change.evidence,
                },
            )  # fmt: skip
        try:
            if lines:
                history.append(self._deployment.history, lines)
        except OSError as error:
            _log.warning("history not written", extra={"reason": error.strerror})

    async def _publish(self, seen: Iterable[Seen]) -> None:
        rows = self._rows(seen)
        now = time.monotonic()
        at, digest = self._published
        newest = repr(rows)
        under_way = any(row.phase in _UNDER_WAY for row in rows)
        if newest == digest and now - at < _HEARTBEAT_SECONDS and not under_way:
            return
        snapshot = Snapshot(time.time(), rows)
        await self._call(partial(self._rpc.publish, snapshot))
        self._published = (now, newest)

    def _rows(self, seen: Iterable[Seen]) -> tuple[Row, ...]:
        programs = {program.name: program for program in self._world.registry.programs}
        generation = self._world.registry.generation
        return tuple(
            _row(programs[one.name], one, self._states[one.name], self._watched.get(one.name),
                 generation)
            for one in seen
        )  # fmt: skip

    async def _call(self, function: Callable[[], _T]) -> _T:
        """On the one thread that speaks XML-RPC."""
        return await asyncio.get_running_loop().run_in_executor(self._rpc_thread, function)

    async def _aside(self, function: Callable[[_A], _T], argument: _A) -> _T:
        """On a thread, since it reads files."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._probe_threads, function, argument)


def _now() -> Now:
    return Now(time.monotonic(), time.time())


def _incarnation(process: Process) -> Incarnation | None:
    return Incarnation(process.pid, process.start) if process.pid else None


def _planned(program: Program) -> Served:
    return Served(
        program.host, program.port, program.alias, program.context, program.parallel, None, False
    )


def _url(served: Served) -> str:
    host = f"[{served.host}]" if ":" in served.host else served.host
    return f"http://{host}:{served.port}"


def _api_key(path: str | None) -> str | None:
    """The first key in the server's key file."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LARGEST_KEY_FILE_BYTES).split("\n", 1)[0].strip() or None
    except OSError:
        return None


def _log_tail(path: Path) -> str:
    """The end of a model's log."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - _LOG_TAIL_BYTES, 0))
            return file.read(_LOG_TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _row(
    program: Program, seen: Seen, state: ModelState, watched: _Watched | None, generation: int
) -> Row:
    served = watched.served if watched else _planned(program)
    reading = watched.reading if watched else None
    return Row(
        name=program.name, repo=program.repo, file=program.file, tier=program.tier,
        role=program.role, enabled=program.enabled, phase=state.phase, reason=state.reason,
        state=seen.state, pid=seen.incarnation.pid if seen.incarnation else 0, port=served.port,
        url=_url(served), alias=served.alias, context=served.context, parallel=served.parallel,
        device=program.device, estimated_bytes=program.estimate_bytes,
        estimate_source=program.estimate_source,
        measured_bytes=watched.memory_bytes if watched else None,
        slots_busy=reading.slots_busy if reading else None, slots_total=served.parallel,
        restarts=state.restarts, ready_seconds=state.ready_seconds if seen.incarnation else None,
        generation=generation, trial=False, last_failure=state.last_failure,
        next_retry_seconds=None,
    )  # fmt: skip


class _KeyValueFormatter(logging.Formatter):
    """`2026-01-02T03:04:05 INFO event key=value …`, one line for each record."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        pairs = [
            f"{key}={_shown(value)}"
            for key, value in record.__dict__.items()
            if key not in self._STANDARD and value not in (None, "")
        ]
        head = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} {record.levelname}"
        line = " ".join([head, record.getMessage(), *pairs])
        if record.exc_info:
            line += " traceback=" + ascii(self.formatException(record.exc_info))
        return line


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else ascii(text)


def listen(deployment: Deployment) -> None:
    """Run the listener on stdin and stdout, as supervisord starts it. Logs go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_KeyValueFormatter())
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    asyncio.run(Listener(deployment).run())
