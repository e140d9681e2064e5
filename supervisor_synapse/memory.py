"""What the listener knows of memory: devices as read, footprints as learned, claims made of both.

Devices are read on a thread of their own: anew whenever a run has begun or is verified to be over,
else now and then. While a reader does not answer, nothing is known of its devices, and nothing is
admitted to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from supervisor_synapse import figures
from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import footprints, ledger, processes
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.footprints import Footprints
from supervisor_synapse.adapters.gpu import cpu, drivers
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.core import admission, ladder
from supervisor_synapse.core.admission import Claim, Ledger, Rung
from supervisor_synapse.core.estimate import HOST
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import (
    Device,
    DeviceReading,
    Engine,
    Estimate,
    Incarnation,
    Program,
    Variant,
)
from supervisor_synapse.core.settings import MIB, Reserve
from supervisor_synapse.errors import ConfigError, TransientError

_READ_SECONDS = 5.0
_READ_OFTEN_SECONDS = 1.0  # while a model waits for memory
_ANSWER_SECONDS = 1.0  # a reader that takes longer holds nobody up
_ENGINE_SECONDS = 5.0
_LEARN_AGAIN_SECONDS = 30.0  # what could not be written down
_GROWN = 1.01  # a run that has so much more than when it was learned is learned again
_GROWN_BYTES = 4 * MIB

_log = logging.getLogger("synapse")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a model, as far as memory is concerned."""

    program: Program
    incarnation: Incarnation
    is_ready: bool
    loaded: Loaded | None  # what its log tells of its load


@dataclass(frozen=True, slots=True)
class _Known:
    """The ladders of programs with the best figures there are; `stamp`: of which registry."""

    stamp: object = None
    rungs: Mapping[str, tuple[Rung, ...]] = field(default_factory=dict)
    estimates: Mapping[str, Estimate] = field(default_factory=dict)  # of what is deployed


