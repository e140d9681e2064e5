"""supervisord's event protocol, as it comes: in pieces, twice, in any script, or broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters.events import Connection, Event, Parser, ProtocolError

DEADLINE_SECONDS = 5.0


def sent(name: str, serial: int, payload: str, more: str = "") -> bytes:
    """As supervisord sends it: `len` counts characters."""
    head = (
        f"ver:3.0 server:supervisor serial:{serial} pool:synapse poolserial:{serial} "
        f"eventname:{name} {more}len:{len(payload)}\n"
    )
    return (head + payload).encode()


# --- the parser -----------------------------------------------------------------------------------


def test_an_event_is_its_name_serial_and_payload() -> None:
    payload = "processname:a groupname:a from_state:STARTING pid:7"
    data = sent("PROCESS_STATE_RUNNING", 21, payload)
    assert Parser().feed(data) == [Event("PROCESS_STATE_RUNNING", 21, payload)]


def test_length_counts_characters_and_not_bytes() -> None:
    """A reader of bytes would be out of step after the first umlaut."""
    parser = Parser()
    events = parser.feed(sent("A", 1, "größe 日本 🎉") + sent("B", 2, ""))
    assert [(event.name, event.payload) for event in events] == [("A", "größe 日本 🎉"), ("B", "")]


def test_a_payload_may_hold_lines_and_what_looks_like_a_header() -> None:
    payload = "a\nver:3.0 serial:9 len:100\n\n"
    events = Parser().feed(sent("A", 1, payload) + sent("B", 2, "x"))
    assert [event.payload for event in events] == [payload, "x"]


def test_a_value_with_a_colon_is_no_harm() -> None:
    """supervisor's own childutils break on it."""
    (event,) = Parser().feed(sent("A", 1, "x", more="server2:a:b:c bare "))
    assert event.serial == 1


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=6),
    st.lists(st.integers(1, 7), min_size=1, max_size=20),
)
def test_pieces_of_any_size_give_the_same_events(payloads: list[str], sizes: list[int]) -> None:
    data = b"".join(sent("A", number, payload) for number, payload in enumerate(payloads))
    parser, events, position, turn = Parser(), [], 0, 0
    while position < len(data):
        size = sizes[turn % len(sizes)]
        events += parser.feed(data[position : position + size])
        position, turn = position + size, turn + 1
    assert [(event.serial, event.payload) for event in events] == list(enumerate(payloads))


@pytest.mark.parametrize(
    "data",
    [
        b"\n", b"hello\n", b"len:abc serial:1\n", b"len:-1 serial:1\n", b"serial:1\n",
        b"len:0\n", b"len:0 serial:x\n", b"len:99999999999999 serial:1\n",
        "len:\u0663 serial:1\n".encode(), b"len:" + b"9" * 6000 + b" serial:1\n",
        b"len:0 serial:" + b"9" * 6000 + b"\n", b"x" * 5000, b"\x00\xff\xfe\n",
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_not_the_protocol_is_said_to_be_so(data: bytes) -> None:
    """One error of one kind, whatever came."""
    with pytest.raises(ProtocolError):
        Parser().feed(data)


@given(st.binary(max_size=300))
def test_any_bytes_give_events_or_that_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(Parser().feed(data), list)


def test_a_broken_character_in_a_payload_costs_only_itself() -> None:
    """supervisord counts in text: one replacement stands for it."""
    data = sent("A", 1, "a?b").replace(b"a?b", b"a\xffb") + sent("B", 2, "")
    assert [event.name for event in Parser().feed(data)] == ["A", "B"]


# --- the connection -------------------------------------------------------------------------------


class Talk:
    """A connection with both ends of its pipes in our hands."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ends: list[str] = []
        self.changed = asyncio.Event()
        self._said = b""
        self._stdin, self.supervisord = os.pipe()
        self._reader, self.stdout = os.pipe()
        os.set_blocking(self._reader, False)

    async def connect(self) -> None:
        stdin = open(self._stdin, "rb", buffering=0)  # noqa: ASYNC230, SIM115 - a pipe
        self.transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: Connection(self.stdout, self._on_event, self._on_end), stdin
        )

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    def _on_end(self, reason: str) -> None:
        self.ends.append(reason)
        self.changed.set()

    def send(self, data: bytes) -> None:
        os.write(self.supervisord, data)

    def said(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._reader, 65536)
        return self._said

    async def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():  # noqa: ASYNC110 - pipes have no event for it
                await asyncio.sleep(0.001)

        await asyncio.wait_for(wait(), DEADLINE_SECONDS)

    def hang_up(self) -> None:
        if self.supervisord >= 0:
            os.close(self.supervisord)
            self.supervisord = -1

    def close(self) -> None:
        self.hang_up()
        self.transport.close()
        for descriptor in (self._reader, self.stdout):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def talk(story: Callable[[Talk], Awaitable[None]]) -> None:
    async def tell() -> None:
        one = Talk()
        await one.connect()
        try:
            await story(one)
        finally:
            one.close()
            await asyncio.sleep(0)

    asyncio.run(tell())


OK = b"RESULT 2\nOK"
READY = b"READY\n"


def test_each_event_is_answered_with_ok_at_once() -> None:
    """And nothing else is ever written."""

    async def story(one: Talk) -> None:
        await one.until(lambda: one.said() == READY)
        one.send(sent("TICK_5", 1, "when:1"))
        await one.until(lambda: one.said() == READY + OK + READY)
        one.send(sent("TICK_5", 2, "when:2")[:30])
        one.send(sent("TICK_5", 2, "when:2")[30:])
        await one.until(lambda: one.said() == READY + 2 * (OK + READY))
        assert [event.serial for event in one.events] == [1, 2]

    talk(story)


def test_an_event_that_comes_twice_is_answered_twice_and_told_once() -> None:
    """Its first answer may have been lost."""

    async def story(one: Talk) -> None:
        one.send(3 * sent("A", 7, "x") + sent("B", 8, "y"))
        await one.until(lambda: one.said().count(OK) == 4)
        assert [event.serial for event in one.events] == [7, 8]

    talk(story)


def test_a_new_listener_hears_the_event_over_which_the_last_one_died() -> None:
    async def story(one: Talk) -> None:
        one.send(sent("A", 7, "x"))
        await one.until(lambda: len(one.events) == 1)

    talk(story)
    talk(story)


def test_the_end_of_stdin_is_the_end_of_supervisord() -> None:
    async def story(one: Talk) -> None:
        one.hang_up()
        await one.until(lambda: bool(one.ends))
        assert one.ends == ["supervisord closed stdin"]

    talk(story)


@pytest.mark.parametrize("garbage", [b"garbage\n", b"len:" + b"9" * 6000 + b" serial:1\n"])
def test_being_out_of_step_ends_the_listener_with_a_reason(garbage: bytes) -> None:
    async def story(one: Talk) -> None:
        one.send(sent("A", 1, "x") + garbage)
        await one.until(lambda: bool(one.ends))
        assert "event header" in one.ends[0]
        assert len(one.ends[0]) < 200

    talk(story)


def test_a_supervisord_that_reads_no_more_ends_the_listener() -> None:
    """Its end of stdout is closed."""

    async def story(one: Talk) -> None:
        await one.until(lambda: one.said() == READY)
        os.close(one._reader)
        one.send(sent("A", 1, "x"))
        await one.until(lambda: bool(one.ends))
        assert "stdout" in one.ends[0]

    talk(story)
