"""What a device reader tells, and which of the engine's devices it tells it of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from supervisor_synapse.core.model import Device

_SAME_SIZE = 0.03  # drivers and engines round, or keep a little for themselves


class Unreadable(Exception):
    """A driver is there and does not answer: nothing is known, least of all that memory is free."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory of one device now, in bytes. `held_bytes`: by pid, as far as the driver shows it."""

    name: str
    total_bytes: int
    free_bytes: int
    held_bytes: Mapping[int, int]

    @property
    def unaccounted_bytes(self) -> int:
        """Taken, but by no process that the driver shows: its own, or leaked."""
        return self.total_bytes - self.free_bytes - sum(self.held_bytes.values())

    def held_by(self, pids: Iterable[int]) -> int:
        """What these processes hold together."""
        return sum(self.held_bytes.get(pid, 0) for pid in pids)


def of_device(device: Device, readings: Sequence[Reading]) -> Reading | None:
    """The reading of one of the engine's devices; None where that cannot be told for sure.

    By name and size; among several alike, by the number in the engine's name (CUDA1, Vulkan1).
    """
    alike = [
        reading
        for reading in readings
        if reading.name.lower() in device.description.lower()
        and abs(reading.total_bytes - device.total_bytes) <= _SAME_SIZE * reading.total_bytes
    ]
    if len(alike) == 1:
        return alike[0]
    number = re.search(r"(\d+)$", device.name)
    if number is None or int(number[1]) >= len(alike):
        return None
    return alike[int(number[1])]
