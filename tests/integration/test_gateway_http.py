"""What clients of all kinds meet at the gateway: a real HAProxy before stub servers."""

from __future__ import annotations

import contextlib
import gzip
import http.client as http_client
import json
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse.core.gateway import Upstream, Verdict
from tests.gateways import IS_THERE, Proxy, Reply, StubServer, all_ready, programs, proxy, servers
from tests.integration.harness import holds_for, wait_until
from tests.ports import free_ports

pytestmark = pytest.mark.skipif(not IS_THERE, reason="haproxy is not installed")

MIB = 1024 * 1024
NAMES = ("a", "b", "again", "2", "qwen2.5-1.5b.x_y-q4_k_m")
BODY = b'{"model":"a"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def five() -> Iterator[Proxy]:
    """Five models that are up. `again` is what HAProxy calls its second try; `2` is a number."""
    with servers(*NAMES) as found, proxy({name: one.port for name, one in found.items()}) as made:
        yield made


def reached(reply: Any) -> str:
    assert reply.status == 200, reply
    name: str = reply.json()["server"]
    assert reply.headers["x-synapse-model"] == name
    return name


# --- whom a request reaches ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_that_of_a_backend(five: Proxy, name: str) -> None:
    assert reached(five.ask({"model": name})) == name
    assert reached(five.ask(None, f"/model/{name}/props", "GET")) == name
    assert five.runtime.servers()[name].is_up


def test_one_connection_may_ask_for_one_model_after_the_other(five: Proxy) -> None:
    with contextlib.closing(http_client.HTTPConnection("127.0.0.1", five.settings.port)) as link:
        for name in NAMES * 2:
            link.request("POST", "/v1/completions", json.dumps({"model": name}))
            assert json.loads(link.getresponse().read())["server"] == name


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"a","model":"b"}', "a"), (b'{"model":"\\u0061"}', "a"),
        (b'{"x":{"model":"b"},"model":"a"}', "a"), (b'{"model":"ACME/A"}', "a"),
        (b' \n{ "messages": [{"model":"b"}] , "model" : "a" }', "a"),
    ],
)  # fmt: skip
def test_a_body_names_its_model_wherever_it_stands(five: Proxy, body: bytes, name: str) -> None:
    assert reached(five.ask(body)) == name


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/model/a/v1/completions", "/v1/completions"), ("/model/a", "/"), ("/model/a/", "/"),
        ("/model/a/x?y=1&z=%2f", "/x?y=1&z=%2f"), ("/model/A/x", "/x"), ("/model/%61/x", "/x"),
        ("/model/acme%2Fa/x", "/x"), ("/model/a/%2e%2e/x", "/%2e%2e/x"),
        ("/model/a/" + "x" * 20_000, "/" + "x" * 20_000),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_path_names_its_model_and_the_rest_is_passed_on(
    five: Proxy, path: str, there: str
) -> None:
    reply = five.ask(None, path, "GET")
    assert reached(reply) == "a"
    assert reply.json()["path"] == there


@pytest.mark.parametrize(
    "path",
    ["/model/../v1/models", "/model/nobody/x", "/model/%00/x", "/model/a%20/x",
     "/model/*1/x", "/model/=a/x"],
)  # fmt: skip
def test_a_path_that_names_nobody_reaches_nobody(five: Proxy, path: str) -> None:
    reply = five.ask(None, path, "GET")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "path", ["/model/", "/model", "/model/%zz/x", "//model/a/x", "/", "/" + "x" * 20_000, "/x"]
)
def test_a_request_that_names_no_model_is_told_how_to(five: Proxy, path: str) -> None:
    reply = five.ask(None, path, "GET")
    assert (reply.status, reply.error["code"]) == (400, "model_missing")


@pytest.mark.parametrize(
    "word", [True, False, 0, 1.5, -1, 1e300, "a ", " a", "a\n", "\0a", "\u00e4",
             "%61", "a;b", "fast ", "*1", "=a", "x" * 100_000],
    ids=lambda word: ascii(word)[:20],
)  # fmt: skip
def test_a_model_that_is_none_of_ours_is_not_found(five: Proxy, word: object) -> None:
    reply = five.ask({"model": word})
    assert reply.status == 404
    assert reply.error["message"].isascii()
    assert reply.error["models"] == list(NAMES)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"model":null}', {}), (b'{"model":[]}', {}), (b"\xef\xbb\xbf" + BODY, {}),
        (gzip.compress(BODY), {"Content-Encoding": "gzip"}), (b"model=a", {}),
        (b'{"model":"\\ud83d\\ude00"}', {}), (b'{"model":"a\\ud800"}', {}),
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_a_body_in_which_no_model_can_be_read_is_told_so(
    five: Proxy, body: bytes, headers: dict[str, str]
) -> None:
    reply = five.ask(body, **headers)
    assert (reply.status, reply.error["code"]) == (400, "model_missing")


