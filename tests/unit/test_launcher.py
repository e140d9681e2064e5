"""The launcher's decisions and parsers: whole stops replayed as histories, no process started."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse import launcher
from supervisor_synapse.core.settings import StopPolicy
from supervisor_synapse.launcher import (
    Action,
    Claim,
    Exited,
    Look,
    Phase,
    Policy,
    Seen,
    Server,
    Sight,
    StartError,
    State,
    StopAsked,
    Tick,
    Why,
    Word,
    next_step,
)
from tests.gateways import Front, fronting

ANYWHERE = "0.0.0.0"  # noqa: S104 - where a server may be told to listen
POLICY = Policy(drain_seconds=30, term_seconds=2)
STOP = StopAsked("SIGTERM")
PARENT_DIED = StopAsked(launcher.PARENT_DIED)


def busy(requests: int) -> Look:
    """A look that finds so many requests under way."""
    return Look(Sight.LOAD, requests)


IDLE = busy(0)
CLEAN = Exited(0)
FAILED = Exited(1 << 8)


def killed_by(number: int) -> Exited:
    return Exited(number)


# --- whole stops ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """What is seen, and at which second; what is done about it, and what is said in the end."""

    seen: list[tuple[float, Seen]]
    done: list[tuple[float, Action]]
    said: dict[str, object]
    exits: int = 0
    policy: Policy = field(default=POLICY)


LOOK, TERM, KILL = Action.LOOK, Action.TERM, Action.KILL

HISTORIES = {
    "an idle server is stopped after a second look": History(
        [(0, STOP), (0.01, IDLE), (0.07, Tick()), (0.08, IDLE), (0.2, CLEAN)],
        [(0, LOOK), (0.07, LOOK), (0.08, TERM)],
        {"why": Why.IDLE, "drained": 0, "cut": 0, "sent": "TERM"},
    ),
    "one idle look is not enough": History(
        [(0, STOP), (0.01, IDLE), (0.07, Tick()), (0.08, busy(1)), (0.2, Tick()),
         (0.21, IDLE), (0.3, Tick()), (0.31, IDLE), (0.4, CLEAN)],
        [(0, LOOK), (0.07, LOOK), (0.2, LOOK), (0.3, LOOK), (0.31, TERM)],
        {"why": Why.IDLE, "drained": 1, "cut": 0},
    ),
    "requests that finish are counted, also those that waited for a slot": History(
        [(0, STOP), (0.01, busy(4)), (0.11, Tick()), (0.12, busy(3)),
         (0.22, Tick()), (0.23, busy(1)), (0.33, Tick()), (0.34, IDLE), (0.4, Tick()),
         (0.41, IDLE), (0.5, CLEAN)],
        [(0, LOOK), (0.11, LOOK), (0.22, LOOK), (0.33, LOOK), (0.4, LOOK), (0.41, TERM)],
        {"drained": 4, "cut": 0, "why": Why.IDLE},
    ),
    "requests that come during the drain are waited for as well": History(
        [(0, STOP), (0.01, busy(1)), (0.11, Tick()), (0.12, busy(3)), (0.22, Tick()), (0.23, IDLE),
         (0.28, Tick()), (0.29, IDLE), (0.3, CLEAN)],
        [(0, LOOK), (0.11, LOOK), (0.22, LOOK), (0.28, LOOK), (0.29, TERM)],
        {"drained": 3, "cut": 0},
    ),
    "a look that taught nothing takes nothing back": History(
        [(0, STOP), (0.01, busy(1)), (0.11, Tick()), (0.12, IDLE), (0.17, Tick()),
         (0.18, Look(Sight.UNKNOWN)), (0.23, Tick()), (0.24, IDLE), (0.3, CLEAN)],
        [(0, LOOK), (0.11, LOOK), (0.17, LOOK), (0.23, LOOK), (0.24, TERM)],
        {"why": Why.IDLE, "drained": 1, "cut": 0},
    ),
    "past the deadline the rest is cut": History(
        [(0, STOP), (0.01, busy(3)), (29.9, Tick()), (29.91, busy(2)),
         (30, Tick()), (30.1, CLEAN)],
        [(0, LOOK), (29.9, LOOK), (30, TERM)],
        {"why": Why.DEADLINE, "drained": 1, "cut": 2},
    ),
    "the deadline comes while a look is under way": History(
        [(0, STOP), (0.01, busy(1)), (29.9, Tick()), (30, Tick()), (30.2, CLEAN)],
        [(0, LOOK), (29.9, LOOK), (30, TERM)],
        {"why": Why.DEADLINE, "drained": 0, "cut": 1},
    ),
    "who asks again ends the drain": History(
        [(0, STOP), (0.01, busy(1)), (1, StopAsked("SIGINT")), (1.1, CLEAN)],
        [(0, LOOK), (1, TERM)],
        {"why": Why.ASKED_AGAIN, "cut": 1, "asked_by": "SIGTERM"},
    ),
    "who asks again at once is obeyed, without knowing what is cut": History(
        [(0, STOP), (0, STOP), (0.1, CLEAN)],
        [(0, LOOK), (0, TERM)],
        {"why": Why.ASKED_AGAIN, "cut": None},
    ),
    "a parent that dies during a drain does not shorten it": History(
        [(0, STOP), (0.01, busy(1)), (1, PARENT_DIED), (2, Tick()), (2.1, IDLE), (2.2, Tick()),
         (2.21, IDLE), (2.3, CLEAN)],
        [(0, LOOK), (2, LOOK), (2.2, LOOK), (2.21, TERM)],
        {"why": Why.IDLE, "drained": 1, "cut": 0},
    ),
    "a parent's death is drained like a TERM": History(
        [(0, PARENT_DIED), (0.01, IDLE), (0.07, Tick()), (0.08, IDLE), (0.2, CLEAN)],
        [(0, LOOK), (0.07, LOOK), (0.08, TERM)],
        {"why": Why.IDLE, "asked_by": "parent-died"},
    ),
    "a client that stays attached costs a second TERM": History(
        [(0, STOP), (0.01, IDLE), (0.07, Tick()), (0.08, IDLE), (2, Tick()), (2.1, Tick()),
         (2.2, FAILED)],
        [(0, LOOK), (0.07, LOOK), (0.08, TERM), (2.1, TERM)],
        {"sent": "TERM+TERM", "why": Why.IDLE},
    ),
    "what ignores TERM twice is killed": History(
        [(0, STOP), (0.01, IDLE), (0.07, Tick()), (0.08, IDLE), (2.1, Tick()), (3, STOP),
         (4.1, Tick()), (4.2, killed_by(signal.SIGKILL))],
        [(0, LOOK), (0.07, LOOK), (0.08, TERM), (2.1, TERM), (4.1, KILL)],
        {"sent": "KILL"},
    ),
    "what even KILL does not end is given up and reported": History(
        [(0, STOP), (0.01, Look(Sight.REFUSED)), (2.01, Tick()), (4.01, Tick()), (8.01, Tick())],
        [(0, LOOK), (0.01, TERM), (2.01, TERM), (4.01, KILL)],
        {"sent": "KILL", "status": None, "phase": Phase.ENDED},
        exits=launcher.EXIT_OS_ERROR,
    ),
    "a server that still loads is not waited for": History(
        [(0, STOP), (0.01, Look(Sight.LOADING)), (0.02, killed_by(signal.SIGTERM))],
        [(0, LOOK), (0.01, TERM)],
        {"why": Sight.LOADING, "cut": 0},
    ),
    "a sleeping server is not waited for": History(
        [(0, STOP), (0.01, Look(Sight.ASLEEP)), (0.2, CLEAN)],
        [(0, LOOK), (0.01, TERM)],
        {"why": Sight.ASLEEP, "cut": 0},
    ),
    "a server that nobody can reach is not waited for": History(
        [(0, STOP), (0.01, Look(Sight.REFUSED)), (0.2, CLEAN)],
        [(0, LOOK), (0.01, TERM)],
        {"why": Sight.REFUSED, "cut": 0},
    ),
    "two silent looks: hung": History(
        [(0, STOP), (1, Look(Sight.SILENT)), (1.1, Tick()),
         (2.1, Look(Sight.SILENT)), (4.1, Tick()), (6.1, Tick()),
         (6.2, killed_by(signal.SIGKILL))],
        [(0, LOOK), (1.1, LOOK), (2.1, TERM), (4.1, TERM), (6.1, KILL)],
        {"why": Sight.SILENT, "cut": None},
    ),
    "silent and computing: a long batch, not a hung server": History(
        [(0, STOP), (1, Look(Sight.SILENT)), (1.1, Tick()), (2.1, Look(Sight.WORKING)),
         (2.2, Tick()), (3.2, Look(Sight.SILENT)), (3.31, Tick()), (3.4, busy(1)), (3.51, Tick()),
         (3.6, IDLE), (3.7, Tick()), (3.8, IDLE), (3.9, CLEAN)],
        [(0, LOOK), (1.1, LOOK), (2.2, LOOK), (3.31, LOOK), (3.51, LOOK), (3.7, LOOK), (3.8, TERM)],
        {"why": Why.IDLE, "drained": 1},
    ),
    "a single silent look proves nothing": History(
        [(0, STOP), (1, Look(Sight.SILENT)), (1.1, Tick()), (1.2, busy(1)), (1.3, Tick()),
         (2.3, Look(Sight.SILENT)), (2.4, Tick()), (2.5, IDLE), (2.6, Tick()), (2.7, IDLE),
         (2.8, CLEAN)],
        [(0, LOOK), (1.1, LOOK), (1.3, LOOK), (2.4, LOOK), (2.6, LOOK), (2.7, TERM)],
        {"why": Why.IDLE, "drained": 1},
    ),
    "a server that does not say is given its whole time": History(
        [(0, STOP), (0.1, Look(Sight.UNKNOWN)), (0.2, Tick()), (0.3, Look(Sight.UNKNOWN)),
         (30, Tick()), (30.1, CLEAN)],
        [(0, LOOK), (0.2, LOOK), (30, TERM)],
        {"why": Why.DEADLINE, "cut": None},
    ),
    "no drain is asked for": History(
        [(0, STOP), (0.1, CLEAN)],
        [(0, TERM)],
        {"why": Why.NO_DRAIN, "cut": None},
        policy=Policy(0, 2),
    ),
    "a crash during the drain keeps its status": History(
        [(0, STOP), (0.01, busy(2)), (0.5, killed_by(signal.SIGSEGV))],
        [(0, LOOK)],
        {"why": Why.EXITED, "cut": 2, "sent": "none"},
        exits=128 + signal.SIGSEGV,
    ),
    "a server that got the TERM as well ended as it was told": History(
        [(0, STOP), (0.01, killed_by(signal.SIGTERM))],
        [(0, LOOK)],
        {"why": Why.EXITED, "sent": "none"},
    ),
    "an exit that nobody asked for passes its status on": History(
        [(5, FAILED)], [], {"asked_by": None, "why": None}, exits=1
    ),
    "a kill that nobody asked for passes its signal on": History(
        [(5, killed_by(signal.SIGTERM))], [], {"asked_by": None}, exits=128 + signal.SIGTERM
    ),
    "looks and ticks mean nothing while serving": History(
        [(1, IDLE), (2, Tick()), (3, CLEAN)], [], {"asked_by": None, "sent": "none"}
    ),
}  # fmt: skip


def replay(
    seen: list[tuple[float, Seen]], policy: Policy
) -> tuple[State, list[tuple[float, Action]]]:
    state, done = State(), []
    for now, what in seen:
        state, actions = next_step(state, what, now, policy)
        done += [(now, action) for action in actions]
    return state, done


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_stop_goes_as_it_should(history: History) -> None:
    state, done = replay(history.seen, history.policy)
    assert done == history.done
    assert state.phase is Phase.ENDED
    assert {name: getattr(state, name) for name in history.said} == history.said
    assert launcher.exit_status(state) == history.exits


SEEN = st.one_of(
    st.builds(StopAsked, st.sampled_from(["SIGTERM", "SIGINT", launcher.PARENT_DIED])),
    st.builds(Look, st.sampled_from(Sight), st.integers(0, 3)),
    st.just(Tick()),
)
STEPS = st.lists(st.tuples(st.floats(0, 20), SEEN), max_size=60)
POLICIES = st.builds(Policy, st.floats(0, 60), st.floats(0, 10))


@given(STEPS, POLICIES)
def test_means_only_grow_stronger_and_each_has_its_time(
    steps: list[tuple[float, Seen]], policy: Policy
) -> None:
    """Whatever is seen: looks, then TERM, TERM, KILL, each at least its time after the last."""
    now, seen = 0.0, []
    for pause, what in steps:
        now += pause
        seen.append((now, what))
    state, done = replay(seen, policy)
    means = [action for _, action in done if action is not LOOK]
    assert means == [TERM, TERM, KILL][: len(means)]
    times = [at for at, action in done if action is not LOOK]
    assert all(b >= a + policy.term_seconds for a, b in itertools.pairwise(times))
    assert LOOK not in [action for at, action in done if times and at > times[0]]
    assert state.drained >= 0


@given(STEPS, POLICIES)
def test_a_stop_always_comes_to_an_end_in_its_time(
    steps: list[tuple[float, Seen]], policy: Policy
) -> None:
    """Looks never end and the server ignores everything: over before supervisord kills us."""
    state, _ = next_step(State(), STOP, 0.0, policy)
    now = 0.0
    for _, what in steps:
        state, _ = next_step(state, what, now, policy)
    while state.phase is not Phase.ENDED:
        assert state.wake_at < float("inf")
        now = max(now, state.wake_at)
        state, actions = next_step(state, Tick(), now, policy)
        if LOOK in actions:
            state, _ = next_step(state, Look(Sight.UNKNOWN), now, policy)
    assert now <= policy.drain_seconds + 2 * policy.term_seconds + 5 - 0.9


def test_the_launcher_has_ended_before_supervisord_kills_it() -> None:
    """A stop that needs all its time still leaves some to say so."""
    state, _ = next_step(State(), STOP, 0.0, POLICY)
    steps = itertools.count()
    while state.phase is not Phase.ENDED and next(steps) < 10:
        now = state.wake_at
        state, _ = next_step(state, Tick(), now, POLICY)
    patience = StopPolicy(drain_seconds=30, term_seconds=2).longest_seconds
    assert state.phase is Phase.ENDED
    assert now <= patience - 1


def test_the_line_about_a_stop_names_what_happened() -> None:
    state, _ = replay(HISTORIES["past the deadline the rest is cut"].seen, POLICY)
    assert launcher.last_line(state, 30.25) == (
        "stopped: drained=1, cut=2, deadline_hit=yes, seconds=30.25, signal=TERM, "
        "asked_by=SIGTERM, drain_ended_by=deadline, server=exit 0"
    )


ENDINGS = {
    "exit 1": (FAILED, "server=exit 1, seconds=2.50"),
    "an old processor": (
        killed_by(signal.SIGILL),
        "server=SIGILL, seconds=2.50 (illegal instruction: engine built for a newer processor than "
        "this one)",
    ),
    "a kill": (
        killed_by(signal.SIGKILL),
        "server=SIGKILL, seconds=2.50 (by somebody, or by the kernel because memory ran out)",
    ),
    "an abort": (killed_by(signal.SIGABRT), "server=SIGABRT, seconds=2.50"),
}


@pytest.mark.parametrize(("end", "words"), ENDINGS.values(), ids=ENDINGS)
def test_the_line_about_an_end_by_itself_says_what_helps(end: Exited, words: str) -> None:
    state, _ = next_step(State(), end, 5.0, POLICY)
    assert launcher.last_line(state, 2.5) == f"ended by itself: {words}"
    assert launcher.last_line(state, 2.5, [7, 8]).count("left_behind=7+8") == 1


def test_a_kill_of_our_own_needs_no_explanation() -> None:
    state, _ = replay(HISTORIES["what ignores TERM twice is killed"].seen, POLICY)
    assert launcher.last_line(state, 4.0).endswith("server=SIGKILL")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit 0"),
        (3 << 8, "exit 3"),
        (signal.SIGABRT, "SIGABRT"),
        (signal.SIGSEGV | 0x80, "SIGSEGV"),
        (50, "signal 50"),
    ],
)
def test_a_wait_status_is_said_in_words(status: int, words: str) -> None:
    assert launcher.describe_status(status) == words


# --- command lines -------------------------------------------------------------------------------


def server(*words: str, **environment: str) -> Server:
    return launcher.parse_server(("/bin/llama-server", *words), environment)


SERVERS = {
    "nothing said: the server's own defaults": (server(), ("127.0.0.1", 8080, (), "", "")),
    "two words each": (
        server("--model", "/m.gguf", "--host", "::1", "--port", "8101"),
        ("::1", 8101, ("/m.gguf",), "", ""),
    ),
    "one word each": (
        server("--model=/a=b.gguf", f"--host={ANYWHERE}", "--port=8102", "--api-prefix=/p"),
        (ANYWHERE, 8102, ("/a=b.gguf",), "", "/p"),
    ),
    "short names": (
        server("-m", "/m.gguf", "-mm", "/p.gguf"),
        ("127.0.0.1", 8080, ("/m.gguf", "/p.gguf"), "", ""),
    ),
    "the last one wins": (
        server("--port", "1", "--port", "2", "--port=3"),
        ("127.0.0.1", 3, (), "", ""),
    ),
    "also of several models": (
        server("--model", "/old.gguf", "-m", "/new.gguf"),
        ("127.0.0.1", 8080, ("/new.gguf",), "", ""),
    ),
    "from the environment": (
        server(LLAMA_ARG_PORT="8103", LLAMA_ARG_HOST="10.0.0.1", LLAMA_ARG_MODEL="/e.gguf"),
        ("10.0.0.1", 8103, ("/e.gguf",), "", ""),
    ),
    "the command line over the environment": (
        server("--port", "8104", LLAMA_ARG_PORT="8103"),
        ("127.0.0.1", 8104, (), "", ""),
    ),
    "a key file": (
        server("--api-key-file", "/k", "--port", "8105"),
        ("127.0.0.1", 8105, (), "/k", ""),
    ),
    "not a port: unknown": (server("--port", "http"), ("127.0.0.1", 0, (), "", "")),
    "too large a port: unknown": (server("--port", "65536"), ("127.0.0.1", 0, (), "", "")),
    "a far too large port: unknown": (server("--port", "9" * 5000), ("127.0.0.1", 0, (), "", "")),
    "a superscript is no port": (server("--port", "8²"), ("127.0.0.1", 0, (), "", "")),
    "a name without a value": (server("--host", "h", "--port"), ("h", 8080, (), "", "")),
}


@pytest.mark.parametrize(("found", "expected"), SERVERS.values(), ids=SERVERS)
def test_the_servers_command_line_says_where_it_listens(
    found: Server, expected: tuple[object, ...]
) -> None:
    assert (found.host, found.port, found.files, found.key_file, found.prefix) == expected


def test_the_servers_words_are_kept_as_they_are() -> None:
    words = ["--drain=1.5", "--term", "0", "--", "llama-server", "--", "--drain", "x y", "ä\n"]
    policy, found, record, ledger = launcher.parse_command(words, {})
    assert policy == Policy(1.5, 0.0)
    assert found.argv == ("llama-server", "--", "--drain", "x y", "ä\n")
    assert (record, ledger) == ("", "")


@pytest.mark.parametrize("words", [["--record", "/r/a b.run"], ["--record=/r/a b.run"]])
def test_the_file_that_names_a_run_is_known(words: list[str]) -> None:
    assert launcher.parse_command([*words, "--", "x"], {}).record == "/r/a b.run"


def test_the_ledger_is_known_and_the_record_names_the_model() -> None:
    words = ["--ledger", "/r/ledger.json", "--record", "/r/a.b.run", "--", "x", "--ledger", "y"]
    command = launcher.parse_command(words, {})
    assert command.ledger == "/r/ledger.json"
    assert launcher.model_of(command.record) == "a.b"


@pytest.mark.parametrize(
    "words",
    [
        [], ["--"], ["--drain", "5"], ["--drain"], ["--drain", "--", "x"],
        ["--drain", "-1", "--", "x"],
        ["--drain=nan", "--", "x"], ["--drain=inf", "--", "x"], ["--drain=", "--", "x"],
        ["--record", "--", "x"], ["--record=", "--", "x"], ["--record"],
        ["--ledger", "/r/ledger.json", "--", "x"], ["--record", "/r/a.run", "--ledger"],
        ["--term=two", "--", "x"], ["--other", "--", "x"], ["llama-server"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_with_the_usage(words: list[str]) -> None:
    with pytest.raises(StartError) as refused:
        launcher.parse_command(words, {})
    assert refused.value.status == launcher.EXIT_USAGE == os.EX_USAGE
    assert "usage: synapse-run" in str(refused.value)
    assert "\n" not in str(refused.value)


# --- before the start ----------------------------------------------------------------------------


ENGINE = "/nowhere/llama-server"  # whether it can run shows when it is run


def preflight(*words: str) -> None:
    port = [] if "--port" in words else ["--port", "0"]
    launcher.preflight(launcher.parse_server((ENGINE, *words, *port), {}))


def test_what_can_work_is_let_through(tmp_path: Path) -> None:
    model = tmp_path / "a model.gguf"
    model.touch()
    preflight("--model", str(model))


@pytest.mark.parametrize("flag", ["--model", "-m", "--mmproj", "-mm"])
@pytest.mark.parametrize(
    ("name", "why"),
    [("missing\n.gguf", "No such file"), ("", "not a file"), ("x" * 300, "too long")],
)
def test_a_missing_file_is_named_in_one_line(
    tmp_path: Path, flag: str, name: str, why: str
) -> None:
    with pytest.raises(StartError, match=why) as refused:
        preflight(flag, str(tmp_path / name))
    assert refused.value.status == launcher.EXIT_MODEL_MISSING == os.EX_NOINPUT
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch(0o000)
    with pytest.raises(StartError, match="Permission denied"):
        preflight("--model", str(model))


@pytest.mark.parametrize("host", ["127.0.0.1", ANYWHERE, "localhost"])
def test_a_taken_port_is_refused_and_its_holder_named(host: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        if host == "localhost" and launcher.resolve(server("--host", host)) is None:
            pytest.skip("no localhost")
        if host == "localhost" and ":" in _resolved(host):
            pytest.skip("localhost is IPv6 here")
        with pytest.raises(StartError, match=f"cannot listen on {host}:{port}") as refused:
            preflight("--host", host, "--port", port)
        assert refused.value.status == launcher.EXIT_PORT_IN_USE == os.EX_TEMPFAIL
        if Path("/proc/self/net/tcp").exists():
            assert f"pid {os.getpid()} (" in str(refused.value)
        preflight("--host", host, "--port", port, "--reuse-port")


def _resolved(host: str) -> str:
    address = launcher.resolve(server("--host", host))
    assert address is not None
    return str(address.target[0])


def test_connections_that_linger_do_not_take_a_port() -> None:
    """The side that closes first keeps its port in TIME_WAIT; a new server may have it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as llama-server does
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            assert client.recv(1) == b""
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))  # so that the next line shows something
    preflight("--port", str(port))


