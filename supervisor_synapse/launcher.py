"""synapse-run: the parent of one llama-server. It leaves nothing behind and kills nothing foreign.

    synapse-run [--drain SECONDS] [--term SECONDS] -- /path/llama-server --model FILE ...

Standard library only, and little of that: one of these stays in memory beside every model, and
its start is part of every start. What it must know of the server (host, port, files, key) it
reads from the server's own command line, so that a block edited by hand stays consistent.

- Before the start it refuses what cannot work, with a status of its own (`EXIT_…`) and one line.
- On TERM, INT or QUIT it waits until no request is under way or `--drain` seconds are over, then
  sends TERM, `--term` seconds later TERM again, and as long after that KILL. A second TERM ends
  the wait. `next_step` decides all of this; `Launcher` carries it out. New requests cannot be
  kept out from here: under steady traffic only a gateway in front can drain fully.
- HUP, USR1 and USR2 are passed on to the server.
- On Linux it stops when its parent dies, the server is killed when it dies itself, and whatever
  the server leaves behind becomes its child, so that nothing is lost sight of.

Exit status: the server's own when it ends unasked; 128 + n when signal n ended it. Dying by the
same signal would say less: supervisord reports any death by signal as -1, while SIGABRT (out of
memory), SIGBUS (file truncated) and SIGKILL (the kernel's choice) need different remedies. After
a stop that was asked for: 0, or `EXIT_LEFT_BEHIND`.
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
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

# Exit statuses of our own, numbered as in <sysexits.h>; llama-server itself uses 0 and 1.
EXIT_USAGE = 64  # our command line is wrong
EXIT_MODEL_MISSING = 66  # a model or projector file is missing or cannot be read
EXIT_LEFT_BEHIND = 71  # asked to stop, and something could not be killed
EXIT_ENGINE_MISSING = 72  # llama-server is missing or cannot be executed
EXIT_PORT_IN_USE = 75  # someone else listens there
EXIT_SIGNAL_BASE = 128  # + n: the server was ended by signal n

DEFAULT_DRAIN_SECONDS = 30.0
DEFAULT_TERM_SECONDS = 2.0  # llama-server heeds a second TERM that comes at least 0.5 s later

_BUSY_POLL_SECONDS = 0.1
_CONFIRM_SECONDS = 0.05  # between the two looks that must both find nothing under way
_EXCHANGE_SECONDS = 1.0  # a healthy server answers within 10 ms, whatever it is decoding
_WORKING_CPU_SHARE = 0.05  # an idle server takes 0.01 of a core, one that decodes takes cores
_KILL_SECONDS = 5.0  # how long a killed process may take to go (a driver gives memory back)
_PARENT_POLL_SECONDS = 1.0  # only where the kernel does not tell of a parent's death
_LARGEST_REPLY_BYTES = 1 << 20
_LARGEST_KEY_FILE_BYTES = 1 << 16
_LONGEST_KEY = 4096
_LONGEST_NUMBER = 18  # digits

_USAGE = "usage: synapse-run [--drain SECONDS] [--term SECONDS] -- LLAMA_SERVER [ARGUMENT ...]"


# --- the stop sequence: pure -----------------------------------------------------------------


class Policy(NamedTuple):
    """How much patience a stop has, in seconds."""

    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    term_seconds: float = DEFAULT_TERM_SECONDS


class Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"  # waiting for requests to finish
    TERMINATING = "terminating"  # TERM was sent
    INSISTING = "insisting"  # a second TERM was sent
    KILLING = "killing"  # KILL was sent
    ENDED = "ended"  # the server is gone, or even KILL did not help


class Sight(Enum):
    """What a look at the server found."""

    LOAD = "load"  # it says, or its connections show, how much is under way
    LOADING = "loading"
    ASLEEP = "asleep"
    REFUSED = "refused"  # nobody listens
    SILENT = "silent"  # no answer in time
    UNKNOWN = "unknown"  # alive, and nothing says how much is under way


class Why(Enum):
    """What ended the drain."""

    IDLE = "idle"
    DEADLINE = "deadline"
    ASKED_AGAIN = "asked-again"
    NO_DRAIN = "no-drain"
    LOADING = "loading"
    ASLEEP = "asleep"
    REFUSED = "refused"
    SILENT = "silent"
    EXITED = "exited"  # the server ended before anything was sent to it


class Look(NamedTuple):
    """One answer to: which requests are under way?"""

    sight: Sight
    tasks: frozenset[tuple[int, int]] = frozenset()  # (slot, task) in work
    unnamed: int = 0  # in work beyond `tasks`, known only by their number
    waiting: int = 0  # queued for a slot
    cpu_seconds: float | None = None  # used by the server so far; None: unknown

    @property
    def outstanding(self) -> int:
        return len(self.tasks) + self.unnamed + self.waiting


class StopAsked(NamedTuple):
    by: str  # a signal's name
    parent_died: bool = False


class Exited(NamedTuple):
    """The server was reaped."""

    status: int  # as from waitpid


class Tick(NamedTuple):
    """`State.wake_at` has come."""


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
    last: Look | None = None  # the last look that found a load
    silence: tuple[float, float | None] | None = None  # when the last look was silent: (time, cpu)
    found_idle: bool = False  # by the last look
    drained: int = 0  # requests seen under way and finished since
    cut: int | None = 0  # requests under way when TERM was sent; None: unknown
    why: Why | None = None
    sent: str = "none"  # the strongest means that was used
    status: int | None = None  # of the ended server, as from waitpid; None: it did not end


_Step = tuple[State, tuple[Action, ...]]


def next_step(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    """What was seen, and when → the new state, and what to do now."""
    if isinstance(seen, Exited):
        return _ended(state, seen.status), ()
    match state.phase:
        case Phase.SERVING:
            return _serving(state, seen, now, policy)
        case Phase.DRAINING:
            return _draining(state, seen, now, policy)
        case Phase.TERMINATING | Phase.INSISTING | Phase.KILLING:
            return _pressing(state, seen, now, policy)
        case Phase.ENDED:
            return state, ()
        case _:
            assert_never(state.phase)


def _serving(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    if not isinstance(seen, StopAsked):
        return state, ()
    state = state._replace(asked_by="parent-died" if seen.parent_died else seen.by, asked_at=now)
    if policy.drain_seconds <= 0:
        return _terminate(state, Why.NO_DRAIN, now, policy)
    until = now + policy.drain_seconds
    draining = state._replace(phase=Phase.DRAINING, drain_until=until, wake_at=until)
    return draining, (Action.LOOK,)


def _draining(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    """A look is either under way (`wake_at` is the deadline) or due at `wake_at`."""
    if isinstance(seen, StopAsked):
        # A parent that dies meanwhile is not someone who has lost patience.
        if seen.parent_died:
            return state, ()
        return _terminate(state, Why.ASKED_AGAIN, now, policy)
    if isinstance(seen, Look):
        state, why = _weigh(state, seen, now)
        if why is not None:
            return _terminate(state, why, now, policy)
    if now >= state.drain_until:
        return _terminate(state, Why.DEADLINE, now, policy)
    if isinstance(seen, Look):
        pause = _CONFIRM_SECONDS if state.found_idle else _BUSY_POLL_SECONDS
        return state._replace(wake_at=min(now + pause, state.drain_until)), ()
    if now >= state.wake_at:
        return state._replace(wake_at=state.drain_until), (Action.LOOK,)
    return state, ()


def _weigh(state: State, look: Look, now: float) -> tuple[State, Why | None]:
    """Remember what a look found; with a reason if nothing is to be waited for."""
    silence, found_idle = state.silence, state.found_idle
    state = state._replace(silence=None, found_idle=False)
    match look.sight:
        case Sight.LOAD:
            idle = look.outstanding == 0
            drained = state.drained + _finished(state.last, look)
            state = state._replace(last=look, drained=drained, found_idle=idle)
            # Once is not enough: a request between the queue and its slot shows in neither.
            return state, Why.IDLE if idle and found_idle else None
        case Sight.SILENT:
            state = state._replace(silence=(now, look.cpu_seconds))
            return state, Why.SILENT if _is_hung(silence, look.cpu_seconds, now) else None
        case Sight.UNKNOWN:
            return state, None  # a busy server must not be stopped before its deadline
        case Sight.LOADING:
            return state, Why.LOADING
        case Sight.ASLEEP:
            return state, Why.ASLEEP
        case Sight.REFUSED:
            return state, Why.REFUSED
        case _:
            assert_never(look.sight)


def _finished(before: Look | None, after: Look) -> int:
    """Requests that `before` saw under way and `after` does not.

    Of those without a name only the number is known: what it lost, less what got a name since.
    """
    if before is None:
        return 0
    nameless = before.unnamed + before.waiting - after.unnamed - after.waiting
    named_since = len(after.tasks - before.tasks)
    return len(before.tasks - after.tasks) + max(0, nameless - named_since)


def _is_hung(before: tuple[float, float | None] | None, cpu: float | None, now: float) -> bool:
    """Whether a silent server that was silent before is to be given up.

    Builds that answer /slots between batches only are silent for as long as a batch takes;
    such a one is computing, and what it computes is someone's request.
    """
    if before is None:
        return False
    since, cpu_before = before
    if cpu is None or cpu_before is None:
        return True
    return cpu - cpu_before < _WORKING_CPU_SHARE * (now - since)


def _terminate(state: State, why: Why, now: float, policy: Policy) -> _Step:
    state = state._replace(
        phase=Phase.TERMINATING,
        wake_at=now + policy.term_seconds,
        why=why,
        cut=_cut(state, why),
        sent="TERM",
    )
    return state, (Action.TERM,)


def _cut(state: State, why: Why) -> int | None:
    if state.last is not None:
        return state.last.outstanding
    return 0 if why in (Why.LOADING, Why.ASLEEP, Why.REFUSED) else None


def _pressing(state: State, seen: Seen, now: float, policy: Policy) -> _Step:
    """Ever stronger means, each after its time: not even a third TERM makes it faster."""
    if not isinstance(seen, Tick) or now < state.wake_at:
        return state, ()
    match state.phase:
        case Phase.TERMINATING:
            state = state._replace(phase=Phase.INSISTING, sent="TERM+TERM")
            return state._replace(wake_at=now + policy.term_seconds), (Action.TERM,)
        case Phase.INSISTING:
            state = state._replace(phase=Phase.KILLING, sent="KILL")
            return state._replace(wake_at=now + _KILL_SECONDS), (Action.KILL,)
        case _:
            return state._replace(phase=Phase.ENDED), ()


def _ended(state: State, status: int) -> State:
    if state.phase is Phase.DRAINING:
        state = state._replace(why=Why.EXITED, cut=_cut(state, Why.EXITED))
    return state._replace(phase=Phase.ENDED, status=status)


def stopped_line(state: State, now: float) -> str:
    """The one line about a stop that was asked for."""
    words = {
        "drained": state.drained,
        "cut": "unknown" if state.cut is None else state.cut,
        "deadline_hit": "yes" if state.why is Why.DEADLINE else "no",
        "seconds": f"{now - state.asked_at:.2f}",
        "signal": state.sent,
        "asked_by": state.asked_by,
        "drain_ended_by": state.why.value if state.why else "nothing",
        "server": "alive" if state.status is None else describe_status(state.status),
    }
    return "stopped: " + ", ".join(f"{name}={value}" for name, value in words.items())


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
        return EXIT_LEFT_BEHIND
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
    files: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080  # 0: unknown
    prefix: str = ""  # before each path
    key: str | None = None
    key_file: str | None = None
    shares_port: bool = False


def parse_command(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[Policy, Server]:
    """Our own command line: options up to `--`, then the server's.

    Raises:
        StartError: with `EXIT_USAGE`.
    """
    seconds = {"--drain": DEFAULT_DRAIN_SECONDS, "--term": DEFAULT_TERM_SECONDS}
    rest = list(arguments)
    while rest and rest[0] != "--":
        name, equals, value = rest.pop(0).partition("=")
        if name not in seconds:
            raise StartError(EXIT_USAGE, f"unknown option {name!a}; {_USAGE}")
        if not equals:
            value = rest.pop(0) if rest else ""
        seconds[name] = _seconds(name, value)
    if len(rest) < 2:
        raise StartError(EXIT_USAGE, f"no server to run; {_USAGE}")
    policy = Policy(seconds["--drain"], seconds["--term"])
    return policy, parse_server(rest[1:], environment)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise StartError(EXIT_USAGE, f"{name} takes seconds, not {text!a}; {_USAGE}")
    return value


_SOCKET_SUFFIX = ".sock"  # makes llama-server take a host for the path of a socket

# llama-server's spellings of what concerns us, and the variable that it reads where none is given.
_OPTIONS = {
    "model": (("--model", "-m"), "LLAMA_ARG_MODEL"),
    "projector": (("--mmproj", "-mm"), "LLAMA_ARG_MMPROJ"),
    "host": (("--host",), "LLAMA_ARG_HOST"),
    "port": (("--port",), "LLAMA_ARG_PORT"),
    "prefix": (("--api-prefix",), "LLAMA_ARG_API_PREFIX"),
    "key": (("--api-key",), "LLAMA_API_KEY"),
    "key_file": (("--api-key-file",), "LLAMA_ARG_API_KEY_FILE"),
}


def parse_server(argv: Sequence[str], environment: Mapping[str, str]) -> Server:
    """Find in a llama-server command line what we must know; the last of several wins there too."""
    said = {
        name: _values(argv, spellings) or [environment[variable]]
        for name, (spellings, variable) in _OPTIONS.items()
        if variable in environment or _values(argv, spellings)
    }
    last = {name: values[-1] for name, values in said.items()}
    host, port = last.get("host", "127.0.0.1"), last.get("port", "8080")
    has_port = port.isascii() and port.isdecimal() and not host.endswith(_SOCKET_SUFFIX)
    return Server(
        argv=tuple(argv),
        files=(*said.get("model", ()), *said.get("projector", ())),
        host=host,
        port=int(port) if has_port and len(port) < 6 and int(port) < 65536 else 0,
        prefix=last.get("prefix", ""),
        key=last.get("key", "").partition(",")[0] or None,
        key_file=last.get("key_file"),
        shares_port="--reuse-port" in argv or "LLAMA_ARG_REUSE_PORT" in environment,
    )


def _values(argv: Sequence[str], spellings: tuple[str, ...]) -> list[str]:
    """What follows an option, both `--port 1` and `--port=1`."""
    values = []
    for place, token in enumerate(argv[1:], start=2):
        name, equals, value = token.partition("=")
        if name in spellings and equals:
            values.append(value)
        elif token in spellings and place < len(argv):
            values.append(argv[place])
    return values


# --- preflight -------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where a server listens, ready for `socket`."""

    family: int
    target: tuple[Any, ...] | str  # a path for AF_UNIX


