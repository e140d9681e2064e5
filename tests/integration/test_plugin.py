"""The plugin and the adapter on a real supervisord, with the configuration that init lays down.

The listener is switched off in it, so that a test is the one who publishes. A program that takes
its time to end stands for a model.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor_synapse.adapters.supervisord import Fault, Refused, Supervisord
from supervisor_synapse.core.model import Phase, ProcessState, Row, Snapshot
from supervisor_synapse.errors import ShuttingDown, TransientError
from tests.integration.harness import BIN, Deployment, deployed, http, wait_until
from tests.ports import free_ports
from tests.unit.builders import MIB, row

MODELS = ("m0", "m1", "m2", "m3", "m4")
DRAIN_SECONDS = 1.0
LOGIN = ("synapse", "secret")

_INET = """
[inet_http_server]
port=127.0.0.1:{port}
username=synapse
password=secret
"""
_BLOCK = """[program:{name}]
command={command}
autostart=false
autorestart=false
startsecs=0
exitcodes=0
stopwaitsecs=20
redirect_stderr=true
stdout_logfile={log}/{name}.log
"""
# Named as the launcher is; ends so long after TERM as it is told.
_LAUNCHER = """
import signal, sys, time
def drain(number, frame):
    time.sleep(float(sys.argv[1]))
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("started", flush=True)
while True:
    signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A deployment whose supervisord runs, with a client of it."""

    at: Deployment
    rpc: Supervisord
    url: str

    def block(self, name: str, drain_seconds: float = DRAIN_SECONDS, **lines: str) -> Path:
        """Write a program block; `command` and further lines may be other than usual."""
        launcher = self.at.root / "synapse-run"
        command = lines.pop("command", f"{sys.executable} -S {launcher} {drain_seconds}")
        text = _BLOCK.format(name=name, command=command, log=self.at.log)
        path = self.at.conf_d / f"{name}.conf"
        path.write_text(text + "".join(f"{key}={value}\n" for key, value in lines.items()))
        return path

    def start(self, *names: str) -> None:
        """Start programs, and wait until each has set its signals."""
        for name in names:
            self.rpc.start(name)
        for name in names:
            log = self.at.log / f"{name}.log"
            wait_until(lambda log=log: log.exists() and "started" in log.read_text(), 10, name)

    def wait_for(self, name: str, state: ProcessState) -> None:
        def reached() -> bool:
            process = self.rpc.process(name)
            return process is not None and process.state is state

        wait_until(reached, 10, f"{name} {state.name}")

    def publish(self, *rows: Row) -> None:
        self.rpc.publish(Snapshot(time.time(), rows))

    def post(self, body: bytes) -> tuple[int, bytes]:
        """What supervisord answers to a body, over its unix socket."""
        with contextlib.closing(_connection(self.at)) as connection:
            connection.request("POST", "/RPC2", body, {"Content-Type": "text/xml"})
            try:
                response = connection.getresponse()
            except ConnectionError:  # what is no text at all ends the connection
                return 400, b""
            return response.status, response.read()


def _connection(at: Deployment) -> Any:
    from supervisor.xmlrpc import UnixStreamHTTPConnection

    connection = UnixStreamHTTPConnection("localhost", timeout=10)
    connection.socketfile = str(at.prefix / "var" / "run" / "supervisor.sock")
    return connection


@contextlib.contextmanager
def staged() -> Iterator[Stage]:
    with deployed() as at:
        at.synapse("init")
        port = free_ports(1)
        main = at.etc / "supervisord.conf"
        text = main.read_text()
        quiet = text.replace("autostart=true\nautorestart=true", "autostart=false")
        assert quiet != text
        main.write_text(quiet + _INET.format(port=port))
        (at.root / "synapse-run").write_text(_LAUNCHER)
        socket = at.prefix / "var" / "run" / "supervisor.sock"
        stage = Stage(at, Supervisord(socket), f"http://127.0.0.1:{port}")
        for name in MODELS:
            stage.block(name)
        supervisord = subprocess.Popen(
            [str(BIN / "supervisord"), "-n", "-s", "-c", str(main)], env=at.environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: stage.rpc.is_up() or supervisord.poll() is not None, 20)
            yield stage
        finally:
            with contextlib.suppress(TransientError, ShuttingDown):
                stage.rpc.shutdown()
            supervisord.wait(20)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as one:
        yield one


# --- supervisorctl models ------------------------------------------------------------------------


def test_before_the_listener_reported_it_says_so(stage: Stage) -> None:
    """The first test of this supervisord: nobody has published."""
    assert "has not reported" in stage.at.ctl("models").out
    as_json = stage.at.ctl("models", "--json")
    assert as_json.json() == []
    assert "has not reported" in as_json.err
    assert stage.rpc.snapshot() is None


def test_models_shows_what_was_published_with_the_state_of_now(stage: Stage) -> None:
    stage.start("m0")
    stage.publish(row(name="m0", state=ProcessState.STOPPED, pid=0), row(name="gone", pid=7))
    running = stage.rpc.process("m0")
    assert running is not None
    first, second = stage.at.ctl("models", "--json").json()
    assert (first["name"], first["state"], first["pid"]) == ("m0", "RUNNING", running.pid)
    assert psutil.pid_exists(running.pid)
    assert (second["name"], second["pid"]) == ("gone", 7)
    stage.rpc.stop("m0")
    snapshot = stage.rpc.snapshot()  # supervisorctl would take as long to begin as the stop lasts
    assert snapshot is not None
    assert snapshot.models[0].state is ProcessState.STOPPING
    stage.wait_for("m0", ProcessState.STOPPED)


def test_models_is_a_table_for_a_person(stage: Stage) -> None:
    stage.publish(row(name="m0", reason="does not fit", phase=Phase.DEFERRED), row(name="m1"))
    head, first, second = stage.at.ctl("models").out.splitlines()
    assert head.split()[0] == "NAME"
    assert first.split()[:3] == ["m0", "FAST", "deferred"]
    assert first.endswith("does not fit")
    assert second.split()[0] == "m1"


def test_the_exit_status_tells_success_failure_and_bad_usage(stage: Stage) -> None:
    stage.publish(row(name="m0"))
    assert stage.at.ctl("models", "m0", expect=0).err == ""
    assert "nobody: ERROR (no such model)" in stage.at.ctl("models", "nobody", expect=1).out
    assert "--yaml" in stage.at.ctl("models", "--yaml", expect=2).out


def test_help_knows_the_command(stage: Stage) -> None:
    assert "models --json" in stage.at.ctl("help", "models", expect=0).out
    assert "models" in stage.at.ctl("help").out.split()


def test_what_is_large_or_of_any_script_arrives_whole(stage: Stage) -> None:
    """No integer of 32 bits, no null, no character is lost between listener and surface."""
    odd = row(
        name="m0", repo=None, reason="模型 é \N{PILE OF POO} \ud800 \x7f \x00 ]]> &lt; </value>",
        estimated_bytes=2**45, measured_bytes=2**33, file="/x/\udcff.gguf",
    )  # fmt: skip
    stage.publish(odd, *(row(name=f"model-{n}") for n in range(300)))
    snapshot = stage.rpc.snapshot()
    assert snapshot is not None
    assert len(snapshot.models) == 301
    assert replace(snapshot.models[0], state=odd.state, pid=odd.pid) == odd
    assert stage.at.ctl("models", "m0", "--json").json()[0]["memory"]["measured"] == 2**33
    assert "模型" in stage.at.ctl("models", "m0").out


def test_over_the_network_it_is_the_same(stage: Stage) -> None:
    """With the password only; supervisord's HTTP servers share one snapshot."""
    stage.publish(row(name="m1"))
    remote = ("-s", stage.url, "-u", LOGIN[0])
    assert stage.at.ctl(*remote, "-p", LOGIN[1], "models", "--json").json()[0]["name"] == "m1"
    refused = stage.at.ctl(*remote, "-p", "wrong", "models", expect=1)
    assert "authentication" in refused.text


