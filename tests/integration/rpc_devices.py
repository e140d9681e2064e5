"""Devices with set memory, on any machine: real `ggml-rpc-server` processes behind a small relay.

    with rpc_device(64 * MIB) as device:
        llama-server --rpc {device.endpoint} --device RPC0 --gpu-layers 99 ...

The server offers all of the host's memory, always reports it as free, and serves one connection at
a time. So each device is a relay that gives every connection a real server of its own, passes
everything through unchanged, and keeps the books: it tells the memory that was set, and what is
left of it, and a buffer that is larger than what is left fails to be allocated, as on a real device
that is full. What a connection has allocated is free again when it ends.

The protocol (https://github.com/ggml-org/llama.cpp, ggml/src/ggml-rpc/ggml-rpc.cpp), little endian:
a request is its command (1 byte), a size (8) and so many bytes; a reply is a size (8) and so many
bytes. Which commands have a reply differs from version to version. The relay need not know: a
client waits for each reply before its next request, so the next reply is that of the last request.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from supervisor_synapse.adapters import engine as engines
from supervisor_synapse.errors import ConfigError
from tests.ports import free_port

_PROGRAMS = ("ggml-rpc-server", "rpc-server")  # the name has changed
_START_SECONDS = 20.0
_POLL_SECONDS = 0.002
_STARTS = 5  # somebody else may take the port that was free
_END_SECONDS = 10.0

_ALLOC_BUFFER, _FREE_BUFFER, _GET_DEVICE_MEMORY = 0, 4, 11
_REQUEST = struct.Struct("<BQ")  # command, size
_SIZE = struct.Struct("<Q")
_ALLOC = struct.Struct("<IQ")  # device, size
_FREE = struct.Struct("<Q")  # pointer
_PAIR = struct.Struct("<QQ")  # allocated: pointer, size; memory: free, total
_REFUSED = _SIZE.pack(_PAIR.size) + _PAIR.pack(0, 0)
_CHUNK_BYTES = 1024 * 1024


class _Ended(Exception):
    """The other side of a connection has gone."""


class _Books:
    """Who holds how much of a device's memory; any thread may ask."""

    def __init__(self, total_bytes: int) -> None:
        self._lock = threading.Lock()
        self._total, self._used, self._taken = total_bytes, 0, 0
        self.unusable = 0  # told as free, and given to nobody

    def read(self) -> tuple[int, int, int]:
        """Total, used by clients, taken by the stranger."""
        with self._lock:
            return self._total, self._used, self._taken

    @property
    def free(self) -> int:
        total, used, taken = self.read()
        return max(total - used - taken, 0)

    def set_total(self, size: int) -> None:
        with self._lock:
            self._total = size

    def add(self, *, used: int = 0, taken: int = 0) -> bool:
        """False, and nothing happens, where more is wanted than is left."""
        with self._lock:
            left = self._total - self._used - self._taken - self.unusable
            if used + taken > max(left, 0):
                return False
            self._used += used
            self._taken += taken
            return True


class _Server:
    """One real server, for one connection at a time."""

    def __init__(self, program: str) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - end() closes it
        self.port = free_port()
        self.process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(self.port), "-d", "CPU"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def connect(self) -> socket.socket | None:
        """None where it has ended, as it does when its port was taken by somebody else."""
        deadline = time.monotonic() + _START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", self.port), _END_SECONDS)
                connection.settimeout(None)
                return connection
            time.sleep(_POLL_SECONDS)
        return None

    def end(self) -> str:
        """What it said, once it has ended."""
        self.process.kill()
        self.process.wait()
        with self._log as log:
            log.seek(0)
            return log.read()[-2000:].decode("utf-8", "replace")


