"""`supervisorctl models`: supervisor's own controller, and a server that answers by script."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ClientOptions
from supervisor.supervisorctl import Controller

from supervisor_synapse.adapters import history, snapshots
from supervisor_synapse.core.model import DeviceRow, Holding, Phase, Row, Snapshot
from supervisor_synapse.plugin import ctl_commands
from tests.unit import scripted
from tests.unit.builders import GIB, row
from tests.unit.scripted import Script

CONF = """[supervisorctl]
serverurl=unix://{socket}
[ctlplugin:synapse]
supervisor.ctl_factory=supervisor_synapse.plugin.ctl:make_controllerplugin
"""
COMMANDS = (
    "models", "devices", "history", "enable", "disable", "drain", "swap", "rollback", "discover",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str


class Terminal:
    """A supervisorctl whose supervisord answers by script."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.socket = folder / "s"
        self._conf = folder / "supervisord.conf"
        self._conf.write_text(CONF.format(socket=self.socket))
        self._capture = capture

    def controller(self, line: str = "help", out: io.StringIO | None = None) -> Any:
        """supervisorctl as it is begun with this line."""
        options = ClientOptions()
        options.realize(["-c", str(self._conf), *line.split()], doc="")
        return Controller(options, stdout=out or io.StringIO())

    def type(self, line: str) -> Said:
        """Enter a line without any supervisord."""
        out = io.StringIO()
        controller = self.controller(line, out)
        self._capture.readouterr()
        controller.onecmd(line)
        captured = self._capture.readouterr()
        return Said(controller.exitstatus, out.getvalue() + captured.out, captured.err)

    def ask(self, line: str, script: Script) -> Said:
        """Enter a line with a supervisord that answers so."""
        with scripted.on_unix_socket(self.socket, script):
            try:
                return self.type(line)
            finally:
                self.socket.unlink()

    def show(self, line: str, *rows: Row, age_seconds: float = 1.0) -> Said:
        """Enter a line with a supervisord that knows these models."""
        return self.ask(line, published(*rows, age_seconds=age_seconds))


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    folder = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    yield Terminal(folder, capsys)
    shutil.rmtree(folder)


def answer(value: Any) -> Script:
    return scripted.http(
        200, xmlrpc.client.dumps((value,), methodresponse=True).encode(), "Content-Type: text/xml"
    )


def fault(code: int, text: str) -> Script:
    body = xmlrpc.client.dumps(xmlrpc.client.Fault(code, text)).encode()
    return scripted.http(200, body, "Content-Type: text/xml")


def published(*rows: Row, age_seconds: float = 1.0) -> Script:
    value = json.loads(snapshots.dump(Snapshot(1.0, rows))) | {"age_seconds": age_seconds}
    return answer(json.dumps(value))


# --- models that are there -----------------------------------------------------------------------


def test_models_are_shown_in_a_table(ctl: Terminal) -> None:
    said = ctl.show("models", row(), row(name="other", port=8101))
    assert said.status == 0
    assert said.err == ""
    head, first, second = said.out.splitlines()
    assert head.split()[:4] == ["NAME", "TIER", "PHASE", "PORT"]
    assert first.split()[:4] == ["tiny-q4_k_m", "FAST", "ready", "8100"]
    assert second.split()[:4] == ["other", "FAST", "ready", "8101"]


def test_models_are_given_as_json(ctl: Terminal) -> None:
    said = ctl.show("models --json", row())
    assert (said.status, said.err) == (0, "")
    assert json.loads(said.out) == snapshots.public([row()])


@pytest.mark.parametrize("line", ["models b --json", "models --json b", "models --json b b"])
def test_one_model_can_be_asked_for(ctl: Terminal, line: str) -> None:
    said = ctl.show(line, row(name="a"), row(name="b"))
    assert said.status == 0
    assert [model["name"] for model in json.loads(said.out)] == ["b"]


def test_all_models_can_be_asked_for_by_that_word(ctl: Terminal) -> None:
    """As in `status all`."""
    said = ctl.show("models all", row(name="a"), row(name="b"))
    assert (said.status, len(said.out.splitlines())) == (0, 3)


def test_several_models_can_be_asked_for(ctl: Terminal) -> None:
    said = ctl.show("models a c", row(name="a"), row(name="b"), row(name="c"))
    assert [line.split()[0] for line in said.out.splitlines()] == ["NAME", "a", "c"]


