"""Readers of device memory: what drivers say, and of which of the engine's devices they say it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from supervisor_synapse.adapters.gpu import amd, cpu, drivers, metal, nvidia
from supervisor_synapse.adapters.gpu.drivers import Driver
from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable, match, of_device
from supervisor_synapse.core.model import Device, DeviceReading

KIB, MIB, GIB = 1024, 1024**2, 1024**3
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


# --- which reading is whose ----------------------------------------------------------------------

L4 = Reading("NVIDIA L4", 24 * GIB, 24 * GIB, {})
PAIR = (H100, Reading(H100.name, H100.total_bytes, GIB, {}))


def test_devices_alike_are_matched_in_order_once_all_are_known() -> None:
    """Whatever their numbers are: other devices may be counted between them."""
    devices = (device("CUDA0", 24 * GIB, L4.name), device("CUDA1"), device("CUDA2"))
    assert match(devices, (*PAIR, L4)) == {"CUDA0": L4, "CUDA1": PAIR[0], "CUDA2": PAIR[1]}


@pytest.mark.parametrize(
    ("names", "readings"),
    [(["CUDA0"], PAIR), (["CUDA0", "CUDA1"], (H100,))],
    ids=["one hidden from the engine", "one hidden from the driver"],
)
def test_devices_alike_are_not_matched_where_one_is_hidden(
    names: list[str], readings: tuple[Reading, ...]
) -> None:
    """CUDA0 may then be any of them."""
    assert match([device(name) for name in names], readings) == {}


def test_a_device_that_two_backends_see_is_matched_for_each() -> None:
    devices = [device(name) for name in ("CUDA0", "CUDA1", "Vulkan0", "Vulkan1")]
    found = match(devices, PAIR)
    assert found["CUDA1"] is found["Vulkan1"] is PAIR[1]


def test_a_device_under_another_name_is_found_by_a_word() -> None:
    card = Reading("Navi 31", 24 * GIB, GIB, {}, ("AMD", "Radeon"))
    assert of_device(device(total=24 * GIB, what="Radeon RX 7900 XTX"), (card,)) is card
    assert of_device(device(total=24 * GIB, what="NVIDIA L4"), (card,)) is None


# --- NVIDIA --------------------------------------------------------------------------------------


def test_a_process_that_computes_and_draws_counts_once() -> None:
    """Vulkan's processes stand in both of NVML's lists."""
    found = [(10, 500), (11, None), (10, 700), (12, 5)]
    assert nvidia.merge_processes(found) == {10: 700, 12: 5}


def test_without_the_driver_there_are_no_nvidia_devices_and_no_error() -> None:
    assert isinstance(nvidia.read(), tuple)


class _NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def _nvml(**changes: Any) -> Any:
    """NVML with one card, which is asked as pynvml is."""

    def processes(*found: tuple[int, int | None]) -> Any:
        return lambda _: [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found]

    def memory(_: object, version: int = 1) -> Any:
        return SimpleNamespace(total=80 * GIB, free=(70 if version == 2 else 71) * GIB)

    functions = {
        "NVMLError": _NvmlError, "NVML_ERROR_LIBRARY_NOT_FOUND": 12,
        "NVML_ERROR_DRIVER_NOT_LOADED": 9, "nvmlMemory_v2": 2, "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda _: b"NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetComputeRunningProcesses": processes((10, GIB), (11, None)),
        "nvmlDeviceGetGraphicsRunningProcesses": processes((10, GIB), (12, MIB)),
    } | changes  # fmt: skip
    return SimpleNamespace(**functions)


def _fails(value: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise _NvmlError(value)

    return fail


def test_an_nvidia_device_is_read_with_what_each_process_holds() -> None:
    (reading,) = nvidia.read(_nvml())
    assert reading == Reading(H100.name, 80 * GIB, 70 * GIB, {10: GIB, 12: MIB})


def test_an_older_driver_tells_memory_the_older_way() -> None:
    def memory(_: object, version: int = 1) -> Any:
        if version != 1:
            raise _NvmlError(25)
        return SimpleNamespace(total=80 * GIB, free=71 * GIB)

    (reading,) = nvidia.read(_nvml(nvmlDeviceGetMemoryInfo=memory))
    assert reading.free_bytes == 71 * GIB


def test_an_nvidia_driver_that_names_no_processes_still_tells_memory() -> None:
    (reading,) = nvidia.read(
        _nvml(
            nvmlDeviceGetComputeRunningProcesses=_fails(3),
            nvmlDeviceGetGraphicsRunningProcesses=_fails(3),
        )
    )
    assert (reading.free_bytes, reading.held_bytes) == (70 * GIB, {})


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"]
)
def test_an_nvidia_driver_that_fails_is_unreadable_not_empty(function: str) -> None:
    with pytest.raises(Unreadable, match="error 15"):
        nvidia.read(_nvml(**{function: _fails(15)}))


@pytest.mark.parametrize("value", [9, 12])
def test_a_machine_without_the_nvidia_driver_has_no_such_devices(value: int) -> None:
    assert nvidia.initialized(_nvml(nvmlInit=_fails(value))) is None


def test_an_nvidia_driver_that_cannot_be_greeted_is_unreadable_not_absent() -> None:
    """18: library and driver are of two versions, as after an update."""
    with pytest.raises(Unreadable, match="error 18"):
        nvidia.initialized(_nvml(nvmlInit=_fails(18)))


# --- AMD -----------------------------------------------------------------------------------------


FDINFO = """pos:\t0
drm-driver:\tamdgpu
drm-client-id:\t{client}
drm-pdev:\t0000:03:00.0
drm-memory-vram:\t{vram} KiB
drm-memory-gtt:\t{gtt} KiB
"""
# Kernels since 6.13 tell the same figures under two names.
FDINFO_OF_BOTH = """pos:\t0
drm-driver:\tamdgpu
drm-client-id:\t7
drm-pdev:\t0000:03:00.0
drm-total-vram:\t286604 KiB
drm-shared-vram:\t0
drm-resident-vram:\t286604 KiB
drm-total-gtt:\t2 MiB
drm-resident-gtt:\t2 MiB
drm-memory-vram:\t286604 KiB
drm-memory-gtt: \t2048 KiB
"""


def _card(root: Path, *, vram: int, gtt: int, used: int, metrics: bytes = b"") -> None:
    real = root / "devices" / "0000:03:00.0"
    real.mkdir(parents=True)
    figures = {
        "vendor": "0x1002", "mem_info_vram_total": vram, "mem_info_vram_used": used,
        "mem_info_gtt_total": gtt, "mem_info_gtt_used": GIB, "product_name": "Radeon",
    }  # fmt: skip
    for name, value in figures.items():
        (real / name).write_text(f"{value}\n")
    if metrics:
        (real / "gpu_metrics").write_bytes(metrics)
    card = root / "class" / "drm" / "card0"
    card.mkdir(parents=True)
    (card / "device").symlink_to(real)


def _process(proc: Path, pid: int, *texts: str) -> None:
    folder = proc / str(pid) / "fdinfo"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / str(number)).write_text(text)


INTEGRATED = struct.pack("<HBB", 120, 2, 2) + bytes(116)
DISCRETE = struct.pack("<HBB", 120, 1, 3) + bytes(116)


def test_an_amd_device_is_read_with_what_each_process_holds(tmp_path: Path) -> None:
    """Several descriptors of one client show the same memory; two clients add up."""
    _card(tmp_path / "sys", vram=24 * GIB, gtt=16 * GIB, used=2 * GIB)
    same = FDINFO.format(client=1, vram=1024, gtt=0)
    other = FDINFO.format(client=2, vram=1024, gtt=77)
    _process(tmp_path / "proc", 77, same, same, other, "pos:\t0\n")
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc")
    assert (reading.name, reading.total_bytes, reading.free_bytes) == (
        "Radeon", 24 * GIB, 22 * GIB,
    )  # fmt: skip
    assert reading.held_bytes == {77: 2 * MIB}


def test_an_amd_process_is_counted_once_whatever_its_kernel_calls_the_figures() -> None:
    assert amd.process_bytes([FDINFO_OF_BOTH]) == {
        "0000:03:00.0": amd.Held(vram_bytes=286604 * KIB, gtt_bytes=2 * MIB)
    }


def test_an_amd_process_without_an_address_or_a_client_is_of_another_driver() -> None:
    assert amd.process_bytes(["drm-driver:\ti915\ndrm-memory-vram:\t5 KiB\n", ""]) == {}


def test_an_integrated_amd_device_lives_in_the_hosts_memory_too(tmp_path: Path) -> None:
    _card(tmp_path / "sys", vram=GIB // 2, gtt=16 * GIB, used=GIB // 4, metrics=INTEGRATED)
    _process(tmp_path / "proc", 77, FDINFO.format(client=1, vram=MIB, gtt=2 * MIB))
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc", lambda: 64 * GIB)
    assert reading.total_bytes == 16 * GIB + GIB // 2
    assert reading.free_bytes == reading.total_bytes - GIB // 4 - GIB
    assert reading.held_bytes == {77: 3 * GIB}


def test_an_integrated_amd_device_has_no_more_than_the_host_has_to_give(tmp_path: Path) -> None:
    _card(tmp_path / "sys", vram=GIB // 2, gtt=16 * GIB, used=GIB // 4, metrics=INTEGRATED)
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc", lambda: 3 * GIB)
    assert reading.free_bytes == GIB // 4 + 3 * GIB


@pytest.mark.parametrize("metrics", [DISCRETE, b"", b"?"], ids=["discrete", "none", "broken"])
def test_a_small_amd_card_in_a_large_host_is_not_taken_for_an_integrated_one(
    tmp_path: Path, metrics: bytes
) -> None:
    """Of a card with 4 GiB, nobody promises 36."""
    _card(tmp_path / "sys", vram=4 * GIB, gtt=32 * GIB, used=0, metrics=metrics)
    _process(tmp_path / "proc", 77, FDINFO.format(client=1, vram=MIB, gtt=MIB))
    (reading,) = amd.read(tmp_path / "sys", tmp_path / "proc", lambda: 64 * GIB)
    assert (reading.total_bytes, reading.free_bytes) == (4 * GIB, 4 * GIB)
    assert reading.held_bytes == {77: GIB}


def test_an_amd_device_whose_figures_are_gone_is_unreadable_not_empty(tmp_path: Path) -> None:
    _card(tmp_path / "sys", vram=24 * GIB, gtt=16 * GIB, used=0)
    (tmp_path / "sys" / "devices" / "0000:03:00.0" / "mem_info_vram_used").write_text("?")
    with pytest.raises(Unreadable, match="card0"):
        amd.read(tmp_path / "sys", tmp_path)


# --- the host ------------------------------------------------------------------------------------

STATUS = """Name:\tllama-server
VmPeak:\t  908344 kB
VmLck:\t{locked:8d} kB
VmRSS:\t  115384 kB
RssAnon:\t   20000 kB
RssFile:\t   95380 kB
RssShmem:\t       4 kB
Threads:\t5
"""
FIGURES_V2 = """anon 1073741824
file 3221225472
file_mapped {mapped}
inactive_file 2147483648
active_file 1073741824
"""
FIGURES_V1 = """cache 3221225472
mapped_file 1
inactive_file 7
total_mapped_file 0
total_inactive_file 1073741824
total_active_file 1073741824
"""


def _group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def _measure(root: Path, pids: Iterable[int] = (), available: int = 50 * GIB) -> Reading:
    """On a host of 64 GiB whose /proc and cgroups stand in `root`."""
    return cpu.measure(
        pids, proc=root / "proc", cgroups=root / "cgroup", host=lambda: (64 * GIB, available)
    )


def _member_of(root: Path, text: str) -> None:
    _group(root / "proc" / "self", cgroup=text)


def test_a_host_without_limits_has_what_the_system_calls_available(tmp_path: Path) -> None:
    reading = _measure(tmp_path)
    assert (reading.total_bytes, reading.free_bytes) == (64 * GIB, 50 * GIB)


def test_the_memory_of_this_machine_is_read() -> None:
    now = cpu.read()
    assert now.is_host
    assert 0 < now.free_bytes < now.total_bytes <= psutil.virtual_memory().total


def test_what_our_models_have_mapped_is_not_free(tmp_path: Path) -> None:
    """The system would drop these pages; the model that runs reads them with each token."""
    for pid in (7, 8):
        _group(tmp_path / "proc" / str(pid), status=STATUS.format(locked=0))
    reading = _measure(tmp_path, [7, 8, 9])
    assert reading.free_bytes == 50 * GIB - 2 * 95380 * KIB
    assert reading.held_bytes == {7: 115384 * KIB, 8: 115384 * KIB}


def test_what_is_locked_was_never_called_available() -> None:
    assert cpu.parse_status(STATUS.format(locked=95000)) == cpu.Resident(115384 * KIB, 380 * KIB)
    assert cpu.parse_status(STATUS.format(locked=500000)).mapped_bytes == 0


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert cpu.parse_status("Name:\tllama-server\nState:\tZ (zombie)\n") == cpu.Resident(0, 0)


def test_the_limit_of_a_container_counts_without_cache_that_can_be_dropped(tmp_path: Path) -> None:
    _member_of(tmp_path, "0::/")
    _group(
        tmp_path / "cgroup", memory__max=8 * GIB, memory__high="max", memory__current=6 * GIB,
        memory__stat=FIGURES_V2.format(mapped=0),
    )  # fmt: skip
    reading = _measure(tmp_path)
    assert (reading.total_bytes, reading.free_bytes) == (8 * GIB, 4 * GIB)


def test_cache_of_a_container_that_is_mapped_cannot_be_dropped(tmp_path: Path) -> None:
    """3 GiB of files, 2.5 of them mapped."""
    _member_of(tmp_path, "0::/")
    _group(
        tmp_path / "cgroup", memory__max=8 * GIB, memory__current=6 * GIB,
        memory__stat=FIGURES_V2.format(mapped=5 * GIB // 2),
    )  # fmt: skip
    assert _measure(tmp_path).free_bytes == 2 * GIB + GIB // 2


@pytest.mark.parametrize("lowest", ["user.slice", "user.slice/app.slice", "."])
def test_the_tightest_limit_up_to_the_root_counts(tmp_path: Path, lowest: str) -> None:
    _member_of(tmp_path, "0::/user.slice/app.slice/synapse.service")
    levels = (".", "user.slice", "user.slice/app.slice", "user.slice/app.slice/synapse.service")
    for level in levels:
        limit: object = 3 * GIB if level == lowest else 30 * GIB
        _group(tmp_path / "cgroup" / level, memory__max=limit, memory__current=GIB)
    reading = _measure(tmp_path)
    assert (reading.total_bytes, reading.free_bytes) == (3 * GIB, 2 * GIB)


def test_where_the_kernel_slows_down_is_a_limit_too(tmp_path: Path) -> None:
    _member_of(tmp_path, "0::/a")
    _group(
        tmp_path / "cgroup" / "a", memory__max="max", memory__high=4 * GIB, memory__current=5 * GIB
    )
    assert _measure(tmp_path).free_bytes == 0


def test_limits_of_the_older_kind_count(tmp_path: Path) -> None:
    """In a container the path is the host's, and what is mounted is our own group."""
    _member_of(tmp_path, "12:cpu,cpuacct:/docker/9f\n4:memory:/docker/9f\n1:name=systemd:/x\n0::/y")
    _group(
        tmp_path / "cgroup" / "memory", memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB, memory__stat=FIGURES_V1,
    )  # fmt: skip
    reading = _measure(tmp_path)
    assert (reading.total_bytes, reading.free_bytes) == (4 * GIB, 2 * GIB)


