"""The page inside supervisord: what it shows, whom it obeys, and what it never does.

Requests go through supervisor's own handler and come back as bytes; a stand-in for supervisord
offers what the handlers look at. With a real one and a real browser:
tests/integration/test_page.py.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervisor import web as stock
from supervisor.http import deferring_http_request
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.xmlrpc import RPCError, supervisor_xmlrpc_handler

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import (
    Breaker,
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    Row,
    Snapshot,
    Usage,
)
from supervisor_synapse.plugin import origin, stock_page, web
from supervisor_synapse.plugin.board import Board, boards
from supervisor_synapse.plugin.mailbox import Answer
from supervisor_synapse.plugin.page import seconds_in_words, shown
from supervisor_synapse.plugin.rpc import SynapseNamespaceRPCInterface
from supervisor_synapse.plugin.sessions import Sessions, Wish, cookie
from tests.unit.builders import GIB, MIB, row

# supervisor's own way with addresses.
pytestmark = [
    pytest.mark.usefixtures("supervisor_as_it_was"),
    pytest.mark.filterwarnings("ignore:urllib.parse.split:DeprecationWarning"),
]

_LAUNCHED = "/v/bin/synapse-run -- /v/bin/llama-server"


class Process:
    """A program of supervisord's that does as it is told, and stops when the test says so."""

    def __init__(self, state: int = ProcessStates.RUNNING, command: str = _LAUNCHED) -> None:
        self.state, self.pid, self.exitstatus, self.spawnerr = state, 4711, 0, ""
        self.config = SimpleNamespace(command=command, stopwaitsecs=30, name="x")
        self.spawns = self.stops = 0
        self.looks = 0

    def get_state(self) -> int:
        return self.state

    def get_execv_args(self) -> tuple[str, list[str]]:
        return "/bin/true", []

    def spawn(self) -> None:
        assert self.state != ProcessStates.STOPPING, "as supervisor's own does"
        self.spawns += 1
        self.state = ProcessStates.STARTING

    def stop(self) -> None:
        self.stops += 1
        self.state = ProcessStates.STOPPING

    def transition(self) -> None:
        self.looks += 1


class Host:
    """What the page sees of supervisord."""

    def __init__(self, **processes: Process) -> None:
        self.logged: list[str] = []
        self.options = SimpleNamespace(
            mood=SupervisorStates.RUNNING,
            logger=SimpleNamespace(critical=self.logged.append, trace=lambda *_: None),
        )
        self.process_groups = {
            name: SimpleNamespace(processes={name: process}) for name, process in processes.items()
        }
        self.board = boards[self] = Board(self)

    def get_state(self) -> int:
        return int(self.options.mood)

    def reap(self) -> None:
        pass

    def publish(self, *rows: Row, devices: tuple[DeviceRow, ...] = ()) -> None:
        listener = ListenerRow(1, "1.2.3", 0.0, 0.0, 0.0)
        text = snapshots.dump(Snapshot(time.time(), rows, devices, listener))
        self.board.take(json.loads(text))


class Channel:
    """Takes what is sent, at once."""

    def __init__(self, port: object = 9001) -> None:
        self.server = SimpleNamespace(
            port=port, server_name="host", SERVER_IDENT="medusa",
            logger=SimpleNamespace(log=lambda *_: None),
        )  # fmt: skip
        self.creation_time, self.addr, self.sent = 0, ("127.0.0.1", 1), b""
        self.current_request = None

    def push_with_producer(self, producer: Any) -> None:
        while data := producer.more():
            self.sent += data

    def close_when_done(self) -> None:
        pass


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


def request(
    host: Host, method: str, path: str, headers: Mapping[str, str], body: bytes = b"",
    handler: Any = stock.supervisor_ui_handler, port: object = 9001,
) -> Reply:  # fmt: skip
    """Through supervisor's handler, as after the password was checked."""
    channel = Channel(port)
    lines = [f"{name}: {value}" for name, value in headers.items()]
    asked = deferring_http_request(channel, f"{method} {path}", method, path, "1.1", lines)
    if method == "POST":
        asked.collector = SimpleNamespace(data=[body])
    handler(host).continue_request(body.decode(), asked)
    head, _, content = channel.sent.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    said = dict(line.split(": ", 1) for line in rest)
    return Reply(int(first.split()[1]), said, content)


