"""synapse-run with real processes: the real llama-server, and a fake one that has every fault."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import py_compile
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse import launcher
from supervisor_synapse.adapters import ledger as ledgers
from supervisor_synapse.adapters.ledger import Entry, Ledger, Process
from tests import gguf_factory
from tests.conftest import Engine
from tests.gateways import Front, fronting
from tests.integration.harness import promised
from tests.ports import free_port

FAKE = Path(__file__).with_name("fake_llama_server.py")
_PATIENCE_SECONDS = 20.0
_POLL_SECONDS = 0.01
_ENDLESS = 8000  # tokens
_linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


# --- running it ----------------------------------------------------------------------------------


def eventually(holds: Callable[[], Any], seconds: float = _PATIENCE_SECONDS) -> Any:
    """What `holds` returns once it is true; the test fails where that takes longer."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(_POLL_SECONDS)
    return value


def is_gone(pid: int) -> bool:
    """Neither running nor waiting to be reaped."""
    return not psutil.pid_exists(pid)


def is_dead(pid: int) -> bool:
    """Not running; where its parent is dead as well, init reaps it when it likes."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class Run:
    """One launcher, and what it and its server wrote."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    journal: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def noted(self, word: str) -> list[list[str]]:
        """The journal's lines that begin with `word`, without it."""
        text = self.journal.read_text("utf-8") if self.journal.exists() else ""
        lines = [line.split(" ") for line in text.split("\n")[:-1]]
        return [words[1:] for words in lines if words[0] == word]

    def asked(self) -> list[str]:
        return [words[0] for words in self.noted("GET")]

    def listening(self) -> Run:
        """Once the fake listens."""
        eventually(lambda: self.noted("listening") or self.noted("forked"))
        eventually(lambda: self.noted("listening"))
        return self

    def server(self) -> int:
        (child,) = eventually(lambda: psutil.Process(self.pid).children())
        pid: int = child.pid
        return pid

    def family(self) -> list[int]:
        """The launcher, the server, and all below."""
        launched = psutil.Process(self.pid)
        return [self.pid, *(child.pid for child in launched.children(recursive=True))]

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Ask to stop; how long it took until the launcher was gone."""
        begin = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(_PATIENCE_SECONDS)
        return time.monotonic() - begin

    def ours(self) -> list[str]:
        """What the launcher itself wrote, line by line."""
        mark = "synapse-run: "
        return [li.removeprefix(mark) for li in self.text().splitlines() if li.startswith(mark)]

    def said(self) -> dict[str, str]:
        """The fields of the last line, which is about a stop."""
        event, _, fields = self.ours()[-1].partition(": ")
        assert event == "stopped"
        return dict(word.split("=", 1) for word in fields.split(", "))


Start = Callable[..., Run]


@pytest.fixture(scope="session")
def synapse_run() -> str:
    """The console script; its byte code is written, as an installer does it."""
    py_compile.compile(launcher.__file__, doraise=True)
    found = shutil.which("synapse-run", path=str(Path(sys.executable).parent))
    assert found is not None, "the package is not installed in this environment"
    return found


@pytest.fixture
def start(synapse_run: str, tmp_path: Path) -> Iterator[Start]:
    """`start(command, drain=…, term=…)` runs a launcher that ends with the test, with all of it."""
    runs: list[Run] = []

    def begin(
        command: Sequence[str],
        port: int,
        drain: float = 20,
        term: float = 0.6,
        record: Path | None = None,
        ledger: Path | None = None,
        **options: Any,
    ) -> Run:
        number = len(runs)
        log, journal = tmp_path / f"{number}.log", tmp_path / f"{number}.journal"
        words = [word.replace("JOURNAL", str(journal)) for word in command]
        options.setdefault("process_group", 0)  # as supervisord does it
        options.setdefault("env", os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
        kept = [] if record is None else ["--record", str(record)]
        kept += [] if ledger is None else ["--ledger", str(ledger)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [synapse_run, "--drain", str(drain), f"--term={term}", *kept, "--", *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options,
            )  # fmt: skip
        runs.append(Run(process, port, log, journal))
        return runs[-1]

    yield begin
    for run in runs:
        _end(run)


def _end(run: Run) -> None:
    """End what the test left, then make sure that it is gone."""
    family = run.family() if run.process.poll() is None else []
    family += [int(words[0]) for words in run.noted("forked") + run.noted("started")]
    run.process.kill()
    run.process.wait()
    for pid in family[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(is_dead, family)))


@pytest.fixture
def fake(start: Start) -> Start:
    """`fake(busy_seconds=1, …)` runs a launcher with the fake server."""

    def begin(*words: str, options: dict[str, Any] | None = None, **faults: Any) -> Run:
        port = free_port()
        command = fake_command(port, faults) + list(words)
        return start(command, port, **(options or {}))

    return begin


def fake_command(port: int, faults: dict[str, Any]) -> list[str]:
    return [sys.executable, str(FAKE), "--host", "127.0.0.1", "--port", str(port),
            "--journal", "JOURNAL", "--fake", json.dumps(faults)]  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that 400 tokens take a while, and the endless ones never come to an end."""
    folder = tmp_path_factory.mktemp("models")
    return gguf_factory.write_model(
        folder / "m.gguf", layers=6, embedding=128, vocabulary=2000, context=8192
    )


@pytest.fixture
def real(start: Start, llama_server: Engine, model: Path) -> Start:
    """`real("--api-key-file", …)` runs a launcher with the real server and waits until ready."""

    def begin(*words: str, port: int = 0, **options: Any) -> Run:
        port = port or free_port()
        command = [llama_server.path, "--model", str(model), "--host", "127.0.0.1",
                   "--port", str(port), "--parallel", "1", "--slots", "--metrics"]  # fmt: skip
        run = start([*command, *words], port, env=llama_server.environment, **options)
        eventually(lambda: run.process.poll() is not None or http(run, "GET", "/health") == 200)
        assert run.process.poll() is None, run.text()
        return run

    return begin


def http(run: Run, method: str, path: str, body: object = None) -> int:
    """The status of an answer; 0 where there is none."""
    connection = HTTPConnection("127.0.0.1", run.port, timeout=10)
    try:
        connection.request(method, path, json.dumps(body) if body else None)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@contextlib.contextmanager
def stream(run: Run, tokens: int, key: str = "-") -> Iterator[HTTPResponse]:
    """A completion under way, of which the first token has come."""
    connection = HTTPConnection("127.0.0.1", run.port, timeout=30)
    body = {"prompt": "the road", "n_predict": tokens, "stream": True, "cache_prompt": False}
    connection.request("POST", "/completion", json.dumps(body), {"Authorization": f"Bearer {key}"})
    response = connection.getresponse()
    try:
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        yield response
    finally:
        response.close()
        connection.close()


def tokens_of(response: HTTPResponse) -> tuple[int, bool]:
    """How many tokens came, the first included, and whether the stream was ended properly."""
    tokens, complete = 1, False
    for line in response:
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            tokens += not event["stop"]
            complete = complete or event["stop"]
    return tokens, complete


# --- a stop, with the real server ----------------------------------------------------------------