def preflight(server: Server, search_path: Sequence[str]) -> tuple[str, Address | None]:
    """The executable's path and the server's address (None: unknown).

    Raises:
        StartError: the server could only fail.
    """
    executable = find_executable(server.argv[0], search_path)
    for file in server.files:
        _require_file(file)
    address = resolve(server)
    if address is not None and not server.shares_port:
        _require_free(server, address)
    return executable, address


def find_executable(name: str, search_path: Sequence[str]) -> str:
    """As execvp would find it.

    Raises:
        StartError: with `EXIT_ENGINE_MISSING`.
    """
    places = [name] if "/" in name else [os.path.join(folder, name) for folder in search_path]
    for place in places:
        if os.path.isfile(place) and os.access(place, os.X_OK):
            return place
    why = "not an executable file" if any(map(os.path.exists, places)) else "no such file"
    raise StartError(EXIT_ENGINE_MISSING, f"cannot run {name!a}: {why}")


def _require_file(path: str) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StartError(EXIT_MODEL_MISSING, f"cannot serve {path!a}: not a file")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise StartError(EXIT_MODEL_MISSING, f"cannot serve {path!a}: {error.strerror}") from None
    except ValueError:
        raise StartError(EXIT_MODEL_MISSING, f"cannot serve {path!a}: not a path") from None


