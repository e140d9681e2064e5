"""What a person may ask for on the page, and how it is asked: never waited for.

`start`, `stop` and `restart` are supervisord's own; the rest goes to the listener through the
mailbox, or to the program `discover`. Each becomes a wish, which tells what came of it.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import STOPPED_STATES, ProcessStates
from supervisor.xmlrpc import Faults, RPCError

from supervisor_synapse.plugin.board import Board
from supervisor_synapse.plugin.sessions import Wish

_DISCOVER = "discover"
_OF_ONE_MODEL = ("enable", "disable", "drain")
_MARGIN_SECONDS = 30.0  # beyond the time after which supervisord kills what it stops
_LARGEST_GENERATION = 2**31 - 1

_FAULTS = {
    Faults.BAD_NAME: "supervisord has no such program",
    Faults.ALREADY_STARTED: "it runs already",
    Faults.NOT_RUNNING: "it does not run",
    Faults.NO_FILE: "its command is not there",
    Faults.NOT_EXECUTABLE: "its command cannot be executed",
    Faults.SPAWN_ERROR: "supervisord could not start it",
    Faults.SHUTDOWN_STATE: "supervisord is shutting down",
}


class Commands(Protocol):
    """What the page needs of the XML-RPC namespace `synapse`; raises RPCError."""

    def enable(self, name: str) -> str: ...
    def disable(self, name: str) -> str: ...
    def drain(self, name: str) -> str: ...
    def swap(self, old: str, new: str) -> str: ...
    def rollback(self, name: str, generation: int) -> str: ...
    def discover(self) -> str: ...


_Ask = Callable[[], str]  # gives the id of a command in the mailbox, where there is one


class BadForm(Exception):
    """A form that our page does not have."""


def carry_out(form: Mapping[str, str], supervisord: Any, board: Board, commands: Commands) -> Wish:
    """Ask for what a form says.

    Raises:
        BadForm: it says nothing that can be asked for.
    """
    verb, _, name = form.get("do", "").partition(" ")
    wish = Wish(f"{verb} {name}".strip())
    if verb in _OWN:
        _require(name, board, supervisord)
        ask: _Ask = functools.partial(_OWN[verb], supervisord, name, wish)
    elif verb in _OF_ONE_MODEL:
        ask = functools.partial(getattr(commands, verb), name)
    else:
        ask = _asked_by_form(verb, form, commands, wish)
    try:
        wish.command = ask()
    except RPCError as error:
        wish.end(False, _said(error))
    return wish


def _require(name: str, board: Board, supervisord: Any) -> None:
    """Only models; other programs are the stock page's business."""
    found = board.models(supervisord)
    if not any(isinstance(one, dict) and one.get("name") == name for one in found):
        raise BadForm("there is no such model")


def _asked_by_form(verb: str, form: Mapping[str, str], commands: Commands, wish: Wish) -> _Ask:
    if verb == "swap":
        old, new = form.get("old", ""), form.get("new", "")
        wish.text = f"swap {old} {new}"
        return functools.partial(commands.swap, old, new)
    if verb == "rollback":
        name, generation = form.get("model", ""), _generation(form.get("generation", ""))
        wish.text = f"rollback {name} {generation or ''}".rstrip()
        return functools.partial(commands.rollback, name, generation)
    if verb == _DISCOVER:
        wish.program = _DISCOVER
        return commands.discover
    raise BadForm("there is no such action")


def _generation(text: str) -> int:
    """0 for the last good one."""
    text = text.strip()
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or int(text[:10]) > _LARGEST_GENERATION:
        raise BadForm("a generation is a number")
    return int(text[:10])


def _said(error: RPCError) -> str:
    """Its words, without the name of the fault."""
    _, colon, words = str(error.text).partition(": ")
    return _FAULTS.get(error.code, words if colon else str(error.text)) or "it was refused"


# --- supervisord's own ---------------------------------------------------------------------------