@pytest.mark.parametrize(
    "host", ["203.0.113.7", "no-such-host.invalid.", "/tmp/a.sock", "%", "a\nb"]
)
def test_an_address_that_only_the_server_can_judge_is_let_through(host: str) -> None:
    preflight("--host", host, "--port", "1")


# --- memory, by the listener's word --------------------------------------------------------------

MIB = 2**20
US = (os.getpid(), launcher.ticks_of(os.getpid()))  # a process that lives


def ledger_text(**changes: Any) -> bytes:
    """A ledger as it stands on disk, of a listener that lives; `entry`: of model a."""
    entry = {"admitted": False, "needs": {"CUDA0": 900 * MIB}, "could_stop": "b (500 MiB)"}
    entry |= changes.pop("entry", {})
    value: dict[str, Any] = {
        "version": 1, "listener": {"pid": US[0], "started": US[1]}, "room": {"CUDA0": 300 * MIB},
        "counted": [[7, 70]], "models": {"a": entry},
    }  # fmt: skip
    return json.dumps(value | changes).encode()


def test_a_model_that_was_not_admitted_is_known_with_what_it_needs_and_what_is_left() -> None:
    assert launcher.parse_ledger(ledger_text(), "a") == Word(
        US, {"CUDA0": 900 * MIB}, {"CUDA0": 300 * MIB}, frozenset({(7, 70)}), "b (500 MiB)"
    )


