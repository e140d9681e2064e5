"""What fails comes back by itself, and what works is left alone: one test for each kind of fault.

Against the real server wherever it can be made to fail in that way, a scripted one for the rest.
Probes come every second here, and a model stalls after ten. Tests share deployments to save time;
each has a model of its own to break, and finds every other one untouched.

SYNAPSE_SOAK_SECONDS and SYNAPSE_ROUNDS lengthen the load test and the killing of the listener.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import resource
import selectors
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest

from tests.conftest import Engine
from tests.gguf_factory import write_model
from tests.integration.harness import (
    Deployment,
    Script,
    Watch,
    answers,
    ask,
    chat,
    compute_threads,
    deployed,
    frozen_threads,
    holds_for,
    http,
    lost_requests,
    promised,
    stranger_on,
    stranger_server,
    wait_until,
)
from tests.ports import port_is_free

pytestmark = pytest.mark.usefixtures("llama_server")

SOAK_SECONDS = float(os.environ.get("SYNAPSE_SOAK_SECONDS", "20"))
ROUNDS = int(os.environ.get("SYNAPSE_ROUNDS", "10"))

PROBES = """
[probe]
period_seconds = 1
stall_seconds = 10
"""


def _add(deployment: Deployment, *names: str, **options: Any) -> None:
    """A tiny model of each name, each in a repo of its own."""
    for name in names:
        seed = zlib.crc32(name.encode())
        file = write_model(deployment.sources / f"{name}.gguf", seed=seed, **options)
        deployment.hub.add(f"acme/{name}", {f"{name}.gguf": file})


def _is_gone(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _undisturbed(deployment: Deployment, *but: str) -> Iterator[None]:
    """Every ready model but these keeps its process and makes no transition meanwhile."""

    def ready() -> dict[str, int]:
        models = deployment.models().values()
        return {m["name"]: m["pid"] for m in models if m["phase"] == "ready"}

    before, since = {name: pid for name, pid in ready().items() if name not in but}, time.time()
    yield
    assert before.items() <= ready().items()
    steps = [step for name in before for step in deployment.steps(name, since)]
    # All that may come is what a listener that remembers nothing finds; on a busy machine, late.
    found = {(None, "ready"), (None, "loading"), ("loading", "ready")}
    assert [step for step in steps if (step["from"], step["to"]) not in found] == []


def _assert_no_duplicates(deployment: Deployment) -> None:
    """No model has two servers, by the process table itself."""
    aliases = [alias for alias, server in deployment.all_servers() if not _is_gone(server)]
    assert len(aliases) == len(set(aliases)), aliases


# --- the fleet of the real server ----------------------------------------------------------------

FLEET = ("kill", "segv", "abrt", "halt", "steady", "churn", "taken", "posed", "full", "byhand")
FLEET_SETTINGS = """
[model:nap]
sleep_idle_seconds = 2
[model:spare]
enabled = false
"""


@pytest.fixture(scope="module")
def fleet_deployment(llama_server: Engine) -> Iterator[Deployment]:
    with deployed(PROBES + FLEET_SETTINGS) as deployment:
        _add(deployment, *FLEET, "nap", "spare")
        _add(deployment, "load", layers=16, feed_forward=1024, context=8192)
        deployment.synapse("up", "--detach")
        yield deployment


@pytest.fixture
def fleet(fleet_deployment: Deployment) -> Deployment:
    """Thirteen models, each enabled one ready."""
    fleet_deployment.wait_ready()
    return fleet_deployment


@pytest.mark.parametrize(
    ("name", "number"),
    [("kill", signal.SIGKILL), ("segv", signal.SIGSEGV), ("abrt", signal.SIGABRT)],
)
def test_a_server_that_dies_is_noticed_at_once_and_back_soon(
    fleet: Deployment, name: str, number: int
) -> None:
    """Noticed within 1.5 s, ready within 5 s, by one restart."""
    server, before = fleet.servers()[name], fleet.model(name)
    with _undisturbed(fleet, name):
        since = time.time()
        server.send_signal(number)
        fleet.wait_for_step(name, since, promised(1.5), out_of="ready")
        fleet.wait_for_step(name, since, promised(5), to="ready")
        after = fleet.model(name)
        assert chat(after)
    assert after["restarts"] == before["restarts"] + 1
    assert after["pid"] != before["pid"]
    assert after["last_failure"]["class"] == "crashed"
    assert signal.Signals(number).name in after["last_failure"]["message"]
    starts = [step for step in fleet.steps(name, since) if step["to"] == "loading"]
    assert len(starts) == 1


def test_a_stopped_server_is_unready_then_killed_and_replaced(fleet: Deployment) -> None:
    """SIGSTOP: unready within 5 s; killed and ready again within 12 s."""
    server = fleet.servers()["halt"]
    with _undisturbed(fleet, "halt"):
        since = time.time()
        server.suspend()
        fleet.wait_for_step("halt", since, promised(5), out_of="ready")
        fleet.wait_for_step("halt", since, promised(12), to="ready")
        assert _is_gone(server)
        after = fleet.model("halt")
        assert chat(after)
    assert after["last_failure"]["class"] == "unresponsive"


def test_a_model_stopped_by_hand_stays_stopped_also_under_a_new_listener(fleet: Deployment) -> None:
    with _undisturbed(fleet, "byhand"):
        fleet.ctl("stop", "byhand")
        fleet.wait_for({"byhand": "stopped"})
        _replace_listener(fleet)
        assert holds_for(lambda: "byhand" not in fleet.servers(), 4)
        assert fleet.model("byhand")["phase"] == "stopped"
        fleet.ctl("start", "byhand")
        assert chat(fleet.wait_for({"byhand": "ready"})["byhand"])


def test_a_sleeping_server_sleeps_on_under_monitoring(fleet: Deployment) -> None:
    """Longer than any probe and the stall threshold; then it wakes for a request."""
    model = fleet.model("nap")

    def sleeps() -> bool:
        return _is_sleeping(model)

    wait_until(sleeps, 20, "asleep")
    since = time.time()
    assert holds_for(sleeps, 13)
    assert fleet.model("nap")["phase"] == "ready"
    assert chat(model)
    assert fleet.steps("nap", since) == []


def _is_sleeping(model: Any) -> bool:
    return bool(json.loads(http(f"{model['url']}/props")[1])["is_sleeping"])


# --- strangers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taken", "posed"])
def test_a_model_whose_port_a_stranger_took_gets_another(
    fleet: Deployment, tmp_path: Path, name: str
) -> None:
    """A stranger that only listens, and one that answers as a healthy llama-server does."""
    old = fleet.model(name)
    with _undisturbed(fleet, name):
        fleet.ctl("stop", name)
        fleet.wait_for({name: "stopped"})
        with contextlib.ExitStack() as stack:
            if name == "posed":
                stranger = stack.enter_context(stranger_server(old["port"], tmp_path))
            else:
                stack.enter_context(stranger_on(old["port"]))
            since = time.time()
            fleet.ctl("start", name, expect=None)
            fleet.wait_for_step(name, since, 15, to="ready")
            new = fleet.model(name)
            assert new["port"] != old["port"]
            assert new["port"] in fleet.ports
            assert chat(new)
            if name == "posed":
                assert stranger.poll() is None
                assert answers(f"http://127.0.0.1:{old['port']}/health")
            ready = [step for step in fleet.steps(name, since) if step["to"] == "ready"]
            assert len(ready) == 1
            assert ready[0]["incarnation"]["pid"] == new["pid"]


# --- load that is no fault -----------------------------------------------------------------------


@pytest.mark.timeout(180 + SOAK_SECONDS)
def test_a_saturated_queue_a_long_prompt_and_half_open_sockets_restart_nothing(
    fleet: Deployment,
) -> None:
    """200 requests for 4 slots, one of them longer than the rest together, 20 half requests."""
    model = fleet.model("load")
    with _undisturbed(fleet):
        with _Crowd(model["port"]) as crowd:
            wait_until(lambda: crowd.answered > 0, 20, "the first answers")
            assert holds_for(lambda: fleet.steps("load", crowd.since) == [], SOAK_SECONDS)
        assert crowd.answered > 4
    assert fleet.model("load")["pid"] == model["pid"]
    wait_until(lambda: chat(model), 30, "answers again")


class _Crowd:
    """200 clients that ask again as soon as they are answered, and 20 that never end a request."""

    def __init__(self, port: int) -> None:
        self.answered, self.since = 0, time.time()
        self._port, self._selector = port, selectors.DefaultSelector()
        self._halves: list[socket.socket] = []
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Crowd:
        for _ in range(20):
            half = socket.create_connection(("127.0.0.1", self._port))
            half.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Le")
            self._halves.append(half)
        self._ask("the river " * 2500, 16)
        for _ in range(199):
            self._ask("the road", 16)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        for half in self._halves:
            half.close()
        self._selector.close()

    def _ask(self, prompt: str, tokens: int) -> None:
        body = f'{{"prompt": "{prompt}", "n_predict": {tokens}}}'.encode()
        head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client = socket.create_connection(("127.0.0.1", self._port))
        client.sendall(head.encode() + body)
        self._selector.register(client, selectors.EVENT_READ)

    def _run(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                answer = key.fileobj.recv(65536)
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                self.answered += answer.startswith(b"HTTP/1.1 200")
                self._ask("the road", 16)


# --- the listener --------------------------------------------------------------------------------


def _replace_listener(deployment: Deployment) -> None:
    """Kill the listener; the next one is there."""
    listener = wait_until(deployment.listener, 15, "a listener")
    listener.kill()
    _wait_for_another_listener(deployment, listener.pid, 15)


def _wait_for_another_listener(deployment: Deployment, than: int, seconds: float) -> None:
    def another() -> bool:
        listener = deployment.listener()
        return listener is not None and listener.pid != than

    wait_until(another, seconds, "another listener")


def _assert_converged(deployment: Deployment, name: str, seconds: float = 15) -> None:
    """The listener sees and acts again: what is done by hand to a model is followed."""
    deadline = time.monotonic() + seconds
    for action, phase in (("stop", "stopped"), ("start", "ready")):
        since = time.time()
        deployment.ctl(action, name)
        deployment.wait_for_step(name, since, max(deadline - time.monotonic(), 0), to=phase)


@pytest.mark.timeout(180 + 10 * ROUNDS)
def test_a_listener_killed_at_random_moments_costs_no_request_and_no_duplicate(
    fleet: Deployment,
) -> None:
    """Also while a model is being stopped and started: it ends as it was last told to."""
    chance = random.Random(7)
    with (
        _undisturbed(fleet, "churn"),
        lost_requests(fleet.model("steady")) as stream,
        Watch(lambda: _churn(fleet, chance), 0.3),
    ):
        for _ in range(ROUNDS):
            Event().wait(chance.uniform(0, 2))
            _replace_listener(fleet)
            _assert_no_duplicates(fleet)
        since = time.monotonic()
    fleet.ctl("start", "churn", expect=None)
    fleet.wait_for({"churn": "ready"}, 15 - (time.monotonic() - since))
    _assert_converged(fleet, "churn")
    _assert_no_duplicates(fleet)
    assert len(stream.seen) > ROUNDS
    assert [lost for _, lost in stream.seen if lost] == []


def _churn(deployment: Deployment, chance: random.Random) -> None:
    action = chance.choice(("stop", "start"))
    deployment.ctl(action, "churn", expect=None)


def test_a_frozen_listener_is_replaced_and_nobody_notices(fleet: Deployment) -> None:
    with _undisturbed(fleet, "churn"), lost_requests(fleet.model("steady")) as stream:
        listener = wait_until(fleet.listener, 15, "a listener")
        listener.suspend()
        _wait_for_another_listener(fleet, listener.pid, 15)
        _assert_converged(fleet, "churn")
    assert [lost for _, lost in stream.seen if lost] == []
    _assert_no_duplicates(fleet)


def test_a_listener_whose_stdout_was_polluted_is_replaced(fleet: Deployment) -> None:
    """One stray line, and supervisord never sends it an event again."""
    with _undisturbed(fleet, "churn"), lost_requests(fleet.model("steady")) as stream:
        listener = wait_until(fleet.listener, 15, "a listener")
        Path(f"/proc/{listener.pid}/fd/1").write_text("a stray line\n")
        _wait_for_another_listener(fleet, listener.pid, 15)
        _assert_converged(fleet, "churn")
    assert [lost for _, lost in stream.seen if lost] == []
    _assert_no_duplicates(fleet)


# --- state that cannot be written or read --------------------------------------------------------


def test_where_the_state_cannot_be_written_the_fleet_goes_on(fleet: Deployment) -> None:
    """A folder stands in its place; the log says so, and it is written again once that is gone."""
    state, log = fleet.lib / "state.json", fleet.log / "synapse.log"
    said = log.stat().st_size
    state.unlink()
    state.mkdir()
    (state / "in-the-way").touch()
    try:
        with _undisturbed(fleet, "full", "byhand"):
            _kill_and_wait_ready(fleet, "full")
            wait_until(lambda: _warns_of_state(log, said), 10, "the log says so")
            _replace_listener(fleet)
            _assert_converged(fleet, "byhand")
    finally:
        (state / "in-the-way").unlink(missing_ok=True)
        if state.is_dir():
            state.rmdir()
    _assert_converged(fleet, "byhand")
    wait_until(state.is_file, 10, "the state is written again")


def test_on_a_full_disk_the_fleet_goes_on(fleet: Deployment) -> None:
    """Every write of the listener to a file fails, as on a full disk."""
    log = fleet.log / "synapse.log"
    _replace_listener(fleet)  # one that has not complained in the last minute
    said = log.stat().st_size
    listener = wait_until(fleet.listener, 15, "a listener")
    before = fleet.model("full")
    unlimited = listener.rlimit(resource.RLIMIT_FSIZE)
    with _undisturbed(fleet, "full"):
        listener.rlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
        try:
            fleet.servers()["full"].kill()

            def is_back() -> bool:
                model = fleet.model("full")
                return model["phase"] == "ready" and model["pid"] not in (0, before["pid"])

            wait_until(is_back, 15, "ready again")
            wait_until(lambda: _warns_of_state(log, said), 10, "the log says so")
            assert not _is_gone(listener)
        finally:
            listener.rlimit(resource.RLIMIT_FSIZE, unlimited)
    _assert_converged(fleet, "full")


def _warns_of_state(log: Path, since: int) -> bool:
    """Whether the log has a warning about the state, after so many bytes."""
    return re.search(r"WARNING .*\bstate\b", log.read_bytes()[since:].decode()) is not None


def _kill_and_wait_ready(deployment: Deployment, name: str) -> None:
    since = time.time()
    deployment.servers()[name].kill()
    deployment.wait_for_step(name, since, 15, to="ready")


# --- supervisord, and what survives it -----------------------------------------------------------


def test_a_killed_supervisord_leaves_nothing_and_comes_back_whole(fleet: Deployment) -> None:
    """Also where the state it left was torn: that is said, and set aside."""
    ports = {name: model["port"] for name, model in fleet.models().items()}
    processes = fleet.processes()
    fleet.supervisord().kill()
    wait_until(lambda: all(map(_is_gone, processes)) and not fleet.processes(), 5, "all gone")
    state = fleet.lib / "state.json"
    state.write_bytes(state.read_bytes()[:-40])
    said = (fleet.log / "synapse.log").stat().st_size
    fleet.start_supervisord()
    models = fleet.wait_ready(30)
    assert {name: model["port"] for name, model in models.items()} == ports
    assert chat(models["steady"])
    _assert_no_duplicates(fleet)
    assert len(fleet.servers()) == len(FLEET) + 2
    assert _warns_of_state(fleet.log / "synapse.log", said)


def test_enable_and_disable_survive_a_restart_of_everything(fleet: Deployment) -> None:
    fleet.ctl("disable", "taken")
    fleet.ctl("enable", "spare")
    fleet.wait_for({"taken": "disabled", "spare": "ready"})
    fleet.down()
    fleet.synapse("up", "--detach")
    models = fleet.wait_for({"taken": "disabled", "spare": "ready"})
    assert "taken" not in fleet.servers()
    assert chat(models["spare"])
    fleet.ctl("enable", "taken")
    fleet.ctl("disable", "spare")
    fleet.wait_for({"taken": "ready", "spare": "disabled"})


# --- compute that stands still in the real server ------------------------------------------------

WEDGED = ("compute-busy", "compute-idle", "loop-busy", "loop-idle")


@dataclass
class Wedges:
    """Four models that stand still since `since`, and what /health said of each."""

    at: Deployment
    calm: int
    since: dict[str, float] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    health: dict[str, Watch] = field(default_factory=dict)


@pytest.fixture(scope="module")
def wedges(llama_server: Engine) -> Iterator[Wedges]:
    """Four ways to stand still at once; another model works all the while.

    Frozen compute threads leave every endpoint at 200; a frozen main thread lets /slots and
    /metrics hang, as older builds do whenever they compute.
    """
    with deployed(PROBES) as deployment, contextlib.ExitStack() as frozen:
        _add(deployment, *WEDGED, "calm", layers=16, feed_forward=1024, context=8192)
        deployment.synapse("up", "--detach")
        models, servers = deployment.models(), deployment.servers()
        found = Wedges(deployment, models["calm"]["pid"])
        for name in WEDGED:
            url, pid = models[name]["url"], servers[name].pid
            threads = compute_threads(pid, lambda url=url: _generate(url, 300))
            if name.endswith("busy"):
                Thread(target=_generate_until_cut, args=(url,), daemon=True).start()
                wait_until(lambda url=url: _is_busy(url), 10, f"{name} is busy")
            chosen = threads if name.startswith("compute") else [pid]
            frozen.enter_context(frozen_threads(chosen))
            found.since[name], found.pids[name] = time.time(), models[name]["pid"]
            watch = Watch(lambda url=url: answers(f"{url}/health"))
            found.health[name] = frozen.enter_context(watch)
        yield found


def _generate(url: str, tokens: int) -> None:
    ask(f"{url}/completion", {"prompt": "the river", "n_predict": tokens})


def _generate_until_cut(url: str) -> None:
    with contextlib.suppress(OSError, AssertionError):
        _generate(url, 8000)


def _is_busy(url: str) -> bool:
    return any(slot["is_processing"] for slot in json.loads(http(f"{url}/slots")[1]))


@pytest.mark.parametrize("name", WEDGED)
def test_a_server_that_computes_nothing_is_found_and_replaced(wedges: Wedges, name: str) -> None:
    """Found within 15 s, ready again within 25 s; /health alone would have seen nothing."""
    at, since = wedges.at, wedges.since[name]
    left = at.wait_for_step(name, since, promised(15), out_of="ready")
    assert left["class"] in (None, "wedged")
    at.wait_for_step(name, since, promised(25), to="ready")
    model = at.model(name)
    assert model["pid"] != wedges.pids[name]
    assert model["last_failure"]["class"] == "wedged"
    assert model["restarts"] == 1
    assert chat(model)
    said = [ok for when, ok in wedges.health[name].seen if when < left["when"] - 0.5]
    assert len(said) > 10
    assert all(said)


def test_beside_wedged_models_a_working_one_is_left_alone(wedges: Wedges) -> None:
    at = wedges.at
    since = min(wedges.since.values())
    for name in WEDGED:
        at.wait_for_step(name, wedges.since[name], 30, to="ready")
    assert at.steps("calm", since) == []
    assert at.model("calm")["pid"] == wedges.calm


# --- files and arguments that cannot work --------------------------------------------------------

GOOD = ("good-a", "good-b", "good-c", "good-d")
BAD = {
    "missing": "model-missing",
    "corrupt": "model-corrupt",
    "truncated": "model-corrupt",
    "flag": "bad-argument",
}
BLOBS: dict[str, Callable[[Path], object]] = {
    "missing": lambda blob: blob.unlink(),
    "corrupt": lambda blob: blob.write_bytes(b"nonsense" + blob.read_bytes()[8:]),
    "truncated": lambda blob: os.truncate(blob, blob.stat().st_size - 1000),
    "flag": lambda blob: None,
}


@dataclass(frozen=True, slots=True)
class Halves:
    """A fleet of which half is bad, since its supervisord was started at `since`."""

    at: Deployment
    since: float
    alone_seconds: float
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
def halves(llama_server: Engine) -> Iterator[Halves]:
    """Files break between discovery and the start, where discovery cannot see it."""
    with deployed(f"{PROBES}[model:flag]\nargs = --no-such-flag") as deployment:
        _add(deployment, *GOOD)
        deployment.discover_first()
        began = time.monotonic()
        deployment.start_supervisord()
        deployment.wait_ready()
        alone_seconds = time.monotonic() - began
        deployment.down()
        _add(deployment, *BAD)
        deployment.discover()
        contents = {name: _blob(deployment, name).read_bytes() for name in BAD}
        for name, spoil in BLOBS.items():
            spoil(_blob(deployment, name))
        since = time.time()
        deployment.start_supervisord()
        yield Halves(deployment, since, alone_seconds, contents)


def _blob(deployment: Deployment, name: str) -> Path:
    (blob,) = (deployment.hub.repo(f"acme/{name}") / "blobs").iterdir()
    return blob


def test_the_good_half_is_ready_as_if_alone(halves: Halves) -> None:
    for name in GOOD:
        halves.at.wait_for_step(name, halves.since, promised(halves.alone_seconds + 2), to="ready")
    models = halves.at.models()
    assert all(chat(models[name]) for name in GOOD)


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_work_fails_at_once_and_is_not_tried_again(
    halves: Halves, name: str
) -> None:
    """The right class within 3 s of its start, one start at most, and the reason is shown."""
    at = halves.at
    failed = at.wait_for_step(name, halves.since, 15, to="failed")
    steps = at.steps(name, halves.since)
    begun = [step["when"] for step in steps if step["to"] in ("loading", "failed")]
    assert failed["when"] - begun[0] <= promised(3)
    assert failed["class"] == BAD[name]
    assert failed["evidence"]
    left_seconds = failed["when"] + 3 - time.time()
    assert holds_for(lambda: at.steps(name, failed["when"])[1:] == [], left_seconds)
    assert len([step for step in steps if step["to"] == "loading"]) <= 1, steps
    model = at.model(name)
    assert (model["phase"], model["last_failure"]["class"]) == ("failed", BAD[name])
    assert model["last_failure"]["message"]
    assert name not in at.servers()
    row = next(line for line in at.ctl("models").out.splitlines() if line.startswith(name))
    assert BAD[name] in row or model["reason"][:20] in row


def test_a_mended_model_starts_when_it_is_told_to(halves: Halves) -> None:
    at = halves.at
    at.wait_for_step("missing", halves.since, 15, to="failed")
    target = at.hub.snapshot("acme/missing") / "missing.gguf"
    blob = Path(os.path.normpath(target.parent / os.readlink(target)))
    blob.write_bytes(halves.contents["missing"])
    since = time.time()
    at.ctl("start", "missing")
    at.wait_for_step("missing", since, 10, to="ready")
    assert chat(at.model("missing"))


def test_a_running_model_whose_file_vanished_fails_when_it_must_start_again(
    halves: Halves,
) -> None:
    at = halves.at
    at.wait_for_step("good-d", halves.since, 15, to="ready")
    with _undisturbed(at, "good-d"):
        _blob(at, "good-d").unlink()
        since = time.time()
        at.servers()["good-d"].kill()
        failed = at.wait_for_step("good-d", since, 8, to="failed")
    assert failed["class"] == "model-missing"


# --- what only a script does ---------------------------------------------------------------------

RESTARTS = """
[restart]
intensity = 4
backoff_initial_seconds = 1
backoff_factor = 2
cooldown_seconds = 8
"""
DIES = {"exit_after": 3, "exit_status": 1, "exit_text": "it is over"}
OUT_OF_MEMORY = "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 9999"
BEHAVIOUR: dict[str, dict[str, object]] = {
    "calm": {},
    "frozen-busy": {"busy": True},
    "frozen-idle": {},
    "blocked-busy": {"busy": True},
    "blocked-idle": {},
    "slow-batches": {"busy": True, "batch_seconds": 7},
    "slow-load": {"load_seconds": 25, "load_log": "moves"},
    "stuck-load": {"load_seconds": 3600},
    "dies": DIES,
    "recovers": {**DIES, "only_starts": 4},
    "oom": {"exit_in_load": True, "exit_status": 1, "exit_text": OUT_OF_MEMORY},
    "abort": {"exit_in_load": True, "exit_status": -6},
    "deaf": {"ignores_term": True, "forks": True},
    "leaves": {"forks": True},
}
SCRIPTED_WEDGES = ("frozen-busy", "frozen-idle", "blocked-busy", "blocked-idle")


@dataclass(frozen=True, slots=True)
class Scripted:
    """A fleet of scripted servers, each with its fault, since `since`."""

    at: Deployment
    script: Script
    since: float
    wedged: float


@pytest.fixture(scope="module")
def scripted(llama_server: Engine) -> Iterator[Scripted]:
    with deployed() as deployment:
        script = Script(deployment)
        loading = f"engine = {script.engine}\nmax_parallel = 20"
        deployment.configure(f"{loading}\n{PROBES}{RESTARTS}[stop]\ndrain_seconds = 2")
        _add(deployment, *BEHAVIOUR)
        for name, behaviour in BEHAVIOUR.items():
            script.set(name, **behaviour)
        deployment.discover_first()
        since = time.time()
        deployment.start_supervisord()
        for name in (*SCRIPTED_WEDGES, "calm", "slow-batches", "deaf", "leaves"):
            deployment.wait_for_step(name, since, 20, to="ready")
        for name in SCRIPTED_WEDGES:
            mode, _, load = name.partition("-")
            script.set(name, mode=mode, busy=load == "busy", only_starts=1)
        yield Scripted(deployment, script, since, time.time())


@pytest.mark.parametrize("name", SCRIPTED_WEDGES)
def test_standing_counters_are_found_whatever_slots_answers(scripted: Scripted, name: str) -> None:
    """Found within 15 s, ready again within 25 s, though /health says 200 all the while."""
    at, since = scripted.at, scripted.wedged
    at.wait_for_step(name, since, promised(15), out_of="ready")
    at.wait_for_step(name, since, promised(25), to="ready")
    assert at.model(name)["last_failure"]["class"] == "wedged"
    assert len(scripted.script.starts(name)) == 2


def test_a_server_that_ends_after_each_start_is_given_up_and_tried_once_more(
    scripted: Scripted,
) -> None:
    """No more starts than the intensity, delays that double, an open breaker, one trial."""
    at, script = scripted.at, scripted.script
    at.wait_for_step("dies", scripted.since, 40, to="failed")
    opened = script.starts("dies")
    assert len(opened) <= 4
    gaps = [later[0] - earlier[0] - 3 for earlier, later in itertools.pairwise(opened)]
    for nth, gap in enumerate(gaps):
        assert 0.5 * 2**nth <= gap <= 1.5 * 2**nth + 1.5, gaps
    model = at.model("dies")
    assert model["phase"] == "failed"
    assert 0 < model["next_retry_in"] <= 8
    wait_until(lambda: len(script.starts("dies")) == len(opened) + 1, 12, "the trial")
    trial = script.starts("dies")[-1][0]
    at.wait_for_step("dies", trial, 6, to="failed")
    assert holds_for(lambda: len(script.starts("dies")) == len(opened) + 1, 4)


def test_a_server_that_has_recovered_passes_its_trial(scripted: Scripted) -> None:
    at = scripted.at
    at.wait_for_step("recovers", scripted.since, 40, to="failed")
    wait_until(lambda: len(scripted.script.starts("recovers")) == 5, 20, "the trial")
    trial = scripted.script.starts("recovers")[-1][0]
    at.wait_for_step("recovers", trial, 5, to="ready")
    assert holds_for(lambda: len(scripted.script.starts("recovers")) == 5, 5)
    assert at.model("recovers")["phase"] == "ready"


def test_a_slow_load_whose_log_moves_is_waited_for(scripted: Scripted) -> None:
    at = scripted.at
    ready = at.wait_for_step("slow-load", scripted.since, 45, to="ready")
    start, _, _ = scripted.script.starts("slow-load")[0]
    assert ready["when"] - start >= 24
    assert len(scripted.script.starts("slow-load")) == 1


def test_a_load_in_which_nothing_moves_is_found(scripted: Scripted) -> None:
    at = scripted.at
    found = at.wait_for_step("stuck-load", scripted.since, 30, out_of="loading")
    start, _, _ = scripted.script.starts("stuck-load")[0]
    assert found["when"] - start >= 9.5
    wait_until(lambda: len(scripted.script.starts("stuck-load")) > 1, 15, "another start")


def test_batches_slower_than_any_timeout_are_no_fault(scripted: Scripted) -> None:
    """/slots and /metrics answer only between batches, and each time something has moved."""
    at = scripted.at
    ready = at.wait_for_step("slow-batches", scripted.since, 20, to="ready")
    wait_until(lambda: time.time() > ready["when"] + 30, 40)
    assert at.steps("slow-batches", ready["when"] + 0.001) == []
    assert len(scripted.script.starts("slow-batches")) == 1


@pytest.mark.parametrize("name", ["oom", "abort"])
def test_memory_that_does_not_suffice_has_its_class(scripted: Scripted, name: str) -> None:
    """Said by the server, or an abort without a word while it loads."""
    at = scripted.at
    step = at.wait_for_step(name, scripted.since, 10, out_of="loading")
    assert step["class"] == "out-of-memory"
    assert at.model(name)["last_failure"]["class"] == "out-of-memory"
    if name == "oom":
        assert "failed to allocate" in step["evidence"]


def test_a_server_deaf_to_sigterm_is_stopped_with_all_its_children(scripted: Scripted) -> None:
    at = scripted.at
    model = at.model("deaf")
    _, pid, child = scripted.script.starts("deaf")[-1]
    processes = [psutil.Process(number) for number in (pid, child)]
    at.ctl("stop", "deaf")
    at.wait_for({"deaf": "stopped"}, 10)
    assert all(map(_is_gone, processes))
    assert port_is_free(model["port"])


def test_the_child_of_a_server_that_died_does_not_outlive_it(scripted: Scripted) -> None:
    at = scripted.at
    _, pid, child = scripted.script.starts("leaves")[-1]
    orphan, since = psutil.Process(child), time.time()
    os.kill(pid, signal.SIGKILL)
    at.wait_for_step("leaves", since, 6, to="ready")
    assert _is_gone(orphan)


def test_a_server_that_ends_at_a_moment_of_its_own_is_noticed(scripted: Scripted) -> None:
    """Status 0 is no success for a server that nobody asked to end."""
    at, script = scripted.at, scripted.script
    _, pid, _ = script.starts("calm")[-1]
    since = time.time()
    script.set("calm", exit_now=pid)
    at.wait_for_step("calm", since, promised(1.5), out_of="ready")
    at.wait_for_step("calm", since, promised(5), to="ready")
    assert at.model("calm")["last_failure"]["class"] == "crashed"


def test_every_transition_of_a_troubled_fleet_has_a_reason(scripted: Scripted) -> None:
    """And each failure its class; the log tells the same."""
    history = scripted.at.history()
    assert all(step["reason"] for step in history)
    assert all(step["class"] for step in history if step["to"] in ("backoff", "failed"))
    log = (scripted.at.log / "synapse.log").read_text()
    assert "Traceback" not in log
    assert len(re.findall(r" transition ", log)) >= len(history)
