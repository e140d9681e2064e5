"""One address for all models: real HAProxy, real servers, real clients."""

from __future__ import annotations

import contextlib
import http.client as http_client
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.integration.harness import Deployment, TokenStream, deployed, wait_until
from tests.integration.rpc_devices import rpc_device
from tests.integration.test_memory import MODEL, need
from tests.ports import free_ports

pytestmark = [
    pytest.mark.usefixtures("llama_server"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]

REQUESTS = int(os.environ.get("SYNAPSE_REQUESTS", "2000"))
ROUNDS = 8
CLIENTS = 16
MIB = 1024 * 1024
STOP = "[stop]\ndrain_seconds = 10\n"
RESTART = "[restart]\nbackoff_initial_seconds = 0.2\nbackoff_factor = 1\nintensity = 1000\n"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def model(self) -> str:
        return self.headers.get("x-synapse-model", "")

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


@dataclass(slots=True)
class Gateway:
    """A deployment, and what a client sees of it."""

    at: Deployment
    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(
        self, body: object, path: str = "/v1/completions", method: str = "POST",
        seconds: float = 60, **headers: str,
    ) -> Reply:  # fmt: skip
        """One request on a connection of its own."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        link = http_client.HTTPConnection(self.host, self.port, timeout=seconds)
        begun = time.monotonic()
        with contextlib.closing(link):
            with contextlib.suppress(BrokenPipeError):  # refused before all was sent
                link.request(method, path, raw, {"Content-Type": "application/json", **headers})
            response = link.getresponse()
            text = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, text, time.monotonic() - begun)

    def complete(self, model: str, seconds: float = 60, **more: object) -> Reply:
        """A completion of two tokens."""
        body = {"prompt": "the road", "max_tokens": 2, **more, "model": model}
        return self.ask(body, seconds=seconds)

    def is_up(self) -> bool:
        try:
            return self.ask(None, "/health", "GET", 1).status == 200
        except (OSError, http_client.HTTPException):
            return False

    def haproxy(self) -> list[psutil.Process]:
        """HAProxy's processes, the master first."""
        with self.at.rpc() as server:
            pid = server.supervisor.getProcessInfo("gateway")["pid"]
        return psutil.Process(pid).children(recursive=True) if pid else []


def section(port: int, more: str = "") -> str:
    return f"[gateway]\nenabled = true\nbind = 127.0.0.1:{port}\n{more}\n"


@contextlib.contextmanager
def gateway(
    settings: str, *names: str, more: str = "", larger: str = "", **options: Any
) -> Iterator[Gateway]:
    """`larger`: one more model, which takes more memory than the others."""
    port = free_ports(1)
    with deployed(f"{settings}{section(port, more)}") as deployment:
        deployment.add(*names, **options)
        if larger:
            deployment.add(larger, layers=4, feed_forward=512)
        deployment.synapse("up", "--detach")
        found = Gateway(deployment, port)
        wait_until(found.is_up, 20, "the gateway answers")
        yield found


def test_up_tells_the_one_address(two: Gateway) -> None:
    assert f"All models at one address: {two.url}/v1" in two.at.synapse("up", "--detach").out


@pytest.fixture(scope="module")
def two(llama_server: Any) -> Iterator[Gateway]:
    """Models `a` and `b`, both up; changed by no test but for a moment."""
    with gateway(f"{STOP}{RESTART}", "a", "b", more="hold_seconds = 20\n", context=4096) as found:
        yield found


# --- routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "answers"),
    [("a", "a"), ("b", "b"), ("acme/b", "b"), ("fast", "ab"), ("FAST", "ab"), ("A", "a")],
)
def test_a_request_reaches_the_model_that_it_names(two: Gateway, word: str, answers: str) -> None:
    reply = two.complete(word)
    assert reply.status == 200
    assert reply.model in answers
    assert json.loads(reply.body)["choices"]