class Visitor:
    """A browser: keeps its cookie, and knows the token of the page that it has loaded."""

    def __init__(self, host: Host) -> None:
        self.host, self.cookie, self.token = host, "", ""

    def get(self, path: str = "/synapse.html", **headers: str) -> Reply:
        reply = request(self.host, "GET", path, self._headers(headers))
        self.cookie = reply.headers.get("Set-Cookie", self.cookie).partition(";")[0]
        found = re.search(r'name="token" value="(\w+)"', reply.text)
        self.token = found[1] if found else self.token
        return reply

    def post(self, form: Mapping[str, str], **headers: str) -> Reply:
        fields = {"token": self.token, **form}
        said = {"Content-Type": "application/x-www-form-urlencoded", **self._headers(headers)}
        return request(self.host, "POST", "/synapse.html", said, urlencode(fields).encode())

    def do(self, what: str, **form: str) -> str:
        """What the page says came of it, in plain text."""
        reply = self.post({"do": what, **form})
        assert (reply.status, reply.headers["Location"]) == (303, "synapse.html")
        return self.wishes()[0]

    def wishes(self) -> list[str]:
        found = re.findall(r"<li class=\"(?:busy|good|bad)\">(.*?)</li>", self.get().text)
        return [re.sub(r"<[^>]*>", "", one) for one in found]

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        said = {name.replace("_", "-"): value for name, value in more.items()}
        return {
            "Host": "127.0.0.1:9001",
            **({"Cookie": self.cookie} if self.cookie else {}),
            **said,
        }


def installed(**processes: Process) -> Host:
    host = Host(**processes)
    web.install(host, SynapseNamespaceRPCInterface)
    assert host.logged == []
    return host


def visiting(**processes: Process) -> Visitor:
    """Somebody with the page of a fleet before him: each process is a model that is ready."""
    host = installed(**processes)
    host.publish(*(row(name=name) for name in processes))
    visitor = Visitor(host)
    assert visitor.get().status == 200
    return visitor


def waiting(host: Host) -> list[tuple[str, str, str]]:
    """What the listener would be asked for."""
    return [(one.verb, one.model, one.other) for one in host.board.mailbox.waiting()]


# --- what it shows -------------------------------------------------------------------------------


