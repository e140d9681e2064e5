"""supervisord from outside, where it does not behave.

What a healthy supervisord answers is tested on a real one, in tests/integration/test_plugin.py.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.xmlrpc import Faults

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.adapters.supervisord import Fault, Refused, Supervisord
from supervisor_synapse.core.model import ProcessState, Snapshot
from supervisor_synapse.errors import ShuttingDown, TransientError
from tests.unit import scripted
from tests.unit.builders import row
from tests.unit.scripted import Script, ScriptedServer

PROCESS = {
    "name": "tiny", "group": "tiny", "description": "pid 1, uptime 0:00:01", "start": 1, "stop": 0,
    "now": 2, "state": 20, "statename": "RUNNING", "spawnerr": "", "exitstatus": 0,
    "logfile": "/l", "stdout_logfile": "/l", "stderr_logfile": "", "pid": 4711,
}  # fmt: skip

Open = Callable[..., tuple[ScriptedServer, Supervisord]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as a unix socket needs."""
    path = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def answering(folder: Path) -> Iterator[Open]:
    """`answering(script, …)`: a server and a client of it; the scripts answer in turn."""
    with contextlib.ExitStack() as servers:

        def start(*scripts: Script, seconds: float = 10.0) -> tuple[ScriptedServer, Supervisord]:
            server = servers.enter_context(scripted.on_unix_socket(folder / "s", *scripts))
            return server, Supervisord(folder / "s", seconds)

        yield start


def reply(value: Any) -> Script:
    """A good answer."""
    return scripted.http(200, xmlrpc.client.dumps((value,), methodresponse=True).encode())


def fault(code: int, text: str = "SAID") -> Script:
    return reply_xml(xmlrpc.client.dumps(xmlrpc.client.Fault(int(code), text)))


def reply_xml(text: str) -> Script:
    return scripted.http(200, text.encode())


# --- what is asked -------------------------------------------------------------------------------


def test_a_call_is_one_request_with_its_arguments(answering: Open) -> None:
    server, rpc = answering(reply(True))
    assert rpc.call("supervisor.startProcess", "tiny", False) is True
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /RPC2 HTTP/1.1\r\n")
    assert xmlrpc.client.loads(body) == (("tiny", False), "supervisor.startProcess")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10))
def test_a_name_arrives_as_it_is(name: str) -> None:
    """Also one that is not ASCII: another program must not be meant in its place."""
    with tempfile.TemporaryDirectory(prefix="syn", dir="/tmp") as folder:
        at = Path(folder, "s")
        with scripted.on_unix_socket(at, reply(True)) as server:
            Supervisord(at).start(name)
        (said, _), _ = xmlrpc.client.loads(server.requests[0].partition(b"\r\n\r\n")[2])
    assert said == name


def test_starting_and_stopping_do_not_make_supervisord_wait(answering: Open) -> None:
    server, rpc = answering(reply(True))
    rpc.start("tiny")
    rpc.stop("tiny")
    asked = [xmlrpc.client.loads(r.partition(b"\r\n\r\n")[2]) for r in server.requests]
    assert asked == [
        (("tiny", False), "supervisor.startProcess"),
        (("tiny", False), "supervisor.stopProcess"),
    ]


def test_processes_are_read_into_values(answering: Open) -> None:
    _, rpc = answering(reply([PROCESS, PROCESS | {"name": "b", "state": 1000, "pid": 0}]))
    one, two = rpc.processes()
    assert (one.name, one.state, one.pid) == ("tiny", ProcessState.RUNNING, 4711)
    assert (two.name, two.state, two.pid) == ("b", ProcessState.UNKNOWN, 0)


# --- faults --------------------------------------------------------------------------------------


def test_the_codes_are_supervisors_own() -> None:
    assert {code.name: code.value for code in Fault} == {
        code.name: getattr(Faults, code.name) for code in Fault
    }


@pytest.mark.parametrize("code", [code for code in Fault if code is not Fault.SHUTDOWN_STATE])
def test_a_fault_is_a_refusal_with_its_code_and_text(answering: Open, code: Fault) -> None:
    _, rpc = answering(fault(code, f"{code.name}: tiny\n\tmore"))
    with pytest.raises(Refused, match=f"{code.name}: tiny more") as caught:
        rpc.call("supervisor.anything")
    assert caught.value.code == code


CALLS: dict[str, Callable[[Supervisord], object]] = {
    "start": lambda rpc: rpc.start("tiny"),
    "stop": lambda rpc: rpc.stop("tiny"),
    "add": lambda rpc: rpc.add("tiny"),
    "remove": lambda rpc: rpc.remove("tiny"),
    "process": lambda rpc: rpc.process("tiny"),
    "processes": lambda rpc: rpc.processes(),
    "reread": lambda rpc: rpc.reread(),
    "pid": lambda rpc: rpc.pid(),
    "snapshot": lambda rpc: rpc.snapshot(),
    "shutdown": lambda rpc: rpc.shutdown(),
}
# What is asked for holds already: that is success.
FINE = {
    "start": Fault.ALREADY_STARTED, "stop": Fault.NOT_RUNNING, "add": Fault.ALREADY_ADDED,
    "remove": Fault.BAD_NAME, "process": Fault.BAD_NAME,
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_supervisord_on_its_way_out_says_so(answering: Open, call: str) -> None:
    _, rpc = answering(fault(Fault.SHUTDOWN_STATE))
    with pytest.raises(ShuttingDown):
        CALLS[call](rpc)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [code for code in Fault if code is not Fault.SHUTDOWN_STATE])