def test_no_limit_of_the_older_kind_is_a_huge_number(tmp_path: Path) -> None:
    _member_of(tmp_path, "4:memory:/")
    _group(
        tmp_path / "cgroup" / "memory", memory__limit_in_bytes=9223372036854771712,
        memory__usage_in_bytes=60 * GIB, memory__stat=FIGURES_V1,
    )  # fmt: skip
    reading = _measure(tmp_path)
    assert (reading.total_bytes, reading.free_bytes) == (64 * GIB, 50 * GIB)


@pytest.mark.parametrize("path", ["/../../x", "/gone/deeper", "", "/a:b"])
def test_a_path_that_leads_elsewhere_leaves_the_root(tmp_path: Path, path: str) -> None:
    _member_of(tmp_path, f"0::{path}")
    _group(tmp_path / "cgroup", memory__max=4 * GIB, memory__current=GIB)
    _group(tmp_path, memory__max=GIB, memory__current=GIB)
    assert _measure(tmp_path).free_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("limit", "usage"), [("many", "1"), (str(GIB), "?"), (str(GIB), None)], ids=str
)
def test_a_limit_that_makes_no_sense_is_unreadable(
    tmp_path: Path, limit: str, usage: str | None
) -> None:
    """It is there, so that what the whole host has free is not ours."""
    _member_of(tmp_path, "0::/a")
    _group(tmp_path / "cgroup" / "a", memory__max=limit)
    if usage is not None:
        _group(tmp_path / "cgroup" / "a", memory__current=usage)
    with pytest.raises(Unreadable, match=r"a/memory\.max"):
        _measure(tmp_path)


