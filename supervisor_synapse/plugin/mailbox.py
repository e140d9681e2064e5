"""Commands on their way to the listener, and its answers on their way back; in memory, bounded.

A command waits until the listener has answered it, so one that died over it finds it again. So
the listener must carry out each as if it might come twice.

Whoever asks twice is given the first one's id, as long as that waits and nothing else was asked of
the same models in between; and with the same key also later. So what was lost can be asked again.
"""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from dataclasses import dataclass

_MOST_WAITING = 256
_MOST_ANSWERS = 1024
_MOST_KEYS = _MOST_WAITING + _MOST_ANSWERS


class Full(Exception):
    """The listener has not taken anything for a long time."""


class KeyTaken(Exception):
    """Another command was given under this key."""


@dataclass(frozen=True, slots=True)
class Command:
    """What somebody asked for."""

    id: str
    verb: str
    model: str
    other: str = ""  # the second model, where there are two


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it, in a line for a person."""

    ok: bool
    message: str


class Mailbox:
    """One in each supervisord."""

    def __init__(self) -> None:
        # An id of an earlier supervisord must not name a command of this one.
        self._era = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._waiting: OrderedDict[str, Command] = OrderedDict()
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._keyed: OrderedDict[str, Command] = OrderedDict()
        self._demands: dict[str, None] = {}

    def demand(self, model: str) -> bool:
        """Somebody waits for a model; False where the listener has yet to take that up."""
        is_new = model not in self._demands and len(self._demands) < _MOST_WAITING
        if is_new:
            self._demands[model] = None
        return is_new

    def take_demands(self) -> list[Command]:
        """Each once: who still waits says so again. Without an id, since nothing is answered."""
        found = [Command("", "demand", model) for model in self._demands]
        self._demands.clear()
        return found

    def post(self, verb: str, model: str, other: str = "", key: str = "") -> str:
        """The id under which the answer will be found. `key`: whoever asked chose it; empty: none.

        Raises:
            Full: too many wait already.
            KeyTaken: another command was given under this key.
        """
        command = self._of_key(key, (verb, model, other)) or self._under_way(verb, model, other)
        if command is None:
            command = self._new(verb, model, other)
        if key:
            self._keyed[key] = command
            if len(self._keyed) > _MOST_KEYS:
                self._keyed.popitem(last=False)
        return command.id

    def _of_key(self, key: str, asked: tuple[str, str, str]) -> Command | None:
        """The command that was given under this key, as long as it is known."""
        command = self._keyed.get(key)
        if command is None or not self.is_known(command.id):
            return None
        if asked != (command.verb, command.model, command.other):
            raise KeyTaken
        return command

    def _under_way(self, verb: str, model: str, other: str) -> Command | None:
        """The same command, where it waits and is the last that was given to its models."""
        names = {model, other} - {""}
        for command in reversed(self._waiting.values()):
            if names & {command.model, command.other}:
                is_same = (verb, model, other) == (command.verb, command.model, command.other)
                return command if is_same else None
        return None

    def _new(self, verb: str, model: str, other: str) -> Command:
        if len(self._waiting) >= _MOST_WAITING:
            raise Full
        command = Command(f"{self._era}-{next(self._numbers)}", verb, model, other)
        self._waiting[command.id] = command
        return command

    def waiting(self) -> list[Command]:
        """Oldest first."""
        return list(self._waiting.values())

    def answer(self, command: str, answer: Answer) -> None:
        """The listener has done with it."""
        if self._waiting.pop(command, None) is None:
            return
        self._answers[command] = answer
        while len(self._answers) > _MOST_ANSWERS:
            self._answers.popitem(last=False)

    def is_known(self, command: str) -> bool:
        return command in self._waiting or command in self._answers

    def answer_to(self, command: str) -> Answer | None:
        """None while it waits."""
        return self._answers.get(command)