def plain(page: str) -> str:
    """The page's words."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_model_is_shown_with_all_that_there_is_to_say() -> None:
    host = installed(tiny=Process())
    failure = Failure(FailureClass.CRASHED, "GGML_ASSERT: it broke", time.time() - 120)
    host.publish(
        row(
            name="tiny", repo="owner/tiny", slots_busy=4, usage=Usage(queued=2), restarts=3,
            measured_bytes=300 * MIB, started_at=int(time.time()) - 3700, trial=True,
            generation=7, last_failure=failure, failures=(("crashed", 3),), context=16384,
            next_retry_seconds=60.0, breaker=Breaker.HALF_OPEN,
        )
    )  # fmt: skip
    said = plain(Visitor(host).get().text)
    for words in (
        "tiny owner/tiny fast", "ready all slots busy, 2 waiting answers 1.2 s after its start",
        "next try in", "on its one try", "changed block, on trial",
        "last failure: crashed, 2 min ago GGML_ASSERT: it broke", "3 crashed",
        "300 MiB measured; estimate 200 MiB (header)", "4/4 2 waiting", "1 h 1 min 3 restarts",
        "8100 on CPU context 16,384 generation 7", "Stop Restart Drain Disable",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"usage": Usage(is_asleep=True)}, "ready asleep; a request wakes it"),
        ({"slots_busy": 1}, "ready at work"),
        ({"slots_busy": 0}, "ready idle"),
        ({"phase": Phase.UNHEALTHY}, "unhealthy does not answer as it should"),
        (
            {"phase": Phase.DEFERRED, "reason": "needs 9 GiB"},
            "Waiting, and why deferred tiny needs",
        ),
        ({"breaker": Breaker.OPEN}, "failed too often: left alone for a while"),
        ({"next_retry_seconds": 0.2}, "next try now"),
    ],
)
def test_the_condition_of_a_model_is_told_in_words(changes: dict[str, Any], words: str) -> None:
    host = installed(tiny=Process())
    host.publish(replace(row(name="tiny"), **changes))
    assert words in plain(Visitor(host).get().text)


def test_supervisords_state_of_now_decides_what_can_be_asked() -> None:
    host = installed(tiny=Process(ProcessStates.STOPPED))
    host.publish(row(name="tiny", enabled=False))
    said = plain(Visitor(host).get().text)
    assert "ready supervisord says stopped" in said
    assert "Start Enable" in said
    assert "Drain" not in said


def test_the_memory_of_a_device_is_told_in_numbers() -> None:
    host = installed()
    holdings = (Holding("tiny", GIB, 2 * GIB), Holding("other", None, GIB))
    host.publish(
        devices=(
            DeviceRow("CUDA0", "a card", 8 * GIB, 4 * GIB, 512 * MIB, 3 * GIB, GIB, holdings),
            DeviceRow("CUDA1", "", 8 * GIB, None, 0, None, None, problem="no driver answers"),
        )
    )
    text = Visitor(host).get().text
    said = plain(text)
    assert "CUDA0 a card 8192 MiB in all, 3072 MiB free for models, 4096 MiB free by its" in said
    assert "tiny 2048 MiB, holds 1024 MiB other 1024 MiB other programs 1024 MiB" in said
    assert "kept free 512 MiB free for models 3072 MiB" in said
    assert "no driver answers" in said
    assert '<rect class="own0" x="0.0" width="250.0"' in text


def test_more_than_a_device_has_is_squeezed_into_its_bar() -> None:
    host = installed()
    holdings = tuple(Holding(f"m{number}", None, 4 * GIB) for number in range(4))
    host.publish(devices=(DeviceRow("CPU", "", 8 * GIB, 0, 0, 0, 0, holdings),))
    text = Visitor(host).get().text
    ends = [float(x) + float(w) for x, w in re.findall(r'x="([\d.]+)" width="([\d.]+)"', text)]
    assert max(ends) <= 1000.5


def test_the_newest_of_the_history_comes_first() -> None:
    host = installed()
    host.publish()
    line = {"model": "tiny", "from": "loading", "to": "ready", "reason": "", "class": None}
    host.board.record([{**line, "when": at, "reason": f"turn {at}"} for at in range(40)], anew=True)
    said = plain(Visitor(host).get().text)
    assert said.index("turn 39") < said.index("turn 10")
    assert "turn 9 " not in said


def test_before_the_listener_spoke_the_page_says_so() -> None:
    assert "has not spoken yet" in plain(Visitor(installed()).get().text)


def test_without_models_the_page_says_what_to_do() -> None:
    host = installed()
    host.publish()
    assert "No models yet Put GGUF models where they are looked for" in plain(
        Visitor(host).get().text
    )


def test_a_silent_listener_is_warned_of() -> None:
    host = installed(tiny=Process())
    host.publish(row(name="tiny", next_retry_seconds=60.0))
    assert "silent" not in Visitor(host).get().text
    host.board.taken_at -= 42
    said = plain(Visitor(host).get().text)
    assert "The listener has been silent for 42 s" in said
    assert "next try in 17 s" in said or "next try in 18 s" in said


@pytest.mark.parametrize(
    ("mood", "words"),
    [(SupervisorStates.SHUTDOWN, "shutting down"), (SupervisorStates.RESTARTING, "reloading")],
)
def test_a_supervisord_on_its_way_out_says_so(mood: int, words: str) -> None:
    host = installed()
    host.options.mood = mood
    assert f"supervisord is {words}" in plain(Visitor(host).get().text)


def test_more_models_than_a_page_holds_are_counted() -> None:
    host = installed()
    host.publish(*(row(name=f"m{number}") for number in range(510)))
    said = plain(Visitor(host).get().text)
    assert "510 ready" in said
    assert "10 more are not shown" in said


def test_a_line_that_changed_is_shown_anew() -> None:
    visitor = visiting(tiny=Process())
    visitor.host.publish(row(name="tiny", reason="something else"))
    assert "something else" in visitor.get().text
    assert "answers 1.2 s" not in visitor.get().text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (3660, "1 h 1 min"), (1e300, "115740 d 17 h")],
)
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words


# --- what comes from outside ---------------------------------------------------------------------

_SCRIPT = "</td><script>alert(1)</script>"


def test_what_comes_from_outside_is_escaped() -> None:
    host = installed(tiny=Process())
    failure = Failure(FailureClass.CRASHED, _SCRIPT, 0.0)
    host.publish(
        row(
            name="tiny", repo=_SCRIPT, reason=_SCRIPT, device=_SCRIPT, url="javascript:alert(1)",
            last_failure=failure, failures=((_SCRIPT, 1),),
        ),
        row(name=_SCRIPT),
        devices=(DeviceRow(_SCRIPT, _SCRIPT, 1, 1, 1, 1, 1, (Holding(_SCRIPT, 1, 1),), _SCRIPT),),
    )  # fmt: skip
    line = dict.fromkeys(("model", "from", "to", "reason", "class", "evidence"), _SCRIPT)
    host.board.record([line], anew=True)
    text = Visitor(host).get().text
    assert "&lt;script&gt;" in text
    assert text.count("<script") == 1
    assert "javascript:" not in text
    assert 'id="m-tiny"' in text
    assert 'id="m-&lt;' not in text


@pytest.mark.parametrize("turned", ["\u202e", "\u2066", "\x1b[31m", "\0", "\u200b", "\ud800", "\n"])
def test_what_would_turn_or_hide_text_is_not_shown(turned: str) -> None:
    assert shown(f"a{turned}b").isprintable()
    assert shown(f"a{turned}b").startswith("a")


def test_long_text_is_cut() -> None:
    assert shown("x" * 10_000, 100) == "x" * 97 + "..."


_KEYS = st.sampled_from(
    [
        "name", "phase", "reason", "memory", "slots", "usage", "busy", "total", "measured", "at",
        "estimated", "last_failure", "class", "message", "next_retry_in", "started_at", "url",
        "failures", "state", "models", "held", "committed", "free", "room", "when", "to", "model",
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "error: --api-key {} is wrong", "--api-key={}", "Authorization: Bearer {}",
        "LLAMA_API_KEY={}", "with token hf_{}", "key sk-{}",
    ],
)  # fmt: skip
def test_keys_are_not_shown(text: str) -> None:
    said = shown(text.format("abcdEFGH12345678"))
    assert "abcdEFGH" not in said
    assert "***" in said


def test_what_is_no_key_is_shown() -> None:
    said = "asked for one token; bearers of --api-key-file /etc/key"
    assert shown(said) == said


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=20,
)
_NAMED = st.builds(
    lambda found, name: {**found, "name": name},
    st.dictionaries(_KEYS, _JSON), st.sampled_from(["tiny", "other", "<b>"]),
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(
    models=st.lists(_JSON | _NAMED, max_size=4), devices=_JSON | st.lists(_NAMED, max_size=3),
    lines=st.lists(st.dictionaries(_KEYS, _JSON), max_size=3), listener=_JSON,
)  # fmt: skip
def test_whatever_is_published_the_page_is_a_page(
    models: list[Any], devices: Any, lines: list[Any], listener: Any
) -> None:
    host = installed(tiny=Process())
    host.board.take({"models": models, "devices": devices, "listener": listener})
    host.board.record([{**line, "model": "tiny"} for line in lines], anew=True)
    reply = Visitor(host).get()
    assert (reply.status, host.logged) == (200, [])
    assert "<b>" not in re.sub(r"<b>(Look for models|[\d.]+ [KMG]iB[^<]*)</b>", "", reply.text)


# --- how it is sent ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/synapse.html", "/synapse.css", "/synapse.js"])
def test_each_reply_is_bound_to_this_origin(path: str) -> None:
    said = Visitor(installed()).get(path).headers
    assert said["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert "frame-ancestors 'none'" in said["Content-Security-Policy"]
    assert "unsafe" not in said["Content-Security-Policy"]
    assert said["X-Content-Type-Options"] == "nosniff"
    assert said["Referrer-Policy"] == "same-origin"
    assert int(said["Content-Length"]) > 0


def test_the_page_is_kept_nowhere_and_its_files_are_kept_until_they_change() -> None:
    visitor = Visitor(installed())
    reply = visitor.get()
    assert reply.headers["Cache-Control"] == "no-store"
    (version,) = set(re.findall(r"synapse\.(?:css|js)\?v=(\w+)", reply.text))
    assert "immutable" in visitor.get(f"/synapse.js?v={version}").headers["Cache-Control"]


def test_who_takes_it_packed_gets_it_packed() -> None:
    host = installed()
    packed = request(host, "GET", "/synapse.css", {"Accept-Encoding": "br, gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == request(host, "GET", "/synapse.css", {}).body


def test_the_files_of_the_page_can_only_be_read() -> None:
    reply = request(installed(), "POST", "/synapse.css", {"Host": "h"})
    assert (reply.status, reply.headers["Allow"]) == (405, "GET")


def test_no_style_and_no_script_stands_in_the_page_itself() -> None:
    """Its policy forbids both."""
    text = visiting(tiny=Process()).get().text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=)", text)


def test_a_view_that_fails_is_logged_and_answered() -> None:
    host = installed()
    host.board.devices = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    reply = Visitor(host).get()
    assert reply.status == 500
    assert "ZeroDivisionError" in host.logged[0]
    assert "ZeroDivisionError" not in reply.text


def source(name: str) -> str:
    return (Path(__file__).parents[2] / "templates" / name).read_text()


def test_the_texts_that_were_shipped_are_those_of_the_checkout() -> None:
    texts = web.load(source)
    assert not isinstance(texts, str)
    assert Visitor(installed()).get("/synapse.css").text == source("synapse.css")
    assert texts.version in Visitor(installed()).get().text


def broken(name: str) -> str:
    return "{% broken" if name.endswith(".j2") else ""


def missing(name: str) -> str:
    raise FileNotFoundError(name)


@pytest.mark.parametrize(
    ("texts", "why"), [(broken, "TemplateSyntaxError"), (missing, "FileNotFoundError: synapse.css")]
)
def test_a_template_that_cannot_be_loaded_keeps_nobody_from_starting(
    texts: Callable[[str], str], why: str
) -> None:
    host = Host()
    web.install(host, SynapseNamespaceRPCInterface, web.load(texts))
    assert why in host.logged[0]
    assert "synapse.html" not in stock.VIEWS
    assert rpc({"Sec-Fetch-Site": "cross-site"}) == 403


_WATCHED = """
import sys
from tests.unit.test_plugin_web import Process, Visitor, visiting
done, watching = [], False
def hook(event, arguments):
    if watching and event.split(".")[0] in ("open", "socket", "subprocess", "os", "time", "import"):
        done.append((event, str(arguments)))
