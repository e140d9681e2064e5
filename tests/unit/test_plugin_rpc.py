"""The plugin inside supervisord: whatever it is told, it answers, and does nothing else.

A stand-in for supervisord offers what the plugin looks at; the real one is met in
tests/integration/test_plugin.py.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import weakref
import xmlrpc.client
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor import events
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.xmlrpc import Faults, RPCError, SystemNamespaceRPCInterface, traverse

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import ProcessState, Snapshot
from supervisor_synapse.plugin import rpc as plugin
from tests.unit.builders import row

pytestmark = pytest.mark.usefixtures("supervisor_as_it_was")

LAUNCHED = "/v/bin/synapse-run --drain 30 --term 2 -- /v/bin/llama-server --port 8100"


class Process:
    """A program of supervisord's that notes when it is stopped."""

    def __init__(self, state: int = ProcessStates.RUNNING, command: object = LAUNCHED) -> None:
        self.state, self.pid, self.stops = state, 4711, 0
        self.config = SimpleNamespace(command=command)

    def get_state(self) -> int:
        return self.state

    def stop(self) -> None:
        self.stops += 1
        self.state = ProcessStates.STOPPING


class Host:
    """What the plugin sees of supervisord."""

    def __init__(self, **processes: Process) -> None:
        self.logged: list[str] = []
        self.options = SimpleNamespace(
            logger=SimpleNamespace(critical=self.logged.append),
            mood=SupervisorStates.RUNNING,
            get_signal=lambda: None,
        )
        self.process_groups = {
            name: SimpleNamespace(processes={name: process}) for name, process in processes.items()
        }


@pytest.fixture(autouse=True)
def _no_subscriber_stays() -> Iterator[None]:
    events.clear()
    yield
    events.clear()


def plugged(host: Host | None = None) -> Any:
    """The namespace as a caller over XML-RPC meets it."""
    return plugin.make_rpcinterface(host or Host())


def call(namespace: Any, method: str, *arguments: object) -> Any:
    """Through supervisor's own dispatch, which hides a TypeError behind a fault."""
    return traverse(SimpleNamespace(synapse=namespace), f"synapse.{method}", arguments)


def code(namespace: Any, method: str, *arguments: object) -> int | None:
    """The fault that a call ends with; None: it succeeds."""
    try:
        call(namespace, method, *arguments)
    except RPCError as error:
        return int(error.code)
    return None


def text_of(*models: object, **more: object) -> str:
    return json.dumps({"at": 1.0, "models": list(models), **more})


def answer(namespace: Any) -> Any:
    """What `models` answers, after a crossing of XML-RPC."""
    text = call(namespace, "models")
    assert text.isascii()
    (back,), _ = xmlrpc.client.loads(xmlrpc.client.dumps((text,), methodresponse=True))
    assert back == text
    return json.loads(back)


# --- publishing and asking -----------------------------------------------------------------------


def test_before_the_listener_spoke_there_is_nothing() -> None:
    assert call(plugged(), "models") == ""


def test_what_was_published_is_what_is_answered() -> None:
    namespace = plugged()
    assert call(namespace, "publish", text_of({"name": "a", "reason": "é\n"}, more=2**70)) == 0
    found = answer(namespace)
    assert found["at"] == 1.0
    assert found["models"] == [{"name": "a", "reason": "é\n"}]
    assert found["more"] == 2**70


def test_the_newest_snapshot_counts() -> None:
    namespace = plugged()
    call(namespace, "publish", text_of({"name": "old"}))
    call(namespace, "publish", text_of())
    assert answer(namespace)["models"] == []


def test_the_answer_is_a_snapshot_again() -> None:
    namespace = plugged()
    snapshot = Snapshot(2.5, (row(reason="\ud800 ü"), row(name="b")))
    call(namespace, "publish", snapshots.dump(snapshot))
    assert snapshots.load(call(namespace, "models")) == snapshot


