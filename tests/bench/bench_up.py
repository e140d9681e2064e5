"""`synapse up` against the same llama-servers started by a shell loop: at once, and one by one.

All start the very same command lines on the same files, in turn in one run; the time is from the
command to the last /health 200, and for ours also from the first start of a server: what comes
before that is supervisord's own start and discovery. Run: python -m tests.bench.bench_up
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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

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


def _by_shell(commands: list[list[str]], *, one_by_one: bool = False) -> float:
    begun = time.monotonic()
    servers = []
    try:
        for command in commands:
            servers.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            if one_by_one:
                _await_ready(_ports([command]))
        _await_ready(_ports(commands))
        return time.monotonic() - begun
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=30)


@dataclass(frozen=True)
class _Times:
    """Seconds until all servers answer."""

    at_once: float  # by the shell
    one_by_one: float
    answered: float  # since `synapse up`
    since_first_start: float  # of a server by it
    done: float  # since `synapse up`, until it says so itself


def _first_start(ports: list[int]) -> float:
    """When the first of these servers, or of their launchers, began."""
    words = {str(port) for port in ports}
    begun = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = process.info["cmdline"] or []
        if any(flag == "--port" and port in words for flag, port in pairwise(line)):
            begun.append(process.info["create_time"])
    return float(min(begun))


def _by_synapse(root: Path, commands: list[list[str]]) -> tuple[float, float, float]:
    """Seconds until the servers answer, the same since the first start, and until it says so."""
    begun = time.monotonic()
    up = subprocess.Popen(
        [_SYNAPSE, "--prefix", root / "p", "up", "--detach"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _await_ready(_ports(commands))
        answered = time.monotonic() - begun
        since_first = time.time() - _first_start(_ports(commands))
        if up.wait(timeout=_BOUND_SECONDS) != 0:
            raise RuntimeError("synapse up failed")
        return answered, since_first, time.monotonic() - begun
    finally:
        subprocess.run(
            [_SYNAPSE, "--prefix", root / "p", "down"], check=True, stderr=subprocess.DEVNULL
        )


def _compare(model: Path) -> _Times:
    """Medians."""
    root = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    try:
        commands = _prepare(root, model)
        _by_shell(commands)  # all find the files in the page cache
        rounds = [
            (
                _by_shell(commands), _by_shell(commands, one_by_one=True),
                *_by_synapse(root, commands),
            )
            for _ in range(_ROUNDS)
        ]  # fmt: skip
        return _Times(*map(statistics.median, zip(*rounds, strict=True)))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run() -> bool:
    """Whether both goals were met."""
    os.umask(0o077)
    model = servable(engines.find("auto"))
    took = _compare(model)
    met = show(
        f"synapse up, {_MODELS} copies of the 270M model ({model.name})",
        [
            *_seconds(took),
            Figure("ratio, all ready", took.answered / took.at_once, "x", 1.3),
            Figure("the same since its first start", took.since_first_start / took.at_once,
                   "x", 1.15),
            Figure("gain over one after another", took.one_by_one / took.since_first_start, "x"),
        ],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        took = _compare(generate(Path(folder)))
    return met & show(
        f"synapse up, {_MODELS} tiny models",
        [
            *_seconds(took),
            Figure("longer than the shell loop by", took.answered - took.at_once, "s", 2.5),
        ],
    )


def _seconds(took: _Times) -> list[Figure]:
    return [
        Figure("shell loop, all ready", took.at_once, "s"),
        Figure("one after another, all ready", took.one_by_one, "s"),
        Figure("synapse up, all ready", took.answered, "s"),
        Figure("synapse up, command done", took.done, "s"),
    ]


if __name__ == "__main__":
    sys.exit(not run())