class _Servers:
    """The real servers of one device: as many as it ever had connections at a time."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._all: list[_Server] = []
        self._idle: list[_Server] = []
        self._closed = False

    def connect(self) -> tuple[_Server, socket.socket]:
        """A server that serves nobody else, and the connection to it."""
        said = ""
        for _ in range(_STARTS):
            server = self._take()
            connection = server.connect()
            if connection is not None:
                return server, connection
            said = self._drop(server)
        raise RuntimeError(f"{self._program} does not start: {said}")

    def give_back(self, server: _Server) -> None:
        with self._lock:
            self._idle.append(server)

    def kill(self) -> None:
        """All of them, as they are; further connections get new ones."""
        with self._lock:
            killed, self._all, self._idle = self._all, [], []
        for server in killed:
            server.end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.kill()

    def _take(self) -> _Server:
        with self._lock:
            if self._closed:
                raise _Ended
            while self._idle:
                server = self._idle.pop()
                if server in self._all and server.process.poll() is None:
                    return server
            server = _Server(self._program)
            self._all.append(server)
            return server

    def _drop(self, server: _Server) -> str:
        with self._lock:
            if server not in self._all:
                raise _Ended
            self._all.remove(server)
        return server.end()


class _Relay:
    """One connection of a client, with the real server behind it."""

    def __init__(self, client: socket.socket, server: socket.socket, books: _Books) -> None:
        self._client, self._server, self._books = client, server, books
        self._buffers: dict[int, int] = {}  # pointer → size
        self._on_reply: Callable[[bytes], bytes] | None = None  # for the reply that comes next
        for side in (client, server):
            with contextlib.suppress(OSError):  # gone already
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        """Until either side has gone."""
        replies = threading.Thread(target=self._until_ended, args=(self._replies,), daemon=True)
        replies.start()
        self._until_ended(self._requests)
        replies.join()
        self._client.close()
        self._server.close()
        self._books.add(used=-sum(self._buffers.values()))

    def _until_ended(self, pump: Callable[[], None]) -> None:
        with contextlib.suppress(_Ended, OSError):
            pump()
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _requests(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while True:
            _fill(self._client, buffer[: _REQUEST.size])
            command, size = _REQUEST.unpack(buffer[: _REQUEST.size])
            if command == _ALLOC_BUFFER and size == _ALLOC.size:
                self._allocate(_take(self._client, size))
            elif command == _FREE_BUFFER and size == _FREE.size:
                self._free(_take(self._client, size))
            else:
                if command == _GET_DEVICE_MEMORY:
                    self._on_reply = self._memory
                _pass(self._client, self._server, buffer, _REQUEST.size, size)

    def _replies(self) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while True:
            _fill(self._server, buffer[: _SIZE.size])
            (size,) = _SIZE.unpack(buffer[: _SIZE.size])
            change, self._on_reply = self._on_reply, None
            if change is not None and size == _PAIR.size:
                reply = change(_take(self._server, size))
                self._client.sendall(_SIZE.pack(len(reply)) + reply)
            else:
                _pass(self._server, self._client, buffer, _SIZE.size, size)

    def _allocate(self, request: bytes) -> None:
        _, size = _ALLOC.unpack(request)
        if not self._books.add(used=size):
            self._client.sendall(_REFUSED)
            return

        def note(reply: bytes) -> bytes:
            pointer, _ = _PAIR.unpack(reply)
            if pointer:
                self._buffers[pointer] = size
            else:
                self._books.add(used=-size)
            return reply

        self._on_reply = note
        self._server.sendall(_REQUEST.pack(_ALLOC_BUFFER, len(request)) + request)

    def _free(self, request: bytes) -> None:
        (pointer,) = _FREE.unpack(request)
        self._server.sendall(_REQUEST.pack(_FREE_BUFFER, len(request)) + request)
        self._books.add(used=-self._buffers.pop(pointer, 0))

    def _memory(self, _: bytes) -> bytes:
        return _PAIR.pack(self._books.free, self._books.read()[0])


def _fill(source: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = source.recv_into(view[done:])
        if not count:
            raise _Ended
        done += count


def _take(source: socket.socket, size: int) -> bytes:
    content = bytearray(size)
    _fill(source, memoryview(content))
    return bytes(content)


def _pass(
    source: socket.socket, target: socket.socket, buffer: memoryview, head: int, size: int
) -> None:
    """Hand on a message whose first `head` bytes stand in `buffer`; a small one in one piece."""
    first = min(size, len(buffer) - head)
    _fill(source, buffer[head : head + first])
    target.sendall(buffer[: head + first])
    left = size - first
    while left:
        count = source.recv_into(buffer, min(left, len(buffer)))
        if not count:
            raise _Ended
        target.sendall(buffer[:count])
        left -= count


class RpcDevice:
    """A device of llama-server, RPC0 where it is the only one."""

    def __init__(self, program: str, memory_bytes: int) -> None:
        self._books = _Books(memory_bytes)
        self._servers = _Servers(program)
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._relays: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepts = threading.Thread(target=self._accept, daemon=True)
        self._accepts.start()

    @property
    def total_bytes(self) -> int:
        """May be set: a device that shrinks or grows. What is allocated stays allocated."""
        return self._books.read()[0]

    @total_bytes.setter
    def total_bytes(self, size: int) -> None:
        self._books.set_total(size)

    @property
    def used_bytes(self) -> int:
        """What the buffers of all clients hold now."""
        return self._books.read()[1]

    @property
    def taken(self) -> int:
        """Bytes that a stranger holds."""
        return self._books.read()[2]

    @property
    def free_bytes(self) -> int:
        return self._books.free

    @property
    def unusable_bytes(self) -> int:
        """Told as free, but whoever wants to have it runs out of memory. May be set."""
        return self._books.unusable

    @unusable_bytes.setter
    def unusable_bytes(self, size: int) -> None:
        self._books.unusable = size

    @property
    def connections(self) -> int:
        """Of clients, now."""
        with self._lock:
            return len(self._clients)

    def take(self, size: int) -> None:
        """A stranger allocates so many bytes more.

        Raises:
            MemoryError: as for everybody, where less is left.
        """
        if not self._books.add(taken=size):
            raise MemoryError(f"{size} bytes wanted, {self.free_bytes} left")

    def give_back(self, size: int) -> None:
        """The stranger frees so many of its bytes."""
        assert size <= self.taken
        self._books.add(taken=-size)

    def crash(self) -> None:
        """The real servers die under their clients; new connections find new servers."""
        self._servers.kill()

    def close(self) -> None:
        """Every connection is cut; when this returns, nothing that was started is left."""
        self._closed = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), _END_SECONDS).close()
        self._accepts.join(_END_SECONDS)
        self._listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._servers.close()
        for relay in self._relays:
            relay.join(_END_SECONDS)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closed:
                client.close()
                return
            with self._lock:
                self._clients.add(client)
            relay = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._relays = [*(one for one in self._relays if one.is_alive()), relay]
            relay.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with contextlib.suppress(_Ended):
                server, connection = self._servers.connect()
                _Relay(client, connection, self._books).run()
                self._servers.give_back(server)
        finally:
            client.close()
            with self._lock:
                self._clients.discard(client)


def program(engine: str = "auto") -> str:
    """The server beside the engine; the test is skipped where there is none."""
    try:
        folder = os.path.dirname(os.path.realpath(engines.locate(engine)))
    except ConfigError as error:
        pytest.skip(str(error))
    for name in _PROGRAMS:
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK):
            return path
    pytest.skip(f"no {_PROGRAMS[0]} beside the engine in {folder}")


@contextlib.contextmanager
def rpc_device(memory_bytes: int) -> Iterator[RpcDevice]:
    """A device with so much memory, until the end of the block."""
    device = RpcDevice(program(), memory_bytes)
    try:
        yield device
    finally:
        device.close()
