"""The namespace as a program of somebody else meets it: xmlrpc.client, unix socket and TCP.

One deployment: `one` serves, `two` could. The order of the tests does not matter.
"""

from __future__ import annotations

import contextlib
import http.client
import inspect
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid
import xmlrpc.client
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse.plugin.rpc import API_VERSION, SynapseNamespaceRPCInterface
from tests.conftest import Engine
from tests.integration.harness import Deployment, deployed, wait_until
from tests.integration.harness import http as get
from tests.ports import free_ports

pytestmark = pytest.mark.usefixtures("llama_server")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
DOCUMENT = (ROOT / "docs" / "xml-rpc.md").read_text()
LOGIN = ("synapse", 'open"sesame\\7')
SECONDS = 30.0
SETTINGS = """
enable = none
memory_reserve = 64MiB
[model:one]
enabled = true
"""
_INET = """
[inet_http_server]
port=127.0.0.1:{port}
username={user}
password={password}
"""
BAD_NAME, INCORRECT_PARAMETERS, FAILED = 10, 2, 30


class UnixConnection(http.client.HTTPConnection):
    """To supervisord's unix socket, with nothing of supervisor's own."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(self._path))


class UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection[1] is None:
            self._connection = host, UnixConnection(self._path)
        return self._connection[1]


@dataclass(frozen=True, slots=True)
class Stage:
    """A deployment, reached as other programs reach it."""

    at: Deployment
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/RPC2"

    @property
    def socket(self) -> Path:
        return self.at.prefix / "var" / "run" / "supervisor.sock"

    @contextlib.contextmanager
    def client(self, way: str = "unix") -> Iterator[Any]:
        """A plain client of the whole server."""
        if way == "unix":
            transport = UnixTransport(self.socket)
            proxy = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
        else:
            user, password = (urllib.parse.quote(word, safe="") for word in LOGIN)
            proxy = xmlrpc.client.ServerProxy(
                f"http://{user}:{password}@127.0.0.1:{self.port}/RPC2"
            )
        with proxy as server:
            yield server

    def call(self, method: str, *arguments: object, way: str = "unix") -> Any:
        with self.client(way) as server:
            return getattr(server.synapse, method)(*arguments)

    def fault(self, method: str, *arguments: object, way: str = "unix") -> int:
        with pytest.raises(xmlrpc.client.Fault) as caught:
            self.call(method, *arguments, way=way)
        assert re.fullmatch(r"[A-Z_]+(: [ -~]+)?", caught.value.faultString)
        return caught.value.faultCode

    def answer(self, command: str, seconds: float = SECONDS) -> tuple[bool, str]:
        """What became of a command, polled for."""
        text = wait_until(lambda: self.call("result", command), seconds, command)
        found = json.loads(text)
        assert set(found) == {"ok", "message"}
        return found["ok"], found["message"]

    def phase(self, name: str) -> str:
        found = json.loads(self.call("models"))["models"]
        return str({model["name"]: model for model in found}[name]["phase"])

    def serves(self, name: str) -> None:
        """`name` alone, as a test may have left it otherwise."""
        other = {"one": "two", "two": "one"}[name]
        for verb, model in (("enable", name), ("disable", other)):
            assert self.answer(self.call(verb, model))[0]
        wait_until(lambda: self.phase(name) == "ready", SECONDS)
        wait_until(lambda: self.phase(other) in ("stopped", "disabled"), SECONDS)

    def example(self, program: str, *arguments: str, expect: int = 0, **environment: str) -> str:
        """What an example says: on stdout, or where it fails on stderr."""
        secret = self.at.root / "password"
        secret.write_text(f"{LOGIN[1]}\n")
        ours = {"SYNAPSE_URL": self.url, "SYNAPSE_PASSWORD_FILE": str(secret)}
        interpreter = sys.executable if program.endswith(".py") else "bash"
        command = [interpreter, str(EXAMPLES / program), *arguments]
        done = subprocess.run(
            command, env=self.at.environment() | ours | environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == expect, done
        return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def stage(llama_server: Engine) -> Iterator[Stage]:
    with deployed(SETTINGS) as at:
        at.add("one", "two")
        at.synapse("init")
        port = free_ports(1)
        with (at.etc / "supervisord.conf").open("a") as main_file:
            main_file.write(_INET.format(port=port, user=LOGIN[0], password=LOGIN[1]))
        at.synapse("up", "--detach")
        yield Stage(at, port)


# --- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_plain_client_reads_and_commands(stage: Stage, way: str) -> None:
    stage.serves("one")
    found = json.loads(stage.call("models", way=way))
    assert {model["name"] for model in found["models"]} == {"one", "two"}
    assert 0 <= found["age_seconds"] < SECONDS
    assert json.loads(stage.call("devices", way=way))["devices"][0]["total"] > 2**31
    assert json.loads(stage.call("history", "one", 3, way=way))[-1]["to"] == "ready"
    assert stage.answer(stage.call("enable", "one", way=way)) == (True, "one: enabled")


@pytest.mark.parametrize("login", [None, ("synapse", "wrong"), ("x", LOGIN[1]), ("", "")])
def test_without_the_password_nothing_is_told(stage: Stage, login: tuple[str, str] | None) -> None:
    body = xmlrpc.client.dumps((), "synapse.models")
    status, said = get(stage.url, body, login=login)
    assert status == 401
    assert b"one" not in said


# --- what the namespace says of itself -----------------------------------------------------------


def methods() -> dict[str, inspect.Signature]:
    found = inspect.getmembers(SynapseNamespaceRPCInterface, inspect.isfunction)
    return {name: inspect.signature(method) for name, method in found if name[0] != "_"}


def written(signature: inspect.Signature) -> str:
    """`(name, key="")`."""
    parameters = [
        name if found.default is found.empty else f'{name}="{found.default}"'
        for name, found in signature.parameters.items()
        if name != "self"
    ]
    return f"({', '.join(parameters)})"


def test_the_reference_has_every_method_and_no_other() -> None:
    headings = dict(re.findall(r"^### `(\w+)(\(.*\))`$", DOCUMENT, re.MULTILINE))
    assert headings == {name: written(signature) for name, signature in methods().items()}


def test_the_signatures_are_those_that_supervisord_tells(stage: Stage) -> None:
    told = dict(re.findall(r"^`(\w+ synapse\.\w+)\((.*)\)`$", DOCUMENT, re.MULTILINE))
    with stage.client() as server:
        listed = {name for name in server.system.listMethods() if name.startswith("synapse.")}
        assert listed == {f"synapse.{name}" for name in methods()}
        assert listed == {line.split()[1] for line in told}
        for line, parameters in told.items():
            kind, name = line.split()
            types = [word.split()[0] for word in parameters.split(", ") if word]
            assert server.system.methodSignature(name) == [kind, *types], name
            assert server.system.methodHelp(name).strip()


def test_the_version_is_that_of_the_reference(stage: Stage) -> None:
    assert stage.call("getAPIVersion") == API_VERSION
    assert f"The version of this page: `{API_VERSION}`." in DOCUMENT


def fields(title: str) -> set[str]:
    """The names in the first column of the table under a title."""
    section = DOCUMENT.partition(f"\n{title}\n")[2].split("\n#")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_field_of_an_answer_is_in_the_reference(stage: Stage) -> None:
    stage.serves("one")
    found = json.loads(stage.call("models"))
    assert set(found) == fields("### `models()`")
    assert set(found["models"][0]) == fields("## A model")
    assert set(found["devices"][0]) == fields("## A device")
    assert set(json.loads(stage.call("history", "", 1))[0]) == fields("## A transition")


# --- commands, and asking again ------------------------------------------------------------------


def test_a_swap_is_answered_when_it_is_done(stage: Stage) -> None:
    stage.serves("one")
    said = stage.answer(stage.call("swap", "one", "two"))
    assert said == (True, "two serves, one is stopped")
    assert stage.phase("two") == "ready"
    assert stage.answer(stage.call("swap", "one", "two")) == said


def test_a_swap_asked_for_again_while_it_is_under_way_is_one(stage: Stage) -> None:
    """The answer was lost on its way, so it is asked for once more: with a key or without."""
    stage.serves("one")
    with stopped_listener(stage):
        first = stage.call("swap", "one", "two", "k-1")
        assert stage.call("swap", "one", "two") == first
        assert stage.call("swap", "one", "two", "k-2") == first
    assert stage.answer(first) == (True, "two serves, one is stopped")
    assert stage.call("swap", "one", "two", "k-2") == first
    assert stage.fault("swap", "two", "one", "k-2") == INCORRECT_PARAMETERS


@pytest.mark.parametrize("verb", ["enable", "disable"])
def test_what_is_so_already_is_answered_as_if_it_had_not_been(stage: Stage, verb: str) -> None:
    said = [stage.answer(stage.call(verb, "two")) for _ in range(2)]
    assert said == [(True, f"two: {verb}d")] * 2


def test_a_drain_of_what_is_stopped_is_done_already(stage: Stage) -> None:
    stage.serves("one")
    assert stage.answer(stage.call("drain", "two")) == (True, "two: is stopped already")


def test_a_rollback_that_cannot_be_says_why_and_says_the_same_again(stage: Stage) -> None:
    key = uuid.uuid4().hex
    ok, message = stage.answer(stage.call("rollback", "two", 0, key))
    assert not ok
    assert "no other block that was good" in message
    assert stage.answer(stage.call("rollback", "two", 0, key)) == (ok, message)


@contextlib.contextmanager
def stopped_listener(stage: Stage) -> Iterator[None]:
    with stage.client() as server:
        server.supervisor.stopProcess("synapse")
        try:
            yield
        finally:
            server.supervisor.startProcess("synapse")


def test_where_the_listener_is_stopped_commands_wait_and_callers_decide_how_long(
    stage: Stage,
) -> None:
    with stopped_listener(stage):
        command = stage.call("disable", "two")
        begun = time.monotonic()
        while time.monotonic() < begun + 0.5:
            assert stage.call("result", command) == ""
        assert json.loads(stage.call("models"))["age_seconds"] > 0.4
    assert stage.answer(command) == (True, "two: disabled")


def test_a_mailbox_that_is_full_refuses_and_is_emptied_by_the_listener(stage: Stage) -> None:
    stage.serves("one")
    with stopped_listener(stage):
        verbs = itertools.cycle(("enable", "disable"))
        with stage.client() as server:
            posted = [getattr(server.synapse, next(verbs))("two") for _ in range(256)]
        assert len(set(posted)) == 256
        assert stage.fault("enable", "two") == FAILED
        assert stage.call("result", posted[0]) == ""
    assert stage.answer(posted[-1]) == (True, "two: disabled")
    assert all(stage.answer(command)[0] for command in posted[::50])
    stage.serves("one")


# --- bad callers ---------------------------------------------------------------------------------

HOSTILE: dict[str, Any] = {
    "int": 1, "large int": 2**31 - 1, "bool": True, "NaN": float("nan"), "inf": float("inf"),
    "list": ["one"], "struct": {"name": "one"}, "bytes": b"\x00one", "empty": "", "all": "all",
    "other program": "discover", "the listener": "synapse", "group": "one:one", "star": "one:*",
    "dots": "../one", "blank": "one ", "markup": "<b>one</b>&amp;]]>", "private": "__class__",
    "non-ASCII": "\u043c\u043e\u0434\u0435\u043b\u044c \U0001f4a9", "newlines": "one\r\none",
    "DEL": "\x7f", "C1": "\x9b31m", "bidi": "\u202eone", "huge": "x" * 2_000_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_model_is_a_fault_for_every_verb(stage: Stage, kind: str) -> None:
    name = HOSTILE[kind]
    with stage.client() as server:
        ours = server.synapse
        calls = (
            lambda: ours.enable(name), lambda: ours.disable(name), lambda: ours.drain(name),
            lambda: ours.swap("one", name), lambda: ours.swap(name, "one"),
            lambda: ours.rollback(name, 0), lambda: ours.result(name),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(xmlrpc.client.Fault) as caught:
                call()
            assert caught.value.faultCode == BAD_NAME
        assert json.loads(ours.requests()) == []


@pytest.mark.parametrize("kind", sorted(set(HOSTILE) - {"empty", "int", "large int"}))
def test_what_is_no_number_or_no_key_is_a_fault(stage: Stage, kind: str) -> None:
    value = HOSTILE[kind]
    assert stage.fault("rollback", "one", value) == INCORRECT_PARAMETERS
    assert stage.fault("history", "one", value) == INCORRECT_PARAMETERS
    is_key = isinstance(value, str) and value.isascii() and value.isprintable() and len(value) < 65
    if not is_key:
        assert stage.fault("enable", "one", value) == INCORRECT_PARAMETERS


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("enable", ()), ("enable", ("one", "k", "x")), ("swap", ("one",)), ("rollback", ("one",)),
     ("history", ()), ("models", ("one",)), ("swap", ("one", "one")), ("rollback", ("one", -1))],
    ids=repr,
)  # fmt: skip
def test_parameters_that_do_not_fit_are_a_fault(
    stage: Stage, method: str, arguments: tuple[object, ...]
) -> None:
    assert stage.fault(method, *arguments) == INCORRECT_PARAMETERS


@pytest.mark.parametrize(
    "value",
    ["<i8>1</i8>", "<nil/>", "<int>99999999999</int>", "\x01", "<x/>", "<base64>/wA=</base64>"],
)
def test_what_xml_rpc_does_not_know_is_refused(stage: Stage, value: str) -> None:
    body = (
        "<?xml version='1.0'?><methodCall><methodName>synapse.rollback</methodName><params>"
        f"<param><value>one</value></param><param><value>{value}</value></param>"
        "</params></methodCall>"
    )
    status, said = post(stage, body)
    if status == 200:
        with pytest.raises(xmlrpc.client.Fault) as caught:
            xmlrpc.client.loads(said)
        assert caught.value.faultCode == INCORRECT_PARAMETERS
    else:
        assert status == 400


def post(stage: Stage, body: str) -> tuple[int, bytes]:
    with contextlib.closing(UnixConnection(stage.socket)) as connection:
        connection.request("POST", "/RPC2", body.encode(), {"Content-Type": "text/xml"})
        response = connection.getresponse()
        return response.status, response.read()


def test_bad_callers_hurt_nobody(stage: Stage) -> None:
    """After what stands above: no exception in supervisord, and it answers at once."""
    log = (stage.at.log / "supervisord.log").read_text("utf-8", "replace")
    assert "unexpected exception" not in log
    assert "Traceback" not in log
    begun = time.monotonic()
    stage.call("models")
    assert time.monotonic() - begun < 1


# --- the examples --------------------------------------------------------------------------------


def test_the_python_example_lists_asks_and_swaps(stage: Stage) -> None:
    stage.serves("one")
    assert "one ready http://127.0.0.1:" in stage.example("backend.py", "models")
    assert stage.example("backend.py", "ask", "two", "Hello").strip()
    stage.serves("one")
    said = stage.example("backend.py", "swap", "one", "two")
    assert said == "two serves, one is stopped\n"
    assert "no such model" in stage.example("backend.py", "swap", "one", "nobody", expect=1)
    assert "SYNAPSE_PASSWORD_FILE" in stage.example("backend.py", expect=2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_example_with_curl_does_the_same(stage: Stage) -> None:
    stage.serves("one")
    found = json.loads(stage.example("curl.sh", "models"))
    assert {model["name"] for model in found["models"]} == {"one", "two"}
    assert json.loads(stage.example("curl.sh", "history", "one"))[-1]["model"] == "one"
    said = json.loads(stage.example("curl.sh", "swap", "one", "two"))
    assert said == {"ok": True, "message": "two serves, one is stopped"}
    assert "no such model" in stage.example("curl.sh", "enable", "<&>", expect=1)
    stage.example("curl.sh", "rollback", "one", expect=1)
    assert "curl.sh" in stage.example("curl.sh", expect=2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_password_stands_in_no_command_line(stage: Stage) -> None:
    """A curl that notes how it was called, and then is the real one."""
    notes, folder = stage.at.root / "notes", stage.at.root / "bin"
    folder.mkdir()
    (folder / "curl").write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\nexec {shutil.which("curl")} "$@"\n'
    )
    (folder / "curl").chmod(0o700)
    assert json.loads(stage.example("curl.sh", "devices", PATH=f"{folder}:{os.environ['PATH']}"))
    assert "--config -" in notes.read_text()
    assert "sesame" not in notes.read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("program", ["backend.py", "curl.sh"])
def test_an_example_with_a_wrong_password_says_so(stage: Stage, program: str) -> None:
    secret = stage.at.root / "wrong"
    secret.write_text("wrong")
    said = stage.example(program, "models", expect=1, SYNAPSE_PASSWORD_FILE=str(secret))
    assert "401" in said
    assert "Traceback" not in said
