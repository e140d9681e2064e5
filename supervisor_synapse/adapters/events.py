"""supervisord's event-listener protocol. Sole writer of stdout in the listener's process.

One stray byte on stdout makes supervisord give up on a listener, and `len:` counts characters,
not bytes, so the parser works on decoded text. Events are hints; the parser hands on their names,
and forgets the rest.

http://supervisord.org/events.html#event-listener-notification-protocol
"""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import Callable
from dataclasses import dataclass

_READY = b"READY\n"
_DONE = b"RESULT 2\nOK"
_LONGEST_HEADER = 4096
_LONGEST_PAYLOAD = 4 * 1024 * 1024
_MOST_DIGITS = 20  # int() refuses thousands of them with an error of its own


@dataclass(frozen=True, slots=True)
class Event:
    """One notification: its type, serial in this supervisord, and body."""

    name: str
    serial: int
    payload: str


class ProtocolError(Exception):
    """What came on stdin is not the event protocol."""


class Parser:
    """Bytes in any pieces → events. No I/O."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._header: dict[str, str] | None = None

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes.

        Raises:
            ProtocolError: out of step with supervisord; only a restart of the listener helps.
        """
        self._text += self._decode(data)
        events = []
        while (event := self._next()) is not None:
            events.append(event)
        return events

    def _next(self) -> Event | None:
        if self._header is None:
            line, found, rest = self._text.partition("\n")
            if not found:
                if len(line) > _LONGEST_HEADER:
                    raise ProtocolError("an event header does not end")
                return None
            self._header, self._text = _parse_header(line), rest
        length = _number(self._header, "len", _LONGEST_PAYLOAD)
        if len(self._text) < length:
            return None
        header, self._header = self._header, None
        payload, self._text = self._text[:length], self._text[length:]
        return Event(header.get("eventname", ""), _number(header, "serial", 2**63), payload)


def _parse_header(line: str) -> dict[str, str]:
    """`ver:3.0 server:x …`; a value may itself hold a colon."""
    return dict(word.split(":", 1) for word in line.split() if ":" in word)


def _number(header: dict[str, str], key: str, largest: int) -> int:
    text = header.get(key, "")
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    if not is_number or int(text) > largest:
        raise ProtocolError(f"an event header has {key}:{text[:40]!a}")
    return int(text)


class Connection(asyncio.Protocol):
    """Says READY, answers each event with OK at once, and tells `on_event` and `on_end`.

    An event that is delivered twice (its listener died before the OK) is handed on once.
    """

    def __init__(
        self, stdout: int, on_event: Callable[[Event], None], on_end: Callable[[str], None]
    ) -> None:
        self._stdout = stdout
        self._on_event = on_event
        self._on_end = on_end
        self._parser = Parser()
        self._last_serial = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._say(_READY)

    def data_received(self, data: bytes) -> None:
        try:
            events = self._parser.feed(data)
        except ProtocolError as error:
            self._on_end(str(error))
            return
        for event in events:
            self._say(_DONE + _READY)
            if event.serial != self._last_serial:
                self._last_serial = event.serial
                self._on_event(event)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_end("supervisord closed stdin")

    def _say(self, words: bytes) -> None:
        try:
            os.write(self._stdout, words)
        except OSError as error:
            self._on_end(f"supervisord does not read stdout: {error.strerror}")