def resolve(server: Server) -> Address | None:
    """The address that the server will listen on; a name is looked up as the server does it."""
    if server.host.endswith(_SOCKET_SUFFIX):
        return Address(socket.AF_UNIX, server.host)
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
    if address.family == socket.AF_UNIX:
        return
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
    inodes = {row.inode for row in tcp_rows(port) if row.state == _LISTEN}
    pids = sorted(pid for pid in _processes() if inodes & set(_socket_inodes(pid)))
    names = [f"pid {pid} ({_read(f'/proc/{pid}/comm').decode(errors='replace').strip()!a})"
             for pid in pids]  # fmt: skip
    return "already in use" + (f" by {', '.join(names)}" if names else "")


# --- looking at the server -------------------------------------------------------------------


class Wait(NamedTuple):
    """A look goes on when `fd` is ready for `events`, or at `until`."""

    fd: int
    events: int
    until: float


class Reply(NamedTuple):
    """An HTTP reply. 0: it could not be read as one."""

    status: int
    body: bytes


if TYPE_CHECKING:
    _Fetch = Generator[Wait, None, Reply | Sight]  # REFUSED or SILENT where there is no reply
    _Looking = Generator[Wait, None, Look]


class Window:
    """Asks a server what is under way. Each look is a generator that never blocks.

    Its questions depend on what the server has already shown that it can answer.
    """

    def __init__(self, server: Server, address: Address | None) -> None:
        self._server = server
        self._address = reachable(address) if address else None
        # /props comes first, and once: the others would wake a sleeping server.
        self._paths = ["/props", "/slots", "/metrics"] if address else []

    def look(self) -> _Looking:
        """Ask once. Each question has its own deadline; the first unanswered one ends the look."""
        bodies: dict[str, bytes] = {}
        for path in tuple(self._paths):
            reply = yield from self._ask(path)
            if isinstance(reply, Sight):
                return Look(reply)
            if reply.status == 503:
                return Look(Sight.LOADING)
            if path == "/props" and _is_sleeping(reply):
                return Look(Sight.ASLEEP)
            if reply.status == 200:
                bodies[path] = reply.body
            if path == "/props" or reply.status != 200:
                self._paths.remove(path)  # 404, 501, 403, 401: it will not say otherwise later
        return load_of(bodies.get("/slots"), bodies.get("/metrics")) or self._connections()

    def _ask(self, path: str) -> _Fetch:
        assert self._address is not None  # noqa: S101 - look() has seen to it
        request = f"GET {self._server.prefix}{path} HTTP/1.0\r\nHost: localhost\r\n"
        key = read_key(self._server)
        authorization = b"Authorization: Bearer " + key + b"\r\n" if key else b""
        return fetch(self._address, os.fsencode(request) + authorization + b"\r\n")

    def _connections(self) -> Look:
        """A server that does not say (TLS, no endpoint, no key): open connections say for it.

        Idle ones count as well; llama-server closes them after 5 s.
        """
        rows = tcp_rows(self._server.port) if self._server.port else []
        if not any(row.state == _LISTEN for row in rows):
            return Look(Sight.UNKNOWN)  # the table cannot be read, or is not the server's
        return Look(Sight.LOAD, unnamed=sum(row.state == _ESTABLISHED for row in rows))