def test_what_was_admitted_or_is_not_in_the_ledger_may_start() -> None:
    assert launcher.parse_ledger(ledger_text(entry={"admitted": True}), "a") is None
    assert launcher.parse_ledger(ledger_text(), "b") is None


NONSENSE: dict[str, bytes] = {
    "empty": b"", "torn": ledger_text()[:-5], "no JSON": b"\xff\xfe", "a list": b"[]",
    "null": b"null", "too deep": b"[" * 100_000,
    "a huge number": ledger_text().replace(b"943718400", b"9" * 9000),
    "an older version": ledger_text(version=0), "a newer version": ledger_text(version=2),
    "a version that is true": ledger_text(version=True), "no listener": ledger_text(listener=None),
    "a listener of number 0": ledger_text(listener={"pid": 0, "started": 5}),
    "all processes for a listener": ledger_text(listener={"pid": -1, "started": 5}),
    "a listener of a huge number": ledger_text(listener={"pid": 2**70, "started": 5}),
    "a listener in words": ledger_text(listener={"pid": "1", "started": "5"}),
    "models in a list": ledger_text(models=["a"]), "rooms in a list": ledger_text(room=[300]),
    "a model in words": ledger_text(models={"a": "x"}),
    "a room in words": ledger_text(room={"CUDA0": "1"}),
    "a room that is no number": ledger_text(room={"CUDA0": float("nan")}),
    "a fractional room": ledger_text(room={"CUDA0": 0.5}),
    "needs below nothing": ledger_text(entry={"needs": {"CUDA0": -1}}),
    "no needs": ledger_text(entry={"needs": None}),
    "a need that is true": ledger_text(entry={"needs": {"CUDA0": True}}),
    "admitted in words": ledger_text(entry={"admitted": "no"}),
    "nobody counted": ledger_text(counted=None), "counted by halves": ledger_text(counted=[[7]]),
    "counted in words": ledger_text(counted=["7"]),
    "a list of what could be stopped": ledger_text(entry={"could_stop": ["b"]}),
}  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE.values(), ids=NONSENSE)
def test_a_ledger_that_makes_no_sense_is_none(text: bytes) -> None:
    assert launcher.parse_ledger(text, "a") is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