class Memory:
    """Memory of one deployment's devices. For one event loop."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, "memory")
        self._listener = ledger.process_of(os.getpid())
        self._footprints = footprints.load(deployment.footprints)  # for the thread, from now on
        self._engine: tuple[str, Engine] | None = None
        self._known = _Known()
        self._readings: tuple[DeviceReading, ...] = ()
        self._read_at = -_READ_SECONDS
        self._read_of: object = None
        self._read_runs: Mapping[str, Run] = {}  # as they were then
        self._held: Mapping[str, tuple[tuple[str, int], ...]] = {}  # then, by device
        self._families: dict[Incarnation, frozenset[int]] = {}  # for the thread
        self._reading: asyncio.Task[None] | None = None
        self._learned: dict[str, tuple[Incarnation, int]] = {}  # and bytes on devices
        self._learning: asyncio.Task[None] | None = None
        self._learn_at = 0.0
        self._launchers: dict[Incarnation, ledger.Process] = {}
        self._low: frozenset[str] = frozenset()
        self._told: ledger.Ledger | None = None
        self._heeded: frozenset[ledger.Process] = frozenset()

    @property
    def readings(self) -> tuple[DeviceReading, ...]:
        return self._readings

    def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError):
            ledger.remove(self._deployment.ledger)

    # --- reading ----------------------------------------------------------------------------------

    async def look(
        self,
        registry: Registry,
        stamp: object,
        runs: Mapping[str, Run],
        leaving: frozenset[str],
        *,
        is_awaited: bool,
    ) -> None:
        """Read the devices, where that is due. `stamp` changes with the registry."""
        await self._know(registry, stamp)
        # What was read on the way up says little, so again once one is ready.
        up = frozenset((name, run.incarnation, run.is_ready) for name, run in runs.items())
        of = (up, leaving)
        age = time.monotonic() - self._read_at
        is_due = age >= (_READ_OFTEN_SECONDS if is_awaited else _READ_SECONDS)
        if of != self._read_of or is_due:
            await self._read(registry, runs, of)
        self._tell_pressure(registry.settings.memory_reserve)
        if self._learning is None:
            self._begin_to_learn(registry, runs)

    async def _read(self, registry: Registry, runs: Mapping[str, Run], of: object) -> None:
        devices = registry.devices or (cpu.read(),)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_aside(registry, devices, runs, of))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), _ANSWER_SECONDS)
            return
        self._readings = tuple(
            DeviceReading(one.name, one.total_bytes, None, problem="its reader does not answer")
            for one in devices
        )

    async def _read_aside(
        self, registry: Registry, devices: Sequence[Device], runs: Mapping[str, Run], of: object
    ) -> None:
        try:
            self._readings = await self._aside(partial(self._read_all, registry, devices, runs))
            self._read_runs, self._read_of = runs, of
            self._held = _by_program(self._readings)
            self._read_at = time.monotonic()
        finally:
            self._reading = None

    def _read_all(
        self, registry: Registry, devices: Sequence[Device], runs: Mapping[str, Run]
    ) -> tuple[DeviceReading, ...]:
        families = {name: self._family(run) for name, run in runs.items()}
        self._families = {
            run.incarnation: families[name] for name, run in runs.items() if run.is_ready
        }
        return drivers.read_all(devices, families, partial(self._ask_engine, registry))

    def _family(self, run: Run) -> frozenset[int]:
        """Its processes; once it is ready they stay the same."""
        return self._families.get(run.incarnation) or processes.family(run.incarnation.pid)

    def _ask_engine(self, registry: Registry) -> Sequence[Device]:
        settings = registry.settings
        return engines.devices(
            self._find_engine(settings.engine), settings.rpc, answer_seconds=_ENGINE_SECONDS
        )

    def _find_engine(self, setting: str) -> Engine:
        """It is asked what it can do once, as long as its file stays the same."""
        path = engines.locate(setting)
        status = os.stat(path)
        stamp = f"{path} {status.st_mtime_ns} {status.st_ino}"
        if self._engine is None or self._engine[0] != stamp:
            self._engine = (stamp, engines.find(setting))
        return self._engine[1]

    def _tell_pressure(self, reserve: Reserve) -> None:
        """One line when memory begins to run low on a device, and one when it is back."""
        low = frozenset(
            one.name for one in self._readings if admission.under_pressure(one, reserve)
        )
        for reading in self._readings:
            if (reading.name in low) is (reading.name in self._low):
                continue
            free = None if reading.free_bytes is None else f"{reading.free_bytes // MIB} MiB"
            event = "memory runs low" if reading.name in low else "memory is back"
            _log.warning(event, extra={"device": reading.name, "free": free})
        self._low = low

    # --- claims -----------------------------------------------------------------------------------

    def claim(self, program: Program, incarnation: Incarnation | None = None) -> Claim:
        """What a program asks of the devices, and what this run of it was last seen to hold."""
        rungs = self._known.rungs.get(program.name) or (
            Rung("as configured", admission.needs_of(program.estimate)),
        )
        return Claim(
            rungs=rungs, rung=min(program.rung, len(rungs) - 1),
            held=self._held_by(program.name, incarnation), priority=program.priority,
            is_pinned=program.pinned, fallback=ladder.fallback_of(program),
        )  # fmt: skip

    def measured(self, program: Program, incarnation: Incarnation | None) -> int | None:
        """What a run holds on the device that it was put on; where no reader tells, what is
        resident of it. Bytes; None where it was not seen yet, or nothing is told.
        """
        held = dict(self._held_by(program.name, incarnation))
        return held.get(program.device) or held.get(HOST)

    def _held_by(self, name: str, incarnation: Incarnation | None) -> tuple[tuple[str, int], ...]:
        """By device, where its reader tells; of this very run."""
        read = self._read_runs.get(name)
        if incarnation is None or read is None or read.incarnation != incarnation:
            return ()
        return self._held.get(name, ())

    def estimate(self, program: Program) -> Estimate:
        """The best figures there are for what is deployed."""
        return self._known.estimates.get(program.name, program.estimate)

    async def _know(self, registry: Registry, stamp: object) -> None:
        """Take up what was discovered since the last look."""
        if self._known.stamp == stamp:
            return
        try:
            self._known = await self._aside(partial(self._known_anew, registry, stamp))
        except (OSError, ConfigError) as error:  # no engine just now: the formula must do
            _log.warning("engine not found", extra={"reason": str(error)})
            self._known = _Known(stamp)

    def _known_anew(self, registry: Registry, stamp: object) -> _Known:
        """With what discovery may have asked the engine since the last look."""
        self._footprints = footprints.load(self._deployment.footprints)
        return self._known_of(registry, stamp, registry.programs)

    def _known_of(self, registry: Registry, stamp: object, programs: Iterable[Program]) -> _Known:
        """The best figures for these programs."""
        learned = self._footprints
        engine = self._find_engine(registry.settings.engine) if learned.by_key else None

        def best(one: Program | Variant) -> Estimate:
            found = figures.of_program(learned, one, engine, registry.devices) if engine else None
            return found or one.estimate

        return _Known(
            stamp,
            {
                program.name: tuple(
                    Rung(one.label, admission.needs_of(best(one))) for one in program.ladder
                )
                for program in programs
            },
            {program.name: best(program) for program in programs},
        )

    # --- learning ---------------------------------------------------------------------------------

    def _begin_to_learn(self, registry: Registry, runs: Mapping[str, Run]) -> None:
        """What loads have really taken; the loop does not wait for it."""
        if time.monotonic() < self._learn_at:
            return
        new = {
            name: run
            for name, run in runs.items()
            if run.is_ready
            and run.loaded is not None
            and self._was_read_ready(name, run)
            and self._tells_more(name, run)
        }
        if new:
            self._learning = asyncio.create_task(self._learn(registry, new))

    def _tells_more(self, name: str, run: Run) -> bool:
        """Whether nothing was learned of this run, or it has grown since: drivers make things for
        the first requests. The host grows with the prompts that it keeps, which is reckoned with.
        """
        incarnation, before = self._learned.get(name, (None, 0))
        is_grown = self._on_devices(name) > before * _GROWN + _GROWN_BYTES
        return incarnation != run.incarnation or is_grown

    def _on_devices(self, name: str) -> int:
        return sum(size for device, size in self._held.get(name, ()) if device != HOST)

    def _was_read_ready(self, name: str, run: Run) -> bool:
        """Whether the last reading shows all that it takes, and not what it had on its way up."""
        read = self._read_runs.get(name)
        return read is not None and read.is_ready and read.incarnation == run.incarnation

    async def _learn(self, registry: Registry, runs: Mapping[str, Run]) -> None:
        stamp = self._known.stamp
        held = {name: dict(self._held.get(name, ())) for name in runs}
        sizes = {name: self._on_devices(name) for name in runs}
        try:
            found = await self._aside(partial(self._learn_aside, registry, stamp, runs, held))
        except (OSError, TransientError, ConfigError) as error:
            self._learn_at = time.monotonic() + _LEARN_AGAIN_SECONDS
            _log.warning("footprints not written", extra={"reason": str(error)})
        else:
            self._learned |= {name: (run.incarnation, sizes[name]) for name, run in runs.items()}
            if self._known.stamp == stamp:
                rungs = {**self._known.rungs, **found.rungs}
                self._known = _Known(stamp, rungs, {**self._known.estimates, **found.estimates})
        finally:
            self._learning = None

    def _learn_aside(
        self,
        registry: Registry,
        stamp: object,
        runs: Mapping[str, Run],
        held: Mapping[str, Mapping[str, int]],
    ) -> _Known:
        engine = self._find_engine(registry.settings.engine)
        at = time.time()

        def with_all(known: Footprints) -> Footprints:
            for name, run in runs.items():
                key = figures.key_of(run.program, engine, registry.devices)
                if key is not None and run.loaded is not None:
                    known = footprints.learn(known, key, run.loaded, held[name], at=at)
            return known

        self._footprints = footprints.update(self._deployment.footprints, with_all)
        return self._known_of(registry, stamp, [run.program for run in runs.values()])

    # --- the launchers' word ----------------------------------------------------------------------

    async def tell(
        self,
        found: Ledger,
        claims: Mapping[str, Claim],
        up: Iterable[Incarnation],
        counted: Iterable[Incarnation],
    ) -> bool:
        """Write down what may start now; before anything that was admitted is started. False: a
        model was started by hand since `up` was looked at, and what was admitted has to be decided
        anew, beside it.

        `counted`: the runs whose memory the ledger knows of; their launchers claim none. A launcher
        that finds no word goes ahead, so where it cannot be written none is left.
        """
        self._launchers = {
            run: self._launchers.get(run) or ledger.process_of(run.pid) for run in up
        }
        rooms = {one.name: found.room(one.name) for one in found.readings}
        word = ledger.Ledger(
            self._listener,
            {name: room // MIB * MIB for name, room in rooms.items() if room is not None},
            tuple(self._launchers[run] for run in counted),
            _entries(found, claims, rooms),
        )
        if word == self._told:
            return True
        known = frozenset(self._launchers.values())
        heeded, self._told = await self._aside(partial(self._write_word, word, known))
        is_new = not heeded <= self._heeded  # one that supervisord does not know stays unseen
        self._heeded = heeded
        return not is_new

    def _write_word(
        self, word: ledger.Ledger, known: frozenset[ledger.Process]
    ) -> tuple[frozenset[ledger.Process], ledger.Ledger | None]:
        """Launchers beside those known that have claimed memory; and the word that stands now:
        this one, unless one of them is new.
        """
        path = self._deployment.ledger
        with ledger.alone(path):
            unseen = ledger.claimants(path) - known
            if not unseen <= self._heeded:
                return unseen, self._told
            try:
                ledger.save(path, word)
            except OSError:
                with contextlib.suppress(OSError):
                    ledger.remove(path)
                return unseen, None
        return unseen, word

    async def _aside(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _by_program(
    readings: Iterable[DeviceReading],
) -> Mapping[str, tuple[tuple[str, int], ...]]:
    """What each program holds, by device."""
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for reading in readings:
        for name, size in reading.held_bytes:
            found[name] = (*found.get(name, ()), (reading.name, size))
    return found


def _entries(
    found: Ledger, claims: Mapping[str, Claim], rooms: Mapping[str, int | None]
) -> Mapping[str, ledger.Entry]:
    """What each model needs, and where that is not left, who could make room."""
    admitted = {one.name for one in found.commitments}
    could_stop: dict[frozenset[str], str] = {frozenset(): ""}
    entries = {}
    for name, claim in claims.items():
        needs = dict(claim.deployed.needs)
        if name in admitted:
            entries[name] = ledger.Entry(True, needs)
            continue
        short = frozenset(
            device
            for device, needed in needs.items()
            if (room := rooms.get(device)) is None or needed > room
        )
        if short not in could_stop:
            could_stop[short] = admission.could_be_stopped(found, short)
        entries[name] = ledger.Entry(False, needs, could_stop[short])
    return entries
