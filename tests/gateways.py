"""A gateway for a test: real HAProxy before stub servers, without supervisord and models."""

from __future__ import annotations

import contextlib
import http.client as http_client
import http.server
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from supervisor_synapse import launcher, render
from supervisor_synapse.adapters import haproxy
from supervisor_synapse.adapters.haproxy import Runtime
from supervisor_synapse.core.gateway import GatewayPaths, Tables, Upstream, Verdict, tables
from supervisor_synapse.core.model import Program
from supervisor_synapse.core.settings import GatewaySettings
from tests.integration.harness import wait_until
from tests.ports import free_ports
from tests.unit.builders import program, row

IS_THERE = shutil.which("haproxy") is not None


class _Handler(http.server.BaseHTTPRequestHandler):
    """Tells what it was asked; `/stream/N` sends N events, each when the test says so."""

    protocol_version = "HTTP/1.1"
    server: StubServer

    def _answer(self) -> None:
        if self.path == "/health":
            self._send({"status": "ok"})
            return
        if self.headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/stream/"):
            self._stream(int(self.path.rpartition("/")[2]))
            return
        said = {
            "server": self.server.name, "method": self.command, "path": self.path,
            "bytes": len(body), "headers": {k.lower(): v for k, v in self.headers.items()},
        }  # fmt: skip
        self.server.asked.append(said)
        self._send(said)

    def __getattr__(self, name: str) -> Callable[[], None]:
        """`do_GET` and all other methods."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _stream(self, events: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(events):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.server.go_on.wait(30)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class StubServer(http.server.ThreadingHTTPServer):
    """What stands for a model's server."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, name: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.name = name
        self.asked: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        pass  # who asked has gone

    def close(self) -> None:
        self.go_on.set()
        self.shutdown()
        self.server_close()


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json()["error"]


@dataclass(slots=True)
class Proxy:
    """One HAProxy with our configuration, in a folder of its own."""

    folder: Path
    binary: haproxy.Haproxy
    settings: GatewaySettings
    upstreams: list[Upstream]
    supervisord: Path
    process: subprocess.Popen[bytes] | None = None
    said: Tables = field(default_factory=lambda: Tables({}, {}))

    @property
    def config(self) -> Path:
        return self.folder / "haproxy.cfg"

    @property
    def paths(self) -> GatewayPaths:
        at = self.folder
        return GatewayPaths(
            str(at / "gateway.sock"), str(at / "again.sock"), str(self.supervisord),
            str(at / "routes.map"), str(at / "models.map"), str(at / "gateway.lua"),
        )  # fmt: skip

    @property
    def runtime(self) -> Runtime:
        return Runtime(Path(self.paths.socket))

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def write(self) -> None:
        """The configuration as the settings and upstreams have it."""
        templates = render.Templates()
        Path(self.paths.lua).write_text(templates.render(render.GATEWAY_LUA, {}))
        self.config.write_text(
            render.render_gateway(templates, self.settings, self.upstreams, self.paths)
        )
        for path, entries in (
            (self.paths.routes_map, self.said.routes), (self.paths.models_map, self.said.models),
        ):  # fmt: skip
            Path(path).write_text(haproxy.map_text(entries))

    def start(self, is_up: Callable[[], bool] | None = None) -> None:
        self.write()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary.path, "-W", "-db", "-f", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until(is_up or self.is_up, 20, "haproxy answers")

    def reload(self) -> None:
        """A new worker with what stands on disk now."""
        before = self.runtime.pid()
        self.write()
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: self._pid() not in (0, before), 20, "a new worker")

    def _pid(self) -> int:
        with contextlib.suppress(Exception):
            return self.runtime.pid()
        return 0

    def is_up(self) -> bool:
        try:
            return self.ask(None, "/health", "GET").status == 200
        except (OSError, http_client.HTTPException):
            return False

    def tell(self, said: Tables) -> None:
        """The maps of what runs."""
        self.said = said
        self.runtime.replace_map(Path(self.paths.routes_map), said.routes)
        self.runtime.replace_map(Path(self.paths.models_map), said.models)

    def ask(
        self, body: object, path: str = "/v1/completions", method: str = "POST",
        seconds: float = 30, **headers: str,
    ) -> Reply:  # fmt: skip
        """One request on a connection of its own."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        link = http_client.HTTPConnection("127.0.0.1", self.settings.port, timeout=seconds)
        with contextlib.closing(link):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.request(method, path, raw, {"Content-Type": "application/json", **headers})
            response = link.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())

    def raw(self, text: bytes, seconds: float = 30, *, until: bytes = b"") -> bytes:
        """What comes back to these bytes, up to `until` or the end."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.settings.port), seconds) as link:
            link.sendall(text)
            while not until or until not in received:
                piece = link.recv(1 << 16)
                if not piece:
                    break
                received += piece
        return received

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


def programs(*names: str) -> list[Program]:
    """Models of one repo each."""
    return [
        program(name=name, alias=name, repo=f"acme/{name}", port=8100 + number)
        for number, name in enumerate(names)
    ]


def all_ready(found: Sequence[Program], **verdicts: Verdict) -> Tables:
    """What is told of models that are up, but for those named."""
    rows = [row(name=one.name, repo=one.repo, alias=one.alias) for one in found]
    said = {one.name: verdicts.get(one.name, Verdict("serve")) for one in found}
    return tables(found, rows, said)


@contextlib.contextmanager
def proxy(
    ports: Mapping[str, int],
    supervisord: Path = Path("/nonexistent"),
    is_up: Callable[[], bool] | None = None,
    **settings: Any,
) -> Iterator[Proxy]:
    """Before models at these ports, all told to be up."""
    binary = haproxy.find()
    assert binary is not None
    folder = Path(tempfile.mkdtemp(prefix="gw", dir="/tmp"))
    found = Proxy(
        folder, binary, replace(GatewaySettings(port=free_ports(1), hold_seconds=10), **settings),
        [Upstream(name, "127.0.0.1", port) for name, port in ports.items()], supervisord,
        said=all_ready(programs(*ports)),
    )  # fmt: skip
    try:
        found.start(is_up)
        yield found
    finally:
        found.close()
        shutil.rmtree(folder)


@contextlib.contextmanager
def servers(*names: str) -> Iterator[dict[str, StubServer]]:
    found = {name: StubServer(name) for name in names}
    try:
        yield found
    finally:
        for one in found.values():
            one.close()


@dataclass(slots=True)
class Front:
    """A runtime socket that is played, beside a ledger: what it was asked, and what it answers."""

    ledger: Path
    asked: list[str] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)
    hangs: bool = False

    @property
    def path(self) -> str:
        return launcher.gateway_of(str(self.ledger))

    def answer(self, link: socket.socket) -> None:
        asked = link.recv(4096).decode()
        self.asked.append(asked.rstrip("\n"))
        if self.hangs:
            link.recv(1)
            return
        found = [answer for word, answer in self.answers.items() if word in asked]
        link.sendall(found[0] if found else b"\n")


@contextlib.contextmanager
def fronting() -> Iterator[Front]:
    folder = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))
    found = Front(folder / "ledger.json")

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with link, contextlib.suppress(OSError):
                    found.answer(link)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(found.path)
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    shutil.rmtree(folder)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
