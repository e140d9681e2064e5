"""The ledger of memory: what is committed of each device, what is left, who could make room.

Two bounds hold on each device, and the smaller one counts, since neither is enough alone:

    measured free - what running models have still to take - reserve
    total - everything of ours that is committed - reserve

What is free does not fall for weights that are mapped from a file, nor on devices that are read
through others; what is committed does not see strangers. A device that cannot be read admits
nothing. Bytes throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from supervisor_synapse.core.estimate import margin_bytes
from supervisor_synapse.core.model import DeviceReading, Estimate
from supervisor_synapse.core.plan import mib
from supervisor_synapse.core.settings import Reserve

_MOST_NAMED = 3
_CLIMBING_ROOM = 0.05  # a higher rung must fit with this much of its need to spare


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of a model's ladder: what it needs of each device, margin included."""

    label: str = "as configured"
    needs: tuple[tuple[str, int], ...] = ()


def needs_of(estimate: Estimate) -> tuple[tuple[str, int], ...]:
    """What must be left of each device, by an estimate and the margin that its source takes."""
    return tuple(
        (part.device, part.total_bytes + margin_bytes(estimate, part.device))
        for part in estimate.parts
        if part.total_bytes
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model asks of the devices, and what it has been seen to hold."""

    rungs: tuple[Rung, ...] = (Rung(),)
    rung: int = 0  # the one that is deployed
    held: tuple[tuple[str, int], ...] = ()  # by the run that is up, where that is measured
    priority: int = 0  # lower comes first
    is_pinned: bool = False
    fallback: str = ""  # the model whose files the last rung serves, where that is another one

    @property
    def is_known(self) -> bool:
        """Whether the ladder was looked at; where it was not, there is but one rung."""
        return len(self.rungs) > 1

    @property
    def is_on_fallback(self) -> bool:
        return bool(self.fallback) and self.is_known and self.rung == len(self.rungs) - 1

    @property
    def deployed(self) -> Rung:
        return self.rungs[min(self.rung, len(self.rungs) - 1)]

    @property
    def needs(self) -> Mapping[str, int]:
        return dict(self.deployed.needs)


@dataclass(frozen=True, slots=True)
class Commitment:
    """What is set aside for one model that runs, or was asked to."""

    name: str
    needs: tuple[tuple[str, int], ...]
    held: tuple[tuple[str, int], ...] = ()
    is_loading: bool = False
    is_asleep: bool = False  # and may be overcommitted: only what it holds counts

    def committed(self, device: str) -> int:
        held = dict(self.held).get(device, 0)
        return held if self.is_asleep else max(held, dict(self.needs).get(device, 0))

    def to_come(self, device: str) -> int:
        """What it has still to take; of one that serves, only where its part is measured."""
        held = dict(self.held).get(device)
        if held is None:
            return self.committed(device) if self.is_loading else 0
        return self.committed(device) - held


@dataclass(frozen=True, slots=True)
class Shortage:
    """A device on which a model does not fit, in numbers."""

    device: str
    needed_bytes: int
    left_bytes: int
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"needs {mib(self.needed_bytes)} on {self.device}, of which nothing is known: " \
                f"{self.problem}"  # fmt: skip
        left = mib(max(self.left_bytes, 0))
        return f"needs {mib(self.needed_bytes)} on {self.device}, {left} left"


@dataclass(frozen=True, slots=True)
class Ledger:
    """All devices as last read, and who has what of them."""

    readings: tuple[DeviceReading, ...] = ()
    commitments: tuple[Commitment, ...] = ()
    reserve: Reserve = field(default_factory=Reserve)

    def room(self, device: str) -> int | None:
        """What may still be given away of a device; None: nothing is known of it."""
        reading = next((one for one in self.readings if one.name == device), None)
        if reading is None or reading.free_bytes is None:
            return None
        to_come = sum(one.to_come(device) for one in self.commitments)
        committed = sum(one.committed(device) for one in self.commitments)
        left = min(reading.free_bytes - to_come, reading.total_bytes - committed)
        return left - self.reserve.of(reading.total_bytes)

    def shortages(self, needs: Iterable[tuple[str, int]]) -> tuple[Shortage, ...]:
        """Each device on which `needs` do not fit now; () where they do."""
        found = []
        for device, needed in needs:
            room = self.room(device)
            if room is None:
                found.append(Shortage(device, needed, 0, self._problem(device)))
            elif needed > room:
                found.append(Shortage(device, needed, room))
        return tuple(found)

    def _problem(self, device: str) -> str:
        said = [one.problem for one in self.readings if one.name == device and one.problem]
        return said[0] if said else "it was not read"

    def with_one(self, commitment: Commitment) -> Ledger:
        return replace(self, commitments=(*self.commitments, commitment))

    def without_claims_of(self, names: Iterable[str]) -> Ledger:
        """As if nothing were set aside for these models; what they hold stays taken."""
        gone = frozenset(names)
        kept = tuple(one for one in self.commitments if one.name not in gone)
        return replace(self, commitments=kept)

    def without(self, names: Iterable[str]) -> Ledger:
        """As if these models were gone and what they hold were free."""
        gone = frozenset(names)
        kept = tuple(one for one in self.commitments if one.name not in gone)
        freed = [one for one in self.commitments if one.name in gone]
        readings = tuple(_with_freed(reading, freed) for reading in self.readings)
        return replace(self, readings=readings, commitments=kept)


def _with_freed(reading: DeviceReading, freed: Sequence[Commitment]) -> DeviceReading:
    """Where a run's part is not measured, what it was expected to take is what it gives back."""
    if reading.free_bytes is None:
        return reading
    back = sum(
        dict(one.held).get(reading.name, 0 if one.is_loading else one.committed(reading.name))
        for one in freed
    )
    return replace(reading, free_bytes=min(reading.free_bytes + back, reading.total_bytes))


def is_possible(ledger: Ledger, needs: Iterable[tuple[str, int]]) -> bool:
    """Whether it would fit, were nothing else there; a device of which nothing is known may do."""
    totals = {one.name: one.total_bytes for one in ledger.readings}
    return all(
        needed <= totals[device] - ledger.reserve.of(totals[device])
        for device, needed in needs
        if device in totals
    )


def in_words(shortages: Iterable[Shortage]) -> str:
    """Every shortage with its numbers."""
    return "; ".join(str(one) for one in shortages)


def first_that_fits(ledger: Ledger, claim: Claim) -> int | None:
    """The next lower rung of the ladder that fits now."""
    for number in range(claim.rung + 1, len(claim.rungs)):
        if not ledger.shortages(claim.rungs[number].needs):
            return number
    return None


def may_climb(ledger: Ledger, name: str, claim: Claim) -> bool:
    """Whether the rung above fits in what is free and what the model itself would give back."""
    if not 0 < claim.rung < len(claim.rungs):
        return False
    wanted = claim.rungs[claim.rung - 1].needs
    spare = [(device, needed + int(needed * _CLIMBING_ROOM)) for device, needed in wanted]
    return not ledger.without([name]).shortages(spare)


@dataclass(frozen=True, slots=True)
class Idle:
    """A model that may be asked to make room: ready, not pinned, and nobody uses it."""

    name: str
    priority: int
    idle_seconds: float


def victims(
    ledger: Ledger, needs: Iterable[tuple[str, int]], priority: int, idle: Iterable[Idle]
) -> tuple[str, ...]:
    """Who must go so that `needs` fit: as few as possible, the least important first.

    Among those of lower priority than `priority` the lowest goes first, then the one that was idle
    longest. () where all of them together would not make enough room.
    """
    wanted = tuple(needs)
    candidates = sorted(
        (one for one in idle if one.priority > priority),
        key=lambda one: (-one.priority, -one.idle_seconds, one.name),
    )
    chosen: list[str] = []
    for one in candidates:
        if not ledger.without(chosen).shortages(wanted):
            break
        chosen.append(one.name)
    if ledger.without(chosen).shortages(wanted):
        return ()
    for name in tuple(chosen):  # one that came first may turn out not to be needed
        others = [other for other in chosen if other != name]
        if not ledger.without(others).shortages(wanted):
            chosen = others
    return tuple(chosen)


def could_be_stopped(ledger: Ledger, devices: Iterable[str]) -> str:
    """Who holds most of devices that are short, for a person: `a (500 MiB), b (300 MiB)`."""
    devices = frozenset(devices)
    sizes = {
        one.name: sum(one.committed(device) for device in devices) for one in ledger.commitments
    }
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MOST_NAMED]
    return ", ".join(f"{name} ({mib(sizes[name])})" for name in largest if sizes[name])


def under_pressure(reading: DeviceReading, reserve: Reserve) -> bool:
    """Whether less than half of what shall be kept free is left, by whomever it was taken."""
    if reading.free_bytes is None:
        return False
    return reading.free_bytes < reserve.of(reading.total_bytes) // 2
