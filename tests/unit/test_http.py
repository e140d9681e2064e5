"""Questions over HTTP to servers that answer well, badly, slowly, or with too much."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters.http import (
    Endpoint,
    Prober,
    Told,
    parse_metrics,
    parse_slots,
)
from supervisor_synapse.core.model import Health, Role
from supervisor_synapse.core.probes import Activity
from tests.unit.scripted import Script, by_path, dribble, http, on_loopback, raw, silence

TIMEOUT_SECONDS = 0.5  # this machine may be busy
SLACK_SECONDS = 2.0
MIB = 1024 * 1024

METRICS = (
    b"# HELP llamacpp:n_decode_total Total number of llama_decode() calls\n"
    b"# TYPE llamacpp:n_decode_total counter\n"
    b"llamacpp:n_decode_total 17\n"
    b"llamacpp:prompt_tokens_total 100\n"
    b"llamacpp:tokens_predicted_total 5.0e1\n"
    b"llamacpp:requests_processing 2\n"
    b"llamacpp:requests_deferred 198\n"
)
WORKING = Activity(
    2, (17, 100, 50), queued=198, prompt_tokens=100, generated_tokens=50
)  # fmt: skip
SLOTS = json.dumps(
    [
        {"id": 0, "is_processing": True, "id_task": 3, "next_token": [{"n_decoded": 12}]},
        {"id": 1, "is_processing": False, "id_task": 2, "next_token": {"n_decoded": 9}},
    ]
).encode()


@contextlib.contextmanager
def asking(
    *scripts: Script, api_key: str | None = None, patience: float = TIMEOUT_SECONDS
) -> Iterator[tuple[Prober, list[bytes]]]:
    """A prober of a scripted server, and what that was asked."""
    with on_loopback(*scripts) as server:
        prober = Prober(Endpoint(server.url, api_key), TIMEOUT_SECONDS, patience)
        try:
            yield prober, server.requests
        finally:
            prober.close()


def paths(requests: list[bytes]) -> list[str]:
    return [request.split(b" ", 2)[1].decode() for request in requests]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds + SLACK_SECONDS


# --- health ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "health"),
    [
        (200, Health.READY), (503, Health.LOADING), (500, Health.BROKEN), (404, Health.BROKEN),
        (401, Health.BROKEN), (204, Health.BROKEN), (302, Health.BROKEN),
    ],
)  # fmt: skip
def test_the_status_of_health_tells(status: int, health: Health) -> None:
    with asking(http(status, b'{"status":"x"}' if status != 204 else b"")) as (prober, _):
        assert prober.health() is health


def test_nobody_there_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    prober = Prober(Endpoint(f"http://127.0.0.1:{port}"), TIMEOUT_SECONDS, TIMEOUT_SECONDS)
    assert prober.health() is Health.REFUSED
    assert prober.activity() == Told(answered=False)
    assert not prober.canary(Role.TEXT)
    assert not prober.is_asleep()


def test_silence_ends_with_the_timeout() -> None:
    """As of a server that was stopped by a signal: it accepts, and says nothing."""
    with asking(silence()) as (prober, _), within(TIMEOUT_SECONDS):
        assert prober.health() is Health.SILENT


def test_a_listener_that_accepts_nothing_is_silent() -> None:
    """Its backlog is full."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        contextlib.ExitStack() as all_,
    ):
        address = listener.getsockname()
        for _ in range(3):
            waiting = all_.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(address)
        prober = Prober(Endpoint(f"http://127.0.0.1:{address[1]}"), TIMEOUT_SECONDS, 1.0)
        with within(TIMEOUT_SECONDS):
            assert prober.health() is Health.SILENT


GARBAGE = [
    b"", b"\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00\xff" * 5000,
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    b"HTTP/1.1 999999999999999999999 OK\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("answer", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_a_value_and_never_an_exception(answer: bytes) -> None:
    with asking(raw(answer)) as (prober, _):
        assert isinstance(prober.health(), Health)
        assert isinstance(prober.is_asleep(), bool)
        assert prober.activity().activity is None
        assert isinstance(prober.canary(Role.TEXT), bool)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;",
    ],
    ids=["status line", "header", "body with a length", "body without", "chunk", "chunk's head"],
)
def test_a_dribbling_server_is_silent_at_the_deadline(head: bytes) -> None:
    """A byte every 20 ms is progress to a timeout between bytes, but no answer."""
    with asking(dribble(head)) as (prober, _):
        with within(TIMEOUT_SECONDS):
            assert prober.health() is Health.SILENT
        with within(TIMEOUT_SECONDS):
            assert prober.activity() == Told(answered=False)
        with within(TIMEOUT_SECONDS):
            assert not prober.canary(Role.TEXT)


