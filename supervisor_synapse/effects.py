"""Actions → adapters. The only place where a decision becomes a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from supervisor_synapse.adapters import processes
from supervisor_synapse.adapters.supervisord import Refused, Supervisord
from supervisor_synapse.core.state import Action, Kill, MovePort, SetRung, Start, Stop
from supervisor_synapse.errors import ApplyError, ConfigError, TransientError


@dataclass(frozen=True, slots=True)
class Deployer:
    """Renders the block of one program anew, which does not run, and applies it."""

    move_port: Callable[[str], None]  # by the program's name
    set_rung: Callable[[str, int], None]


class Effects:
    """Carries out decisions through supervisord. For the thread that speaks XML-RPC."""

    def __init__(self, rpc: Supervisord, supervisor_pid: int, deployer: Deployer) -> None:
        self._rpc = rpc
        self._supervisor_pid = supervisor_pid
        self._deployer = deployer

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
                    return _told(partial(self._deployer.move_port, action.name))
                case SetRung():
                    return _told(partial(self._deployer.set_rung, action.name, action.rung))
                case _:
                    assert_never(action)
        except Refused as refused:
            return str(refused)
        return ""


def _told(change: Callable[[], None]) -> str:
    """What kept a change of the deployment from being carried out, or ""."""
    try:
        change()
    except (ApplyError, ConfigError, TransientError) as error:
        return str(error)
    return ""
