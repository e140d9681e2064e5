"""A swap (the old model idle), from asking to the new one answering; three ways in one run.

*bare*: the old server is sent TERM and waited for, the new one is started by hand and polled.
*router*: llama-server's own router (`--models-dir --models-max 1`), asked for the other model.
*ours*: `synapse.swap` over XML-RPC, once with room for both and once without.
Also what a stop takes from the asking until it is verified, beside TERM to exit.
Run: python -m tests.bench.bench_swap
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.demo_model import generate
from supervisor_synapse.adapters.supervisord import Supervisord
from tests.bench.table import Figure, show
from tests.integration.harness import Deployment, answers, ask, deployed
from tests.ports import free_ports
from tests.real_model import servable

_ROUNDS = 5
_BOUND_SECONDS = 120.0
_NAMES = ("one", "two")
_QUESTION = {"prompt": "a", "max_tokens": 1}


def _until(reached: Callable[[], object]) -> float:
    begun = time.monotonic()
    while not reached():
        if time.monotonic() - begun > _BOUND_SECONDS:
            raise RuntimeError("not reached")
        time.sleep(0.005)
    return time.monotonic() - begun


# --- bare ----------------------------------------------------------------------------------------


def _start(file: Path, port: int) -> subprocess.Popen[bytes]:
    engine = engines.find("auto")
    command = [
        engine.path, "--model", file, "--host", "127.0.0.1", "--port", str(port),
        "--ctx-size", "2048", "--parallel", "4", "--kv-unified",
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _bare(folder: Path) -> tuple[float, float]:
    """Medians: stop + start + ready, and the stop alone."""
    swaps, stops = [], []
    ports = [free_ports(1), free_ports(1)]
    server = _start(folder / "one.gguf", ports[0])
    _until(lambda: answers(f"http://127.0.0.1:{ports[0]}/health"))
    for number in range(1, _ROUNDS + 1):
        name, port = _NAMES[number % 2], ports[number % 2]
        begun = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        stops.append(time.monotonic() - begun)
        server = _start(folder / f"{name}.gguf", port)
        health = f"http://127.0.0.1:{port}/health"
        _until(lambda health=health: answers(health))  # type: ignore[misc]
        ask(f"http://127.0.0.1:{port}/v1/completions", _QUESTION)
        swaps.append(time.monotonic() - begun)
    server.kill()
    server.wait()
    return statistics.median(swaps), statistics.median(stops)


# --- the router ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _router(folder: Path) -> Iterator[str]:
    engine, port = engines.find("auto"), free_ports(1)
    command = [
        engine.path, "--models-dir", folder, "--models-max", "1", "--host", "127.0.0.1",
        "--port", str(port), "--ctx-size", "2048", "--parallel", "4",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as router:  # fmt: skip
        try:
            _until(lambda: answers(f"http://127.0.0.1:{port}/health"))
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            os.killpg(router.pid, signal.SIGKILL)


def _by_router(folder: Path) -> float:
    swaps = []
    with _router(folder) as url:
        ask(url, {**_QUESTION, "model": "one"})
        for number in range(1, _ROUNDS + 1):
            begun = time.monotonic()
            ask(url, {**_QUESTION, "model": _NAMES[number % 2]})
            swaps.append(time.monotonic() - begun)
    return statistics.median(swaps)


# --- ours ----------------------------------------------------------------------------------------


def _deploy(deployment: Deployment, folder: Path, *, together: bool) -> None:
    settings = (
        "model_dirs = {folder}\nenable = none\nmemory_reserve = {reserve}\n"
        # Room for prompts is set aside, and not taken at once: so free memory that comes and goes
        # does not matter beside it.
        "[model:*]\ncontext = 2048\nparallel = 4\nargs = --cache-ram 1024\n"
        "[model:one]\nenabled = true"
    )
    deployment.configure(settings.format(folder=folder, reserve=0))
    if not together:  # room for one, and half of another: the old one must go first
        deployment.synapse("init")
        need = max(model["memory"]["estimated"] for model in deployment.plan()["models"])
        reserve = psutil.virtual_memory().available - need * 3 // 2
        deployment.configure(settings.format(folder=folder, reserve=reserve))
    deployment.synapse("up", "--detach")


def _by_us(folder: Path, *, together: bool) -> tuple[float, float]:
    """Medians: asking to answering, and asking for a stop until it is verified."""
    swaps = []
    with deployed() as deployment:
        _deploy(deployment, folder, together=together)
        urls = {name: model["url"] for name, model in deployment.models().items()}
        rpc = Supervisord(deployment.prefix / "var" / "run" / "supervisor.sock")
        for number in range(1, _ROUNDS + 1):
            old, new = _NAMES[(number - 1) % 2], _NAMES[number % 2]
            swaps.append(_swap(rpc, old, new, urls[new]))
        last = _NAMES[_ROUNDS % 2]
        stops = [_stop(rpc, last) for _ in range(_ROUNDS)]
    return statistics.median(swaps), statistics.median(stops)


def _swap(rpc: Supervisord, old: str, new: str, url: str) -> float:
    begun = time.monotonic()
    command = rpc.call("synapse.swap", old, new)
    _until(lambda: answers(f"{url}/health"))
    ask(f"{url}/v1/completions", _QUESTION)
    seconds = time.monotonic() - begun
    _until(lambda: rpc.call("synapse.result", command))
    return seconds


def _stop(rpc: Supervisord, name: str) -> float:
    begun = time.monotonic()
    rpc.stop(name)
    _until(lambda: _phase(rpc, name) in ("stopped", "disabled"))
    seconds = time.monotonic() - begun
    rpc.start(name)
    _until(lambda: _phase(rpc, name) == "ready")
    return seconds


def _phase(rpc: Supervisord, name: str) -> str:
    snapshot = rpc.snapshot()
    rows = snapshot.models if snapshot else ()
    return next((row.phase.value for row in rows if row.name == name), "")


def _compare(title: str, model: Path, goal: Callable[[float, float], Figure]) -> bool:
    with tempfile.TemporaryDirectory(prefix="syn") as name:
        folder = Path(name)
        for copy in _NAMES:
            shutil.copyfile(model, folder / f"{copy}.gguf")
        bare, bare_stop = _bare(folder)
        router = _by_router(folder)
        both, verified = _by_us(folder, together=True)
        after, _ = _by_us(folder, together=False)
    return show(
        title,
        [
            Figure("bare stop + start + ready", bare, "s"),
            Figure("llama-server's router", router, "s"),
            Figure("ours, both fit", both, "s"),
            Figure("ours, one after the other", after, "s"),
            goal(after, bare),
            Figure("bare stop, idle", bare_stop, "s"),
            Figure("ours, verified stop, longer by", verified - bare_stop, "s", 0.3),
        ],
    )


def run() -> bool:
    """Whether the goals were met."""
    os.umask(0o077)
    model = servable(engines.find("auto"))
    met = _compare(
        f"swap of two 270M models ({model.name})", model,
        lambda ours, bare: Figure("one after the other / bare", ours / bare, "x", 1.3),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return met & _compare(
            "swap of two tiny models", generate(Path(folder)),
            lambda ours, bare: Figure("one after the other, longer by", ours - bare, "s", 0.4),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(not run())