_PLACES = st.sampled_from(["version", "listener", "room", "counted", "models", "entry"])


@given(place=_PLACES, value=_JSON, text=st.binary(max_size=200))
def test_whatever_a_ledger_or_the_claims_hold_they_are_read_or_ignored(
    place: str, value: Any, text: bytes
) -> None:
    changed = {"entry": {"needs": value}} if place == "entry" else {place: value}
    word = launcher.parse_ledger(ledger_text(**changed), "a")
    if word is not None:
        launcher.refusal("a", launcher.what_lacks(word, []), word.could_stop)
    launcher.parse_ledger(text, "a")
    launcher.parse_claims(text)
    launcher.parse_claims(json.dumps([value, {"pid": 1, "started": 1, "needs": value}]).encode())


@pytest.mark.parametrize("spoilt", [{}, {"listener": {"pid": US[0], "started": US[1] + 1}}])
def test_the_word_holds_while_the_very_listener_lives(
    tmp_path: Path, spoilt: dict[str, Any]
) -> None:
    ledger = tmp_path / "ledger.json"
    ledger.write_bytes(ledger_text(**spoilt))
    assert (launcher.read_word(str(ledger), "a") is None) is bool(spoilt)


@pytest.mark.parametrize("pid", [2**22 + 7, 2**31 - 1])
def test_the_word_of_a_listener_that_has_ended_is_none(tmp_path: Path, pid: int) -> None:
    ledger = tmp_path / "ledger.json"
    ledger.write_bytes(ledger_text(listener={"pid": pid, "started": 5}))
    assert launcher.read_word(str(ledger), "a") is None


