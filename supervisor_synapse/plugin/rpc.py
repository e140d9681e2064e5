"""`[rpcinterface:synapse]`, inside supervisord: hands over snapshots and commands, stops models
together, and looks after the listener and what a reload would read.

Nothing here does I/O, waits, or raises: supervisord has one thread. (Only a reload, which stops
everything, first has supervisord's files read.) What the listener publishes is
kept and handed out, with the states that supervisord itself knows filled in. A command is kept
until the listener has carried it out; who gave it asks for the answer.
"""

from __future__ import annotations

import json
import time
import traceback
import weakref
from dataclasses import asdict
from typing import Any

from supervisor import events
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import ProcessStates, getProcessStateDescription
from supervisor.xmlrpc import Faults, RPCError

from supervisor_synapse.plugin import reload_guard
from supervisor_synapse.plugin.mailbox import Answer, Full, Mailbox
from supervisor_synapse.plugin.watchdog import Watchdog

API_VERSION = "1.2"

_LARGEST_SNAPSHOT_CHARACTERS = 8 * 1024 * 1024
_LONGEST_MESSAGE = 1000


class _Board:
    """What is known in one supervisord; shared by all its HTTP servers."""

    def __init__(self, supervisord: Any) -> None:
        self.snapshot: dict[str, Any] | None = None
        self.taken_at = 0.0  # monotonic
        self.mailbox = Mailbox()
        self.watchdog = Watchdog(supervisord)


# supervisord makes one interface for each of its HTTP servers, and a new Supervisor at a reload.
_boards: weakref.WeakKeyDictionary[Any, _Board] = weakref.WeakKeyDictionary()


class SynapseNamespaceRPCInterface:
    """The namespace `synapse` of supervisord's XML-RPC."""

    def __init__(self, supervisord: Any, board: _Board) -> None:
        self._supervisord = supervisord
        self._supervisor = SupervisorNamespaceRPCInterface(supervisord)
        self._board = board

    def getAPIVersion(self) -> str:
        """The version of this namespace.

        @return string  version
        """
        return API_VERSION

    def publish(self, snapshot: str) -> int:
        """Take the listener's newest snapshot.

        @param string snapshot  JSON object with `at` and `models`
        @return int         how many commands wait for the listener
        """
        if not isinstance(snapshot, str) or len(snapshot) > _LARGEST_SNAPSHOT_CHARACTERS:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a snapshot is a JSON object in a string")
        try:
            value = json.loads(snapshot)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("models"), list):
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a snapshot is a JSON object with models")
        self._board.snapshot, self._board.taken_at = value, time.monotonic()
        self._board.watchdog.hear()
        return len(self._board.mailbox.waiting())

    def beat(self) -> int:
        """The listener lives, and its last snapshot still holds.

        @return int  how many commands wait for the listener
        """
        if self._board.snapshot is not None:
            self._board.snapshot["at"] = time.time()
            self._board.taken_at = time.monotonic()
        self._board.watchdog.hear()
        return len(self._board.mailbox.waiting())

    def enable(self, name: str) -> str:
        """Bring a model up, now and after every restart, until it is disabled.

        @param string name  a model
        @return string      id of the command, for result()
        """
        return self._command("enable", name)

    def disable(self, name: str) -> str:
        """Stop a model, and keep it stopped also after a restart, until it is enabled.

        @param string name  a model
        @return string      id of the command, for result()
        """
        return self._command("disable", name)

    def swap(self, old: str, new: str) -> str:
        """Have one model take the place of another; without a moment between where both fit.

        @param string old  the model that goes
        @param string new  the model that comes
        @return string     id of the command, for result(), which answers when all is done
        """
        if old == new:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a model cannot take its own place")
        self._require_model(new)
        return self._command("swap", old, str(new))

    def drain(self, name: str) -> str:
        """Stop a model when it has nothing to do.

        @param string name  a model
        @return string      id of the command, for result()
        """
        return self._command("drain", name)

    def rollback(self, name: str, generation: int) -> str:
        """Go back to a former block of a model.

        @param string name     a model
        @param int generation  the generation to go back to; 0: the last one that was well
        @return string         id of the command, for result(), which answers when all is done
        """
        if type(generation) is not int or generation < 0:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a generation is a number, or 0")
        return self._command("rollback", name, str(generation) if generation else "")

    def discover(self) -> str:
        """Look for models again, in supervisord's program `discover`, which says how it goes.

        @return string  empty; also where it runs already
        """
        try:
            self._supervisor.startProcess("discover", False)
        except RPCError as error:
            if error.code != Faults.ALREADY_STARTED:
                raise
        return ""

    def result(self, command: str) -> str:
        """What became of a command.

        @param string command  its id
        @return string         empty while it waits; then a JSON object: `ok` and `message`
        """
        if not isinstance(command, str) or not self._board.mailbox.is_known(command):
            raise RPCError(Faults.BAD_NAME, "there is no such command")
        answer = self._board.mailbox.answer_to(command)
        return "" if answer is None else json.dumps(asdict(answer))

    def processes(self) -> str:
        """supervisor.getAllProcessInfo as text: a tenth of the work for both sides.

        @return string  JSON list of objects
        """
        return json.dumps(self._supervisor.getAllProcessInfo())

    def requests(self) -> str:
        """The commands that wait; for the listener.

        @return string  JSON list of objects: `id`, `verb`, `model`, `other`
        """
        return json.dumps([asdict(command) for command in self._board.mailbox.waiting()])

    def answer(self, command: str, ok: bool, message: str) -> bool:
        """What became of a command; from the listener.

        @param string command   its id
        @param boolean ok       whether it was carried out
        @param string message   a line for a person
        @return boolean         always True
        """
        answer = Answer(bool(ok), str(message)[:_LONGEST_MESSAGE])
        self._board.mailbox.answer(str(command), answer)
        return True

    def _require_model(self, name: object) -> None:
        if not isinstance(name, str) or not self._is_model(name):
            raise RPCError(Faults.BAD_NAME, "there is no such model")

    def _command(self, verb: str, name: str, other: str = "") -> str:
        self._require_model(name)
        try:
            command = self._board.mailbox.post(verb, name, other)
        except Full:
            raise RPCError(Faults.FAILED, "the listener takes no commands now") from None
        events.notify(events.RemoteCommunicationEvent("synapse", verb))  # wakes it
        return command

    def _is_model(self, name: str) -> bool:
        group = self._supervisord.process_groups.get(name)
        process = group.processes.get(name) if group is not None else None
        return process is not None and _is_model(process)

    def models(self) -> str:
        """What the listener knows of the models, with supervisord's states of now.

        @return string  JSON object: `at` (seconds since the epoch), `age_seconds` (since it was
                        published) and `models` (as `supervisorctl models --json` lists them);
                        empty before the listener spoke
        """
        snapshot = self._board.snapshot
        if snapshot is None:
            return ""
        age = round(time.monotonic() - self._board.taken_at, 3)
        models = [self._live(model) for model in snapshot["models"]]
        try:
            return json.dumps({**snapshot, "age_seconds": age, "models": models})
        except RecursionError:
            raise RPCError(Faults.FAILED, "the snapshot is nested too deeply") from None

    def _live(self, model: Any) -> Any:
        """The model with supervisord's own state and pid of this moment."""
        name = model.get("name") if isinstance(model, dict) else None
        if not isinstance(name, str):
            return model
        group = self._supervisord.process_groups.get(name)
        process = group.processes.get(name) if group is not None else None
        if process is None:
            return model
        return {
            **model,
            "state": getProcessStateDescription(process.get_state()),
            "pid": process.pid,
        }


