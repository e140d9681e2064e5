"""What the listener sees of each model: supervisord's word, the server's answers, the evidence.

Every run that is up is tended by a task of its own, which asks it quick and patient questions (see
core/probes.py) and keeps what they add up to. What waits for others runs on threads, bounded in
number, so that a silent server holds up nobody but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from supervisor_synapse.adapters import damage, processes, sockets
from supervisor_synapse.adapters.gpu import drivers
from supervisor_synapse.adapters.gpu.readings import Reading
from supervisor_synapse.adapters.http import Endpoint, Prober
from supervisor_synapse.adapters.supervisord import Process
from supervisor_synapse.core import failover, probes
from supervisor_synapse.core.arguments import Served, parse_served
from supervisor_synapse.core.estimate import HOST
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.ladder import fallback_of, name_of
from supervisor_synapse.core.load_log import Loaded, is_on_host, parse_load
from supervisor_synapse.core.model import (
    Device,
    Health,
    Incarnation,
    ProcessState,
    Program,
    Usage,
)
from supervisor_synapse.core.probes import Liveness, Verdict
from supervisor_synapse.core.settings import MIB, ProbePolicy
from supervisor_synapse.core.state import ModelState, Seen

_LOADING_PROBE_SECONDS = 0.1
_LONG_LOADING_PROBE_SECONDS = 0.5
_LONG_LOADING_SECONDS = 5.0
_DRAIN_PROBE_SECONDS = 0.5
_SHORTEST_PAUSE_SECONDS = 0.05
_FIRST_ANSWER_SECONDS = 0.1
_FOREIGN_SECONDS = 10  # after so long its launcher has long been executed
_FOOTPRINT_SECONDS = 0.25
_MEMORY_SECONDS = 30.0
_SETTLING_MEMORY_SECONDS = 5.0
_SETTLED_SECONDS = 60.0
_PATIENCE_MARGIN_SECONDS = 10.0  # a patient question outlives the verdict that it leads to
_DOZE_MARGIN_SECONDS = 1.0
_LINGER_SECONDS = 1.0  # what is left of a run may go by itself for so long, then it is killed
_GONE_SECONDS = 10.0
_GONE_POLL_SECONDS = 0.02
_MAY_KEEP = 0.05  # of what a run held on its device
_NOISE_BYTES = 64 * MIB  # what drivers take and give for themselves
_MOST_QUICK = 16
_MOST_PATIENT = 64
_MOST_ASIDE = 4
_LOG_TAIL_BYTES = 16 * 1024
_IDLE_WORDS = b"all slots are idle"  # llama-server, at the verbosity that we ask for
_LOAD_TEXT_BYTES = 512 * 1024
_MOST_LOAD_LOOKS = 3  # a log that does not tell then never will
_LARGEST_KEY_FILE_BYTES = 4096

_ENDED = frozenset({ProcessState.EXITED, ProcessState.FATAL})

_log = logging.getLogger("synapse")

_A = TypeVar("_A")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whether a model shall run, and why or why not."""

    enabled: bool
    why: str
    is_swapped: bool = False


@dataclass(slots=True)
class Watched:
    """One run that is up: what it was told, and what it has shown."""

    incarnation: Incarnation
    served: Served
    prober: Prober
    live: Liveness
    since: float
    told_at: float = 0.0  # when its counters came
    told_asked_at: float = 0.0  # and when they had been asked for
    drain_at: float | None = None  # it stops when it is idle, since then
    hurry: asyncio.Event = field(default_factory=asyncio.Event)  # to ask now
    logged_bytes: int = -1
    memory_bytes: int | None = None  # resident, while it loads
    device: Device | None = None  # where that is not the host
    reading: Reading | None = None  # of that device, while it ran
    device_bytes: int = 0  # of that, its own
    measured_at: float = 0.0
    loaded: Loaded | None = None  # what its log tells of its load
    load_looks: int = 0  # how often that was looked for
    answered: asyncio.Event = field(default_factory=asyncio.Event)  # or failed to, once
    tending: asyncio.Task[None] | None = None
    probe_seconds: float | None = None  # until the last answer
    asking: asyncio.Task[None] | None = None  # the patient question that is out
    canary: asyncio.Task[None] | None = None

    def end(self) -> None:
        """Ask no more; what is out comes to its own end."""
        for task in (self.tending, self.asking, self.canary):
            if task is not None:
                task.cancel()
        self.prober.close()