def test_a_ledger_too_large_to_be_ours_is_none(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    ledger.write_bytes(b" " * 2**20 + ledger_text())
    assert launcher.read_word(str(ledger), "a") is None


@pytest.mark.parametrize("kind", ["none", "folder", "pipe"])
def test_what_is_no_file_is_no_ledger_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    ledger = tmp_path / "ledger.json"
    match kind:
        case "folder":
            ledger.mkdir()
        case "pipe":
            os.mkfifo(ledger)
    assert launcher.read_word(str(ledger), "a") is None


def word(needs: dict[str, int], room: dict[str, int], *counted: tuple[int, int]) -> Word:
    """In MiB."""
    return Word(
        US, {name: size * MIB for name, size in needs.items()},
        {name: size * MIB for name, size in room.items()}, frozenset(counted), "",
    )  # fmt: skip


def claim(pid: int, started: int, **needs: int) -> Claim:
    return Claim(pid, started, {name: size * MIB for name, size in needs.items()})


FITS: dict[str, tuple[Word, list[Claim]]] = {
    "exactly": (word({"CUDA0": 300}, {"CUDA0": 300}), []),
    "nothing needed": (word({}, {}), []),
    "nothing needed where nothing is left": (word({"CUDA0": 0}, {"CUDA0": -5}), []),
    "nothing needed where nothing is known": (word({"CUDA0": 0}, {}), []),
    "beside a claim": (word({"CUDA0": 300}, {"CUDA0": 400}), [claim(7, 70, CUDA0=100)]),
    "beside a claim elsewhere": (word({"CUDA0": 300}, {"CUDA0": 300}), [claim(7, 70, CPU=100)]),
    "a claim that was counted is in the room already": (
        word({"CUDA0": 300}, {"CUDA0": 300}, (7, 70)), [claim(7, 70, CUDA0=100)],
    ),
}  # fmt: skip

LACKS: dict[str, tuple[Word, list[Claim], list[str]]] = {
    "too little": (word({"CUDA0": 900}, {"CUDA0": 300}), [], ["900 MiB on CUDA0, 300 MiB left"]),
    "beside claims": (
        word({"CUDA0": 300}, {"CUDA0": 700}), [claim(7, 70, CUDA0=300), claim(8, 80, CUDA0=200)],
        ["300 MiB on CUDA0, 200 MiB left"],
    ),
    "counted was one that had this number before": (
        word({"CUDA0": 300}, {"CUDA0": 300}, (7, 71)), [claim(7, 70, CUDA0=100)],
        ["300 MiB on CUDA0, 200 MiB left"],
    ),
    "less than nothing left": (
        word({"CUDA0": 1}, {"CUDA0": -300}), [], ["1 MiB on CUDA0, 0 MiB left"],
    ),
    "on two devices": (
        word({"CUDA0": 900, "CPU": 20, "RPC0": 5}, {"CUDA0": 300, "CPU": 20, "RPC0": 4}), [],
        ["900 MiB on CUDA0, 300 MiB left", "5 MiB on RPC0, 4 MiB left"],
    ),
    "nobody guesses that memory is free": (
        word({"CUDA0": 900}, {"CPU": 3000}), [],
        ["900 MiB on CUDA0, whose memory could not be read"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "claims"), FITS.values(), ids=FITS)
def test_a_model_starts_where_all_that_it_needs_is_left(said: Word, claims: list[Claim]) -> None:
    assert launcher.what_lacks(said, claims) == []


@pytest.mark.parametrize(("said", "claims", "lacks"), LACKS.values(), ids=LACKS)
def test_what_is_missing_is_said_device_by_device(
    said: Word, claims: list[Claim], lacks: list[str]
) -> None:
    assert launcher.what_lacks(said, claims) == lacks


def test_a_lack_of_one_byte_shows_in_the_numbers() -> None:
    """900 MiB needed where 900 MiB are left would puzzle."""
    said = Word(US, {"CPU": 900 * MIB + 2}, {"CPU": 900 * MIB + 1}, frozenset(), "")
    assert launcher.what_lacks(said, []) == ["901 MiB on CPU, 900 MiB left"]


def test_the_refusal_names_what_could_be_stopped_where_anything_could() -> None:
    lacks = ["900 MiB on CUDA0, 300 MiB left", "5 MiB on RPC0, 4 MiB left"]
    line = "a does not fit: needs 900 MiB on CUDA0, 300 MiB left and 5 MiB on RPC0, 4 MiB left"
    assert launcher.refusal("a", lacks, "") == line
    assert launcher.refusal("a", lacks, "b (500 MiB)") == f"{line}; could be stopped: b (500 MiB)"


@given(st.text(max_size=9), st.text(max_size=9), st.text(max_size=9))
def test_the_refusal_is_printable_whatever_the_names_are(name: str, lack: str, stop: str) -> None:
    line = launcher.refusal(name + "\x1b[31m", [lack + "\u202e\ud800"], stop + "\n")
    assert line.isascii()
    assert line.isprintable()


def test_the_claims_that_make_sense_are_read() -> None:
    good = {"pid": 7, "started": 70, "needs": {"CUDA0": 5}}
    bad = [None, 7, [7, 70], {}, good | {"pid": 0}, good | {"pid": "7"}, good | {"started": -1},
           good | {"needs": {"CUDA0": -5}}, good | {"needs": [5]}]  # fmt: skip
    text = json.dumps([*bad, good]).encode()
    assert launcher.parse_claims(text) == [Claim(7, 70, {"CUDA0": 5})]
    assert launcher.parse_claims(text[:-1]) == launcher.parse_claims(b"{}") == []


def test_claims_are_read_as_they_were_written_for_their_owner_alone(tmp_path: Path) -> None:
    path, claims = tmp_path / "c", [claim(7, 70, CUDA0=5), Claim(8, 80, {"\ud800": 0})]
    launcher.write_claims(str(path), claims)
    assert launcher.parse_claims(path.read_bytes()) == claims
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["c"]


def test_claims_that_cannot_be_written_cost_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """A full disk, or something else in their place."""
    launcher.write_claims(str(tmp_path / "nowhere" / "c"), [])
    (tmp_path / "c" / "x").mkdir(parents=True)
    launcher.write_claims(str(tmp_path / "c"), [])
    assert [found.name for found in tmp_path.iterdir()] == ["c"]


def test_a_lock_is_had_by_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = launcher.take_lock(path)
    assert first is not None
    begin = time.monotonic()
    assert launcher.take_lock(path) is None
    assert 1 <= time.monotonic() - begin < 10
    os.close(first)
    second = launcher.take_lock(path)
    assert second is not None
    os.close(second)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "link to nothing"])