def test_the_answer_says_how_old_it_is() -> None:
    """By a clock that nobody sets: time passes, and a new snapshot is young."""
    namespace = plugged()
    call(namespace, "publish", text_of())
    first = answer(namespace)["age_seconds"]
    assert 0 <= first < 5
    deadline = time.monotonic() + 5
    while answer(namespace)["age_seconds"] < first + 0.02:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    grown = answer(namespace)["age_seconds"]
    call(namespace, "publish", text_of())
    assert answer(namespace)["age_seconds"] < grown


def test_supervisords_own_state_of_this_moment_is_filled_in() -> None:
    """The listener looks once a second; supervisord knows."""
    host = Host(a=Process(ProcessStates.STOPPING))
    namespace = plugged(host)
    call(namespace, "publish", snapshots.dump(Snapshot(1.0, (row(name="a", pid=1), row(name="b")))))
    a, b = snapshots.load(call(namespace, "models")).models
    assert (a.state, a.pid) == (ProcessState.STOPPING, 4711)
    assert (b.state, b.pid) == (ProcessState.RUNNING, row().pid)


@pytest.mark.parametrize("state", [s for s in vars(ProcessStates).values() if isinstance(s, int)])
def test_every_state_of_supervisords_is_understood(state: int) -> None:
    namespace = plugged(Host(a=Process(state)))
    call(namespace, "publish", snapshots.dump(Snapshot(1.0, (row(name="a"),))))
    assert snapshots.load(call(namespace, "models")).models[0].state == state


# --- a bad publisher -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [None, 1, 2**40, 1.5, True, b"{}", [], {}, ["x"], "", "null", "1", "[]", '"x"', "{", "{}",
     '{"models": null}', '{"models": {}}', '{"models": "x"}', '{"at": 1}', "\0", "\ud800",
     "[" * 200_000, '{"models": ' + "[" * 200_000, '{"models": [' + "9" * 10_000 + "]}",
     " " * (8 * 2**20) + text_of()],
    ids=lambda said: ascii(said)[:30].strip(),
)  # fmt: skip
def test_what_is_no_snapshot_is_refused_and_the_last_one_stays(said: object) -> None:
    namespace = plugged()
    call(namespace, "publish", text_of({"name": "good"}))
    with pytest.raises(RPCError) as caught:
        call(namespace, "publish", said)
    assert caught.value.code == Faults.INCORRECT_PARAMETERS
    assert answer(namespace)["models"] == [{"name": "good"}]


@pytest.mark.parametrize("arguments", [(), ("{}", "{}")])
def test_another_number_of_arguments_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(RPCError):
        call(plugged(), "publish", *arguments)


@pytest.mark.parametrize(
    "model",
    [None, 1, "x", [], {}, {"name": None}, {"name": []}, {"name": {}}, {"name": 1}, {"name": "é"},
     {"name": "a", "state": [None]}, {"name": "\ud800"}, {"name": "__class__"}],
    ids=ascii,
)  # fmt: skip
def test_an_odd_model_does_not_hide_the_others(model: object) -> None:
    namespace = plugged(Host(a=Process()))
    call(namespace, "publish", text_of(model, {"name": "a"}))
    assert answer(namespace)["models"][1] == {"name": "a", "state": "RUNNING", "pid": 4711}


def test_at_every_depth_a_snapshot_is_refused_or_answered_or_said_to_be_too_deep() -> None:
    """What json still reads it may not write any more, a level later."""
    namespace, said = plugged(), []
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit + 10):
        deep = '{"models": [' + "[" * depth + "]" * depth + "]}"
        fault = code(namespace, "publish", deep) or code(namespace, "models")
        said.append(fault)
    assert said[0] is None
    assert said[-1] == Faults.INCORRECT_PARAMETERS
    assert set(said) <= {None, Faults.FAILED, Faults.INCORRECT_PARAMETERS}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.lists(JSON, max_size=4), st.dictionaries(st.text(), JSON, max_size=3))
