"""A server that answers by script, one script for each connection, on loopback or a unix socket.

No script waits for a time of its own: it ends when the other side hangs up.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Script = Callable[[socket.socket, bytes], None]

_HANG_UP_SECONDS = 20.0  # nobody waits so long; it only keeps a broken test from hanging


class ScriptedServer:
    """`scripts` answer the connections in turn; the last one answers all that follow."""

    def __init__(self, listener: socket.socket, scripts: tuple[Script, ...]) -> None:
        self.requests: list[bytes] = []
        self._listener = listener
        self._scripts = scripts
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()
        return f"http://{host}:{port}"

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts[min(number, len(self._scripts) - 1)]
            thread = threading.Thread(target=self._answer, args=(connection, script))
            thread.start()
            self._threads.append(thread)
            number += 1

    def _answer(self, connection: socket.socket, script: Script) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_HANG_UP_SECONDS)
            while request := _read_request(connection):
                self.requests.append(request)
                script(connection, request)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_HANG_UP_SECONDS)


@contextlib.contextmanager
def on_loopback(*scripts: Script) -> Iterator[ScriptedServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = ScriptedServer(listener, scripts)
        try:
            yield server
        finally:
            server.close()


@contextlib.contextmanager
def on_unix_socket(path: Path, *scripts: Script) -> Iterator[ScriptedServer]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ScriptedServer(listener, scripts)
        try:
            yield server
        finally:
            server.close()


def _read_request(connection: socket.socket) -> bytes:
    """Head and body of one HTTP request; empty at the end of the connection."""
    request = b""
    while b"\r\n\r\n" not in request:
        piece = connection.recv(65536)
        if not piece:
            return b""
        request += piece
    head, _, body = request.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def http(status: int, body: bytes = b"", *headers: str) -> Script:
    """Answer with this status, body and further header lines."""

    def script(connection: socket.socket, request: bytes) -> None:
        head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers])
        connection.sendall(head.encode() + b"\r\n\r\n" + body)

    return script


def raw(data: bytes) -> Script:
    """Send these bytes and hang up."""

    def script(connection: socket.socket, request: bytes) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    return script


def silence(head: bytes = b"") -> Script:
    """Send `head`, then nothing until the client hangs up."""

    def script(connection: socket.socket, request: bytes) -> None:
        connection.sendall(head)
        connection.recv(1)

    return script


def dribble(head: bytes, seconds: float = 0.02) -> Script:
    """Send `head`, then one byte every few hundredths of a second until the client hangs up."""

    def script(connection: socket.socket, request: bytes) -> None:
        connection.sendall(head)
        connection.settimeout(seconds)
        for _ in range(int(_HANG_UP_SECONDS / seconds)):
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    return

    return script


def by_path(**scripts: Script) -> Script:
    """Choose by the last part of the path: `health=…, metrics=…`; anything else is a 404."""

    def script(connection: socket.socket, request: bytes) -> None:
        path = request.split(b" ", 2)[1].decode("ascii")
        scripts.get(path.rpartition("/")[2], http(404))(connection, request)

    return script