def test_what_is_no_file_is_no_lock_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "lock", tmp_path / "other"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            other.touch()
            path.symlink_to(other)
        case "link to nothing":
            path.symlink_to(other)
    begin = time.monotonic()
    assert launcher.take_lock(str(path)) is None
    assert time.monotonic() - begin < 0.5
    assert other.exists() is (kind == "link")


def test_a_process_lives_if_it_has_not_only_the_number() -> None:
    assert launcher.is_alive(*US)
    assert not launcher.is_alive(2**22 + 7, 5)
    if sys.platform == "linux":
        assert not launcher.is_alive(US[0], US[1] + 1)
        assert not launcher.is_alive(US[0], 0)
        assert not launcher.is_alive(2**22 + 7, 0)


# --- what a server answers -----------------------------------------------------------------------


def slots(*is_processing: bool) -> bytes:
    said = [{"id": i, "id_task": 40 + i, "is_processing": b} for i, b in enumerate(is_processing)]
    return json.dumps(said).encode()


def metrics(processing: str, deferred: str | None = None) -> bytes:
    lines = ["# HELP llamacpp:requests_processing Number of requests processing."]
    lines.append(f"llamacpp:requests_processing {processing}")
    if deferred is not None:
        lines.append(f"llamacpp:requests_deferred {deferred}")
    return "\n".join([*lines, ""]).encode()