def test_whatever_is_published_the_answer_survives_xml_rpc(
    models: list[object], more: dict[str, object]
) -> None:
    namespace = plugged()
    call(namespace, "publish", json.dumps({**more, "models": models}))
    assert len(answer(namespace)["models"]) == len(models)


@given(st.text() | st.binary() | JSON)
def test_whatever_is_sent_there_is_an_answer_or_a_fault(said: object) -> None:
    namespace = plugged()
    fault = code(namespace, "publish", said)
    assert fault in (None, Faults.INCORRECT_PARAMETERS)
    assert (call(namespace, "models") == "") == (fault is not None)


def test_a_large_snapshot_holds_supervisord_up_only_for_a_moment() -> None:
    """supervisord has one thread: 500 models, published and asked for."""
    namespace = plugged(Host(**{f"m{n}": Process() for n in range(500)}))
    text = snapshots.dump(Snapshot(1.0, tuple(row(name=f"m{n}") for n in range(500))))
    begun = time.process_time()
    call(namespace, "publish", text)
    call(namespace, "models")
    assert time.process_time() - begun < 0.2


# --- what is published ---------------------------------------------------------------------------


def test_the_namespace_describes_itself() -> None:
    """`system.listMethods`, `methodHelp` and `methodSignature` work on each of its methods."""
    system = SystemNamespaceRPCInterface([("synapse", plugged())])
    ours = [name for name in system.listMethods() if name.startswith("synapse.")]
    assert {"synapse.getAPIVersion", "synapse.models", "synapse.publish"} <= set(ours)
    for name in ours:
        assert system.methodHelp(name).strip()
        assert set(system.methodSignature(name)) <= {"string", "boolean", "int", "array", "struct"}
    assert system.methodSignature("synapse.publish") == ["int", "string"]


def test_the_version_is_text() -> None:
    assert call(plugged(), "getAPIVersion").count(".") == 1


@pytest.mark.parametrize("method", ["_live", "_board", "_supervisord", "__init__", "__class__"])
def test_nothing_internal_can_be_called(method: str) -> None:
    with pytest.raises(RPCError) as caught:
        call(plugged(), method)
    assert caught.value.code == Faults.UNKNOWN_METHOD


def test_options_of_the_section_do_not_stop_supervisord() -> None:
    """An exception there would mean that supervisord does not start."""
    assert call(plugin.make_rpcinterface(Host(), anything="x"), "models") == ""


# --- commands ------------------------------------------------------------------------------------


def heard(namespace: Any) -> list[tuple[str, str, str]]:
    """What the listener finds, oldest first."""
    waiting = json.loads(call(namespace, "requests"))
    return [(one["verb"], one["model"], one["other"]) for one in waiting]


def test_a_swap_reaches_the_listener_with_both_models_and_its_answer_the_client() -> None:
    namespace = plugged(Host(a=Process(), b=Process(ProcessStates.STOPPED)))
    command = call(namespace, "swap", "a", "b")
    assert heard(namespace) == [("swap", "a", "b")]
    assert call(namespace, "result", command) == ""
    call(namespace, "answer", command, True, "b serves, a is stopped")
    said = json.loads(call(namespace, "result", command))
    assert said == {"ok": True, "message": "b serves, a is stopped"}
    assert heard(namespace) == []


@pytest.mark.parametrize("verb", ["enable", "disable", "drain"])
def test_a_command_about_one_model_reaches_the_listener(verb: str) -> None:
    namespace = plugged(Host(a=Process()))
    command = call(namespace, verb, "a")
    assert heard(namespace) == [(verb, "a", "")]
    assert call(namespace, "publish", text_of()) == 1
    assert call(namespace, "beat") == 1
    call(namespace, "answer", command, False, "a: does not run")
    assert call(namespace, "beat") == 0


