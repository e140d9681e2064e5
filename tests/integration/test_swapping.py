"""One model takes the place of another; whatever happens meanwhile, exactly one of them serves.

Against real supervisord and real llama-server. Two deployments: in `roomy` both models fit, in
`tight` nothing more may be taken from memory, so the old model has to go first. Loading takes the
models a third of a second, so that it can be met. Figures are printed (pytest -rP shows them).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.integration.harness import (
    BIN,
    Deployment,
    Done,
    TokenStream,
    Watch,
    answers,
    chat,
    deployed,
    holds_for,
    is_gone,
    wait_until,
)
from tests.integration.rpc_devices import rpc_device
from tests.ports import port_is_free

pytestmark = pytest.mark.usefixtures("llama_server")

DRAIN_SECONDS = 2
AT_REST = frozenset({"stopped", "disabled", "failed"})
ENDLESS = 8000
MODEL: dict[str, Any] = {
    "layers": 6, "feed_forward": 256, "context": 8192, "vocabulary": 30_000,
}  # fmt: skip


SETTINGS = f"""
enable = none
memory_reserve = 0
when_full = wait
{{more}}
[stop]
drain_seconds = {DRAIN_SECONDS}
term_seconds = 1
[restart]
backoff_initial_seconds = 0.2
backoff_factor = 1
intensity = 1000
[model:one]
enabled = true
[model:bad]
args = --no-such-flag
"""
ON_DEVICE = "[model:*]\ndevice = RPC0\ncontext = 4096\n"


def _add(deployment: Deployment) -> None:
    deployment.add("one", "two", "bad", **MODEL)


@pytest.fixture(scope="module")
def roomy_deployment(llama_server: Engine) -> Iterator[Deployment]:
    with deployed(SETTINGS.format(more="")) as deployment:
        _add(deployment)
        deployment.synapse("up", "--detach")
        yield deployment


@pytest.fixture(scope="module")
def tight_deployment(llama_server: Engine) -> Iterator[Deployment]:
    """On a device that holds one of the models, and half of another."""
    with (
        rpc_device(16 << 30) as device,
        deployed(SETTINGS.format(more=f"rpc = {device.endpoint}") + ON_DEVICE) as deployment,
    ):
        _add(deployment)
        deployment.synapse("init")
        (need, *_) = {
            program["memory"]["devices"]["RPC0"] for program in deployment.plan()["models"]
        }
        device.total_bytes = need * 3 // 2
        deployment.synapse("up", "--detach")
        yield deployment


@pytest.fixture
def roomy(roomy_deployment: Deployment) -> Deployment:
    """`one` serves and the others rest; what comes in finds room beside it."""
    return _set_up(roomy_deployment)


@pytest.fixture
def tight(tight_deployment: Deployment) -> Deployment:
    """`one` serves and the others rest; there is no room for another."""
    return _set_up(tight_deployment)


@pytest.fixture(params=["roomy", "tight"])
def either(request: pytest.FixtureRequest) -> Deployment:
    """Both, one after the other."""
    deployment: Deployment = request.getfixturevalue(request.param)
    return deployment


def _set_up(deployment: Deployment) -> Deployment:
    if not deployment.processes():
        deployment.start_supervisord()
    wait_until(deployment.rows, 15, "the listener reports")
    for name, verb in (("two", "disable"), ("bad", "disable"), ("one", "enable")):
        deployment.ctl(verb, name)
    _wait_for_one(deployment, "one")
    return deployment


def _phases(deployment: Deployment) -> dict[str, str]:
    return {name: model["phase"] for name, model in deployment.rows().items()}


def _wait_for_one(deployment: Deployment, name: str = "", seconds: float = 40) -> str:
    """Which of the two serves (`name`, where given), once the other is verified stopped."""

    def alone() -> str:
        phases = _phases(deployment)
        for serving, other in (("one", "two"), ("two", "one")):
            is_it = phases.get(serving) == "ready" and phases.get(other) in AT_REST
            if is_it and name in ("", serving):
                return serving
        return ""

    serving = wait_until(alone, seconds, f"only {name or 'one of them'} serves")
    _assert_alone(deployment, serving)
    return serving


def _assert_alone(deployment: Deployment, serving: str) -> None:
    """By the process table and the ports; it answers, and nobody is there twice."""
    models = deployment.rows()
    other = {"one": "two", "two": "one"}[serving]
    servers = [alias for alias, server in deployment.all_servers() if not is_gone(server)]
    assert servers == [serving]
    assert port_is_free(models[other]["port"])
    assert chat(models[serving])


def _swap(deployment: Deployment, old: str, new: str) -> Done:
    return deployment.ctl("swap", old, new, expect=None)


def _first(deployment: Deployment, name: str, since: float, to: str) -> float:
    """When a model first came into a phase since then."""
    return float(deployment.wait_for_step(name, since, 10, to=to)["when"])


# --- a swap that succeeds ------------------------------------------------------------------------


def test_where_both_fit_a_client_of_the_two_is_never_without_a_server(roomy: Deployment) -> None:
    """There and back twice, while a client asks one of them and, where that fails, the other."""
    models = roomy.rows()
    order = ("one", "two")

    def ask_one_of_them() -> bool:
        """Twice each: a swap may end and the next begin between two questions, but a gap without
        a server lasts as long as a model loads."""
        for _ in range(2):
            for name in order:
                with contextlib.suppress(OSError, AssertionError):
                    return bool(chat(models[name]))
        return False

    took = []
    with Watch(ask_one_of_them, 0.05) as client:
        for old, new in (("one", "two"), ("two", "one")) * 2:
            order = (old, new)
            since = time.time()
            assert _swap(roomy, old, new).status == 0
            took.append(time.time() - since)
            _assert_alone(roomy, new)
            left = min(step["when"] for step in roomy.steps(old, since))
            assert _first(roomy, new, since, "ready") <= left
    print("swap, both fit:", ", ".join(f"{seconds:.2f} s" for seconds in took))
    assert len(client.seen) > 20
    assert all(served for _, served in client.seen)


def test_where_both_do_not_fit_the_old_one_is_verified_stopped_first(tight: Deployment) -> None:
    took = []
    for old, new in (("one", "two"), ("two", "one")):
        since = time.time()
        assert _swap(tight, old, new).status == 0
        took.append(time.time() - since)
        _assert_alone(tight, new)
        rests = min(step["when"] for step in tight.steps(old, since) if step["to"] in AT_REST)
        assert rests <= _first(tight, new, since, "loading")
    print("swap, one after the other:", ", ".join(f"{seconds:.2f} s" for seconds in took))


def test_a_stream_of_the_old_model_ends_before_it_goes(either: Deployment) -> None:
    url = either.rows()["one"]["url"]
    reference = TokenStream(url, 150).end()
    stream = TokenStream(url, 150)
    assert _swap(either, "one", "two").status == 0
    assert stream.end() == reference
    assert stream.complete
    _assert_alone(either, "two")


def test_what_a_swap_reached_holds_under_a_new_listener_and_a_new_supervisord(
    roomy: Deployment,
) -> None:
    assert _swap(roomy, "one", "two").status == 0
    wait_until(roomy.listener, 15, "a listener").kill()
    assert holds_for(lambda: list(roomy.servers()) == ["two"], 2)
    roomy.supervisord().kill()
    wait_until(lambda: not roomy.processes(), 5, "all gone")
    roomy.start_supervisord()
    assert _wait_for_one(roomy) == "two"


# --- a swap that fails ---------------------------------------------------------------------------


def test_where_the_new_one_is_bad_the_old_one_serves(either: Deployment) -> None:
    """It never left where both fit, and is back where it had to go; the answer says why."""
    before = either.rows()["one"]["pid"]
    done = _swap(either, "one", "bad")
    assert done.status == 1
    assert "bad" in done.text
    _wait_for_one(either, "one")
    assert either.rows()["bad"]["phase"] in AT_REST
    fits = "rpc =" not in (either.etc / "synapse.conf").read_text()
    assert (either.rows()["one"]["pid"] == before) is fits
    wait_until(either.listener, 15, "a listener").kill()
    assert holds_for(lambda: list(either.servers()) == ["one"], 2)


@pytest.mark.parametrize("words", [("one", "nobody"), ("nobody", "one"), ("one", "one")])
def test_a_swap_that_makes_no_sense_is_refused_and_changes_nothing(
    roomy: Deployment, words: tuple[str, str]
) -> None:
    done, before = _swap(roomy, *words), roomy.pids()
    assert done.status == 1
    assert done.text.strip()
    assert roomy.pids() == before


# --- kill -9 at each step ------------------------------------------------------------------------

# What is there to be killed while the new one loads, and while the old one drains.
ROOMY_KILLS = list(itertools.product(("loading", "draining"), ("listener", "old", "new", "super")))
TIGHT_KILLS = [
    ("loading", "listener"), ("loading", "new"), ("loading", "super"),
    ("draining", "listener"), ("draining", "old"), ("draining", "super"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "victim"), ROOMY_KILLS)
def test_a_kill_during_a_swap_with_room_for_both_ends_with_one_of_them(
    roomy: Deployment, step: str, victim: str
) -> None:
    _kill_during_a_swap(roomy, step, victim)


@pytest.mark.parametrize(("step", "victim"), TIGHT_KILLS)
def test_a_kill_during_a_swap_without_room_for_both_ends_with_one_of_them(
    tight: Deployment, step: str, victim: str
) -> None:
    _kill_during_a_swap(tight, step, victim)


def _kill_during_a_swap(deployment: Deployment, step: str, victim: str) -> None:
    """The one that serves in the end is the one that the answer named, if there was an answer."""
    with contextlib.ExitStack() as clients:
        if step == "draining":
            TokenStream(deployment.rows()["one"]["url"], ENDLESS)
        since = time.time()
        client = clients.enter_context(_client(deployment, "swap", "one", "two"))
        clients.callback(client.kill)
        _wait_for_step_of_swap(deployment, step, since)
        _victim(deployment, victim).kill()
        if victim == "super":
            wait_until(lambda: not _below_supervisord(deployment), 10, "all gone")
            client.wait(30)
            deployment.start_supervisord()
        said = client.communicate(timeout=60)[0].decode()
    serving = _wait_for_one(deployment)
    assert holds_for(lambda: list(deployment.servers()) == [serving], 0.5)
    assert _wait_for_one(deployment) == serving
    print(f"{victim} killed while {step}: {serving} serves; the client was told: {said.strip()}")
    assert said.strip()
    if victim != "super":
        assert serving == ("two" if client.returncode == 0 else "one"), said


def _client(deployment: Deployment, *words: str) -> subprocess.Popen[bytes]:
    """A supervisorctl that is not waited for."""
    command = [str(BIN / "supervisorctl"), "-c", str(deployment.etc / "supervisord.conf"), *words]
    return subprocess.Popen(
        command, env=deployment.environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _below_supervisord(deployment: Deployment) -> list[psutil.Process]:
    """All of ours but the client, which ends when it likes."""
    processes = deployment.processes()
    return [process for process in processes if not is_gone(process) and not _is_client(process)]


def _is_client(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "swap" in process.cmdline()
    return True


def _wait_for_step_of_swap(deployment: Deployment, step: str, since: float) -> None:
    if step == "loading":
        wait_until(lambda: "two" in deployment.servers(), 20, "the new one loads")
        return

    def leaves() -> bool:
        return any(step["from"] == "ready" for step in deployment.steps("one", since))

    wait_until(leaves, 20, "the old one drains")


def _victim(deployment: Deployment, victim: str) -> psutil.Process:
    match victim:
        case "super":
            return deployment.supervisord()
        case "listener":
            return wait_until(deployment.listener, 15, "a listener")
    return deployment.servers()[{"old": "one", "new": "two"}[victim]]


# --- drain ---------------------------------------------------------------------------------------


def test_a_drained_model_stops_when_it_has_nothing_to_do_however_long_that_takes(
    roomy: Deployment,
) -> None:
    """A stream longer than the deadline of a stop is not cut; then it stays stopped."""
    model = roomy.rows()["one"]
    stream = TokenStream(model["url"], 1800)
    since = time.time()
    done = roomy.ctl("drain", "one")
    assert "one" in done.out
    assert len(stream.end(60)) == 1800
    assert stream.complete
    streamed = time.time() - since
    assert streamed > DRAIN_SECONDS, "or it shows nothing"
    roomy.wait_for_step("one", since, streamed + 5, to="stopped")
    print(
        f"drain: a stream went on for {streamed:.1f} s, the deadline of a stop is {DRAIN_SECONDS}"
    )
    assert "one" not in roomy.servers()
    assert port_is_free(model["port"])
    wait_until(roomy.listener, 15, "a listener").kill()
    assert holds_for(lambda: not roomy.servers(), 2)


def test_an_idle_model_is_drained_at_once(roomy: Deployment) -> None:
    since = time.time()
    roomy.ctl("drain", "one")
    stopped = roomy.wait_for_step("one", since, 5, to="stopped")
    print(f"drain of an idle model: {stopped['when'] - since:.2f} s with supervisorctl")
    assert roomy.stop_lines("one")[-1]["deadline_hit"] == "no"


def test_what_is_stopped_already_needs_no_drain(roomy: Deployment) -> None:
    assert roomy.ctl("drain", "two").out == "two: is stopped already\n"


# --- several clients at once ---------------------------------------------------------------------

Call = tuple[str, ...]  # a verb, and the models that it is about
READY, RESTS = frozenset({"ready"}), AT_REST
LAST_WORDS: dict[str, tuple[list[Call], Mapping[str, frozenset[str]]]] = {
    "swap there and back": (
        [("swap", "one", "two"), ("swap", "two", "one")],
        {"one": READY, "two": RESTS},
    ),
    "swap, back, and there": (
        [("swap", "one", "two"), ("swap", "two", "one"), ("swap", "one", "two")],
        {"one": RESTS, "two": READY},
    ),
    "swap, then disable the new one": (
        [("swap", "one", "two"), ("disable", "two")],
        {"one": RESTS, "two": RESTS},
    ),
    "swap, then enable the old one": (
        [("swap", "one", "two"), ("enable", "one")],
        {"one": READY, "two": READY},
    ),
    "stop, start, stop": (
        [("stop", "one"), ("start", "one"), ("stop", "one")],
        {"one": RESTS, "two": RESTS},
    ),
    "disable, enable": ([("disable", "one"), ("enable", "one")], {"one": READY, "two": RESTS}),
    "enable, disable": (
        [("enable", "two"), ("disable", "two")],
        {"one": READY, "two": RESTS},
    ),
    "drain, enable": ([("drain", "one"), ("enable", "one")], {"one": READY, "two": RESTS}),
    "stop, swap": ([("stop", "one"), ("swap", "one", "two")], {"one": RESTS, "two": READY}),
    "start, swap away": (
        [("start", "two"), ("swap", "two", "one")],
        {"one": READY, "two": RESTS},
    ),
}


@pytest.mark.parametrize("name", LAST_WORDS)
def test_of_requests_in_quick_succession_the_last_has_the_last_word(
    roomy: Deployment, name: str
) -> None:
    """None waits for the one before; each is answered, and what they end in stays."""
    calls, expected = LAST_WORDS[name]
    with roomy.rpc() as server:
        commands = [command for call in calls if (command := _call(server, call))]
        for command in commands:
            wait_until(lambda command=command: server.synapse.result(command), 40, f"{calls}")

        def reached() -> bool:
            phases = _phases(roomy)
            return all(phases[model] in wanted for model, wanted in expected.items())

        wait_until(reached, 30, f"{expected}")
        assert holds_for(reached, 1)
        told = [json.loads(str(server.synapse.result(command))) for command in commands]
    print(f"{name}: {[answer['message'] for answer in told]}")
    assert all(answer["message"] for answer in told)
    running = {model for model, wanted in expected.items() if wanted is READY}
    assert sorted(alias for alias, _ in roomy.all_servers()) == sorted(running)


def _call(server: xmlrpc.client.ServerProxy, call: Call) -> str:
    """Ask, and do not wait; the id of the command, where it has one."""
    verb, *names = call
    if verb in ("start", "stop"):
        with contextlib.suppress(xmlrpc.client.Fault):
            method = server.supervisor.startProcess if verb == "start" else None
            (method or server.supervisor.stopProcess)(names[0], False)
        return ""
    return str(getattr(server.synapse, verb)(*names))


CROWD = 4
ROUNDS = 3
WISHES: list[Call] = [
    ("start", "one"), ("start", "two"), ("stop", "one"), ("stop", "two"), ("restart", "one"),
    ("enable", "one"), ("enable", "two"), ("disable", "one"), ("disable", "two"),
    ("swap", "one", "two"), ("swap", "two", "one"), ("drain", "two"),
    ("discover",), ("update",),
]  # fmt: skip


def test_each_of_many_clients_gets_an_answer_and_the_last_one_its_will(roomy: Deployment) -> None:
    """Everything that can be asked of the two models, from several clients, all at once."""
    begun = time.time()
    logged = (roomy.log / "synapse.log").stat().st_size
    with ThreadPoolExecutor(CROWD) as clients:
        stories = list(clients.map(lambda seed: _wishes(roomy, seed), range(CROWD)))
    asked = [step for story in stories for step in story]
    print(f"{len(asked)} requests in {time.time() - begun:.1f} s")
    for call, done in asked:
        # Supervisorctl's own status for a start that somebody else's stop ended.
        own = (7,) if call[0] in ("start", "restart") else ()
        assert done.status in (0, 1, 2, *own), (call, done)
        assert done.text.strip() or call[0] == "update", (call, done)
        assert "Traceback" not in done.text, (call, done)
        assert "does not answer" not in done.text, (call, done)
    for call in (("disable", "one"), ("enable", "two")):
        roomy.ctl(*call)
    _wait_for_one(roomy, "two")
    roomy.ctl("swap", "two", "one")
    _assert_alone(roomy, "one")
    assert holds_for(lambda: list(roomy.servers()) == ["one"], 2)
    assert b"Traceback" not in (roomy.log / "synapse.log").read_bytes()[logged:]


def _wishes(deployment: Deployment, seed: int) -> list[tuple[Call, Done]]:
    """What one client asked, and what it was answered."""
    chance, said = random.Random(seed), []
    for call in chance.sample(WISHES, ROUNDS):
        run: Callable[..., Done] = deployment.synapse if call[0] == "discover" else deployment.ctl
        said.append((call, run(*call, expect=None)))
    return said


def test_nothing_of_a_swap_is_left_when_all_is_over(roomy: Deployment, tight: Deployment) -> None:
    """Of all the swaps above: no server of a model that rests, and both still answer."""
    for deployment in (roomy, tight):
        assert list(deployment.servers()) == ["one"]
        assert answers(f"{deployment.model('one')['url']}/health")