def test_a_limit_that_may_not_be_read_is_unreadable(tmp_path: Path) -> None:
    _member_of(tmp_path, "0::/")
    (tmp_path / "cgroup" / "memory.max").mkdir(parents=True)
    with pytest.raises(Unreadable, match=r"memory\.max"):
        _measure(tmp_path)


# --- Apple ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "recommended", "wired_mb", "limit"),
    [
        (32 * GIB, 22906503168, 0, 22906503168),
        (32 * GIB, 22906503168, 30000, 22906503168),
        (32 * GIB, None, 28672, 28 * GIB),
        (32 * GIB, None, 99999, 32 * GIB),
        (32 * GIB, None, 0, int(32 * GIB * 0.70)),
        (32 * GIB, None, None, int(32 * GIB * 0.70)),
        (64 * GIB, None, None, int(64 * GIB * 0.80)),
        (192 * GIB, 0, 0, int(192 * GIB * 0.80)),
    ],
)
def test_an_apple_device_may_have_what_the_best_source_says(
    memory: int, recommended: int | None, wired_mb: int | None, limit: int
) -> None:
    """Metal's word, which follows what the user has set; that; or a part of the memory."""
    found = metal.limit_bytes(memory, recommended=recommended, wired_limit_mb=wired_mb)
    assert found == limit