@pytest.mark.parametrize(("generation", "other"), [(0, ""), (1, "1"), (2**31 - 1, "2147483647")])
def test_a_rollback_reaches_the_listener_with_its_generation(generation: int, other: str) -> None:
    namespace = plugged(Host(a=Process()))
    call(namespace, "rollback", "a", generation)
    assert heard(namespace) == [("rollback", "a", other)]


@pytest.mark.parametrize("generation", [-1, 2**31, "1", "", 1.0, True, None, [1], {}])
def test_what_is_no_generation_is_refused_at_once(generation: object) -> None:
    namespace = plugged(Host(a=Process()))
    assert code(namespace, "rollback", "a", generation) == Faults.INCORRECT_PARAMETERS
    assert code(namespace, "rollback", "nobody", 0) == Faults.BAD_NAME
    assert heard(namespace) == []


def test_a_discovery_that_there_is_no_program_for_is_refused() -> None:
    assert code(plugged(Host(a=Process())), "discover") == Faults.BAD_NAME


def test_each_command_wakes_the_listener() -> None:
    woken: list[tuple[str, str]] = []
    events.subscribe(
        events.RemoteCommunicationEvent, lambda event: woken.append((event.type, event.data))
    )
    namespace = plugged(Host(a=Process(), b=Process()))
    call(namespace, "swap", "a", "b")
    call(namespace, "drain", "a")
    assert woken == [("synapse", "swap"), ("synapse", "drain")]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("a", "a"), Faults.INCORRECT_PARAMETERS),
        (("a", "nobody"), Faults.BAD_NAME), (("nobody", "a"), Faults.BAD_NAME),
        (("nobody", "nobody"), Faults.INCORRECT_PARAMETERS),
        (("a", "cat"), Faults.BAD_NAME), (("cat", "a"), Faults.BAD_NAME),
        (("a", 1), Faults.BAD_NAME), ((1, "a"), Faults.BAD_NAME),
        (("a", ["b"]), Faults.BAD_NAME), (({}, "a"), Faults.BAD_NAME),
        (("a", ""), Faults.BAD_NAME), (("a", "all"), Faults.BAD_NAME),
        (("a", "b:*"), Faults.BAD_NAME),
        (("a",), Faults.INCORRECT_PARAMETERS),
        (("a", "b", "key", "x"), Faults.INCORRECT_PARAMETERS),
    ],
    ids=repr,
)  # fmt: skip
def test_a_swap_of_what_is_no_pair_of_models_is_refused_at_once(
    arguments: tuple[object, ...], fault: int
) -> None:
    namespace = plugged(Host(a=Process(), b=Process(), cat=Process(command="/bin/cat")))
    assert code(namespace, "swap", *arguments) == fault
    assert heard(namespace) == []


@given(st.text() | st.integers() | st.none() | JSON)
def test_no_name_from_outside_breaks_a_command(name: object) -> None:
    namespace = plugged(Host(a=Process()))
    for arguments in (("drain", name), ("swap", "a", name), ("swap", name, "a")):
        assert code(namespace, *arguments) in (
            {Faults.BAD_NAME, Faults.INCORRECT_PARAMETERS} if name != "a" else {None, 2}
        )


def test_where_too_many_commands_wait_the_next_is_refused() -> None:
    names = [f"m{number}" for number in range(300)]
    namespace = plugged(Host(**{name: Process() for name in names}))
    faults = [code(namespace, "enable", name) for name in names]
    assert faults[0] is None
    assert faults[-1] == Faults.FAILED


def test_asked_again_with_its_key_a_command_is_the_same() -> None:
    namespace = plugged(Host(a=Process(), b=Process()))
    first = call(namespace, "rollback", "a", 0, "k")
    call(namespace, "answer", first, True, "done")
    assert call(namespace, "rollback", "a", 0, "k") == first
    assert code(namespace, "rollback", "a", 1, "k") == Faults.INCORRECT_PARAMETERS
    assert code(namespace, "enable", "a", "k") == Faults.INCORRECT_PARAMETERS
    assert heard(namespace) == []