@dataclass(slots=True)
class Leaving:
    """A run that is over, until it is verified that nothing of it is left."""

    incarnation: Incarnation
    port: int
    device: Device | None
    before: Reading | None  # of the device, while it ran
    held_bytes: int  # on the device
    task: asyncio.Task[None] | None = None
    is_over: bool = False
    residue: str = ""


class Observer:
    """Watches every run that is up, and looks after those that are over. For one event loop."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._quick = ThreadPoolExecutor(_MOST_QUICK, "quick")
        self._patient = ThreadPoolExecutor(_MOST_PATIENT, "patient")
        self._aside = ThreadPoolExecutor(_MOST_ASIDE, "aside")
        self._policy = ProbePolicy()
        self._watched: dict[str, Watched] = {}
        self._devices: Mapping[str, Device] = {}
        self._leaving: dict[str, Leaving] = {}
        self._endings: dict[str, tuple[int, Ending]] = {}

    def watched(self, name: str) -> Watched | None:
        return self._watched.get(name)

    @property
    def leaving(self) -> frozenset[str]:
        """Models whose last run is over, but not yet verified to have left nothing."""
        return frozenset(name for name, one in self._leaving.items() if not one.is_over)

    async def look(
        self,
        programs: Iterable[Program],
        found: Mapping[str, Process],
        wanted: Mapping[str, Wanted],
        states: Mapping[str, ModelState],
        policy: ProbePolicy,
        devices: Iterable[Device] = (),
    ) -> list[Seen]:
        """What there is now of each program that supervisord knows."""
        self._policy = policy
        self._devices = {device.name: device for device in devices if not device.is_host}
        known = [program for program in programs if program.name in found]
        self._forget({program.name: found[program.name] for program in known})
        for program in known:
            await self._watch(program, found[program.name], states.get(program.name))
            self._note_drain(program.name, states)
        await self._await_first_answers()
        return [
            await self._see(
                program, found[program.name], wanted[program.name], states.get(program.name)
            )
            for program in known
        ]

    def forgive(self, seconds: float) -> None:
        """Nobody looked for so long: what was not seen is no evidence."""
        for watched in self._watched.values():
            watched.live = probes.forgive(watched.live, seconds, time.monotonic())

    def close(self) -> None:
        for watched in self._watched.values():
            watched.end()
        for leaving in self._leaving.values():
            if leaving.task is not None:
                leaving.task.cancel()
        for pool in (self._quick, self._patient, self._aside):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- runs that begin and end ------------------------------------------------------------------

    def _forget(self, found: Mapping[str, Process]) -> None:
        """Drop what belongs to runs that are over."""
        for name, watched in list(self._watched.items()):
            process = found.get(name)
            if process is None or incarnation_of(process) != watched.incarnation:
                watched.end()
                del self._watched[name]
                self._verify(name, watched)
        for name in [name for name in self._endings if name not in found]:
            del self._endings[name]
        for name in [name for name, one in self._leaving.items() if one.is_over]:
            if name not in found:
                del self._leaving[name]

    async def _watch(self, program: Program, process: Process, state: ModelState | None) -> None:
        """Begin to watch a run that is new, or new to us."""
        incarnation = incarnation_of(process)
        if incarnation is None or program.name in self._watched:
            return
        words = await self._on(self._aside, processes.command, incarnation.pid)
        served = parse_served(words, planned(program))
        if served is None:
            return  # not yet executed; the next look will tell
        key = await self._on(self._aside, _api_key, served.api_key_file)
        now = time.monotonic()
        patience = self._policy.stall_seconds + _PATIENCE_MARGIN_SECONDS
        prober = Prober(Endpoint(served.url, key), self._policy.timeout_seconds, patience)
        was_ready = bool(state and state.was_ready and state.incarnation == incarnation)
        live = probes.begin(now, was_ready=was_ready)
        watched = Watched(incarnation, served, prober, live, now)
        watched.device = self._devices.get(program.device)
        watched.tending = asyncio.create_task(self._tend(program, process, watched))
        self._watched[program.name] = watched
        self._leaving.pop(program.name, None)

    def _note_drain(self, name: str, states: Mapping[str, ModelState]) -> None:
        """What its slots did before a drain was asked for says nothing: it is asked anew."""
        watched, state = self._watched.get(name), states.get(name)
        if watched is None or state is None or state.drain is (watched.drain_at is not None):
            return
        watched.drain_at = time.monotonic() if state.drain else None
        watched.hurry.set()

    async def _await_first_answers(self) -> None:
        """A run that was never asked is judged only after a first answer, if that is quick."""
        first = [one.answered.wait() for one in self._watched.values() if not one.answered.is_set()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*first), _FIRST_ANSWER_SECONDS)

    def _verify(self, name: str, watched: Watched) -> None:
        """Begin to look for what a run may have left behind."""
        leaving = Leaving(
            watched.incarnation, watched.served.port, watched.device, watched.reading,
            watched.device_bytes if watched.reading else 0,
        )  # fmt: skip
        leaving.task = asyncio.create_task(self._await_gone(name, leaving))
        self._leaving[name] = leaving

    async def _await_gone(self, name: str, leaving: Leaving) -> None:
        """Its process group, its port, its memory on a device: what stays is reported."""
        try:
            leaving.residue = (
                await self._processes_left(leaving)
                or await self._kept(_still_listening, leaving.port)
                or await self._kept(_kept_by_device, leaving)
            )
        except Exception:
            _log.exception("cannot verify a stop", extra={"model": name})
            leaving.residue = "it could not be verified"
        leaving.is_over = True
        self._wake()

    async def _processes_left(self, leaving: Leaving) -> str:
        """What does not go by itself is killed."""
        begun = time.monotonic()
        while True:
            left = await self._on(self._aside, processes.group_of, leaving.incarnation.pid)
            seconds = time.monotonic() - begun
            if not left or seconds > _GONE_SECONDS:
                return ", ".join(f"pid {pid}" for pid in sorted(left))
            if seconds > _LINGER_SECONDS:
                await self._on(self._aside, processes.kill_all, left)
            await asyncio.sleep(_GONE_POLL_SECONDS)

    async def _kept(self, look: Callable[[_A], str], of: _A) -> str:
        """What is still there after a while: the kernel and drivers may take a moment."""
        begun = time.monotonic()
        while True:
            kept = await self._on(self._aside, look, of)
            if not kept or time.monotonic() - begun > _GONE_SECONDS:
                return kept
            await asyncio.sleep(_GONE_POLL_SECONDS)

    # --- questions --------------------------------------------------------------------------------

    async def _tend(self, program: Program, process: Process, watched: Watched) -> None:
        """Ask one run again and again, until it is forgotten."""
        while True:
            begun = time.monotonic()
            before = self._verdict(watched)
            try:
                await self._ask(program, process, watched)
            except Exception:
                _log.exception("probe failed", extra={"model": program.name})
            watched.answered.set()
            is_drained = watched.drain_at is not None and not is_busy(watched)
            if self._verdict(watched) is not before or is_drained:
                self._wake()
            pause = self._pause(watched) - (time.monotonic() - begun)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watched.hurry.wait(), max(pause, _SHORTEST_PAUSE_SECONDS))
            watched.hurry.clear()

    def _verdict(self, watched: Watched) -> Verdict:
        return probes.judge(watched.live, time.monotonic(), self._policy)[0]

    def _pause(self, watched: Watched) -> float:
        if watched.drain_at is not None:
            return min(_DRAIN_PROBE_SECONDS, self._policy.period_seconds)
        if watched.live.was_ready:
            return self._policy.period_seconds
        if time.monotonic() - watched.since < _LONG_LOADING_SECONDS:
            return min(_LOADING_PROBE_SECONDS, self._policy.period_seconds)
        return min(_LONG_LOADING_PROBE_SECONDS, self._policy.period_seconds)

    async def _ask(self, program: Program, process: Process, watched: Watched) -> None:
        if not watched.live.was_ready:
            await self._ask_health(watched, program, process)
            await self._measure(process, watched)
            return
        await self._measure(process, watched)
        if watched.loaded is None and watched.load_looks < _MOST_LOAD_LOOKS:  # its log came late
            await self._read_load(watched, program, process)
        if watched.served.sleeps and await self._on(self._quick, Prober.is_asleep, watched.prober):
            watched.live = probes.on_sleep(watched.live, time.monotonic())
            return
        if watched.served.sleeps and await self._may_doze_off(process, watched):
            await self._ask_health(watched, program, process)
            return
        if not await self._ask_activity(watched):
            await self._ask_health(watched, program, process)
        self._ask_for_a_token(program, watched)

    async def _may_doze_off(self, process: Process, watched: Watched) -> bool:
        """Whether an idle server is left alone, since each question for its counters keeps it
        awake: until it is due to sleep, or its log shows that somebody uses it.
        """
        activity = watched.live.activity
        look = partial(used_since, Path(process.logfile))
        watched.logged_bytes, is_used = await self._on(self._aside, look, watched.logged_bytes)
        is_idle = activity is not None and activity.busy == 0 and watched.asking is None
        is_due = (
            watched.drain_at is not None
            or time.monotonic() - watched.told_at
            >= watched.served.sleep_seconds + _DOZE_MARGIN_SECONDS
        )
        return is_idle and not is_used and not is_due

    async def _read_load(self, watched: Watched, program: Program, process: Process) -> None:
        """What the load took, and whether it came onto the device that it was meant for."""
        watched.load_looks += 1
        watched.loaded, on_host = await self._on(self._aside, _load_told, Path(process.logfile))
        if any(part.device != HOST and part.weights_bytes for part in program.estimate.parts):
            watched.live = replace(watched.live, on_host=on_host)

    async def _ask_health(self, watched: Watched, program: Program, process: Process) -> None:
        asked_at = time.monotonic()
        health = await self._on(self._quick, Prober.health, watched.prober)
        watched.probe_seconds = time.monotonic() - asked_at
        if health is Health.READY and not watched.live.was_ready:
            port, pid = watched.served.port, watched.incarnation.pid
            foreign = await self._on(self._aside, partial(sockets.foreign_listener, port), pid)
            watched.live = replace(watched.live, foreign=foreign)
            await self._read_load(watched, program, process)
            watched.measured_at = 0.0  # what it took on the way says little: measure it now
        watched.live = probes.on_health(watched.live, health, time.monotonic())
        if health is Health.SILENT:
            pid = watched.incarnation.pid
            halted = await self._on(self._aside, processes.is_halted, pid)
            watched.live = replace(watched.live, is_halted=halted)

    async def _ask_activity(self, watched: Watched) -> bool:
        """Whether the counters came soon, which is as good as an answer of /health."""
        if watched.asking is not None:
            return False
        watched.live = probes.on_asked(watched.live, time.monotonic())
        watched.asking = asyncio.create_task(self._await_activity(watched))
        soon = min(self._policy.timeout_seconds, self._policy.period_seconds) / 2
        await asyncio.wait([watched.asking], timeout=soon)
        return watched.asking is None and watched.live.activity is not None

    async def _await_activity(self, watched: Watched) -> None:
        asked_at = time.monotonic()
        try:
            told = await self._on(self._patient, Prober.activity, watched.prober)
        finally:
            watched.asking = None
        now = time.monotonic()
        watched.probe_seconds = now - asked_at
        if not told.answered:
            watched.live = replace(probes.on_unanswered(watched.live), activity=None)
            return
        watched.told_at, watched.told_asked_at = now, asked_at
        if watched.live.activity is None:  # that they stand still shows from now on
            watched.live = replace(watched.live, moved_at=now)
        watched.live = probes.on_activity(watched.live, told.activity, now)
        if told.activity is not None and now - asked_at <= self._policy.timeout_seconds:
            watched.live = probes.on_health(watched.live, Health.READY, now)

    def _ask_for_a_token(self, program: Program, watched: Watched) -> None:
        """A model that may sleep is never asked: that would wake it, or keep it awake."""
        served = watched.served
        interval = probes.canary_seconds(self._policy, served.parallel)
        now = time.monotonic()
        if served.sleeps or not probes.wants_canary(watched.live, now, interval):
            return
        watched.live = probes.on_canary(watched.live, now)
        watched.canary = asyncio.create_task(self._await_token(program, watched))

    async def _await_token(self, program: Program, watched: Watched) -> None:
        answered = await self._on(
            self._patient, partial(Prober.canary, role=program.role), watched.prober
        )
        now = time.monotonic()
        watched.live = probes.on_canary_answer(watched.live, now, answered=answered)

    async def _measure(self, process: Process, watched: Watched) -> None:
        """The memory of the run now and then; while it loads, whether anything grows.

        Also while it loads again after a sleep.
        """
        now = time.monotonic()
        ready = watched.live.was_ready and watched.live.health is not Health.LOADING
        if now - watched.measured_at < _measure_seconds(now - watched.since, ready=ready):
            return
        watched.measured_at = now
        pid = watched.incarnation.pid
        if ready:
            if watched.device is not None:
                look = partial(_measure_device, device=watched.device)
                await self._on(self._aside, look, watched)
            return
        memory, read = await self._on(self._aside, processes.footprint, pid)
        logged = await self._on(self._aside, _size, process.logfile)
        watched.memory_bytes = memory
        watched.live = probes.on_footprint(watched.live, (memory, read, logged), time.monotonic())

    # --- what was seen ----------------------------------------------------------------------------

    async def _see(
        self, program: Program, process: Process, wanted: Wanted, state: ModelState | None
    ) -> Seen:
        watched, leaving = self._watched.get(program.name), self._leaving.get(program.name)
        files = [
            path for path in (program.model_path, *program.shards, program.projector_path) if path
        ]
        stamp, has_files = await self._files(process, files)
        verdict, reason = Verdict.UNKNOWN, ""
        if watched is not None:
            verdict, reason = probes.judge(watched.live, time.monotonic(), self._policy)
        return Seen(
            name=program.name, enabled=wanted.enabled, why=wanted.why, state=process.state,
            incarnation=incarnation_of(process), run=process.start,
            age_seconds=max(process.now - process.start, 0), verdict=verdict,
            verdict_reason=reason, busy=watched is not None and is_busy(watched),
            ending=await self._ending(process, files), spawn_error=process.spawnerr,
            file_stamp=stamp, has_files=has_files,
            is_leaving=leaving is not None and not leaving.is_over,
            residue=leaving.residue if leaving is not None else "",
            is_asleep=watched is not None and watched.live.is_asleep,
            is_foreign=watched is None and process.state is ProcessState.RUNNING
            and process.now - process.start > _FOREIGN_SECONDS,
            is_swapped=wanted.is_swapped, own_stamp=await self._own_stamp(program, process, state),
        )  # fmt: skip

    async def _ending(self, process: Process, files: Sequence[str]) -> Ending | None:
        """How a process ended, read once for each run."""
        if process.state is not ProcessState.EXITED:
            return None
        known = self._endings.get(process.name)
        if known is None or known[0] != process.start:
            tail = await self._on(self._aside, _log_tail, Path(process.logfile))
            ending = Ending(process.exitstatus, tail)
            if ending.is_wordless and ending.exit_status == 1:
                ending = replace(ending, damage=await self._on(self._aside, damage.find, files))
            known = (process.start, ending)
            self._endings[process.name] = known
        return known[1]

    async def _files(self, process: Process, files: Sequence[str]) -> tuple[int, bool]:
        """Of a run that has ended: the stamp of its files, and whether all can be read."""
        if process.state not in _ENDED:
            return 0, False
        stamp = await self._on(self._aside, _stamp, files)
        return stamp, await self._on(self._aside, _can_be_read, files)

    async def _own_stamp(self, program: Program, process: Process, state: ModelState | None) -> int:
        """Of what a model with a fallback would itself be served with, where it is given up."""
        is_given_up = state is not None and state.failover is not None
        if not fallback_of(program) or not (is_given_up or process.state in _ENDED):
            return 0
        rung = min(failover.own_rung(state, program.rung), len(program.ladder) - 1)
        variant = program.ladder[rung]
        files = (variant.model_path, *variant.shards, variant.projector_path)
        stamp = await self._on(self._aside, _stamp, [path for path in files if path])
        return zlib.crc32(name_of(variant).encode(), stamp)

    async def _on(self, pool: Executor, function: Callable[[_A], _T], argument: _A) -> _T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, argument)


def incarnation_of(process: Process) -> Incarnation | None:
    """The run that is up now."""
    return Incarnation(process.pid, process.start) if process.pid else None


def planned(program: Program) -> Served:
    """What a program's server will be told."""
    return Served(
        program.host, program.port, program.alias, program.context, program.parallel, None, 0
    )