def reachable(address: Address) -> Address:
    """Where to connect to what listens on `address`: a wildcard is met on the loopback."""
    if isinstance(address.target, str):
        return address
    host, *rest = address.target
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
    return Address(address.family, (loopback.get(str(host), host), *rest))


def fetch(address: Address, request: bytes) -> _Fetch:
    """Send `request`, read the reply: in `_EXCHANGE_SECONDS`, up to `_LARGEST_REPLY_BYTES`."""
    until = time.monotonic() + _EXCHANGE_SECONDS
    received = b""
    try:
        with socket.socket(address.family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            fd = connection.fileno()
            problem = connection.connect_ex(address.target)
            if problem == errno.EINPROGRESS:
                yield Wait(fd, select.POLLOUT, until)
                problem = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem in (errno.ECONNREFUSED, errno.ENOENT):
                return Sight.REFUSED
            if problem or time.monotonic() >= until:
                return Sight.SILENT
            connection.send(request)  # smaller than any socket's buffer
            while not is_complete(received):
                yield Wait(fd, select.POLLIN, until)
                if time.monotonic() >= until:
                    return Sight.SILENT
                piece = connection.recv(1 << 16)
                if not piece:
                    break
                received += piece
    except ConnectionError:
        return Reply(0, b"")  # it is there, and does not speak HTTP with us
    except OSError:
        return Sight.SILENT  # no descriptor, no memory: nothing about the server
    return parse_reply(received)


def is_complete(received: bytes) -> bool:
    """Whether nothing more is needed of a reply, short of its end of file."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if len(received) > _LARGEST_REPLY_BYTES:
        return True
    for line in head.split(b"\r\n")[1:] if separator else ():
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return len(body) >= int(value.strip()[:_LONGEST_NUMBER])
    return False


def parse_reply(received: bytes) -> Reply:
    """The status and the body of an HTTP reply."""
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return Reply(0, b"")
    return Reply(int(words[1][:_LONGEST_NUMBER]), body)


def load_of(slots: bytes | None, metrics: bytes | None) -> Look | None:
    """What the bodies of /slots and /metrics say together; None where they say nothing.

    /slots names the tasks, /metrics also counts those that wait for a slot.
    """
    tasks = None if slots is None else parse_slots(slots)
    gauges = None if metrics is None else parse_metrics(metrics)
    if tasks is None and gauges is None:
        return None
    known = tasks or frozenset()
    processing, deferred = gauges or (0, 0)
    unnamed = max(0, processing - len(known))
    return Look(Sight.LOAD, known, unnamed, deferred)


def parse_slots(body: bytes) -> frozenset[tuple[int, int]] | None:
    """The (slot, task) pairs in work; None where the body is not what /slots answers."""
    slots = _json(body)
    if not isinstance(slots, list) or not slots:
        return None
    busy = set()
    for slot in slots:
        if not isinstance(slot, dict) or not isinstance(slot.get("is_processing"), bool):
            return None
        if slot["is_processing"]:
            busy.add((_whole(slot.get("id")), _whole(slot.get("id_task"))))
    return frozenset(busy)


def parse_metrics(body: bytes) -> tuple[int, int] | None:
    """Requests (in work, waiting for a slot); None where the body does not say."""
    found = {}
    for line in body.splitlines():
        name, _, value = line.partition(b" ")
        found[name] = value.strip()
    try:
        processing = float(found[b"llamacpp:requests_processing"])
        deferred = float(found.get(b"llamacpp:requests_deferred", b"0"))
        return max(0, int(processing)), max(0, int(deferred))
    except (KeyError, ValueError, OverflowError):
        return None


def _is_sleeping(props: Reply) -> bool:
    said = _json(props.body)
    return isinstance(said, dict) and said.get("is_sleeping") is True


def _whole(value: object) -> int:
    return value if isinstance(value, int) else -1


def _json(text: bytes) -> object:
    import json  # only while draining: in all the time before it would only take memory

    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def read_key(server: Server) -> bytes | None:
    """The first API key that the server accepts, fit for a header; None where there is none."""
    if server.key is not None:
        lines = [os.fsencode(server.key)]
    elif server.key_file is not None:
        lines = _read(server.key_file, _LARGEST_KEY_FILE_BYTES).splitlines()
    else:
        return None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
    is_fit = keys and len(keys[0]) <= _LONGEST_KEY and min(keys[0]) > 31
    return keys[0] if is_fit else None


# --- the operating system --------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36
_PROC_PGRP_ONLY = 2  # <sys/proc_info.h> of macOS
_ESTABLISHED, _LISTEN = 0x01, 0x0A  # <linux/tcp_states.h>

# A signal of its own for the parent's death: TERM could come from anyone, and the kernel also
# sends this one when only the thread that started us ends, so that it must be checked.
if sys.platform == "linux":
    _PARENT_DIED: tuple[int, ...] = (signal.SIGRTMIN + 7,)
else:
    _PARENT_DIED = ()

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_PASSED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_CHANGED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # ignored by us, not by what we start


class TcpRow(NamedTuple):
    """One row of the kernel's table of TCP sockets."""

    state: int
    inode: int


def tcp_rows(port: int) -> list[TcpRow]:
    """The sockets whose own port this is; none where the kernel shows no table."""
    text = _read("/proc/self/net/tcp") + _read("/proc/self/net/tcp6")
    return list(parse_tcp_table(text, port))


def parse_tcp_table(text: bytes, port: int) -> Iterator[TcpRow]:
    """Rows of /proc/net/tcp: number, local address, remote address, state, …, inode (10th)."""
    ending = b":%04X" % port
    for line in text.splitlines():
        words = line.split()
        if len(words) > 9 and words[1].endswith(ending):
            yield TcpRow(int(words[3], 16), int(words[9]))


def _socket_inodes(pid: int) -> Iterator[int]:
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                yield int(target[8:-1])
    except OSError:
        return  # gone, or not ours to look into


def _processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return []


def _read(path: str, limit: int = 1 << 24) -> bytes:
    """At most `limit` bytes of a file; nothing where it cannot be read."""
    pieces = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while limit > 0 and (piece := os.read(fd, min(limit, 1 << 16))):
                pieces.append(piece)
                limit -= len(piece)
        finally:
            os.close(fd)
    except OSError:
        return b""
    return b"".join(pieces)


def _load_prctl() -> Callable[[int, int], object] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl

    def call(option: int, value: int) -> object:
        zero = ctypes.c_ulong(0)
        return prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero)

    return call


