"""Checks of the engine and of the devices that it sees, and who tells of their memory."""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from supervisor_synapse.adapters import demo_model
from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.gpu import cpu, drivers
from supervisor_synapse.adapters.gpu.drivers import Driver
from supervisor_synapse.core.findings import Finding, error, fine, note, warning
from supervisor_synapse.core.model import Device, DeviceReading, Engine
from supervisor_synapse.core.plan import mib
from supervisor_synapse.doctor.case import Case
from supervisor_synapse.errors import ConfigError

ANSWER_SECONDS = 10.0
# What an engine without them cannot do for us.
_WANTED_FLAGS = {
    "--metrics": "its work is not counted, so a server that hangs is seen later",
    "--slots": "it does not tell how busy it is, so drains wait for the full time",
    "--list-devices": "it names no devices, so all memory counts as the host's",
    "--fit": "it may move layers by itself",
    "--sleep-idle-seconds": "sleep_idle_seconds has no effect",
}
_NVIDIA_EXTRA = "pip install 'supervisor_synapse[nvidia]'"


def check_engine(case: Case) -> Iterator[Finding]:
    """Whether there is a llama-server, whether it runs, and what it lacks."""
    found = engine_of(case)
    if isinstance(found, ConfigError):
        yield from (_missing(case, problem) for problem in found.problems)
        return
    lacking = [flag for flag in _WANTED_FLAGS if flag not in found.flags]
    for flag in lacking:
        yield note(
            "engine-old", found.path, f"knows no {flag}: {_WANTED_FLAGS[flag]}",
            "a newer llama-server has it",
        )  # fmt: skip
    others = sorted({block.server[0] for block in case.blocks if block.server} - {found.path})
    for path in others:
        yield note(
            "engine-differs", path, f"blocks run this engine, and {found.path} is the one to use",
            "`synapse discover` renders them anew",
        )  # fmt: skip
    yield fine(found.path, f"runs; version {found.version}")


def check_processor(case: Case) -> Iterator[Finding]:
    """Whether the engine can compute here: it loads a model that is made for this."""
    found = engine_of(case)
    if isinstance(found, ConfigError):
        return
    with tempfile.TemporaryDirectory(prefix="synapse-") as folder:
        model = Path(folder, demo_model.FILE)
        demo_model.write(model)
        fatal = engines.fatal_signal(found, model, ANSWER_SECONDS)
    if fatal is not None:
        is_foreign = fatal is signal.SIGILL
        yield error(
            "engine-unfit", found.path, f"ends by {fatal.name} with any model"
            + (": it was built for a newer processor than this one" if is_foreign else ""),
            engines.how_to_get_one(),
        )  # fmt: skip
        return
    yield fine(found.path, "computes on this processor")


def _missing(case: Case, problem: str) -> Finding:
    """The way to an engine stands by itself."""
    way = engines.how_to_get_one()
    is_chosen = case.settings.engine != "auto" and way not in problem
    mend = "mend that, or set engine = auto in synapse.conf" if is_chosen else way
    return error("engine-missing", "engine", problem.replace(way, "").rstrip(" ;:"), mend)


def engine_of(case: Case) -> Engine | ConfigError:
    """The engine, or why there is none."""

    def take() -> Engine | ConfigError:
        try:
            return engines.find(case.settings.engine, ANSWER_SECONDS)
        except ConfigError as missing:
            return missing

    return case.once("engine", take)


def check_devices(case: Case) -> Iterator[Finding]:
    """Which devices there are, who tells of their memory, and how much of it is free."""
    engine = engine_of(case)
    if isinstance(engine, ConfigError):
        devices: tuple[Device, ...] = ()
    else:
        try:
            devices = engines.devices(engine, case.settings.rpc, ANSWER_SECONDS)
        except ConfigError as silent:
            yield error("devices-unknown", engine.path, str(silent))
            return
    yield from _unreadable(devices)
    host = cpu.read()
    read = drivers.read_all((*devices, host), {}, lambda: devices)
    for device, reading in zip((*devices, host), read, strict=True):
        yield from _memory_of(case, device, reading)
    if not isinstance(engine, ConfigError):
        yield from _unused(devices)


def _driver_of(device: Device) -> Driver | None:
    return next((one for one in drivers.DRIVERS if one.covers(device)), None)


def _unreadable(devices: Sequence[Device]) -> Iterator[Finding]:
    """Devices for which there would be a better reader than the engine."""
    if importlib.util.find_spec("pynvml") is None:
        for device in devices:
            driver = _driver_of(device)
            if driver is not None and driver.name == "NVIDIA":
                yield warning(
                    "device-reader-missing", device.name,
                    f"{device.description or 'an NVIDIA device'}: its driver's own figures cannot "
                    "be read, so the engine is asked, which is slower and names no process",
                    _NVIDIA_EXTRA,
                )  # fmt: skip


def _memory_of(case: Case, device: Device, reading: DeviceReading) -> Iterator[Finding]:
    if reading.free_bytes is None:
        yield error(
            "device-unreadable", device.name, f"{reading.problem}; nothing is admitted to it",
            "look whether its driver answers (after an update of the driver: restart the machine)",
        )  # fmt: skip
        return
    reserve = case.settings.memory_reserve.of(reading.total_bytes)
    told = f"{mib(reading.free_bytes)} free of {mib(reading.total_bytes)}"
    is_ours = bool(case.supervisord.snapshot and case.supervisord.snapshot.models)
    if reading.free_bytes < reserve and not is_ours:
        yield warning(
            "device-full", device.name,
            f"{told}, less than memory_reserve ({mib(reserve)}), and no model of ours runs",
            "end what takes it; models wait until there is room",
        )  # fmt: skip
    yield fine(device.name, f"{device.description or 'host'}: {told}, by {_reader_of(device)}")


def _reader_of(device: Device) -> str:
    if device.is_host:
        return "the system"
    driver = _driver_of(device)
    if driver is None or (driver.name == "NVIDIA" and importlib.util.find_spec("pynvml") is None):
        return "the engine"
    return f"the {driver.name} driver"


def _unused(devices: Sequence[Device]) -> Iterator[Finding]:
    """Hardware that is there, and of which the engine lists no device."""
    listed = {driver.name for driver in map(_driver_of, devices) if driver is not None}
    for name, is_there in (("NVIDIA", _has_nvidia()), ("AMD", _has_amd())):
        if is_there and name not in listed:
            yield warning(
                "device-unused", name, f"there is a device of {name}, and the engine lists none of "
                "it: models run without it",
                "use a llama-server that was built for it (CUDA, ROCm or Vulkan), or mend its "
                "driver",
            )  # fmt: skip


def _has_nvidia() -> bool:
    folder = Path("/proc/driver/nvidia/gpus")
    return folder.is_dir() and bool(os.listdir(folder))


def _has_amd() -> bool:
    return any(Path("/sys/class/drm").glob("card[0-9]*/device/mem_info_vram_total"))