LOADS = {
    "idle": (slots(False, False), metrics("0", "0"), IDLE),
    "a task in a slot": (slots(False, True), metrics("1", "0"), busy(1)),
    "more that wait": (slots(True), metrics("1", "7"), busy(8)),
    "started between the two answers": (slots(False), metrics("1", "0"), busy(1)),
    "ended between the two answers": (slots(True), metrics("0", "0"), busy(1)),
    "no metrics": (slots(True, True), None, busy(2)),
    "no slots": (None, metrics("2", "1"), busy(3)),
    "metrics of an older build": (None, metrics("2"), busy(2)),
    "slots that are none": (b'{"error":1}', metrics("2", "0"), busy(2)),
    "neither": (None, None, None),
    "both useless": (b"<html>", b"x 1\n", None),
}


@pytest.mark.parametrize(("slots", "metrics", "expected"), LOADS.values(), ids=LOADS)
def test_slots_and_metrics_say_what_is_under_way(
    slots: bytes | None, metrics: bytes | None, expected: Look | None
) -> None:
    assert launcher.load_of(slots, metrics) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"null", b"[1]", b"[{}]", b"\xff\xfe", b"[" * 100000,
        b'[{"is_processing":1}]',
        b'[{"is_processing":true},{"is_processing":null}]', b"[" + b"9" * 5000 + b"]",
    ],
)  # fmt: skip
def test_what_is_not_a_list_of_slots_is_not_taken_for_one(body: bytes) -> None:
    assert launcher.parse_slots(body) is None


@pytest.mark.parametrize("value", ["nan", "inf", "", "many", "1 2"])
def test_a_gauge_that_is_no_number_is_not_read(value: str) -> None:
    assert launcher.parse_metrics(metrics(value)) is None


def test_a_negative_gauge_counts_as_none() -> None:
    assert launcher.parse_metrics(metrics("-3", "-1")) == (0, 0)


@pytest.mark.parametrize(
    ("received", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 200, b"[]"),
        (b"HTTP/1.0 503\r\n\r\n", 503, b""),
        (b"HTTP/1.1 200", 200, b""),
        (b"HTTP/1.1 " + b"9" * 5000, 9999, b""),
        (b"", 0, b""),
        (b"HTTP/1.1", 0, b""),
        (b"HTTP/1.1 ok\r\n\r\n", 0, b""),
        (b"\x15\x03\x01\x00\x02\x02\x46", 0, b""),
        (b"SSH-2.0-x\r\n", 0, b""),
    ],
)
def test_a_reply_is_read_or_known_to_be_none(received: bytes, status: int, body: bytes) -> None:
    assert launcher.parse_reply(received) == (status, body)


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_no_answer_breaks_the_launcher(head: bytes, body: bytes) -> None:
    """What it cannot read must not end it: the server would be killed with it."""
    received = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body
    launcher.load_of(launcher.parse_reply(received)[1], body)
    launcher.parse_tcp_table(head, 8100)


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("# mine\n\n  secret \nother\n", b"secret"),
        ("schlüssel", "schlüssel".encode()),
        ("one\r\ntwo", b"one"),
        ("", None),
        ("# only this\n", None),
        ("a\0b", None),
        ("k" * 5000, None),
    ],
)
def test_the_first_key_of_a_file_is_used(tmp_path: Path, text: str, key: bytes | None) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    assert launcher.read_key(server("--api-key-file", str(path))) == key


def test_no_key_where_none_is_said_or_readable(tmp_path: Path) -> None:
    assert launcher.read_key(server()) is None
    assert launcher.read_key(server("--api-key-file", str(tmp_path / "missing"))) is None


def test_keys_of_the_command_line_and_the_environment_are_known() -> None:
    assert launcher.read_key(server("--api-key", "one,two")) == b"one"
    assert launcher.read_key(server(LLAMA_API_KEY="three")) == b"three"


# --- the kernel's tables -------------------------------------------------------------------------

TABLE = b"""  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:1FA4 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0
   1: 0100007F:1FA4 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0
   2: 0100007F:9C40 0100007F:1FA4 01 00000000:00000000 00:00000000 00000000  1000        0 4713 1 0
   3: 0100007F:1FA4 0100007F:9C42 08 00000000:00000000 00:00000000 00000000  1000        0 4714 1 0
"""


def test_only_the_servers_own_side_of_a_connection_is_read() -> None:
    assert launcher.parse_tcp_table(TABLE, 8100) == [(0x0A, 4711), (0x01, 4712), (0x08, 4714)]
    assert launcher.parse_tcp_table(b"", 8100) == []


# --- the record of a run -------------------------------------------------------------------------


