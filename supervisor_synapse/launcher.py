"""synapse-run: the parent of one llama-server. It leaves nothing behind and kills nothing foreign.

    synapse-run [--drain SECONDS] [--term SECONDS] -- /path/llama-server --model FILE ...

Standard library only, and little of that: one of these stays in memory beside every model, and
its start is part of every start. What it must know of the server (host, port, files, key) it
reads from the server's own command line, so that a block edited by hand stays consistent.

Theory of operation. One process, one thread, one loop: `Signals` makes every signal readable, so
that one poll waits for everything. `next_step` decides, purely; `Launcher` carries out:

    SERVING ── TERM, INT, QUIT, or the parent died ──► DRAINING: asks the server what is under way
    DRAINING ── idle twice, deadline, asked again, or nothing to wait for ──► PRESSING: TERM,
        `--term` seconds later TERM again, as long after that KILL ──► ENDED: reaped, or given up

- Before the start it refuses what cannot work, with a status of its own (`EXIT_…`) and one line.
  A stranger is never killed for a port; the line says who holds it. With `--record FILE` each run
  is named in FILE while it lasts; what a run left behind whose launcher was killed is ended by the
  next: it stands in that run's process group, is ours, and carries FILE in its environment.
- With `--ledger FILE` a model that the listener has not admitted starts only where its memory is
  left by the listener's word; a living listener's word in FILE, else the start goes ahead. What is
  taken is claimed in FILE.claims until the listener counts it, so that two starts by hand do not
  both get the same memory.
- New requests cannot be kept out of the server itself: under steady traffic only a gateway in front
  can drain fully. Where one listens beside the ledger (`gateway.sock`, HAProxy's runtime socket),
  it is told that the model takes no more requests before anything else, and asked how many it has
  passed on that are still under way; at the next start, that the model takes requests again.
- HUP, USR1 and USR2 are passed on to the server.
- On Linux it stops when its parent dies, the server is killed when it dies itself, and whatever
  the server leaves behind becomes its child. Two gaps remain: what the server itself started
  outlives a SIGKILL of the launcher; so does the server on macOS, whose kernel has none of this.
- Whatever the server does or answers: each wait has an end, and each answer a largest size.

The log gets one line before anything else of a run, and one when the run is over:

    synapse-run: start: pid=4711, at=2026-01-31T12:00:00Z
    synapse-run: stopped: drained=1, cut=0, …          (it was asked to)
    synapse-run: ended by itself: server=exit 1, …     (it was not)

Exit status: the server's own when it ends unasked; 128 + n when signal n ended it. Dying by the
same signal would say less: supervisord reports any death by signal as -1, while SIGABRT (out of
memory), SIGBUS (file truncated) and SIGKILL (the kernel's choice) need different remedies. After
a stop that was asked for: 0, or `EXIT_OS_ERROR` where something could not be killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import sys
import time
from enum import Enum
from typing import Any, NamedTuple, assert_never

TYPE_CHECKING = False  # spares an import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

# Exit statuses of our own, numbered as in <sysexits.h>; llama-server itself uses 0 and 1.
EXIT_USAGE = 64  # our command line is wrong
EXIT_MODEL_MISSING = 66  # a model or projector file is missing or cannot be read
EXIT_NO_MEMORY = 69  # by the listener's ledger, the model does not fit now
EXIT_OS_ERROR = 71  # no process could be made, or one could not be killed
EXIT_ENGINE_MISSING = 72  # llama-server is missing or cannot be executed
EXIT_PORT_IN_USE = 75  # someone else listens there
EXIT_SIGNAL_BASE = 128  # + n: the server was ended by signal n

_BUSY_POLL_SECONDS = 0.1
_CONFIRM_SECONDS = 0.05  # between the two looks that must both find nothing under way
_GATEWAY_SECONDS = 0.5  # it answers within a millisecond
_EXCHANGE_SECONDS = 1.0  # a healthy server answers within 10 ms, whatever it is decoding
_WORKING_SHARE = 0.05  # an idle server takes 0.01 of a core, one that decodes takes cores
# How long what was killed may take to go (a driver gives memory back). supervisord kills us 5 s
# after the second `--term`; the last line must be out by then.
_KILL_SECONDS = 4.0
_PARENT_POLL_SECONDS = 1.0  # only where the kernel does not tell of a parent's death
_SAY_SECONDS = 1.0
_LONGEST_LINE = 4000  # bytes; a pipe that is ready takes 4096 at once
_LARGEST_REPLY_BYTES = 1 << 20
_LARGEST_KEY_FILE_BYTES = 1 << 16
_LONGEST_KEY = 4096
_LARGEST_LEDGER_BYTES = 1 << 20  # 200 models take 40 KiB
_LOCK_SECONDS = 1.0  # a claim takes a millisecond

_USAGE = (
    "usage: synapse-run [--drain SECONDS] [--term SECONDS] [--record FILE [--ledger FILE]] "
    "-- LLAMA_SERVER [ARGUMENT ...]"
)

_HINTS = {
    "SIGILL": "illegal instruction: engine built for a newer processor than this one",
    "SIGBUS": "a file in use was cut short, or cannot be read any more",
    "SIGKILL": "by somebody, or by the kernel because memory ran out",
}


# --- the stop sequence: pure -----------------------------------------------------------------


class Policy(NamedTuple):
    """How much patience a stop has, in seconds."""

    drain_seconds: float = 30.0
    term_seconds: float = 2.0  # llama-server heeds a second TERM that comes at least 0.5 s later


class Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # waiting for requests to finish
    PRESSING = "pressing"  # ever stronger means were sent
    ENDED = "ended"  # the server is gone, or even KILL did not help


class Sight(Enum):
    """What a look at the server found."""

    LOAD = "load"  # it says, or its connections show, how much is under way
    LOADING = "loading"
    ASLEEP = "asleep"
    REFUSED = "refused"  # nobody listens
    SILENT = "silent"  # no answer in time, and no work done meanwhile
    WORKING = "working"  # no answer in time: some builds answer between two batches only
    UNKNOWN = "unknown"  # nothing was learned: it does not say, or we could not ask


class Why(Enum):
    """What ended the drain, where it was not a `Sight`."""

    IDLE = "idle"
    DEADLINE = "deadline"
    ASKED_AGAIN = "asked-again"
    NO_DRAIN = "no-drain"
    EXITED = "exited"  # the server ended before anything was sent to it


class Look(NamedTuple):
    """One answer to: how many requests are under way?"""

    sight: Sight
    requests: int = 0  # in a slot or waiting for one


class StopAsked(NamedTuple):
    by: str  # a signal's name, or `PARENT_DIED`


class Exited(NamedTuple):
    status: int  # of the reaped server, as from waitpid


class Tick(NamedTuple):
    """`State.wake_at` has come."""


PARENT_DIED = "parent-died"
Seen = StopAsked | Look | Exited | Tick


class Action(Enum):
    LOOK = "look"
    TERM = "term"
    KILL = "kill"


class State(NamedTuple):
    """Where a stop is. Times are monotonic seconds."""

    phase: Phase = Phase.SERVING
    wake_at: float = float("inf")  # when a Tick is due
    asked_by: str | None = None
    asked_at: float = 0.0
    drain_until: float = 0.0
    requests: int | None = None  # under way at the last look that could tell
    last: Sight = Sight.UNKNOWN  # what the last look found, if anything
    drained: int = 0  # by how many the requests under way have become fewer
    why: Why | Sight | None = None  # the drain ended
    sent: str = "none"  # the strongest means that was used
    status: int | None = None  # of the ended server, as from waitpid; None: it did not end

    @property
    def cut(self) -> int | None:
        """Requests under way when the drain ended; None: unknown."""
        surely_idle = self.why in (Sight.LOADING, Sight.ASLEEP, Sight.REFUSED)
        return 0 if self.requests is None and surely_idle else self.requests


_Step = tuple[State, tuple[Action, ...]]


def next_step(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    """What was seen, and when → the new state, and what to do now."""
    if isinstance(seen, Exited):
        why = Why.EXITED if state.phase is Phase.DRAINING else state.why
        return state._replace(phase=Phase.ENDED, status=seen.status, why=why), ()
    match state.phase:
        case Phase.SERVING:
            return _serving(state, seen, now, policy)
        case Phase.DRAINING:
            return _draining(state, seen, now, policy)
        case Phase.PRESSING:
            is_due = isinstance(seen, Tick) and now >= state.wake_at
            return _press(state, now, policy) if is_due else (state, ())
        case Phase.ENDED:
            return state, ()
        case _:
            assert_never(state.phase)


def _serving(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    if not isinstance(seen, StopAsked):
        return state, ()
    state = state._replace(asked_by=seen.by, asked_at=now)
    if policy.drain_seconds <= 0:
        return _press(state._replace(why=Why.NO_DRAIN), now, policy)
    until = now + policy.drain_seconds
    draining = state._replace(phase=Phase.DRAINING, drain_until=until, wake_at=until)
    return draining, (Action.LOOK,)


def _draining(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    """A look is either under way (`wake_at` is the deadline) or due at `wake_at`."""
    why: Why | Sight | None = None
    if isinstance(seen, StopAsked) and seen.by != PARENT_DIED:  # that is not lost patience
        why = Why.ASKED_AGAIN
    if isinstance(seen, Look):
        state, why = _weigh(state, seen)
    if why is None and now >= state.drain_until:
        why = Why.DEADLINE
    if why is not None:
        return _press(state._replace(why=why), now, policy)
    if isinstance(seen, Look):
        pause = _CONFIRM_SECONDS if _found_idle(state) else _BUSY_POLL_SECONDS
        return state._replace(wake_at=min(now + pause, state.drain_until)), ()
    if isinstance(seen, Tick) and now >= state.wake_at:
        return state._replace(wake_at=state.drain_until), (Action.LOOK,)
    return state, ()


def _found_idle(state: State) -> bool:
    return state.last is Sight.LOAD and not state.requests


def _weigh(state: State, look: Look) -> tuple[State, Why | Sight | None]:
    """Remember what a look found; with a reason if nothing is to be waited for."""
    seen = state._replace(last=look.sight)
    match look.sight:
        case Sight.UNKNOWN:
            return state, None  # no evidence, no change: a busy server has until its deadline
        case Sight.LOADING | Sight.ASLEEP | Sight.REFUSED:
            return seen, look.sight
        case Sight.WORKING:
            return seen, None
        case Sight.SILENT:  # once may be chance
            return seen, look.sight if state.last is Sight.SILENT else None
        case Sight.LOAD:
            fewer = max(0, (state.requests or 0) - look.requests)
            seen = seen._replace(requests=look.requests, drained=state.drained + fewer)
            # Once is not enough: a request between the queue and its slot shows in neither.
            return seen, Why.IDLE if _found_idle(state) and _found_idle(seen) else None
        case _:
            assert_never(look.sight)


def _press(state: State, now: float, policy: Policy) -> _Step:
    """The next stronger means, each after its time: not even a third TERM makes it faster."""
    patience, action = policy.term_seconds, Action.TERM
    match state.sent:
        case "none":
            sent = "TERM"
        case "TERM":
            sent = "TERM+TERM"
        case "TERM+TERM":
            sent, patience, action = "KILL", _KILL_SECONDS, Action.KILL
        case _:
            return state._replace(phase=Phase.ENDED), ()
    return state._replace(phase=Phase.PRESSING, sent=sent, wake_at=now + patience), (action,)


def last_line(state: State, seconds: float, left: Sequence[int] = ()) -> str:
    """The one line about an end; `seconds` since the stop was asked for, else since the start."""
    server = "alive" if state.status is None else describe_status(state.status)
    event, words = "ended by itself", {"server": server, "seconds": f"{seconds:.2f}"}
    if state.asked_by is not None:
        event, words = "stopped", {
            "drained": str(state.drained),
            "cut": "unknown" if state.cut is None else str(state.cut),
            "deadline_hit": "yes" if state.why is Why.DEADLINE else "no",
            "seconds": f"{seconds:.2f}",
            "signal": state.sent,
            "asked_by": state.asked_by,
            "drain_ended_by": state.why.value if state.why else "nothing",
            "server": server,
        }  # fmt: skip
    if left:
        words["left_behind"] = "+".join(map(str, left))
    hint = f" ({_HINTS[server]})" if state.sent == "none" and server in _HINTS else ""
    return f"{event}: " + ", ".join(f"{name}={value}" for name, value in words.items()) + hint


def describe_status(status: int) -> str:
    """A wait status in words: `exit 1`, `SIGABRT`."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def exit_status(state: State) -> int:
    """What we exit with: see the module's docstring."""
    if state.status is None:
        return EXIT_OS_ERROR
    code = os.waitstatus_to_exitcode(state.status)
    was_told = state.asked_by is not None and -code in _STOP_SIGNALS  # by whom we were told, too
    if state.sent != "none" or was_told:
        return 0
    return code if code >= 0 else EXIT_SIGNAL_BASE - code