sys.addaudithook(hook)
visitor = visiting(tiny=Process())
watching = True
visitor.get()
visitor.do("disable tiny")
visitor.do("restart tiny")
watching = False
print(done)
"""


def test_a_view_opens_nothing_starts_nothing_imports_nothing() -> None:
    """Watched by the interpreter itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WATCHED], capture_output=True, text=True,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_after_a_reload_without_the_plugin_the_page_does_nothing() -> None:
    visitor = visiting(tiny=Process())
    del boards[visitor.host]
    assert "has not spoken yet" in plain(visitor.get().text)
    assert visitor.post({"do": "disable tiny"}).status == 503
    assert waiting(visitor.host) == []


def test_to_install_twice_changes_nothing() -> None:
    """As after a reload, which keeps modules loaded."""
    installed()
    before = [stock.supervisor_ui_handler.continue_request, stock.StatusView.render]
    installed()
    assert [stock.supervisor_ui_handler.continue_request, stock.StatusView.render] == before


# --- who is obeyed -------------------------------------------------------------------------------


def test_a_get_never_acts() -> None:
    visitor = visiting(tiny=Process())
    query = urlencode({"token": visitor.token, "do": "disable tiny"})
    assert visitor.get(f"/synapse.html?{query}").status == 200
    assert waiting(visitor.host) == []
    assert visitor.wishes() == []


