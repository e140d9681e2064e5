"""What the gateway costs, beside llama-server's own router (`--models-dir`), all in one run.

The same two models, with the same arguments. *direct*: the server is asked at its own address.

- overhead: one token of a short prompt on connections that are kept, of one client; request by
  request direct, through the gateway, through the router, so that noise meets all alike. The router
  is compared with its own server asked directly. Tiny models only: the 45 ms that the other ones
  compute vary by more than that.
- cold: a model that does not run, and has room, from the request to the first byte of its answer.
  Ours was stopped because nobody used it, the router's was unloaded.
- swap: two models where one fits, asked for in turn. Ours are kept apart by memory, the router's by
  `--models-max 1`. At least a second lies between two requests, since supervisord tells runs apart
  by whole seconds, and the same model is never started twice within one.
- requests a second: 16 clients, each on a connection of its own that is kept.
- memory of what stands around the servers: the share of each process (PSS).

Run: python -m tests.bench.bench_gateway
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.adapters.demo_model import generate
from tests.bench.table import Figure, show
from tests.integration.harness import Deployment, ask, deployed, wait_until
from tests.ports import free_ports
from tests.real_model import servable

_NAMES = ("one", "two")
_CONTEXT, _PARALLEL = 2048, 4
_MOST_REQUESTS, _OVERHEAD_SECONDS = 600, 10.0
_CLIENTS, _LOAD_ROUNDS = 16, 3
_ROUNDS = 5
_IDLE_STOP_SECONDS = 4
_SPACING_SECONDS = 1.1  # see above
_ANSWER_SECONDS = 60.0
_MIB = 1024 * 1024
_SETTINGS = """model_dirs = {folder}
enable = all
memory_reserve = {reserve}
when_full = wait
trial_seconds = 1
[model:*]
context = 2048
parallel = 4
args = --cache-ram 4096
[gateway]
enabled = true
bind = 127.0.0.1:{port}
idle_stop_seconds = {idle_stop}
"""


# --- one client ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where a completion of one token is asked for."""

    port: int
    model: str

    @property
    def request(self) -> bytes:
        body = json.dumps({"model": self.model, "prompt": "a", "max_tokens": 1})
        return (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


class _Client:
    """A connection that is kept as long as the other side keeps it. Counts what it has got."""

    def __init__(self, target: _Target) -> None:
        self._target, self._request = target, target.request
        self.socket: socket.socket | None = None
        self.answers = 0
        self._received = b""

    def send(self) -> socket.socket:
        """Ask once, on a new connection where there is none."""
        if self.socket is None:
            address = ("127.0.0.1", self._target.port)
            self.socket = socket.create_connection(address, _ANSWER_SECONDS)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.socket.sendall(self._request)
        return self.socket

    def receive(self) -> bool:
        """Take what is there; whether that was the rest of the answer.

        Raises:
            RuntimeError: it is no answer with status 200.
        """
        assert self.socket is not None
        piece = self.socket.recv(65536)
        self._received += piece
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not piece or (end and not head.startswith(b"HTTP/1.1 200")):
            raise RuntimeError(f"no answer from {self._target}: {self._received[:500]!r}")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if end)
        if not end or not _is_whole(fields, body):
            return False
        self.answers += 1
        if fields.get(b"connection") == b"close":  # llama-server does so after a hundred
            self.close()
        return True

    def ask(self) -> float:
        """Seconds from the request to the end of the answer; a connection is there before."""
        if self.socket is None:
            self._ask_once()
        return self._ask_once()

    def _ask_once(self) -> float:
        begun = time.perf_counter()
        self.send()
        while not self.receive():
            pass
        return time.perf_counter() - begun

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None


def _is_whole(fields: dict[bytes, bytes], body: bytes) -> bool:
    """The router sends chunks; an answer has no other text that ends as the last one does."""
    length = fields.get(b"content-length")
    return body.endswith(b"\r\n0\r\n\r\n") if length is None else len(body) >= int(length)


def _first_byte_seconds(target: _Target) -> float:
    """Of one request on a new connection."""
    with contextlib.closing(_Client(target)) as client:
        begun = time.monotonic()
        client.send().recv(1, socket.MSG_PEEK)
        seconds = time.monotonic() - begun
        while not client.receive():
            pass
    return seconds


# --- who is asked --------------------------------------------------------------------------------


