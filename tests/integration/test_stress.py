"""Four models take each other's place again and again, one in five times under a kill -9.

Afterwards there is as much as before: of processes, zombies, listeners, descriptors, files and
memory. SYNAPSE_SWITCHES lengthens it (make stress COUNT=500); figures are printed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
import xmlrpc.client
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.integration.harness import (
    Deployment,
    TokenStream,
    chat,
    deployed,
    is_gone,
    wait_until,
)

SWITCHES = int(os.environ.get("SYNAPSE_SWITCHES", "100"))
_WARM_UP = 10
_NAMES = ("one", "two", "three", "four")
_MIB = 2**20
_SETTINGS = """
enable = none
memory_reserve = 0
[stop]
drain_seconds = 1
term_seconds = 1
[restart]
backoff_initial_seconds = 0.1
backoff_factor = 1
intensity = 1000
[model:one]
enabled = true
"""
_SHARED = Path("/dev/shm")

pytestmark = [
    pytest.mark.usefixtures("llama_server"),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="read from Linux"),
]


# --- switching -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Switcher:
    """Swaps the models, each in its turn; knows which of them is meant to serve now."""

    at: Deployment
    server: xmlrpc.client.ServerProxy
    serving: str = "one"
    turns: Iterator[str] = field(default_factory=lambda: itertools.cycle(_NAMES))
    done: int = 0
    undone: int = 0

    def switch(self, number: int) -> None:
        """One swap; every tenth has its new server killed while it loads, every tenth its old one
        while a client streams from it.
        """
        old = self.serving
        new = self._next()
        match number % 10:
            case 3:
                command = self._ask(old, new)
                self._kill(new)
            case 7:
                TokenStream(self._url(old), 8000)
                command = self._ask(old, new)
                self._kill(old)
            case _:
                command = self._ask(old, new)
        self._heed(self._answer(command), new)
        self._assert_as_intended()

    def _next(self) -> str:
        """The one whose turn it is; by then it has rested for some swaps."""
        turns = itertools.islice(self.turns, 2)
        return next(name for name in turns if name != self.serving)

    def _ask(self, old: str, new: str) -> str:
        return str(self.server.synapse.swap(old, new))

    def _answer(self, command: str) -> Any:
        answer = wait_until(lambda: self.server.synapse.result(command), 60, "an answer")
        return json.loads(str(answer))

    def _heed(self, answer: Any, new: str) -> None:
        if answer["ok"]:
            self.serving = new
            self.done += 1
        else:
            self.undone += 1

    def _kill(self, name: str) -> None:
        """The server of a model, as soon as there is one; its launcher is left alone."""
        server = wait_until(lambda: self._server(name), 20, f"a server of {name}")
        with contextlib.suppress(psutil.NoSuchProcess):
            server.kill()

    def _server(self, name: str) -> psutil.Process | None:
        info: Any = self.server.supervisor.getProcessInfo(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(info["pid"]).children() if info["pid"] else []
            return next((child for child in children if child.name() == "llama-server"), None)
        return None

    def _url(self, name: str) -> str:
        return str(self.at.rows()[name]["url"])

    def _assert_as_intended(self) -> None:
        """The one serves, the others rest: by the listener's word."""

        def as_intended() -> bool:
            phases = {name: row["phase"] for name, row in self.at.rows().items()}
            is_serving = phases.pop(self.serving, "") == "ready"
            return is_serving and set(phases.values()) <= {"disabled", "stopped"}

        wait_until(as_intended, 20, f"{self.serving} serves, the others rest: {self.at.rows()}")


# --- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a deployment holds of everything that can leak."""

    processes: int
    zombies: int
    listening: frozenset[int]
    descriptors: int  # of supervisord and the listener
    shared_memory: frozenset[str]
    temporary: frozenset[str]  # in the folder that all of it has for that
    files: frozenset[str]
    listener_mib: float  # resident
    supervisord_mib: float
    anonymous_mib: float  # of all processes