@pytest.mark.parametrize(
    ("text", "number"),
    [("49152\n", 49152), ("iogpu.wired_limit_mb: 0\n", 0), ("", None), ("unknown oid", None)],
)
def test_a_setting_of_macos_is_a_number_or_not_there(text: str, number: int | None) -> None:
    assert metal.parse_number(text) == number


def test_an_apple_process_holds_its_footprint_or_what_is_resident() -> None:
    """uuid; times, wake-ups, page-ins, wired; resident, footprint; start, end."""
    figures = [1, 2, 3, 4, 5, 6, 700, 800, 9, 10]
    assert metal.parse_usage(struct.pack("=16s10Q", b"", *figures) + bytes(9)) == 800
    figures[6] = 900
    assert metal.parse_usage(struct.pack("=16s10Q", b"", *figures)) == 900


def test_an_apple_device_has_free_what_ours_leave_and_the_host_has() -> None:
    assert metal.reading("Apple M3", 20 * GIB, {1: 5 * GIB}, 30 * GIB).free_bytes == 15 * GIB
    assert metal.reading("Apple M3", 20 * GIB, {1: 5 * GIB}, 9 * GIB).free_bytes == 9 * GIB
    assert metal.reading("Apple M3", 20 * GIB, {1: 25 * GIB}, 9 * GIB).free_bytes == 0