def slots_busy(watched: Watched) -> int | None:
    """Slots that work for others; our own question for a token is not counted."""
    activity = watched.live.activity
    if activity is None:
        return None
    return max(activity.busy - (watched.live.canary_at is not None), 0)


def usage(watched: Watched) -> Usage:
    """What a run last told of its work."""
    activity, seconds = watched.live.activity, watched.probe_seconds
    return Usage(
        queued=activity.queued if activity else None,
        prompt_tokens=activity.prompt_tokens if activity else None,
        generated_tokens=activity.generated_tokens if activity else None,
        probe_seconds=None if seconds is None else round(seconds, 4),
        is_asleep=watched.live.is_asleep,
    )


def is_busy(watched: Watched) -> bool:
    """Whether slots work; what is to be drained may, until it has said that they do not."""
    is_told = watched.drain_at is None or watched.told_asked_at >= watched.drain_at
    return bool(slots_busy(watched)) or not (is_told or watched.live.is_asleep)


def _measure_seconds(age_seconds: float, *, ready: bool) -> float:
    """Often while it loads, and while it settles."""
    if not ready:
        return _FOOTPRINT_SECONDS
    return _MEMORY_SECONDS if age_seconds > _SETTLED_SECONDS else _SETTLING_MEMORY_SECONDS