def cpu_seconds(pid: int) -> float | None:
    """The processor time of a process so far; None where it cannot be told.

    The clock's number is what clock_getcpuclockid(3) makes of a pid on Linux.
    """
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


class Family:
    """The processes that are ours to reap and to kill: the server and what it leaves behind.

    On Linux the orphans of a descendant become our children, and only children are ever killed:
    nobody else can reap them, so that a number always means the process that it was read for.
    Children that were there before (whoever replaced itself by us had them) are strangers. Where
    there are such, their orphans would be strangers too: then we adopt none.
    """

    def __init__(self, prctl: Callable[[int, int], object] | None) -> None:
        self._is_childless = False
        self.reap()
        self._strangers = frozenset() if self._is_childless else frozenset(self._members())
        if prctl is not None and not self._strangers:
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
        if sys.platform == "linux" and self._is_childless:
            return []  # by the kernel's word: no need to look
        return sorted(self._members() - self._strangers)

    def kill(self, pids: Iterable[int]) -> None:
        """What refuses (it changed its user) is reported as left."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _members(self) -> set[int]:
        if sys.platform == "darwin":
            return _group_members(os.getpgrp()) - {os.getpid()}
        return {pid for pid in _processes() if _parent_of(pid) == os.getpid()}


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
        always = {signal.SIGCHLD, signal.SIGTERM}
        self._ours: set[int] = {*heeded, *always, *_PARENT_DIED}
        for number in self._ours:
            signal.signal(number, lambda *_: None)

    def read(self) -> list[int]:
        """The numbers of the signals that came since, in their order."""
        try:
            return list(os.read(self.fd, 4096))
        except BlockingIOError:
            return []

    def spawn(self, become: Callable[[], None]) -> int:
        """Fork; the child runs `become`, which does not return, with all signals as we found them.

        Signals are held back meanwhile: one that the child got would be written into our pipe.
        """
        former = signal.pthread_sigmask(signal.SIG_BLOCK, self._ours)
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                for number in (*self._ours, *_CHANGED_BY_PYTHON):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
                become()
            except OSError as error:
                say(f"cannot run the server: {error.strerror}")
            finally:
                os._exit(EXIT_ENGINE_MISSING)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._ours)
        return pid


def say(line: str) -> None:
    """One line on stderr, in one write: the server writes there as well."""
    with contextlib.suppress(OSError):  # nobody reads any more
        os.write(2, f"synapse-run: {line}\n".encode(errors="backslashreplace"))


def parent_died_before(environment: Mapping[str, str]) -> bool:
    """Whether supervisord died before we could ask to be told of it.

    Then the pipe that it holds to our stdin is closed, and whoever adopted us is of another
    session. Each alone may be otherwise explained.
    """
    if "SUPERVISOR_ENABLED" not in environment:
        return False
    poller = select.poll()
    poller.register(0, 0)
    hung_up = any(events & select.POLLHUP for _, events in poller.poll(0))
    return hung_up and os.getsid(os.getppid()) != os.getsid(0)


# --- running ---------------------------------------------------------------------------------


class Launcher:
    """Waits beside one server, and ends with it. Sole holder of the changing `State`."""

    def __init__(
        self,
        pid: int,
        policy: Policy,
        window: Window,
        family: Family,
        signals: Signals,
        parent: int,
    ) -> None:
        self._pid = pid
        self._policy = policy
        self._window = window
        self._family = family
        self._signals = signals
        self._parent = parent
        self._state = State()
        self._is_reaped = False
        self._looking: _Looking | None = None
        self._wait: Wait | None = None

    def run(self) -> int:
        """Until the server is gone, and everything of it; our exit status."""
        while self._state.phase is not Phase.ENDED:
            for seen in self._observe():
                self._advance(seen)
        self._abandon_look()
        left = self._sweep()
        self._report(left)
        return EXIT_LEFT_BEHIND if left else exit_status(self._state)

    def _advance(self, seen: Seen) -> None:
        self._state, actions = next_step(self._state, seen, time.monotonic(), self._policy)
        for action in actions:
            match action:
                case Action.LOOK:
                    self._looking = self._window.look()
                    self._wait = None
                case Action.TERM:
                    self._abandon_look()
                    self._send(signal.SIGTERM)
                case Action.KILL:
                    self._send(signal.SIGKILL)
                    self._family.kill(self._family.left())
                case _:
                    assert_never(action)

    def _send(self, number: int) -> None:
        if self._is_reaped:
            return  # its number may be someone else's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._pid, number)

    # -- seeing

    def _observe(self) -> list[Seen]:
        """Wait until something happens; what it was, in its order."""
        if self._looking is not None and self._wait is None:
            return self._go_on_looking()
        ready = self._poll()
        seen = self._heed_signals()
        now = time.monotonic()
        if self._wait is not None and (self._wait.fd in ready or now >= self._wait.until):
            seen += self._go_on_looking()
        if now >= self._state.wake_at:
            seen.append(Tick())
        if not _PARENT_DIED and self._is_orphaned():
            seen.append(StopAsked("parent-died", parent_died=True))
        return seen

    def _poll(self) -> set[int]:
        poller = select.poll()
        poller.register(self._signals.fd, select.POLLIN)
        until = self._state.wake_at
        if self._wait is not None:
            poller.register(self._wait.fd, self._wait.events)
            until = min(until, self._wait.until)
        seconds = max(0.0, until - time.monotonic())
        if not _PARENT_DIED:
            seconds = min(seconds, _PARENT_POLL_SECONDS)
        # Rounded up: a poll that returns too early would only be repeated.
        timeout = None if seconds == float("inf") else int(min(seconds, 1e6) * 1000) + 1
        return {fd for fd, _ in poller.poll(timeout)}

    def _heed_signals(self) -> list[Seen]:
        seen: list[Seen] = []
        for number in self._signals.read():
            if number == signal.SIGCHLD:
                continue  # several may have come as one; below
            if number in _PARENT_DIED:
                if self._is_orphaned():
                    seen.append(StopAsked("parent-died", parent_died=True))
            elif number in _STOP_SIGNALS:
                seen.append(StopAsked(signal.Signals(number).name))
            else:
                self._send(number)
        status = self._family.reap().get(self._pid)
        if status is not None:
            self._is_reaped = True
            seen.append(Exited(status))
        return seen

    def _is_orphaned(self) -> bool:
        return os.getppid() != self._parent

    def _go_on_looking(self) -> list[Seen]:
        if self._looking is None:
            return []
        try:
            self._wait = next(self._looking)
        except StopIteration as end:
            look: Look = end.value
            self._looking = self._wait = None
            return [look._replace(cpu_seconds=cpu_seconds(self._pid))]
        return []

    def _abandon_look(self) -> None:
        if self._looking is not None:
            self._looking.close()
        self._looking = self._wait = None

    # -- ending

    def _sweep(self) -> list[int]:
        """Kill what the server left behind until nothing is; who is still there in the end."""
        patience = _KILL_SECONDS if self._state.status is not None else 0.0
        until = time.monotonic() + patience
        while left := self._family.left():
            if time.monotonic() >= until:
                return left
            self._family.kill(left)
            poller = select.poll()
            poller.register(self._signals.fd, select.POLLIN)
            poller.poll(20)  # a death wakes us at once; on macOS orphans die unannounced
            self._signals.read()
            self._family.reap()
        return []

    def _report(self, left: list[int]) -> None:
        state = self._state
        if state.asked_by is not None:
            line = stopped_line(state, time.monotonic())
        elif state.status is not None and (os.WIFSIGNALED(state.status) or left):
            line = f"ended by itself: server={describe_status(state.status)}"
        else:
            return  # it has said for itself why it ended
        say(line + (f", left_behind={'+'.join(map(str, left))}" if left else ""))


def main() -> int:
    """Console entry point."""
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    try:
        policy, server = parse_command(arguments, os.environ)
        executable, address = preflight(server, os.get_exec_path())
    except StartError as error:
        say(str(error))
        return error.status
    return _launch(policy, server, executable, address)


def _launch(policy: Policy, server: Server, executable: str, address: Address | None) -> int:
    parent = os.getppid()
    signals = Signals()
    prctl = _load_prctl()
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, *_PARENT_DIED)
    if os.getppid() != parent or parent_died_before(os.environ):
        say("not started: the parent has died")
        return 0
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # whoever kills our group must hit nobody but us
    family = Family(prctl)
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ}
    launcher = os.getpid()

    def become() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == launcher:
            os.execve(executable, server.argv, environment)  # noqa: S606 - no shell is the point

    pid = signals.spawn(become)
    return Launcher(pid, policy, Window(server, address), family, signals, parent).run()


if __name__ == "__main__":
    sys.exit(main())