def test_an_idle_server_is_stopped_within_a_second_and_its_port_is_free_at_once(
    real: Start,
) -> None:
    run = real()
    family = run.family()
    assert run.stop() <= promised(1.0)
    assert run.process.returncode == 0
    said = run.said()
    assert (said["drained"], said["cut"], said["deadline_hit"]) == ("0", "0", "no")
    assert (said["signal"], said["drain_ended_by"], said["server"]) == ("TERM", "idle", "exit 0")
    assert all(map(is_gone, family))
    again = real(port=run.port)
    assert http(again, "GET", "/health") == 200


def test_an_attached_stream_gets_all_its_tokens(real: Start) -> None:
    run = real()
    with stream(run, 400) as response:
        run.process.send_signal(signal.SIGTERM)
        assert tokens_of(response) == (400, True)
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    said = run.said()
    assert (said["drained"], said["cut"], said["signal"]) == ("1", "0", "TERM")


def test_requests_that_wait_for_a_slot_are_drained_as_well(real: Start) -> None:
    run = real()
    with stream(run, 300) as first, contextlib.ExitStack() as queued:
        waiting = [_queue(run, queued, 100) for _ in range(2)]
        eventually(lambda: _gauge(run, "requests_deferred") == 2)
        run.process.send_signal(signal.SIGTERM)
        assert tokens_of(first) == (300, True)
        for connection in waiting:
            answer = json.loads(connection.getresponse().read())
            assert answer["tokens_predicted"] == 100
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    assert (run.said()["drained"], run.said()["cut"]) == ("3", "0")


def _queue(run: Run, queued: contextlib.ExitStack, tokens: int) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", run.port, timeout=30)
    queued.callback(connection.close)
    connection.request("POST", "/completion", json.dumps({"prompt": "a", "n_predict": tokens}))
    return connection