def test_the_lower_of_two_limits_of_an_apple_device_counts() -> None:
    one = metal.reading("Apple M3", 20 * GIB, {1: 5 * GIB}, 30 * GIB)
    lower = metal.match([Device("MTL0", 18 * GIB, 18 * GIB, "Apple M3")], [one])["MTL0"]
    assert (lower.total_bytes, lower.free_bytes) == (18 * GIB, 13 * GIB)
    assert metal.match([Device("MTL0", 22 * GIB, 22 * GIB, "Apple M3")], [one])["MTL0"] is one
    assert metal.match([Device("Metal", 0, 0)], [one])["Metal"] is one
    assert metal.match([Device("MTL0", 22 * GIB, 22 * GIB)], []) == {}


@pytest.mark.skipif("sys.platform == 'darwin'")
def test_elsewhere_there_are_no_apple_devices_and_no_error() -> None:
    assert metal.read([1]) == ()


# --- all together --------------------------------------------------------------------------------

CARD = Reading("NVIDIA L4", 24 * GIB, 20 * GIB, {10: GIB, 11: GIB, 12: GIB})
HOST = Reading("host memory", 64 * GIB, 50 * GIB, {10: 3 * GIB})
DEVICES = (
    Device("CUDA0", 24 * GIB, 24 * GIB, "NVIDIA L4"),
    Device("Vulkan1", 16 * GIB, 16 * GIB, "Intel(R) Arc(tm) A770"),
    Device("RPC0", 8 * GIB, 8 * GIB, "nvidia-box:50052"),
    Device("CPU", 64 * GIB, 64 * GIB, "host memory"),
)


