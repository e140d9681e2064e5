"""A stop is a fact: what runs is drained, what is stuck is killed, and nothing is left behind.

Against real supervisord and real llama-server; the deadline of a drain is two seconds here, and
one second lies between the signals after it. Figures are printed (pytest -rP shows them).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.gguf_factory import write_model
from tests.integration.harness import (
    Deployment,
    TokenStream,
    answers,
    ask,
    chat,
    compute_threads,
    deployed,
    frozen_threads,
    holds_for,
    http,
    is_gone,
    promised,
    wait_until,
)
from tests.ports import free_port, port_is_free

pytestmark = pytest.mark.usefixtures("llama_server")

DRAIN_SECONDS = 2
BOUND_SECONDS = DRAIN_SECONDS + 5
STOP = f"\n[stop]\ndrain_seconds = {DRAIN_SECONDS}\nterm_seconds = 1\n"
# About 150 tokens a second, up to 8,000.
SLOW: dict[str, Any] = {"layers": 16, "feed_forward": 1024, "context": 8192}
ENDLESS = 8000


@dataclass(frozen=True, slots=True)
class Family:
    """All processes of one run of a model."""

    name: str
    port: int
    processes: tuple[psutil.Process, ...]

    @property
    def is_over(self) -> bool:
        """Every process has ended, and the port can be had again."""
        return all(map(is_gone, self.processes)) and port_is_free(self.port)


def _family(deployment: Deployment, name: str) -> Family:
    model = deployment.rows()[name]
    launcher = psutil.Process(model["pid"])
    return Family(name, model["port"], (launcher, *launcher.children(recursive=True)))


def _start(deployment: Deployment, *names: str) -> None:
    """Those of them that do not run; once they are ready."""
    models = deployment.rows()
    stopped = [name for name in names if models[name]["phase"] != "ready"]
    if stopped:
        deployment.ctl("start", *stopped, expect=None)
        deployment.wait_for_rows(dict.fromkeys(stopped, "ready"))


def _is_busy(url: str) -> bool:
    return any(slot["is_processing"] for slot in json.loads(http(f"{url}/slots")[1]))


# --- a stop by hand, whatever its clients do -----------------------------------------------------


@pytest.fixture(scope="module")
def stopping_deployment(llama_server: Engine) -> Iterator[Deployment]:
    with deployed(STOP) as deployment:
        deployment.add("idle")
        deployment.add("attached", "half", "unread", "hung", **SLOW)
        deployment.synapse("up", "--detach")
        yield deployment


@pytest.fixture
def stopping(stopping_deployment: Deployment) -> Deployment:
    """Five models, each of them ready."""
    _start(stopping_deployment, "idle", "attached", "half", "unread", "hung")
    return stopping_deployment


def test_an_idle_model_is_stopped_and_verified_within_a_second(stopping: Deployment) -> None:
    """From the asking to the listener's verdict, three times."""
    took = []
    for _ in range(3):
        _start(stopping, "idle")
        family = _family(stopping, "idle")
        with stopping.rpc() as server:
            since = time.time()
            server.supervisor.stopProcess("idle", False)  # by position only
        stopped = stopping.wait_for_step("idle", since, 10, to="stopped")
        assert family.is_over
        took.append(stopped["when"] - since)
    print("idle: stopped and verified after", ", ".join(f"{seconds:.2f} s" for seconds in took))
    assert min(took) > 0
    assert max(took) <= promised(1)


@contextlib.contextmanager
def _attached(model: Any) -> Iterator[None]:
    """A client that reads a stream without end."""
    TokenStream(model["url"], ENDLESS)
    yield


@contextlib.contextmanager
def _half(model: Any) -> Iterator[None]:
    """A client that never sends the rest of its request."""
    with socket.create_connection(("127.0.0.1", model["port"])) as client:
        client.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        yield


@contextlib.contextmanager
def _unread(model: Any) -> Iterator[None]:
    """A client that asks for a stream and never reads; all buffers on the way are full."""
    body = b'{"prompt": "the road", "n_predict": 8000, "stream": true, "n_probs": 100}'
    head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", model["port"]))
        client.sendall(head + body)
        wait_until(lambda: _is_busy(model["url"]), 10, "busy")
        yield


@contextlib.contextmanager
def _hung(model: Any) -> Iterator[None]:
    """Compute threads that stand still in the middle of a request, with /health at 200."""
    question = {"prompt": "the river", "n_predict": 300}
    threads = compute_threads(model["server"], lambda: ask(f"{model['url']}/completion", question))
    stream = TokenStream(model["url"], ENDLESS)
    with frozen_threads(threads):
        assert answers(f"{model['url']}/health")
        assert not stream.is_over
        yield


