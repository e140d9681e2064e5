"""supervisorctl as a person has it before them: in a terminal, with a real fleet behind it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from tests.conftest import Engine
from tests.integration.harness import BIN, Deployment, deployed, wait_until
from tests.ports import free_ports

pytestmark = pytest.mark.usefixtures("llama_server")

LOGIN = ("synapse", "secret")
PROMPT = "synapse> "
SECONDS = 30.0
SETTINGS = """
enable = none
memory_reserve = 64MiB
[model:one]
enabled = true
[model:three]
args = --no-such-flag
"""
_INET = """
[inet_http_server]
port=127.0.0.1:{port}
username=synapse
password=secret
"""
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")
_COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")

# A session of its own whose controlling terminal is standard input.
_TRAMPOLINE = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A fleet: `one` serves, `two` could, `three` cannot."""

    at: Deployment
    url: str

    def command(self, *arguments: str) -> list[str]:
        main_file = str(self.at.etc / "supervisord.conf")
        return [str(BIN / "supervisorctl"), "-c", main_file, *arguments]

    @contextlib.contextmanager
    def terminal(
        self, *arguments: str, columns: int = 100, **environment: str
    ) -> Iterator[Terminal]:
        """supervisorctl in a terminal; its shell where there are no arguments."""
        terminal = Terminal(
            self.command(*arguments), self.at.environment() | {"TERM": "xterm"} | environment,
            columns,
        )  # fmt: skip
        try:
            yield terminal
        finally:
            terminal.close()

    @contextlib.contextmanager
    def shell(self, *arguments: str, columns: int = 100) -> Iterator[Terminal]:
        with self.terminal(*arguments, columns=columns) as terminal:
            terminal.wait_for(PROMPT)
            yield terminal

    def shown(self, *arguments: str, columns: int = 100, **environment: str) -> str:
        """What one command leaves on the screen."""
        with self.terminal(*arguments, columns=columns, **environment) as terminal:
            terminal.end()
            return terminal.raw


class Terminal:
    """A program in a pseudo-terminal: what it says is read, keys are pressed."""

    def __init__(self, command: list[str], environment: dict[str, str], columns: int) -> None:
        self._said = b""
        self._from = 0
        self._side, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TRAMPOLINE, *command], env=environment,
            stdin=inside, stdout=inside, stderr=inside,
        )  # fmt: skip
        os.close(inside)

    @property
    def raw(self) -> str:
        """All that was said, escapes included."""
        return self._said.decode().replace("\r\n", "\n")

    @property
    def text(self) -> str:
        """What was said since the last keys, without escapes."""
        return _ESCAPE.sub("", self._said[self._from :].decode("utf-8", "replace"))

    def press(self, keys: str) -> Terminal:
        self._from = len(self._said)
        os.write(self._side, keys.encode())
        return self

    def wait_for(self, text: str, seconds: float = SECONDS) -> str:
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} was not said: {self.text!r}"
            assert self._read() or text in self.text, f"ended without {text!r}: {self.text!r}"
        return self.text

    def type(self, line: str) -> str:
        """Enter a line in the shell; what it says."""
        self.press(f"{line}\n")
        return self.wait_for(f"\n{PROMPT}").replace("\r\n", "\n")

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit status, once it has ended by itself."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, f"did not end: {self.raw}"
        return self._process.wait(max(deadline - time.monotonic(), 1))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._side)

    def _read(self) -> bool:
        if not select.select([self._side], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._side, 65536)
        except OSError:  # a terminal whose last process has gone
            return False
        self._said += data
        return bool(data)


@pytest.fixture(scope="module")
def stage(llama_server: Engine) -> Iterator[Stage]:
    with deployed(SETTINGS) as at:
        at.add("one", "two", "three")
        at.synapse("init")
        port = free_ports(1)
        with (at.etc / "supervisord.conf").open("a") as main_file:
            main_file.write(_INET.format(port=port))
        at.synapse("up", "--detach")
        yield Stage(at, f"http://127.0.0.1:{port}")


def listener(stage: Stage) -> psutil.Process:
    with stage.at.rpc() as server:
        info: dict[str, int] = server.supervisor.getProcessInfo("synapse")  # type: ignore[assignment]
    return psutil.Process(info["pid"])


def serves(stage: Stage, name: str) -> None:
    """`name` alone, as a test may have left it otherwise."""
    other = {"one": "two", "two": "one"}[name]
    if stage.at.rows()[name]["phase"] != "ready" or stage.at.rows()[other]["phase"] == "ready":
        stage.at.ctl("enable", name)
        stage.at.ctl("disable", other)
    stage.at.wait_for_rows({name: "ready"})
    wait_until(lambda: stage.at.rows()[other]["phase"] in ("stopped", "disabled"), SECONDS)


# --- what is shown -------------------------------------------------------------------------------


