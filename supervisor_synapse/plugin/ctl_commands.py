"""What supervisorctl tells the listener to do: given at once, answered one after the other."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.errors import TransientError
from supervisor_synapse.plugin.ctl_link import Failed, Link

STALE_SECONDS = 10.0  # the listener gives a sign of life every 2 s
LOOK = "Look at `status synapse` and var/log/synapse.log."

_ANSWER_SECONDS = 15.0  # a listener that was just restarted takes a few
_SWAP_SECONDS = 3600.0  # a large model loads from a slow disk, after a long drain
_ROLLBACK_SECONDS = 120.0
_POLL_SECONDS = 0.05
_NEWS_SECONDS = 1.0
_LOST = "supervisord was restarted meanwhile: look at `models`"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one command, in a line for a person."""

    ok: bool
    message: str


def each(link: Link, verb: str, names: Sequence[str]) -> Iterator[Outcome]:
    """The same of several models: all are asked for before the first answer is waited for."""
    given = [_given(link, verb, name) for name in names]
    seconds = _ANSWER_SECONDS
    for name, command in zip(names, given, strict=True):
        if isinstance(command, Outcome):
            yield command
            continue
        try:
            yield _answer(link, name, command, seconds)
        except Failed as failed:
            seconds = 0.0  # the others wait for the same listener, and have waited as long
            yield Outcome(False, str(failed))


def _given(link: Link, verb: str, name: str) -> str | Outcome:
    """The id of the command, or why there is none."""
    try:
        return link.ask(verb, name, about=name)
    except Failed as failed:
        return Outcome(False, str(failed))


def swap(link: Link, old: str, new: str, say: Callable[[str], None]) -> Outcome:
    """Wait until it is done, or undone; `say` how far it is, where it takes its time.

    Raises:
        Failed: nobody knows what became of it.
    """
    what = f"swap {old} {new}"
    command = link.ask("swap", old, new, about=what)
    news = _News(link, (old, new), say)
    return _answer(link, what, command, _SWAP_SECONDS, news.look)


class _News:
    """The phases of a few models, each said once."""

    def __init__(self, link: Link, names: Sequence[str], say: Callable[[str], None]) -> None:
        self._link, self._names, self._say = link, names, say
        self._said: dict[str, str] = {}
        self._looked_at = time.monotonic()

    def look(self) -> None:
        """To be called often; what cannot be read now is read the next time."""
        if time.monotonic() < self._looked_at + _NEWS_SECONDS:
            return
        with contextlib.suppress(Failed, TransientError):
            self._tell(self._link.ask("models"))
        self._looked_at = time.monotonic()

    def _tell(self, text: str) -> None:
        rows = {row.name: row for row in snapshots.load(text).models} if text else {}
        for row in filter(None, map(rows.get, self._names)):
            if self._said.get(row.name) != row.phase.value:
                self._said[row.name] = row.phase.value
                self._say(f"{row.name}: {row.phase.value} ({row.reason})")


def roll_back(link: Link, name: str, generation: int) -> Outcome:
    """Wait until it is done.

    Raises:
        Failed: nobody knows what became of it.
    """
    command = link.ask("rollback", name, generation, about=name)
    return _answer(link, name, command, _ROLLBACK_SECONDS)


def _answer(
    link: Link, what: str, command: str, seconds: float, meanwhile: Callable[[], None] | None = None
) -> Outcome:
    deadline = time.monotonic() + seconds
    while True:
        text = link.ask("result", command, about=what, missing=_LOST)
        if text:
            return _read(what, text)
        if time.monotonic() >= deadline:
            raise Failed(_why_none(link, what))
        if meanwhile is not None:
            meanwhile()
        time.sleep(_POLL_SECONDS)


def _read(what: str, text: str) -> Outcome:
    try:
        answer = json.loads(text)
        return Outcome(bool(answer["ok"]), str(answer["message"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return Outcome(False, f"{what}: ERROR (cannot read the answer)")


def _why_none(link: Link, what: str) -> str:
    """A listener that is there has something else to do with these models first."""
    age = snapshots.age_seconds(link.ask("models"))
    if age is None or age > STALE_SECONDS:
        return f"{what}: ERROR (the listener does not answer). {LOOK}"
    return f"{what}: ERROR (still waits: a swap or another command comes first). Look at `models`."