# --- command lines ---------------------------------------------------------------------------


class StartError(Exception):
    """The server is not started; `str()` says why in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Server(NamedTuple):
    """What the server's own command line and environment say of it."""

    argv: tuple[str, ...]
    files: tuple[str, ...]
    host: str
    port: int  # 0: unknown
    prefix: str  # before each path
    key: str
    key_file: str
    shares_port: bool


class Command(NamedTuple):
    """What we were told."""

    policy: Policy
    server: Server
    record: str  # "": none is kept
    ledger: str  # "": nobody is asked whether there is memory


def parse_command(words: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Our own command line: options up to `--`, then the server's (StartError: `EXIT_USAGE`)."""
    said = {"--drain": "", "--term": "", "--record": "", "--ledger": ""}
    rest = list(words)
    while rest and rest[0] != "--":
        name, equals, value = rest.pop(0).partition("=")
        if name not in said:
            raise StartError(EXIT_USAGE, f"unknown option {name!a}; {_USAGE}")
        if not equals:
            value = rest.pop(0) if rest else ""
        if not value:
            raise StartError(EXIT_USAGE, f"{name} takes a value; {_USAGE}")
        said[name] = value
    if len(rest) < 2:
        raise StartError(EXIT_USAGE, f"no server to run; {_USAGE}")
    if said["--ledger"] and not said["--record"]:
        raise StartError(EXIT_USAGE, f"--ledger takes a --record, which names the model; {_USAGE}")
    usual = Policy()
    policy = Policy(
        _seconds("--drain", said["--drain"] or str(usual.drain_seconds)),
        _seconds("--term", said["--term"] or str(usual.term_seconds)),
    )
    server = parse_server(rest[1:], environment)
    return Command(policy, server, said["--record"], said["--ledger"])


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise StartError(EXIT_USAGE, f"{name} takes seconds, not {text!a}; {_USAGE}")
    return value


def parse_server(argv: Sequence[str], environment: Mapping[str, str]) -> Server:
    """Find in a llama-server command line what we must know.

    As there, the last of several wins, and a variable stands in for an option that is not given.
    """

    def said(variable: str, *names: str, otherwise: str = "") -> str:
        return _last_value(argv, names) or environment.get(variable) or otherwise

    files = said("LLAMA_ARG_MODEL", "--model", "-m"), said("LLAMA_ARG_MMPROJ", "--mmproj", "-mm")
    return Server(
        argv=tuple(argv),
        files=tuple(file for file in files if file),
        host=said("LLAMA_ARG_HOST", "--host", otherwise="127.0.0.1"),
        port=_port(said("LLAMA_ARG_PORT", "--port", otherwise="8080")),
        prefix=said("LLAMA_ARG_API_PREFIX", "--api-prefix"),
        key=said("LLAMA_API_KEY", "--api-key").partition(",")[0],
        key_file=said("LLAMA_ARG_API_KEY_FILE", "--api-key-file"),
        shares_port="--reuse-port" in argv or "LLAMA_ARG_REUSE_PORT" in environment,
    )


def _last_value(argv: Sequence[str], names: tuple[str, ...]) -> str:
    """What follows the last of an option's spellings: `--port 1` or `--port=1`."""
    last = ""
    for place, word in enumerate(argv[1:], start=2):
        name, equals, value = word.partition("=")
        if name in names and equals:
            last = value
        elif word in names and place < len(argv):
            last = argv[place]
    return last


def _port(text: str) -> int:
    is_number = text.isascii() and text.isdecimal() and len(text) < 6
    return int(text) if is_number and int(text) < 65536 else 0


# --- preflight -------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where a server listens, ready for `socket`."""

    family: int
    target: Any


def preflight(server: Server) -> Address | None:
    """The server's address; None: unknown (StartError: it could only fail)."""
    for file in server.files:
        _require_file(file)
    address = resolve(server)
    if address is not None and not server.shares_port:
        _require_free(server, address)
    return address


def _require_file(path: str) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StartError(EXIT_MODEL_MISSING, f"cannot serve {path!a}: not a file")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise StartError(EXIT_MODEL_MISSING, f"cannot serve {path!a}: {error.strerror}") from None


def resolve(server: Server) -> Address | None:
    """The address that the server will listen on; a name is looked up as the server does it."""
    if not server.port:
        return None
    try:
        # As bytes: text would load the tables for international names.
        found = socket.getaddrinfo(
            os.fsencode(server.host), server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError:
        return None
    return Address(found[0][0], found[0][4])


def _require_free(server: Server, address: Address) -> None:
    with socket.socket(address.family, socket.SOCK_STREAM) as probe:
        # With this option, connections of an earlier server that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(address.target)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # the server meets the same error and knows more of it
            taken = f"cannot listen on {server.host}:{server.port}: {_holders(server.port)}"
            raise StartError(EXIT_PORT_IN_USE, taken) from None


def _holders(port: int) -> str:
    """Who holds a port, as far as we may know."""
    sockets = {f"socket:[{inode}]" for state, inode in tcp_rows(port) if state == _LISTEN}
    names = [f"pid {pid} ({_read(f'/proc/{pid}/comm').decode(errors='replace').strip()!a})"
             for pid in sorted(_processes()) if sockets.intersection(_open_files(pid))]  # fmt: skip
    return "already in use" + (f" by {', '.join(names)}" if names else "")


# --- memory, by the listener's word ----------------------------------------------------------

_LEDGER_VERSION = 1


class Claim(NamedTuple):
    """What a launcher has taken that started a model by hand."""

    pid: int
    started: int  # see `ticks_of`
    needs: Mapping[str, int]  # bytes by device


class Word(NamedTuple):
    """What the ledger says about a model that the listener has not admitted."""

    listener: tuple[int, int]  # pid, started
    needs: Mapping[str, int]  # bytes by device
    room: Mapping[str, int]  # bytes by device; a device that is missing could not be read
    counted: frozenset[tuple[int, int]]  # launchers whose models `room` knows of: pid, started
    could_stop: str


def require_memory(ledger: str, model: str) -> None:
    """Claim the memory of a model that was not admitted (StartError: there is not enough).

    The ledger is read again under the lock: while that was waited for, it may have been rewritten.
    """
    if read_word(ledger, model) is None:
        return
    lock = take_lock(f"{ledger}.lock")
    if lock is None:
        return
    try:
        word = read_word(ledger, model)
        if word is not None:
            _claim(f"{ledger}.claims", word, model)
    finally:
        os.close(lock)


def _claim(path: str, word: Word, model: str) -> None:
    us = os.getpid()
    claims = [claim for claim in parse_claims(_read(path, _LARGEST_LEDGER_BYTES))
              if claim.pid != us and is_alive(claim.pid, claim.started)]  # fmt: skip
    if lacks := what_lacks(word, claims):
        raise StartError(EXIT_NO_MEMORY, refusal(model, lacks, word.could_stop))
    write_claims(path, [*claims, Claim(us, ticks_of(us), word.needs)])


def gateway_of(ledger: str) -> str:
    """The gateway's runtime socket, which stands beside the ledger."""
    return os.path.join(os.path.dirname(ledger), "gateway.sock") if ledger else ""


def model_of(record: str) -> str:
    """The model's name, by which the ledger knows it: its record is `NAME.run`."""
    return os.path.basename(record).removesuffix(".run")


def read_word(ledger: str, model: str) -> Word | None:
    """What a living listener says about the model; None: nothing against a start."""
    word = parse_ledger(_read(ledger, _LARGEST_LEDGER_BYTES), model)
    return word if word is not None and is_alive(*word.listener) else None


def parse_ledger(text: bytes, model: str) -> Word | None:
    """What a ledger says; None: the model was admitted or is not in it, or it makes no sense."""
    ledger: Any = _json(text) if text else None
    try:
        entry, listener = ledger["models"][model], ledger["listener"]
        if _whole(ledger["version"]) != _LEDGER_VERSION or entry["admitted"] is not False:
            return None
        if not isinstance(entry["could_stop"], str):
            return None
        return Word(
            listener=_process(listener["pid"], listener["started"]),
            needs=_by_device(entry["needs"], least=0),
            room=_by_device(ledger["room"], least=-_LARGEST_NUMBER),
            counted=frozenset(_process(pid, started) for pid, started in ledger["counted"]),
            could_stop=entry["could_stop"],
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def parse_claims(text: bytes) -> list[Claim]:
    """The claims of a file, without those that make no sense."""
    found = _json(text) if text else None
    claims = []
    for claim in found if isinstance(found, list) else ():
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            pid, started = _process(claim["pid"], claim["started"])
            claims.append(Claim(pid, started, _by_device(claim["needs"], least=0)))
    return claims


_LARGEST_NUMBER = (1 << 63) - 1


def _process(pid: Any, started: Any) -> tuple[int, int]:
    return _whole(pid, 1, (1 << 31) - 1), _whole(started)


def _by_device(sizes: Any, least: int) -> dict[str, int]:
    return {device: _whole(size, least) for device, size in sizes.items()}


def _whole(value: Any, least: int = 0, most: int = _LARGEST_NUMBER) -> int:
    if type(value) is int and least <= value <= most:  # True is an int as well
        return value
    raise ValueError


def what_lacks(word: Word, claims: Iterable[Claim]) -> list[str]:
    """Where a model does not fit beside the claims of others, in words; empty: it fits."""
    unseen = [claim for claim in claims if (claim.pid, claim.started) not in word.counted]
    lacks = []
    for device, need in word.needs.items():
        if device not in word.room:
            if need:
                lacks.append(f"{-(-need >> 20)} MiB on {device}, whose memory could not be read")
            continue
        left = word.room[device] - sum(claim.needs.get(device, 0) for claim in unseen)
        if need > max(0, left):  # rounded so that the words show it too
            lacks.append(f"{-(-need >> 20)} MiB on {device}, {max(0, left) >> 20} MiB left")
    return lacks


def refusal(model: str, lacks: Iterable[str], could_stop: str) -> str:
    """The line about it, in printable ASCII whatever the names are."""
    line = f"{model} does not fit: needs {' and '.join(lacks)}"
    line += f"; could be stopped: {could_stop}" if could_stop else ""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in line)


def take_lock(path: str) -> int | None:
    """What holds the lock until it is closed; None: it is not to be had within a second."""
    import fcntl  # seldom needed

    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
    except OSError:
        return None
    until = time.monotonic() + _LOCK_SECONDS
    while stat.S_ISREG(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        if time.monotonic() >= until:
            break
        time.sleep(0.01)
    os.close(fd)
    return None


def write_claims(path: str, claims: Iterable[Claim]) -> None:
    """Replace the claims, under the lock. Made anew, so that no link leads the writing astray."""
    import json

    temporary = f"{path}.new"
    text = json.dumps([claim._asdict() for claim in claims])
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600), "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:  # a full disk costs only this
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def is_alive(pid: int, started: int) -> bool:
    """Whether that very process lives; where there is no /proc, one of that number."""
    if sys.platform == "linux":
        return ticks_of(pid) == started > 0
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def ticks_of(pid: int) -> int:
    """When a process was started, in clock ticks since the boot; 0: it has ended, or no /proc."""
    return int(_start_of(pid) or 0) if sys.platform == "linux" else 0


# --- what an earlier run left behind ---------------------------------------------------------

_MARK = "SYNAPSE_RECORD"  # in the environment of a server: the file that names its run


def end_orphans(record: str) -> list[int]:
    """Kill what a run left whose launcher was killed, and who it was; strangers are never touched.

    A number is not given to another process while a group of that number has members, so the
    group of a dead launcher is its own unless somebody leads it anew.
    """
    pid, _, start = _read(record, 200).decode(errors="replace").strip().partition(" ")
    if not pid.isdecimal() or not start or _start_of(int(pid)):
        return []  # no run, one that lives, or a number that is someone else's by now
    ended = [member for member in _members_of(int(pid)) if _kill_marked(member, record)]
    until = time.monotonic() + _KILL_SECONDS
    while any(map(_is_going, ended)) and time.monotonic() < until:
        time.sleep(0.01)
    return ended


def _is_going(pid: int) -> bool:
    """Whether it lives, or is a zombie with threads that have still to let go of its port."""
    if _start_of(pid):
        return True
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def write_record(record: str) -> None:
    """Name this run: our number, and when we were started."""
    temporary = f"{record}.new"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(_our_record())
        os.replace(temporary, record)
    except OSError:  # a full disk costs only this
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def clear_record(record: str) -> None:
    """This run has left nothing behind. Another run's word is not ours to remove."""
    if _read(record, 200) == _our_record().encode():
        with contextlib.suppress(OSError):
            os.unlink(record)


def _our_record() -> str:
    return f"{os.getpid()} {_start_of(os.getpid())}\n"


def _start_of(pid: int) -> str:
    """When a process was started, as the system has it; "": there is none, or it is a zombie."""
    if sys.platform == "linux":
        words = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return words[19].decode() if len(words) > 19 and words[0] not in b"ZX" else ""
    return _ps(pid, "lstart=")


def _members_of(group: int) -> list[int]:
    if sys.platform == "darwin":
        return sorted(_group_members(group))
    return [pid for pid in _processes() if _group_of(pid) == group]


def _group_of(pid: int) -> int:
    words = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(words[2]) if len(words) > 2 else 0


def _kill_marked(pid: int, record: str) -> bool:
    """Whether it was ours, and is killed. Its number is held while we look."""
    try:
        held = os.pidfd_open(pid) if sys.platform == "linux" else -1
    except OSError:
        return False
    try:
        if not _is_marked(pid, record):
            return False
        if held >= 0:
            signal.pidfd_send_signal(held, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    finally:
        if held >= 0:
            os.close(held)
    return True


def _is_marked(pid: int, record: str) -> bool:
    mark = f"{_MARK}={record}"
    if sys.platform == "linux":
        is_ours = os.stat(f"/proc/{pid}").st_uid == os.getuid()
        return is_ours and os.fsencode(mark) in _read(f"/proc/{pid}/environ").split(b"\0")
    return _ps(pid, "uid=") == str(os.getuid()) and mark in _ps(pid, "command=", "-E").split()


def _ps(pid: int, column: str, *options: str) -> str:
    import subprocess  # seldom needed

    run = subprocess.run(
        ["/bin/ps", *options, "-ww", "-o", column, "-p", str(pid)], capture_output=True, check=False
    )
    return run.stdout.decode(errors="replace").strip()


# --- looking at the server -------------------------------------------------------------------


_Reply = tuple[int, bytes]  # status and body; 0: it could not be read as one


class Gateway:
    """HAProxy's runtime socket, as far as one model is concerned. None there: nothing happens."""

    def __init__(self, path: str, model: str, interrupt: int) -> None:
        self._path, self._model, self._interrupt = path, model, interrupt

    def withdraw(self) -> None:
        """New requests get no server of this model; those under way go on."""
        self._ask(f"set server {self._model}/model state drain")

    def admit(self) -> None:
        """It takes requests as soon as it answers.

        HAProxy may still believe in the run before, and pass requests on to one that loads.
        """
        server = f"set server {self._model}/model"
        self._ask(f"{server} health down; {server} state ready")

    def requests(self) -> int:
        """How many it has passed on to the model that are still under way."""
        lines = self._ask(f"show stat {self._model} 4 -1").decode("ascii", "replace").splitlines()
        table = [line.removeprefix("# ").split(",") for line in lines if "," in line]
        try:
            (row,) = (row for row in table[1:] if row[1] == "model")
            return max(0, int(row[table[0].index("scur")]))
        except (IndexError, ValueError):
            return 0

    def _ask(self, command: str) -> bytes:
        if not self._path:
            return b""
        until = time.monotonic() + _GATEWAY_SECONDS
        address = Address(socket.AF_UNIX, self._path)
        try:
            return _exchange(address, f"{command}\n".encode(), until, self._interrupt)
        except OSError:  # none, one that is restarted, or a signal for us: as if there were none
            return b""


class Window:
    """Asks a server what is under way, and no longer than until `interrupt` can be read.

    Its questions depend on what the server has already shown that it can answer.
    """

    def __init__(
        self, server: Server, address: Address | None, interrupt: int, gateway: Gateway
    ) -> None:
        self._server = server
        self._address = address
        self._interrupt = interrupt
        self._gateway = gateway
        # /props comes first, and once: the others would wake a sleeping server.
        self._paths = ["/props", "/slots", "/metrics"]

    def look(self, until: float) -> Look:
        """Ask once the server, and where it has nothing under way, the gateway, too."""
        look = self._look(until)
        if look.sight is Sight.LOAD and not look.requests:
            return look._replace(requests=self._gateway.requests())
        return look

    def _look(self, until: float) -> Look:
        """Each question has its own deadline; the first unanswered one ends the look."""
        if self._address is None:
            return self._connections()
        bodies: dict[str, bytes] = {}
        for path in tuple(self._paths):
            reply = self._ask(self._address, path, until)
            if isinstance(reply, Sight):
                return Look(reply)
            status, body = reply
            if status == 503:
                return Look(Sight.LOADING)
            if path == "/props" and is_sleeping(body):
                return Look(Sight.ASLEEP)
            if status == 200:
                bodies[path] = body
            if path == "/props" or status not in (200, 0):
                self._paths.remove(path)  # 404, 501, 403, 401: it will not say otherwise later
        return load_of(bodies.get("/slots"), bodies.get("/metrics")) or self._connections()

    def _ask(self, address: Address, path: str, until: float) -> _Reply | Sight:
        # In HTTP/1.0 the end of the connection is the end of the answer.
        request = os.fsencode(f"GET {self._server.prefix}{path} HTTP/1.0\r\nHost: localhost\r\n")
        key = read_key(self._server)
        authorization = b"Authorization: Bearer " + key + b"\r\n" if key else b""
        until = min(until, time.monotonic() + _EXCHANGE_SECONDS)
        return fetch(address, request + authorization + b"\r\n", until, self._interrupt)

    def _connections(self) -> Look:
        """A server that does not say (TLS, no endpoint, no key): open connections say for it.

        Idle ones count as well; llama-server closes them after 5 s.
        """
        states = [state for state, _ in tcp_rows(self._server.port)]
        if _LISTEN not in states:
            return Look(Sight.UNKNOWN)  # the table cannot be read, or is not the server's
        return Look(Sight.LOAD, states.count(_ESTABLISHED))


def fetch(address: Address, request: bytes, until: float, interrupt: int) -> _Reply | Sight:
    """Send `request`, read the reply; without one: REFUSED, SILENT, or UNKNOWN (it may be us)."""
    try:
        return parse_reply(_exchange(address, request, until, interrupt))
    except ConnectionRefusedError:
        return Sight.REFUSED
    except ConnectionError:
        return 0, b""  # it is there, and does not speak HTTP with us
    except TimeoutError:
        return Sight.SILENT
    except OSError:
        return Sight.UNKNOWN  # a signal came, no descriptor, no memory: nothing about the server


def _exchange(address: Address, request: bytes, until: float, interrupt: int) -> bytes:
    received = b""
    with socket.socket(address.family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(address.target)
        _await(connection, select.POLLOUT, until, interrupt)
        if problem := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(problem, "cannot connect")
        connection.send(request)  # smaller than any socket's buffer
        while len(received) <= _LARGEST_REPLY_BYTES:
            _await(connection, select.POLLIN, until, interrupt)
            if not (piece := connection.recv(1 << 16)):
                break
            received += piece
    return received


def _await(connection: socket.socket, events: int, until: float, interrupt: int) -> None:
    fd = connection.fileno()
    ready = poll({fd: events, interrupt: select.POLLIN}, until)
    if interrupt in ready:
        raise InterruptedError
    if fd not in ready or time.monotonic() >= until:  # one that trickles is always ready
        raise TimeoutError


def parse_reply(received: bytes) -> _Reply:
    """The status and the body of an HTTP reply."""
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return 0, b""
    return int(words[1][:4]), body


def load_of(slots: bytes | None, metrics: bytes | None) -> Look | None:
    """What the bodies of /slots and /metrics say together; None where they say nothing.

    They are asked one after the other, so that each may know of a request that the other missed.
    """
    busy = None if slots is None else parse_slots(slots)
    gauges = None if metrics is None else parse_metrics(metrics)
    if busy is None and gauges is None:
        return None
    processing, deferred = gauges or (0, 0)
    return Look(Sight.LOAD, max(busy or 0, processing) + deferred)


def parse_slots(body: bytes) -> int | None:
    """How many slots are in work; None where the body is not what /slots answers."""
    slots = _json(body)
    try:
        busy = [slot["is_processing"] for slot in slots]
    except (TypeError, KeyError):
        return None
    return sum(busy) if busy and all(isinstance(is_busy, bool) for is_busy in busy) else None


def is_sleeping(body: bytes) -> bool:
    """Whether /props says so; builds that do not know of sleep do not."""
    props = _json(body)
    return isinstance(props, dict) and props.get("is_sleeping") is True


def _json(text: bytes) -> Any:
    import json  # seldom needed: the rest of the time it would only take memory

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_metrics(body: bytes) -> tuple[int, int] | None:
    """Requests (in work, waiting for a slot); None where the body does not say."""
    found = {name: value for name, _, value in (line.partition(b" ") for line in body.splitlines())}
    try:
        processing = float(found[b"llamacpp:requests_processing"])
        deferred = float(found.get(b"llamacpp:requests_deferred", b"0"))
        return max(0, int(processing)), max(0, int(deferred))
    except (KeyError, ValueError, OverflowError):
        return None


def read_key(server: Server) -> bytes | None:
    """The first API key that the server accepts, fit for a header; None where there is none."""
    text = os.fsencode(server.key)
    if server.key_file and not text:
        text = _read(server.key_file, _LARGEST_KEY_FILE_BYTES)
    keys = [key for line in text.splitlines() if (key := line.strip()) and line[:1] != b"#"]
    return keys[0] if keys and len(keys[0]) <= _LONGEST_KEY and min(keys[0]) > 31 else None


# --- the operating system --------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
_PROC_PGRP_ONLY = 2  # <sys/proc_info.h> of macOS
_ESTABLISHED, _LISTEN = 0x01, 0x0A  # <linux/tcp_states.h>

# A signal of its own for the parent's death: TERM could come from anyone. It only wakes us: the
# kernel also sends it when just the thread that started us ends. 0: the kernel has no such thing.
if sys.platform == "linux":
    _PARENT_SIGNAL: int = signal.SIGRTMIN + 7
else:
    _PARENT_SIGNAL = 0

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_CHANGED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # ignored by us, not by what we start


def tcp_rows(port: int) -> list[tuple[int, int]]:
    """(state, inode) of sockets whose own port this is; none where the kernel shows no table."""
    return parse_tcp_table(_read("/proc/self/net/tcp") + _read("/proc/self/net/tcp6"), port)


def parse_tcp_table(text: bytes, port: int) -> list[tuple[int, int]]:
    """Rows of /proc/net/tcp: number, local address, remote address, state, …, inode (10th)."""
    rows = [words for line in text.splitlines() if len(words := line.split()) > 9]
    ending = b":%04X" % port
    return [(int(row[3], 16), int(row[9])) for row in rows if row[1].endswith(ending)]


def _open_files(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # gone, or not ours to look into
        for fd in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed meanwhile
                yield os.readlink(f"{folder}/{fd}")


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return []


def _read(path: str, limit: int = 1 << 24) -> bytes:
    """At most `limit` bytes of a file; nothing where it cannot be read."""
    text = b""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            while len(text) < limit and (piece := file.read(min(limit - len(text), 1 << 16))):
                text += piece
    return text


def poll(events: Mapping[int, int], until: float) -> set[int]:
    """Which descriptors are ready, as soon as one is or it is `until` (monotonic seconds)."""
    poller = select.poll()
    for fd, wanted in events.items():
        poller.register(fd, wanted)
    seconds = max(0.0, until - time.monotonic())
    # Rounded up: a poll that returns too early would only be repeated.
    timeout = None if seconds == float("inf") else int(min(seconds, 1e6) * 1000) + 1
    return {fd for fd, _ in poller.poll(timeout)}


def _load_prctl() -> Callable[[int, int], object]:
    """prctl(2); where there is none, what does nothing."""
    if sys.platform != "linux":
        return lambda _option, _value: None
    import ctypes

    prctl, zero = ctypes.CDLL(None).prctl, ctypes.c_ulong(0)
    return lambda option, value: prctl(
        ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero
    )


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far; 0 where it cannot be told.

    The clock's number is what clock_getcpuclockid(3) makes of a pid on Linux.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2) if sys.platform == "linux" else 0.0
    except OSError:
        return 0.0


class Family:
    """The processes that are ours to reap and to kill: the server and what it leaves behind.

    On Linux the orphans of a descendant become our children, and only children are ever killed:
    nobody else can reap them, so that a number always means the process that it was read for.
    Children that were there before (whoever replaced itself by us had them) are strangers. Where
    there are such, their orphans would be strangers too: then we adopt none.
    """

    def __init__(self, prctl: Callable[[int, int], object]) -> None:
        self._is_childless = False
        self._strangers: frozenset[int] = frozenset()
        self.reap()
        self._strangers = frozenset(self.left())
        if not self._strangers:
            prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def reap(self) -> dict[int, int]:
        """The wait status of each child that has ended since, by pid."""
        ended = {}
        self._is_childless = False
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
        except ChildProcessError:
            self._is_childless = True
        return ended

    def left(self) -> list[int]:
        """Who was still there at the last `reap`."""
        if sys.platform == "darwin":
            members = _group_members(os.getpgrp()) - {os.getpid()}
        elif self._is_childless:
            return []  # by the kernel's word: no need to look
        else:
            members = {pid for pid in _processes() if _parent_of(pid) == os.getpid()}
        return sorted(members - self._strangers)

    def kill(self, pids: Iterable[int]) -> None:
        """What refuses (it changed its user) is reported as left."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _parent_of(pid: int) -> int:
    """From /proc/PID/stat: number, (name, which may hold anything), state, parent; 0: gone."""
    words = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(words[1]) if len(words) > 1 else 0


def _group_members(group: int) -> set[int]:
    """On macOS, where orphans go to launchd: all of our group, which we lead."""
    import ctypes

    pids = (ctypes.c_int * 4096)()
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    size = library.proc_listpids(_PROC_PGRP_ONLY, group, pids, ctypes.sizeof(pids))
    return {pid for pid in pids[: max(0, size) // ctypes.sizeof(ctypes.c_int)] if pid > 0}


class Signals:
    """All signals as a readable file descriptor, so that one poll waits for everything."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        # What our parent had us ignore (nohup, a shell's background job) stays ignored.
        optional = [*_STOP_SIGNALS, *_PASSED_SIGNALS]
        heeded = {n for n in optional if signal.getsignal(n) is not signal.SIG_IGN}
        self._ours: set[int] = {*heeded, signal.SIGCHLD, signal.SIGTERM}
        if _PARENT_SIGNAL:
            self._ours.add(_PARENT_SIGNAL)
        for number in self._ours:
            signal.signal(number, lambda *_: None)

    def read(self) -> list[int]:
        """The numbers of the signals that came since, in their order."""
        try:
            return list(os.read(self.fd, 4096))
        except BlockingIOError:
            return []

    def spawn(self, become: Callable[[], None]) -> int:
        """Fork; the child runs `become`, and should not return, with all signals as we found them.

        Signals are held back meanwhile: one that the child got would be written into our pipe.
        """
        former = signal.pthread_sigmask(signal.SIG_BLOCK, self._ours)
        try:
            pid = os.fork()
        except OSError as error:
            raise StartError(EXIT_OS_ERROR, f"cannot make a process: {error.strerror}") from None
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                for number in (*self._ours, *_CHANGED_BY_PYTHON):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
                become()
            finally:
                os._exit(EXIT_ENGINE_MISSING)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._ours)
        return pid


def say(line: str, *, afresh: bool = False) -> None:
    """One line on stderr, in one write: the server writes there as well.

    `afresh`: whoever wrote before may have left a line unfinished. A pipe that stays full, or that
    nobody reads any more, must not hold us up.
    """
    text = f"synapse-run: {' '.join(line.splitlines())}".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        if poll({2: select.POLLOUT}, time.monotonic() + _SAY_SECONDS):
            os.write(2, b"\n" * afresh + text[:_LONGEST_LINE] + b"\n")


def open_missing_streams() -> None:
    """Whatever is opened next would get the number of a closed one: a log written to a socket."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def parent_died_before(environment: Mapping[str, str]) -> bool:
    """Whether supervisord died before we could ask to be told of it.

    Then the pipe that it holds to our stdin is closed, and whoever adopted us is of another
    session. Each alone may be otherwise explained.
    """
    if "SUPERVISOR_ENABLED" not in environment or not poll({0: 0}, 0.0):
        return False
    try:
        return os.getsid(os.getppid()) != os.getsid(0)
    except ProcessLookupError:
        return True  # right now


# --- running ---------------------------------------------------------------------------------


class Launcher:
    """Waits beside one server, and ends with it. Sole holder of the changing `State`."""

    def __init__(
        self,
        pid: int,
        parent: int,
        policy: Policy,
        window: Window,
        family: Family,
        signals: Signals,
        gateway: Gateway,
    ) -> None:
        self._pid, self._parent = pid, parent
        self._policy, self._window = policy, window
        self._family, self._signals, self._gateway = family, signals, gateway
        self._state = State()
        self._is_reaped = False
        self._started_at = time.monotonic()

    def run(self) -> int:
        """Until the server is gone, and everything of it; our exit status."""
        while self._state.phase is not Phase.ENDED:
            for seen in self._observe():
                self._advance(seen)
        left = self._sweep()
        since = self._started_at if self._state.asked_by is None else self._state.asked_at
        say(last_line(self._state, time.monotonic() - since, left), afresh=True)
        return EXIT_OS_ERROR if left else exit_status(self._state)

    def _observe(self) -> list[Seen]:
        """Wait until something happens; what it was, in its order."""
        until = self._state.wake_at
        if not _PARENT_SIGNAL:
            until = min(until, time.monotonic() + _PARENT_POLL_SECONDS)
        poll({self._signals.fd: select.POLLIN}, until)
        seen = self._heed_signals()
        if time.monotonic() >= self._state.wake_at:
            seen.append(Tick())
        if os.getppid() != self._parent:
            seen.append(StopAsked(PARENT_DIED))
        return seen

    def _heed_signals(self) -> list[Seen]:
        seen: list[Seen] = []
        for number in self._signals.read():
            if number in _STOP_SIGNALS:
                seen.append(StopAsked(signal.Signals(number).name))
            elif number in _PASSED_SIGNALS:
                self._send(number)
        # Whatever came: several SIGCHLD may have come as one.
        status = self._family.reap().get(self._pid)
        if status is not None:
            self._is_reaped = True
            seen.append(Exited(status))
        return seen

    def _advance(self, seen: Seen) -> None:
        if isinstance(seen, StopAsked) and self._state.phase is Phase.SERVING:
            self._gateway.withdraw()
        self._state, actions = next_step(self._state, seen, time.monotonic(), self._policy)
        for action in actions:
            match action:
                case Action.LOOK:
                    self._advance(self._look())
                case Action.TERM:
                    self._send(signal.SIGTERM)
                case Action.KILL:
                    self._send(signal.SIGKILL)
                    self._family.kill(self._family.left())
                case _:
                    assert_never(action)

    def _look(self) -> Look:
        begin, used_before = time.monotonic(), cpu_seconds(self._pid)
        look = self._window.look(self._state.drain_until)
        worked = cpu_seconds(self._pid) - used_before
        if look.sight is Sight.SILENT and worked > _WORKING_SHARE * (time.monotonic() - begin):
            return Look(Sight.WORKING)  # what it computes is someone's request
        return look

    def _send(self, number: int) -> None:
        if self._is_reaped:
            return  # its number may be someone else's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._pid, number)

    def _sweep(self) -> list[int]:
        """Kill what the server left behind until nothing is; who is still there in the end."""
        was_killed = self._state.sent == "KILL"  # then the time runs already
        until = self._state.wake_at if was_killed else time.monotonic() + _KILL_SECONDS
        while left := self._family.left():
            if time.monotonic() >= until:
                return left
            self._family.kill(left)
            # A death wakes us at once; on macOS orphans die unannounced.
            poll({self._signals.fd: select.POLLIN}, time.monotonic() + 0.02)
            self._signals.read()
            self._family.reap()
        return []


def main() -> int:
    """Console entry point."""
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    open_missing_streams()
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    say(f"start: pid={os.getpid()}, at={at}", afresh=True)
    try:
        command = parse_command(arguments, os.environ)
        for orphan in end_orphans(command.record) if command.record else ():
            say(f"ended pid {orphan}, which an earlier run had left behind")
        address = preflight(command.server)
        if command.ledger:
            require_memory(command.ledger, model_of(command.record))
        status = _launch(command, address)
    except StartError as error:
        say(str(error))
        return error.status
    # At once: a signal that comes while Python takes itself apart would replace the status.
    os._exit(status)


def _launch(command: Command, address: Address | None) -> int:
    parent = os.getppid()
    signals = Signals()
    prctl = _load_prctl()
    prctl(_PR_SET_PDEATHSIG, _PARENT_SIGNAL)
    if os.getppid() != parent or parent_died_before(os.environ):
        say("not started: the parent has died")
        return 0
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # whoever kills our group must hit nobody but us
    family = Family(prctl)
    launcher = os.getpid()
    if command.record:
        write_record(command.record)

    def become() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == launcher:  # else it died before the line above
            _execute(command)

    gateway = Gateway(gateway_of(command.ledger), model_of(command.record), signals.fd)
    gateway.admit()
    pid = signals.spawn(become)
    window = Window(command.server, address, signals.fd, gateway)
    status = Launcher(pid, parent, command.policy, window, family, signals, gateway).run()
    if command.record and status != EXIT_OS_ERROR:
        clear_record(command.record)
    return status


def _execute(command: Command) -> None:
    argv = command.server.argv
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ}
    if command.record:
        environment[_MARK] = command.record
    try:
        os.execvpe(argv[0], argv, environment)  # noqa: S606 - no shell is the point
    except (OSError, ValueError) as error:
        say(f"cannot run {argv[0]!a}: {getattr(error, 'strerror', error)}")


if __name__ == "__main__":
    sys.exit(main())