def test_one_model_is_shown_as_openai_shows_one(five: Proxy) -> None:
    for word in ("a", "acme/a", "acme%2Fa"):
        reply = five.ask(None, f"/v1/models/{word}", "GET")
        assert (reply.status, reply.json()["id"]) == (200, "a")
    missing = five.ask(None, "/v1/models/nobody", "GET")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


# --- clients that speak otherwise ----------------------------------------------------------------


def body_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "request_text",
    [
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: 13\r\n\r\n" + BODY,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n8\r\nel\":\"a\"}\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n" + BODY
        + b"\r\n0\r\n\r\n",
    ],
    ids=["HTTP/1.0", "chunked", "chunked with a length"],
)  # fmt: skip
def test_bodies_of_all_kinds_reach_the_model_whole(five: Proxy, request_text: bytes) -> None:
    answer = five.raw(request_text)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert body_of(answer)["bytes"] == len(BODY)


def test_a_client_that_waits_for_a_word_before_its_body_gets_it(five: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", five.settings.port), 10) as link:
        link.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 13\r\n\r\n")
        assert link.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(BODY)
        assert link.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_list_is_given_to_old_clients_too(five: Proxy) -> None:
    answer = five.raw(b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert [model["id"] for model in body_of(answer)["data"]] == list(NAMES)


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/models", 200), ("/health", 200), ("/model/a/x", 200), ("/x", 400)]
)
def test_only_a_head_is_given_where_only_that_is_asked_for(
    five: Proxy, path: str, status: int
) -> None:
    reply = five.ask(None, path, "HEAD")
    assert (reply.status, reply.body) == (status, b"")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "NONSENSE"])
def test_other_methods_are_passed_on_by_path_and_refused_without_a_model(
    five: Proxy, method: str
) -> None:
    assert five.ask(None, "/x", method).status == 400
    reply = five.ask(None, "/model/a/x", method)
    assert (reply.status, reply.json()["method"]) == (200, method)


TOO_LARGE = {
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n"
    + (b"%x\r\n" % MIB + b" " * MIB + b"\r\n") * 8 + b"0\r\n\r\n",
    "announced": b"Content-Length: 99999999999\r\n\r\n{",
}  # fmt: skip


