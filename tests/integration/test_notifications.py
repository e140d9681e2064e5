"""Hooks in a real deployment: told of what happens, and unable to hold it up.

All tests share one deployment; each changes [notify] and applies it with `synapse discover`.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.integration.harness import Deployment, deployed, is_gone, promised, wait_until

pytestmark = pytest.mark.usefixtures("llama_server")

SETTINGS = """
[probe]
period_seconds = 1
[restart]
backoff_initial_seconds = 0.1
backoff_factor = 1
intensity = 100
"""
RETRY_SECONDS = 20.0  # a webhook's second try comes after 1 s


@pytest.fixture(scope="module")
def fleet(llama_server: Engine) -> Iterator[Deployment]:
    """Two models that are ready, and nobody who is told of them."""
    with deployed(SETTINGS) as deployment:
        deployment.add("alpha", "beta")
        deployment.synapse("up", "--detach")
        deployment.wait_for_rows({"alpha": "ready", "beta": "ready"})
        yield deployment


def tell(fleet: Deployment, notify: str) -> None:
    """From now on."""
    fleet.configure(f"{SETTINGS}\n[notify]\n{notify}\n")
    found = fleet.discover()
    assert not found["problems"], found


def test_a_hook_that_cannot_be_used_is_told_when_it_is_applied(fleet: Deployment) -> None:
    fleet.configure(f"{SETTINGS}\n[notify]\ncommand = /no/such/program\n")
    (problem,) = fleet.discover()["problems"]
    assert problem["subject"] == "[notify]"
    assert "/no/such/program" in problem["reason"]


def write_hook(fleet: Deployment, script: str) -> Path:
    path = fleet.root / "hook"
    path.write_text(f"#!/bin/sh\ncd {fleet.root}\n{script}\n")
    path.chmod(0o700)
    return path


def got(fleet: Deployment, name: str = "got") -> list[Any]:
    """What a hook has written, but for a line that is just being written."""
    path = fleet.root / name
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def kill(fleet: Deployment, name: str) -> float:
    """A server by kill -9; when that was. Returns once it is ready again."""
    since = time.time()
    fleet.servers()[name].send_signal(signal.SIGKILL)
    fleet.wait_for_step(name, since, promised(1.5), out_of="ready")
    fleet.wait_for_step(name, since, promised(5), to="ready")
    return since


def worth_telling(fleet: Deployment, since: float) -> list[Any]:
    """What the history holds since then that is told by default."""
    told = ("failed", "deferred", "ready")
    lines = [line for line in fleet.history() if line["when"] >= since]
    return [line for line in lines if line["class"] or line["to"] in told]


def listener_says(fleet: Deployment, text: str) -> bool:
    return text in (fleet.log / "synapse.log").read_text()


def test_a_command_is_told_of_a_crash_and_of_its_healing(fleet: Deployment) -> None:
    """In the words of the history, and with where it was."""
    hook = write_hook(fleet, "cat >> got")
    tell(fleet, f"command = {hook}")
    since = kill(fleet, "alpha")
    wait_until(lambda: len(got(fleet)) >= 2, promised(10), "a crash and its healing")
    crash, healed = got(fleet)
    assert (crash["from"], crash["to"], crash["class"]) == ("ready", "backoff", "crashed")
    assert crash["evidence"]
    assert healed["to"] == "ready"
    for notice, line in zip((crash, healed), worth_telling(fleet, since), strict=True):
        assert line.items() <= notice.items()
        assert (notice["prefix"], notice["suppressed"]) == (str(fleet.prefix), 0)


def test_a_hook_that_hangs_delays_no_healing_and_is_killed_with_its_child(
    fleet: Deployment,
) -> None:
    hook = write_hook(fleet, "echo $$ > own; sleep 600 & echo $! > child; wait")
    tell(fleet, f"command = {hook}\ntimeout_seconds = 4")
    kill(fleet, "beta")
    own, child = (_process(fleet, name) for name in ("own", "child"))
    kill(fleet, "alpha")
    wait_until(lambda: is_gone(own) and is_gone(child), promised(10), "both killed")
    wait_until(lambda: listener_says(fleet, "had not ended after 4 s"), promised(5), "it is named")


def test_a_hook_does_not_outlive_a_listener_that_is_killed(fleet: Deployment) -> None:
    """Who comes after it goes on telling."""
    hook = write_hook(fleet, "echo $$ > last; sleep 600 & echo $! > spawned; wait")
    tell(fleet, f"command = {hook}\ntimeout_seconds = 600")
    kill(fleet, "alpha")
    own, child = (_process(fleet, name) for name in ("last", "spawned"))
    listener = fleet.listener()
    assert listener is not None
    listener.kill()
    wait_until(lambda: is_gone(own) and is_gone(child), promised(5), "both gone")
    write_hook(fleet, "cat >> anew")
    wait_until(lambda: fleet.listener() not in (None, listener), promised(10), "a new listener")
    kill(fleet, "beta")
    wait_until(lambda: got(fleet, "anew"), promised(10), "the new listener tells")


def test_a_webhook_that_fails_at_first_is_asked_again(fleet: Deployment) -> None:
    """With its key, which stands nowhere else."""
    keys = fleet.root / "keys"
    keys.write_text("Authorization: Bearer sesame\n")
    keys.chmod(0o600)
    with _receiver([500, 200, 200]) as (url, received):
        tell(fleet, f"url = {url}\nurl_header_file = {keys}")
        since = kill(fleet, "beta")
        wait_until(lambda: len(received) >= 3, promised(RETRY_SECONDS), "three requests")
        tell(fleet, "")
    bodies = [json.loads(body) for _, body in received]
    assert bodies[0] == bodies[1]
    assert [body["when"] for body in bodies[1:]] == [
        line["when"] for line in worth_telling(fleet, since)
    ]
    assert {headers["Authorization"] for headers, _ in received} == {"Bearer sesame"}
    kept = [path for path in fleet.prefix.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"sesame" in path.read_bytes()]


def test_a_crash_loop_is_cut_short_counted_and_its_last_word_told(fleet: Deployment) -> None:
    """At 16 a minute: eight at once, one more each 7.5 s."""
    hook = write_hook(fleet, "cat >> flood")
    tell(fleet, f"command = {hook}\nmost_per_minute = 16")
    began, since = time.monotonic(), time.time()
    for _ in range(7):
        kill(fleet, "alpha")
    expected = worth_telling(fleet, since)
    assert len(expected) >= 14

    def last_word() -> bool:
        told = got(fleet, "flood")
        return bool(told) and told[-1]["when"] == expected[-1]["when"]

    wait_until(last_word, promised(15), "the last word")
    told, seconds = got(fleet, "flood"), time.monotonic() - began
    assert len(told) <= 8 + seconds * 8 / 60 + 1
    assert sum(1 + notice["suppressed"] for notice in told) == len(expected)
    assert told[-1]["to"] == "ready"


def _process(fleet: Deployment, name: str) -> psutil.Process:
    """The one whose number a hook wrote down."""
    path = fleet.root / name
    wait_until(
        lambda: path.exists() and path.read_text().endswith("\n"), promised(5), f"{name} was begun"
    )
    return psutil.Process(int(path.read_text()))


@contextlib.contextmanager
def _receiver(statuses: list[int]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A webhook that answers with these; where it is, and what it got: headers and body."""
    received: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((dict(self.headers.items()), body))
            self.send_response(statuses[min(len(received), len(statuses)) - 1])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook", received
        finally:
            server.shutdown()
            thread.join()