@contextlib.contextmanager
def _router(folder: Path, most: int) -> Iterator[tuple[int, psutil.Process]]:
    """Its port and its process."""
    engine, port = engines.find("auto"), free_ports(1)
    command = [
        engine.path, "--models-dir", folder, "--models-max", str(most), "--host", "127.0.0.1",
        "--port", str(port), "--ctx-size", str(_CONTEXT), "--parallel", str(_PARALLEL),
        "--kv-unified", "--cache-ram", "4096",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as router:  # fmt: skip
        try:
            wait_until(lambda: _listens(port), 30, "the router")
            yield port, psutil.Process(router.pid)
        finally:
            os.killpg(router.pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _own_server(router: psutil.Process) -> int:
    """The port on which the router's one server listens."""
    (server,) = router.children()
    (port,) = {
        link.laddr.port
        for link in server.net_connections("tcp")
        if link.status == psutil.CONN_LISTEN
    }
    return int(port)


@contextlib.contextmanager
def _ours(folder: Path, *, together: bool) -> Iterator[tuple[Deployment, int]]:
    """A deployment with room for both models or for one, and the gateway's port."""
    port = free_ports(1)

    def settings(reserve: int) -> str:
        idle_stop = 0 if together else _IDLE_STOP_SECONDS
        return _SETTINGS.format(folder=folder, reserve=reserve, port=port, idle_stop=idle_stop)

    with deployed(settings(0)) as deployment:
        if not together:
            deployment.synapse("init")
            need = max(model["memory"]["estimated"] for model in deployment.plan()["models"])
            deployment.configure(settings(psutil.virtual_memory().available - need * 3 // 2))
        deployment.synapse("up", "--detach", expect=None)
        wait_until(lambda: _listens(port), 30, "the gateway")
        yield deployment, port


def _phases(deployment: Deployment) -> set[str]:
    return {row["phase"] for row in deployment.rows().values()}


# --- overhead, load and memory: both models up ---------------------------------------------------


def _warm(folder: Path, *, is_quick: bool) -> list[Figure]:
    """Overhead only where a server is quick: the time of one that computes varies by more."""
    with _ours(folder, together=True) as (deployment, port), _router(folder, 2) as (by, process):
        wait_until(lambda: _phases(deployment) == {"ready"}, 60, "both ready")
        gateway, routed = _Target(port, "one"), _Target(by, "one")
        _first_byte_seconds(routed)  # so that it is loaded
        direct = _Target(deployment.rows()["one"]["port"], "one")
        beneath = _Target(_own_server(process), "one")
        figures = [*_overhead(direct, gateway, beneath, routed)] if is_quick else []
        targets = {"direct": direct, "gateway": gateway, "router": routed}
        figures += _rates(targets, 1.0 if is_quick else 3.0)
        _first_byte_seconds(_Target(by, "two"))  # as many models as ours
        return [*figures, *_memory(deployment, process)]


def _overhead(
    direct: _Target, gateway: _Target, beneath: _Target, routed: _Target
) -> Iterable[Figure]:
    """Of the gateway and of the router, each beside its own server asked directly."""
    times = _times([direct, gateway, beneath, routed])
    by_gateway, by_router = _longer(*times[:2]), _longer(*times[2:])
    p99s = [statistics.quantiles(one, n=100)[98] for one in times]
    yield Figure("direct, p50", 1000 * statistics.median(times[0]), "ms")
    yield Figure("gateway's overhead, p50", 1000 * by_gateway, "ms", 0.5)
    yield Figure("router's overhead, p50", 1000 * by_router, "ms")
    yield Figure("gateway's longer than the router's by", 1000 * (by_gateway - by_router), "ms", 0)
    yield Figure("gateway's overhead, p99", 1000 * (p99s[1] - p99s[0]), "ms")
    yield Figure("router's overhead, p99", 1000 * (p99s[3] - p99s[2]), "ms")


def _longer(direct: list[float], through: list[float]) -> float:
    """The median of what a request took longer than the one beside it."""
    return statistics.median(late - early for early, late in zip(direct, through, strict=True))


def _times(targets: list[_Target]) -> list[list[float]]:
    """Seconds of each request, by target, asked in turn; each time in another order."""
    clients = [_Client(target) for target in targets]
    times: list[list[float]] = [[] for _ in clients]
    until = time.monotonic() + _OVERHEAD_SECONDS
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(contextlib.closing(client))
            client.ask()
        for count in range(_MOST_REQUESTS):
            if time.monotonic() > until:
                break
            for place in range(len(clients)):
                turn = (place + count) % len(clients)
                times[turn].append(clients[turn].ask())
    return times


def _rates(targets: dict[str, _Target], seconds: float) -> list[Figure]:
    rates: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(_LOAD_ROUNDS):
        for name, target in targets.items():
            rates[name].append(_rate(target, seconds))
    return [
        Figure(f"{_CLIENTS} clients, {name}", statistics.median(found), "/s")
        for name, found in rates.items()
    ]


def _rate(target: _Target, seconds: float) -> float:
    """Answers a second to clients that ask again at once; one thread, so it takes little itself."""
    clients = [_Client(target) for _ in range(_CLIENTS)]
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        ready = stack.enter_context(selectors.DefaultSelector())
        for client in clients:
            stack.callback(client.close)
            ready.register(client.send(), selectors.EVENT_READ, client)
        while time.monotonic() - begun < seconds:
            for key, _ in ready.select(1):
                if key.data.receive():
                    ready.unregister(key.fileobj)
                    ready.register(key.data.send(), selectors.EVENT_READ, key.data)
    return sum(client.answers for client in clients) / (time.monotonic() - begun)


def _memory(deployment: Deployment, router: psutil.Process) -> Iterable[Figure]:
    """What is neither a model's server nor somebody else's."""
    supervisord = deployment.supervisord()
    parts = dict.fromkeys(("supervisord", "listener", "launchers", "haproxy"), 0)
    for process in (supervisord, *supervisord.children(recursive=True)):
        part = _part(process)
        if part:
            parts[part] += _share(process)
    for name, size in parts.items():
        yield Figure(f"memory: {name}", size / _MIB, "MiB")
    yield Figure("memory: all of ours", sum(parts.values()) / _MIB, "MiB")
    yield Figure("memory: router", _share(router) / _MIB, "MiB")


def _part(process: psutil.Process) -> str:
    words = process.cmdline()
    if process.name() == "haproxy":
        return "haproxy"
    if Path(words[0]).name == "llama-server":
        return ""
    if process.name() == "synapse-run" or "supervisor_synapse.launcher" in words:
        return "launchers"
    return "listener" if "listen" in words else "supervisord"


def _share(process: psutil.Process) -> int:
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.uss))  # macOS does not tell shares


# --- cold and swapped: one model fits ------------------------------------------------------------


def _on_demand(folder: Path, goal: float | None) -> list[Figure]:
    with _ours(folder, together=False) as (deployment, port), _router(folder, 1) as (by, _):
        swapped = _swaps(port, by)
        cold = _cold(deployment, port, by)
    return [*_beside("swap", *swapped, None), *_beside("cold", *cold, goal)]


def _beside(what: str, ours: float, theirs: float, most: float | None) -> Iterable[Figure]:
    yield Figure(f"{what}, gateway", ours, "s")
    yield Figure(f"{what}, router", theirs, "s")
    yield Figure(f"{what}, gateway / router", ours / theirs, "x", most)


def _swaps(port: int, by: int) -> tuple[float, float]:
    """Medians of the gateway's and the router's seconds to the first byte of an answer of the model
    that does not run, asked in turn.
    """
    took: dict[int, list[float]] = {port: [], by: []}
    for each in took:
        _first_byte_seconds(_Target(each, _NAMES[0]))
    for number in range(1, _ROUNDS + 1):
        for each, times in took.items():
            time.sleep(_SPACING_SECONDS)
            times.append(_first_byte_seconds(_Target(each, _NAMES[number % 2])))
    return statistics.median(took[port]), statistics.median(took[by])


def _cold(deployment: Deployment, port: int, by: int) -> tuple[float, float]:
    """The same of models that nobody has used for a while, with room for them."""
    ours, theirs = [], []
    for number in range(_ROUNDS):
        name = _NAMES[number % 2]
        wait_until(lambda: _phases(deployment) == {"deferred"}, 60, "nobody uses them")
        _unload(by)
        theirs.append(_first_byte_seconds(_Target(by, name)))
        _unload(by)
        ours.append(_first_byte_seconds(_Target(port, name)))
    return statistics.median(ours), statistics.median(theirs)


def _unload(by: int) -> None:
    """Whatever the router has loaded, until it is gone."""
    for name in _loaded(by):
        ask(f"http://127.0.0.1:{by}/models/unload", {"model": name})
    wait_until(lambda: not _loaded(by), 30, "unloaded")


def _loaded(by: int) -> list[str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", by, timeout=10)) as link:
        link.request("GET", "/models")
        models = json.loads(link.getresponse().read())["data"]
    return [model["id"] for model in models if model["status"]["value"] != "unloaded"]


# --- all -----------------------------------------------------------------------------------------


def _compare(title: str, model: Path, measure: Callable[[Path], list[Figure]]) -> bool:
    with tempfile.TemporaryDirectory(prefix="syn") as name:
        for copy in _NAMES:
            shutil.copyfile(model, Path(name) / f"{copy}.gguf")
        return show(title, measure(Path(name)))


def run() -> bool:
    """Whether the goals were met."""
    os.umask(0o077)
    if shutil.which("haproxy") is None:
        print("\ngateway: haproxy is not installed")
        return True
    real = servable(engines.find("auto"))
    with tempfile.TemporaryDirectory() as folder:
        tiny = generate(Path(folder))
        # First: for a minute each of the many connections of the others makes the kernel's table of
        # them longer, in which a verified stop looks for the port.
        met = _compare("gateway, tiny models on demand", tiny, lambda at: _on_demand(at, None))
        met &= _compare("gateway, 270M models on demand", real, lambda at: _on_demand(at, 1.3))
        met &= _compare("gateway, tiny models", tiny, lambda at: _warm(at, is_quick=True))
    title = f"gateway, 270M models ({real.name})"
    return met & _compare(title, real, lambda at: _warm(at, is_quick=False))


if __name__ == "__main__":
    sys.exit(not run())
