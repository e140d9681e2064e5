"""`[rpcinterface:synapse]`, inside supervisord: hands over snapshots, and stops models together.

Nothing here does I/O, waits, or raises: supervisord has one thread. What the listener publishes is
kept as text and handed out as text, with the states that supervisord itself knows filled in.
"""

from __future__ import annotations

import json
import time
import traceback
import weakref
from typing import Any

from supervisor import events
from supervisor.states import ProcessStates, getProcessStateDescription
from supervisor.xmlrpc import Faults, RPCError

API_VERSION = "1.0"

_LARGEST_SNAPSHOT_CHARACTERS = 8 * 1024 * 1024


class _Board:
    """What is known in one supervisord; shared by all its HTTP servers."""

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] | None = None
        self.taken_at = 0.0  # monotonic


# supervisord makes one interface for each of its HTTP servers, and a new Supervisor at a reload.
_boards: weakref.WeakKeyDictionary[Any, _Board] = weakref.WeakKeyDictionary()


class SynapseNamespaceRPCInterface:
    """The namespace `synapse` of supervisord's XML-RPC."""

    def __init__(self, supervisord: Any, board: _Board) -> None:
        self._supervisord = supervisord
        self._board = board

    def getAPIVersion(self) -> str:
        """The version of this namespace.

        @return string  version
        """
        return API_VERSION

    def publish(self, snapshot: str) -> bool:
        """Take the listener's newest snapshot.

        @param string snapshot  JSON object with `at` and `models`
        @return boolean         always True
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
        return True

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
        board = _boards[supervisord] = _Board()
        events.subscribe(
            events.SupervisorStoppingEvent, lambda event: _stop_models_together(supervisord)
        )
    return SynapseNamespaceRPCInterface(supervisord, board)


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
