"""Refuses a reload that supervisord would not survive, inside supervisord.

`supervisorctl reload` (XML-RPC supervisor.restart) and SIGHUP have supervisord stop everything and
only then read its files: with a broken one it ends, and all models are gone. So the files are read
before. Where one is broken nothing is stopped, and whoever asked is told its name, line and fault.

Two things of supervisor's are wrapped, and do what they did before wherever nothing is broken:
the method `restart` of its RPC interface, once for the process, as a reload keeps modules loaded;
and `get_signal` of the options, anew after each reload, as these are. A check that fails by itself
stands in nobody's way.

`supervisorctl update` needs no guard: supervisord reads first, and changes nothing where it cannot.
A start does not either: nothing runs yet.
"""

from __future__ import annotations

import functools
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.states import SupervisorStates
from supervisor.xmlrpc import Faults, RPCError

from supervisor_synapse.adapters.config_files import Broken, broken_files

_MOST_NAMED = 5
_MARK = "_asks_synapse"


def install(supervisord: Any) -> None:
    """Guard this supervisord's reloads from now on; to say so twice is no error."""
    _guard_restart()
    _guard_signals(supervisord.options)


def _guard_restart() -> None:
    restart = SupervisorNamespaceRPCInterface.restart
    if hasattr(restart, _MARK):
        return

    @functools.wraps(restart)  # its docstring is what system.methodHelp says
    def guarded(self: Any) -> Any:
        why_not = _refusal(self.supervisord.options)
        if why_not:
            raise RPCError(Faults.CANT_REREAD, why_not)
        return restart(self)

    setattr(guarded, _MARK, True)
    SupervisorNamespaceRPCInterface.restart = guarded


def _guard_signals(options: Any) -> None:
    get_signal = options.get_signal
    if hasattr(get_signal, _MARK):
        return

    def guarded() -> Any:
        number = get_signal()
        return None if number == signal.SIGHUP and _refusal(options) else number

    setattr(guarded, _MARK, True)
    options.get_signal = guarded


def _refusal(options: Any) -> str:
    """Why supervisord must not be reloaded now; nothing where it may."""
    if options.mood != SupervisorStates.RUNNING:
        return ""  # on its way out, or reloading already: supervisord's own business
    try:
        broken = broken_files(Path(options.configfile))
        why_not = _said(broken) if broken else ""
    except Exception:
        options.logger.critical(f"synapse: cannot check the files: {traceback.format_exc()}")
        return ""
    if why_not:
        options.logger.critical(f"synapse: no reload: {why_not}")
    return why_not


def _said(broken: Sequence[Broken]) -> str:
    named = [str(one) for one in broken[:_MOST_NAMED]]
    if len(broken) > _MOST_NAMED:
        named.append(f"and {len(broken) - _MOST_NAMED} more")
    them = "it" if len(broken) == 1 else "them"
    return (
        f"{'; '.join(named)}; supervisord would end, or lose programs: nothing was stopped; "
        f"mend {them}, then reload again"
    )
