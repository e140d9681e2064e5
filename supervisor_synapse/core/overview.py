"""Devices as the surfaces show them: who has how much of each, and what is left. Bytes."""

from __future__ import annotations

from collections.abc import Iterable

from supervisor_synapse.core.admission import Commitment, Ledger
from supervisor_synapse.core.model import Device, DeviceReading, DeviceRow, Holding


def device_rows(devices: Iterable[Device], ledger: Ledger) -> tuple[DeviceRow, ...]:
    """One for each device that was read; `devices` are the engine's, and describe them."""
    described = {device.name: device.description for device in devices}
    return tuple(
        _row(reading, described.get(reading.name, ""), ledger) for reading in ledger.readings
    )


def _row(reading: DeviceReading, description: str, ledger: Ledger) -> DeviceRow:
    found = (_holding(one, reading.name) for one in ledger.commitments)
    holdings = tuple(one for one in found if one.committed_bytes or one.held_bytes)
    return DeviceRow(
        name=reading.name, description=description, total_bytes=reading.total_bytes,
        free_bytes=reading.free_bytes, reserve_bytes=ledger.reserve.of(reading.total_bytes),
        room_bytes=ledger.room(reading.name), others_bytes=_others(reading, holdings),
        models=holdings, problem=reading.problem,
    )  # fmt: skip


def _holding(commitment: Commitment, device: str) -> Holding:
    held = dict(commitment.held).get(device)
    return Holding(commitment.name, held, commitment.committed(device))


def _others(reading: DeviceReading, holdings: Iterable[Holding]) -> int | None:
    """What is neither free nor seen to be ours; weights mapped from a file count as free."""
    if reading.free_bytes is None:
        return None
    ours = sum(one.held_bytes or 0 for one in holdings)
    return max(reading.total_bytes - reading.free_bytes - ours, 0)