def test_a_body_that_stops_half_way_ends_with_the_timeout() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    with asking(silence(head)) as (prober, _), within(TIMEOUT_SECONDS):
        assert prober.health() is Health.SILENT


def endless(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(4096):
        connection.sendall(b"x" * 65536)


def test_no_more_than_a_little_over_a_mebibyte_is_read() -> None:
    """An endless body costs neither memory nor more than its deadline."""
    sent = []

    def counting(connection: socket.socket, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for number in range(4096):
            connection.sendall(b"x" * 65536)
            sent.append(number)

    with asking(counting, patience=5.0) as (prober, _), within(5.0):
        assert prober.activity().activity is None
    assert len(sent) * 65536 < 64 * MIB


def test_a_small_body_that_unpacks_to_a_huge_one_is_cut_off() -> None:
    """64 KiB on the wire, 64 MiB unpacked."""
    packed = gzip.compress(b"\0" * (64 * MIB), compresslevel=9)
    bomb = http(200, packed, "Content-Encoding: gzip")
    with asking(bomb, patience=5.0) as (prober, _), within(1.0):
        assert prober.activity().activity is None


# --- where a question goes ------------------------------------------------------------------------


def test_no_redirect_is_followed() -> None:
    with on_loopback(http(200, METRICS)) as elsewhere:
        moved = http(302, b"", f"Location: {elsewhere.url}/health")
        with asking(moved) as (prober, _):
            assert prober.health() is Health.BROKEN
            assert prober.activity() == Told(answered=True)
            prober.canary(Role.TEXT)
            assert not prober.is_asleep()
        assert not elsewhere.requests


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_loopback(http(200)) as proxy, asking(http(200, METRICS)) as (prober, requests):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert prober.health() is Health.READY
        assert prober.activity() == Told(answered=True, activity=WORKING)
        assert prober.canary(Role.TEXT)
        assert not proxy.requests
    assert len(requests) == 3


def test_no_password_of_the_environment_is_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n", encoding="ascii")
    monkeypatch.setenv("NETRC", str(netrc))
    with asking(http(200)) as (prober, requests):
        prober.health()
    assert b"authorization" not in requests[0].lower()


def test_the_key_goes_with_every_question() -> None:
    with asking(http(200, METRICS), api_key="s3cret") as (prober, requests):
        prober.health()
        prober.is_asleep()
        prober.activity()
        prober.canary(Role.TEXT)
    assert len(requests) == 4
    assert all(b"Authorization: Bearer s3cret\r\n" in request for request in requests)


@pytest.mark.parametrize("key", ["sch\u00fcssel", "a\r\nX: y", "\u65e5\u672c"])
def test_a_key_that_no_header_can_hold_is_no_exception(key: str) -> None:
    with asking(http(200, METRICS), api_key=key) as (prober, requests):
        assert isinstance(prober.health(), Health)
        assert isinstance(prober.activity(), Told)
        assert isinstance(prober.canary(Role.TEXT), bool)
    assert not any(b"\r\nX: y" in request for request in requests)


def test_connections_are_kept() -> None:
    """Twenty questions of a kind, one connection."""
    with on_loopback(http(200, METRICS)) as server:
        prober = Prober(Endpoint(server.url), 2.0, 2.0)
        for _ in range(20):
            assert prober.health() is Health.READY
            assert prober.activity().activity == WORKING
        prober.close()
        assert len(server.requests) == 40
        assert len(server._threads) == 3  # one accepts, one for each connection


def test_a_kept_connection_that_the_server_closed_is_made_anew() -> None:
    """As after a restart on the same port: no miss."""
    once = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with asking(raw(once), http(200)) as (prober, _):
        assert prober.health() is Health.READY
        for _ in range(3):
            assert prober.health() is Health.READY


def test_a_silent_answer_leaves_nothing_behind_for_the_next_question() -> None:
    with asking(silence(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), http(503)) as (
        prober,
        _,
    ):
        assert prober.health() is Health.SILENT
        assert prober.health() is Health.LOADING


def test_questions_of_two_kinds_do_not_wait_for_each_other() -> None:
    """/metrics blocks while /health answers: the patient one is out meanwhile."""
    script = by_path(health=http(200), metrics=silence())
    with asking(script, patience=3.0) as (prober, _):
        asked = threading.Thread(target=prober.activity)
        asked.start()
        with within(TIMEOUT_SECONDS):
            assert [prober.health() for _ in range(5)] == [Health.READY] * 5
        assert asked.is_alive()
        asked.join(20.0)
        assert not asked.is_alive()


def test_closing_while_a_question_is_out_is_no_exception() -> None:
    with asking(silence(), patience=0.5) as (prober, requests):
        told: list[Told] = []
        asked = threading.Thread(target=lambda: told.append(prober.activity()))
        asked.start()
        deadline = time.monotonic() + 5.0
        while not requests and time.monotonic() < deadline:
            asked.join(0.01)
        prober.close()
        asked.join(5.0)
        assert told == [Told(answered=False)]


# --- counters -------------------------------------------------------------------------------------


def test_metrics_tell_and_slots_are_not_asked() -> None:
    with asking(by_path(metrics=http(200, METRICS), slots=http(200, SLOTS))) as (prober, requests):
        assert prober.activity() == Told(answered=True, activity=WORKING)
    assert paths(requests) == ["/metrics"]


@pytest.mark.parametrize("status", [501, 404, 401, 403, 500])
def test_where_metrics_are_off_slots_are_asked_from_then_on(status: int) -> None:
    with asking(by_path(metrics=http(status), slots=http(200, SLOTS))) as (prober, requests):
        told = [prober.activity() for _ in range(3)]
    assert all(one.activity is not None and one.activity.busy == 1 for one in told)
    assert paths(requests) == ["/metrics", "/slots", "/slots", "/slots"]


@pytest.mark.parametrize(
    "metrics",
    [
        b"llamacpp:requests_processing 1\nllamacpp:tokens_predicted_total 7\n",
        b"",
        b"<html>",
    ],
    ids=["no decode counter", "empty", "html"],
)
def test_metrics_that_would_stand_still_during_a_long_request_are_not_relied_on(
    metrics: bytes,
) -> None:
    """An older build counts tokens only when a request ends; its slots show more."""
    with asking(by_path(metrics=http(200, metrics), slots=http(200, SLOTS))) as (prober, _):
        told = prober.activity()
    assert told.activity == parse_slots(SLOTS)


@pytest.mark.parametrize("status", [501, 404, 401, 403])
def test_where_both_are_off_the_server_does_not_tell(status: int) -> None:
    with asking(http(status)) as (prober, _):
        assert prober.activity() == Told(answered=True)


@pytest.mark.parametrize("status", [503])
def test_counters_of_a_loading_server_are_no_answer_and_no_reason_to_ask_elsewhere(
    status: int,
) -> None:
    with asking(http(status)) as (prober, requests):
        assert prober.activity() == Told(answered=False)
        assert prober.activity() == Told(answered=False)
    assert paths(requests) == ["/metrics", "/metrics"]


def test_a_patient_question_waits_longer_than_a_quick_one() -> None:
    """/metrics comes between two batches."""
    release = threading.Event()

    def late(connection: socket.socket, request: bytes) -> None:
        release.wait(5.0)
        http(200, METRICS)(connection, request)

    with asking(by_path(metrics=late), patience=5.0) as (prober, _):
        timer = threading.Timer(2 * TIMEOUT_SECONDS, release.set)
        timer.start()
        assert prober.activity() == Told(answered=True, activity=WORKING)
        timer.join(5.0)


def test_slots_show_work_in_either_form_of_next_token() -> None:
    before = parse_slots(SLOTS)
    after = parse_slots(SLOTS.replace(b'"n_decoded": 12', b'"n_decoded": 13'))
    assert before is not None
    assert after is not None
    assert before.busy == after.busy == 1
    assert before.counters != after.counters


def test_prompt_progress_shows_in_slots() -> None:
    slot = {"is_processing": True, "id_task": 1, "n_prompt_tokens_processed": 2048}
    before = parse_slots(json.dumps([slot]).encode())
    after = parse_slots(json.dumps([{**slot, "n_prompt_tokens_processed": 4096}]).encode())
    assert before != after


def test_busy_slots_that_show_no_progress_do_not_tell() -> None:
    """Taken for counters, their silence would be the death of a working server."""
    slots = json.dumps([{"id": 0, "is_processing": True, "id_task": 4}]).encode()
    assert parse_slots(slots) is None
    assert parse_slots(b'[{"id": 0, "is_processing": false}]') == Activity(0)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"null", b"7", b'"x"', b"[1]", b'[{"a":1}, null]', b"[" * 100_000, b"\xff\xfe",
        b'[{"is_processing":true,"n_decoded":' + b"9" * 10_000 + b"}]",
    ],
    ids=range(10),
)  # fmt: skip
def test_slots_that_are_none_do_not_tell(body: bytes) -> None:
    assert parse_slots(body) is None