def test_a_record_names_us_and_when_we_were_started(tmp_path: Path) -> None:
    record = tmp_path / "a.run"
    launcher.write_record(str(record))
    assert [path.name for path in tmp_path.iterdir()] == ["a.run"]
    pid, started = record.read_text("ascii").split(None, 1)
    assert int(pid) == os.getpid()
    assert started.strip()


def test_a_record_is_removed_by_whom_it_names(tmp_path: Path) -> None:
    record = tmp_path / "a.run"
    launcher.write_record(str(record))
    launcher.clear_record(str(record))
    launcher.clear_record(str(record))
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_the_run_that_followed_is_left_alone(tmp_path: Path) -> None:
    """A launcher whose supervisord died drains on while the next one has started another."""
    record = tmp_path / "a.run"
    record.write_text("1 12345\n")
    launcher.clear_record(str(record))
    assert record.read_text() == "1 12345\n"


def test_a_record_that_cannot_be_written_costs_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """A full disk, or something else in its place."""
    record = tmp_path / "a.run"
    (record / "x").mkdir(parents=True)
    launcher.write_record(str(record))
    launcher.write_record(str(tmp_path / "nowhere" / "a.run"))
    launcher.clear_record(str(record))
    assert [path.name for path in tmp_path.iterdir()] == ["a.run"]
    assert (record / "x").is_dir()


GONE = 2**22 + 7  # above the largest number that a process can have


@pytest.mark.parametrize(
    "text",
    [
        "", "\n", "x", "4711", f"{GONE}", f"{GONE} ", "-1 5", "0 5", "1 5", "-1", "1e3 5", "+1 5",
        f"{GONE} 5", "OURS 5", "PARENT 5", "GROUP 5", "9" * 190 + " 5",
        "9" * 100_000, "\0" * 300, "\xff\xfe 5", "١٢ 5", "5 5\n6 6", "../../etc/passwd 5", "self 5",
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_a_torn_or_hostile_record_ends_nobody(tmp_path: Path, text: str) -> None:
    for word, pid in (("OURS", os.getpid()), ("PARENT", os.getppid()), ("GROUP", os.getpgrp())):
        text = text.replace(word, str(pid))
    record = tmp_path / "a.run"
    record.write_text(text)
    assert launcher.end_orphans(str(record)) == []


@pytest.mark.parametrize("kind", ["none", "folder", "pipe", "link to nothing", "link to a folder"])
def test_what_is_no_file_is_no_record_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    record = tmp_path / "a.run"
    match kind:
        case "folder":
            record.mkdir()
        case "pipe":
            os.mkfifo(record)
        case "link to nothing":
            record.symlink_to(tmp_path / "nothing")
        case "link to a folder":
            record.symlink_to(tmp_path)
    assert launcher.end_orphans(str(record)) == []


@given(st.binary(max_size=300))
def test_whatever_a_record_holds_it_is_read_or_ignored(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert launcher.end_orphans(file.name) == []


# --- the gateway in front ------------------------------------------------------------------------

STAT = "# pxname,svname,qcur,qmax,scur,smax\n{model},model,0,0,{requests},9\n\n"


@pytest.fixture
def front() -> Iterator[Front]:
    """A runtime socket that is played."""
    with fronting() as found:
        yield found


@pytest.fixture
def quiet() -> Iterator[int]:
    """A descriptor on which no signal is announced."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def test_a_model_is_taken_out_and_brought_back_by_its_name(front: Front, quiet: int) -> None:
    """What is brought back loads: HAProxy may still believe in the run before."""
    gateway = launcher.Gateway(front.path, "tiny.q4-k_m", quiet)
    gateway.withdraw()
    gateway.admit()
    server = "set server tiny.q4-k_m/model"
    assert front.asked == [
        f"{server} state drain", f"{server} health down; {server} state ready"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "requests"),
    [
        (STAT.format(model="a", requests=3), 3),
        (STAT.format(model="a", requests=0), 0),
        (STAT.format(model="a", requests=-1), 0),
        (STAT.format(model="a", requests="many"), 0),
        ("", 0),
        ("No such proxy.\n", 0),
        ("\0\xff,,,\n,\n", 0),
        ("# pxname,svname\na,model\n", 0),
        ("# pxname,svname,scur\na,again,7\n", 0),
        ("# pxname,svname,scur\na,model,7\nb,model,8\n", 0),
        ("# pxname,svname,scur\na\n,\n", 0),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_the_gateway_has_passed_on_is_counted_or_nothing(
    front: Front, quiet: int, said: str, requests: int
) -> None:
    front.answers["show stat a 4 -1"] = said.encode("latin-1")
    assert launcher.Gateway(front.path, "a", quiet).requests() == requests


def test_no_gateway_costs_nothing(tmp_path: Path, quiet: int) -> None:
    for path in ("", str(tmp_path / "gateway.sock"), str(tmp_path), "/" + "x" * 200):
        gateway = launcher.Gateway(path, "a", quiet)
        begun = time.monotonic()
        for _ in range(100):
            gateway.withdraw()
            assert gateway.requests() == 0
        assert time.monotonic() - begun < 2
    assert launcher.gateway_of("") == ""


def test_a_gateway_that_hangs_costs_half_a_second_and_is_as_none(front: Front, quiet: int) -> None:
    front.hangs = True
    gateway = launcher.Gateway(front.path, "a", quiet)
    for ask in (gateway.withdraw, gateway.requests, gateway.admit):
        begun = time.monotonic()
        assert ask() in (None, 0)
        assert 0.4 < time.monotonic() - begun < 2


def test_a_signal_is_heeded_while_the_gateway_is_awaited(front: Front) -> None:
    front.hangs = True
    reading, writing = os.pipe()
    os.write(writing, b"x")
    begun = time.monotonic()
    launcher.Gateway(front.path, "a", reading).withdraw()
    assert time.monotonic() - begun < 0.4
    os.close(reading)
    os.close(writing)