def test_the_path_may_name_the_model_and_then_bodies_are_passed_unseen(two: Gateway) -> None:
    body = {"prompt": "the road", "max_tokens": 2, "junk": "x" * (9 * MIB)}
    reply = two.ask(body, "/model/b/v1/completions")
    assert (reply.status, reply.model) == (200, "b")
    assert two.ask(None, "/model/b/props", "GET").status == 200


def test_a_large_body_that_names_the_model_last_is_routed(two: Gateway) -> None:
    reply = two.complete("a", junk="x" * (5 * MIB))
    assert (reply.status, reply.model) == (200, "a")


def test_what_can_be_asked_for_is_listed_with_its_state(two: Gateway) -> None:
    reply = two.ask(None, "/v1/models", "GET")
    listed = {model["id"]: model for model in json.loads(reply.body)["data"]}
    assert set(listed) == {"a", "b"}
    wait_until(
        lambda: {
            model["phase"]
            for model in json.loads(two.ask(None, "/v1/models", "GET").body)["data"]
        } == {"ready"}, 10, "both ready",
    )  # fmt: skip
    assert "acme/a" in listed["a"]["aliases"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"not json", 400), (b"[" * 100_000, 400), (b'{"model": ', 400),
        (b'{"model": {"a": 1}}', 400), (b'{"model": ""}', 400), (b"\x00" * 100, 400),
        (b'{"model": "nobody"}', 404), (b'{"model": "a b\\" <script>"}', 404),
        (b'{"model": "../../etc/passwd"}', 404), (b'{"model": 7}', 404),
        (b'{"model": "' + b"x" * 100_000 + b'"}', 404), (b'{"model": "*list"}', 404),
        (b'{"x": "' + b"y" * (9 * MIB) + b'", "model": "a"}', 413),
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_what_makes_no_sense_gets_a_clear_refusal_and_hurts_nobody(
    two: Gateway, body: bytes, status: int
) -> None:
    reply = two.ask(body)
    assert reply.status == status
    assert reply.error["message"].isprintable()
    assert "<script>" not in reply.body.decode()
    assert two.complete("a").status == 200


def test_an_unknown_model_is_told_with_the_names_that_exist(two: Gateway) -> None:
    error = two.complete("nobody").error
    assert error["code"] == "model_not_found"
    assert error["models"] == ["a", "b"]


def test_a_client_that_sends_a_byte_now_and_then_is_dropped_and_others_are_served(
    two: Gateway,
) -> None:
    with socket.create_connection((two.host, two.port), timeout=40) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert all(two.complete("b").status == 200 for _ in range(20))
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


# --- clients -------------------------------------------------------------------------------------


def test_the_openai_client_chats_streams_lists_and_cancels(two: Gateway) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0) as client:
        ask: dict[str, Any] = {
            "model": "a", "messages": [{"role": "user", "content": "the road"}],
        }  # fmt: skip
        whole = client.chat.completions.create(**ask, max_tokens=4)
        assert whole.usage.completion_tokens == 4
        parts = list(client.chat.completions.create(**ask, max_tokens=8, stream=True))
        assert sum(bool(part.choices and part.choices[0].delta.content) for part in parts) >= 4
        assert {model.id for model in client.models.list()} == {"a", "b"}
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.chat.completions.create(**{**ask, "model": "nobody"}, max_tokens=4)
        stream = client.chat.completions.create(**ask, max_tokens=4000, stream=True)
        next(iter(stream))
        stream.close()
    wait_until(lambda: two.at.rows()["a"]["slots"]["busy"] == 0, 20, "the slot is free again")


def test_langchain_talks_to_a_tier(two: Gateway) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="fast", base_url=f"{two.url}/v1", api_key="none", max_tokens=4, max_retries=0
    )
    assert model.invoke("the road").content
    assert "".join(part.content for part in model.stream("the road"))


def test_a_stream_is_passed_on_as_it_comes(two: Gateway) -> None:
    """Token for token, and the first long before the last."""
    stream = TokenStream(f"{two.url}/model/a", 300)
    assert not stream.is_over
    assert stream.end() == TokenStream(f"{two.url}/model/a", 300).end()
    assert stream.complete


# --- hold and drain ------------------------------------------------------------------------------


