"""An engine for synapse.conf whose faults follow a script. Not a test; run as a program.

    python scripted_llama_server.py --script FOLDER <llama-server's arguments>

It takes llama-server's command line and answers its paths. What it does otherwise stands in
FOLDER/<alias>.json, which is read again whenever it matters: so it changes on command. Each start
appends a line to FOLDER/<alias>.starts (time, pid, and the pid of the child that it forked or 0),
each request for a token one to FOLDER/<alias>.asked. The JSON object may hold:

`load_seconds`    503 for so long after the start
`load_log`        "moves": a line every half second meanwhile; else its log stands still
`mode`            "ok"; "frozen": nothing is computed, and every path answers 200 with counters
                  that stand still; "blocked": nothing is computed, and /slots and /metrics take
                  the connection and never answer, as in older builds
`busy`            one slot works
`batch_seconds`   counters move, and /slots and /metrics answer, only once in so long: a slow batch
`exit_after`      ends so many seconds after its start (`exit_status`, or minus a signal, having
                  said `exit_text`)
`exit_in_load`    the same, but before it listens
`exit_now`        ends at once, where this is its pid
`ignores_term`    SIGTERM does nothing
`forks`           a child in its process group, which only SIGKILL ends
`only_starts`     all this only in its first so many starts; then it behaves
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What the rendered command line is made of, in the words of llama-server's own help.
HELP = """usage: llama-server [options]
-h,    --help                           print usage and exit
--version                               show version and build info
-m,    --model FNAME                    model path to load
-mm,   --mmproj FILE                    path to a multimodal projector file
-a,    --alias STRING                   set model name aliases
--host HOST                             ip address to listen
--port PORT                             port to listen
-c,    --ctx-size N                     size of the prompt context
-np,   --parallel N                     number of server slots
-kvu,  --kv-unified                     use single unified KV buffer
-cram, --cache-ram N                    set the maximum cache size in MiB
-ngl,  --gpu-layers N                   number of layers to store in VRAM
-dev,  --device <dev1,dev2,..>          comma-separated list of devices
--sleep-idle-seconds SECONDS            number of seconds of idleness before sleep
--metrics                               enable prometheus compatible metrics endpoint
--slots                                 expose slots monitoring endpoint
--list-devices                          print list of available devices and exit
"""
LOADING = {"error": {"code": 503, "message": "Loading model"}}
_POLL_SECONDS = 0.02
_FOREVER = threading.Event()


class Script:
    """What this server shall do, as it stands on disk now."""

    def __init__(self, folder: Path, alias: str) -> None:
        self._path = folder / f"{alias}.json"
        self._starts = folder / f"{alias}.starts"
        self._asked = folder / f"{alias}.asked"
        self._last: dict[str, Any] = {}
        self._stamp = 0
        self._nth = 1 + len(_lines(self._starts))
        self.began = time.monotonic()

    def __getitem__(self, key: str) -> Any:
        with contextlib.suppress(OSError, ValueError):
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:  # what is read counts as life while it loads
                self._last, self._stamp = json.loads(self._path.read_text()), stamp
        applies = self._nth <= self._last.get("only_starts", self._nth)
        return self._last.get(key) if applies else None

    def note_start(self, child: int) -> None:
        _append(self._starts, f"{time.time()} {os.getpid()} {child}")

    def note_question(self) -> None:
        _append(self._asked, f"{time.time()} {os.getpid()}")

    @property
    def age(self) -> float:
        return time.monotonic() - self.began


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


class Counters:
    """What moves while something is computed, and stands still while nothing is."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._tokens, self._batches = 0, 0

    def one_token(self) -> None:
        with self._lock:
            self._tokens += 1

    def decoded(self) -> int:
        """While busy it moves at the end of each batch; a quick one takes a tenth of a second."""
        with self._lock:
            if self._script["busy"] and not self._script["mode"]:
                self._batches = int(self._script.age / (self._script["batch_seconds"] or 0.1))
            return self._tokens + self._batches


