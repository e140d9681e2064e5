"""AMD devices through sysfs and fdinfo (the kernel's amdgpu driver). Bytes throughout.

https://docs.kernel.org/gpu/amdgpu/driver-misc.html, https://docs.kernel.org/gpu/drm-usage-stats.html
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable

_AMD = "0x1002"
_WORDS = ("AMD", "Radeon", "Instinct")  # few cards have a name of their own in sysfs
_KIB = {"": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_PDEV = re.compile(r"^drm-pdev:\s*(\S+)$", re.MULTILINE)
_CLIENT = re.compile(r"^drm-client-id:\s*(\d+)$", re.MULTILINE)
# The same figure stands under its old name, its new one, or both.
_MEMORY = re.compile(r"^drm-(?:memory|resident)-(vram|gtt):\s*(\d+)\s*(\w*)$", re.MULTILINE)
_METRICS_OF_INTEGRATED = 2  # gpu_metrics_v2_x and later: "temperature on APUs"


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds on one device."""

    vram_bytes: int = 0
    gtt_bytes: int = 0  # of the host's memory


def _host_available() -> int:
    return int(psutil.virtual_memory().available)


def read(
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    host_available: Callable[[], int] = _host_available,
) -> tuple[Reading, ...]:
    """Every device of the amdgpu driver.

    An integrated one shares the host's memory (GTT), which counts with its own as far as the host
    has it to give.

    Raises:
        Unreadable: a device is there, and its figures are not.
    """
    devices = {}
    for card in sorted(sysfs.glob("class/drm/card[0-9]*/device")):
        if _text(card / "vendor") == _AMD and (card / "mem_info_vram_total").exists():
            devices[card.resolve().name] = card
    held = _held(proc) if devices else {}
    return tuple(
        _read_one(card, held.get(place, {}), host_available) for place, card in devices.items()
    )


def _read_one(card: Path, held: Mapping[int, Held], host_available: Callable[[], int]) -> Reading:
    try:
        figures = {
            name: int((card / f"mem_info_{name}").read_text())
            for name in ("vram_total", "vram_used", "gtt_total", "gtt_used")
        }
    except (OSError, ValueError) as error:
        raise Unreadable(f"{card}: {error}") from None
    name = _text(card / "product_name") or "AMD"
    total = figures["vram_total"]
    free = max(total - figures["vram_used"], 0)
    by_pid = {pid: one.vram_bytes for pid, one in held.items()}
    # A small device in a large host looks the same, so that the size alone proves nothing.
    if total < figures["gtt_total"] / 4 and _says_integrated(card.resolve()):
        total += figures["gtt_total"]
        free += max(min(figures["gtt_total"] - figures["gtt_used"], host_available()), 0)
        by_pid = {pid: one.vram_bytes + one.gtt_bytes for pid, one in held.items()}
    return Reading(name, total, free, by_pid, _WORDS)


def _says_integrated(card: Path) -> bool:
    """No, where it does not say: then only its own memory counts."""
    try:
        return metrics_version(_metrics_header(card)) >= _METRICS_OF_INTEGRATED
    except OSError:
        return False


@functools.cache  # it stays what it is, and to be asked may wake it up
def _metrics_header(card: Path) -> bytes:
    with (card / "gpu_metrics").open("rb") as file:
        return file.read(4)


def metrics_version(header: bytes) -> int:
    """`struct metrics_table_header`: size (2 bytes), version, revision; 0: this is none."""
    return header[2] if len(header) == 4 else 0


def _held(proc: Path) -> Mapping[str, Mapping[int, Held]]:
    """PCI address → pid → bytes, of processes that we may look into."""
    found: dict[str, dict[int, Held]] = defaultdict(dict)
    for folder in proc.glob("[0-9]*/fdinfo"):
        pid = int(folder.parent.name)
        for place, size in process_bytes(_fdinfo(folder)).items():
            found[place][pid] = size
    return found


def _fdinfo(folder: Path) -> list[str]:
    try:
        return [text for path in folder.iterdir() if "drm-pdev" in (text := _text(path))]
    except OSError:
        return []


def process_bytes(fdinfo: list[str]) -> Mapping[str, Held]:
    """PCI address → bytes of one process; a client with several descriptors counts once."""
    clients: dict[tuple[str, str], dict[str, int]] = {}
    for text in fdinfo:
        place, client = _PDEV.search(text), _CLIENT.search(text)
        if place and client:
            sizes = clients[place[1], client[1]] = {"vram": 0, "gtt": 0}
            for kind, number, unit in _MEMORY.findall(text):
                sizes[kind] = max(sizes[kind], int(number) * _KIB.get(unit.lower(), 1))
    total: dict[str, Held] = defaultdict(Held)
    for (device, _), sizes in clients.items():
        so_far = total[device]
        total[device] = Held(so_far.vram_bytes + sizes["vram"], so_far.gtt_bytes + sizes["gtt"])
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