def test_only_what_holds_already_is_no_refusal(answering: Open, call: str, code: Fault) -> None:
    _, rpc = answering(fault(code))
    if FINE.get(call) is code:
        assert CALLS[call](rpc) is None
        return
    with pytest.raises(Refused) as caught:
        CALLS[call](rpc)
    assert caught.value.code == code


def test_a_supervisord_that_refuses_all_is_not_up(answering: Open) -> None:
    _, rpc = answering(fault(Fault.SHUTDOWN_STATE), fault(Fault.UNKNOWN_METHOD), reply("4.3.0"))
    assert [rpc.is_up(), rpc.is_up(), rpc.is_up()] == [False, False, True]


# --- no answer -----------------------------------------------------------------------------------


def test_without_a_socket_it_is_not_there(folder: Path) -> None:
    rpc = Supervisord(folder / "s")
    with pytest.raises(TransientError, match=r"cannot reach supervisord at .*/s: No such file"):
        rpc.processes()
    assert not rpc.is_up()


def test_a_socket_that_nobody_listens_on_is_not_there(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(folder / "s"))
    with pytest.raises(TransientError, match="refused"):
        Supervisord(folder / "s").processes()


@pytest.mark.parametrize(
    "script",
    [scripted.silence(), scripted.silence(b"HTTP/1.1 200 OK\r\n"),
     scripted.silence(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n<?xml")],
    ids=["at once", "in its head", "in its body"],
)  # fmt: skip
def test_a_supervisord_that_hangs_is_given_up_in_time(answering: Open, script: Script) -> None:
    _, rpc = answering(script, seconds=0.1)
    begun = time.monotonic()
    with pytest.raises(TransientError, match="timed out"):
        rpc.processes()
    assert time.monotonic() - begun < 2


GOOD = xmlrpc.client.dumps((True,), methodresponse=True)


@pytest.mark.parametrize(
    "script",
    [
        scripted.raw(b""),
        scripted.raw(b"\0\xff\n" * 100),
        scripted.raw(b"SSH-2.0-OpenSSH_9\r\n"),
        scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + GOOD[:50].encode()),
        scripted.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
        scripted.http(500, b"oops"),
        scripted.http(401),
        scripted.http(302, b"", "Location: http://example.invalid/"),
        reply_xml(""),
        reply_xml("not XML"),
        reply_xml("<html><body>hello</body></html>"),
        reply_xml(GOOD[:-20]),
        reply_xml(xmlrpc.client.dumps((), methodresponse=None, methodname="x")),
        reply_xml(GOOD.replace("<boolean>1", "<boolean>7")),
        reply_xml(GOOD.replace("boolean>", "int>").replace(">1<", ">one<")),
        reply_xml("<methodResponse><fault><value><int>1</int></value></fault></methodResponse>"),
        scripted.http(200, b"\xff\xfe<\0"),
        scripted.http(200, b"x" * (17 * 1024 * 1024)),
    ],
    ids=["nothing", "noise", "another protocol", "cut", "bad chunk", "bad length", "500", "401",
         "redirect", "empty", "no XML", "HTML", "torn XML", "a call", "bad boolean", "bad int",
         "bad fault", "odd encoding", "too much"],
)  # fmt: skip
def test_an_answer_that_is_none_costs_one_call(answering: Open, script: Script) -> None:
    """The next call has a connection of its own, and succeeds."""
    _, rpc = answering(script, reply(True))
    with pytest.raises(TransientError) as caught:
        rpc.call("supervisor.anything")
    assert str(caught.value).isprintable()
    assert rpc.call("supervisor.anything") is True


@pytest.mark.parametrize("call", ["process", "processes", "reread", "pid", "snapshot"])
@pytest.mark.parametrize(
    "value", [17.5, "x", [1], {}, [[[["a"]]]], [{"name": 1}], PROCESS | {"state": 999}, -1],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_an_answer_of_another_shape_is_no_answer(answering: Open, call: str, value: Any) -> None:
    _, rpc = answering(reply(value))
    with pytest.raises(TransientError) as caught:
        CALLS[call](rpc)
    assert str(caught.value).isprintable()


def test_a_snapshot_that_nobody_published_is_none(answering: Open) -> None:
    _, rpc = answering(reply(""))
    assert rpc.snapshot() is None


def test_many_failed_calls_leave_no_connection_open(answering: Open) -> None:
    server, rpc = answering(scripted.raw(b"HTTP/1.1 200 OK\r\n"))
    before = psutil.Process().num_fds()
    for _ in range(20):
        with pytest.raises(TransientError):
            rpc.processes()
    assert len(server.requests) == 20
    deadline = time.monotonic() + 5
    while psutil.Process().num_fds() > before:  # the server's ends are closed by its threads
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_snapshot_is_published_as_ascii_text(answering: Open) -> None:
    snapshot = Snapshot(1.5, (row(reason="é\n\ud800"),))
    server, rpc = answering(reply(True))
    rpc.publish(snapshot)
    (text,), method = xmlrpc.client.loads(server.requests[0].partition(b"\r\n\r\n")[2])
    assert method == "synapse.publish"
    assert text.isascii()
    assert snapshots.load(text) == snapshot