@pytest.mark.parametrize("how", TOO_LARGE)
def test_a_body_that_is_too_large_is_refused_with_the_way_to_send_it(five: Proxy, how: str) -> None:
    answer = five.raw(HEAD + TOO_LARGE[how], until=b"}}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert "/model/NAME/" in body_of(answer)["error"]["message"]


@pytest.mark.parametrize(
    "request_text",
    [
        b"\x16\x03\x01\x02\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n{",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{",
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % n for n in range(200)) + b"\r\n",
        b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
    ids=lambda text: ascii(text)[:40],
)  # fmt: skip
def test_what_is_no_request_is_refused_and_hurts_nobody(five: Proxy, request_text: bytes) -> None:
    with contextlib.suppress(ConnectionResetError):
        answer = five.raw(request_text, 20)
        assert not answer or b" 400 " in answer.splitlines()[0]
    assert reached(five.ask({"model": "a"})) == "a"


# --- browsers ------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "http://page.example", "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/model/a/v1/completions"])
def test_a_browser_may_ask_and_read_the_answer(five: Proxy, path: str) -> None:
    reply = five.ask(None, path, "OPTIONS", **PREFLIGHT)
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "http://page.example"
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in reply.headers["access-control-allow-methods"]
    for body in ({"model": "a"}, {"model": "nobody"}, {}):
        asked = five.ask(body, Origin="http://page.example")
        assert asked.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-origin" not in five.ask({"model": "a"}).headers


def test_a_browser_asks_first_without_a_key_and_then_with_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# a comment\n\none\r\ntwo\n")
    with servers("a") as found, proxy({"a": found["a"].port}, api_key_file=str(keys)) as made:
        assert made.ask(None, "/v1/completions", "OPTIONS", **PREFLIGHT).status == 204
        for path in ("/v1/completions", "/model/a/x", "/gateway/metrics", "/v1/models/a"):
            reply = made.ask({"model": "a"}, path, Origin="http://page.example")
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["access-control-allow-origin"] == "http://page.example"
        for key in ("one", "two"):
            assert made.ask({"model": "a"}, Authorization=f"bearer {key}").status == 200
        for key in ("", "# a comment", "on", "one,two", "ONE"):
            assert made.ask({"model": "a"}, Authorization=f"Bearer {key}").status == 401, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls_is_spoken_where_a_certificate_is_given(tmp_path: Path) -> None:
    key, certificate, both = (tmp_path / name for name in ("key", "crt", "pem"))
    subprocess.run(
        [str(shutil.which("openssl")), "req",
         "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
         str(certificate)], check=True, capture_output=True,
    )  # fmt: skip
    both.write_text(certificate.read_text() + key.read_text())
    trusting = ssl.create_default_context(cafile=str(certificate))
    port = free_ports(1)

    def answers() -> bool:
        link = http_client.HTTPSConnection("127.0.0.1", port, timeout=10, context=trusting)
        with contextlib.closing(link), contextlib.suppress(OSError):
            link.request("POST", "/v1/completions", BODY)
            return link.getresponse().status == 200
        return False

    with servers("a") as found:
        ready = proxy({"a": found["a"].port}, port=port, tls_certificate=str(both), is_up=answers)
        with ready as made:
            assert answers()
            with contextlib.suppress(ConnectionResetError):
                assert b" 200 " not in made.raw(b"GET /health HTTP/1.0\r\n\r\n")


# --- models that come and go ---------------------------------------------------------------------


@contextlib.contextmanager
def supervisord_of(folder: Path) -> Iterator[tuple[Path, list[float]]]:
    """A socket that plays supervisord; when it was asked."""
    asked: list[float] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen(64)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    with link, contextlib.suppress(OSError):
                        text = link.recv(65536)
                        asked.append(time.monotonic())
                        assert b"<string>b</string>" in text
                        link.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield folder / "s", asked
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def holding(made: Proxy, count: int) -> Iterator[list[socket.socket]]:
    """Clients that ask for `b` and wait."""
    asking = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n" + b'{"model":"b"}'
    with contextlib.ExitStack() as stack:
        links = []
        for _ in range(count):
            link = socket.create_connection(("127.0.0.1", made.settings.port), 30)
            links.append(stack.enter_context(link))
            link.sendall(asking)
        yield links


@pytest.fixture
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, list[float]]]:
    """`a` is up; `b` is not, and comes when it is asked for."""
    with (
        servers("a") as found,
        supervisord_of(tmp_path_factory.mktemp("s")) as (path, asked),
        proxy({"a": found["a"].port, "b": 1}, path, max_connections=300, hold_seconds=30) as made,
    ):
        made.tell(all_ready(programs("a", "b"), b=Verdict("demand")))
        yield made, asked


def test_three_hundred_who_wait_ask_once_a_second_hinder_nobody_and_are_all_answered(
    cold: tuple[Proxy, list[float]],
) -> None:
    made, asked = cold
    with holding(made, 300) as links:
        wait_until(lambda: len(asked) >= 2, 10)
        assert len(asked) - 1 <= asked[-1] - asked[0] + 1
        assert reached(made.ask({"model": "a"})) == "a"
        for link in links[:100]:
            link.close()
        with contextlib.closing(StubServer("b")) as server:
            made.runtime.move("b", "127.0.0.1", server.port)
            assert all(link.recv(12) == b"HTTP/1.1 200" for link in links[100:])


def test_who_goes_away_asks_no_more_and_takes_no_place(cold: tuple[Proxy, list[float]]) -> None:
    made, asked = cold
    with holding(made, 300):
        wait_until(lambda: asked, 10)
    wait_until(lambda: "CurrConns: 0\n" in made.runtime.ask("show info"), 10, "nobody is there")
    before = len(asked)
    assert holds_for(lambda: len(asked) == before, 2.5)
    with holding(made, 299):
        wait_until(lambda: len(asked) > before, 10, "there is place for as many again")


