"""What all drivers of this machine tell together; the engine tells of devices that none covers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from supervisor_synapse.adapters.gpu import amd, cpu, metal, nvidia
from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable, match, of_device
from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Device, DeviceReading

_Families = Mapping[str, tuple[int, ...]]

# Their description is an address, in which any word may stand.
_REMOTE = re.compile(r"RPC\d*$")


@dataclass(frozen=True, slots=True)
class Driver:
    """One reader, and which of the engine's devices would be its own."""

    name: str
    devices: re.Pattern[str]  # somewhere in "name: description"
    read: Callable[[Iterable[int]], Sequence[Reading]]  # given all processes of ours
    match: Callable[[Sequence[Device], Sequence[Reading]], Mapping[str, Reading]] = match

    def covers(self, device: Device) -> bool:
        said = f"{device.name}: {device.description}"
        return not _REMOTE.match(device.name) and self.devices.search(said) is not None


DRIVERS = (
    Driver(
        "NVIDIA", re.compile(r"^CUDA\d|NVIDIA|GeForce|Quadro|Tesla", re.IGNORECASE),
        lambda _: nvidia.read(),
    ),
    Driver(
        "AMD", re.compile(r"^(ROCm|HIP)\d|\bAMD\b|Radeon|Instinct", re.IGNORECASE),
        lambda _: amd.read(),
    ),
    Driver("Metal", re.compile(r"^(MTL|Metal)\d*:"), metal.read, metal.match),
)  # fmt: skip


def read(device: Device) -> Reading | None:
    """The memory of one of the engine's devices now; None where no driver tells, or not now."""
    try:
        return of_device(device, (*nvidia.read(), *amd.read()))
    except Unreadable:
        return None


def read_all(
    devices: Sequence[Device],
    pids: Mapping[str, Iterable[int]],
    ask_engine: Callable[[], Sequence[Device]],
    *,
    drivers: Sequence[Driver] = DRIVERS,
    host: Callable[[Iterable[int]], Reading] = cpu.measure,
) -> tuple[DeviceReading, ...]:
    """The memory of each device now, in the order asked for; `devices` are all of the engine's.

    `pids`: by program, its processes. `ask_engine` lists the engine's devices as they are now; it
    is called once where a device is left that no driver covers, else not at all. Nothing is raised:
    where somebody fails, nothing is known of the devices that would have been his to tell of.
    """
    families = {name: tuple(family) for name, family in pids.items()}
    ours = tuple(pid for family in families.values() for pid in family)
    found: dict[str, DeviceReading] = {}
    for device in devices:
        if device.is_host:
            found[device.name] = _host(device, host, ours, families)
    for driver in drivers:
        its = [one for one in devices if one.name not in found and driver.covers(one)]
        if its:
            found |= _by_driver(driver, its, ours, families)
    left = [device for device in devices if device.name not in found]
    if left:
        found |= _by_engine(left, ask_engine)
    return tuple(found[device.name] for device in devices)


def _host(
    device: Device, host: Callable[[Iterable[int]], Reading], ours: Iterable[int], pids: _Families
) -> DeviceReading:
    try:
        return _told(device.name, host(ours), pids)
    except Exception as error:  # as in _by_driver
        return _unknown(device, "host memory cannot be read", error)


def _by_driver(
    driver: Driver, devices: Sequence[Device], ours: Iterable[int], pids: _Families
) -> dict[str, DeviceReading]:
    """Those of the devices that it tells of; all of them, as unknown, where it fails."""
    try:
        matched = driver.match(devices, driver.read(ours))
        return {name: _told(name, reading, pids) for name, reading in matched.items()}
    except Exception as error:  # whatever a driver's library throws costs its own devices only
        what = f"the {driver.name} driver does not answer"
        return {device.name: _unknown(device, what, error) for device in devices}


def _by_engine(
    devices: Sequence[Device], ask_engine: Callable[[], Sequence[Device]]
) -> dict[str, DeviceReading]:
    try:
        listed = {one.name: one for one in ask_engine()}
    except Exception as error:  # as in _by_driver
        what = "the engine does not tell of it"
        return {device.name: _unknown(device, what, error) for device in devices}
    return {device.name: _listed(device, listed.get(device.name)) for device in devices}


def _listed(device: Device, now: Device | None) -> DeviceReading:
    """Where a remote device is gone, the engine numbers those after it anew: then another one has
    its name.
    """
    if now is None or device.description not in ("", now.description):
        where = f" ({device.description})" if device.description else ""
        return _unknown(device, f"the engine does not list {device.name}{where} now")
    return DeviceReading(device.name, now.total_bytes, now.free_bytes)


def _told(name: str, reading: Reading, pids: _Families) -> DeviceReading:
    held = ((program, reading.held_by(set(family))) for program, family in pids.items())
    return DeviceReading(
        name, reading.total_bytes, reading.free_bytes, tuple(one for one in held if one[1])
    )


def _unknown(device: Device, what: str, error: Exception | None = None) -> DeviceReading:
    said = f"{what}: {str(error) or type(error).__name__}" if error is not None else what
    return DeviceReading(device.name, device.total_bytes, None, problem=printable(said))
