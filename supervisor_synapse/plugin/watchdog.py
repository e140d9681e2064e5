"""On supervisord's tick: a listener that is frozen, deaf or out of step is killed.

supervisord starts it again by itself (`autorestart=true`); models go on serving meanwhile.
"""

from __future__ import annotations

import signal
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from supervisor.dispatchers import EventListenerStates
from supervisor.states import ProcessStates

LISTENER = "synapse"

_TICK_SECONDS = 5.0
_SILENT_SECONDS = 5.0  # the listener gives a sign of life every 2 s
_BEATING_SECONDS = 3.0
# On a machine out of breath a new listener is no quicker: after each kill it gets twice as long.
_LONGEST_SILENCE_SECONDS = 80.0


class Watchdog:
    """Looks at the listener; one in each supervisord."""

    def __init__(self, supervisord: Any, clock: Callable[[], float] = time.monotonic) -> None:
        # Weakly: what is known of a supervisord must not keep it alive beyond a reload.
        self._supervisord = weakref.proxy(supervisord)
        self._pid = 0
        self._patience_seconds = _SILENT_SECONDS
        self._clock = clock
        self._heard_at = self._ticked_at = clock()

    def hear(self) -> None:
        """The listener gave a sign of life."""
        self._heard_at = self._clock()

    def on_tick(self, event: object) -> None:
        """Nothing may leave this: supervisord's loop is above."""
        try:
            self._look()
        except Exception:
            self._supervisord.options.logger.critical(traceback.format_exc())

    def _look(self) -> None:
        now = self._clock()
        between, self._ticked_at = now - self._ticked_at, now
        process = self._listener()
        if process is None or process.get_state() != ProcessStates.RUNNING:
            return
        # supervisord itself was held up, or the listener has only just been started: whatever
        # silence there was proves nothing.
        if between > 2 * _TICK_SECONDS or process.pid != self._pid:
            self._pid = process.pid
            self.hear()
            return
        silent_seconds = now - self._heard_at
        if silent_seconds > self._patience_seconds:
            self._patience_seconds = min(2 * self._patience_seconds, _LONGEST_SILENCE_SECONDS)
            self._kill(process, f"has been silent for {silent_seconds:.0f} s")
            return
        if silent_seconds <= _BEATING_SECONDS:
            self._patience_seconds = max(self._patience_seconds / 2, _SILENT_SECONDS)
        if process.listener_state == EventListenerStates.UNKNOWN:
            self._kill(process, "wrote something else than the event protocol on its stdout")

    def _listener(self) -> Any:
        group = self._supervisord.process_groups.get(LISTENER)
        return None if group is None else group.processes.get(LISTENER)

    def _kill(self, process: Any, why: str) -> None:
        # Not stop(): that would leave it stopped.
        self._supervisord.options.logger.warn(f"synapse: the listener {why}; it is killed")
        process.signal(signal.SIGKILL)