def test_a_model_that_there_is_none_of_is_a_failure_and_the_others_are_shown(ctl: Terminal) -> None:
    said = ctl.show("models a nobody", row(name="a"))
    assert said.status == 1
    assert "nobody: ERROR (no such model)" in said.out
    assert [line.split()[0] for line in said.out.splitlines()][:2] == ["NAME", "a"]


def test_json_stays_json_where_a_model_is_missing(ctl: Terminal) -> None:
    said = ctl.show("models --json a nobody", row(name="a"))
    assert said.status == 1
    assert [model["name"] for model in json.loads(said.out)] == ["a"]
    assert "nobody" in said.err


def test_where_no_model_is_it_says_what_finds_some(ctl: Terminal) -> None:
    said = ctl.show("models")
    assert said.status == 0
    assert "synapse discover" in said.out
    assert json.loads(ctl.show("models --json").out) == []


def test_what_is_said_outside_cannot_steer_the_terminal(ctl: Terminal) -> None:
    said = ctl.show("models", row(reason="a\x1b[2Jb\nc\udcff"))
    assert len(said.out.splitlines()) == 2
    assert said.out.rstrip("\n").replace("\n", "").isprintable()


# --- a snapshot that is missing, old or broken ---------------------------------------------------


def test_a_listener_that_has_not_reported_is_named(ctl: Terminal) -> None:
    said = ctl.ask("models", answer(""))
    assert "has not reported" in said.out
    assert "no such model" not in said.out


def test_json_is_an_empty_list_and_why_is_said_beside(ctl: Terminal) -> None:
    said = ctl.ask("models --json", answer(""))
    assert json.loads(said.out) == []
    assert "has not reported" in said.err


def test_asking_for_one_model_before_any_report_is_a_failure(ctl: Terminal) -> None:
    """Whether there is such a model, nobody knows yet."""
    said = ctl.ask("models a", answer(""))
    assert said.status == 1
    assert "has not reported" in said.out


@pytest.mark.parametrize(("age_seconds", "stale"), [(0.0, False), (6.0, False), (42.0, True)])
def test_an_old_snapshot_is_said_to_be_old(ctl: Terminal, age_seconds: float, stale: bool) -> None:
    """A healthy listener reports every 5 s."""
    table = ctl.show("models", row(), age_seconds=age_seconds)
    as_json = ctl.show("models --json", row(), age_seconds=age_seconds)
    assert ("last reported 42 s ago" in table.out) == stale
    assert ("last reported 42 s ago" in as_json.err) == stale
    assert len(json.loads(as_json.out)) == 1
    assert (table.status, as_json.status) == (0, 0)


@pytest.mark.parametrize("text", ["x", "{}", "[]", '{"at": 1, "models": [1]}', "[" * 100_000],
                         ids=lambda text: text[:20])  # fmt: skip
def test_a_snapshot_that_is_none_is_a_failure(ctl: Terminal, text: str) -> None:
    said = ctl.ask("models", answer(text))
    assert said.status == 1
    assert said.out.startswith("cannot read the listener's snapshot")
    assert len(said.out.splitlines()) == 1


# --- a supervisord that is not there, or answers otherwise ---------------------------------------


def test_a_supervisord_that_is_down_is_a_failure_that_names_its_address(ctl: Terminal) -> None:
    said = ctl.type("models")
    assert said.status == 1
    assert str(ctl.socket) in said.out
    assert "No such file" in said.out


def test_a_socket_left_behind_is_a_failure(ctl: Terminal) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(ctl.socket))
    said = ctl.type("models --json")
    assert said.status == 1
    assert said.out == ""
    assert "refused" in said.err


def test_a_supervisord_without_the_plugin_is_told_from_one_that_is_down(ctl: Terminal) -> None:
    said = ctl.ask("models", fault(1, "UNKNOWN_METHOD"))
    assert said.status == 1
    assert "[rpcinterface:synapse]" in said.out


def test_any_other_fault_is_a_failure_in_its_words(ctl: Terminal) -> None:
    said = ctl.ask("models", fault(6, "SHUTDOWN_STATE"))
    assert (said.status, said.out) == (1, "SHUTDOWN_STATE\n")


