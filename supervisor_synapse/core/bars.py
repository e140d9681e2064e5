"""What a device's memory is taken by, in parts that add up to it; and a bar of so many cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from supervisor_synapse.core.model import DeviceRow, Holding


class Kind(Enum):
    """Who has a part of a device's memory; its sign in a bar."""

    OURS = "#"
    TO_COME = "="  # set aside for a model, and not taken yet
    OTHERS = "x"
    FREE = "."
    RESERVE = "|"
    UNKNOWN = "?"  # no reader tells


@dataclass(frozen=True, slots=True)
class Part:
    """So much of a device; `model` where it is one's."""

    kind: Kind
    size_bytes: int
    model: str = ""


def parts(device: DeviceRow) -> list[Part]:
    """In the order of the bar: models, others, what is left, the reserve.

    More than the device has where more is committed; the reserve is what is left of it.
    """
    taken = [part for holding in device.models for part in _held(holding)]
    if device.others_bytes:
        taken.append(Part(Kind.OTHERS, device.others_bytes))
    left = max(device.total_bytes - sum(part.size_bytes for part in taken), 0)
    reserve = min(device.reserve_bytes, left)
    kind = Kind.UNKNOWN if device.free_bytes is None else Kind.FREE
    rest = [Part(kind, left - reserve), Part(Kind.RESERVE, reserve)]
    return taken + [part for part in rest if part.size_bytes]


def _held(holding: Holding) -> Iterator[Part]:
    held = max(holding.held_bytes or 0, 0)
    if held:
        yield Part(Kind.OURS, held, holding.model)
    if holding.committed_bytes > held:
        yield Part(Kind.TO_COME, holding.committed_bytes - held, holding.model)


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """`width` cells, shared out by size; whatever there is has one, where there are enough."""
    total = sum(sizes)
    if not total:
        return [0] * len(sizes)
    fair = [size * width / total for size in sizes]
    shared = [max(int(share), 1 if share else 0) for share in fair]
    while (missing := width - sum(shared)) != 0:
        step = 1 if missing > 0 else -1
        shared[_most_wronged(fair, shared, step)] += step
    return shared


def _most_wronged(fair: Sequence[float], shared: Sequence[int], step: int) -> int:
    """Who is to get one more, or to give one away: a cell that is its only one as the last."""
    return max(
        (index for index, cell in enumerate(shared) if cell + step >= 0),
        key=lambda index: (shared[index] + step > 0, step * (fair[index] - shared[index])),
    )