# --- a bad publisher -----------------------------------------------------------------------------


def _call(value: str, method: str = "synapse.publish") -> bytes:
    """A request with this text as its parameters."""
    return (
        f"<?xml version='1.0'?><methodCall><methodName>{method}</methodName>"
        f"<params>{value}</params></methodCall>"
    ).encode("utf-8", "surrogatepass")


def _param(value: str) -> bytes:
    return _call(f"<param><value>{value}</value></param>")


BAD = {
    "nothing": _call(""),
    "two": _call("<param><value>a</value></param>" * 2),
    "nil": _param("<nil/>"),
    "int": _param("<int>1</int>"),
    "long": _param("<int>99999999999999999999</int>"),
    "i8": _param("<i8>99999999999</i8>"),
    "NaN": _param("<double>nan</double>"),
    "boolean": _param("<boolean>1</boolean>"),
    "date": _param("<dateTime.iso8601>20260101T00:00:00</dateTime.iso8601>"),
    "bytes": _param("<base64>/////w==</base64>"),
    "array": _param("<array><data><value>x</value></data></array>"),
    "struct": _param(
        "<struct><member><name>models</name><value><array><data/></array></value></member></struct>"
    ),
    "no JSON": _param("<string>models</string>"),
    "non-ASCII": _param("<string>модели \N{PILE OF POO}</string>"),
    "null": _param("<string>null</string>"),
    "deep": _param(f"<string>{'[' * 100_000}</string>"),
    "huge": _param(f"<string>{json.dumps({'models': ['x' * (9 * MIB)]})}</string>"),
    "control": _param("<string>\x01</string>"),
    "surrogate": _param("<string>\ud800</string>"),
    "no XML": b"publish!",
    "no UTF-8": b"<?xml version='1.0' encoding='utf-8'?><a>\xff</a>",
    "entities": b"<!DOCTYPE a [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]>" + _param("&b;"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_publish_is_refused_and_costs_nothing(stage: Stage, bad: str) -> None:
    """supervisord stays the one it was, answers at once, and shows the last good snapshot."""
    stage.publish(row(name="good"))
    pid = stage.rpc.pid()
    status, body = stage.post(BAD[bad])
    if status == 200:
        with pytest.raises(xmlrpc.client.Fault) as caught:
            xmlrpc.client.loads(body)
        assert caught.value.faultCode in (2, 3)  # INCORRECT_PARAMETERS, BAD_ARGUMENTS
    else:
        assert status == 400  # never 500: that would be an exception inside supervisord
    begun = time.monotonic()
    assert stage.rpc.pid() == pid
    snapshot = stage.rpc.snapshot()
    assert time.monotonic() - begun < 1
    assert snapshot is not None
    assert [model.name for model in snapshot.models] == ["good"]


def test_odd_models_do_not_hurt_supervisord(stage: Stage) -> None:
    """A JSON object with models it is; that no model is one is the reader's to find."""
    text = json.dumps({"at": None, "models": [None, 1, {"name": []}, {"name": 2**70}, []]})
    assert stage.rpc.call("synapse.publish", text) == 0
    assert len(json.loads(stage.rpc.call("synapse.models"))["models"]) == 5
    with pytest.raises(TransientError, match="snapshot"):
        stage.rpc.snapshot()
    said = stage.at.ctl("models", expect=1)
    assert said.out.startswith("cannot read the listener's snapshot")


def test_a_large_snapshot_holds_up_no_other_call_for_long(stage: Stage) -> None:
    """supervisord has one thread; 2,000 models are far more than it will see."""
    stage.rpc.pid()
    begun = time.monotonic()
    stage.publish(*(row(name=f"model-{n}") for n in range(2000)))
    stage.rpc.call("synapse.models")
    assert time.monotonic() - begun < 2
    stage.publish()


def test_nothing_of_all_this_is_an_exception_in_supervisords_log(stage: Stage) -> None:
    log = (stage.at.log / "supervisord.log").read_text("utf-8", "replace")
    assert "Traceback" not in log
    assert "unexpected exception" not in log


# --- the adapter ---------------------------------------------------------------------------------


def test_processes_are_what_supervisorctl_status_lists(stage: Stage) -> None:
    listed = {
        line.split()[0]: line.split()[1]
        for line in stage.at.ctl("status", expect=None).out.splitlines()
    }
    found = {process.name: process.state.name for process in stage.rpc.processes()}
    assert found == listed
    assert set(MODELS) < set(found)


def test_a_program_starts_and_stops_and_saying_so_twice_is_no_error(stage: Stage) -> None:
    stage.start("m1")
    stage.rpc.start("m1")
    running = stage.rpc.process("m1")
    assert running is not None
    assert running.state is ProcessState.RUNNING
    assert psutil.Process(running.pid).cmdline()[2].endswith("synapse-run")
    assert running.start <= running.now
    assert running.logfile == str(stage.at.log / "m1.log")
    begun = time.monotonic()
    stage.rpc.stop("m1")
    stage.rpc.stop("m1")
    assert time.monotonic() - begun < DRAIN_SECONDS / 2, "it waited for the drain"
    stage.wait_for("m1", ProcessState.STOPPED)
    stage.rpc.stop("m1")


def test_a_program_that_there_is_none_of_is_none(stage: Stage) -> None:
    assert stage.rpc.process("nobody") is None
    stage.rpc.remove("nobody")
    for ask in (stage.rpc.start, stage.rpc.stop, stage.rpc.add):
        with pytest.raises(Refused) as caught:
            ask("nobody")
        assert caught.value.code == Fault.BAD_NAME


def test_a_program_that_cannot_be_started_is_refused_with_the_reason(stage: Stage) -> None:
    stage.block("broken", command="/no/such/program")
    stage.rpc.reread()
    stage.rpc.add("broken")
    with pytest.raises(Refused) as caught:
        stage.rpc.start("broken")
    assert "/no/such/program" in str(caught.value)
    stage.rpc.remove("broken")
    (stage.at.conf_d / "broken.conf").unlink()
    stage.rpc.reread()


def test_a_group_comes_changes_and_goes(stage: Stage) -> None:
    path = stage.block("late")
    assert stage.rpc.reread().added == {"late"}
    stage.rpc.add("late")
    stage.rpc.add("late")
    assert stage.rpc.process("late") is not None
    stage.block("late", drain_seconds=0.5)
    assert stage.rpc.reread().changed == {"late"}
    stage.start("late")
    with pytest.raises(Refused) as caught:
        stage.rpc.remove("late")
    assert caught.value.code == Fault.STILL_RUNNING
    stage.rpc.stop("late")
    stage.wait_for("late", ProcessState.STOPPED)
    path.unlink()
    assert stage.rpc.reread().removed == {"late"}
    stage.rpc.remove("late")
    stage.rpc.remove("late")
    assert stage.rpc.process("late") is None
    reread = stage.rpc.reread()
    assert not (reread.added | reread.changed | reread.removed)


@pytest.mark.parametrize("text", [b"words\n", b"[program:x]\ncommand=/bin/cat %(here)\n", b"\xff"])
def test_files_that_cannot_be_read_change_nothing_and_say_why(stage: Stage, text: bytes) -> None:
    path = stage.at.conf_d / "zz-broken.conf"
    path.write_bytes(text)
    before = [process.name for process in stage.rpc.processes()]
    try:
        with pytest.raises(Refused) as caught:
            stage.rpc.reread()
        assert caught.value.code == Fault.CANT_REREAD
        assert str(caught.value).isprintable()
    finally:
        path.unlink()
    assert [process.name for process in stage.rpc.processes()] == before


def test_it_knows_its_own_number(stage: Stage) -> None:
    assert stage.rpc.pid() == stage.at.supervisord().pid


# --- the stock web page --------------------------------------------------------------------------


def test_the_stock_web_page_lists_the_programs_behind_its_password(stage: Stage) -> None:
    assert http(stage.url)[0] == 401
    status, page = http(stage.url, login=LOGIN)
    assert status == 200
    text = page.decode("utf-8", "strict")
    assert all(f">{name}<" in text for name in (*MODELS, "discover"))


def test_stop_in_the_web_page_drains(stage: Stage) -> None:
    """Its Stop waits for what the model takes to end, and no KILL comes in between."""
    stage.start("m2")
    begun = time.monotonic()
    status, _ = http(f"{stage.url}/index.html?processname=m2&action=stop", login=LOGIN)
    assert status == 200
    stage.wait_for("m2", ProcessState.STOPPED)
    assert time.monotonic() - begun > DRAIN_SECONDS * 0.9
    stopped = stage.rpc.process("m2")
    assert stopped is not None
    assert stopped.exitstatus == 0


# --- supervisorctl discover ----------------------------------------------------------------------

_DISCOVER = """
import pathlib, sys, time
print("looking", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("found \u6a21 of " + sys.argv[1], flush=True)
sys.exit(int(pathlib.Path(sys.argv[1]).read_text()))
"""


@dataclass(frozen=True, slots=True)
class Discovery:
    """The program `discover`, which goes on until it is told its exit status."""

    stage: Stage
    go: Path

    def end(self, status: int) -> None:
        new = self.go.with_suffix(".new")
        new.write_text(str(status))
        new.replace(self.go)

    @contextlib.contextmanager
    def followed(self, *login: str) -> Iterator[subprocess.Popen[str]]:
        """`supervisorctl discover`, running."""
        command = [str(BIN / "supervisorctl"), "-c", str(self.stage.at.etc / "supervisord.conf")]
        with subprocess.Popen(
            [*command, *login, "discover"], env=self.stage.at.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        ) as running:  # fmt: skip
            try:
                yield running
            finally:
                running.kill()


@pytest.fixture
def discovery(stage: Stage) -> Iterator[Discovery]:
    main = stage.at.etc / "supervisord.conf"
    text = main.read_text()
    program, go = stage.at.root / "looks.py", stage.at.root / "go"
    program.write_text(_DISCOVER)
    line = f"command={BIN / 'synapse'} --prefix {stage.at.prefix} discover"
    assert text.count(line) == 1
    main.write_text(text.replace(line, f"command={sys.executable} {program} {go}"))
    stage.at.ctl("update")
    go.unlink(missing_ok=True)
    yield Discovery(stage, go)
    stage.rpc.stop("discover")
    wait_until(lambda: not stage.rpc.process("discover").pid, 10)  # type: ignore[union-attr]
    main.write_text(text)
    stage.at.ctl("update")


def _line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline()


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("way", ["socket", "network"])
def test_a_discovery_is_shown_as_it_goes_and_ends_as_it_ended(
    discovery: Discovery, way: str, status: int
) -> None:
    """Nothing of the run before is shown."""
    remote = ("-s", discovery.stage.url, "-u", LOGIN[0], "-p", LOGIN[1])
    for _ in range(2):
        with discovery.followed(*(remote if way == "network" else ())) as running:
            assert _line(running) == "looking\n"
            discovery.end(status)
            said = [_line(running), _line(running)]
            assert running.wait(20) == (1 if status else 0)
        end = f"discover: ERROR (exit status {status})\n" if status else ""
        assert said == [f"found \u6a21 of {discovery.go}\n", end]
        discovery.go.unlink()


def test_a_discovery_that_runs_already_is_joined(discovery: Discovery) -> None:
    assert discovery.stage.rpc.call("synapse.discover") == ""
    assert discovery.stage.rpc.call("synapse.discover") == ""
    process = discovery.stage.rpc.process("discover")
    log = discovery.stage.at.log / "discover.log"
    wait_until(lambda: log.exists() and log.read_text().endswith("looking\n"), 10)
    with discovery.followed() as running:
        assert "runs already" in _line(running)
        discovery.end(0)
        assert _line(running) == f"found \u6a21 of {discovery.go}\n"
        assert running.wait(20) == 0
    after = discovery.stage.rpc.process("discover")
    assert process is not None
    assert after is not None
    assert after.start == process.start


def test_ctrl_c_ends_the_following_and_not_the_discovery(discovery: Discovery) -> None:
    with discovery.followed() as running:
        assert _line(running) == "looking\n"
        running.send_signal(signal.SIGINT)
        assert "no longer followed" in _line(running)
        assert running.wait(20) == 1
    process = discovery.stage.rpc.process("discover")
    assert process is not None
    assert process.state is ProcessState.RUNNING


def test_the_real_discovery_can_be_started_so(stage: Stage) -> None:
    said = stage.at.ctl("discover", expect=None)
    log = (stage.at.log / "discover.log").read_text()
    assert said.out.splitlines()[0] in log
    assert "Traceback" not in said.text


def test_without_the_program_discover_it_says_what_to_do(stage: Stage) -> None:
    main = stage.at.etc / "supervisord.conf"
    text = main.read_text()
    main.write_text(text.replace("[program:discover]", "[program:other]"))
    try:
        stage.at.ctl("update")
        said = stage.at.ctl("discover", expect=1)
        assert "run `synapse discover` in a shell" in said.out
        with pytest.raises(Refused) as caught:
            stage.rpc.call("synapse.discover")
        assert caught.value.code == Fault.BAD_NAME
    finally:
        main.write_text(text)
        stage.at.ctl("update")


# --- supervisorctl rollback ----------------------------------------------------------------------


def _answered(stage: Stage, ok: bool, message: str) -> threading.Thread:
    """A listener that answers the next command so, and says in `seen` what it was."""

    def listen() -> None:
        requests = wait_until(stage.rpc.requests, 20, "a command")
        assert (requests[0].verb, requests[0].model) == ("rollback", "m0")
        stage.rpc.answer(requests[0].id, ok, f"{message} {requests[0].other or '-'}")

    thread = threading.Thread(target=listen)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("arguments", "ok", "said"),
    [(("m0",), True, "m0 is back at -\n"), (("m0", "17"), True, "m0 is back at 17\n"),
     (("m0", "9"), False, "m0 is back at 9\n")],
)  # fmt: skip
def test_a_rollback_waits_for_the_listeners_answer(
    stage: Stage, arguments: tuple[str, ...], ok: bool, said: str
) -> None:
    listener = _answered(stage, ok, "m0 is back at")
    try:
        assert stage.at.ctl("rollback", *arguments, expect=0 if ok else 1).out == said
    finally:
        listener.join(30)


def test_a_rollback_of_what_is_none_is_refused_at_once(stage: Stage) -> None:
    assert "no such model" in stage.at.ctl("rollback", "nobody", expect=1).out
    assert "rollback <name>" in stage.at.ctl("rollback", "m0", "x", expect=2).out
    assert "rollback <name>" in stage.at.ctl("help", "rollback").out
    assert stage.rpc.requests() == ()


# --- a reload with a broken file -----------------------------------------------------------------

BROKEN_FILES = {
    "words": ("[program:x]\ncommand=/bin/cat\nwords\n", 3),
    "a stray %": ("[program:x]\ncommand=/bin/cat 100%\n", 2),
    "a bad value": ("[program:x]\ncommand=/bin/cat\n\nstopsignal=NOPE\n", 4),
}


def _pids(stage: Stage) -> dict[str, int]:
    return {process.name: process.pid for process in stage.rpc.processes() if process.pid}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_reload_with_a_broken_file_is_refused_and_stops_nothing(stage: Stage, kind: str) -> None:
    """It would stop everything and then end supervisord."""
    stage.start("m3")
    before, own = _pids(stage), stage.rpc.pid()
    text, line = BROKEN_FILES[kind]
    path = stage.at.conf_d / "broken.conf"
    path.write_text(text)
    try:
        said = stage.at.ctl("reload", expect=1)
        assert f"CANT_REREAD: {path}, line {line}: " in said.out
        assert "mend it, then reload again" in said.out
        assert "xmlrpc" not in said.text
        remote = ("-s", stage.url, "-u", LOGIN[0], "-p", LOGIN[1])
        assert f"{path}, line {line}: " in stage.at.ctl(*remote, "reload", expect=1).out
        assert _pids(stage) == before
        assert stage.rpc.pid() == own
    finally:
        path.unlink()
    stage.rpc.stop("m3")
    stage.wait_for("m3", ProcessState.STOPPED)


def test_a_reload_by_signal_with_a_broken_file_is_refused_too(stage: Stage) -> None:
    stage.start("m3")
    before = _pids(stage)
    path = stage.at.conf_d / "broken.conf"
    path.write_text("words\n")
    log = stage.at.log / "supervisord.log"
    said = len(log.read_text())
    try:
        stage.at.supervisord().send_signal(signal.SIGHUP)
        wait_until(lambda: "no reload: " in log.read_text()[said:], 10, "the refusal in the log")
        assert f"{path}, line 1: " in log.read_text()[said:]
        assert _pids(stage) == before
    finally:
        path.unlink()
    stage.rpc.stop("m3")
    stage.wait_for("m3", ProcessState.STOPPED)


@pytest.mark.parametrize("way", ["reload", "signal"])
def test_once_mended_a_reload_works_and_the_next_is_guarded_again(stage: Stage, way: str) -> None:
    """A reload makes everything anew but modules."""
    path = stage.at.conf_d / "broken.conf"
    path.write_text("words\n")
    stage.at.ctl("reload", expect=1)
    path.unlink()
    stage.publish(row(name="m0"))
    if way == "reload":
        assert "Restarted supervisord" in stage.at.ctl("reload", expect=0).out
    else:
        stage.at.supervisord().send_signal(signal.SIGHUP)
    wait_until(lambda: stage.rpc.is_up() and stage.rpc.snapshot() is None, 10, "reloaded")
    path.write_text("words\n")
    try:
        said = stage.at.ctl("reload", expect=1)
        assert said.out.count(str(path)) == 1
    finally:
        path.unlink()


# --- the end -------------------------------------------------------------------------------------


def test_after_a_reload_all_works_and_at_the_end_models_drain_together() -> None:
    """A reload keeps modules loaded, and makes everything else anew."""
    with staged() as stage:
        stage.publish(row(name="m0"))
        pid = stage.rpc.pid()
        stage.at.ctl("reload")
        wait_until(lambda: stage.rpc.is_up() and stage.rpc.snapshot() is None, 10, "reloaded")
        assert stage.rpc.pid() == pid
        stage.publish(row(name="m0"))
        assert stage.at.ctl("models", "--json").json()[0]["name"] == "m0"
        stage.start(*MODELS)
        processes = stage.at.processes()
        begun = time.monotonic()
        stage.rpc.shutdown()
        wait_until(lambda: not stage.rpc.is_up(), 5)
        with pytest.raises(ShuttingDown):
            stage.rpc.processes()
        _, alive = psutil.wait_procs([p for p in processes if p.pid != pid], 10)
        assert not alive
        assert DRAIN_SECONDS * 0.9 < time.monotonic() - begun < DRAIN_SECONDS * len(MODELS) * 0.6
        wait_until(lambda: not psutil.pid_exists(pid) or _is_zombie(pid), 10, "supervisord ended")
        down = stage.at.ctl("models", expect=1)
        assert str(stage.at.prefix / "var" / "run" / "supervisor.sock") in down.out
        assert stage.at.ctl("models", "--json", expect=1).out == ""


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
