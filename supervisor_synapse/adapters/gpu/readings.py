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
    """Memory of one device now, in bytes. `held_bytes`: by pid, as far as the driver shows it.

    The engine may describe the device by another name than the driver; then one of `words` stands
    in its description.
    """

    name: str
    total_bytes: int
    free_bytes: int
    held_bytes: Mapping[int, int]
    words: tuple[str, ...] = ()

    @property
    def unaccounted_bytes(self) -> int:
        """Taken, but by no process that the driver shows: its own, or leaked."""
        return self.total_bytes - self.free_bytes - sum(self.held_bytes.values())

    def held_by(self, pids: Iterable[int]) -> int:
        """What these processes hold together."""
        return sum(self.held_bytes.get(pid, 0) for pid in pids)

    def may_be(self, device: Device) -> bool:
        """Whether name and size are those of one of the engine's devices."""
        description = device.description.lower()
        return (
            any(word.lower() in description for word in (self.name, *self.words))
            and abs(self.total_bytes - device.total_bytes) <= _SAME_SIZE * self.total_bytes
        )


def of_device(device: Device, readings: Sequence[Reading]) -> Reading | None:
    """The reading of one of the engine's devices; None where that cannot be told for sure.

    By name and size; among several alike, by the number in the engine's name (CUDA1, Vulkan1).
    """
    alike = [reading for reading in readings if reading.may_be(device)]
    if len(alike) == 1:
        return alike[0]
    number = re.search(r"(\d+)$", device.name)
    if number is None or int(number[1]) >= len(alike):
        return None
    return alike[int(number[1])]


def match(devices: Sequence[Device], readings: Sequence[Reading]) -> Mapping[str, Reading]:
    """Name of a device → its reading, where that is sure once all of the engine's are known.

    Those alike are taken in the order of both lists. Where there are not as many of the one as of
    the other (a device is hidden from the engine, or from the driver), none of them is sure.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[Device]] = {}
    for device in devices:
        alike = tuple(number for number, one in enumerate(readings) if one.may_be(device))
        backend = device.name.rstrip("0123456789")  # one device may be seen by two backends
        groups.setdefault((backend, alike), []).append(device)
    return {
        device.name: readings[number]
        for (_, alike), group in groups.items()
        if len(group) == len(alike)
        for device, number in zip(group, alike, strict=True)
    }