def test_a_request_for_a_model_that_restarts_is_held(two: Gateway) -> None:
    before = two.at.rows()["a"]["pid"]
    with in_background(lambda: two.at.ctl("restart", "a")):
        wait_until(lambda: two.at.rows()["a"]["phase"] != "ready", 20, "on its way")
        reply = two.complete("a")
    assert reply.status == 200
    wait_until(lambda: two.at.rows()["a"]["phase"] == "ready", 20, "ready")
    assert two.at.rows()["a"]["pid"] != before


def test_a_model_that_was_stopped_is_refused_with_the_reason_and_when_to_come_again(
    two: Gateway,
) -> None:
    two.at.ctl("stop", "b")
    try:
        reply = wait_until(
            lambda: (found := two.complete("b")).status == 503 and found, 10, "refused"
        )
        assert "stopped by hand" in reply.error["message"]
        assert int(reply.headers["retry-after"]) > 0
        assert reply.seconds < 5
        assert two.complete("fast").model == "a"
    finally:
        two.at.ctl("start", "b")
    assert two.complete("b").status == 200


def test_a_stop_under_steady_traffic_ends_what_is_under_way_and_lets_nothing_after(
    two: Gateway,
) -> None:
    """Without the gateway it would drain until the deadline."""
    counts: Counter[int] = Counter()
    halt = threading.Event()

    def client() -> None:
        while not halt.is_set():
            counts[two.complete("b", max_tokens=32).status] += 1

    with contextlib.ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(in_background(client))
        clients.callback(halt.set)
        wait_until(lambda: counts[200] > 20, 20, "traffic")
        begun = time.monotonic()
        two.at.ctl("stop", "b")
        took = time.monotonic() - begun
        said = two.at.stop_lines("b")[-1]
        wait_until(lambda: counts[503] > 4, 20, "refused")
        served = counts[200]
        time_of_nothing = counts[503]
        wait_until(lambda: counts[503] > time_of_nothing + 4, 20, "refused on")
        assert counts[200] == served, "nothing is served after the stop"
    two.at.ctl("start", "b")
    print(f"stop under traffic: {took:.2f} s, {dict(counts)}")
    assert set(counts) == {200, 503}
    assert (said["cut"], said["deadline_hit"]) == ("0", "no")
    assert took < 8
    wait_until(lambda: two.complete("b").status == 200, 20, "served again")


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    """Runs it meanwhile; what it raised comes out at the end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed over below
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


# --- HAProxy itself ------------------------------------------------------------------------------


def back_within(found: Gateway, seconds: float) -> float:
    """Seconds until a completion comes through again."""
    begun = time.monotonic()

    def answers() -> bool:
        try:
            return found.complete("a", seconds=2).status == 200
        except (OSError, http_client.HTTPException):
            return False

    wait_until(answers, seconds, "it is back")
    return time.monotonic() - begun


def pids(found: Gateway) -> dict[str, int]:
    return {name: row["pid"] for name, row in found.at.rows().items()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda one: one.name)
@pytest.mark.parametrize("which", [0, 1], ids=["master", "worker"])
def test_a_haproxy_that_is_killed_or_frozen_is_back_and_models_stay_up(
    two: Gateway, number: signal.Signals, which: int
) -> None:
    before = pids(two)
    processes = wait_until(lambda: len(found := two.haproxy()) >= 2 and found, 10, "both there")
    processes[which].send_signal(number)
    if (number, which) != (signal.SIGSTOP, 0):  # a frozen master serves on
        wait_until(lambda: not two.is_up(), 5, "it is away")
    took = back_within(two, 10)
    print(f"{number.name} of haproxy's {'worker' if which else 'master'}: back after {took:.1f} s")
    assert pids(two) == before


def test_a_configuration_that_was_broken_by_hand_is_set_aside(two: Gateway) -> None:
    config = two.at.etc / "haproxy.cfg"
    good = config.read_text()
    config.write_text(good + "\nbackend broken\n    no such keyword\n")
    wait_until(lambda: config.with_name("haproxy.cfg.rejected").exists(), 20, "it is set aside")
    wait_until(lambda: config.exists() and config.read_text() == good, 20, "the good one is back")
    assert back_within(two, 10) < 10
    assert "no such keyword" in config.with_name("haproxy.cfg.rejected").read_text()


def test_haproxys_own_metrics_are_beside_ours(two: Gateway) -> None:
    reply = two.ask(None, "/gateway/metrics", "GET")
    assert reply.status == 200
    assert b'haproxy_server_status{proxy="a",server="model"' in reply.body


# --- under load ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Load:
    """Clients that ask all the time, each on a connection that is kept."""

    to: Gateway
    words: tuple[str, ...]
    most: int
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    halt: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.halt.is_set() and sum(self.counts.values()) < self.most:
            word = chance.choice(self.words)
            try:
                reply = self.to.complete(word)
                outcome = str(reply.status)
            except (OSError, http_client.HTTPException) as error:
                outcome, reply = type(error).__name__, None
            self.halt.wait(0.04)  # else the clients take all of the machine
            with self.lock:
                self.counts[outcome] += 1
                if outcome != "200":
                    self.bad.append(f"{word}: {outcome} {reply.body[:200] if reply else ''!r}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as clients:
            for number in range(CLIENTS):
                clients.enter_context(in_background(lambda number=number: self.client(number)))
            clients.callback(self.halt.set)
            yield


def test_twenty_swaps_under_load_fail_no_request() -> None:
    with gateway(f"enable = none\n{STOP}[model:a]\nenabled = true\n", "a", "b") as found:
        load = Load(found, ("fast",), 10**9)
        with load.running():
            for count in range(20):
                old, new = ("a", "b") if count % 2 == 0 else ("b", "a")
                found.at.ctl("swap", old, new)
        print(f"20 swaps under load: {dict(load.counts)}")
        assert load.bad == []
        assert load.counts["200"] > 100


def test_whatever_happens_to_models_no_request_fails_that_was_not_on_a_killed_one(
    two: Gateway,
) -> None:
    """A kill -9 cuts what runs on that process; all else ends well."""
    load = Load(two, ("a", "b", "fast"), 10**9)
    kills = 0
    block = two.at.conf_d / "b.conf"
    with load.running():
        count = 0
        while count < ROUNDS or sum(load.counts.values()) < REQUESTS:
            count += 1
            match count % 4:
                case 0:
                    two.at.ctl("restart", "a")
                case 1:
                    row = two.at.rows()["b"]
                    if row["phase"] == "ready":
                        server = psutil.Process(row["pid"]).children()[0]
                        server.kill()
                        kills += 1
                case 2:
                    text = block.read_text()
                    block.write_text(text.replace("--cache-ram 32", f"--cache-ram {33 + count}"))
                    two.at.ctl("update")
                case 3:
                    two.at.ctl("restart", "b")
            wait_until(
                lambda: all(row["phase"] == "ready" for row in two.at.rows().values()), 60,
                "all ready",
            )  # fmt: skip
    print(f"{sum(load.counts.values())} requests, {kills} kills: {dict(load.counts)}")
    # What a killed server had under way: at most what its slots and its queue held.
    assert len(load.bad) <= kills * CLIENTS
    assert all("502" in line or "RemoteDisconnected" in line for line in load.bad), load.bad[:5]


# --- on demand -----------------------------------------------------------------------------------

ON_DEMAND = """
enable = all
memory_reserve = 0
when_full = wait
rpc = {endpoint}
[stop]
drain_seconds = 2
[model:*]
device = RPC0
context = 4096
gpu_layers = 99
"""


@contextlib.contextmanager
def three_where_two_fit(more: str = "") -> Iterator[Gateway]:
    with rpc_device(16 << 30) as device:
        port = free_ports(1)
        settings = ON_DEMAND.format(endpoint=device.endpoint) + more + section(port)
        with deployed(settings) as deployment:
            deployment.add("a", "b", "c", **MODEL)
            deployment.synapse("init")
            device.total_bytes = int(need(deployment) * 2.5)
            deployment.synapse("up", "--detach", expect=None)
            found = Gateway(deployment, port)
            wait_until(found.is_up, 20, "the gateway answers")
            wait_until(
                lambda: sorted(row["phase"] for row in deployment.rows().values())
                == ["deferred", "ready", "ready"], 40, "two ready, one deferred",
            )  # fmt: skip
            yield found


def test_three_models_where_two_fit_are_each_answered_and_a_pinned_one_stays() -> None:
    with three_where_two_fit("[model:a]\npinned = true\n") as found:
        pinned = found.at.rows()["a"]["pid"]
        for word in ("b", "c", "a", "b", "c"):
            reply = found.complete(word)
            assert (reply.status, reply.model) == (200, word), reply.body
        assert found.at.rows()["a"]["pid"] == pinned


def test_a_storm_of_requests_for_a_cold_model_starts_it_once() -> None:
    with three_where_two_fit() as found:
        load = Load(found, ("c",), 100)
        with load.running():
            wait_until(lambda: sum(load.counts.values()) >= 100, 60, "all answered")
        assert load.bad == []
        starts = [step for step in found.at.history() if step["model"] == "c"]
        assert [step["to"] for step in starts].count("loading") == 1


# --- failover ------------------------------------------------------------------------------------

FAILOVER = """
[restart]
backoff_initial_seconds = 0.1
backoff_factor = 1
intensity = 2
period_seconds = 20
cooldown_seconds = 5
[model:big]
fallback = small
[model:small]
enabled = false
"""


def test_while_a_model_is_given_up_its_fallback_answers_and_says_so() -> None:
    """Two crashes open its breaker; after the cooldown the model itself is back."""
    with gateway(FAILOVER, "small", larger="big") as found:
        assert "x-synapse-fallback" not in found.complete("big").headers
        for _ in range(2):
            found.at.servers()["big"].kill()
            wait_until(lambda: found.complete("big").status == 200, 20, "answered")
        by_fallback = wait_until(
            lambda: (reply := found.complete("big")).headers.get("x-synapse-fallback") and reply,
            20, "the fallback answers",
        )  # fmt: skip
        assert by_fallback.headers["x-synapse-fallback"] == "small"
        assert by_fallback.model == "big"
        wait_until(
            lambda: (reply := found.complete("big")).status == 200
            and "x-synapse-fallback" not in reply.headers, 40, "the model itself answers again",
        )  # fmt: skip


# --- keys ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(llama_server: Any) -> Iterator[Gateway]:
    """A gateway with two keys; `e` makes embeddings."""
    port = free_ports(1)
    with deployed() as deployment:
        keys = deployment.root / "keys"
        keys.write_text("secret-one\nsecret-two\n")
        keys.chmod(0o600)
        embedding = "[model:e]\nargs = --embeddings --pooling mean\n"
        deployment.configure(section(port, f"api_key_file = {keys}") + embedding)
        deployment.add("a", "e")
        deployment.synapse("up", "--detach")
        found = Gateway(deployment, port)
        wait_until(found.is_up, 20, "the gateway answers")
        yield found


def test_where_keys_are_set_nobody_gets_in_without_one(locked: Gateway) -> None:
    body = {"model": "a", "prompt": "x", "max_tokens": 1}
    assert locked.ask(body).status == 401
    assert locked.ask(body, Authorization="Bearer wrong").status == 401
    assert locked.ask(None, "/v1/models", "GET").status == 401
    for key in ("secret-one", "secret-two"):
        assert locked.ask(body, Authorization=f"Bearer {key}").status == 200
    shown = " ".join(" ".join(one.cmdline()) for one in locked.haproxy())
    logs = (locked.at.log / "gateway.log").read_text()
    assert "secret" not in shown + logs


def test_the_openai_client_makes_embeddings_with_a_key(locked: Gateway) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="secret-two", max_retries=0) as client:
        found = client.embeddings.create(model="e", input=["the road", "a house"])
        assert [len(one.embedding) for one in found.data] == [64, 64]
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.embeddings.create(model="e", input="the road")
