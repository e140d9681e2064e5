"""Readers of device memory: what drivers say, and of which of the engine's devices they say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor_synapse.adapters.gpu import amd, nvidia
from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable, of_device
from supervisor_synapse.core.model import Device

GIB = 1024**3
H100 = Reading("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, {10: GIB // 2})


def device(name: str = "Vulkan0", total: int = 80 * GIB, what: str = H100.name) -> Device:
    return Device(name, total, total, what)


def test_a_device_is_found_by_name_and_size() -> None:
    other = Reading("NVIDIA L4", 24 * GIB, 24 * GIB, {})
    assert of_device(device(), (other, H100)) is H100
    assert of_device(device(total=79 * GIB), (H100,)) is H100


@pytest.mark.parametrize("what", ["NVIDIA L4", "AMD Radeon RX 7900 XTX"])
def test_a_device_that_no_driver_knows_has_no_reading(what: str) -> None:
    """No evidence, rather than another device's."""
    assert of_device(device(what=what), (H100,)) is None
    assert of_device(device(total=40 * GIB), (H100,)) is None


def test_devices_alike_are_told_apart_by_number_only_where_there_are_as_many() -> None:
    pair = (H100, Reading(H100.name, H100.total_bytes, GIB, {}))
    assert of_device(device("CUDA1"), pair) is pair[1]
    assert of_device(device("CUDA2"), pair) is None
    assert of_device(device("GPU"), pair) is None


def test_what_no_process_holds_is_unaccounted() -> None:
    assert H100.unaccounted_bytes == GIB // 2
    assert H100.held_by([10, 11]) == GIB // 2


def test_a_process_that_computes_and_draws_counts_once() -> None:
    """Vulkan's processes stand in both of NVML's lists."""
    found = [(10, 500), (11, None), (10, 700), (12, 5)]
    assert nvidia.merge_processes(found) == {10: 700, 12: 5}


def test_without_the_driver_there_are_no_nvidia_devices_and_no_error() -> None:
    assert isinstance(nvidia.read(), tuple)


FDINFO = """pos:\t0
drm-driver:\tamdgpu
drm-client-id:\t{client}
drm-pdev:\t0000:03:00.0
drm-memory-vram:\t{vram} KiB
drm-memory-gtt:\t0 KiB
"""


def _card(root: Path, *, vram: int, gtt: int, used: int) -> None:
    real = root / "devices" / "0000:03:00.0"
    real.mkdir(parents=True)
    figures = {
        "vendor": "0x1002", "mem_info_vram_total": vram, "mem_info_vram_used": used,
        "mem_info_gtt_total": gtt, "mem_info_gtt_used": GIB, "product_name": "Radeon",
    }  # fmt: skip
    for name, value in figures.items():
        (real / name).write_text(f"{value}\n")
    card = root / "class" / "drm" / "card0"
    card.mkdir(parents=True)
    (card / "device").symlink_to(real)


def _process(proc: Path, pid: int, *texts: str) -> None:
    folder = proc / str(pid) / "fdinfo"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / str(number)).write_text(text)


def test_an_amd_device_is_read_with_what_each_process_holds(tmp_path: Path) -> None:
    """Several descriptors of one client show the same memory; two clients add up."""
    _card(tmp_path / "sys", vram=24 * GIB, gtt=16 * GIB, used=2 * GIB)
    same = FDINFO.format(client=1, vram=1024)
    _process(tmp_path / "proc", 77, same, same, FDINFO.format(client=2, vram=1024), "pos:\t0\n")
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc")
    assert reading == Reading("Radeon", 24 * GIB, 22 * GIB, {77: 2 * 1024 * 1024})


def test_an_integrated_amd_device_lives_in_the_hosts_memory_too(tmp_path: Path) -> None:
    _card(tmp_path / "sys", vram=GIB // 2, gtt=16 * GIB, used=GIB // 4)
    (tmp_path / "proc").mkdir()
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc")
    assert reading.total_bytes == 16 * GIB + GIB // 2
    assert reading.free_bytes == reading.total_bytes - GIB // 4 - GIB


def test_an_amd_device_whose_figures_are_gone_is_unreadable_not_empty(tmp_path: Path) -> None:
    _card(tmp_path / "sys", vram=24 * GIB, gtt=16 * GIB, used=0)
    (tmp_path / "sys" / "devices" / "0000:03:00.0" / "mem_info_vram_used").write_text("?")
    with pytest.raises(Unreadable, match="card0"):
        amd.read(tmp_path / "sys", tmp_path)
