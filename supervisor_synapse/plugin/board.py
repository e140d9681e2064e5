"""What is known of the models inside one supervisord: what the listener told, and supervisord's own
states of this moment. In memory, bounded; no I/O.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from supervisor.states import getProcessStateDescription

from supervisor_synapse.plugin.mailbox import Mailbox
from supervisor_synapse.plugin.watchdog import Watchdog

_MOST_LINES = 50  # of the history, kept of each model
_MOST_MODELS = 1000
_LONGEST_EVIDENCE = 500

Json = Mapping[str, Any]


class Board:
    """One in each supervisord, shared by all its HTTP servers."""

    def __init__(self, supervisord: Any) -> None:
        self.snapshot: dict[str, Any] | None = None
        self.taken_at = 0.0  # monotonic
        self.mailbox = Mailbox()
        self.watchdog = Watchdog(supervisord)
        self._history: dict[str, deque[Json]] = {}
        self._newest: deque[Json] = deque(maxlen=_MOST_LINES)  # of all models: what is asked most

    # from the listener

    def take(self, snapshot: dict[str, Any]) -> None:
        """The newest snapshot: an object with a list `models`."""
        self.snapshot, self.taken_at = snapshot, time.monotonic()
        self.watchdog.hear()

    def hear(self) -> None:
        """The listener lives, and its last snapshot still holds."""
        if self.snapshot is not None:
            self.snapshot["at"] = time.time()
            self.taken_at = time.monotonic()
        self.watchdog.hear()

    def record(self, lines: Iterable[Json], *, anew: bool) -> None:
        """Lines of the history, oldest first; `anew`: in place of all that was recorded."""
        if anew:
            self._history.clear()
            self._newest.clear()
        for line in lines:
            name = str(line["model"])
            evidence = str(line.get("evidence") or "")[:_LONGEST_EVIDENCE]
            kept = self._history.pop(name, None) or deque(maxlen=_MOST_LINES)
            kept.append({**line, "evidence": evidence})
            self._newest.append(kept[-1])
            self._history[name] = kept  # those of whom was heard last stand last
        while len(self._history) > _MOST_MODELS:
            del self._history[next(iter(self._history))]

    # for the surfaces

    @property
    def age_seconds(self) -> float:
        """Since the listener last spoke."""
        return round(time.monotonic() - self.taken_at, 3)

    def models(self, supervisord: Any) -> list[Any]:
        """As `models --json` lists them, with supervisord's own states and pids of now."""
        found = self.snapshot["models"] if self.snapshot is not None else []
        return [_live(model, supervisord) for model in found]

    def devices(self) -> list[Any]:
        """As `devices --json` lists them."""
        found = self.snapshot.get("devices") if self.snapshot is not None else None
        return found if isinstance(found, list) else []

    def history(self, name: str = "", most: int = _MOST_LINES) -> list[Json]:
        """The newest lines, of one model or of all, oldest first."""
        if most <= 0:
            return []
        return sorted(self._lines(name, most), key=_when)[-most:]

    def _lines(self, name: str, most: int) -> Iterator[Json]:
        if not name and most <= _MOST_LINES:
            yield from self._newest
            return
        for model, lines in self._history.items():
            if name in ("", model):
                yield from lines


# supervisord makes one interface for each of its HTTP servers, and a new Supervisor at a reload.
boards: weakref.WeakKeyDictionary[Any, Board] = weakref.WeakKeyDictionary()


def _when(line: Json) -> float:
    at = line.get("when")
    return float(at) if isinstance(at, int | float) else 0.0


def _live(model: Any, supervisord: Any) -> Any:
    """The model with supervisord's own state and pid of this moment."""
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return model
    group = supervisord.process_groups.get(name)
    process = group.processes.get(name) if group is not None else None
    if process is None:
        return model
    return {
        **model,
        "state": getProcessStateDescription(process.get_state()),
        "pid": process.pid,
    }