def test_what_stands_in_the_address_of_a_post_counts_for_nothing() -> None:
    visitor = visiting(tiny=Process())
    query = urlencode({"token": visitor.token, "do": "disable tiny"})
    said = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": visitor.cookie}
    assert request(visitor.host, "POST", f"/synapse.html?{query}", said).status == 403
    assert waiting(visitor.host) == []


@pytest.mark.parametrize("token", ["", "x", "0" * 64, "\u00e9"])
def test_a_wrong_token_is_refused(token: str) -> None:
    visitor = visiting(tiny=Process())
    reply = visitor.post({"do": "disable tiny", "token": token})
    assert reply.status == 403
    assert "Nothing was done" in reply.text
    assert waiting(visitor.host) == []


def test_the_token_of_another_session_is_refused() -> None:
    visitor = visiting(tiny=Process())
    other = Visitor(visitor.host)
    other.get()
    assert other.token != visitor.token
    assert visitor.post({"do": "disable tiny", "token": other.token}).status == 403
    assert waiting(visitor.host) == []


@pytest.mark.parametrize("value", ["", "synapse_9001=", "synapse_9001=a.b", "other=1"])
def test_a_session_that_we_did_not_give_out_is_refused(value: str) -> None:
    visitor = visiting(tiny=Process())
    reply = visitor.post({"do": "disable tiny"}, Cookie=value)
    assert reply.status == 403
    assert "Set-Cookie" in reply.headers
    assert waiting(visitor.host) == []


def test_a_refused_page_can_be_used_at_once() -> None:
    """As after supervisord was started anew, with the page of before still open."""
    visitor = visiting(tiny=Process())
    visitor.cookie = "synapse_9001=of.another"
    reply = visitor.post({"do": "disable tiny"})
    visitor.cookie = reply.headers["Set-Cookie"].partition(";")[0]
    found = re.search(r'name="token" value="(\w+)"', reply.text)
    assert found is not None
    visitor.token = found[1]
    assert visitor.post({"do": "disable tiny"}).status == 303


