"""`[ctlplugin:synapse]`, inside supervisorctl: the commands that are about models."""

from __future__ import annotations

import functools
import json
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, TypeVar
from xml.parsers.expat import ExpatError

from supervisor.states import STOPPED_STATES, ProcessStates
from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses
from supervisor.xmlrpc import Faults

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.failures import printable
from supervisor_synapse.errors import TransientError

_STALE_SECONDS = 10.0  # the listener gives a sign of life every 2 s
_ANSWER_SECONDS = 15.0  # a listener that was just restarted takes a few
_SWAP_SECONDS = 3600.0  # a large model loads from a slow disk, after a long drain
_ROLLBACK_SECONDS = 120.0
_DISCOVER_SECONDS = 3600.0  # the headers of a large cache on a slow disk
_POLL_SECONDS = 0.05
_LOG_POLL_SECONDS = 0.2
_LOG_CHUNK_BYTES = 65536
_LONGEST_CHARACTER_BYTES = 4
_LARGEST_INT = 2**31 - 1  # of XML-RPC
_DISCOVER = "discover"
_NO_DISCOVER = (
    "supervisord has no such program: run `synapse discover` in a shell, or give supervisord.conf "
    "the section [program:discover] that `synapse init` lays down"
)
_LOST = "supervisord was restarted meanwhile: look at `models`"
_LOOK = "Look at `status synapse` and var/log/synapse.log."

_Say = Callable[[str], None]
_T = TypeVar("_T")