def refused_at_once(made: Proxy) -> Reply | None:
    """None where there was still a place for whoever asked."""
    with contextlib.suppress(TimeoutError):
        reply = made.ask({"model": "b"}, seconds=2)
        return reply if reply.status == 503 else None
    return None


def test_more_than_may_wait_are_told_so_at_once_and_others_are_served(
    cold: tuple[Proxy, list[float]],
) -> None:
    made, asked = cold
    with holding(made, 300):
        wait_until(lambda: asked, 10)
        reply = wait_until(lambda: refused_at_once(made), 20)
        assert "too many wait already" in reply.error["message"]
        assert int(reply.headers["retry-after"]) > 0
        assert reached(made.ask({"model": "a"})) == "a"


def test_a_model_that_answers_nobody_is_avoided_though_it_says_that_it_is_well() -> None:
    """Of those that a tier means another one answers; what is asked for by name waits."""
    with (
        servers("a", "b") as found,
        proxy({name: server.port for name, server in found.items()}) as made,
    ):
        made.tell(all_ready(programs("a", "b")))
        assert reached(made.ask({"model": "fast"})) == "a"
        made.tell(all_ready(programs("a", "b"), a=Verdict("avoid")))
        assert reached(made.ask({"model": "fast"})) == "b"
        with holding_one(made, "a") as link:
            assert holds_for(lambda: not is_readable(link), 1)
            made.tell(all_ready(programs("a", "b")))
            assert link.recv(12) == b"HTTP/1.1 200"


def test_who_serves_in_the_place_of_a_model_is_named() -> None:
    with servers("a") as found, proxy({"a": found["a"].port}) as made:
        made.tell(all_ready(programs("a"), a=Verdict("serve", "small")))
        headers = made.ask({"model": "a"}).headers
        assert (headers["x-synapse-model"], headers["x-synapse-fallback"]) == ("a", "small")
        made.tell(all_ready(programs("a")))
        assert "x-synapse-fallback" not in made.ask({"model": "a"}).headers


def is_readable(link: socket.socket) -> bool:
    return bool(select.select([link], [], [], 0)[0])


@contextlib.contextmanager
def holding_one(made: Proxy, name: str) -> Iterator[socket.socket]:
    """A client that asks for a model and waits."""
    body = json.dumps({"model": name}).encode()
    head = f"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", made.settings.port), 30) as link:
        link.sendall(head + body)
        yield link


def test_who_waits_too_long_is_told_so_in_the_form_of_all_errors() -> None:
    with proxy({"b": 1}, hold_seconds=1) as made:
        made.tell(all_ready(programs("b"), b=Verdict("hold")))
        reply = made.ask({"model": "b"})
        assert (reply.status, reply.error["code"]) == (503, "model_not_ready")
        assert "within 1 s" in reply.error["message"]


def answering(text: bytes) -> Callable[[socket.socket], None]:
    def answer(link: socket.socket) -> None:
        asked = link.recv(65536)
        link.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" if b"/health" in asked else text
        )

    return answer


@pytest.mark.parametrize("text", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 20"], ids=ascii)
def test_a_model_that_answers_nonsense_is_a_bad_gateway_in_the_form_of_all_errors(
    text: bytes,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = answering(text)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    with link, contextlib.suppress(OSError):
                        answer(link)

        threading.Thread(target=serve, daemon=True).start()
        with proxy({"a": listener.getsockname()[1]}) as made:
            reply = made.ask({"model": "a"})
            assert (reply.status, reply.error["code"]) == (502, "model_ended")
        listener.shutdown(socket.SHUT_RDWR)


def test_two_hundred_models_are_served_listed_and_loaded_anew_whatever_bodies_may_be() -> None:
    names = [f"acme-model-{number:03}-7b-instruct-q4_k_m.v1" for number in range(200)]
    with contextlib.closing(StubServer("x")) as server:
        ports = dict.fromkeys(names, server.port)
        with proxy(ports, max_body_bytes=64 * 1024) as made:
            made.tell(all_ready(programs(*names)))
            made.upstreams.append(Upstream("more", "127.0.0.1", server.port))
            made.said = all_ready(programs(*names, "more"))
            made.reload()
            assert all(made.ask({"model": name}).status == 200 for name in (*names[::40], "more"))
            listed = made.ask(None, "/v1/models", "GET").json()["data"]
            assert [model["id"] for model in listed] == [*names, "more"]
            assert made.ask({"model": "nobody"}).error["models"] == [*names, "more"]