def _start(supervisord: Any, name: str, wish: Wish) -> str:
    process = supervisord.process_groups[name].processes[name]
    if process.get_state() == ProcessStates.STOPPING:
        wish.end(False, "it is still stopping")
        return ""
    SupervisorNamespaceRPCInterface(supervisord).startProcess(name, False)
    wish.end(True, "supervisord has started it")
    return ""


def _stop(supervisord: Any, name: str, wish: Wish) -> str:
    process = supervisord.process_groups[name].processes[name]
    if _is_restarting(process):
        del process.transition
        wish.end(True, "it stops, and is not started again")
        return ""
    SupervisorNamespaceRPCInterface(supervisord).stopProcess(name, False)
    wish.end(True, "it was told to stop, and drains first")
    return ""


def _restart(supervisord: Any, name: str, wish: Wish) -> str:
    process = supervisord.process_groups[name].processes[name]
    if _is_restarting(process):
        wish.end(True, "it is restarted already")
        return ""
    if process.get_state() in STOPPED_STATES:
        return _start(supervisord, name, wish)
    if process.get_state() != ProcessStates.STOPPING:
        SupervisorNamespaceRPCInterface(supervisord).stopProcess(name, False)
    wish.deadline = time.monotonic() + float(process.config.stopwaitsecs) + _MARGIN_SECONDS
    wish.message = "it drains and stops, and then starts"
    _start_when_stopped(supervisord, process, name, wish)
    return ""


_OWN: dict[str, Callable[[Any, str, Wish], str]] = {
    "start": _start, "stop": _stop, "restart": _restart,
}  # fmt: skip


def _is_restarting(process: Any) -> bool:
    return "transition" in vars(process)


def _start_when_stopped(supervisord: Any, process: Any, name: str, wish: Wish) -> None:
    """At one of supervisord's next looks at this process; it looks at each once a turn.

    The look itself stays supervisord's; this process object alone has one of its own, for as long
    as that takes.
    """
    look = process.transition

    def transition() -> Any:
        if _is_over(process, wish):
            del process.transition
            _start_again(supervisord, process, name, wish)
        return look()

    process.transition = transition


def _is_over(process: Any, wish: Wish) -> bool:
    return process.get_state() in STOPPED_STATES or time.monotonic() > wish.deadline


def _start_again(supervisord: Any, process: Any, name: str, wish: Wish) -> None:
    """Nothing may leave this: supervisord's loop is above."""
    if process.get_state() not in STOPPED_STATES:
        wish.end(False, "it did not stop in time, and was not started again")
        return
    try:
        _start(supervisord, name, wish)
        wish.message = "supervisord has started it again"
    except RPCError as error:
        wish.end(False, f"it was stopped, but not started: {_said(error)}")
    except Exception:
        supervisord.options.logger.critical(traceback.format_exc())
        wish.end(False, "it was stopped, but not started: supervisord's log says why")


# --- what came of it -----------------------------------------------------------------------------


def settle(wish: Wish, supervisord: Any, board: Board) -> None:
    """Note what has come of a wish since it was last looked at."""
    if wish.ok is not None:
        return
    if wish.command:
        _settle_command(wish, board)
    elif wish.program:
        _settle_program(wish, supervisord)
    elif time.monotonic() > wish.deadline:
        wish.end(False, "it was not started again")


def _settle_command(wish: Wish, board: Board) -> None:
    answer = board.mailbox.answer_to(wish.command)
    if answer is not None:
        wish.end(answer.ok, answer.message)
    elif not board.mailbox.is_known(wish.command):
        wish.end(False, "its answer was lost when supervisord was reloaded")


def _settle_program(wish: Wish, supervisord: Any) -> None:
    group = supervisord.process_groups.get(wish.program)
    process = group.processes.get(wish.program) if group is not None else None
    if process is None:
        wish.end(False, "supervisord has no such program any more")
    elif process.get_state() in STOPPED_STATES:
        status = process.exitstatus
        is_well = status == 0
        wish.end(is_well, "done" if is_well else f"exit status {status}: look at its log")
