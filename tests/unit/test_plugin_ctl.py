"""`supervisorctl models`: supervisor's own controller, and a server that answers by script."""

from __future__ import annotations

import io
import json
import shutil
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

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.model import Row, Snapshot
from tests.unit import scripted
from tests.unit.builders import row
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

    def type(self, line: str) -> Said:
        """Enter a line without any supervisord."""
        options = ClientOptions()
        options.realize(["-c", str(self._conf), *line.split()], doc="")
        out = io.StringIO()
        controller = Controller(options, stdout=out)
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
