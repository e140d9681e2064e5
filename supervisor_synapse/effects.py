"""Actions → adapters. The only place where a decision becomes a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from supervisor_synapse.adapters import processes
from supervisor_synapse.adapters.supervisord import Refused, Supervisord
from supervisor_synapse.core.model import Failure
from supervisor_synapse.core.state import (
    Action,
    Bless,
    Kill,
    MovePort,
    Renew,
    RollBack,
    SetRung,
    Start,
    Stop,
)
from supervisor_synapse.errors import ApplyError, ConfigError, RollbackFailed, TransientError


@dataclass(frozen=True, slots=True)
class Deployer:
    """Changes of single models (rollback.py, revise.py), by the program's name."""

    move_port: Callable[[str], None]
    set_rung: Callable[[str, int], None]
    renew: Callable[[Sequence[str]], None]  # several at once
    bless: Callable[[str, str], None]
    roll_back: Callable[[str, str, Failure], str]  # of which block, and why
    roll_back_to: Callable[[str, int, str], str]  # which generation, and by which command
    adopt: Callable[[Mapping[str, str]], None]  # the digests that were seen, by name
    forget_untold: Callable[[Sequence[str]], None]
    set_aside: Callable[[str, str, Failure], str]  # which block of it, and why


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
                case Renew():
                    return _told(partial(self._deployer.renew, (action.name,)))
                case Bless():
                    return _told(partial(self._deployer.bless, action.name, action.digest))
                case RollBack():
                    return _told(
                        partial(
                            self._deployer.roll_back, action.name, action.digest, action.failure
                        )
                    )
                case _:
                    assert_never(action)
        except Refused as refused:
            return str(refused)
        return ""


def _told(change: Callable[[], object]) -> str:
    """What kept a change of the deployment from being carried out, or ""."""
    try:
        change()
    except (ApplyError, ConfigError, RollbackFailed, TransientError) as error:
        return str(error)
    except OSError as error:
        return f"cannot write {str(error.filename)!a}: {error.strerror}"
    return ""
