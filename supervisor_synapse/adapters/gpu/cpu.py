"""The host's memory, as a device that models can live in. Bytes throughout.

What the system calls available holds two things that are not to be had. A container's limits: the
cgroup that we run in, and each above it, up to the root; version 1 and 2. And the weights of models
that run: they are mapped from their files, so to the system they are pages that it could drop, and
would have to read again at once.

https://docs.kernel.org/admin-guide/cgroup-v2.html#memory,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, proc_pid_status(5)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable
from supervisor_synapse.core.model import Device

_KIB = 1024
_FIELD = re.compile(r"^(\w+):\s*(\d+) kB$", re.MULTILINE)
_NAME = "host memory"


@dataclass(frozen=True, slots=True)
class _Files:
    """Where one version of cgroups has its figures."""

    mount: str  # below /sys/fs/cgroup
    limits: tuple[str, ...]
    usage: str
    inactive: str  # in memory.stat, of this group and those below it
    active: str
    mapped: str


_V1 = _Files(
    "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes",
    "total_inactive_file", "total_active_file", "total_mapped_file",
)  # fmt: skip
# Above memory.high nothing is refused, but whoever allocates is slowed down to a standstill.
_V2 = _Files(
    "", ("memory.max", "memory.high"), "memory.current",
    "inactive_file", "active_file", "file_mapped",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limit:
    """What a group of processes may have, and has; the cache that it can drop does not count."""

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(self.limit_bytes - self.used_bytes, 0)


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of one process."""

    total_bytes: int
    mapped_bytes: int  # of files, that the system believes it could drop


def read() -> Device:
    """Total and free bytes now; none free where that cannot be read."""
    try:
        now = measure(())
    except Unreadable:
        return Device("CPU", psutil.virtual_memory().total, 0, _NAME)
    return Device("CPU", now.total_bytes, now.free_bytes, _NAME)


def _host_memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def measure(
    pids: Iterable[int],
    *,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    host: Callable[[], tuple[int, int]] = _host_memory,
) -> Reading:
    """Memory now, with what these processes of ours hold.

    Raises:
        Unreadable: there is a limit, and its figures make no sense.
    """
    total, available = host()
    resident = {pid: one for pid in pids if (one := _resident(proc, pid)) is not None}
    available -= sum(one.mapped_bytes for one in resident.values())
    limits = tuple(_limits(proc, cgroups))
    return Reading(
        name=_NAME,
        total_bytes=min([total, *(one.limit_bytes for one in limits)]),
        free_bytes=max(min([available, *(one.free_bytes for one in limits)]), 0),
        held_bytes={pid: one.total_bytes for pid, one in resident.items()},
    )


# --- processes -----------------------------------------------------------------------------------


def _resident(proc: Path, pid: int) -> Resident | None:
    """None where the process has ended."""
    try:
        return parse_status((proc / str(pid) / "status").read_text())
    except OSError:
        pass
    try:  # a system without /proc tells less: nothing of what is mapped
        return Resident(psutil.Process(pid).memory_info().rss, 0) if not proc.exists() else None
    except (psutil.Error, OSError):
        return None


def parse_status(text: str) -> Resident:
    """/proc/PID/status. What is locked is not taken for something that could be dropped."""
    fields = {name: int(size) * _KIB for name, size in _FIELD.findall(text)}
    mapped = fields.get("RssFile", 0) - fields.get("VmLck", 0)
    return Resident(fields.get("VmRSS", 0), max(mapped, 0))


# --- cgroups -------------------------------------------------------------------------------------


def _limits(proc: Path, cgroups: Path) -> Iterator[Limit]:
    try:
        text = (proc / "self" / "cgroup").read_text()
    except OSError:  # not Linux
        return
    for files, path in parse_cgroups(text):
        for folder in _levels(cgroups / files.mount, path):
            yield from _limits_of(folder, files)


def parse_cgroups(text: str) -> tuple[tuple[_Files, str], ...]:
    """/proc/self/cgroup: the groups whose limits on memory hold for us, by version."""
    found = []
    for line in text.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if (number, controllers) == ("0", ""):
            found.append((_V2, path))
        elif "memory" in controllers.split(","):
            found.append((_V1, path))
    return tuple(found)


def _levels(root: Path, path: str) -> Iterator[Path]:
    """From the group up to the root. In a container, the path may be one of the host's, whose
    levels are not there, while the root is the container's own group.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for depth in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:depth])


def _limits_of(folder: Path, files: _Files) -> Iterator[Limit]:
    given = [(name, text) for name in files.limits if (text := _text(folder / name))]
    for name, text in given:
        try:
            limit = parse_limit(
                text, _text(folder / files.usage), _text(folder / "memory.stat"), files
            )
        except ValueError as error:
            raise Unreadable(f"{folder / name}: {error}") from None
        if limit is not None:
            yield limit


def parse_limit(limit: str, usage: str, stat: str, files: _Files) -> Limit | None:
    """None: no limit. What can be had back at once is cache that was not used lately, as far as
    nobody has it mapped.

    Raises:
        ValueError: there is a limit, and these are no figures.
    """
    if limit == "max":
        return None
    figures = dict(_pairs(stat))
    inactive, active = figures.get(files.inactive, 0), figures.get(files.active, 0)
    droppable = max(min(inactive, inactive + active - figures.get(files.mapped, 0)), 0)
    return Limit(int(limit), max(int(usage) - droppable, 0))


def _pairs(stat: str) -> Iterator[tuple[str, int]]:
    for line in stat.splitlines():
        name, _, figure = line.partition(" ")
        if figure.isdecimal():
            yield name, int(figure)


def _text(path: Path) -> str:
    """Empty where there is no such file.

    Raises:
        Unreadable: there is one, and it cannot be read.
    """
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {error}") from None