class SynapseControllerPlugin(ControllerPluginBase):  # type: ignore[misc]  # untyped base
    """Adds `models`, `discover` and what models can be told to supervisorctl."""

    name = "synapse"

    def __init__(self, controller: Any, **config: Any) -> None:
        self.ctl = controller
        self._hush(controller.options.plugins)
        self._explain_reload(controller.options.plugins)

    def _hush(self, others: list[Any]) -> None:
        """supervisorctl asks each plugin for help in turn; those before us know no word of ours."""
        for other in others:
            for command in self._commands():
                if not hasattr(other, f"help_{command}"):
                    setattr(other, f"help_{command}", lambda: None)

    def _explain_reload(self, others: list[Any]) -> None:
        """supervisorctl shows a refused reload as an exception of its own."""
        for other in others:
            if hasattr(other, "do_reload"):
                other.do_reload = functools.partial(self._reload, other.do_reload)

    def _reload(self, do_reload: Callable[[str], None], arg: str) -> None:
        try:
            do_reload(arg)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.CANT_REREAD:
                raise
            text = "".join(c if c.isprintable() else " " for c in str(fault.faultString))
            self.ctl.output(text.replace("; ", "\n"))

    def _commands(self) -> list[str]:
        names = [name.removeprefix("help_") for name in vars(type(self))]
        return [name for name in names if hasattr(self, f"do_{name}") and name != "help"]

    def do_help(self, arg: str) -> None:
        # Of our own commands alone: another plugin has said what it knows of the others. (A
        # docstring would have supervisorctl list `help` as one of ours.)
        if not arg or arg in self._commands():
            super().do_help(arg)

    def do_models(self, arg: str) -> None:
        names = arg.split()
        as_json = "--json" in names
        wanted = [name for name in names if name != "--json"]
        unknown_flags = [name for name in wanted if name.startswith("-")]
        if unknown_flags:
            self.ctl.output(f"Error: models does not know {printable(unknown_flags[0])}")
            self.help_models()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        say = _on_stderr if as_json else self.ctl.output
        text = self._ask("models", say)
        if text is not None:
            self._show(text, wanted, say, as_json=as_json)

    def help_models(self) -> None:
        self.ctl.output("models [NAME ...]\t\tShow the models and why they are as they are.")
        self.ctl.output("models --json [NAME ...]\tThe same for programs.")

    def do_enable(self, arg: str) -> None:
        self._command("enable", arg)

    def help_enable(self) -> None:
        self.ctl.output("enable NAME ...\t\tBring models up, now and after every restart.")

    def do_disable(self, arg: str) -> None:
        self._command("disable", arg)

    def help_disable(self) -> None:
        self.ctl.output(
            "disable NAME ...\tStop models, and keep them stopped also after a restart."
        )

    def do_drain(self, arg: str) -> None:
        self._command("drain", arg)

    def help_drain(self) -> None:
        self.ctl.output("drain NAME ...\t\tStop models when they have nothing to do.")

    def do_swap(self, arg: str) -> None:
        names = arg.split()
        if len(names) != 2:
            self.ctl.output("Error: swap requires the names of two models")
            self.help_swap()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        old, new = names
        command = self._ask("swap", self.ctl.output, old, new, about=f"swap {old} {new}")
        if command is not None:
            self._await_result(f"swap {old} {new}", command, _SWAP_SECONDS)

    def help_swap(self) -> None:
        self.ctl.output("swap OLD NEW\t\tHave NEW take the place of OLD; OLD is drained.")

    def do_rollback(self, arg: str) -> None:
        name, *more = arg.split() or [""]
        generation = _generation(more)
        if not name or generation is None:
            self.ctl.output("Error: rollback requires a model, and at most the number of one of "
                            "its generations")  # fmt: skip
            self.help_rollback()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        command = self._ask("rollback", self.ctl.output, name, generation, about=name)
        if command is not None:
            self._await_result(name, command, _ROLLBACK_SECONDS)

    def help_rollback(self) -> None:
        self.ctl.output("rollback NAME\t\tGo back to the last block that NAME was well with.")
        self.ctl.output("rollback NAME GENERATION\tGo back to the block of that generation.")

    def do_discover(self, arg: str) -> None:
        if arg:
            self.ctl.output("Error: discover accepts no arguments")
            self.help_discover()
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        try:
            self._discover()
        except KeyboardInterrupt:
            self._fail(f"no longer followed: `status {_DISCOVER}` tells how it goes on", self._say)

    def help_discover(self) -> None:
        self.ctl.output("discover \t\tLook for models again, and show what is found.")

    def _discover(self) -> None:
        """Start a run, or join the one under way; show what it says, and how it ends."""
        offset = self._asked(self._say, _log_size, about=_DISCOVER, missing=_NO_DISCOVER)
        if offset is None:
            return
        is_ours = self._asked(self._say, _start, about=_DISCOVER, missing=_NO_DISCOVER)
        if is_ours is None:
            return
        if not is_ours:
            self._say(f"{_DISCOVER} runs already; what it says from now on:")
        self._follow(offset)

    def _follow(self, offset: int) -> None:
        deadline, rest = time.monotonic() + _DISCOVER_SECONDS, ""
        while time.monotonic() < deadline:
            # In this order: the log of a run that has ended is complete.
            info = self._asked(self._say, lambda proxy: proxy.supervisor.getProcessInfo(_DISCOVER))
            said = self._asked(self._say, functools.partial(self._read_log, offset))
            if info is None or said is None:
                return
            text, end = said
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                self._say(line)
            if end != offset:
                offset = end
            elif info["state"] in STOPPED_STATES:
                if rest:
                    self._say(rest)
                self._tell_end(info)
                return
            else:
                time.sleep(_LOG_POLL_SECONDS)
        self._fail(f"{_DISCOVER}: ERROR (no end after {_DISCOVER_SECONDS:.0f} s)", self._say)

    def _read_log(self, offset: int, proxy: Any) -> tuple[str, int]:
        """What the log holds beyond `offset`, a part of it, and where that ends."""
        size = _log_size(proxy)
        offset = offset if offset <= size else 0  # it was rotated
        length = min(size - offset, _LOG_CHUNK_BYTES)
        for shorter in _lengths(length):
            try:
                with self.ctl.get_server_proxy() as own:  # a failed one cannot be used again
                    text = own.supervisor.readProcessStdoutLog(_DISCOVER, offset, shorter)
                    return str(text), offset + shorter
            except xmlrpc.client.ProtocolError as error:
                # A character may end behind this part; supervisord cannot say so.
                if error.errcode != HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
        return "", offset + length

    def _tell_end(self, info: Any) -> None:
        if info["state"] == ProcessStates.EXITED and info["exitstatus"] == 0:
            return
        why = {
            ProcessStates.EXITED: f"exit status {info['exitstatus']}",
            ProcessStates.STOPPED: "it was stopped",
        }.get(info["state"], info["spawnerr"] or info["statename"])
        self._fail(f"{_DISCOVER}: ERROR ({why})", self._say)

    def _say(self, line: str) -> None:
        """A line as soon as it is there."""
        self.ctl.output("".join(c if c.isprintable() else " " for c in line))
        self.ctl.stdout.flush()

    def _command(self, verb: str, arg: str) -> None:
        """Give a command for each name; say what became of it."""
        names = arg.split()
        if not names:
            self.ctl.output(f"Error: {verb} requires the name of a model")
            self.ctl.onecmd(f"help {verb}")
            self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS
            return
        for name in names:
            command = self._ask(verb, self.ctl.output, name, about=name)
            if command is not None:
                self._await_result(name, command, _ANSWER_SECONDS)

    def _await_result(self, name: str, command: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            text = self._ask("result", self.ctl.output, command, about=name, missing=_LOST)
            if text is None:
                return
            if text:
                self._say_result(name, text)
                return
            time.sleep(_POLL_SECONDS)
        self._fail(f"{name}: ERROR (the listener does not answer). {_LOOK}", self.ctl.output)

    def _say_result(self, name: str, text: str) -> None:
        try:
            answer = json.loads(text)
            ok, message = bool(answer["ok"]), str(answer["message"])
        except (ValueError, KeyError, TypeError):
            self._fail(f"{name}: ERROR (cannot read the answer)", self.ctl.output)
            return
        if ok:
            self.ctl.output(printable(message))
        else:
            self._fail(message, self.ctl.output)

    def _show(self, text: str, wanted: list[str], say: _Say, *, as_json: bool) -> None:
        try:
            rows = snapshots.load(text).models if text else ()
        except TransientError as error:
            self._fail(str(error), say)
            return
        known = {row.name for row in rows}
        missing = [name for name in wanted if name not in known]
        chosen = [row for row in rows if not wanted or row.name in wanted]
        if as_json:
            self.ctl.output(json.dumps(snapshots.public(chosen), indent=2))
        elif chosen:
            from supervisor_synapse import report

            self.ctl.output(report.models_table(chosen))
        elif text and not rows:
            self.ctl.output("No models. `synapse discover` looks for some.")
        for name in missing if text else ():
            self._fail(f"{name}: ERROR (no such model)", say)
        self._tell_age(text, say)
        if wanted and not text:
            self.ctl.exitstatus = LSBInitExitStatuses.GENERIC

    def _tell_age(self, text: str, say: _Say) -> None:
        """Say so where there is no snapshot, or an old one."""
        age = snapshots.age_seconds(text) if text else None
        if not text:
            say(f"The listener has not reported yet. {_LOOK}")
        elif age is not None and age > _STALE_SECONDS:
            say(f"The listener last reported {age:.0f} s ago: this may be outdated. {_LOOK}")

    def _ask(
        self,
        method: str,
        say: _Say,
        *arguments: str | int,
        about: str = "",
        missing: str = "no such model",
    ) -> str | None:
        """What a method of our namespace answers; None where it failed, which was said."""
        return self._asked(
            say,
            lambda proxy: str(getattr(proxy.synapse, method)(*arguments)),
            about=about,
            missing=missing,
        )

    def _asked(
        self, say: _Say, ask: Callable[[Any], _T], *, about: str = "", missing: str = ""
    ) -> _T | None:
        """What `ask` gets from supervisord; None where it failed, which was said."""
        url = self.ctl.options.serverurl
        try:
            with self.ctl.get_server_proxy() as proxy:
                return ask(proxy)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Faults.UNKNOWN_METHOD:
                self._fail("supervisord runs without [rpcinterface:synapse]", say)
            elif fault.faultCode == Faults.BAD_NAME and about:
                self._fail(f"{about}: ERROR ({missing})", say)
            else:
                self._fail(str(fault.faultString), say)
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == HTTPStatus.UNAUTHORIZED:
                raise  # supervisorctl asks for the password
            self._fail(f"cannot reach supervisord at {url}: HTTP status {error.errcode}", say)
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            self._fail(f"cannot reach supervisord at {url}: {why}; does it run?", say)
        except (xmlrpc.client.Error, HTTPException, ExpatError) as error:
            self._fail(f"cannot read the answer of {url}: {error}", say)
        return None

    def _fail(self, message: str, say: _Say) -> None:
        say(printable(message))
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC


def _generation(words: list[str]) -> int | None:
    """The number of a generation; 0 where none is given, None where it is none."""
    if not words:
        return 0
    is_number = len(words) == 1 and words[0].isascii() and words[0].isdecimal()
    number = int(words[0]) if is_number and len(words[0]) <= len(str(_LARGEST_INT)) else 0
    return number if 0 < number <= _LARGEST_INT else None


def _log_size(proxy: Any) -> int:
    _, size, _ = proxy.supervisor.tailProcessStdoutLog(_DISCOVER, 0, 0)
    return int(size)


def _start(proxy: Any) -> bool:
    """Start a discovery; False where one runs already."""
    try:
        proxy.supervisor.startProcess(_DISCOVER, False)
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != Faults.ALREADY_STARTED:
            raise
        return False
    return True


def _lengths(length: int) -> Iterator[int]:
    """A length, and those that end one of a few bytes before it."""
    for cut in range(_LONGEST_CHARACTER_BYTES):
        if length > cut:
            yield length - cut


def _on_stderr(message: str) -> None:
    """Beside JSON on stdout, which must stay JSON."""
    print(message, file=sys.stderr)


def make_controllerplugin(controller: Any, **config: Any) -> SynapseControllerPlugin:
    """Called by supervisorctl."""
    return SynapseControllerPlugin(controller, **config)