TROUBLE: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "attached": _attached,
    "half": _half,
    "unread": _unread,
    "hung": _hung,
}


@pytest.mark.parametrize("name", TROUBLE)
def test_no_client_and_no_hang_holds_up_a_stop(
    stopping: Deployment, llama_server: Engine, name: str
) -> None:
    """Stopped and verified within the drain and 5 s; the launcher says how it went."""
    family = _family(stopping, name)
    model = {**stopping.rows()[name], "server": stopping.servers()[name].pid}
    with TROUBLE[name](model):
        since = time.time()
        stopping.ctl("stop", name)
        stopped = stopping.wait_for_step(name, since, 30, to="stopped")
        assert family.is_over
    said, took = stopping.stop_lines(name)[-1], stopped["when"] - since
    print(f"{name}: stopped and verified after {took:.2f} s; the launcher: {said}")
    assert took <= promised(BOUND_SECONDS)
    if name == "hung" and llama_server.is_portable:
        assert said["drain_ended_by"] == "silent"
        return
    assert said["drained"] == "0"
    assert said["cut"] in ("0" if name == "half" else llama_server.cut_counts(1))
    assert said["deadline_hit"] == ("no" if name == "half" else "yes")


def test_past_the_deadline_each_stream_that_is_cut_is_counted_and_logged(
    stopping: Deployment, llama_server: Engine
) -> None:
    """In the launcher's line, which stands in the model's log."""
    streams = [TokenStream(stopping.rows()["attached"]["url"], ENDLESS) for _ in range(3)]
    since = time.time()
    stopping.ctl("stop", "attached")
    stopping.wait_for_step("attached", since, BOUND_SECONDS, to="stopped")
    assert all(len(stream.end()) < ENDLESS and not stream.complete for stream in streams)
    said = stopping.stop_lines("attached")[-1]
    assert (said["drained"], said["deadline_hit"]) == ("0", "yes")
    assert said["cut"] in llama_server.cut_counts(3)


# --- each way to stop drains ---------------------------------------------------------------------

# Long enough that a stream is under way when the stop comes, and ends well before a deadline.
PATIENT = "\n[stop]\ndrain_seconds = 30\n[model:*]\nparallel = 20\ncontext = 8192\n"
LENGTHS = range(180, 220, 2)
LONGER = range(400, 408, 2)


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running deployment with supervisord's web server."""

    at: Deployment
    web: str
    reference: list[int]  # the tokens of an undisturbed stream


@pytest.fixture(scope="module")
def patient_deployment(llama_server: Engine) -> Iterator[Fleet]:
    with deployed(PATIENT) as deployment:
        deployment.add("slow", **SLOW)
        deployment.synapse("init")
        web = deployment.open_web_server()
        deployment.synapse("up", "--detach")
        whole = TokenStream(deployment.rows()["slow"]["url"], max(LONGER))
        yield Fleet(deployment, web, whole.end())


@pytest.fixture
def patient(patient_deployment: Fleet) -> Fleet:
    """Its one model ready, whatever the last test did."""
    at = patient_deployment.at
    if not at.processes():
        at.start_supervisord()
        at.wait_ready()
    _start(at, "slow")
    return patient_deployment


def _by_supervisorctl(fleet: Fleet) -> None:
    fleet.at.ctl("stop", "slow")


def _by_web_page(fleet: Fleet) -> None:
    query = urllib.parse.urlencode({"action": "stop", "processname": "slow:slow"})
    status, _ = http(f"{fleet.web}/index.html?{query}")
    assert status == 200


def _by_restart(fleet: Fleet) -> None:
    fleet.at.ctl("restart", "slow")


def _by_update(fleet: Fleet) -> None:
    """The block was edited by hand."""
    block = fleet.at.conf_d / "slow.conf"
    text = block.read_text()
    block.write_text(text.replace("--cache-ram 32", "--cache-ram 33", 1))
    assert block.read_text() != text
    fleet.at.ctl("update")


def _by_shutdown(fleet: Fleet) -> None:
    fleet.at.ctl("shutdown")


