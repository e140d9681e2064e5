"""Loopback ports for servers of tests."""

from __future__ import annotations

import os
import random
import socket


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that were free a moment ago.

    Below the range that the kernel hands out to clients; chosen at random, so that test runs
    beside each other seldom meet.
    """
    chance = random.Random(os.urandom(8))
    for _ in range(200):
        first = chance.randrange(12_000, 31_000)
        if all(port_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError(f"no {count} free ports in a row")


def free_port() -> int:
    """One of them."""
    return free_ports(1)


def port_is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