@pytest.mark.parametrize(
    "body",
    [
        b"", b"llamacpp:n_decode_total 1\n", b"llamacpp:requests_processing NaN\n",
        b"llamacpp:requests_processing -1\nllamacpp:n_decode_total 1\n",
        b"llamacpp:requests_processing 1e999\nllamacpp:n_decode_total 1\n",
        b"other:requests_processing 1\nother:n_decode_total 1\n",
    ],
)  # fmt: skip
def test_metrics_without_the_figures_do_not_tell(body: bytes) -> None:
    assert parse_metrics(body) is None


def test_metrics_with_labels_are_read() -> None:
    labelled = METRICS.replace(b"total ", b'total{model="a b"} ').replace(
        b"processing ", b'processing{model="x"} '
    )
    assert parse_metrics(labelled) == WORKING


@pytest.mark.parametrize(
    "piece", [b"llamacpp:a{\n", b"llamacpp:a{", b"llamacpp:aaaa", b"llamacpp:a 1e\n", b"[{", b"1"]
)
def test_no_body_takes_long_to_read(piece: bytes) -> None:
    """A mebibyte of the worst: it is parsed while everything else waits."""
    body = (piece * (MIB // len(piece) + 1))[:MIB]
    with within(1.0):
        parse_metrics(body)
        parse_slots(body)


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_without_an_exception(body: bytes) -> None:
    assert parse_metrics(body) is None or b"llamacpp" in body
    assert parse_slots(body) is None or body.strip().startswith(b"[")


# --- sleep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "asleep"),
    [
        (b'{"is_sleeping": true}', True), (b'{"is_sleeping": false}', False), (b"{}", False),
        (b'{"is_sleeping": "true"}', False), (b'{"is_sleeping": 1}', False), (b"[true]", False),
        (b"", False), (b"[" * 100_000, False), (b"\xff", False),
    ],
    ids=range(9),
)  # fmt: skip
def test_only_a_plain_true_is_sleep(body: bytes, asleep: bool) -> None:
    with asking(http(200, body)) as (prober, requests):
        assert prober.is_asleep() is asleep
    assert paths(requests) == ["/props"]


def test_an_error_is_not_sleep() -> None:
    with asking(http(401, b'{"is_sleeping": true}')) as (prober, _):
        assert not prober.is_asleep()


# --- one token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "path"),
    [
        (Role.TEXT, "/completion"), (Role.VISION, "/completion"),
        (Role.EMBEDDING, "/v1/embeddings"), (Role.RERANKER, "/v1/rerank"),
    ],
)  # fmt: skip
def test_one_token_is_asked_for_in_the_way_of_the_model(role: Role, path: str) -> None:
    with asking(http(200, b"{}")) as (prober, requests):
        assert prober.canary(role)
    assert paths(requests) == [path]
    body = json.loads(requests[0].partition(b"\r\n\r\n")[2])
    assert path != "/completion" or body["n_predict"] == 1


@pytest.mark.parametrize(("status", "answered"), [(200, True), (400, True), (503, False)])
def test_any_answer_but_that_it_loads_is_life(status: int, answered: bool) -> None:
    with asking(http(status)) as (prober, _):
        assert prober.canary(Role.TEXT) is answered


def test_a_token_that_does_not_come_is_given_up() -> None:
    with asking(silence(), patience=0.5) as (prober, _), within(0.5):
        assert not prober.canary(Role.TEXT)
