"""A server with llama-server's command line and faults on demand. Not a test; run as a program.

    python fake_llama_server.py --port P --journal FILE --fake JSON ...

It writes one line to the journal for each thing that happens to it. The JSON object may hold:
`busy_seconds` (one slot is busy that long after the first question), `waiting` (deferred requests
meanwhile), `status` (what each path answers instead of 200), `silent` (takes connections, never
answers), `spins` (computes while silent), `hostile` (answers without end: "flood", "trickle" in
the head, "drip" in the body; or "nested": JSON too deep to read), `sleeping`, `ignores` (signals
that it shrugs off), `forks` ("child": in its group, "session": in a session of its own, "orphan":
whose parent ends at once), `prints` (to its output, before it ends), `ends` (its exit status, or
minus a signal, at once).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def _option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


FAKE: dict[str, Any] = json.loads(_option("--fake"))
_JOURNAL = os.open(_option("--journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_first_question: list[float] = []


def note(*words: object) -> None:
    os.write(_JOURNAL, (" ".join(map(str, words)) + "\n").encode())


def _is_busy() -> bool:
    _first_question.append(time.monotonic())
    busy_seconds: float = FAKE.get("busy_seconds", 0)
    return time.monotonic() < _first_question[0] + busy_seconds


class Handler(BaseHTTPRequestHandler):
    """What llama-server answers on the paths that tell what is under way."""

    def do_GET(self) -> None:
        note("GET", self.path, self.headers.get("Authorization", "-"))
        busy = _is_busy() if self.path in ("/slots", "/metrics") else False
        answers = {
            "/props": json.dumps({"is_sleeping": FAKE.get("sleeping", False)}),
            "/slots": json.dumps([{"id": 0, "id_task": 7, "is_processing": busy}]),
            "/metrics": f"llamacpp:requests_processing {int(busy)}\n"
            f"llamacpp:requests_deferred {FAKE.get('waiting', 0) if busy else 0}\n",
        }
        status = FAKE.get("status", {}).get(self.path, 200 if self.path in answers else 404)
        body = answers.get(self.path, "").encode() if status == 200 else b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Silent(Handler):
    """Takes the connection and says nothing."""

    def handle(self) -> None:
        note("silent")
        while FAKE.get("spins"):
            pass
        threading.Event().wait()


class Hostile(Handler):
    """Answers what no server should."""

    def handle(self) -> None:
        note("hostile")
        head = b"HTTP/1.0 200 OK\r\n\r\n"
        first, more, pause = {
            "flood": (head, b"[" * (1 << 16), 0.0),
            "trickle": (b"HTTP/1.0 200 OK\r\nX: ", b"x", 0.01),
            "drip": (head + b"[", b" ", 0.01),
            "nested": (head + b"[" * (1 << 19), b"", 0.0),
        }[FAKE["hostile"]]
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while more:
                self.wfile.write(more)
                time.sleep(pause)


def on_signal(number: int, _frame: object) -> None:
    name = signal.Signals(number).name
    note("signal", name)
    if name not in FAKE.get("ignores", ()) and name not in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
        os._exit(0)


def _fork(kind: str) -> None:
    """A process that only KILL ends; the journal gets its number."""
    if os.fork():
        return
    if kind == "orphan" and os.fork():
        os._exit(0)
    if kind == "session":
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("forked", os.getpid())
    while True:
        signal.pause()


def main() -> None:
    ignored = [s.name for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN
               and isinstance(s, signal.Signals)]  # fmt: skip
    note("started", os.getpid(), os.getppid(), os.getpgrp())
    note("ignoring", *sorted(ignored))
    note("blocking", *signal.pthread_sigmask(signal.SIG_BLOCK, []))
    note("argv", json.dumps(sys.argv))
    note("environment", json.dumps(dict(os.environ)))
    print("the fake speaks", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT,
                   signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # fmt: skip
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    for kind in FAKE.get("forks", ()):
        _fork(kind)
    if "ends" in FAKE:
        _end(FAKE["ends"])
    handler = Silent if FAKE.get("silent") else Hostile if "hostile" in FAKE else Handler
    server = ThreadingHTTPServer(("127.0.0.1", int(_option("--port"))), handler)
    server.daemon_threads = True
    note("listening")
    server.serve_forever()


def _end(how: int) -> None:
    sys.stdout.write(FAKE.get("prints", ""))
    sys.stdout.flush()
    if how >= 0:
        os._exit(how)
    if -how != signal.SIGKILL:
        signal.signal(-how, signal.SIG_DFL)
    os.kill(os.getpid(), -how)
    signal.pause()


if __name__ == "__main__":
    main()