@pytest.mark.parametrize("key", [None, 1, 1.5, True, [], {}, "\u00e9", "a\n", "\0", "x" * 65])
def test_what_is_no_key_is_refused(key: object) -> None:
    namespace = plugged(Host(a=Process(), b=Process()))
    for arguments in (("enable", "a"), ("disable", "a"), ("drain", "a"), ("swap", "a", "b"),
                      ("rollback", "a", 0)):  # fmt: skip
        assert code(namespace, *arguments, key) == Faults.INCORRECT_PARAMETERS
    assert heard(namespace) == []


@pytest.mark.parametrize("mood", [SupervisorStates.SHUTDOWN, SupervisorStates.RESTARTING])
def test_while_supervisord_ends_it_takes_no_commands(mood: int) -> None:
    """Nobody would carry them out; what is known can still be asked for."""
    host = Host(a=Process())
    namespace = plugged(host)
    host.options.mood = mood
    assert code(namespace, "enable", "a") == Faults.SHUTDOWN_STATE
    assert code(namespace, "models") is None


def test_the_history_in_one_answer_is_bounded() -> None:
    """supervisord has one thread."""
    namespace = plugged()
    lines = [{**LINE, "model": f"m{number}"} for number in range(900) for _ in range(3)]
    call(namespace, "record", json.dumps(lines), True)
    assert len(json.loads(call(namespace, "history", "", 2**31 - 1))) == 1000


@pytest.mark.parametrize("command", ["", "x", "e-1", 1, None, []])
def test_the_result_of_no_command_is_a_fault(command: object) -> None:
    assert code(plugged(), "result", command) == Faults.BAD_NAME


# --- one supervisord -----------------------------------------------------------------------------


def test_all_http_servers_of_a_supervisord_show_the_same() -> None:
    """supervisord makes an interface for each."""
    host = Host()
    unix, inet = plugged(host), plugged(host)
    call(unix, "publish", text_of({"name": "a"}))
    assert answer(inet)["models"] == [{"name": "a"}]
    assert len(events.callbacks) == 2  # its end, and its tick


def test_after_a_reload_nothing_old_is_shown() -> None:
    """A reload makes a new supervisord in the same interpreter."""
    call(plugged(), "publish", text_of({"name": "a"}))
    events.clear()
    assert call(plugged(), "models") == ""
    assert len(events.callbacks) == 2  # its end, and its tick


def test_what_belonged_to_an_earlier_supervisord_is_forgotten() -> None:
    host = Host()
    call(plugged(host), "publish", text_of())
    events.clear()
    earlier = weakref.ref(host)
    del host
    gc.collect()
    assert earlier() is None


# --- stopping together ---------------------------------------------------------------------------


def stop_all(host: Host) -> None:
    plugged(host)
    plugged(host)
    events.notify(events.SupervisorStoppingEvent())


def test_models_are_told_to_stop_once_all_together() -> None:
    models = {f"m{n}": Process() for n in range(5)}
    stop_all(Host(**models))
    assert [model.stops for model in models.values()] == [1] * 5


@pytest.mark.parametrize(
    ("state", "stops"),
    [(ProcessStates.STARTING, 1), (ProcessStates.RUNNING, 1), (ProcessStates.STOPPING, 0),
     (ProcessStates.STOPPED, 0), (ProcessStates.EXITED, 0), (ProcessStates.BACKOFF, 0),
     (ProcessStates.FATAL, 0), (ProcessStates.UNKNOWN, 0)],
)  # fmt: skip
def test_only_what_runs_is_stopped(state: int, stops: int) -> None:
    """A second TERM would end the drain of what stops already."""
    model = Process(state)
    stop_all(Host(a=model))
    assert model.stops == stops