class Handler(BaseHTTPRequestHandler):
    """llama-server's answers."""

    protocol_version = "HTTP/1.1"
    script: Script
    counters: Counters
    slots = 1
    alias = ""

    def do_GET(self) -> None:
        if self._is_loading():
            self._send(503, LOADING)
            return
        if self.path.startswith(("/slots", "/metrics")):
            self._wait_as_older_builds_do()
        match self.path.split("?")[0]:
            case "/health":
                self._send(200, {"status": "ok"})
            case "/props":
                self._send(200, {"is_sleeping": False, "total_slots": self.slots})
            case "/v1/models":
                self._send(200, {"data": [{"id": self.alias}]})
            case "/slots":
                self._send(200, self._slots())
            case "/metrics":
                self._send(200, self._metrics())
            case _:
                self._send(404, {"error": {"code": 404, "message": "File Not Found"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._is_loading():
            self._send(503, LOADING)
            return
        self.script.note_question()
        while self.script["mode"]:
            time.sleep(_POLL_SECONDS)
        self.counters.one_token()
        text = {"role": "assistant", "content": "river"}
        self._send(200, {"content": "river", "choices": [{"message": text, "text": "river"}]})

    def _is_loading(self) -> bool:
        return self.script.age < (self.script["load_seconds"] or 0)

    def _wait_as_older_builds_do(self) -> None:
        while self.script["mode"] == "blocked":
            time.sleep(_POLL_SECONDS)
        batch = self.script["batch_seconds"]
        if batch and self.script["busy"]:
            time.sleep(batch - self.script.age % batch + _POLL_SECONDS)

    def _slots(self) -> list[dict[str, Any]]:
        working = {"is_processing": bool(self.script["busy"]), "id_task": 1}
        decoded = [{"n_decoded": self.counters.decoded(), "n_remain": 9999}]
        idle = [{"id": n, "is_processing": False} for n in range(1, self.slots)]
        return [{"id": 0, **working, "next_token": decoded}, *idle]

    def _metrics(self) -> str:
        busy = int(bool(self.script["busy"]))
        return (
            f"llamacpp:n_decode_total {self.counters.decoded()}\n"
            f"llamacpp:requests_processing {busy}\nllamacpp:requests_deferred 0\n"
        )

    def _send(self, status: int, body: object) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        pass  # a prober that went away is no news


def _end(status: int, text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)
    if status >= 0:
        os._exit(status)
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    _FOREVER.wait()


def _follow(script: Script) -> None:
    """Speak while loading, and end when the script says so."""
    spoken = 0
    while True:
        loading = script.age < (script["load_seconds"] or 0)
        if loading and script["load_log"] == "moves" and script.age > spoken / 2:
            spoken += 1
            print(f"load_tensors: {spoken}", file=sys.stderr, flush=True)
        after = script["exit_after"]
        is_over = after is not None and script.age >= after
        if is_over or script["exit_now"] == os.getpid():
            _end(script["exit_status"] or 0, script["exit_text"] or "")
        time.sleep(_POLL_SECONDS)


def _fork() -> int:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    return child


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(HELP)
        return
    if "--version" in sys.argv:
        print("version: scripted")
        return
    if "--list-devices" in sys.argv:
        print("Available devices:")
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=1)
    given, _ = parser.parse_known_args()
    _serve(given)


def _serve(given: argparse.Namespace) -> None:
    script = Script(given.script, given.alias)
    if script["ignores_term"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    script.note_start(_fork() if script["forks"] else 0)
    if script["exit_in_load"]:
        _end(script["exit_status"] or 0, script["exit_text"] or "")
    threading.Thread(target=_follow, args=(script,), daemon=True).start()
    Handler.script, Handler.counters = script, Counters(script)
    Handler.slots, Handler.alias = given.parallel, given.alias
    Server((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