def make_rpcinterface(supervisord: Any, **config: Any) -> SynapseNamespaceRPCInterface:
    """Called by supervisord, once for each of its HTTP servers."""
    board = _boards.get(supervisord)
    if board is None:
        board = _boards[supervisord] = _Board(supervisord)
        events.subscribe(
            events.SupervisorStoppingEvent, lambda event: _stop_models_together(supervisord)
        )
        events.subscribe(events.Tick5Event, board.watchdog.on_tick)
        _guard_reloads(supervisord)
    return SynapseNamespaceRPCInterface(supervisord, board)


def _guard_reloads(supervisord: Any) -> None:
    """Another supervisor may be made otherwise: then it goes on as it always did."""
    try:
        reload_guard.install(supervisord)
    except Exception:
        supervisord.options.logger.critical(traceback.format_exc())


def _stop_models_together(supervisord: Any) -> None:
    """supervisord stops its groups one after the other; models drain at the same time."""
    for group in list(supervisord.process_groups.values()):
        for process in list(group.processes.values()):
            if _is_model(process) and process.get_state() in _STOPPABLE:
                _stop(supervisord, process)


def _stop(supervisord: Any, process: Any) -> None:
    """Whatever another subscriber does upon it, supervisord goes on to stop the rest itself."""
    try:
        process.stop()
    except Exception:
        supervisord.options.logger.critical(traceback.format_exc())


_STOPPABLE = (ProcessStates.RUNNING, ProcessStates.STARTING)


def _is_model(process: Any) -> bool:
    """Whether our launcher runs it."""
    command = str(getattr(process.config, "command", ""))
    return "synapse-run" in command or "supervisor_synapse.launcher" in command