@pytest.mark.parametrize(
    ("stop", "lengths", "comes_back"),
    [
        (_by_supervisorctl, LENGTHS, False),
        (_by_web_page, LONGER, False),
        (_by_restart, LONGER, True),
        (_by_update, LONGER, True),
        (_by_shutdown, LONGER, False),
    ],
)
def test_streams_that_end_before_the_deadline_get_every_token(
    patient: Fleet,
    llama_server: Engine,
    stop: Callable[[Fleet], None],
    lengths: range,
    comes_back: bool,
) -> None:
    """Token for token what an undisturbed stream got, and each ended as it should."""
    family, url = _family(patient.at, "slow"), patient.at.rows()["slow"]["url"]
    streams = [TokenStream(url, length) for length in lengths]
    under_way = [not stream.is_over for stream in streams]
    begun = time.monotonic()
    stop(patient)
    for stream, length in zip(streams, lengths, strict=True):
        assert len(stream.end()) == length
        assert stream.tokens == patient.reference[:length] or llama_server.is_portable
        assert stream.complete
    assert all(under_way), "the stop was to come while all of them streamed"
    wait_until(lambda: all(map(is_gone, family.processes)), 10, "its processes are gone")
    print(f"{stop.__name__}: {len(streams)} streams complete, {time.monotonic() - begun:.2f} s")
    said = patient.at.stop_lines("slow")[-1]
    assert (int(said["drained"]), said["cut"], said["deadline_hit"]) == (len(streams), "0", "no")
    if comes_back:
        wait_until(lambda: _answers_anew(patient.at, family), 30, "ready again")
    elif stop is _by_shutdown:
        wait_until(lambda: not patient.at.processes(), 5, "all gone")
    else:
        assert holds_for(lambda: "slow" not in patient.at.servers(), 2)
        assert patient.at.rows()["slow"]["phase"] == "stopped"


def _answers_anew(deployment: Deployment, than: Family) -> bool:
    model = deployment.rows()["slow"]
    return model["phase"] == "ready" and model["pid"] != than.processes[0].pid and bool(chat(model))


# --- shutdown ------------------------------------------------------------------------------------


def test_five_models_drain_together_at_a_shutdown(llama_server: Engine) -> None:
    """Each with a stream that takes its two seconds and is cut then: 2 + 1 s, not 5 × 3."""
    names = tuple(f"m{number}" for number in range(5))
    with deployed(STOP) as deployment:
        deployment.add(*names, **SLOW)
        deployment.synapse("up", "--detach")
        processes = deployment.processes()
        models = deployment.rows()
        streams = [TokenStream(models[name]["url"], ENDLESS) for name in names]
        begun = time.monotonic()
        with deployment.rpc() as server:
            server.supervisor.shutdown()
        wait_until(lambda: all(map(is_gone, processes)), 30, "all gone")
        took = time.monotonic() - begun
        print(f"shutdown of five models, each with a stream past its 2 s: {took:.2f} s")
        for name, stream in zip(names, streams, strict=True):
            assert not stream.complete
            (said,) = deployment.stop_lines(name)
            assert said["cut"] in llama_server.cut_counts(1)
            assert said["deadline_hit"] == "yes"
        assert DRAIN_SECONDS <= took <= promised(4)
        assert all(port_is_free(model["port"]) for model in models.values())


# --- kill -9 of each part, alone and in pairs ----------------------------------------------------

PARTS = ("supervisord", "listener", "launcher", "server")
VICTIMS = [*((part,) for part in PARTS), *itertools.combinations(PARTS, 2)]


@pytest.fixture(scope="module")
def killed_deployment(llama_server: Engine) -> Iterator[Deployment]:
    """Its models are tried again at once, however often they die."""
    restart = "[restart]\nbackoff_initial_seconds = 0.2\nbackoff_factor = 1\nintensity = 1000\n"
    with deployed(f"{STOP}{restart}") as deployment:
        deployment.add("victim", "other")
        deployment.add("long", **SLOW)
        deployment.synapse("up", "--detach")
        yield deployment


