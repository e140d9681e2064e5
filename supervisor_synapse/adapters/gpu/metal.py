"""Apple's devices (Metal). Bytes throughout.

They live in the host's memory, and may have as much of it as macOS lets them wire. Metal says how
much (the extra `metal`); without it, what the user has set says it, else a part of the memory that
is no more than what macOS takes by itself. Metal tells a process of nobody's memory but its own, so
what is free is what may be had, less what our own servers hold, and never more than the host has.

https://developer.apple.com/documentation/metal/mtldevice/recommendedmaxworkingsetsize,
`struct rusage_info_v0` in <sys/resource.h>
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil

from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable
from supervisor_synapse.core.model import Device

_MIB, _GIB = 1024**2, 1024**3
_LARGE_BYTES = 64 * _GIB
_PART, _PART_OF_LARGE = 0.70, 0.80
_SYSCTL = "/usr/sbin/sysctl"
_ANSWER_SECONDS = 5.0
# uuid, then the 64-bit figures; resident size and footprint are the seventh and the eighth of them.
_USAGE = struct.Struct("=16s10Q")
_USAGE_VERSION = 0
_ROOM_BYTES = 1024  # newer systems must not write beyond the end


def read(pids: Iterable[int] = ()) -> tuple[Reading, ...]:
    """The device, with what these processes of ours hold; none but on Apple's own processors.

    Raises:
        Unreadable: it is there, and its figures are not.
    """
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return ()
    try:
        memory = psutil.virtual_memory()
        device = _device()
        limit = limit_bytes(
            memory.total,
            recommended=int(device.recommendedMaxWorkingSetSize()) if device else None,
            wired_limit_mb=parse_number(_sysctl("iogpu.wired_limit_mb")),
        )
        name = str(device.name()) if device else _sysctl("machdep.cpu.brand_string").strip()
        return (reading(name or "Apple", limit, _held(pids), memory.available),)
    except (OSError, ValueError, AttributeError, psutil.Error) as error:
        raise Unreadable(f"Metal: {error}") from None


def limit_bytes(
    memory_bytes: int, *, recommended: int | None = None, wired_limit_mb: int | None = None
) -> int:
    """What the device may have of the host's memory. None or 0: that source does not tell."""
    if recommended:
        return recommended
    if wired_limit_mb:
        return min(wired_limit_mb * _MIB, memory_bytes)
    return int(memory_bytes * (_PART if memory_bytes < _LARGE_BYTES else _PART_OF_LARGE))


def reading(name: str, limit: int, held: Mapping[int, int], available: int) -> Reading:
    """A device that may have `limit`, on a host with so much available."""
    free = min(limit - sum(held.values()), available)
    return Reading(name, limit, max(free, 0), held)


def match(devices: Sequence[Device], readings: Sequence[Reading]) -> Mapping[str, Reading]:
    """There is one device. Of two limits (the engine has asked Metal too) the lower holds."""
    return {
        device.name: _lowered(one, device.total_bytes) for device in devices for one in readings
    }


def _lowered(one: Reading, total: int) -> Reading:
    if not 0 < total < one.total_bytes:
        return one
    left = max(total - sum(one.held_bytes.values()), 0)
    return replace(one, total_bytes=total, free_bytes=min(one.free_bytes, left))


def parse_number(text: str) -> int | None:
    """`iogpu.wired_limit_mb: 49152` or `49152` → 49152."""
    last = text.strip().rpartition(":")[2].strip()
    return int(last) if last.isdecimal() else None


def parse_usage(content: bytes) -> int:
    """`rusage_info_v0` → bytes of a process: its footprint, which leaves out mapped files, or what
    is resident, which leaves out what the device has wired; the larger.
    """
    figures = _USAGE.unpack_from(content)
    return max(int(figures[7]), int(figures[8]))


def _device() -> Any:
    """Metal's own; None where its extra is not installed."""
    try:
        return importlib.import_module("Metal").MTLCreateSystemDefaultDevice()
    except ImportError:
        return None


def _sysctl(name: str) -> str:
    """Its value as text; empty where this system does not know it."""
    try:
        done = subprocess.run(
            [_SYSCTL, "-n", name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=_ANSWER_SECONDS, check=False, text=True,
            errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unreadable(f"Metal: {error}") from None
    return done.stdout if done.returncode == 0 else ""


def _held(pids: Iterable[int]) -> Mapping[int, int]:
    """By pid; one that has ended holds nothing."""
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    held = {}
    for pid in pids:
        buffer = ctypes.create_string_buffer(_ROOM_BYTES)
        if library.proc_pid_rusage(ctypes.c_int(pid), ctypes.c_int(_USAGE_VERSION), buffer) == 0:
            held[pid] = parse_usage(buffer.raw)
    return held
