"""The whole life of models on a real NVIDIA GPU, as a report; for a host without a network too.

Needs a llama-server that sees the GPU, this checkout with its requirements, nvidia-ml-py, numpy,
and the console scripts beside the Python that runs it. Models are generated. Nothing outside a
temporary folder is written, and every process is ended.

Run: python -m tests.gpu.cycle [REPORT.md]
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pynvml

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.supervisord import Supervisord
from tests.gguf_factory import write_model
from tests.integration.harness import Deployment, answers, chat, deployed, wait_until
from tests.ports import free_ports

MIB = 1024 * 1024
LARGE: dict[str, Any] = {
    "layers": 16, "embedding": 1024, "heads": 16, "heads_kv": 8, "feed_forward": 4096,
    "vocabulary": 30_000, "context": 32768,
}  # fmt: skip
LEARNED_WITHIN = 0.02
OR_MIB = 100
SWAPS = 50
_BOUND_SECONDS = 90.0


class Report:
    """Lines for a person; and whether all that was promised was seen."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def check(self, what: str, *, holds: bool) -> None:
        self.say(f"- {'yes' if holds else '**NO**'}: {what}")
        if not holds:
            self.failed.append(what)


class Gpu:
    """The first GPU, by NVML."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.driver = str(pynvml.nvmlSystemGetDriverVersion())

    @property
    def used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    @property
    def free(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)


def mib(size: int | None) -> str:
    return "?" if size is None else f"{size / MIB:.0f} MiB"


def device_of(deployment: Deployment) -> str:
    found = [one["name"] for one in deployment.plan()["devices"] if one["name"] != "CPU"]
    if not found:
        sys.exit("llama-server sees no device")
    return str(found[0])


def settled(deployment: Deployment, **phases: str) -> dict[str, Any]:
    def reached() -> dict[str, Any]:
        rows = deployment.rows()
        is_there = all(name in rows and rows[name]["phase"] == p for name, p in phases.items())
        return rows if is_there else {}

    return wait_until(reached, _BOUND_SECONDS, f"{phases}; {deployment.rows()}")


# --- estimates -----------------------------------------------------------------------------------

CASES = {
    "4k": "context = 4096\nparallel = 1\ngpu_layers = 99\n",
    "32k": "context = 32768\nparallel = 1\ngpu_layers = 99\n",
    "32k-q8": "context = 32768\nparallel = 1\ngpu_layers = 99\n"
    "args = --cache-type-k q8_0 --cache-type-v q8_0\n",
    "half": "context = 4096\nparallel = 1\ngpu_layers = 8\n",
    "host": "context = 4096\nparallel = 1\ngpu_layers = 0\n",
}


def estimates(report: Report, gpu: Gpu, source: Path) -> None:
    report.say("\n## Estimates, one model after the other, against NVML's figure of the process\n")
    report.say("| model | header | asked | NVML | after one load |")
    report.say("|---|---|---|---|---|")
    sections = "".join(f"[model:{name}]\n{text}" for name, text in CASES.items())
    settings = f"enable = {{}}\nmemory_reserve = {{}}\nmodel_dirs = {source}\n{sections}"
    asked = word_of_the_engine(settings, gpu)
    with deployed(settings.format("none", 0)) as at:
        at.synapse("up", "--detach", expect=None)
        name_of_device = device_of(at)
        planned = {one["name"]: one["memory"] for one in at.plan()["models"]}
        errors, errors_of_asking = [], []
        for name in CASES:
            before = gpu.used
            at.ctl("enable", name)
            row = settled(at, **{name: "ready"})[name]
            chat(row)
            held = gpu.used - before
            there = learned_of(at, name, name_of_device, held)
            first = planned[name]["devices"].get(name_of_device, 0)
            told = asked[name].get(name_of_device, 0)
            report.say(f"| {name} | {mib(first)} | {mib(told)} | {mib(held)} | {mib(there)} |")
            if CASES[name].find("gpu_layers = 0") < 0:
                errors.append((name, abs(there - held), held, first))
                errors_of_asking.append((abs(told - held), held))
            at.ctl("disable", name)
            settled(at, **{name: "disabled"})
            wait_until(lambda before=before: gpu.used <= before + MIB, 15, "memory back")  # type: ignore[misc]
        report.say()
        report.check(
            "after one load each figure is within 2 % or 100 MiB of NVML's",
            holds=all(
                off <= max(LEARNED_WITHIN * held, OR_MIB * MIB) for _, off, held, _ in errors
            ),
        )
        report.check(
            "the engine's word, asked without loading, is within 2 % or 100 MiB of NVML's",
            holds=all(
                off <= max(LEARNED_WITHIN * held, OR_MIB * MIB) for off, held in errors_of_asking
            ),
        )
        report.check(
            "no figure from the header is under NVML's by more than 6 %",
            holds=all(first >= held * 0.94 - 4 * MIB for _, _, held, first in errors),
        )


def learned_of(at: Deployment, name: str, device: str, held: int) -> int:
    """What is learned of a run, once it is as much as it holds, or after a while."""

    def learned() -> int:
        (found,) = [one["memory"] for one in at.plan()["models"] if one["name"] == name]
        return int(found["devices"].get(device, 0)) if found["source"] == "learned" else 0

    with contextlib.suppress(AssertionError):
        wait_until(lambda: learned() >= held * (1 - LEARNED_WITHIN), 12)
    return learned()


def word_of_the_engine(settings: str, gpu: Gpu) -> dict[str, dict[str, int]]:
    """By model and device: with next to no room left, all is in doubt, and it is asked."""
    with deployed(settings.format("all", gpu.free - 512 * MIB)) as at:
        at.synapse("init")
        memory = {one["name"]: one["memory"] for one in at.plan()["models"]}
        return {
            name: figures["devices"] if figures["source"] == "dry-run" else {}
            for name, figures in memory.items()
        }


# --- a budget ------------------------------------------------------------------------------------


def budget(report: Report, gpu: Gpu, source: Path) -> None:
    report.say("\n## Four models, room for two, a hog beside them\n")
    names = ("4k", "32k", "32k-q8", "half")
    settings = "enable = none\nmax_parallel = 4\nwhen_full = wait\nmemory_reserve = {reserve}\n"
    same = "[model:*]\ncontext = 8192\nparallel = 1\ngpu_layers = 99\nenabled = true\n"
    head = f"model_dirs = {source}\n"
    with deployed(settings.format(reserve=0) + head + same) as at:
        at.synapse("init")
        name_of_device = device_of(at)
        need = max(one["memory"]["devices"][name_of_device] for one in at.plan()["models"])
        need = int(need * 1.06) + 4 * MIB
        reserve = gpu.free - int(2.5 * need)
        at.configure(settings.format(reserve=reserve) + head + same)
        base = gpu.used
        begun = time.monotonic()
        at.synapse("up", "--detach", expect=None)
        rows = wait_until(lambda: _two_ready(at.rows()), _BOUND_SECONDS, "two ready")
        took = time.monotonic() - begun
        ready = [name for name in names if rows[name]["phase"] == "ready"]
        deferred = [name for name in rows if rows[name]["phase"] == "deferred"]
        report.say(f"Ready after {took:.1f} s: {', '.join(ready)}. {mib(gpu.used - base)} taken.")
        for name in deferred:
            report.say(f"Deferred: {name}: {rows[name]['reason']}")
        report.check("two serve", holds=len(ready) == 2 and all(chat(rows[n]) for n in ready))
        report.check(
            "the budget is kept", holds=gpu.used - base <= int(2.5 * need) and len(deferred) == 3
        )
        with hog(source / "4k.gguf", context=65536) as taken:
            at.ctl("stop", ready[0])
            wait_until(lambda: at.rows()[ready[0]]["phase"] == "stopped", 30, "stopped")
            report.say(f"A stranger took {mib(taken(gpu))}.")
            still = wait_until(
                lambda: all(at.rows()[name]["phase"] == "deferred" for name in deferred), 10, "kept"
            )
            report.check("nobody starts into memory that a stranger took", holds=bool(still))
        wait_until(
            lambda: any(at.rows()[name]["phase"] == "ready" for name in deferred), 60, "the next"
        )
        report.check("the next one comes up by itself when the stranger is gone", holds=True)
        said = "out-of-memory"
        report.check(
            "nothing ran out of memory", holds=all(s["class"] != said for s in at.history())
        )


def _two_ready(rows: dict[str, Any]) -> dict[str, Any]:
    phases = [row["phase"] for row in rows.values()]
    is_settled = phases.count("ready") == 2 and phases.count("deferred") == len(phases) - 2
    return rows if is_settled and rows else {}


@contextlib.contextmanager
def hog(file: Path, context: int) -> Iterator[Callable[[Gpu], int]]:
    """A llama-server of somebody else's."""
    port = free_ports(1)
    gpu = Gpu()
    before = gpu.used
    words = [
        engines.locate("auto"), "--model", str(file), "--port", str(port),
        "--ctx-size", str(context), "--gpu-layers", "99", "--parallel", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60, "the stranger")
            yield lambda gpu: gpu.used - before
        finally:
            process.kill()
            process.wait()