class _Asked:
    """An engine that counts how often it is asked."""

    def __init__(self, *found: Device, error: Exception | None = None) -> None:
        self.times, self._found, self._error = 0, found, error

    def __call__(self) -> Sequence[Device]:
        self.times += 1
        if self._error is not None:
            raise self._error
        return self._found


def _driver(*readings: Reading, error: Exception | None = None, name: str = "NVIDIA") -> Driver:
    def read(_: Iterable[int]) -> Sequence[Reading]:
        if error is not None:
            raise error
        return readings

    return Driver(name, re.compile(name, re.IGNORECASE), read)


def _read_all(
    engine: _Asked,
    driver: Driver,
    *more: Driver,
    devices: Sequence[Device] = DEVICES,
    host: Reading | Exception = HOST,
) -> dict[str, DeviceReading]:
    def measured(_: Iterable[int]) -> Reading:
        if isinstance(host, Exception):
            raise host
        return host

    found = drivers.read_all(
        devices, {"fast": iter([10, 11]), "idle": [99], "big": [12]}, engine,
        drivers=(driver, *more), host=measured,
    )  # fmt: skip
    assert [one.name for one in found] == [one.name for one in devices]
    return {one.name: one for one in found}


def test_each_device_is_read_by_who_knows_it_best() -> None:
    """The driver, with what each program holds; the engine for the rest, asked once; the host."""
    engine = _Asked(
        Device("CUDA0", 24 * GIB, 1, "NVIDIA L4"),
        Device("Vulkan1", 16 * GIB, 15 * GIB, "Intel(R) Arc(tm) A770"),
        Device("RPC0", 8 * GIB, 7 * GIB, "nvidia-box:50052"),
    )
    found = _read_all(engine, _driver(CARD))
    held = (("fast", 2 * GIB), ("big", GIB))
    assert found["CUDA0"] == DeviceReading("CUDA0", 24 * GIB, 20 * GIB, held)
    assert found["Vulkan1"] == DeviceReading("Vulkan1", 16 * GIB, 15 * GIB)
    assert found["RPC0"] == DeviceReading("RPC0", 8 * GIB, 7 * GIB)
    assert found["CPU"] == DeviceReading("CPU", 64 * GIB, 50 * GIB, (("fast", 3 * GIB),))
    assert engine.times == 1


def test_the_engine_is_not_asked_where_drivers_tell_all() -> None:
    engine = _Asked()
    found = _read_all(engine, _driver(CARD), devices=(DEVICES[0], DEVICES[3]))
    assert found["CUDA0"].free_bytes == 20 * GIB
    assert engine.times == 0