_FOREIGN = [
    {"Origin": "http://elsewhere.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:8100"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Referer": "http://elsewhere.example/page"}, {"Referer": "http://[broken"},
    {"Origin": "http://elsewhere.example", "Referer": "http://127.0.0.1:9001/"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:9001"},
]  # fmt: skip
_OWN = [
    {}, {"Origin": "http://127.0.0.1:9001"}, {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"}, {"Referer": "http://127.0.0.1:9001/synapse.html"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
    {"Origin": "https://behind.a.proxy", "X-Forwarded-Host": "behind.a.proxy"},
]  # fmt: skip


@pytest.mark.parametrize("headers", _FOREIGN)
def test_what_another_site_asks_for_is_refused(headers: dict[str, str]) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.post({"do": "disable tiny"}, **headers).status == 403
    assert waiting(visitor.host) == []


@pytest.mark.parametrize("headers", _FOREIGN)
def test_the_page_itself_refuses_where_the_handler_could_not_be_guarded(
    headers: dict[str, str],
) -> None:
    unguarded = stock.supervisor_ui_handler.continue_request
    visitor = visiting(tiny=Process())
    stock.supervisor_ui_handler.continue_request = unguarded
    assert "another site" in visitor.post({"do": "disable tiny"}, **headers).text
    assert waiting(visitor.host) == []


@pytest.mark.parametrize("headers", _OWN)
def test_what_the_page_itself_asks_for_is_done(headers: dict[str, str]) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.post({"do": "disable tiny"}, **headers).status == 303
    assert waiting(visitor.host) == [("disable", "tiny", "")]


_CALL = b"<methodCall><methodName>synapse.beat</methodName></methodCall>"


def rpc(headers: dict[str, str], method: str = "POST") -> int:
    host = installed()

    def handler(host: Host) -> Any:
        interface = SynapseNamespaceRPCInterface(host, host.board)
        return supervisor_xmlrpc_handler(host, [("synapse", interface)])

    said = {"Host": "127.0.0.1:9001", **headers}
    return request(host, method, "/RPC2", said, _CALL, handler).status


@pytest.mark.parametrize("headers", _FOREIGN)
def test_xml_rpc_is_refused_to_other_sites(headers: dict[str, str]) -> None:
    assert rpc(headers) == 403


@pytest.mark.parametrize("headers", [*_OWN, {"User-Agent": "xmlrpc.client"}])
def test_xml_rpc_is_not_refused_to_programs(headers: dict[str, str]) -> None:
    assert rpc(headers) == 200


@pytest.mark.parametrize("query", ["action=stopall", "processname=tiny&action=stop"])
def test_the_stock_pages_actions_are_refused_to_other_sites(query: str) -> None:
    host = installed()
    said = {"Host": "h:1", "Sec-Fetch-Site": "cross-site"}
    assert request(host, "GET", f"/index.html?{query}", said).status == 403
    assert request(host, "GET", f"/?{query}", said).status == 403


def test_a_link_from_another_site_leads_to_the_pages() -> None:
    host = installed()
    said = {"Host": "h:1", "Sec-Fetch-Site": "cross-site", "Referer": "http://elsewhere.example/"}
    assert request(host, "GET", "/ok.html", said).status == 200
    assert request(host, "GET", "/synapse.html", said).status == 200


def test_a_header_counts_as_it_first_stands() -> None:
    assert origin.headers(["Origin: a", "ORIGIN:b", "x"]) == {"origin": "a", "x": ""}


@pytest.mark.parametrize(
    "headers", [{"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; x=y"}]
)
def test_what_is_no_form_is_refused(headers: dict[str, str]) -> None:
    assert visiting(tiny=Process()).post({"do": "disable tiny"}, **headers).status == 400


@pytest.mark.parametrize("form", [{"x": "y" * 20_000}, {str(number): "x" for number in range(50)}])
def test_a_form_beyond_all_bounds_is_refused(form: dict[str, str]) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.post({"do": "disable tiny", **form}).status == 400
    assert waiting(visitor.host) == []


# --- sessions ------------------------------------------------------------------------------------


def test_the_cookie_is_kept_from_scripts_and_from_other_sites() -> None:
    said = Visitor(installed()).get().headers["Set-Cookie"]
    assert said.endswith("; Path=/; HttpOnly; SameSite=Strict")


def test_a_session_lasts() -> None:
    visitor = visiting(tiny=Process())
    token = visitor.token
    assert "Set-Cookie" not in visitor.get().headers
    assert visitor.token == token


def test_two_servers_of_one_host_do_not_share_a_cookie() -> None:
    host = installed()
    names = {
        request(host, "GET", "/synapse.html", {}, port=port).headers["Set-Cookie"].partition("=")[0]
        for port in (9001, 9002, "/run/supervisor.sock")
    }
    assert names == {"synapse_9001", "synapse_9002", "synapse_socket"}


def test_cookies_of_other_servers_are_no_hindrance() -> None:
    assert cookie("a", 'x={"b": [1; 2]}; a=1; a=2') == "1"
    assert cookie("a", "b=1") == ""


def test_another_process_knows_nothing_of_a_session() -> None:
    one, other = Sessions(), Sessions()
    session = one.new()
    assert one.allows(session, one.token(session))
    assert not other.allows(session, one.token(session))
    assert not one.is_ours(session + "0")


def test_what_is_kept_of_sessions_is_bounded() -> None:
    sessions = Sessions()
    first, *rest = [sessions.new() for _ in range(200)]
    for session in (first, *rest):
        for number in range(20):
            sessions.note(session, Wish(str(number)))
    assert sessions.wishes(first) == []
    assert [wish.text for wish in sessions.wishes(rest[-1])] == [
        str(number) for number in range(19, 11, -1)
    ]
    assert sum(bool(sessions.wishes(session)) for session in rest) == 64


def test_what_one_asked_for_is_not_shown_to_another() -> None:
    visitor = visiting(tiny=Process())
    visitor.do("disable tiny")
    other = Visitor(visitor.host)
    other.get()
    assert other.wishes() == []


# --- acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["enable", "disable", "drain"])
def test_a_command_goes_to_the_listener_and_its_answer_is_shown(verb: str) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.do(f"{verb} tiny") == f"under way {verb} tiny"
    assert waiting(visitor.host) == [(verb, "tiny", "")]
    (command,) = visitor.host.board.mailbox.waiting()
    visitor.host.board.mailbox.answer(command.id, Answer(False, "because <b>"))
    assert visitor.wishes() == [f"failed {verb} tiny: because &lt;b&gt;"]


def test_a_swap_is_asked_for() -> None:
    visitor = visiting(tiny=Process(), other=Process())
    assert visitor.do("swap", old="tiny", new="other") == "under way swap tiny other"
    assert waiting(visitor.host) == [("swap", "tiny", "other")]


@pytest.mark.parametrize(("typed", "asked"), [("", ""), (" 12 ", "12")])
def test_a_rollback_is_asked_for(typed: str, asked: str) -> None:
    visitor = visiting(tiny=Process())
    visitor.do("rollback", model="tiny", generation=typed)
    assert waiting(visitor.host) == [("rollback", "tiny", asked)]


@pytest.mark.parametrize("typed", ["x", "-1", "1.5", "9" * 30, "\u0663"])
def test_what_is_no_generation_is_refused(typed: str) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.post({"do": "rollback", "model": "tiny", "generation": typed}).status == 400
    assert waiting(visitor.host) == []


@pytest.mark.parametrize(
    ("what", "form", "why"),
    [
        ("swap", {"old": "tiny", "new": "tiny"}, "cannot take its own place"),
        ("swap", {"old": "tiny", "new": "<b>"}, "no such program"),
        ("enable nobody", {}, "no such program"),
        ("enable", {}, "no such program"),
        ("rollback", {"model": "nobody"}, "no such program"),
    ],
)
def test_what_the_plugin_refuses_is_shown_with_its_reason(
    what: str, form: dict[str, str], why: str
) -> None:
    visitor = visiting(tiny=Process())
    said = visitor.do(what, **form)
    assert said.startswith("failed")
    assert why in said
    assert waiting(visitor.host) == []


def test_a_full_mailbox_is_told() -> None:
    visitor = visiting(tiny=Process())
    for number in range(256):
        visitor.host.board.mailbox.post("enable", f"model-{number}")
    assert "takes no commands now" in visitor.do("disable tiny")


@pytest.mark.parametrize("what", ["", "explode tiny", "stop nobody", "stop", "publish tiny", "_x"])
def test_what_the_page_does_not_offer_is_not_done(what: str) -> None:
    visitor = visiting(tiny=Process())
    assert visitor.post({"do": what}).status == 400
    assert visitor.wishes() == []


def test_a_program_that_is_no_model_is_left_alone() -> None:
    visitor = visiting(tiny=Process())
    other = Process()
    visitor.host.process_groups["database"] = SimpleNamespace(processes={"database": other})
    assert visitor.post({"do": "stop database"}).status == 400
    assert other.stops == 0


def test_a_model_is_started_and_stopped_without_waiting() -> None:
    process = Process(ProcessStates.STOPPED)
    visitor = visiting(tiny=process)
    assert visitor.do("start tiny") == "done start tiny: supervisord has started it"
    assert process.spawns == 1
    process.state = ProcessStates.RUNNING
    assert "drains first" in visitor.do("stop tiny")
    assert process.stops == 1


@pytest.mark.parametrize(
    ("state", "what", "why"),
    [
        (ProcessStates.RUNNING, "start tiny", "it runs already"),
        (ProcessStates.STOPPED, "stop tiny", "it does not run"),
        (ProcessStates.STOPPING, "start tiny", "it is still stopping"),
        (ProcessStates.STOPPING, "stop tiny", "it does not run"),
    ],
)
def test_what_cannot_be_done_now_is_told(state: int, what: str, why: str) -> None:
    visitor = visiting(tiny=Process(state))
    assert visitor.do(what) == f"failed {what}: {why}"
    assert visitor.host.logged == []


def test_a_restart_starts_when_it_has_stopped() -> None:
    process = Process()
    visitor = visiting(tiny=process)
    assert visitor.do("restart tiny").startswith("under way restart tiny")
    process.transition()
    assert (process.stops, process.spawns) == (1, 0)
    process.state = ProcessStates.STOPPED
    process.transition()
    process.transition()
    assert process.spawns == 1
    assert "transition" not in vars(process)
    assert visitor.wishes() == ["done restart tiny: supervisord has started it again"]


def test_supervisord_looks_at_a_process_that_restarts_as_at_any() -> None:
    process = Process()
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    before = process.looks
    process.transition()
    assert process.looks == before + 1


def test_a_restart_of_what_is_stopping_waits_for_that() -> None:
    process = Process(ProcessStates.STOPPING)
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    process.state = ProcessStates.STOPPED
    process.transition()
    assert (process.stops, process.spawns) == (0, 1)


def test_a_restart_of_what_is_stopped_is_a_start() -> None:
    process = Process(ProcessStates.EXITED)
    assert "started it" in visiting(tiny=process).do("restart tiny")
    assert process.spawns == 1


def test_a_second_restart_joins_the_first() -> None:
    process = Process()
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    assert "restarted already" in visitor.do("restart tiny")
    process.state = ProcessStates.STOPPED
    process.transition()
    process.transition()
    assert process.spawns == 1


def test_a_stop_puts_an_end_to_a_restart() -> None:
    process = Process()
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    assert "not started again" in visitor.do("stop tiny")
    process.state = ProcessStates.STOPPED
    process.transition()
    assert process.spawns == 0


def test_a_restart_that_does_not_stop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process()
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    process.transition()
    assert visitor.wishes() == [
        "failed restart tiny: it did not stop in time, and was not started again"
    ]
    process.state = ProcessStates.STOPPED
    process.transition()
    assert process.spawns == 0


def test_a_restart_whose_program_was_taken_away_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = visiting(tiny=Process())
    visitor.do("restart tiny")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert visitor.wishes() == ["failed restart tiny: it was not started again"]


@pytest.mark.parametrize("error", [RPCError(50, "tiny"), AssertionError("x")])
def test_a_start_that_fails_after_a_stop_is_told_and_leaves_supervisord_alone(
    error: Exception,
) -> None:
    class Unstartable(Process):
        def spawn(self) -> None:
            raise error

    process = Unstartable()
    visitor = visiting(tiny=process)
    visitor.do("restart tiny")
    process.state = ProcessStates.STOPPED
    process.transition()
    assert "failed restart tiny: it was stopped, but not started" in visitor.wishes()[0]


def test_a_search_for_models_is_started_and_its_end_is_shown() -> None:
    discover = Process(ProcessStates.EXITED, "synapse discover")
    visitor = visiting(tiny=Process())
    visitor.host.process_groups["discover"] = SimpleNamespace(processes={"discover": discover})
    assert visitor.do("discover") == "under way discover"
    assert discover.spawns == 1
    discover.state = ProcessStates.EXITED
    assert visitor.wishes() == ["done discover: done"]
    visitor.do("discover")
    discover.state, discover.exitstatus = ProcessStates.EXITED, 2
    assert visitor.wishes()[0] == "failed discover: exit status 2: look at its log"


def test_a_supervisord_without_that_program_says_so() -> None:
    assert "no such program" in visiting(tiny=Process()).do("discover")


def test_an_answer_that_was_lost_is_told() -> None:
    visitor = visiting(tiny=Process())
    visitor.do("drain tiny")
    visitor.host.board.mailbox = type(visitor.host.board.mailbox)()
    assert "its answer was lost" in visitor.wishes()[0]


# --- the stock page ------------------------------------------------------------------------------

_STOCK = '<ul class="clr" id="buttons">\n<li>a</li></ul><table/><ul><li>b</li></ul>'


def test_the_stock_page_gets_one_button_more() -> None:
    page = stock_page.with_link(_STOCK)
    assert page.count("synapse.html") == 1
    assert page.index("synapse.html") < page.index("<table/>")


@pytest.mark.parametrize("page", ["<html>another page</html>", "", object(), None])
def test_a_page_that_looks_otherwise_stays_as_it_is(page: object) -> None:
    assert stock_page.with_link(page) is page
