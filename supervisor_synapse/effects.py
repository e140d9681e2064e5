"""Actions → adapters. The only place where a decision becomes a call."""

from __future__ import annotations

from supervisor_synapse.adapters.supervisord import Refused, Supervisord
from supervisor_synapse.core.decide import Action


def perform(action: Action, rpc: Supervisord) -> str:
    """Carry out one action; what went wrong, or "".

    A refusal is no error of ours: the next look shows what is, and the next decision follows it.

    Raises:
        TransientError, ShuttingDown: supervisord did not answer.
    """
    try:
        rpc.start(action.name)
    except Refused as refused:
        return str(refused)
    return ""
