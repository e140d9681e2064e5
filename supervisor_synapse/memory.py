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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters import footprints, ledger, processes
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.footprints import Footprints
from supervisor_synapse.adapters.gpu import cpu, drivers
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.core import admission
from supervisor_synapse.core.admission import Claim, Ledger, Rung
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
    """The ladders of all programs with the best figures there are, made of these."""

    stamp: object = None
    footprints: Footprints = field(default_factory=Footprints)
    rungs: Mapping[str, tuple[Rung, ...]] = field(default_factory=dict)
    estimates: Mapping[str, Estimate] = field(default_factory=dict)  # of what is deployed


class Memory:
    """Memory of one deployment's devices. For one event loop."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, "memory")
        self._footprints = footprints.load(deployment.footprints)
        self._engine: tuple[str, Engine] | None = None
        self._known = _Known()
        self._readings: tuple[DeviceReading, ...] = ()
        self._read_at = -_READ_SECONDS
        self._read_of: object = None
        self._incarnations: Mapping[str, Incarnation] = {}  # whose memory was read
        self._reading: asyncio.Task[None] | None = None
        self._learned: dict[str, Incarnation] = {}
        self._learn_at = 0.0
        self._low: frozenset[str] = frozenset()
        self._told: ledger.Ledger | None = None

    @property
    def readings(self) -> tuple[DeviceReading, ...]:
        return self._readings

    def close(self) -> None:
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
        of = (frozenset((name, run.incarnation) for name, run in runs.items()), leaving)
        age = time.monotonic() - self._read_at
        is_due = age >= (_READ_OFTEN_SECONDS if is_awaited else _READ_SECONDS)
        if of != self._read_of or is_due:
            await self._read(registry, runs, of)
        self._tell_pressure(registry.settings.memory_reserve)
        await self._learn(registry, runs)

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
        incarnations = {name: run.incarnation for name, run in runs.items()}
        pids = {name: one.pid for name, one in incarnations.items()}
        ask = partial(self._ask_engine, registry)
        try:
            self._readings = await self._aside(partial(_read_all, devices, pids, ask))
            self._incarnations, self._read_of = incarnations, of
            self._read_at = time.monotonic()
        finally:
            self._reading = None

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

    def claim(self, program: Program) -> Claim:
        """What a program asks of the devices, and what its run was last seen to hold."""
        rungs = self._known.rungs.get(program.name) or (
            Rung("as configured", admission.needs_of(program.estimate)),
        )
        return Claim(
            rungs=rungs, rung=min(program.rung, len(rungs) - 1), priority=program.priority,
            is_pinned=program.pinned,
        )  # fmt: skip

    def held(self, name: str, incarnation: Incarnation | None) -> tuple[tuple[str, int], ...]:
        """By device, where its reader tells; of this very run."""
        if incarnation is None or self._incarnations.get(name) != incarnation:
            return ()
        return tuple(
            (reading.name, size)
            for reading in self._readings
            for holder, size in reading.held_bytes
            if holder == name
        )

    def estimate(self, program: Program) -> Estimate:
        """The best figures there are for what is deployed."""
        return self._known.estimates.get(program.name, program.estimate)

    async def _know(self, registry: Registry, stamp: object) -> None:
        """Take up what was learned, or discovered, since the last look."""
        if self._known.stamp == stamp and self._known.footprints is self._footprints:
            return
        try:
            self._known = await self._aside(
                partial(self._ladders, registry, stamp, self._footprints)
            )
        except ConfigError as error:  # there is no engine just now: the formula must do
            _log.warning("engine not found", extra={"reason": str(error)})
            self._known = _Known(stamp, self._footprints)

    def _ladders(self, registry: Registry, stamp: object, known: Footprints) -> _Known:
        engine = self._find_engine(registry.settings.engine) if known.by_key else None

        def best(one: Program | Variant) -> Estimate:
            key = _key(_files(one), one.arguments, engine, registry.devices) if engine else None
            found = footprints.known(known, key, one.estimate) if key else None
            return found or one.estimate

        rungs = {
            program.name: tuple(
                Rung(one.label, admission.needs_of(best(one))) for one in program.ladder
            )
            for program in registry.programs
        }
        estimates = {program.name: best(program) for program in registry.programs}
        return _Known(stamp, known, rungs, estimates)

    # --- learning ---------------------------------------------------------------------------------

    async def _learn(self, registry: Registry, runs: Mapping[str, Run]) -> None:
        """What each load has really taken, once for each run."""
        now = time.monotonic()
        for name, run in runs.items():
            is_read = self._incarnations.get(name) == run.incarnation
            if self._learned.get(name) == run.incarnation or not (run.is_ready and is_read):
                continue
            if run.loaded is None or now < self._learn_at:
                continue
            held = dict(self.held(name, run.incarnation))
            try:
                self._footprints = await self._aside(
                    partial(self._learn_aside, registry, run.program, run.loaded, held)
                )
                self._learned[name] = run.incarnation
            except (OSError, TransientError, ConfigError) as error:
                self._learn_at = now + _LEARN_AGAIN_SECONDS
                _log.warning("footprint not written", extra={"model": name, "reason": str(error)})

    def _learn_aside(
        self, registry: Registry, program: Program, loaded: Loaded, held: Mapping[str, int]
    ) -> Footprints:
        engine = self._find_engine(registry.settings.engine)
        key = _key(_files(program), program.arguments, engine, registry.devices)
        if key is None:
            return self._footprints
        change = partial(
            footprints.learn, key=key, loaded=loaded, driver_bytes=held, at=time.time()
        )
        return footprints.update(self._deployment.footprints, change)

    # --- the launchers' word ----------------------------------------------------------------------

    async def tell(
        self,
        found: Ledger,
        claims: Mapping[str, Claim],
        counted: Sequence[int],
    ) -> None:
        """Write down what may start now; before anything that was admitted is started.

        `counted`: the launchers whose models the ledger knows of.

        A launcher that finds no word goes ahead, so where it cannot be written none is left.
        """
        admitted = {one.name for one in found.commitments}
        entries = {
            name: _entry(found, claim, is_admitted=name in admitted)
            for name, claim in claims.items()
        }
        rooms = {one.name: found.room(one.name) for one in found.readings}
        word = ledger.Ledger(
            ledger.process_of(os.getpid()),
            {name: room // MIB * MIB for name, room in rooms.items() if room is not None},
            tuple(ledger.process_of(pid) for pid in counted),
            entries,
        )
        if word != self._told:
            self._told = await self._aside(partial(self._write_word, word))

    def _write_word(self, word: ledger.Ledger) -> ledger.Ledger | None:
        try:
            ledger.save(self._deployment.ledger, word)
        except OSError:
            with contextlib.suppress(OSError):
                ledger.remove(self._deployment.ledger)
            return None
        return word

    async def _aside(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _read_all(
    devices: Sequence[Device],
    pids: Mapping[str, int],
    ask_engine: Callable[[], Sequence[Device]],
) -> tuple[DeviceReading, ...]:
    families = {name: processes.family(pid) for name, pid in pids.items()}
    return drivers.read_all(devices, families, ask_engine)


def _entry(found: Ledger, claim: Claim, *, is_admitted: bool) -> ledger.Entry:
    needs = claim.deployed.needs
    if is_admitted:
        return ledger.Entry(True, dict(needs))
    short = found.shortages(needs)
    return ledger.Entry(False, dict(needs), admission.could_be_stopped(found, short))


def _files(served: Program | Variant) -> tuple[str, ...]:
    """All files of what is served."""
    first = served.shards or (served.model_path,)
    return (*first, *([served.projector_path] if served.projector_path else []))


def _key(
    files: Sequence[str], arguments: Sequence[str], engine: Engine, devices: Sequence[Device]
) -> str | None:
    """Names what a footprint holds for; None where a file cannot be looked at."""
    identities = footprints.identities(files)
    if not identities:
        return None
    return footprints.footprint_key(identities, arguments, engine.version, devices)