# --- out of memory, ends, swaps ------------------------------------------------------------------


def ladder(report: Report, gpu: Gpu, source: Path) -> None:
    report.say("\n## Too little memory: the ladder\n")
    settings = "enable = none\nwhen_full = degrade\nclimb_after_seconds = 2\nmemory_reserve = {}\n"
    one = f"model_dirs = {source}\n[model:32k]\nenabled = true\nparallel = 1\n"
    with deployed(settings.format(0) + one) as at:
        at.synapse("init")
        name_of_device = device_of(at)
        (model,) = [m for m in at.plan()["models"] if m["name"] == "32k"]
        at.discover()
        with hog(source / "4k.gguf", context=131072):
            top = model["memory"]["devices"][name_of_device]
            at.configure(settings.format(gpu.free - top * 2 // 3) + one)
            at.discover()
            at.start_supervisord()
            row = settled(at, **{"32k": "ready"})["32k"]
            report.say(f"Beside the hog: context {row['context']}: {row['reason']}")
            report.check("it serves on a lower rung", holds=bool(chat(row)))


class Stranger:
    """A process's worth of GPU memory in someone else's hands, taken in an instant (libcuda)."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxSetCurrent", self._context)
        self._taken: list[ctypes.c_uint64] = []

    def take(self, size: int) -> None:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self._taken.append(pointer)

    def give_back(self) -> None:
        while self._taken:
            self._call("cuMemFree_v2", self._taken.pop())

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise OSError(f"{name} failed with status {status}")


def out_of_memory(report: Report, gpu: Gpu, source: Path) -> None:
    """A stranger takes what was free when the model was admitted, while it loads."""
    report.say("\n## Out of memory as it loads: the ladder\n")
    settings = (
        "enable = none\nwhen_full = degrade\nclimb_after_seconds = 2\nmemory_reserve = 0\n"
        f"model_dirs = {source}\n[model:32k]\nenabled = true\nparallel = 1\n"
    )
    stranger = Stranger()
    with deployed(settings) as at:
        at.synapse("init")
        name_of_device = device_of(at)
        (model,) = [m for m in at.plan()["models"] if m["name"] == "32k"]
        top = model["memory"]["devices"][name_of_device]
        at.discover()
        stranger.take(gpu.free - 2 * top)
        at.start_supervisord()
        wait_until(lambda: at.rows().get("32k", {}).get("pid"), _BOUND_SECONDS, "its start")
        stranger.take(gpu.free - top * 3 // 4)
        row = settled(at, **{"32k": "ready"})["32k"]
        failed = [step for step in at.steps("32k") if step["class"] == "out-of-memory"]
        for step in failed:
            report.say(f"{step['from']} -> {step['to']}: {step['reason']}: `{step['evidence']}`")
        report.say(f"Then: context {row['context']}: {row['reason']}")
        report.check("the driver refused, and that was seen as it is", holds=bool(failed))
        report.check(
            "it serves on a lower rung",
            holds=row["context"] < model["context"] and bool(chat(row)),
        )
        stranger.give_back()
        top_again = wait_until(
            lambda: (now := at.rows()["32k"])["phase"] == "ready"
            and now["context"] == model["context"],
            _BOUND_SECONDS, "back on the top",
        )  # fmt: skip
        report.check("when the stranger is gone it climbs back", holds=bool(top_again))


def ends(report: Report, gpu: Gpu, source: Path) -> None:
    report.say("\n## After TERM, after KILL, after swaps\n")
    settings = f"enable = none\nmemory_reserve = 0\nmodel_dirs = {source}\n"
    every = "[model:*]\ncontext = 4096\nparallel = 1\ngpu_layers = 99\n[model:4k]\nenabled = true\n"
    base = gpu.used
    with deployed(settings + every) as at:
        at.synapse("up", "--detach", expect=None)
        settled(at, **{"4k": "ready"})
        full = gpu.used - base
        at.ctl("stop", "4k")
        settled(at, **{"4k": "stopped"})
        report.check(f"TERM gives back {mib(full)}: {mib(gpu.used - base)} left",
                     holds=gpu.used - base <= MIB)  # fmt: skip
        at.ctl("start", "4k")
        row = settled(at, **{"4k": "ready"})["4k"]
        killed = time.time()
        for server in psutil.Process(row["pid"]).children():
            server.kill()
        at.wait_for_step("4k", killed, 30, to="ready")
        report.check("after KILL it is ready again", holds=at.rows()["4k"]["pid"] != row["pid"])
        report.check(
            f"and holds what it held: {mib(gpu.used - base)}",
            holds=abs(gpu.used - base - full) <= 8 * MIB,
        )
        rpc = Supervisord(at.prefix / "var" / "run" / "supervisor.sock")
        took = []
        pair = ("4k", "half")
        for number in range(SWAPS):
            begun = time.monotonic()
            old, new = pair[number % 2], pair[(number + 1) % 2]
            command = rpc.call("synapse.swap", old, new)
            wait_until(lambda command=command: rpc.call("synapse.result", command), 60, "swapped")  # type: ignore[misc]
            took.append(time.monotonic() - begun)
        report.say(f"{SWAPS} swaps, {statistics.median(took):.2f} s each (median).")
        report.check(
            f"after them {mib(gpu.used - base)} are held, as before",
            holds=abs(gpu.used - base - full) <= 8 * MIB,
        )
        at.synapse("down")
    with contextlib.suppress(AssertionError):
        wait_until(lambda: gpu.used <= base, 10)
    left = gpu.used - base
    report.check(f"after all {mib(left)} are left over the baseline", holds=left <= MIB)


def main() -> int:
    os.umask(0o077)
    report, gpu = Report(), Gpu()
    engine = engines.find("auto")
    report.say("# A run on a GPU\n")
    report.say(f"{gpu.name}, driver {gpu.driver}; llama-server {engine.version}.")
    with deployed() as scratch:
        source = scratch.root / "gpu-models"
        source.mkdir()
        for seed, name in enumerate(CASES):
            write_model(source / f"{name}.gguf", seed=seed, **LARGE)
        size = (source / "4k.gguf").stat().st_size
        report.say(f"Generated models of {mib(size)} (F16, 16 layers, width 1024).")
        for part in (estimates, budget, ladder, out_of_memory, ends):
            try:
                part(report, gpu, source)
            except (AssertionError, LookupError, OSError) as error:
                report.check(f"{part.__name__} ended early: {str(error)[:1500]}", holds=False)
    report.say()
    report.say(f"Not seen: {'; '.join(report.failed)}" if report.failed else "All was seen.")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(report.lines) + "\n")
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