@pytest.fixture(scope="module")
def foreign(
    llama_server: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A llama-server of somebody else, started by the same user from the same file; its URL."""
    folder = tmp_path_factory.mktemp("foreign")
    model, port = write_model(folder / "foreign.gguf"), free_port()
    command = [llama_server.path, "--model", str(model), "--alias", "victim"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--parallel", "1"],
            env=llama_server.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    with process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 20, "the foreign one")
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.mark.parametrize("frozen", [False, True], ids=["killed", "frozen, then killed"])
@pytest.mark.parametrize("parts", VICTIMS, ids="+".join)
def test_whatever_is_killed_nothing_is_left_and_the_fleet_comes_back(
    killed_deployment: Deployment,
    foreign: tuple[subprocess.Popen[bytes], str],
    parts: tuple[str, ...],
    frozen: bool,
) -> None:
    """What hung on the killed ones goes with them; all else, ours and others', is left alone."""
    at = killed_deployment
    pids = _fleet_is_whole(at)
    victims = [_part(at, part) for part in parts]
    doomed = _that_must_go(at, parts, victims)
    begun = time.monotonic()
    _end(victims, frozen=frozen)
    wait_until(lambda: all(map(is_gone, doomed)), DRAIN_SECONDS + 5, "gone")
    gone = time.monotonic() - begun
    if "supervisord" in parts:
        assert at.processes() == []
        at.start_supervisord()
    lost = {"victim"} if {"launcher", "server"} & set(parts) else set()
    lost = set(pids) if "supervisord" in parts else lost
    after = _fleet_is_whole(at, {pids[name] for name in lost})
    print(f"{'+'.join(parts)}: gone {gone:.2f} s, back {time.monotonic() - begun:.2f} s")
    assert {name: pid for name, pid in after.items() if name not in lost} == {
        name: pid for name, pid in pids.items() if name not in lost
    }
    process, url = foreign
    assert process.poll() is None
    assert answers(f"{url}/health")


def _part(deployment: Deployment, part: str) -> psutil.Process:
    """A process by its part; launcher and server are those of `victim`."""
    match part:
        case "supervisord":
            return deployment.supervisord()
        case "listener":
            return wait_until(deployment.listener, 15, "a listener")
        case "launcher":
            return psutil.Process(deployment.rows()["victim"]["pid"])
    return deployment.servers()["victim"]


def _that_must_go(
    deployment: Deployment, parts: tuple[str, ...], victims: list[psutil.Process]
) -> list[psutil.Process]:
    if "supervisord" in parts:
        return deployment.processes()
    if {"launcher", "server"} & set(parts):
        return [*victims, *_family(deployment, "victim").processes]
    return victims


def _end(victims: list[psutil.Process], *, frozen: bool) -> None:
    if frozen:
        for process in victims:
            process.suspend()
        wait_until(lambda: all(map(_stands, victims)), 5, "frozen")
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):  # it went with the one before
            process.kill()


def _stands(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_STOPPED)


def _fleet_is_whole(deployment: Deployment, without: set[int] | None = None) -> dict[str, int]:
    """The pid of each model, once all answer, a listener runs, and no one is there twice."""

    def whole() -> dict[str, int] | None:
        models = deployment.rows()
        pids = {name: model["pid"] for name, model in models.items() if model["pid"]}
        if len(pids) != 3 or (without or set()) & set(pids.values()):
            return None
        is_ready = all(model["phase"] == "ready" for model in models.values())
        is_ready = is_ready and all(answers(f"{row['url']}/health") for row in models.values())
        return pids if is_ready and deployment.listener() else None

    pids = wait_until(whole, 30, "every model ready")
    assert pids is not None
    for model in deployment.rows().values():
        assert chat(model)
    servers = [alias for alias, server in deployment.all_servers() if not is_gone(server)]
    assert sorted(servers) == sorted(pids)
    wait_until(lambda: _zombies(deployment) == [], 5, "no zombies")
    return pids


def _zombies(deployment: Deployment) -> list[int]:
    """What ended below our supervisord and was not waited for."""
    zombies = []
    for process in deployment.supervisord().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                zombies.append(process.pid)
    return zombies


def test_a_killed_supervisord_lets_a_stream_end_before_all_go(
    killed_deployment: Deployment,
) -> None:
    """The drain holds also then: nothing is left within its deadline and 5 s."""
    at = killed_deployment
    _fleet_is_whole(at)
    url = at.rows()["long"]["url"]
    reference = TokenStream(url, 200).end()
    stream, processes = TokenStream(url, 200), at.processes()
    begun = time.monotonic()
    at.supervisord().kill()
    assert stream.end() == reference
    assert stream.complete
    wait_until(lambda: all(map(is_gone, processes)) and not at.processes(), BOUND_SECONDS, "gone")
    print(f"supervisord killed, a stream attached: all gone {time.monotonic() - begun:.2f} s")
    at.start_supervisord()
    _fleet_is_whole(at)


def test_what_outlived_a_killed_supervisord_is_reaped_by_the_next_start(
    killed_deployment: Deployment,
) -> None:
    """A launcher that was frozen cannot heed its parent's death: the next start ends it."""
    at = killed_deployment
    _fleet_is_whole(at)
    family, supervisord = _family(at, "victim"), at.supervisord()
    family.processes[0].suspend()
    wait_until(lambda: _stands(family.processes[0]), 5, "frozen")
    supervisord.kill()
    wait_until(lambda: is_gone(supervisord), 5, "supervisord is gone")
    wait_until(lambda: len(at.processes()) <= len(family.processes), BOUND_SECONDS, "the others")
    at.start_supervisord()
    wait_until(lambda: all(map(is_gone, family.processes)), 15, "reaped")
    pids = _fleet_is_whole(at)
    assert family.processes[0].pid not in pids.values()