def _gauge(run: Run, name: str) -> float:
    connection = HTTPConnection("127.0.0.1", run.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return float(next(li for li in lines if li.startswith(f"llamacpp:{name} ")).split()[1])


def test_past_the_deadline_a_stream_is_cut_counted_and_does_not_hold_up_the_stop(
    real: Start, llama_server: Engine
) -> None:
    run = real(drain=0.2, term=0.6)
    with stream(run, _ENDLESS) as response:
        seconds = run.stop()
        tokens, complete = tokens_of(response)
    assert (tokens < _ENDLESS, complete) == (True, False)
    assert run.process.returncode == 0
    said = run.said()
    assert (said["drained"], said["deadline_hit"]) == ("0", "yes")
    assert said["cut"] in llama_server.cut_counts(1)
    assert 0.2 <= seconds <= promised(0.2 + 2 * 0.6 + 1)


def test_a_second_term_ends_the_drain(real: Start) -> None:
    run = real(drain=20, term=0.6)
    with stream(run, _ENDLESS):
        run.process.send_signal(signal.SIGTERM)
        assert run.stop(signal.SIGINT) <= promised(2 * 0.6 + 1)
    said = run.said()
    assert (said["deadline_hit"], said["drain_ended_by"]) == ("no", "asked-again")
    assert said["asked_by"] == "SIGTERM"


def test_a_half_sent_request_does_not_hold_up_the_stop(real: Start) -> None:
    run = real(term=0.6)
    with socket.create_connection(("127.0.0.1", run.port)) as client:
        client.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert run.stop() <= promised(3)
    assert run.process.returncode == 0


def test_a_key_file_opens_the_slots(real: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsesame\n")
    run = real("--api-key-file", str(keys))
    with stream(run, 300, "sesame") as response:
        run.process.send_signal(signal.SIGTERM)
        assert tokens_of(response) == (300, True)
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    assert (run.said()["drained"], run.said()["cut"]) == ("1", "0")


def test_a_sleeping_server_is_stopped_without_being_woken(real: Start) -> None:
    run = real("--sleep-idle-seconds", "1")

    def sleeps() -> bool:
        connection = HTTPConnection("127.0.0.1", run.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/props")
            return json.loads(connection.getresponse().read()).get("is_sleeping") is True

    eventually(sleeps)
    loads = run.text().count("load_model: loading model")
    assert run.stop() <= promised(1.0)
    assert run.said()["drain_ended_by"] == "asleep"
    assert run.text().count("load_model: loading model") == loads == 1


def test_a_frozen_server_is_not_waited_for_and_killed(real: Start) -> None:
    run = real(term=0.3)
    os.kill(run.server(), signal.SIGSTOP)
    assert run.stop() <= promised(2 * 1.0 + 2 * 0.3 + 2)
    assert run.process.returncode == 0
    assert (run.said()["signal"], run.said()["drain_ended_by"]) == ("KILL", "silent")


# --- a stop, with a server that has faults -------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_each_stop_signal_drains(fake: Start, number: signal.Signals) -> None:
    run = fake(busy_seconds=0.3).listening()
    assert 0.3 <= run.stop(number) <= promised(2)
    said = run.said()
    assert (said["drained"], said["asked_by"]) == ("1", number.name)
    assert run.noted("signal") == [["SIGTERM"]]


def test_what_ignores_term_is_asked_twice_and_killed(fake: Start) -> None:
    run = fake(ignores=["SIGTERM"], options={"term": 0.2}).listening()
    family = run.family()
    assert 0.4 <= run.stop() <= promised(2)
    assert run.process.returncode == 0
    assert run.noted("signal") == [["SIGTERM"], ["SIGTERM"]]
    assert (run.said()["signal"], run.said()["server"]) == ("KILL", "SIGKILL")
    assert all(map(is_gone, family))


@_linux_only
@pytest.mark.parametrize("kind", ["child", "session", "orphan"])
def test_what_the_server_forked_goes_with_it(fake: Start, kind: str) -> None:
    run = fake(forks=[kind]).listening()
    (forked,) = eventually(lambda: run.noted("forked"))
    assert run.stop() <= promised(2)
    assert run.process.returncode == 0
    assert is_gone(int(forked[0]))
    assert "left_behind" not in run.said()


@_linux_only
def test_what_a_crashed_server_forked_goes_with_it(fake: Start) -> None:
    run = fake(forks=["child", "session"]).listening()
    eventually(lambda: len(run.noted("forked")) == 2)
    os.kill(run.server(), signal.SIGKILL)
    assert run.process.wait(_PATIENCE_SECONDS) == 128 + signal.SIGKILL
    assert all(is_gone(int(words[0])) for words in run.noted("forked"))
    assert run.ours()[-1].startswith("ended by itself: server=SIGKILL, ")


@_linux_only
def test_orphans_of_a_running_server_leave_no_zombies(fake: Start) -> None:
    run = fake(forks=["orphan"]).listening()
    (forked,) = eventually(lambda: run.noted("forked"))
    eventually(lambda: psutil.Process(int(forked[0])).ppid() == run.pid)
    os.kill(int(forked[0]), signal.SIGKILL)
    eventually(lambda: is_gone(int(forked[0])))
    assert len(psutil.Process(run.pid).children()) == 1


@_linux_only
def test_children_that_were_there_before_are_not_touched(synapse_run: str, tmp_path: Path) -> None:
    """A shell that starts something and then becomes the launcher leaves it a child."""
    port = free_port()
    words = [word.replace("JOURNAL", str(tmp_path / "j")) for word in fake_command(port, {})]
    shell = f'sleep 60 & echo $! > {tmp_path}/stranger; exec "$0" -- "$@"'
    process = subprocess.Popen(["/bin/sh", "-c", shell, synapse_run, *words])
    run = Run(process, port, tmp_path / "log", tmp_path / "j").listening()
    stranger = int((tmp_path / "stranger").read_text())
    try:
        run.stop()
        assert process.returncode == 0
        assert psutil.Process(stranger).status() == psutil.STATUS_SLEEPING
    finally:
        os.kill(stranger, signal.SIGKILL)


DRAINS = {
    "loading": ({"status": {"/props": 503, "/slots": 503}}, "loading", ["/props"]),
    "asleep": ({"sleeping": True}, "asleep", ["/props"]),
    "an old build without is_sleeping": (
        {"status": {"/props": 404}}, "idle", ["/props", "/slots", "/metrics", "/slots", "/metrics"],
    ),
    "no slots": (
        {"status": {"/slots": 501}}, "idle", ["/props", "/slots", "/metrics", "/metrics"],
    ),
    "no metrics": (
        {"status": {"/metrics": 501}}, "idle", ["/props", "/slots", "/metrics", "/slots"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("faults", "ended_by", "asked"), DRAINS.values(), ids=DRAINS)
def test_only_what_tells_something_is_asked(
    fake: Start, faults: dict[str, Any], ended_by: str, asked: list[str]
) -> None:
    run = fake(**faults).listening()
    assert run.stop() <= promised(1)
    assert run.said()["drain_ended_by"] == ended_by
    assert run.asked() == asked


def test_where_slots_are_hidden_the_metrics_are_believed(fake: Start) -> None:
    run = fake(status={"/slots": 403}, busy_seconds=0.4, waiting=2).listening()
    assert 0.4 <= run.stop() <= promised(2)
    assert (run.said()["drained"], run.said()["cut"]) == ("3", "0")


@_linux_only
def test_where_nothing_is_told_open_connections_are_waited_for(fake: Start) -> None:
    run = fake(status={"/slots": 401, "/metrics": 401}).listening()
    with socket.create_connection(("127.0.0.1", run.port)):
        run.process.send_signal(signal.SIGTERM)
        eventually(lambda: "/metrics" in run.asked())
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(0.3)
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    assert (run.said()["drained"], run.said()["drain_ended_by"]) == ("1", "idle")


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "127.0.0.1"])  # noqa: S104
def test_a_server_is_asked_wherever_it_listens(fake: Start, host: str) -> None:
    """Also where it listens on all addresses."""
    if host == "localhost" and socket.getaddrinfo(host, 1)[0][0] != socket.AF_INET:
        pytest.skip("localhost is IPv6 here, and the fake is not")
    run = fake("--host", host, busy_seconds=0.2).listening()
    run.stop()
    assert (run.said()["drained"], run.said()["drain_ended_by"]) == ("1", "idle")


@_linux_only
def test_a_silent_server_that_computes_has_its_whole_time(fake: Start) -> None:
    """Some builds answer between two batches only."""
    run = fake(silent=True, spins=True, options={"drain": 2.6}).listening()
    assert 2.6 <= run.stop() <= promised(4)
    assert run.said()["drain_ended_by"] == "deadline"


def test_a_silent_server_is_given_up_after_two_tries(fake: Start) -> None:
    run = fake(silent=True).listening()
    assert 2 <= run.stop() <= promised(4)
    assert run.said()["drain_ended_by"] == "silent"
    assert len(run.noted("silent")) == 2


def test_a_signal_is_heeded_while_an_answer_is_awaited(fake: Start) -> None:
    run = fake(silent=True).listening()
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: run.noted("silent"))
    assert run.stop() <= promised(0.9)
    assert run.said()["drain_ended_by"] == "asked-again"


@pytest.mark.parametrize("how", ["flood", "trickle", "drip", "nested"])
def test_no_answer_holds_up_the_stop(fake: Start, how: str) -> None:
    """Each takes a second at most, and a mebibyte: the launcher stays small."""
    run = fake(hostile=how, options={"drain": 1.5}).listening()
    launched = psutil.Process(run.pid)
    run.process.send_signal(signal.SIGTERM)
    eventually(lambda: len(run.noted("hostile")) >= 2)
    if sys.platform == "linux":
        assert launched.memory_info().rss <= 20 * 2**20
    assert run.process.wait(5) == 0
    assert run.said()["server"] == "exit 0"


@_linux_only
def test_a_fault_on_our_side_is_not_taken_for_a_silent_server(fake: Start) -> None:
    """Without a descriptor for a question, nothing is known: the server has its whole time."""
    run = fake(busy_seconds=60, options={"drain": 0.8}).listening()
    highest = max(int(name) for name in os.listdir(f"/proc/{run.pid}/fd"))
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
    assert 0.8 <= run.stop() <= promised(2)
    assert (run.said()["drain_ended_by"], run.said()["cut"]) == ("deadline", "unknown")
    assert run.asked() == []


def test_other_signals_neither_shorten_a_drain_nor_change_the_status(fake: Start) -> None:
    """They interrupt a look, which is made again; the last ones come while the launcher exits."""
    run = fake(busy_seconds=1).listening()
    begin = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    while run.process.poll() is None and time.monotonic() < begin + 5:
        run.process.send_signal(signal.SIGUSR1)
        time.sleep(0 if ["SIGTERM"] in run.noted("signal") else 0.02)
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    assert time.monotonic() - begin >= 1
    assert (run.said()["drained"], run.said()["drain_ended_by"]) == ("1", "idle")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@_linux_only
def test_a_start_that_is_broken_off_leaves_nothing(start: Start, number: signal.Signals) -> None:
    """At whatever point of it the signal comes."""
    for step in range(16):
        mark = f"60.{os.getpid()}{step:02}"
        run = start(["/bin/sleep", mark], 0, env=os.environ | {"LLAMA_ARG_PORT": "0"}, drain=0)
        time.sleep(step * 0.004)  # not for a state: to spread the signals over the start
        run.process.send_signal(number)
        run.process.wait(_PATIENCE_SECONDS)
        eventually(partial(_none_runs_with, mark), 2)


def _none_runs_with(mark: str) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.cmdline():
                return False
    return True


def test_a_pipe_that_nobody_reads_does_not_hold_up_the_stop(
    synapse_run: str, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    port = free_port()
    words = [word.replace("JOURNAL", str(tmp_path / "j")) for word in fake_command(port, {})]
    process = subprocess.Popen(
        [synapse_run, "--", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=writer, process_group=0,
    )  # fmt: skip
    run = Run(process, port, tmp_path / "log", tmp_path / "j")
    try:
        run.listening()
        assert run.stop() <= promised(4)
        assert process.returncode == 0
    finally:
        _end(run)
        os.close(reader)
        os.close(writer)


def test_a_server_that_does_not_listen_is_not_waited_for(start: Start) -> None:
    port = free_port()
    run = start(["/bin/sleep", "60"], port, env=os.environ | {"LLAMA_ARG_PORT": str(port)})
    run.server()
    eventually(lambda: psutil.Process(run.server()).name() == "sleep")
    assert run.stop() <= promised(1)
    assert (run.said()["drain_ended_by"], run.said()["server"]) == ("refused", "SIGTERM")
    assert run.process.returncode == 0


# --- the end of others ---------------------------------------------------------------------------


@_linux_only
@pytest.mark.parametrize("frozen", [False, True])
def test_a_killed_launcher_takes_its_server_along(real: Start, frozen: bool) -> None:
    run = real()
    server = run.server()
    if frozen:
        os.kill(run.pid, signal.SIGSTOP)
    run.process.kill()
    run.process.wait()
    eventually(lambda: is_dead(server), 2)


PLAYER = """
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], process_group=0, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
print(child.pid, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def player(*command: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that plays supervisord, and the number of the launcher that it started."""
    words = [sys.executable, "-c", PLAYER, *command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, **options)
    assert process.stdout is not None
    with process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@_linux_only
def test_a_killed_supervisord_takes_all_along_after_a_drain(
    synapse_run: str, tmp_path: Path
) -> None:
    """Also though nobody reads any more what is printed."""
    port, journal = free_port(), tmp_path / "j"
    words = fake_command(port, {"busy_seconds": 0.5})
    words = [word.replace("JOURNAL", str(journal)) for word in words]
    with player(synapse_run, "--", *words) as (supervisord, pid):
        run = Run(supervisord, port, tmp_path / "log", journal).listening()
        (server, parent, group) = map(int, run.noted("started")[0])
        assert (parent, group) == (pid, pid)
        supervisord.kill()
        eventually(lambda: "/slots" in run.asked())
        assert not is_dead(server)
        eventually(lambda: is_dead(server) and is_dead(pid), 2)
        assert run.noted("signal") == [["SIGTERM"]]


@_linux_only
def test_a_supervisord_that_dies_during_a_start_leaves_nothing(synapse_run: str) -> None:
    """Also before the launcher could ask the kernel to be told."""
    environment = os.environ | {"LLAMA_ARG_PORT": "0", "SUPERVISOR_ENABLED": "1"}
    for step in range(16):
        mark = f"61.{os.getpid()}{step:02}"
        words = [synapse_run, "--drain=0", "--", "/bin/sleep", mark]
        with player(*words, env=environment, start_new_session=True) as (supervisord, pid):
            time.sleep(step * 0.004)  # not for a state: to spread the deaths over the start
            supervisord.kill()
            supervisord.wait()
            eventually(partial(is_dead, pid), 3)
            eventually(partial(_none_runs_with, mark), 3)


@_linux_only
def test_a_supervisord_that_dies_during_a_drain_does_not_shorten_it(
    synapse_run: str, tmp_path: Path
) -> None:
    port, journal = free_port(), tmp_path / "j"
    words = fake_command(port, {"busy_seconds": 0.8})
    words = [word.replace("JOURNAL", str(journal)) for word in words]
    with player(synapse_run, "--", *words) as (supervisord, pid):
        run = Run(supervisord, port, tmp_path / "log", journal).listening()
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "/slots" in run.asked())
        begin = time.monotonic()
        supervisord.kill()
        eventually(lambda: is_dead(pid), 3)
        assert time.monotonic() - begin >= 0.6


@_linux_only
def test_a_thread_that_ends_is_not_a_parent_that_dies(fake: Start) -> None:
    """The kernel reports both; only the process counts."""
    import threading

    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(fake(busy_seconds=0)))
    thread.start()
    run = eventually(lambda: runs)[0].listening()
    thread.join()
    os.kill(run.pid, signal.SIGUSR1)  # handled after the report of the thread's end
    eventually(lambda: run.noted("signal") == [["SIGUSR1"]])
    assert run.process.poll() is None
    assert run.asked() == []


ENDINGS = {
    "success": (0, 0, "exit 0"),
    "a failure": (1, 1, "exit 1"),
    "a status of its own": (75, 75, "exit 75"),
    "an abort": (-signal.SIGABRT, 134, "SIGABRT"),
    "a bus error": (-signal.SIGBUS, 135, "SIGBUS"),
    "a kill": (-signal.SIGKILL, 137, "SIGKILL"),
    "a TERM from elsewhere": (-signal.SIGTERM, 143, "SIGTERM"),
}


@pytest.mark.parametrize(("ends", "status", "server"), ENDINGS.values(), ids=ENDINGS)
def test_the_servers_ending_is_passed_on(fake: Start, ends: int, status: int, server: str) -> None:
    run = fake(ends=ends)
    assert run.process.wait(_PATIENCE_SECONDS) == status
    start, end = run.ours()
    assert start.startswith("start: ")
    assert end.startswith(f"ended by itself: server={server}, seconds=")


def test_an_engine_for_another_processor_is_called_that(fake: Start) -> None:
    run = fake(ends=-signal.SIGILL)
    assert run.process.wait(_PATIENCE_SECONDS) == 128 + signal.SIGILL
    assert "engine built for a newer processor" in run.ours()[-1]


def test_a_run_begins_and_ends_with_a_line_of_its_own(fake: Start) -> None:
    """Also after what the server, or the run before, left unfinished: a reader can cut there."""
    run = fake(ends=1, prints="loading the model ...")
    assert run.process.wait(_PATIENCE_SECONDS) == 1
    first, *_, last = [line for line in run.text().splitlines() if line]
    begin = re.fullmatch(r"synapse-run: start: pid=(\d+), at=[-0-9]{10}T[:0-9]{8}Z", first)
    assert begin
    assert int(begin[1]) == run.pid
    assert run.text().startswith("\n")
    assert "loading the model ...\n" in run.text()
    assert last.startswith("synapse-run: ended by itself: server=exit 1, seconds=")


def test_a_failed_load_of_the_real_server_is_passed_on(
    start: Start, llama_server: Engine, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    said = []
    for _ in range(3):  # its log has a thread that does not always come to it before the end
        port = free_port()
        command = [llama_server.path, "--model", str(broken), "--port", str(port)]
        run = start(command, port, env=llama_server.environment)
        assert run.process.wait(_PATIENCE_SECONDS) == 1
        said.append(run.text())
    assert any("failed to read magic" in text or "invalid magic" in text for text in said)


# --- the start -----------------------------------------------------------------------------------


REFUSALS = {
    "missing model": (["--model", "/nowhere/m.gguf"], "'/nowhere/m.gguf': No such file"),
    "missing projector": (["--mmproj", "/nowhere/p.gguf"], "'/nowhere/p.gguf': No such file"),
    "a folder for a model": (["-m", "/"], "'/': not a file"),
}


@pytest.mark.parametrize(("words", "line"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused_before_the_start(
    fake: Start, words: list[str], line: str
) -> None:
    run = fake(*words)
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_MODEL_MISSING
    start, refusal = run.ours()
    assert start.startswith(f"start: pid={run.pid}, ")
    assert refusal.startswith(f"cannot serve {line}")
    assert run.noted("started") == []


BROKEN_ENGINES = {
    "missing": (None, 0o700, "No such file or directory"),
    "not executable": (b"#!/bin/sh\n", 0o600, "Permission denied"),
    "not a program": (b"\x7fELF but not really", 0o700, "Exec format error"),
    "for an interpreter that is missing": (b"#!/nowhere\n", 0o700, "No such file or directory"),
}


@pytest.mark.parametrize(("text", "mode", "why"), BROKEN_ENGINES.values(), ids=BROKEN_ENGINES)
def test_an_engine_that_cannot_run_is_named(
    start: Start, tmp_path: Path, text: bytes | None, mode: int, why: str
) -> None:
    engine = tmp_path / "llama-server\n"
    if text is not None:
        engine.write_bytes(text)
        engine.chmod(mode)
    run = start([str(engine)], 0)
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_ENGINE_MISSING == os.EX_OSFILE
    name = str(engine).replace("\n", "\\n")
    assert run.ours()[1] == f"cannot run '{name}': {why}"


def test_an_engine_is_found_on_the_path(start: Start) -> None:
    run = start(["true"], 0)
    assert run.process.wait(_PATIENCE_SECONDS) == 0


def test_a_port_that_another_server_holds_is_refused(real: Start, fake: Start) -> None:
    holder = real()
    port = str(holder.port)
    run = fake("--port", port)
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_PORT_IN_USE
    assert f"cannot listen on 127.0.0.1:{port}: already in use" in run.text()
    if sys.platform == "linux":
        assert f"by pid {holder.server()} ('llama-server')" in run.text()
    assert run.noted("started") == []
    assert http(holder, "GET", "/health") == 200


def test_bad_usage_is_refused(synapse_run: str) -> None:
    done = subprocess.run([synapse_run, "--dry"], capture_output=True, text=True, check=False)
    assert done.returncode == launcher.EXIT_USAGE
    start, refusal = done.stderr.strip().splitlines()
    assert start.startswith("synapse-run: start: pid=")
    assert refusal.startswith("synapse-run: unknown option '--dry'; usage: synapse-run ")


def test_the_server_gets_exactly_what_it_was_given(fake: Start) -> None:
    words = ["", "a b", "$HOME", "--drain", "ü", "'\"\\"]
    run = fake(*words, options={"env": {**os.environ, "OURS": "x"}}).listening()
    argv = json.loads(" ".join(run.noted("argv")[0]))
    assert argv[-len(words) :] == words
    environment = json.loads(" ".join(run.noted("environment")[0]))
    assert (environment["OURS"], environment["GGML_NO_BACKTRACE"]) == ("x", "1")
    assert "the fake speaks" in run.text()
    # Python's own: it ignores these two by itself, as soon as it starts.
    assert set(run.noted("ignoring")[0]) - {"SIGPIPE", "SIGXFSZ", "SIGXFZ"} == set()
    assert run.noted("blocking") == [[]]
    assert _ignored_by(run.server()) == _ignored_by(os.getpid())


def _ignored_by(pid: int) -> str:
    status = Path(f"/proc/{pid}/status")
    text = status.read_text() if status.exists() else ""
    return next((line for line in text.splitlines() if line.startswith("SigIgn")), "")


def test_a_backtrace_is_made_where_asked_for(fake: Start) -> None:
    run = fake(options={"env": {**os.environ, "GGML_NO_BACKTRACE": "0"}}).listening()
    environment = json.loads(" ".join(run.noted("environment")[0]))
    assert environment["GGML_NO_BACKTRACE"] == "0"


@_linux_only
@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_a_closed_stream_is_not_replaced_by_whatever_is_opened_next(
    fake: Start, closed: tuple[int, ...]
) -> None:
    """The server would write its log into its model or a connection."""

    def close() -> None:
        for fd in closed:
            os.close(fd)

    run = fake(options={"preexec_fn": close}).listening()
    for pid in (run.pid, run.server()):
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in closed] == [os.devnull] * len(closed)
    assert run.stop() <= promised(2)
    assert run.process.returncode == 0


@_linux_only
@pytest.mark.skipif(os.geteuid() == 0, reason="root may have as many processes as it likes")
def test_too_many_processes_are_reported_in_one_line(fake: Start) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    run = fake(options={"preexec_fn": limit})
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_OS_ERROR
    assert run.ours()[1:] == ["cannot make a process: Resource temporarily unavailable"]
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("group", [0, None])
def test_launcher_and_server_have_a_group_of_their_own(fake: Start, group: int | None) -> None:
    """Started as a group's leader, or in a group with others: killing it hits nobody else."""
    run = fake(options={"process_group": group}).listening()
    assert os.getpgid(run.pid) == run.pid
    assert run.noted("started") == [[str(run.server()), str(run.pid), str(run.pid)]]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_are_passed_on(fake: Start, number: signal.Signals) -> None:
    run = fake().listening()
    run.process.send_signal(number)
    eventually(lambda: run.noted("signal") == [[number.name]])
    assert run.process.poll() is None


def test_a_hangup_that_was_ignored_stays_ignored(fake: Start) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = fake(options={"preexec_fn": ignore}).listening()
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGUSR1)
    eventually(lambda: run.noted("signal"))
    assert run.noted("signal") == [["SIGUSR1"]]
    assert "SIGHUP" in run.noted("ignoring")[0]


# --- what an earlier run left behind -------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "our model.run"


@pytest.fixture
def wrapper(tmp_path: Path) -> str:
    """A script that stands between the launcher and the server, and does not exec it."""
    script = tmp_path / "wrapper.sh"
    script.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    script.chmod(0o755)
    return str(script)


def orphaned(run: Run) -> int:
    """Kill the launcher; the pid of the server that its wrapper leaves behind."""
    ((server, *_),) = run.listening().noted("started")
    run.process.kill()
    run.process.wait(_PATIENCE_SECONDS)
    eventually(lambda: _parent_is_gone(int(server), run.pid))
    return int(server)


def _parent_is_gone(pid: int, launcher_pid: int) -> bool:
    """The wrapper died with the launcher, and the orphan lives."""
    above = psutil.Process(psutil.Process(pid).ppid())
    return launcher_pid not in (above.pid, above.ppid()) and above.name() != "wrapper.sh"


@_linux_only
def test_an_orphan_of_this_model_is_ended_by_its_next_run(
    start: Start, record: Path, wrapper: str
) -> None:
    """The port is the proof: with the orphan on it the next run could not start."""
    port = free_port()
    command = [wrapper, *fake_command(port, {"ignores": ["SIGTERM", "SIGINT"]})]
    server = orphaned(start(command, port, record=record))
    assert not is_dead(server)
    run = start(fake_command(port, {}), port, record=record).listening()
    assert is_dead(server)
    said = f"ended pid {server}, which an earlier run had left behind"
    assert said in run.ours()
    assert record.read_text().split()[0] == str(run.pid)
    run.stop()
    assert not record.exists()


@_linux_only
def test_an_orphan_that_is_frozen_is_ended_as_well(
    start: Start, record: Path, wrapper: str
) -> None:
    port = free_port()
    server = orphaned(start([wrapper, *fake_command(port, {})], port, record=record))
    os.kill(server, signal.SIGSTOP)
    run = start(fake_command(port, {}), port, record=record).listening()
    assert is_dead(server)
    run.stop()


@_linux_only
def test_an_orphan_of_the_real_server_is_ended(
    start: Start, record: Path, wrapper: str, llama_server: Engine, model: Path
) -> None:
    port = free_port()
    command = [llama_server.path, "--model", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--parallel", "1"]  # fmt: skip
    first = start([wrapper, *command], port, record=record, env=llama_server.environment)
    eventually(lambda: http(first, "GET", "/health") == 200)
    (server,) = (p.pid for p in psutil.Process(first.pid).children(recursive=True)
                 if p.name() != "wrapper.sh")  # fmt: skip
    first.process.kill()
    first.process.wait(_PATIENCE_SECONDS)
    assert http(first, "GET", "/health") == 200
    second = start(command, port, record=record, env=llama_server.environment)
    eventually(lambda: is_dead(server) and http(second, "GET", "/health") == 200)
    assert second.process.poll() is None, second.text()
    second.stop()
    assert not record.exists()


@_linux_only
def test_another_models_orphan_is_not_touched(
    start: Start, record: Path, tmp_path: Path, wrapper: str
) -> None:
    """Even where the record of this model names the run that it belonged to."""
    port = free_port()
    first = start([wrapper, *fake_command(port, {})], port, record=tmp_path / "other.run")
    server = orphaned(first)
    shutil.copy(tmp_path / "other.run", record)
    try:
        run = start(fake_command(free_port(), {}), 0, record=record).listening()
        run.stop()
        assert not is_dead(server)
    finally:
        os.kill(server, signal.SIGKILL)


@_linux_only
def test_a_stranger_in_the_same_group_is_not_touched(
    start: Start, record: Path, wrapper: str
) -> None:
    """A process without our mark: nobody knows whose it is."""
    first = start([wrapper, *fake_command(port := free_port(), {})], port, record=record)
    ((_server, *_),) = first.listening().noted("started")
    with subprocess.Popen(["/bin/sleep", "60"], process_group=first.pid) as stranger:
        try:
            server = orphaned(first)
            start(fake_command(port, {}), port, record=record).listening().stop()
            assert is_dead(server)
            assert stranger.poll() is None
        finally:
            stranger.kill()


@_linux_only
def test_a_run_that_lives_is_not_touched_and_its_record_not_taken_away(
    fake: Start, record: Path
) -> None:
    """One whose supervisord died drains on; the next on another port leaves it alone."""
    first = fake(options={"record": record}).listening()
    second = fake(options={"record": record}).listening()
    assert first.process.poll() is None
    first.stop()
    assert record.read_text().split()[0] == str(second.pid)
    second.stop()
    assert not record.exists()


@_linux_only
def test_a_number_that_is_someone_elses_by_now_ends_nobody(fake: Start, record: Path) -> None:
    """The record names a process that lives, even with our mark, and began at another time."""
    marked = os.environ | {"SYNAPSE_RECORD": str(record)}
    with subprocess.Popen(["/bin/sleep", "60"], env=marked, process_group=0) as other:
        try:
            record.write_text(f"{other.pid} 1\n")
            fake(options={"record": record}).listening().stop()
            assert other.poll() is None
        finally:
            other.kill()


@_linux_only
@pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of other users")
def test_another_users_process_is_not_touched(fake: Start, record: Path) -> None:
    """Although it carries the mark and stands in the group: a mark can be forged."""
    marked = os.environ | {"SYNAPSE_RECORD": str(record)}
    with subprocess.Popen(["/bin/sleep", "60"], process_group=0) as leader:
        other = subprocess.Popen(
            ["/bin/sleep", "60"], env=marked, process_group=leader.pid, user=65534
        )
        leader.kill()
    try:
        record.write_text(f"{leader.pid} 1\n")
        fake(options={"record": record}).listening().stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "x", "1 1", "0 0", "-1 1", "9" * 500, "\0\0 \0"], ids=ascii)
def test_a_record_that_is_torn_or_hostile_holds_up_no_start(
    fake: Start, record: Path, text: str
) -> None:
    record.write_text(text)
    run = fake(options={"record": record}).listening()
    assert record.read_text().split()[0] == str(run.pid)
    run.stop()
    assert not record.exists()


@pytest.mark.parametrize("ends", [0, 1, -signal.SIGSEGV])
def test_an_end_by_itself_removes_the_record_too(fake: Start, record: Path, ends: int) -> None:
    """Whatever the server left has been ended with it."""
    run = fake(ends=ends, options={"record": record})
    run.process.wait(_PATIENCE_SECONDS)
    assert list(record.parent.glob("*.run*")) == []


def test_a_start_that_is_refused_leaves_no_record(fake: Start, record: Path) -> None:
    run = fake("--model", "/nowhere/m.gguf", options={"record": record})
    assert run.process.wait(_PATIENCE_SECONDS) == 66
    assert not record.exists()


def test_a_server_is_marked_only_where_a_record_is_kept(fake: Start, record: Path) -> None:
    kept, bare = fake(options={"record": record}).listening(), fake().listening()
    marks = [json.loads(" ".join(run.noted("environment")[0])).get("SYNAPSE_RECORD")
             for run in (kept, bare)]  # fmt: skip
    assert marks == [str(record), None]


# --- the gateway in front ------------------------------------------------------------------------

STAT = "# pxname,svname,scur\nmodel,model,{}\n"


@pytest.fixture
def front() -> Iterator[Front]:
    """A gateway's runtime socket that is played."""
    with fronting() as found:
        yield found


def behind(front: Front, fake: Start, *words: str, **faults: Any) -> Run:
    kept = {"record": front.ledger.with_name("model.run"), "ledger": front.ledger, "drain": 20}
    return fake(*words, options=kept, **faults).listening()


def test_a_stop_takes_the_model_out_first_and_waits_for_what_the_gateway_has_passed_on(
    fake: Start, front: Front
) -> None:
    """The server itself knows of nothing yet."""
    front.answers["show stat"] = STAT.format(2).encode()
    run = behind(front, fake)
    eventually(lambda: front.asked)
    assert "state ready" in front.asked.pop()
    run.process.terminate()
    eventually(lambda: sum("show stat" in asked for asked in front.asked) > 3)
    assert front.asked[0] == "set server model/model state drain"
    assert run.process.poll() is None
    front.answers["show stat"] = STAT.format(0).encode()
    assert run.process.wait(_PATIENCE_SECONDS) == 0
    said = run.said()
    assert (said["drained"], said["cut"], said["deadline_hit"]) == ("2", "0", "no")


def test_a_gateway_that_hangs_does_not_hold_up_the_stop(fake: Start, front: Front) -> None:
    front.hangs = True
    run = behind(front, fake)
    assert run.stop() < promised(4)
    assert run.said()["deadline_hit"] == "no"


# --- memory, by the listener's word --------------------------------------------------------------

MIB = 2**20
BIG = Entry(admitted=False, needs={"CUDA0": 900 * MIB}, could_stop="a (500 MiB), b (200 MiB)")
FITTING = Entry(admitted=False, needs={"CUDA0": 200 * MIB})


@dataclass(frozen=True)
class Listener:
    """Plays the listener, whose word stands in a file, and supervisord: models start by name."""

    folder: Path
    fake: Start

    @property
    def file(self) -> Path:
        return self.folder / "ledger.json"

    def says(self, models: dict[str, Entry], **changes: Any) -> None:
        """300 MiB are left, and this very process says so."""
        said = Ledger(ledgers.process_of(os.getpid()), {"CUDA0": 300 * MIB}, models=models)
        ledgers.save(self.file, replace(said, **changes))

    def starts(self, name: str, **options: Any) -> Run:
        kept = {"record": self.folder / f"{name}.run", "ledger": self.file}
        return self.fake(options=kept | options)

    def claims(self) -> list[dict[str, Any]]:
        claims: list[dict[str, Any]] = json.loads((self.folder / "ledger.json.claims").read_text())
        return claims

    def beside(self) -> set[str]:
        """What the launchers have left beside the ledger."""
        found = {path.name.removeprefix("ledger.json") for path in self.folder.iterdir()}
        return {name for name in found if name and not name.endswith(".run")}


@pytest.fixture
def listener(tmp_path: Path, fake: Start) -> Listener:
    folder = tmp_path / "run"
    folder.mkdir(0o700)
    return Listener(folder, fake)


def assert_refused(run: Run) -> str:
    """Nothing was started; the line about it."""
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_NO_MEMORY == os.EX_UNAVAILABLE
    _start, line = run.ours()
    assert run.noted("started") == []
    return line


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_could_be_stopped(
    listener: Listener,
) -> None:
    listener.says({"big": BIG})
    assert assert_refused(listener.starts("big")) == (
        "big does not fit: needs 900 MiB on CUDA0, 300 MiB left; "
        "could be stopped: a (500 MiB), b (200 MiB)"
    )
    assert listener.beside() == {".lock"}
    assert not (listener.folder / "big.run").exists()


def test_what_cannot_work_anyway_is_told_before_its_memory_is(listener: Listener) -> None:
    listener.says({"big": BIG})
    kept = {"record": listener.folder / "big.run", "ledger": listener.file}
    run = listener.fake("--model", "/nowhere/m.gguf", options=kept)
    assert run.process.wait(_PATIENCE_SECONDS) == launcher.EXIT_MODEL_MISSING


@pytest.mark.parametrize("name", ["admitted", "unknown"])
def test_what_the_listener_admitted_or_does_not_know_goes_ahead(
    listener: Listener, name: str
) -> None:
    listener.says({"admitted": replace(BIG, admitted=True), "big": BIG})
    listener.starts(name).listening()
    assert listener.beside() == set()


def test_what_fits_is_claimed_in_the_name_of_the_launcher(listener: Listener) -> None:
    """By the number that supervisord has for it, so that the listener knows whom it counts."""
    listener.says({"fitting": FITTING})
    run = listener.starts("fitting").listening()
    needs, started = {"CUDA0": 200 * MIB}, launcher.ticks_of(run.pid)
    assert listener.claims() == [{"pid": run.pid, "started": started, "needs": needs}]
    assert listener.beside() == {".lock", ".claims"}
    assert len(run.family()) == 2
    if sys.platform == "linux":
        files = [os.readlink(path) for path in Path(f"/proc/{run.pid}/fd").iterdir()]
        assert [file for file in files if file.startswith(str(listener.folder))] == []


@_linux_only
@pytest.mark.parametrize("kind", ["ended", "another of its number"])
def test_the_word_of_a_listener_that_has_ended_keeps_nothing_from_starting(
    listener: Listener, kind: str
) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        gone = ledgers.process_of(process.pid)
        process.kill()
    ours = ledgers.process_of(os.getpid())
    dead = gone if kind == "ended" else Process(ours.pid, ours.started + 1)
    listener.says({"big": BIG}, listener=dead)
    listener.starts("big").listening()
    assert listener.beside() == set()


@pytest.mark.parametrize("kind", ["no file", "torn", "empty", "unreadable", "of another version"])
def test_without_a_word_that_makes_sense_a_start_goes_ahead(listener: Listener, kind: str) -> None:
    listener.says({"big": BIG})
    text = listener.file.read_text()
    match kind:
        case "no file":
            ledgers.remove(listener.file)
        case "torn":
            listener.file.write_text(text[: len(text) // 2])
        case "empty":
            listener.file.write_text("")
        case "unreadable":
            listener.file.unlink()
            listener.file.mkdir()
        case _:
            listener.file.write_text(text.replace('"version":1', '"version":2'))
    listener.starts("big").listening()
    assert listener.beside() == set()


def test_of_several_started_by_hand_at_once_only_as_many_start_as_fit(listener: Listener) -> None:
    names = ["one", "two", "three"]
    listener.says(dict.fromkeys(names, FITTING))
    for _ in range(5):
        runs = [listener.starts(name) for name in names]
        eventually(lambda runs=runs: _have_settled(runs))
        (started,) = [run for run in runs if run.process.poll() is None]
        lines = [assert_refused(run) for run in runs if run is not started]
        assert all(line.endswith("needs 200 MiB on CUDA0, 100 MiB left") for line in lines)
        started.stop()


def _have_settled(runs: list[Run]) -> bool:
    """Each either serves or has ended."""
    return all(run.process.poll() is not None or run.noted("listening") for run in runs)


def test_the_claim_of_a_launcher_that_was_killed_does_not_count(listener: Listener) -> None:
    listener.says({"one": FITTING, "two": FITTING})
    first = listener.starts("one").listening()
    assert_refused(listener.starts("two"))
    first.process.kill()
    first.process.wait(_PATIENCE_SECONDS)
    second = listener.starts("two").listening()
    assert [claim["pid"] for claim in listener.claims()] == [second.pid]


def test_what_the_listener_has_counted_is_not_taken_off_twice(listener: Listener) -> None:
    """Its room knows of that model by now."""
    listener.says({"one": FITTING, "two": FITTING})
    first = listener.starts("one").listening()
    listener.says({"two": FITTING}, counted=(ledgers.process_of(first.pid),))
    second = listener.starts("two").listening()
    assert {claim["pid"] for claim in listener.claims()} == {first.pid, second.pid}


def test_a_model_stopped_and_started_again_by_hand_finds_its_memory(listener: Listener) -> None:
    listener.says({"one": FITTING})
    for _ in range(3):
        run = listener.starts("one").listening()
        assert [claim["pid"] for claim in listener.claims()] == [run.pid]
        run.stop()


def test_whoever_does_not_let_go_of_the_lock_holds_up_a_start_for_a_second(
    listener: Listener,
) -> None:
    listener.says({"big": BIG})
    with (listener.folder / "ledger.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin = time.monotonic()
        listener.starts("big").listening()
        assert 1 <= time.monotonic() - begin <= promised(3)
    assert listener.beside() == {".lock"}


@_linux_only
def test_the_word_that_counts_is_the_one_given_while_the_lock_was_waited_for(
    listener: Listener,
) -> None:
    listener.says({"fitting": FITTING})
    path = listener.folder / "ledger.json.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = listener.starts("fitting")
        eventually(lambda: str(path) in launcher._open_files(run.pid), 0.9)
        listener.says({"fitting": FITTING}, room={"CUDA0": 100 * MIB})
    assert assert_refused(run).endswith("needs 200 MiB on CUDA0, 100 MiB left")


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "pipe", "a second name"])
@pytest.mark.parametrize("place", [".lock", ".claims", ".claims.new"])
def test_nothing_put_in_the_way_is_written_to_or_holds_up_a_start(
    listener: Listener, tmp_path: Path, place: str, kind: str
) -> None:
    listener.says({"fitting": FITTING})
    other, trap = tmp_path / "other", Path(f"{listener.file}{place}")
    match kind:
        case "link":
            other.write_text("not ours")
            trap.symlink_to(other)
        case "link to nothing":
            trap.symlink_to(other)
        case "folder":
            trap.mkdir()
        case "pipe":
            os.mkfifo(trap)
        case _:
            other.write_text("not ours")
            os.link(other, trap)
    begin = time.monotonic()
    listener.starts("fitting").listening()
    assert time.monotonic() - begin <= promised(2)
    assert other.exists() is (kind in ("link", "a second name"))
    if other.exists():
        assert other.read_text() == "not ours"


def test_lock_and_claims_are_for_their_owner_alone(listener: Listener) -> None:
    """Whatever the launcher inherits as its mask."""
    listener.says({"fitting": FITTING})
    listener.starts("fitting", umask=0).listening()
    modes = {f"{path.name}": path.stat().st_mode & 0o777 for path in listener.folder.iterdir()
             if path.name.startswith("ledger")}  # fmt: skip
    assert modes == dict.fromkeys(
        ["ledger.json", "ledger.json.lock", "ledger.json.claims"], 0o600
    )  # fmt: skip


def test_claims_that_are_torn_or_hostile_are_begun_anew(listener: Listener) -> None:
    listener.says({"fitting": FITTING})
    claims = listener.folder / "ledger.json.claims"
    needs = {"CUDA0": -(2**40)}  # would make room
    alive = ledgers.process_of(os.getpid())
    hostile = json.dumps([{"pid": alive.pid, "started": alive.started, "needs": needs}, 7])
    for text in ("[{", "{}", "[" * 100_000, hostile):
        claims.write_text(text)
        run = listener.starts("fitting").listening()
        assert [claim["pid"] for claim in listener.claims()] == [run.pid]
        run.stop()


def test_no_control_character_of_the_ledger_gets_into_the_log(listener: Listener) -> None:
    evil = "\x1b[2J\r\n\u202e\x00"
    entry = Entry(admitted=False, needs={f"CUDA0{evil}": 900 * MIB}, could_stop=f"a{evil}")
    listener.says({f"b{evil[:-1]}": entry}, room={f"CUDA0{evil}": 300 * MIB})
    run = listener.starts(f"b{evil[:-1]}")
    assert assert_refused(run) == (
        "b?[2J??? does not fit: needs 900 MiB on CUDA0?[2J????, 300 MiB left; "
        "could be stopped: a?[2J????"
    )
    text = run.log.read_text("ascii")
    assert text.replace("\n", "").isprintable()


# --- what it costs -------------------------------------------------------------------------------


@pytest.fixture
def full_ledger(listener: Listener) -> Listener:
    """Of 200 models on 8 devices, and as many launchers counted."""
    room = {f"CUDA{number}": 10**12 for number in range(8)}
    stop = "some-model (500 MiB), some-other-model (1200 MiB)"
    entry = Entry(admitted=False, needs=dict.fromkeys(room, 10**9), could_stop=stop)
    models = {f"a-model-of-the-fleet-{number}": entry for number in range(199)}
    counted = tuple(Process(number, 10**6) for number in range(1, 200))
    listener.says(models | {"fitting": entry}, room=room, counted=counted)
    return listener


@_linux_only
def test_a_launcher_that_asked_a_large_ledger_is_small(full_ledger: Listener) -> None:
    run = full_ledger.starts("fitting").listening()
    mebibytes = psutil.Process(run.pid).memory_info().rss / 2**20
    size = full_ledger.file.stat().st_size / 2**10
    print(f"launcher: {mebibytes:.1f} MiB after a ledger of {size:.0f} KiB")
    assert mebibytes <= 15


@pytest.mark.skipif(sys.platform != "linux", reason="date(1) tells no nanoseconds elsewhere")
def test_a_ledger_costs_a_start_only_a_few_milliseconds(
    synapse_run: str, full_ledger: Listener, record: Path
) -> None:
    """Read twice, of 200 models, with the claim written; side by side with a start without."""
    bare, without, asked = [], [], []
    fitting = ["--record", str(full_ledger.folder / "fitting.run"), "--ledger"]
    for _ in range(15):
        bare.append(_seconds_until_run(synapse_run, *fitting[:2], "--"))
        without.append(_seconds_until_run(synapse_run, *fitting, str(record), "--"))
        asked.append(_seconds_until_run(synapse_run, *fitting, str(full_ledger.file), "--"))
    added = [1000 * (statistics.median(x) - statistics.median(bare)) for x in (without, asked)]
    print(f"a ledger adds {added[1]:.1f} ms to a start, {added[0]:.1f} ms where there is none")
    assert max(added) < 50


@_linux_only
def test_it_is_small_and_sleeps_while_it_waits(real: Start) -> None:
    run = real()
    launched = psutil.Process(run.pid)
    mebibytes = launched.memory_info().rss / 2**20
    before = launched.num_ctx_switches().voluntary
    time.sleep(0.5)  # not for a state: to see that nothing happens
    switches = launched.num_ctx_switches().voluntary - before
    print(f"launcher: {mebibytes:.1f} MiB, {switches} wake-ups in 0.5 s")
    assert mebibytes <= 15
    assert switches == 0
    assert len(os.listdir(f"/proc/{run.pid}/fd")) <= 6


@pytest.mark.skipif(sys.platform != "linux", reason="date(1) tells no nanoseconds elsewhere")
def test_what_it_adds_to_a_start_is_printed(synapse_run: str) -> None:
    """Side by side with the same program started directly; asserted only against nonsense."""
    bare, launched = [], []
    for _ in range(10):
        bare.append(_seconds_until_run())
        launched.append(_seconds_until_run(synapse_run, "--"))
    before, after = statistics.median(bare), statistics.median(launched)
    print(f"until a program runs: {before * 1000:.1f} ms alone, {after * 1000:.1f} ms launched,"
          f" {(after - before) * 1000:.1f} ms added")  # fmt: skip
    assert after - before < 1


@pytest.mark.skipif(sys.platform != "linux", reason="date(1) tells no nanoseconds elsewhere")
def test_a_record_costs_a_start_only_a_few_milliseconds(synapse_run: str, record: Path) -> None:
    """Also where one of a run that was killed is found, and looked after."""
    bare, kept, found = [], [], []
    for _ in range(15):
        bare.append(_seconds_until_run(synapse_run, "--"))
        kept.append(_seconds_until_run(synapse_run, "--record", str(record), "--"))
        record.write_text(f"{2**22 + 7} 5\n")
        found.append(_seconds_until_run(synapse_run, "--record", str(record), "--"))
    added = [1000 * (statistics.median(x) - statistics.median(bare)) for x in (kept, found)]
    print(f"a record adds {added[0]:.1f} ms to a start, {added[1]:.1f} ms where one is found")
    assert max(added) < 30


def _seconds_until_run(*launcher_words: str) -> float:
    """From just before the start to what the started `date` sees on the clock."""
    command = [*launcher_words, "/bin/date", "+%s.%N"]
    environment = os.environ | {"LLAMA_ARG_PORT": "0", "PYTHONDONTWRITEBYTECODE": ""}
    begin = time.time()
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    return float(done.stdout) - begin
