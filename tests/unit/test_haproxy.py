"""HAProxy from outside: its version, its judgement of a configuration, and its runtime socket."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import haproxy
from supervisor_synapse.adapters.haproxy import Haproxy, Runtime, Unknown, map_text
from supervisor_synapse.errors import TransientError
from tests.gateways import IS_THERE, Proxy, StubServer, all_ready, programs, proxy
from tests.integration.harness import wait_until

needs_haproxy = pytest.mark.skipif(not IS_THERE, reason="haproxy is not installed")

FEATURES = "Feature list : +EPOLL -KQUEUE +LUA +OPENSSL +PROMEX\n"


# --- which one there is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "version", "problem"),
    [
        (f"HAProxy version 2.6.12-1+deb12u3 2025/10/03\n{FEATURES}", (2, 6), ""),
        (f"HAProxy version 3.0-dev1-abc\n{FEATURES}", (3, 0), ""),
        (f"HAProxy version 10.2.1\n{FEATURES}", (10, 2), ""),
        (f"HAProxy version 2.4.30\n{FEATURES}", (2, 4), "it is older than 2.6"),
        (f"HA-Proxy version 1.8.19-1\n{FEATURES}", (0, 0), "it is older than 2.6"),
        ("HAProxy version 2.8.1\nFeature list : -LUA +PROMEX", (2, 8),
         "it was built without LUA"),
        ("HAProxy version 2.8.1\nFeature list : +LUAJIT -PROMEX", (2, 8),
         "it was built without LUA and PROMEX"),
        ("", (0, 0), "it is older than 2.6"),
        ("\0\ufffd" * 1000, (0, 0), "it is older than 2.6"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_what_it_says_of_itself_decides_whether_it_can_serve(
    said: str, version: tuple[int, int], problem: str
) -> None:
    assert haproxy.parse_version("/h", said) == Haproxy("/h", version, problem)


@given(st.text())
def test_whatever_it_says_is_no_crash(said: str) -> None:
    assert haproxy.parse_version("/h", said).path == "/h"


@needs_haproxy
def test_the_one_that_is_installed_is_found_and_its_version_read() -> None:
    found = haproxy.find()
    assert found is not None
    assert found.version >= haproxy.OLDEST
    assert found.problem == ""


def test_one_that_cannot_be_run_is_found_with_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "haproxy"
    path.write_bytes(b"\x7fELF nothing")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = haproxy.find()
    assert found is not None
    assert "does not say its version" in found.problem


# --- its judgement -------------------------------------------------------------------------------


@needs_haproxy
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frontend a\n    bind unix@/tmp/never.sock\n    timeout client 1s\n", ""),
        ("global\n    no such keyword\n", "unknown keyword"),
        ("backend a\n    server x 1.2.3.4:99999999\n", "port"),
        ("\0\xff\n", "parsing"),
    ],
)
def test_a_configuration_is_judged_by_haproxy_in_its_own_words(
    tmp_path: Path, text: str, said: str
) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    found = haproxy.find()
    assert found is not None
    problem = haproxy.check(found, config)
    assert said in problem
    assert bool(problem) is bool(said)
    assert len(problem) <= 1000


def test_one_that_is_not_there_any_more_judges_nothing(tmp_path: Path) -> None:
    gone = Haproxy(str(tmp_path / "haproxy"), (2, 6))
    assert "could not check it" in haproxy.check(gone, tmp_path / "haproxy.cfg")


# --- the runtime socket of a real one ------------------------------------------------------------


@pytest.fixture(scope="module")
def live() -> Iterator[Proxy]:
    """Before `a`, which is there, and `b`, which is not."""
    server = StubServer("a")
    with contextlib.closing(server), proxy({"a": server.port, "b": 1}) as found:
        wait_until(lambda: not found.runtime.servers()["b"].is_up, 10, "it knows")
        yield found


@needs_haproxy
def test_it_says_who_it_is_and_which_servers_are_up(live: Proxy) -> None:
    assert live.process is not None
    assert live.runtime.pid() != live.process.pid, "the worker's"
    servers = live.runtime.servers()
    assert {name: one.is_up for name, one in servers.items()} == {"a": True, "b": False}


@needs_haproxy
def test_a_server_that_is_taken_out_is_seen_so_until_it_is_brought_back(live: Proxy) -> None:
    live.runtime.drain("a")
    assert live.runtime.servers()["a"].is_draining
    live.runtime.admit("a")
    assert not live.runtime.servers()["a"].is_draining


@needs_haproxy
def test_a_server_that_has_moved_is_found_and_told_twice_is_no_error(live: Proxy) -> None:
    other = StubServer("b")
    with contextlib.closing(other):
        for _ in range(2):
            live.runtime.move("b", "127.0.0.1", other.port)
        assert live.ask({"model": "b"}).json()["server"] == "b"
        live.runtime.move("b", "127.0.0.1", 1)


@needs_haproxy
def test_what_it_does_not_have_is_unknown(live: Proxy) -> None:
    for do in (live.runtime.drain, live.runtime.admit):
        with pytest.raises(Unknown, match="No such backend"):
            do("nobody")
    with pytest.raises(Unknown):
        live.runtime.move("nobody", "127.0.0.1", 1)
    with pytest.raises(TransientError, match="no map"):
        live.runtime.replace_map(Path("/nowhere.map"), {})


@needs_haproxy
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9=*][A-Za-z0-9._:/@+-]{0,60}", fullmatch=True),
        st.text(min_size=1).map(lambda text: f"refuse {text}".strip()),
    )
)
def test_a_map_reads_back_as_it_was_told_whatever_stands_in_it(
    live: Proxy, entries: dict[str, str]
) -> None:
    path = Path(live.paths.models_map)
    live.runtime.replace_map(path, entries)
    shown = live.runtime.ask(f"show map {path}").splitlines()
    found = dict(line.split(" ", 2)[1:] for line in shown if line)
    assert found == dict(line.split(" ", 1) for line in map_text(entries).splitlines())


@needs_haproxy
def test_a_map_that_is_larger_than_a_command_may_be_is_told_whole(live: Proxy) -> None:
    found = all_ready(programs(*[f"model-{number:04}-{'x' * 40}" for number in range(1000)]))
    path = Path(live.paths.models_map)
    live.runtime.replace_map(path, found.models)
    shown = live.runtime.ask(f"show map {path}").splitlines()
    assert len([line for line in shown if line]) == len(found.models)
    live.tell(all_ready(programs("a", "b")))


# --- a socket that is not what it should be ------------------------------------------------------


@contextlib.contextmanager
def scripted(answer: Callable[[socket.socket], object]) -> Iterator[Runtime]:
    """A runtime socket on which `answer` is given to each connection; a timeout of 0.5 s."""
    folder = Path(tempfile.mkdtemp(prefix="hs", dir="/tmp"))
    halt = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not halt.is_set():
            with contextlib.suppress(OSError):
                link, _ = listener.accept()
                with link:
                    answer(link)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield Runtime(folder / "s", 0.5)
        halt.set()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
            last.connect(str(folder / "s"))
    thread.join(5)
    shutil.rmtree(folder)


def silent(link: socket.socket) -> None:
    link.settimeout(3)
    while link.recv(4096):
        pass


def dribbling(link: socket.socket) -> None:
    for _ in range(40):
        link.sendall(b"x")
        time.sleep(0.1)


def endless(link: socket.socket) -> None:
    while True:
        link.sendall(b"x" * 65536)


ODD = {"silent": silent, "dribbling": dribbling, "endless": endless}


@pytest.mark.parametrize("how", ODD)
def test_one_that_does_not_answer_properly_costs_no_more_than_its_time(how: str) -> None:
    with scripted(ODD[how]) as runtime:
        for ask in (runtime.pid, runtime.servers, lambda: runtime.drain("a")):
            begun = time.monotonic()
            with pytest.raises(TransientError, match="does not answer"):
                ask()
            assert time.monotonic() - begun < 3


GARBAGE = [
    b"", b"\0" * 100, b"\xff\xfe", b"Pid: many\n", b"# pxname,svname\na,model\n",
    b"# pxname,svname,status,scur\na,model,UP,many\n", b"# pxname,svname,status,scur\na,model\n",
    b"# a,a,a\n,,,,,,\n", b"Unknown command\n", b'# pxname,svname\n"' + b"x" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: ascii(text)[:30])
def test_garbage_is_an_error_of_this_moment_or_says_nothing(text: bytes) -> None:
    def answer(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(text)

    with scripted(answer) as runtime:
        with pytest.raises(TransientError):
            runtime.pid()
        with pytest.raises(TransientError):
            runtime.replace_map(Path("/a.map"), {"a": "serve"})
        with pytest.raises(TransientError):
            runtime.move("a", "127.0.0.1", 1)
        with contextlib.suppress(TransientError):
            assert runtime.servers() == {}


def test_a_map_that_is_refused_half_way_leaves_no_half_of_it() -> None:
    asked: list[bytes] = []

    def answer(link: socket.socket) -> None:
        asked.append(link.recv(4096))
        link.sendall(b"New version created: 7\n" if b"prepare" in asked[-1] else b"no room\n")

    with scripted(answer) as runtime, pytest.raises(TransientError, match="no room"):
        runtime.replace_map(Path("/our maps/a.map"), {"a": "serve"})
    assert asked[:3] == [
        b"prepare map /our\\ maps/a.map\n",
        b"add map @7 /our\\ maps/a.map <<\na serve\n\n",
        b"clear map @7 /our\\ maps/a.map\n",
    ]


def test_nobody_there_is_an_error_of_this_moment(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="does not answer"):
        Runtime(tmp_path / "nothing").pid()
    with pytest.raises(TransientError, match="does not answer"):
        Runtime(Path("/" + "x" * 300)).pid()


# --- what a client meets -------------------------------------------------------------------------


@needs_haproxy
def test_a_request_that_lost_its_server_goes_on_to_the_next_run_of_it(live: Proxy) -> None:
    """Between the decision and the connection."""
    server = StubServer("b")
    live.runtime.move("b", "127.0.0.1", server.port)
    wait_until(lambda: live.runtime.servers()["b"].is_up, 10)
    server.close()
    replies: list[int] = []
    asking = [
        threading.Thread(target=lambda: replies.append(live.ask({"model": "b"}).status))
        for _ in range(20)
    ]
    for thread in asking:
        thread.start()
    again = StubServer("b", server.port)
    with contextlib.closing(again):
        for thread in asking:
            thread.join(20)
        assert replies == [200] * 20
    live.runtime.move("b", "127.0.0.1", 1)
