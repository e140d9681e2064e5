"""Actions → adapters. The only place where a decision becomes a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from supervisor_synapse.adapters import processes
from supervisor_synapse.adapters.supervisord import Refused, Supervisord
from supervisor_synapse.core.decide import Action, Kill, MovePort, Start, Stop
from supervisor_synapse.errors import ApplyError, ConfigError, TransientError

# Gives the program of a name another port: renders its block again and applies it.
PortMover = Callable[[str], None]


class Effects:
    """Carries out decisions through supervisord. For the thread that speaks XML-RPC."""

    def __init__(self, rpc: Supervisord, supervisor_pid: int, move_port: PortMover) -> None:
        self._rpc = rpc
        self._supervisor_pid = supervisor_pid
        self._move_port = move_port

    def perform(self, action: Action) -> str:
        """Carry out one action; what went wrong, or "".

        A refusal is no error of ours: the next look shows what is, and the next decision follows.

        Raises:
            TransientError, ShuttingDown: supervisord did not answer.
        """
        try:
            match action:
                case Start():
                    self._rpc.start(action.name)
                case Stop():
                    self._rpc.stop(action.name)
                case Kill():
                    if not processes.kill_group(action.incarnation.pid, self._supervisor_pid):
                        return "it is gone already"
                case MovePort():
                    return self._move(action.name)
                case _:
                    assert_never(action)
        except Refused as refused:
            return str(refused)
        return ""

    def _move(self, name: str) -> str:
        try:
            self._move_port(name)
        except (ApplyError, ConfigError, TransientError) as error:
            return str(error)
        return ""
