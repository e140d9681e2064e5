"""`[ctlplugin:synapse]`, inside supervisorctl: the commands that are about models.

Each command says what became of it in lines for a person, or with --json in JSON on stdout and
all else on stderr; and sets the exit status: 0 success, 1 failure, 2 bad usage.
"""

from __future__ import annotations

import functools
import sys
import xmlrpc.client
from collections.abc import Callable
from typing import Any

from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses
from supervisor.xmlrpc import Faults

from supervisor_synapse.core.failures import printable
from supervisor_synapse.plugin import ctl_commands, ctl_discover, ctl_show
from supervisor_synapse.plugin.ctl_commands import Outcome
from supervisor_synapse.plugin.ctl_complete import Completion, Words
from supervisor_synapse.plugin.ctl_link import Failed, Link
from supervisor_synapse.plugin.ctl_show import Shown

_JSON = "--json"
_ALL = "all"  # no model has this name
_LINES = 20
_MOST_LINES = 1000  # that supervisord hands out
_LARGEST_INT = 2**31 - 1  # of XML-RPC
_GOES_ON = "no longer waited for; it goes on: look at `models`"
_DISCOVERY_GOES_ON = (
    f"no longer followed: `status {ctl_discover.PROGRAM}` tells how it goes on"
)  # fmt: skip

_COMPLETED = {
    "models": Words(None, (_JSON,)),
    "devices": Words(0, (_JSON,)),
    "history": Words(1, ("-n", _JSON)),
    "enable": Words(None, (_ALL,)),
    "disable": Words(None, (_ALL,)),
    "drain": Words(None, (_ALL,)),
    "swap": Words(2),
    "rollback": Words(1),
    "discover": Words(0),
}


class Usage(Exception):
    """A command was given otherwise than it can be."""


_Do = Callable[["SynapseControllerPlugin", list[str]], None]


def _command(when_interrupted: str = "") -> Callable[[_Do], Callable[..., None]]:
    """A command on its words. Whatever it raises is said; Ctrl-C ends it, and only it."""

    def wrap(do: _Do) -> Callable[..., None]:
        @functools.wraps(do)
        def run(plugin: SynapseControllerPlugin, arg: str) -> None:
            words = arg.split()
            try:
                do(plugin, words)
            except Usage as error:
                plugin.refuse(do.__name__.removeprefix("do_"), str(error))
            except Failed as failed:
                plugin.fail(str(failed), aside=_JSON in words)
            except KeyboardInterrupt:
                plugin.end_line()
                plugin.fail(when_interrupted, aside=_JSON in words)

        return run

    return wrap