@pytest.mark.parametrize("command", ["/bin/cat", "", None, "/v/bin/synapse --prefix /p listen"])
def test_other_programs_and_the_listener_are_left_to_supervisords_order(command: object) -> None:
    other = Process(command=command)
    stop_all(Host(other=other))
    assert other.stops == 0


def test_a_stop_that_fails_is_logged_and_holds_back_no_other() -> None:
    class Broken(Process):
        def stop(self) -> None:
            raise RuntimeError("another subscriber failed")

    host = Host(a=Broken(), b=Process())
    stop_all(host)
    assert host.process_groups["b"].processes["b"].stops == 1
    assert "another subscriber failed" in host.logged[0]


# --- no I/O --------------------------------------------------------------------------------------

_WATCHED = """
import json, sys, time
from types import SimpleNamespace
from supervisor import events
from supervisor_synapse.plugin import rpc

done = []
def hook(event, arguments):
    if watching and event.split(".")[0] in ("open", "socket", "subprocess", "os", "time", "import"):
        done.append(event)
watching = False
sys.addaudithook(hook)
host = type("Host", (), {})()
host.process_groups = {}
host.options = SimpleNamespace(get_signal=lambda: None)
model = {"name": "a", "reason": "\\u00e9"}
def use():
    namespace = rpc.make_rpcinterface(host)
    namespace.models()
    namespace.publish(json.dumps({"at": 1, "models": [model] * 100}))
    namespace.models()
    events.notify(events.SupervisorStoppingEvent())
watching = True
use()
watching = False
print(json.dumps(done))
open("/dev/null").close()
"""


def test_it_opens_nothing_starts_nothing_imports_nothing() -> None:
    """Watched by the interpreter itself, from the factory to the end."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_it_loads_nothing_heavy_into_supervisord() -> None:
    """supervisord pays for each module in memory, for as long as it lives."""
    code = "import sys, supervisor_synapse.plugin.rpc; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "rich", "requests", "gguf", "numpy", "huggingface_hub"} & set(
        done.stdout.split()
    )


# --- devices and history -------------------------------------------------------------------------

LINE = {"when": 1.0, "model": "tiny-q4_k_m", "from": None, "to": "pending", "reason": "enabled"}


def test_devices_are_empty_before_the_listener_spoke_and_then_what_it_said() -> None:
    namespace = plugged()
    assert call(namespace, "devices") == ""
    device = {"name": "CPU", "total": 2**40, "models": []}
    call(namespace, "publish", json.dumps({"at": 1.0, "models": [], "devices": [device]}))
    found = json.loads(call(namespace, "devices"))
    assert found["devices"] == [device]
    assert 0 <= found["age_seconds"] < 5


def test_recorded_lines_come_back_as_text() -> None:
    namespace = plugged()
    assert call(namespace, "record", json.dumps([LINE]), True) is True
    assert json.loads(call(namespace, "history", "", 10)) == [{**LINE, "evidence": ""}]
    assert json.loads(call(namespace, "history", "tiny-q4_k_m", 1)) == [{**LINE, "evidence": ""}]


def test_the_history_of_a_model_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RPCError) as caught:
        call(plugged(), "history", "nobody", 10)
    assert caught.value.code == Faults.BAD_NAME


@pytest.mark.parametrize("most", [0, -1, True, "1", 1.5])
def test_a_number_of_lines_that_is_none_is_refused(most: object) -> None:
    with pytest.raises(RPCError) as caught:
        call(plugged(), "history", "", most)
    assert caught.value.code == Faults.INCORRECT_PARAMETERS


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", '[{"model": 1}]', "[" * 100_000, 7])
def test_what_is_no_list_of_lines_is_refused(text: object) -> None:
    with pytest.raises(RPCError) as caught:
        call(plugged(), "record", text, False)
    assert caught.value.code == Faults.INCORRECT_PARAMETERS
