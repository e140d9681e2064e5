"""`[rpcinterface:synapse]`, inside supervisord: hands over snapshots and commands, stops models
together, and looks after the listener and what a reload would read.

Nothing here does I/O, waits, or raises: supervisord has one thread. (Only a reload, which stops
everything, first has supervisord's files read.) What the listener publishes is
kept and handed out, with the states that supervisord itself knows filled in. A command is kept
until the listener has carried it out; who gave it asks for the answer.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from typing import Any

from supervisor import events
from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.xmlrpc import Faults, RPCError

from supervisor_synapse.plugin import metrics, reload_guard, web
from supervisor_synapse.plugin.board import Board, boards
from supervisor_synapse.plugin.mailbox import Answer, Full, KeyTaken

# The first number changes when something that callers rely on does; the second when something is
# added. docs/xml-rpc.md describes it.
API_VERSION = "1.5"

_LARGEST_SNAPSHOT_CHARACTERS = 8 * 1024 * 1024
_LONGEST_MESSAGE = 1000
_LONGEST_KEY = 64
_MOST_LINES = 1000  # of the history in one answer: some milliseconds of work
_LARGEST_INT = 2**31 - 1  # of XML-RPC


class SynapseNamespaceRPCInterface:
    """The namespace `synapse` of supervisord's XML-RPC."""

    def __init__(self, supervisord: Any, board: Board) -> None:
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
        value = _parsed(snapshot)
        if not isinstance(value, dict) or not isinstance(value.get("models"), list):
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a snapshot is a JSON object with models")
        self._board.take(value)
        return len(self._board.mailbox.waiting())

    def beat(self) -> int:
        """The listener lives, and its last snapshot still holds.

        @return int  how many commands wait for the listener
        """
        self._board.hear()
        return len(self._board.mailbox.waiting())

    def enable(self, name: str, key: str = "") -> str:
        """Bring a model up, now and after every restart, until it is disabled.

        @param string name  a model
        @param string key   optional: asked again with the same, nothing is done twice
        @return string      id of the command, for result(), which answers when it is noted
        """
        return self._command("enable", name, key=key)

    def disable(self, name: str, key: str = "") -> str:
        """Stop a model, and keep it stopped also after a restart, until it is enabled.

        @param string name  a model
        @param string key   optional: asked again with the same, nothing is done twice
        @return string      id of the command, for result(), which answers when it is noted
        """
        return self._command("disable", name, key=key)

    def swap(self, old: str, new: str, key: str = "") -> str:
        """Have one model take the place of another; without a moment between where both fit.

        @param string old  the model that goes
        @param string new  the model that comes
        @param string key  optional: asked again with the same, nothing is done twice
        @return string     id of the command, for result(), which answers when all is done
        """
        if old == new:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a model cannot take its own place")
        self._require_model(new)
        return self._command("swap", old, str(new), key=key)

    def drain(self, name: str, key: str = "") -> str:
        """Stop a model when it has nothing to do.

        @param string name  a model
        @param string key   optional: asked again with the same, nothing is done twice
        @return string      id of the command, for result(), which answers when it is noted
        """
        return self._command("drain", name, key=key)

    def rollback(self, name: str, generation: int, key: str = "") -> str:
        """Go back to a former block of a model.

        @param string name     a model
        @param int generation  the generation to go back to; 0: the last one that was well
        @param string key      optional: asked again with the same, nothing is done twice
        @return string         id of the command, for result(), which answers when all is done
        """
        if type(generation) is not int or not 0 <= generation <= _LARGEST_INT:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a generation is a number, or 0")
        return self._command("rollback", name, str(generation) if generation else "", key=key)

    def demand(self, name: str) -> bool:
        """Somebody waits for a model that does not run; to be said again every second.

        An enabled model is started then; where memory is short, who is idle and no more important
        makes room for it. Nothing is answered: models() tells how it goes.

        @param string name  a model
        @return boolean     always True
        """
        self._require_model(name)
        if self._board.mailbox.demand(name):
            events.notify(events.RemoteCommunicationEvent("synapse", "demand"))  # wakes it
        return True

    def discover(self) -> str:
        """Look for models again, in supervisord's program `discover`, which says how it goes.

        @return string  empty; also where it runs already. Its log tells how it goes, and
                        supervisor.getProcessInfo("discover") how it ended
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
        @return string         empty while it waits; then a JSON object: `ok` and `message`. A
                               fault BAD_NAME where it is not known (any more)
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
        mailbox = self._board.mailbox
        found = [*mailbox.waiting(), *mailbox.take_demands()]
        return json.dumps([asdict(command) for command in found])

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

    def _require_running(self) -> None:
        """While supervisord ends, nobody carries a command out."""
        mood = self._supervisord.options.mood
        if isinstance(mood, int) and mood < SupervisorStates.RUNNING:
            raise RPCError(Faults.SHUTDOWN_STATE)

    def _require_model(self, name: object) -> None:
        if not isinstance(name, str) or not self._is_model(name):
            raise RPCError(Faults.BAD_NAME, "there is no such model")

    def _command(self, verb: str, name: str, other: str = "", *, key: str = "") -> str:
        self._require_running()
        self._require_model(name)
        if not _is_key(key):
            raise RPCError(Faults.INCORRECT_PARAMETERS, "a key is printable ASCII, 64 at most")
        try:
            command = self._board.mailbox.post(verb, name, other, key)
        except Full:
            raise RPCError(Faults.FAILED, "the listener takes no commands now") from None
        except KeyTaken:
            raise RPCError(
                Faults.INCORRECT_PARAMETERS, "another command was given with this key"
            ) from None
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
        board = self._board
        if board.snapshot is None:
            return ""
        found = {**board.snapshot, "models": board.models(self._supervisord)}
        return _dumped({**found, "age_seconds": board.age_seconds})

    def devices(self) -> str:
        """The memory of each device: total, free, what models hold, what others took.

        @return string  JSON object: `age_seconds` and `devices` (as `supervisorctl devices --json`
                        lists them); empty before the listener spoke
        """
        if self._board.snapshot is None:
            return ""
        found = {"age_seconds": self._board.age_seconds, "devices": self._board.devices()}
        return _dumped(found)

    def history(self, name: str, most: int) -> str:
        """The newest transitions.

        @param string name  a model; empty: all
        @param int most     how many, at most; never more than 1000
        @return string      JSON list of objects, oldest first: `when` (seconds since the epoch),
                            `model`, `from`, `to`, `reason`, `class`, `evidence`, `incarnation`
        """
        if type(most) is not int or most < 1:
            raise RPCError(Faults.INCORRECT_PARAMETERS, "most is a number from 1 on")
        if not isinstance(name, str):
            raise RPCError(Faults.BAD_NAME, "there is no such model")
        lines = self._board.history(name, min(most, _MOST_LINES))
        if name and not lines:  # one that has no program any more may still have a history
            self._require_model(name)
        return _dumped(lines)

    def record(self, lines: str, anew: bool) -> bool:
        """Take new lines of the history; from the listener.

        @param string lines  JSON list of objects as history() returns them
        @param boolean anew  whether they stand in place of all that is known
        @return boolean      always True
        """
        value = _parsed(lines)
        if not isinstance(value, list) or not all(
            isinstance(line, dict) and isinstance(line.get("model"), str) for line in value
        ):
            raise RPCError(Faults.INCORRECT_PARAMETERS, "lines are a JSON list of objects")
        self._board.record(value, anew=bool(anew))
        return True


def _is_key(key: object) -> bool:
    """Empty: none."""
    return isinstance(key, str) and len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable()


def _parsed(text: object) -> Any:
    """JSON in a string of a sensible size; None where it is none."""
    if not isinstance(text, str) or len(text) > _LARGEST_SNAPSHOT_CHARACTERS:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dumped(value: object) -> str:
    """ASCII: supervisord cuts other replies short."""
    try:
        return json.dumps(value)
    except RecursionError:
        raise RPCError(Faults.FAILED, "the snapshot is nested too deeply") from None


def make_rpcinterface(supervisord: Any, **config: Any) -> SynapseNamespaceRPCInterface:
    """Called by supervisord, once for each of its HTTP servers."""
    board = boards.get(supervisord)
    if board is None:
        board = boards[supervisord] = Board(supervisord)
        events.subscribe(
            events.SupervisorStoppingEvent, lambda event: _stop_models_together(supervisord)
        )
        events.subscribe(events.Tick5Event, board.watchdog.on_tick)
        _guard_reloads(supervisord)
        metrics.install(supervisord)
        web.install(supervisord, SynapseNamespaceRPCInterface)
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
    """Whether our launcher runs it, and it is not the gateway."""
    if getattr(process.config, "name", "") == "gateway":
        return False
    command = str(getattr(process.config, "command", ""))
    return "synapse-run" in command or "supervisor_synapse.launcher" in command