def _take_stock(deployment: Deployment) -> Inventory:
    """At rest: what is on its way out has a while to go."""
    supervisord, listener = deployment.supervisord(), deployment.listener()
    assert listener is not None
    wait_until(lambda: _count_zombies(supervisord) == 0, 5, "no zombies")
    living = [process for process in deployment.processes() if not is_gone(process)]
    return Inventory(
        processes=len(living),
        zombies=_count_zombies(supervisord),
        listening=_listening(deployment),
        descriptors=supervisord.num_fds() + listener.num_fds(),
        shared_memory=frozenset(entry.name for entry in _SHARED.iterdir()),
        temporary=frozenset(entry.name for entry in _temporary(deployment).iterdir()),
        files=frozenset(_files(deployment)),
        listener_mib=listener.memory_info().rss / _MIB,
        supervisord_mib=supervisord.memory_info().rss / _MIB,
        anonymous_mib=sum(map(_anonymous_bytes, living)) / _MIB,
    )


def _count_zombies(supervisord: psutil.Process) -> int:
    below = supervisord.children(recursive=True)
    return sum(is_gone(process) and psutil.pid_exists(process.pid) for process in below)


def _listening(deployment: Deployment) -> frozenset[int]:
    """The ports of the deployment's range on which anybody listens."""
    taken = set()
    for port in deployment.ports:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                taken.add(port)
    return frozenset(taken)


def _temporary(deployment: Deployment) -> Path:
    return deployment.root / "tmp"


def _files(deployment: Deployment) -> Iterator[str]:
    """Every file below the prefix; of logs that were rotated, only the first."""
    for path in deployment.prefix.rglob("*"):
        if not path.suffix.removeprefix(".").isdigit():
            yield str(path.relative_to(deployment.prefix))


def _anonymous_bytes(process: psutil.Process) -> int:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    line = next(line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


# --- the test ------------------------------------------------------------------------------------


@pytest.mark.timeout(120 + 5 * SWITCHES)
def test_after_many_switches_and_kills_there_is_as_much_as_before(llama_server: Engine) -> None:
    with deployed(_SETTINGS) as deployment, deployment.rpc() as server:
        _temporary(deployment).mkdir()
        deployment.extra_environment["TMPDIR"] = str(_temporary(deployment))
        deployment.add(*_NAMES, layers=4, context=8192)
        deployment.synapse("up", "--detach")
        switcher = Switcher(deployment, server)
        for number in range(_WARM_UP):
            switcher.switch(number)
        listener = deployment.listener()
        before = _settle(switcher)
        switcher.done = switcher.undone = 0
        begun = time.monotonic()
        for number in range(SWITCHES):
            switcher.switch(number)
        seconds = time.monotonic() - begun
        after = _settle(switcher)
        _print(before, after, switcher, seconds)
        assert deployment.listener() == listener, "it was neither killed nor restarted"
        _assert_no_more(before, after)


def _settle(switcher: Switcher) -> Inventory:
    """With `one` freshly switched in, and having said the same; the smallest of a few looks."""
    while switcher.serving != "one":
        switcher.switch(0)
    assert chat(switcher.at.rows()["one"])
    looks = [_take_stock(switcher.at) for _ in range(3)]
    return min(looks, key=lambda look: (look.processes, look.descriptors, look.anonymous_mib))


def _print(before: Inventory, after: Inventory, switcher: Switcher, seconds: float) -> None:
    made = switcher.done + switcher.undone
    print(f"{SWITCHES} switches in {seconds:.1f} s ({seconds / max(made, 1):.2f} s each), "
          f"{switcher.undone} of them undone after a kill")  # fmt: skip
    for one in fields(Inventory):
        values = [getattr(stock, one.name) for stock in (before, after)]
        shown = [len(value) if isinstance(value, frozenset) else value for value in values]
        text = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in shown]
        print(f"{one.name}: {text[0]} before, {text[1]} after")


def _assert_no_more(before: Inventory, after: Inventory) -> None:
    assert after.processes == before.processes
    assert after.zombies == 0
    assert after.listening == before.listening
    assert after.descriptors <= before.descriptors
    assert after.shared_memory <= before.shared_memory
    assert after.temporary <= before.temporary
    assert after.files <= before.files
    assert after.listener_mib <= before.listener_mib + 5
    assert after.anonymous_mib <= before.anonymous_mib + 16
