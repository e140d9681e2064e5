"""Who answers on a port: this process, a child of it, or somebody else."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from supervisor_synapse.adapters.sockets import foreign_listener

_LISTEN = """
import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen()
print("listening", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def listening(address: str, port: int) -> Iterator[int]:
    """Another process that listens there until the block ends; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", _LISTEN, address, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield process.pid
        process.kill()


@contextlib.contextmanager
def we_listen(address: str = "127.0.0.1") -> Iterator[int]:
    """This process listens, and shares its port as llama-server does; the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_our_own_listener_is_not_foreign() -> None:
    with we_listen() as port:
        assert foreign_listener(port, os.getpid()) == ""


def test_a_child_of_ours_is_not_foreign() -> None:
    """A launcher stands between supervisord's child and the server."""
    with we_listen() as port, listening("127.0.0.1", port):
        assert foreign_listener(port, os.getpid()) == ""


def test_another_process_on_our_port_is_named() -> None:
    """Also where we listen as well: the kernel shares the requests out."""
    with we_listen() as port, listening("127.0.0.1", port) as pid:
        found = foreign_listener(port, pid)
        assert f"(pid {os.getpid()})" in found
        assert found.isprintable()


def test_another_process_alone_on_our_port_is_named() -> None:
    with we_listen() as port, subprocess.Popen(["sleep", "30"]) as idle:  # noqa: S607
        try:
            assert f"(pid {os.getpid()})" in foreign_listener(port, idle.pid)
        finally:
            idle.kill()


def test_the_same_port_of_another_address_is_nobodys_rival() -> None:
    """Some container may have it there; a working server must not die of that."""
    with we_listen("127.0.0.2") as port, listening("127.0.0.1", port) as pid:
        assert foreign_listener(port, pid) == ""


def test_a_more_specific_address_takes_our_requests() -> None:
    with we_listen("127.0.0.1") as port, listening("0.0.0.0", port) as pid:  # noqa: S104 - a rival
        assert foreign_listener(port, pid) != ""


def test_a_less_specific_address_does_not() -> None:
    """What comes to 127.0.0.1 goes to the one that named it."""
    with we_listen("0.0.0.0") as port, listening("127.0.0.1", port) as pid:  # noqa: S104 - no rival
        assert foreign_listener(port, pid) == ""


def test_a_port_without_a_listener_is_nobodys() -> None:
    with we_listen() as port:
        pass
    assert foreign_listener(port, os.getpid()) == ""