def lines_of(raw: str) -> list[str]:
    return [line.rstrip() for line in _ESCAPE.sub("", raw).splitlines()]


def test_colours_are_for_terminals_and_for_those_who_want_them(stage: Stage) -> None:
    serves(stage, "one")
    for command in ("models", "devices", "history"):
        assert _COLOUR.search(stage.shown(command))
    assert "\x1b" not in stage.shown("devices", NO_COLOR="1")
    assert "\x1b" not in stage.shown("history", TERM="dumb")
    piped = stage.at.ctl("devices").out
    assert "\x1b" not in piped
    assert piped.isascii()


@pytest.mark.parametrize(("columns", "terminal"), [(44, "xterm"), (80, "dumb"), (200, "dumb")])
def test_a_bar_of_memory_fits_the_terminal(stage: Stage, columns: int, terminal: str) -> None:
    serves(stage, "one")
    lines = lines_of(stage.shown("devices", columns=columns, TERM=terminal))
    assert max(map(len, lines)) <= columns
    bar = next(re.search(r"\[(\S+)\]", line) for line in lines if "[" in line)
    assert bar is not None
    assert re.fullmatch(r"#+=*x+\.+\|+", bar[1])
    assert len(bar[1]) >= min(columns - 44, 60)


def test_who_has_the_memory_is_named_beside_the_bar(stage: Stage) -> None:
    serves(stage, "one")
    device = next(one for one in stage.at.ctl("devices", "--json").json() if one["models"])
    (model,) = device["models"]
    assert model["name"] == "one"
    assert 0 < device["others"] < device["total"]
    assert 0 < device["room"] < device["free"]
    text = stage.at.ctl("devices").out
    shown = re.search(r"#=? +one +(\d+) MiB", text)
    assert shown is not None
    assert abs(int(shown[1]) - model["held"] // 2**20) <= 10  # it lives on between the two looks
    assert re.search(r"x +others +\d+", text)
    assert re.search(r"\| +reserve +64 MiB", text)


def test_the_history_tells_what_became_of_a_model_and_why(stage: Stage) -> None:
    stage.at.ctl("enable", "three")
    stage.at.wait_for_rows({"three": "failed"})
    stage.at.ctl("disable", "three")
    found = stage.at.ctl("history", "three", "-n", "9", "--json").json()
    failed = next(line for line in found if line["to"] == "failed")
    assert failed["class"] == "bad-argument"
    assert "--no-such-flag" in failed["evidence"]
    shown = stage.at.ctl("history", "three").out
    day = time.strftime("%Y-%m-%d", time.localtime(failed["when"]))
    assert re.search(rf"{day} [\d:]+ +three +\S+ -> failed +bad-argument +.*--no-such-flag", shown)
    assert {line.split()[2] for line in shown.splitlines()[1:]} == {"three"}


def test_of_the_history_as_much_is_shown_as_is_asked_for(stage: Stage) -> None:
    everything = stage.at.ctl("history", "-n", "1000", "--json").json()
    assert stage.at.ctl("history", "-n2", "--json").json() == everything[-2:]
    assert len(stage.at.ctl("history", "-n", "3").out.splitlines()) == 4


def test_the_exit_status_tells_success_failure_and_bad_usage(stage: Stage) -> None:
    assert stage.at.ctl("history", "one", expect=0).err == ""
    assert "no such model" in stage.at.ctl("swap", "one", "nobody", expect=1).out
    assert stage.at.ctl("disable", "--json", "one", expect=2).out.startswith("Error: ")


# --- what models are told ------------------------------------------------------------------------


def test_several_models_are_told_at_once_and_each_is_answered(stage: Stage) -> None:
    said = stage.at.ctl("enable", "two", "nobody", "one", "two", expect=1).out
    assert said.splitlines() == ["two: enabled", "nobody: ERROR (no such model)", "one: enabled"]
    stage.at.wait_for_rows({"one": "ready", "two": "ready"})


def test_all_models_are_told_at_once(stage: Stage) -> None:
    said = stage.at.ctl("disable", "all").out.splitlines()
    assert sorted(said) == ["one: disabled", "three: disabled", "two: disabled"]
    stage.at.wait_for_rows({"one": "disabled", "two": "disabled", "three": "disabled"})
    drained = stage.at.ctl("drain", "all").out.splitlines()
    assert sorted(drained) == [
        f"{name}: is stopped already" for name in ("one", "three", "two")
    ]  # fmt: skip
    assert len(stage.at.ctl("enable", "all").out.splitlines()) == 3
    stage.at.wait_for_rows({"one": "ready", "two": "ready", "three": "failed"})
    stage.at.ctl("disable", "three", "two")


# --- the shell -----------------------------------------------------------------------------------


def test_tab_completes_our_commands_and_the_names_of_models(stage: Stage) -> None:
    with stage.shell() as shell:
        for keys, completed in (
            ("hist\t", "history "), ("enable o\t", "enable one "), ("disable one tw\t", "two "),
            ("swap one tw\t", "swap one two "), ("rollback th\t", "rollback three "),
            ("models --j\t", "models --json "), ("drain al\t", "drain all "),
            ("history on\t-n 5 --j\t", "history one -n 5 --json "), ("help dev\t", "help devices "),
        ):  # fmt: skip
            shell.press(keys).wait_for(completed)
            shell.press("\x15")  # the line is cleared
        assert "NAME" in shell.press("models tw\t\n").wait_for(f"\n{PROMPT}")


def test_tab_offers_what_there_is(stage: Stage) -> None:
    with stage.shell() as shell:
        shell.press("enable \t\t").wait_for("enable ")
        offered = shell.wait_for(f"{PROMPT}enable ").split()
        assert {"all", "one", "two", "three"} <= set(offered)
        shell.press("\x15").press("swap one \t\t\t")
        offered = shell.wait_for(f"{PROMPT}swap one t").split("\n")[1].split()
        assert offered == ["three", "two"]


def test_tab_works_on_supervisorctls_own_commands_as_ever(stage: Stage) -> None:
    with stage.shell() as shell:
        for keys, completed in (
            ("mainta\t", "maintail "), ("stop tw\t", "stop two "),
            ("status sy\t", "status synapse "), ("update on\t", "update one "),
            ("help resta\t", "help restart "),
        ):  # fmt: skip
            shell.press(keys).wait_for(completed)
            shell.press("\x15")


def test_in_the_shell_a_mistake_is_said_and_the_next_command_works(stage: Stage) -> None:
    serves(stage, "one")
    with stage.shell() as shell:
        assert "Error: swap requires the names of two models" in shell.type("swap one")
        assert "no such model" in shell.type("history nobody")
        assert "one: enabled" in shell.type("enable one")
        assert "ready" in shell.type("models one")
        shell.press("quit\n")
        assert shell.end() == 0


@contextlib.contextmanager
def frozen_listener(stage: Stage) -> Iterator[None]:
    process = listener(stage)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # the watchdog may have killed it
            process.send_signal(signal.SIGCONT)


def waiting(stage: Stage) -> bool:
    with stage.at.rpc() as server:
        return bool(json.loads(str(server.synapse.requests())))


def test_ctrl_c_ends_the_wait_for_a_swap_and_not_the_swap(stage: Stage) -> None:
    """In the shell the next command can be given."""
    serves(stage, "one")
    with stage.shell() as shell:
        with frozen_listener(stage):
            shell.press("swap one two\n")
            wait_until(lambda: waiting(stage), SECONDS, "the command")
            shell.press("\x03").wait_for("it goes on: look at `models`")
            shell.wait_for(f"\n{PROMPT}")
        assert "Traceback" not in shell.raw
        assert "two serves, one is stopped" in shell.type("swap one two")


def test_ctrl_c_ends_a_command_with_a_failure_and_no_traceback(stage: Stage) -> None:
    serves(stage, "two")
    with frozen_listener(stage), stage.terminal("drain", "two") as terminal:
        wait_until(lambda: waiting(stage), SECONDS, "the command")
        terminal.press("\x03")
        assert terminal.end() == 1
        assert "it goes on" in terminal.raw
        assert "Traceback" not in terminal.raw
    wait_until(lambda: stage.at.rows()["two"]["phase"] == "stopped", SECONDS)


# --- from elsewhere ------------------------------------------------------------------------------


def test_over_the_network_with_a_password_all_is_the_same(stage: Stage) -> None:
    serves(stage, "one")
    remote = ("-s", stage.url, "-u", LOGIN[0], "-p", LOGIN[1])
    assert stage.at.ctl(*remote, "devices", "--json").json()[0]["name"] == "CPU"
    assert "one: enabled" in stage.at.ctl(*remote, "enable", "one").out
    assert "ready" in stage.at.ctl(*remote, "history", "one").out
    with stage.shell(*remote) as shell:
        shell.press("swap on\ttw\t").wait_for("swap one two ")


@pytest.mark.parametrize("command", ["devices", "enable one"])
def test_without_a_password_a_command_fails(stage: Stage, command: str) -> None:
    said = stage.at.ctl("-s", stage.url, *command.split(), expect=1).text
    assert said == "Server requires authentication\n"


def test_where_somebody_sits_there_a_password_is_asked_for(stage: Stage) -> None:
    """And the command goes on, as supervisorctl's own do."""
    with stage.terminal(
        "-i", "-s", stage.url, "-u", LOGIN[0], "-p", "wrong", "devices"
    ) as terminal:
        terminal.wait_for("Username:")
        terminal.press(f"{LOGIN[0]}\n").wait_for("Password:")
        terminal.press(f"{LOGIN[1]}\n").wait_for("MiB")
        assert terminal.end() == 0
        assert LOGIN[1] not in terminal.raw
