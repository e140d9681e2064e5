"""The Tab key in supervisorctl's shell: names of models for our commands.

Whatever belongs to supervisorctl's own commands is left to it. Nothing here says anything or fails:
who presses Tab has asked for nothing yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_KEPT_SECONDS = 2.0  # one press of Tab asks many times

Complete = Callable[..., str | None]


@dataclass(frozen=True, slots=True)
class Words:
    """What may stand behind a command: names of models, at most so many; and further words."""

    most_names: int | None = 0  # None: any number
    others: tuple[str, ...] = ()


class Completion:
    """`names`: asks supervisord for the models; it may raise whatever it likes."""

    def __init__(self, commands: Mapping[str, Words], names: Callable[[], list[str]]) -> None:
        self._commands = commands
        self._ask = names
        self._known: list[str] = []
        self._asked_at: float | None = None
        self._matches: list[str] = []

    def install(self, controller: Any) -> None:
        """The shell hands the controller's `complete` to readline when it begins."""
        own: Complete = controller.complete

        def complete(text: str, state: int, line: str | None = None) -> str | None:
            before = (_line_to_cursor() if line is None else line).split()
            # The last word is the one that is being completed, unless none was begun.
            before = before[:-1] if text else before
            if not before or before[0] not in self._commands:
                return own(text, state) if line is None else own(text, state, line)
            return self.match(text, state, before)

        controller.complete = complete

    def match(self, text: str, state: int, before: list[str]) -> str | None:
        """The match of this number, as readline asks for them; `before`: the words so far."""
        if state == 0:
            self._matches = self._find(text, before)
        return self._matches[state] if state < len(self._matches) else None

    def _find(self, text: str, before: list[str]) -> list[str]:
        command, *said = before
        words = self._commands[command]
        named = [word for word in said if not word.startswith("-") and not word.isdecimal()]
        found = [word for word in words.others if word not in said]
        if words.most_names is None or len(named) < words.most_names:
            found = [*(name for name in self._names() if name not in named), *found]
        return [f"{word} " for word in found if word.startswith(text)]

    def _names(self) -> list[str]:
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at > _KEPT_SECONDS:
            try:
                self._known = self._ask()
            except Exception:  # no supervisord, no password, no snapshot: no names
                self._known = []
            self._asked_at = time.monotonic()
        return self._known


def _line_to_cursor() -> str:
    import readline

    return readline.get_line_buffer()[: readline.get_endidx()]
