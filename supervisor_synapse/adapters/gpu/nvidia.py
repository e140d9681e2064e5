"""NVIDIA devices through NVML (the extra `nvidia`).

Bytes throughout. A process shows up among those that compute, those that draw (Vulkan), or both
with the same figure: so the two lists are merged by pid with the larger one. In a container the
driver may name processes by numbers of the host; then what a run holds is not known.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable


def read(library: Any = None) -> tuple[Reading, ...]:
    """Every device that the driver has; none where there is no NVIDIA driver, or not the extra.

    `library`: NVML as pynvml has it, initialized; by itself it is looked for.

    Raises:
        Unreadable: there is a driver, and it does not answer.
    """
    nvml = library or _nvml()
    if nvml is None:
        return ()
    try:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return tuple(_read_one(nvml, handle) for handle in handles)
    except nvml.NVMLError as error:
        _nvml.cache_clear()  # a driver that came back wants to be greeted again
        raise Unreadable(f"NVML: {error}") from None


@functools.cache
def _nvml() -> Any:
    """The library, initialized once for the life of this process; None where there is none.

    Raises:
        Unreadable: there is a driver, and it does not answer.
    """
    try:
        import pynvml
    except ImportError:
        return None
    return initialized(pynvml)


def initialized(nvml: Any) -> Any:
    """The library, ready to be asked; None where this machine has no such driver.

    Raises:
        Unreadable: it has one that does not answer, as after an update until the next boot.
    """
    absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value in absent:
            return None
        raise Unreadable(f"NVML: {error}") from None
    return nvml


def _read_one(nvml: Any, handle: Any) -> Reading:
    name = nvml.nvmlDeviceGetName(handle)
    memory = _memory(nvml, handle)
    processes: list[Any] = []
    for kind in ("Compute", "Graphics", "MPSCompute"):
        try:
            processes += getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses")(handle)
        except (nvml.NVMLError, AttributeError):  # not on this device, by this driver or library
            continue
    return Reading(
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_bytes=int(memory.total), free_bytes=int(memory.free),
        held_bytes=merge_processes((one.pid, one.usedGpuMemory) for one in processes),
    )  # fmt: skip


def _memory(nvml: Any, handle: Any) -> Any:
    """Without what the driver keeps for itself, where the driver can tell that apart."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    if version is not None:
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
        except nvml.NVMLError:
            pass  # an older driver
    return nvml.nvmlDeviceGetMemoryInfo(handle)


def merge_processes(found: Iterable[tuple[int, int | None]]) -> Mapping[int, int]:
    """Bytes by pid; a process in both lists counts once. None: the driver does not say."""
    held: dict[int, int] = {}
    for pid, size in found:
        if size is not None:
            held[pid] = max(held.get(pid, 0), int(size))
    return held