class SynapseControllerPlugin(ControllerPluginBase):  # type: ignore[misc]  # untyped base
    """Adds `models`, `devices`, `history`, `discover` and what models can be told."""

    name = "synapse"

    def __init__(self, controller: Any, **config: Any) -> None:
        self.ctl = controller
        self._link = Link(controller)
        self._hush(controller.options.plugins)
        self._explain_reload(controller.options.plugins)
        Completion(_COMPLETED, self._names).install(controller)

    # what is shown

    @_command()
    def do_models(self, words: list[str]) -> None:
        names, as_json = _names_and_json("models", words)
        names = [] if _ALL in names else names
        text = self._link.ask("models")
        self._show(ctl_show.models(text, names, as_json=as_json), as_json=as_json)

    def help_models(self) -> None:
        self._help(
            "models\t\t\tShow all models, and why they are as they are",
            "models <name> <name>\tShow these models",
            "models --json\t\tShow them in JSON",
        )

    @_command()
    def do_devices(self, words: list[str]) -> None:
        names, as_json = _names_and_json("devices", words)
        if names:
            raise Usage("devices accepts no names")
        self._show(ctl_show.devices(self._link.ask("models"), as_json=as_json), as_json=as_json)

    def help_devices(self) -> None:
        self._help(
            "devices\t\t\tShow the memory of each device, and who has it",
            "devices --json\t\tShow it in JSON, in bytes",
        )

    @_command()
    def do_history(self, words: list[str]) -> None:
        rest, most = _without_number(words)
        names, as_json = _names_and_json("history", rest)
        if len(names) > 1:
            raise Usage("history accepts one name")
        name = names[0] if names and names[0] != _ALL else ""
        text = self._link.ask("history", name, most, about=name)
        self._show(ctl_show.history(text, as_json=as_json), as_json=as_json)

    def help_history(self) -> None:
        self._help(
            "history\t\t\tShow the last 20 transitions of all models, and why",
            "history <name>\t\tShow those of one model",
            "history -n <number>\tShow so many",
            "history --json\t\tShow them in JSON",
        )

    # what models are told

    @_command(_GOES_ON)
    def do_enable(self, words: list[str]) -> None:
        self._tell("enable", words)

    def help_enable(self) -> None:
        self._help(
            "enable <name>\t\tStart a model, now and after every restart",
            "enable <name> <name>\tStart multiple models",
            "enable all\t\tStart all models; those that do not fit wait for memory",
        )

    @_command(_GOES_ON)
    def do_disable(self, words: list[str]) -> None:
        self._tell("disable", words)

    def help_disable(self) -> None:
        self._help(
            "disable <name>\t\tStop a model, and keep it stopped after every restart",
            "disable <name> <name>\tStop multiple models",
            "disable all\t\tStop all models",
        )

    @_command(_GOES_ON)
    def do_drain(self, words: list[str]) -> None:
        self._tell("drain", words)

    def help_drain(self) -> None:
        self._help(
            "drain <name>\t\tStop a model when it has nothing to do",
            "drain <name> <name>\tStop multiple models",
            "drain all\t\tStop all models, each when it has nothing to do",
        )

    @_command(_GOES_ON)
    def do_swap(self, words: list[str]) -> None:
        names, _ = _names_and_json("swap", words, takes_json=False)
        if len(names) != 2:
            raise Usage("swap requires the names of two models")
        old, new = names
        self._tell_outcome(ctl_commands.swap(self._link, old, new, self._say_now))

    def help_swap(self) -> None:
        self._help("swap <old> <new>\tHave <new> take the place of <old>, which is drained")

    @_command(_GOES_ON)
    def do_rollback(self, words: list[str]) -> None:
        name, *more = words or [""]
        generation = _generation(more)
        if not name or name.startswith("-") or generation is None:
            raise Usage(
                "rollback requires a model, and at most the number of one of its generations"
            )
        self._tell_outcome(ctl_commands.roll_back(self._link, name, generation))

    def help_rollback(self) -> None:
        self._help(
            "rollback <name>\t\tGo back to the last block that <name> was well with",
            "rollback <name> <generation>\tGo back to its block of that generation",
        )

    @_command(_DISCOVERY_GOES_ON)
    def do_discover(self, words: list[str]) -> None:
        if words:
            raise Usage("discover accepts no arguments")
        ctl_discover.discover(self._link, self._say_now)

    def help_discover(self) -> None:
        self._help("discover\t\tLook for models again, and show what is found")

    # how it is said

    def _tell(self, verb: str, words: list[str]) -> None:
        """Give a command to each model; say what became of it."""
        names, _ = _names_and_json(verb, words, takes_json=False)
        if not names:
            raise Usage(f"{verb} requires the name of a model")
        if _ALL in names:
            names = self._names()
            if not names:
                raise Failed("There are no models. `discover` looks for some.")
        for outcome in ctl_commands.each(self._link, verb, list(dict.fromkeys(names))):
            self._tell_outcome(outcome)

    def _names(self) -> list[str]:
        return ctl_show.names(self._link.ask("models"))

    def _tell_outcome(self, outcome: Outcome) -> None:
        if outcome.ok:
            self._say_now(outcome.message)
        else:
            self.fail(outcome.message)

    def _show(self, shown: Shown, *, as_json: bool) -> None:
        if shown.out:
            self.ctl.output(shown.out)
        for failure in shown.failures:
            self.fail(failure, aside=as_json)
        if shown.remark:
            self._say(shown.remark, aside=as_json)

    def _say_now(self, line: str) -> None:
        """A line as soon as it is there."""
        self.ctl.output("".join(c if c.isprintable() else " " for c in line))
        self.ctl.stdout.flush()

    def _say(self, line: str, *, aside: bool) -> None:
        """`aside`: JSON stands on stdout, which must stay JSON."""
        if aside:
            print(line, file=sys.stderr)
        else:
            self.ctl.output(line)

    def end_line(self) -> None:
        """A terminal has shown ^C, and stands behind it."""
        if self.ctl.stdout.isatty():
            self.ctl.output("")

    def fail(self, message: str, *, aside: bool = False) -> None:
        """The command failed; the empty message is not said."""
        if message:
            self._say(printable(message), aside=aside)
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC

    def refuse(self, command: str, message: str) -> None:
        """The command was not understood."""
        self.ctl.output(f"Error: {message}")
        getattr(self, f"help_{command}")()
        self.ctl.exitstatus = LSBInitExitStatuses.INVALID_ARGS

    # help

    def _help(self, *lines: str) -> None:
        for line in lines:
            self.ctl.output(line)

    def do_help(self, arg: str) -> None:
        # Of our own commands alone: another plugin has said what it knows of the others. (A
        # docstring would have supervisorctl list `help` as one of ours.)
        if not arg or arg in self._commands():
            super().do_help(arg)

    def _commands(self) -> list[str]:
        names = [name.removeprefix("help_") for name in vars(type(self))]
        return [name for name in names if hasattr(self, f"do_{name}") and name != "help"]

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


def _names_and_json(
    command: str, words: list[str], *, takes_json: bool = True
) -> tuple[list[str], bool]:
    """The names, and whether JSON is asked for.

    Raises:
        Usage: another flag.
    """
    flags = [word for word in words if word.startswith("-")]
    unknown = [flag for flag in flags if flag != _JSON or not takes_json]
    if unknown:
        raise Usage(f"{command} does not know {printable(unknown[0])}")
    return [word for word in words if word not in flags], bool(flags)


def _without_number(words: list[str]) -> tuple[list[str], int]:
    """The words without `-n <number>`, and the number.

    Raises:
        Usage: it is none.
    """
    rest, number = list[str](), str(_LINES)
    found = iter(words)
    for word in found:
        if word.startswith("-n"):
            number = word.removeprefix("-n") or next(found, "")
        else:
            rest.append(word)
    value = _number(number)
    if value is None or value > _MOST_LINES:
        raise Usage(f"history -n requires a number from 1 to {_MOST_LINES}")
    return rest, value


def _generation(words: list[str]) -> int | None:
    """The number of a generation; 0 where none is given, None where it is none."""
    if not words:
        return 0
    return _number(words[0]) if len(words) == 1 else None


def _number(word: str) -> int | None:
    """A number from 1 on that XML-RPC can carry."""
    is_number = word.isascii() and word.isdecimal() and len(word) <= len(str(_LARGEST_INT))
    number = int(word) if is_number else 0
    return number if 0 < number <= _LARGEST_INT else None


def make_controllerplugin(controller: Any, **config: Any) -> SynapseControllerPlugin:
    """Called by supervisorctl."""
    return SynapseControllerPlugin(controller, **config)
