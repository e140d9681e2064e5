"""AMD devices through sysfs and fdinfo (the kernel's amdgpu driver). Bytes throughout.

https://docs.kernel.org/gpu/amdgpu/driver-misc.html, https://docs.kernel.org/gpu/drm-usage-stats.html
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable

_AMD = "0x1002"
_KIB = {"": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_PDEV = re.compile(r"^drm-pdev:\s*(\S+)$", re.MULTILINE)
_CLIENT = re.compile(r"^drm-client-id:\s*(\d+)$", re.MULTILINE)
_MEMORY = re.compile(r"^drm-(?:memory|resident)-(?:vram|gtt):\s*(\d+)\s*(\w*)$", re.MULTILINE)


def read(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> tuple[Reading, ...]:
    """Every device of the amdgpu driver.

    An integrated one shares the host's memory (GTT), which counts with its own.

    Raises:
        Unreadable: a device is there, and its figures are not.
    """
    devices = {}
    for card in sorted(sysfs.glob("class/drm/card[0-9]*/device")):
        if _text(card / "vendor") == _AMD and (card / "mem_info_vram_total").exists():
            devices[card.resolve().name] = card
    held = _held(proc) if devices else {}
    return tuple(_read_one(card, held.get(place, {})) for place, card in devices.items())


def _read_one(card: Path, held: Mapping[int, int]) -> Reading:
    try:
        figures = {
            name: int((card / f"mem_info_{name}").read_text())
            for name in ("vram_total", "vram_used", "gtt_total", "gtt_used")
        }
    except (OSError, ValueError) as error:
        raise Unreadable(f"{card}: {error}") from None
    is_integrated = figures["vram_total"] < figures["gtt_total"] / 4
    total = figures["vram_total"] + figures["gtt_total"] * is_integrated
    used = figures["vram_used"] + figures["gtt_used"] * is_integrated
    name = _text(card / "product_name") or "AMD"
    return Reading(name, total, max(total - used, 0), held)


def _held(proc: Path) -> Mapping[str, Mapping[int, int]]:
    """PCI address → pid → bytes, of processes that we may look into."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
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


def process_bytes(fdinfo: list[str]) -> Mapping[str, int]:
    """PCI address → bytes of one process; a client with several descriptors counts once."""
    clients: dict[tuple[str, str], int] = {}
    for text in fdinfo:
        place, client = _PDEV.search(text), _CLIENT.search(text)
        if place and client:
            size = sum(int(n) * _KIB.get(unit.lower(), 1) for n, unit in _MEMORY.findall(text))
            clients[place[1], client[1]] = size
    total: dict[str, int] = defaultdict(int)
    for (device, _), size in clients.items():
        total[device] += size
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