def _measure_device(watched: Watched, device: Device) -> None:
    """What a run has on its device while all is well; what it leaves there is told by that."""
    watched.reading = drivers.read(device)
    if watched.reading is not None:
        watched.device_bytes = watched.reading.held_by(processes.family(watched.incarnation.pid))


def _kept_by_device(leaving: Leaving) -> str:
    """What the device has not given back of a run that is gone.

    Others come and go meanwhile, so what counts is memory that no process is shown to hold.
    """
    if leaving.device is None or leaving.before is None or not leaving.held_bytes:
        return ""
    now = drivers.read(leaving.device)
    if now is None:
        return ""
    kept = now.unaccounted_bytes - leaving.before.unaccounted_bytes
    if kept <= max(_MAY_KEEP * leaving.held_bytes, _NOISE_BYTES):
        return ""
    return f"{kept // MIB} MiB of {leaving.held_bytes // MIB} MiB on {leaving.device.name}"


def _still_listening(port: int) -> str:
    """Who has the port now; a stranger may be quick."""
    who = sockets.foreign_listener(port, 0)
    return f"port {port} is listened on by {who}" if who else ""


def _api_key(path: str | None) -> str | None:
    """The first key in the server's key file."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LARGEST_KEY_FILE_BYTES).split("\n", 1)[0].strip() or None
    except OSError:
        return None


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


def _can_be_read(paths: Iterable[str]) -> bool:
    return all(os.access(path, os.R_OK) for path in paths)


def _stamp(paths: Iterable[str]) -> int:
    """Changes when one of the files does, comes or goes."""
    facts = []
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            facts.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
    return zlib.crc32(repr(facts).encode())


def _log_tail(path: Path, most_bytes: int = _LOG_TAIL_BYTES) -> str:
    """The end of a model's log."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - most_bytes, 0))
            return file.read(most_bytes).decode("utf-8", "replace")
    except OSError:
        return ""


def used_since(path: Path, before: int) -> tuple[int, bool]:
    """How far a model's log reaches in whole lines, and whether those since `before` bytes show
    that somebody uses it: our own questions leave a line that says only that nobody does.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if not 0 <= size - before <= _LOG_TAIL_BYTES or before < 0:
                return size, True
            file.seek(before)
            lines, newline, _ = file.read(_LOG_TAIL_BYTES).rpartition(b"\n")
    except OSError:
        return before, False
    is_used = any(_IDLE_WORDS not in line for line in lines.splitlines())
    return before + len(lines) + len(newline), is_used


def _load_told(path: Path) -> tuple[Loaded | None, str]:
    """What a model's log tells of its load; and the line that shows it on the host, if one does."""
    text = _log_tail(path, _LOAD_TEXT_BYTES)
    return parse_load(text), is_on_host(text)