@pytest.mark.parametrize(
    "error", [Unreadable("NVML: GPU is lost\n  \x1b[31mreally"), RuntimeError("odd"), KeyError()]
)
def test_a_driver_that_fails_costs_its_own_devices_only(error: Exception) -> None:
    """And nobody else is asked in its place: that memory is free, nobody guesses."""
    engine = _Asked(*DEVICES)
    found = _read_all(engine, _driver(error=error), _driver(name="AMD"))
    assert found["CUDA0"].free_bytes is None
    assert found["CUDA0"].problem.startswith("the NVIDIA driver does not answer: ")
    assert found["CUDA0"].problem.isprintable()
    for name in ("Vulkan1", "RPC0", "CPU"):
        assert found[name].free_bytes is not None
        assert found[name].problem == ""


def test_a_driver_that_is_not_sure_leaves_the_device_to_the_engine() -> None:
    engine = _Asked(*DEVICES)
    assert _read_all(engine, _driver(CARD, CARD))["CUDA0"].free_bytes == 24 * GIB
    assert engine.times == 1


def test_an_engine_that_fails_costs_what_no_driver_covers() -> None:
    engine = _Asked(error=OSError("no answer in 5 s"))
    found = _read_all(engine, _driver(CARD))
    assert found["CUDA0"].free_bytes == 20 * GIB
    assert found["CPU"].free_bytes == 50 * GIB
    for name in ("Vulkan1", "RPC0"):
        assert found[name].free_bytes is None
        assert found[name].problem == "the engine does not tell of it: no answer in 5 s"
    assert engine.times == 1


def test_a_device_that_the_engine_no_longer_lists_is_unknown() -> None:
    found = _read_all(_Asked(DEVICES[1]), _driver(CARD))
    assert found["Vulkan1"].free_bytes == 16 * GIB
    assert found["RPC0"].free_bytes is None
    assert found["RPC0"].problem == "the engine does not list RPC0 (nvidia-box:50052) now"


def test_another_device_under_the_same_name_is_not_taken_for_it() -> None:
    """Where one remote device is gone, the next one gets its number."""
    other = Device("RPC0", 80 * GIB, 80 * GIB, "other-box:50052")
    assert _read_all(_Asked(DEVICES[1], other), _driver(CARD))["RPC0"].free_bytes is None


def test_a_remote_device_is_of_no_driver_here_whatever_its_address_says() -> None:
    found = _read_all(_Asked(*DEVICES), _driver(error=Unreadable("gone")))
    assert found["RPC0"].free_bytes == 8 * GIB


def test_a_host_that_cannot_be_read_has_nothing_known_to_be_free() -> None:
    found = _read_all(_Asked(*DEVICES), _driver(CARD), host=Unreadable("memory.max: ?"))
    assert found["CPU"] == DeviceReading(
        "CPU", 64 * GIB, None, problem="host memory cannot be read: memory.max: ?"
    )
    assert found["CUDA0"].free_bytes == 20 * GIB


@pytest.mark.parametrize(
    ("name", "description", "driver"),
    [
        ("CUDA0", "NVIDIA GeForce RTX 4090", "NVIDIA"), ("Vulkan0", "NVIDIA L4", "NVIDIA"),
        ("Vulkan0", "Quadro P4000", "NVIDIA"), ("ROCm0", "Radeon RX 7900 XTX", "AMD"),
        ("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", "AMD"), ("MTL0", "Apple M3", "Metal"),
        ("Metal", "Apple M1 Max", "Metal"), ("SYCL0", "Intel(R) Arc(TM) A770 Graphics", None),
        ("Vulkan0", "llvmpipe (LLVM 15.0.7, 256 bits)", None), ("RPC0", "nvidia:50052", None),
    ],
)  # fmt: skip
def test_each_device_is_of_one_driver_at_most(
    name: str, description: str, driver: str | None
) -> None:
    covering = [one.name for one in drivers.DRIVERS if one.covers(Device(name, 0, 0, description))]
    assert covering == ([driver] if driver else [])


def test_the_host_of_this_machine_is_read_with_ourselves_on_it() -> None:
    own = psutil.Process().pid
    (found,) = drivers.read_all([DEVICES[3]], {"us": [own], "gone": [2**22 + 1]}, _Asked())
    assert found.free_bytes
    assert [name for name, _ in found.held_bytes] == ["us"]