@pytest.mark.parametrize(
    "script",
    [scripted.raw(b""), scripted.raw(b"\0\xff\n"), scripted.raw(b"SSH-2.0-OpenSSH_9\r\n"),
     scripted.http(500), scripted.http(200, b"not XML"), scripted.http(200, b""),
     scripted.http(200, b"<methodResponse></methodResponse>", "Content-Type: text/xml"),
     scripted.http(200, b"not XML", "Content-Type: text/xml"),
     scripted.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 500\r\n\r\n<")],
    ids=["nothing", "noise", "another protocol", "500", "no type", "empty", "no answer", "no XML",
         "cut"],
)  # fmt: skip
@pytest.mark.parametrize("line", ["models", "models --json"])
def test_an_answer_that_is_none_is_a_failure_in_a_line(
    ctl: Terminal, script: Script, line: str
) -> None:
    said = ctl.ask(line, script)
    assert said.status == 1
    text = said.err if "--json" in line else said.out
    assert len(text.splitlines()) == 1
    assert str(ctl.socket) in text
    assert ".py" not in text


def test_a_password_that_is_missing_is_left_to_supervisorctl(ctl: Terminal) -> None:
    """It asks for one where somebody sits before it."""
    said = ctl.ask("models", scripted.http(401))
    assert said.status == 1
    assert "requires authentication" in said.out


# --- commands that are given to the listener -----------------------------------------------------


def method_of(request: bytes) -> str:
    """`synapse.swap` …"""
    _, method = xmlrpc.client.loads(request.partition(b"\r\n\r\n")[2])
    assert method is not None
    return method


def arguments_of(request: bytes) -> tuple[Any, ...]:
    arguments, _ = xmlrpc.client.loads(request.partition(b"\r\n\r\n")[2])
    return arguments


def by_method(**scripts: Script | list[Script]) -> Script:
    """Choose by the method; of a list the next one each time, and the last for ever."""

    def script(connection: socket.socket, request: bytes) -> None:
        chosen = scripts[method_of(request).removeprefix("synapse.")]
        if isinstance(chosen, list):
            chosen = chosen.pop(0) if len(chosen) > 1 else chosen[0]
        asked.append(request)
        chosen(connection, request)

    asked: list[bytes] = []
    script.asked = asked  # type: ignore[attr-defined]
    return script


def result(ok: bool, message: str) -> Script:
    return answer(json.dumps({"ok": ok, "message": message}))


def test_swap_waits_until_all_is_done_and_says_what_was_reached(ctl: Terminal) -> None:
    done = result(True, "b serves, a is stopped")
    script = by_method(swap=answer("e-1"), result=[answer(""), answer(""), done])
    said = ctl.ask("swap a b", script)
    assert said == Said(0, "b serves, a is stopped\n", "")
    asked = script.asked  # type: ignore[attr-defined]
    assert [method_of(request) for request in asked] == ["synapse.swap"] + ["synapse.result"] * 3
    assert [arguments_of(request) for request in asked] == [("a", "b")] + [("e-1",)] * 3


def test_a_swap_that_failed_is_a_failure_in_the_listeners_words(ctl: Terminal) -> None:
    words = "b did not become ready (out-of-memory); a is back"
    said = ctl.ask("swap a b", by_method(swap=answer("e-1"), result=result(False, words)))
    assert said == Said(1, words + "\n", "")


def test_a_swap_that_takes_its_time_says_how_far_it_is(
    ctl: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase once, and nothing of other models."""
    monkeypatch.setattr(ctl_commands, "_NEWS_SECONDS", 0.0)
    looks = [
        published(row(name="b", phase=phase, reason=why), row(name="a"), row(name="c"))
        for phase, why in ((Phase.PENDING, "enabled"), (Phase.LOADING, "1"), (Phase.LOADING, "2"))
    ]
    done = result(True, "b serves, a is stopped")
    script = by_method(
        swap=answer("e-1"), models=[*looks, fault(6, "x"), answer("x"), answer("")],
        result=[answer("")] * 7 + [done],
    )  # fmt: skip
    said = ctl.ask("swap a b", script)
    assert said.status == 0
    assert said.out.splitlines() == [
        "a: ready (answers 1.2 s after its start)", "b: pending (enabled)", "b: loading (1)",
        "b serves, a is stopped",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["swap", "swap a", "swap a b c"])
def test_a_swap_takes_two_names(ctl: Terminal, line: str) -> None:
    """Said before anything is asked."""
    said = ctl.type(line)
    assert said.status == 2
    assert "swap <old> <new>" in said.out


def test_a_swap_with_a_model_that_there_is_none_of_is_a_failure(ctl: Terminal) -> None:
    said = ctl.ask("swap a nobody", by_method(swap=fault(10, "BAD_NAME: there is no such model")))
    assert said == Said(1, "swap a nobody: ERROR (no such model)\n", "")


def test_a_swap_with_itself_is_a_failure_in_supervisords_words(ctl: Terminal) -> None:
    words = "INCORRECT_PARAMETERS: a model cannot take its own place"
    said = ctl.ask("swap a a", by_method(swap=fault(2, words)))
    assert said == Said(1, words + "\n", "")


def test_a_supervisord_that_was_restarted_meanwhile_is_not_taken_for_a_missing_model(
    ctl: Terminal,
) -> None:
    """The new one carries on with the swap, and knows nothing of who asked."""
    lost = fault(10, "BAD_NAME: there is no such command")
    said = ctl.ask("swap a b", by_method(swap=answer("e-1"), result=[answer(""), lost]))
    assert said.status == 1
    assert "supervisord was restarted" in said.out
    assert "no such model" not in said.out


@pytest.mark.parametrize("verb", ["enable", "disable", "drain"])
def test_each_model_of_a_command_is_answered(ctl: Terminal, verb: str) -> None:
    script = by_method(
        **{verb: [answer("e-1"), fault(10, "BAD_NAME"), answer("e-2")]},
        result=[result(True, "a: done"), result(False, "c: does not run")],
    )
    said = ctl.ask(f"{verb} a b c", script)
    assert said.out.splitlines() == ["a: done", "b: ERROR (no such model)", "c: does not run"]
    assert said.status == 1


@pytest.mark.parametrize("verb", ["enable", "disable", "drain"])
def test_a_command_without_a_name_is_bad_usage(ctl: Terminal, verb: str) -> None:
    said = ctl.type(verb)
    assert said.status == 2
    assert f"{verb} <name> <name>" in said.out


@pytest.mark.parametrize("text", ["x", "[]", "{}", '{"ok": true}', "1", "null"])
def test_an_answer_that_cannot_be_read_is_a_failure(ctl: Terminal, text: str) -> None:
    said = ctl.ask("drain a", by_method(drain=answer("e-1"), result=answer(text)))
    assert said == Said(1, "a: ERROR (cannot read the answer)\n", "")


def test_what_the_listener_answers_cannot_steer_the_terminal(ctl: Terminal) -> None:
    script = by_method(drain=answer("e-1"), result=result(True, "a\x1b[2J\nb"))
    assert ctl.ask("drain a", script).out == "a [2J b\n"


@pytest.mark.parametrize("verb", COMMANDS)
def test_each_command_is_listed_and_explained(ctl: Terminal, verb: str) -> None:
    assert verb in ctl.type("help").out.split()
    lines = ctl.type(f"help {verb}").out.splitlines()
    assert all(line.replace("\t", " ").startswith(f"{verb} ") for line in lines), lines
    assert all(len(line.expandtabs()) <= 80 for line in lines)


@pytest.mark.parametrize("command", ["start", "stop", "models", "swap", "help"])
def test_help_on_a_command_ends_with_no_complaint_of_another_plugin(
    ctl: Terminal, command: str
) -> None:
    said = ctl.type(f"help {command}").out
    assert f"{command} " in said.replace("\t", " ")
    assert "***" not in said


def test_help_on_what_no_plugin_knows_says_so_once(ctl: Terminal) -> None:
    assert ctl.type("help nonsense").out == "*** No help on nonsense\n"


def test_every_command_is_listed_once(ctl: Terminal) -> None:
    words = ctl.type("help").out.split()
    assert [words.count(word) for word in ("models", "drain", "start", "status")] == [1] * 4
    assert words[-9:] == sorted(COMMANDS)


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["models -x", "models --jsno", "models a --yaml", "models -h",
                                  "models --json=1", "models -"])  # fmt: skip
def test_a_flag_that_there_is_none_of_is_bad_usage(ctl: Terminal, line: str) -> None:
    """Said before anything is asked: no supervisord is needed."""
    said = ctl.type(line)
    assert said.status == 2
    assert line.split()[-1] in said.out
    assert "models --json" in said.out


def test_help_tells_both_forms(ctl: Terminal) -> None:
    said = ctl.type("help models")
    assert said.status == 0
    assert "models --json" in said.out
    assert "<name>" in said.out


def test_models_is_listed_among_the_commands(ctl: Terminal) -> None:
    assert "models" in ctl.type("help").out.split()


# --- rollback ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "generation"), [("rollback a", 0), ("rollback a 17", 17)])
def test_a_rollback_says_what_was_reached(ctl: Terminal, line: str, generation: int) -> None:
    done = result(True, "a serves as it did in generation 17")
    script = by_method(rollback=answer("e-1"), result=[answer(""), done])
    assert ctl.ask(line, script) == Said(0, "a serves as it did in generation 17\n", "")
    assert arguments_of(script.asked[0]) == ("a", generation)  # type: ignore[attr-defined]


def test_a_rollback_that_failed_is_a_failure_in_the_listeners_words(ctl: Terminal) -> None:
    script = by_method(rollback=answer("e-1"), result=result(False, "a was never well"))
    assert ctl.ask("rollback a", script) == Said(1, "a was never well\n", "")


@pytest.mark.parametrize(
    "line",
    ["rollback", "rollback a 1 2", "rollback a b", "rollback a 0", "rollback a -1",
     "rollback a 1.5", "rollback a \u0661", "rollback a 2147483648", f"rollback a {'9' * 5000}"],
    ids=lambda line: line[:24],
)  # fmt: skip
def test_a_rollback_takes_a_model_and_the_number_of_a_generation(ctl: Terminal, line: str) -> None:
    """Said before anything is asked."""
    said = ctl.type(line)
    assert said.status == 2
    assert "rollback <name> <generation>" in said.out


def test_a_rollback_of_no_model_is_a_failure(ctl: Terminal) -> None:
    said = ctl.ask("rollback nobody", by_method(rollback=fault(10, "BAD_NAME")))
    assert said == Said(1, "nobody: ERROR (no such model)\n", "")


# --- discover ------------------------------------------------------------------------------------


class Discovery:
    """A supervisord with a program `discover` whose log grows as it is looked at."""

    def __init__(self, *said: bytes, before: bytes = b"old\n", **end: object) -> None:
        self._said, self._log = list(said), before
        self._end = {"state": 100, "exitstatus": 0, "spawnerr": "", "statename": "EXITED"} | end

    def __call__(self, connection: socket.socket, request: bytes) -> None:
        answers: dict[str, Callable[..., Script]] = {
            "supervisor.tailProcessStdoutLog": self.size,
            "supervisor.startProcess": self.start,
            "supervisor.getProcessInfo": self.look,
            "supervisor.readProcessStdoutLog": self.read,
        }
        answers[method_of(request)](*arguments_of(request))(connection, request)

    def size(self, *_: object) -> Script:
        return answer(["", len(self._log), True])

    def start(self, name: str, wait: bool) -> Script:
        assert (name, wait) == ("discover", False)
        return answer(True)

    def look(self, _: str) -> Script:
        if not self._said:
            return answer(self._end)
        self._log += self._said.pop(0)
        return answer({"state": 20})

    def read(self, _: str, offset: int, length: int) -> Script:
        try:
            return answer(self._log[offset : offset + length].decode())
        except UnicodeDecodeError:
            return scripted.http(500)


def test_a_discovery_is_shown_line_by_line_and_none_of_an_earlier_run(ctl: Terminal) -> None:
    said = ctl.ask("discover", Discovery(b"one\ntw", b"o\n", b"no newline"))
    assert said == Said(0, "one\ntwo\nno newline\n", "")


def test_a_character_that_has_come_in_half_is_waited_for(ctl: Terminal) -> None:
    said = ctl.ask("discover", Discovery(b"a \xf0\x9f", b"\x92\xa9 b\n"))
    assert said == Said(0, "a \N{PILE OF POO} b\n", "")


def test_a_log_longer_than_a_part_is_shown_whole(ctl: Terminal) -> None:
    lines = [f"{number} \u00e9" for number in range(20_000)]
    said = ctl.ask("discover", Discovery("\n".join(lines).encode()))
    assert said.out.splitlines() == lines


def test_what_a_discovery_says_cannot_steer_the_terminal(ctl: Terminal) -> None:
    assert ctl.ask("discover", Discovery("a\u0085\u202eb\n".encode())).out == "a  b\n"


@pytest.mark.parametrize(
    ("end", "why"),
    [({"exitstatus": 2}, "exit status 2"), ({"state": 0}, "it was stopped"),
     ({"state": 200, "spawnerr": "cannot fork"}, "cannot fork"),
     ({"state": 1000, "statename": "UNKNOWN"}, "UNKNOWN")],
)  # fmt: skip
def test_a_discovery_that_failed_is_a_failure(
    ctl: Terminal, end: dict[str, object], why: str
) -> None:
    said = ctl.ask("discover", Discovery(b"cannot do it\n", **end))
    assert said == Said(1, f"cannot do it\ndiscover: ERROR ({why})\n", "")


def test_a_log_that_is_cut_meanwhile_is_followed_from_its_new_beginning(ctl: Terminal) -> None:
    class Rotated(Discovery):
        def look(self, name: str) -> Script:
            if self._said[:1] == [b"second\n"]:
                self._log = b""
            return super().look(name)

    assert ctl.ask("discover", Rotated(b"first\n", b"second\n")).out == "first\nsecond\n"


def test_a_discovery_takes_no_arguments(ctl: Terminal) -> None:
    said = ctl.type("discover now")
    assert said.status == 2
    assert "accepts no arguments" in said.out


def test_without_the_program_it_says_what_to_do(ctl: Terminal) -> None:
    said = ctl.ask("discover", fault(10, "BAD_NAME: discover"))
    assert said.status == 1
    assert "run `synapse discover` in a shell" in said.out
    assert "[program:discover]" in said.out


def test_without_a_supervisord_it_says_so_once(ctl: Terminal) -> None:
    said = ctl.type("discover")
    assert said.status == 1
    assert said.out.count("does it run?") == 1


# --- devices -------------------------------------------------------------------------------------

CARD = DeviceRow(
    "CUDA0", "NVIDIA H100", 80 * GIB, 30 * GIB, GIB, 27 * GIB, 10 * GIB,
    (Holding("a", 40 * GIB, 42 * GIB),),
)  # fmt: skip


def known(*devices: DeviceRow, age_seconds: float = 1.0) -> Script:
    value = json.loads(snapshots.dump(Snapshot(1.0, (), devices)))
    return answer(json.dumps(value | {"age_seconds": age_seconds}))


def test_devices_are_shown_with_a_bar_and_who_has_what(ctl: Terminal) -> None:
    said = ctl.ask("devices", known(CARD))
    assert (said.status, said.err) == (0, "")
    bar, description, *legend = said.out.splitlines()
    assert bar.startswith("CUDA0  [###")
    assert bar.endswith("80.0 GiB, 27.0 GiB left")
    assert description.strip() == "NVIDIA H100"
    assert [line.split()[:2] for line in legend] == [
        ["#=", "a"], ["x", "others"], [".", "free"], ["|", "reserve"],
    ]  # fmt: skip


def test_devices_are_given_as_json(ctl: Terminal) -> None:
    said = ctl.ask("devices --json", known(CARD))
    assert (said.status, said.err) == (0, "")
    assert json.loads(said.out) == snapshots.public_devices([CARD])


def test_an_old_snapshot_of_devices_is_said_to_be_old(ctl: Terminal) -> None:
    assert "last reported 42 s ago" in ctl.ask("devices", known(CARD, age_seconds=42)).out
    said = ctl.ask("devices --json", known(CARD, age_seconds=42))
    assert "last reported 42 s ago" in said.err
    assert len(json.loads(said.out)) == 1


def test_before_any_report_no_devices_are_known(ctl: Terminal) -> None:
    said = ctl.ask("devices", answer(""))
    assert (said.status, said.out.count("has not reported")) == (0, 1)
    assert json.loads(ctl.ask("devices --json", answer("")).out) == []
    assert ctl.ask("devices", known()).out == "No devices are known yet.\n"


def test_devices_that_are_none_are_a_failure(ctl: Terminal) -> None:
    text = json.dumps({"at": 1, "models": [], "devices": [1]})
    said = ctl.ask("devices", answer(text))
    assert said.status == 1
    assert said.out.startswith("cannot read the listener's snapshot")


@pytest.mark.parametrize("line", ["devices a", "devices -x", "devices --json a"])
def test_devices_takes_no_names(ctl: Terminal, line: str) -> None:
    said = ctl.type(line)
    assert said.status == 2
    assert "devices --json" in said.out


# --- history -------------------------------------------------------------------------------------

FAILURE = history.Line(
    2.0, "a", "loading", "failed", "bad-argument, exit status 1", 1, 2, "bad-argument",
    "error: invalid argument: --fast",
)  # fmt: skip
LINES = [
    history.public(history.Line(1.0, "a", None, "pending", "enabled")),
    history.public(FAILURE),
]


def test_the_history_is_shown_with_reasons_and_evidence(ctl: Terminal) -> None:
    script = by_method(history=answer(json.dumps(LINES)))
    said = ctl.ask("history", script)
    assert said.status == 0
    head, first, second = said.out.splitlines()
    assert head.split() == ["WHEN", "MODEL", "CHANGE", "CLASS", "WHY"]
    assert " a      - -> pending  " in first
    assert "loading -> failed  bad-argument  bad-argument, exit status 1: error: inv" in second
    assert arguments_of(script.asked[0]) == ("", 20)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "asked"),
    [("history a", ("a", 20)), ("history a -n 5", ("a", 5)), ("history -n5 a", ("a", 5)),
     ("history -n 1000 --json", ("", 1000)), ("history --json a", ("a", 20))],
)  # fmt: skip
def test_the_history_of_one_model_and_so_many_lines(
    ctl: Terminal, line: str, asked: tuple[str, int]
) -> None:
    script = by_method(history=answer(json.dumps(LINES)))
    said = ctl.ask(line, script)
    assert said.status == 0
    assert arguments_of(script.asked[0]) == asked  # type: ignore[attr-defined]
    if "--json" in line:
        assert json.loads(said.out) == LINES


def test_a_history_without_lines_says_so(ctl: Terminal) -> None:
    assert ctl.ask("history", answer("[]")) == Said(0, "No transitions yet.\n", "")
    assert json.loads(ctl.ask("history --json", answer("[]")).out) == []


def test_the_history_of_no_model_is_a_failure(ctl: Terminal) -> None:
    said = ctl.ask("history nobody --json", fault(10, "BAD_NAME"))
    assert said == Said(1, "", "nobody: ERROR (no such model)\n")


@pytest.mark.parametrize(
    "text", ["", "x", "{}", "1", "[1]", "[{}]", '[{"when": "x"}]', "[" * 100_000],
    ids=lambda text: text[:16],
)  # fmt: skip
def test_a_history_that_is_none_is_a_failure(ctl: Terminal, text: str) -> None:
    said = ctl.ask("history", answer(text))
    assert said.status == (0 if text == "{}" else 1)
    assert len(said.out.splitlines()) == 1


def test_what_a_history_holds_cannot_steer_the_terminal(ctl: Terminal) -> None:
    hostile = dict.fromkeys(("model", "from", "to", "reason", "evidence"), "a\x1b[2Jb\nc\u202e")
    said = ctl.ask("history", answer(json.dumps([{**hostile, "when": 1e300, "class": "\x07"}])))
    assert len(said.out.splitlines()) == 2
    assert all(line.isprintable() for line in said.out.splitlines())


@pytest.mark.parametrize(
    "line",
    ["history a b", "history -n", "history -n x", "history -n 0", "history -n -1", "history -x",
     "history -n 1001", "history -n 1e3", "history -n --json"],
)  # fmt: skip
def test_a_history_takes_a_name_and_a_number(ctl: Terminal, line: str) -> None:
    said = ctl.type(line)
    assert said.status == 2
    assert "history -n <number>" in said.out


# --- all models, and a listener that is busy or away -------------------------------------------


def test_all_stands_for_every_model_there_is(ctl: Terminal) -> None:
    script = by_method(
        models=published(row(name="a"), row(name="b")), enable=[answer("e-1"), answer("e-2")],
        result=[result(True, "a: enabled"), result(True, "b: enabled")],
    )  # fmt: skip
    assert ctl.ask("enable all", script) == Said(0, "a: enabled\nb: enabled\n", "")


def test_all_of_no_models_is_a_failure(ctl: Terminal) -> None:
    assert ctl.ask("disable all", by_method(models=published())).status == 1
    said = ctl.ask("disable all", by_method(models=answer("")))
    assert (said.status, "has not reported" in said.out) == (1, True)


@pytest.mark.parametrize(("age_seconds", "why"), [(1.0, "comes first"), (42.0, "does not answer")])
def test_a_command_that_waits_is_told_from_a_listener_that_is_away(
    ctl: Terminal, monkeypatch: pytest.MonkeyPatch, age_seconds: float, why: str
) -> None:
    monkeypatch.setattr(ctl_commands, "_ANSWER_SECONDS", 0.1)
    script = by_method(
        enable=[answer("e-1"), answer("e-2")], result=answer(""),
        models=published(age_seconds=age_seconds),
    )  # fmt: skip
    said = ctl.ask("enable a b", script)
    assert said.status == 1
    assert [line.split(":")[0] for line in said.out.splitlines()] == ["a", "b"]
    assert said.out.count(why) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [("enable a", "it goes on"), ("swap a b", "it goes on"), ("rollback a", "it goes on"),
     ("discover", "`status discover`"), ("models", ""), ("history", "")],
)  # fmt: skip
def test_ctrl_c_ends_a_command_with_a_failure_and_no_traceback(
    ctl: Terminal, line: str, said: str
) -> None:
    def press(connection: socket.socket, request: bytes) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        connection.recv(1)

    done = ctl.ask(line, press)
    assert done.status == 1
    assert said in done.out
    assert len(done.out.splitlines()) == (1 if said else 0)


# --- the Tab key ---------------------------------------------------------------------------------


def matches(ctl: Terminal, line: str, script: Script | None = None) -> list[str]:
    """What Tab offers at the end of the line."""
    text = "" if line.endswith(" ") or not line else line.split()[-1]
    with contextlib.ExitStack() as stack:
        if script is not None:
            stack.enter_context(scripted.on_unix_socket(ctl.socket, script))
            stack.callback(ctl.socket.unlink)
        complete = ctl.controller().complete
        found = []
        while (match := complete(text, len(found), line)) is not None:
            found.append(match)
            assert len(found) < 100
        return found


ABC = published(row(name="a1"), row(name="a2"), row(name="b"))


@pytest.mark.parametrize(
    ("line", "offered"),
    [("enable ", ["a1", "a2", "b", "all"]), ("enable a", ["a1", "a2", "all"]),
     ("enable a1 ", ["a2", "b", "all"]), ("disable a1 b ", ["a2", "all"]), ("drain al", ["all"]),
     ("swap ", ["a1", "a2", "b"]), ("swap a1 ", ["a2", "b"]), ("swap a1 a", ["a2"]),
     ("swap a1 b ", []), ("rollback b", ["b"]), ("rollback b ", []),
     ("models --", ["--json"]), ("models --json ", ["a1", "a2", "b"]), ("devices ", ["--json"]),
     ("history ", ["a1", "a2", "b", "-n", "--json"]), ("history -n 5 b", ["b"]),
     ("history b ", ["-n", "--json"]), ("discover ", []), ("enable x", []), ("enable \u00e9", [])],
)  # fmt: skip
def test_tab_offers_what_may_stand_there(ctl: Terminal, line: str, offered: list[str]) -> None:
    assert matches(ctl, line, ABC) == [f"{word} " for word in offered]


@pytest.mark.parametrize("line", ["", "st", "help ", "stop ", "nonsense ", "start a", "help mod"])
def test_what_is_not_ours_is_completed_as_without_us(ctl: Terminal, line: str) -> None:
    text = "" if line.endswith(" ") or not line else line.split()[-1]
    controller = ctl.controller()
    controller._complete_info = [{"name": "abc", "group": "abc"}, {"name": "x", "group": "g"}]
    for state in range(30):
        own = Controller.complete(controller, text, state, line)
        assert controller.complete(text, state, line) == own


@pytest.mark.parametrize("script", [None, scripted.http(401), scripted.raw(b"x"), answer("x"),
                                    answer(""), fault(1, "UNKNOWN_METHOD")])  # fmt: skip
def test_where_no_names_are_to_be_had_tab_says_nothing(
    ctl: Terminal, script: Script | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matches(ctl, "enable ", script) == ["all "]
    assert capsys.readouterr() == ("", "")


def test_one_press_of_tab_asks_once(ctl: Terminal) -> None:
    script = by_method(models=ABC)
    assert len(matches(ctl, "enable ", script)) == 4
    assert len(script.asked) == 1  # type: ignore[attr-defined]
