"""`synapse up` against the same llama-servers started at once by a shell loop.

Both start the very same command lines on the same files, one after the other in one run; the
time is from the command to the last /health 200. Run: python -m tests.bench.bench_up
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.demo_model import generate
from tests.bench.table import Figure, show
from tests.real_model import servable

_MODELS = 4
_ROUNDS = 3
_BOUND_SECONDS = 120.0
_SYNAPSE = Path(sys.executable).parent / "synapse"


def _free_range(count: int) -> int:
    """The first of `count` neighbouring ports that are all free."""
    for first in range(21000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def _prepare(root: Path, model: Path) -> list[list[str]]:
    """A deployment whose model dir holds copies of `model`; the server commands that it renders."""
    models = root / "models"
    models.mkdir()
    for number in range(_MODELS):
        shutil.copyfile(model, models / f"copy-{number}.gguf")
    subprocess.run(
        [_SYNAPSE, "--prefix", root / "p", "init"], check=True, stdout=subprocess.DEVNULL
    )
    first = _free_range(_MODELS)
    (root / "p" / "etc" / "synapse.conf").write_text(
        f"[synapse]\ncache_dirs = {root}/hub\nmodel_dirs = {models}\nenable = all\n"
        f"port_range = {first}-{first + _MODELS - 1}\n"
    )
    (root / "hub").mkdir()
    subprocess.run(
        [_SYNAPSE, "--prefix", root / "p", "discover"], check=True, stdout=subprocess.DEVNULL
    )
    plan = json.loads(
        subprocess.run(
            [_SYNAPSE, "--prefix", root / "p", "plan", "--json"], check=True, capture_output=True
        ).stdout
    )
    path = plan["engine"]["path"]
    return [[path, "--model", m["path"], *m["arguments"]] for m in plan["models"]]


def _await_ready(ports: list[int]) -> None:
    deadline = time.monotonic() + _BOUND_SECONDS
    waiting = set(ports)
    while waiting:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not ready: {waiting}")
        for port in sorted(waiting):
            try:
                url = f"http://127.0.0.1:{port}/health"
                with urllib.request.urlopen(url, timeout=1) as answer:
                    if answer.status == 200:
                        waiting.discard(port)
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.01)


def _ports(commands: list[list[str]]) -> list[int]:
    return [int(command[command.index("--port") + 1]) for command in commands]


def _by_shell(commands: list[list[str]]) -> float:
    begun = time.monotonic()
    servers = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        _await_ready(_ports(commands))
        return time.monotonic() - begun
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=30)


def _by_synapse(root: Path, commands: list[list[str]]) -> tuple[float, float]:
    """Seconds until the servers answer, and until the command itself says so."""
    begun = time.monotonic()
    up = subprocess.Popen(
        [_SYNAPSE, "--prefix", root / "p", "up", "--detach"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _await_ready(_ports(commands))
        answered = time.monotonic() - begun
        if up.wait(timeout=_BOUND_SECONDS) != 0:
            raise RuntimeError("synapse up failed")
        return answered, time.monotonic() - begun
    finally:
        subprocess.run(
            [_SYNAPSE, "--prefix", root / "p", "down"], check=True, stderr=subprocess.DEVNULL
        )


def _compare(model: Path) -> tuple[float, float, float]:
    """Medians: shell loop, synapse (servers answer), synapse (command done)."""
    root = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    try:
        commands = _prepare(root, model)
        shell, answered, done = [], [], []
        _by_shell(commands)  # both sides find the files in the page cache
        for _ in range(_ROUNDS):
            shell.append(_by_shell(commands))
            times = _by_synapse(root, commands)
            answered.append(times[0])
            done.append(times[1])
        return statistics.median(shell), statistics.median(answered), statistics.median(done)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run() -> bool:
    """Whether both goals were met."""
    os.umask(0o077)
    model = servable(engines.find("auto"))
    shell, answered, done = _compare(model)
    met = show(
        f"synapse up, {_MODELS} copies of the 270M model ({model.name})",
        [
            Figure("shell loop, all ready", shell, "s"),
            Figure("synapse up, all ready", answered, "s"),
            Figure("synapse up, command done", done, "s"),
            Figure("ratio, all ready", answered / shell, "x", 1.3),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        shell, answered, done = _compare(generate(Path(folder)))
    return met & show(
        f"synapse up, {_MODELS} tiny models",
        [
            Figure("shell loop, all ready", shell, "s"),
            Figure("synapse up, all ready", answered, "s"),
            Figure("synapse up, command done", done, "s"),
            Figure("longer than the shell loop by", answered - shell, "s", 2.5),
        ],
    )


if __name__ == "__main__":
    sys.exit(not run())
