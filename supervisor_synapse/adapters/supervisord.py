"""supervisord from outside: XML-RPC over its unix socket.

A connection is made for each call: a cached one that broke once stays broken in xmlrpc.client, and
over a unix socket a new one costs 0.1 ms. Objects here are not shared between threads.
"""

from __future__ import annotations

import http.client
import json
import socket
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from supervisor_synapse.adapters import snapshots
from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import ProcessState, Snapshot
from supervisor_synapse.errors import ShuttingDown, TransientError

_TIMEOUT_SECONDS = 10.0
_LARGEST_REPLY_BYTES = 16 * 1024 * 1024


class Fault(IntEnum):
    """The faults that mean something to us (supervisor.xmlrpc.Faults)."""

    UNKNOWN_METHOD = 1
    SHUTDOWN_STATE = 6
    BAD_NAME = 10
    SPAWN_ERROR = 50
    ALREADY_STARTED = 60
    NOT_RUNNING = 70
    ALREADY_ADDED = 90
    STILL_RUNNING = 91
    CANT_REREAD = 92


class Absent(TransientError):
    """Nobody listens on the socket."""


class Refused(TransientError):
    """supervisord answered with a fault."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Process:
    """One line of getAllProcessInfo; times are supervisord's wall clock in whole seconds."""

    name: str
    group: str
    state: ProcessState
    pid: int
    start: int
    stop: int
    now: int
    exitstatus: int
    spawnerr: str
    logfile: str


@dataclass(frozen=True, slots=True)
class _Configured:
    """What we need of one entry of getAllConfigInfo."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Reread:
    """Group names by what supervisord found when it read its files again."""

    added: frozenset[str]
    changed: frozenset[str]
    removed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Request:
    """A command that somebody gave through XML-RPC, and that waits for the listener."""

    id: str
    verb: str
    model: str
    other: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a command, in a line for a person."""

    ok: bool
    message: str


_T = TypeVar("_T")
_PID = TypeAdapter(Annotated[int, Field(gt=0)])
_COUNT = TypeAdapter(Annotated[int, Field(ge=0)])
_PROCESS = TypeAdapter(Process)
_PROCESSES = TypeAdapter(list[Process])
_COMMANDS = TypeAdapter(list[_Configured])
_ANSWER = TypeAdapter(Answer)
_REQUESTS = TypeAdapter(list[Request])
_REREAD = TypeAdapter(tuple[tuple[list[str], list[str], list[str]]])


def _validated(shape: TypeAdapter[_T], answer: object) -> _T:
    try:
        return shape.validate_python(answer)
    except ValidationError as error:
        why = printable(str(error.errors()[0]["msg"]))
        raise TransientError(f"cannot read supervisord's answer: {why}") from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Supervisord:
    """One supervisord, reached through its unix socket. For one thread."""

    def __init__(self, path: Path, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._path = str(path)
        self._timeout_seconds = timeout_seconds

    def call(self, method: str, *arguments: Any) -> Any:
        """One XML-RPC call.

        Raises:
            Refused: supervisord answered with a fault.
            Absent: there is no supervisord.
            ShuttingDown: it is on its way out.
            TransientError: it did not answer, or not in XML-RPC.
        """
        body = xmlrpc.client.dumps(arguments, method, allow_none=False)
        try:
            reply = self._post(body.encode("ascii", "xmlcharrefreplace"))
            (answer,), _ = xmlrpc.client.loads(reply)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == Fault.SHUTDOWN_STATE:
                raise ShuttingDown("supervisord is shutting down") from None
            raise Refused(fault.faultCode, printable(str(fault.faultString))) from None
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise Absent(f"cannot reach supervisord at {self._path}: {error.strerror}") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__
            raise TransientError(f"cannot reach supervisord at {self._path}: {why}") from None
        except Exception as error:  # expat's errors share no base but this one
            why = printable(str(error))
            raise TransientError(f"cannot read supervisord's answer: {why}") from None
        return answer

    def _post(self, body: bytes) -> bytes:
        connection = _UnixConnection(self._path, self._timeout_seconds)
        try:
            connection.request("POST", "/RPC2", body, {"Content-Type": "text/xml"})
            response = connection.getresponse()
            reply = response.read(_LARGEST_REPLY_BYTES)
            if response.status != 200:
                raise http.client.HTTPException(f"HTTP status {response.status}")
            return reply
        finally:
            connection.close()

    def is_up(self) -> bool:
        """Whether a supervisord answers and is not shutting down."""
        try:
            self.version()
        except (TransientError, ShuttingDown):
            return False
        return True

    def version(self) -> str:
        """supervisord's own."""
        return str(self.call("supervisor.getSupervisorVersion"))

    def pid(self) -> int:
        """supervisord's own."""
        return _validated(_PID, self.call("supervisor.getPID"))

    def processes(self) -> tuple[Process, ...]:
        """All processes of all groups."""
        found = _validated(_PROCESSES, self.call("supervisor.getAllProcessInfo"))
        return tuple(found)

    def process_table(self) -> tuple[Process, ...]:
        """All processes of all groups, by way of our plugin: cheap enough for every second."""
        text = str(self.call("synapse.processes"))
        try:
            return tuple(_PROCESSES.validate_json(text))
        except ValidationError as error:
            raise TransientError(
                f"cannot read the process table: {printable(str(error))}"
            ) from None

    def process(self, name: str) -> Process | None:
        """One process; None where supervisord knows none of that name."""
        try:
            answer = self.call("supervisor.getProcessInfo", name)
        except Refused as refused:
            if refused.code == Fault.BAD_NAME:
                return None
            raise
        return _validated(_PROCESS, answer)

    def commands(self) -> dict[str, str]:
        """The command of each program, as supervisord holds it."""
        found = _validated(_COMMANDS, self.call("supervisor.getAllConfigInfo"))
        return {one.name: one.command for one in found}

    def publish(self, snapshot: Snapshot) -> int:
        """Hand the plugin what all surfaces shall show; how many commands wait."""
        return _validated(_COUNT, self.call("synapse.publish", snapshots.dump(snapshot)))

    def record(self, lines: Sequence[Mapping[str, object]], *, anew: bool = False) -> None:
        """Hand the plugin lines of the history; `anew`: in place of all that it has."""
        self.call("synapse.record", json.dumps(lines), anew)

    def beat(self) -> int:
        """Tell the plugin that the listener lives, and that nothing has changed.

        How many commands wait.
        """
        return _validated(_COUNT, self.call("synapse.beat"))

    def requests(self) -> tuple[Request, ...]:
        """The commands that wait, oldest first."""
        text = str(self.call("synapse.requests"))
        try:
            return tuple(_REQUESTS.validate_json(text))
        except ValidationError as error:
            raise TransientError(f"cannot read the commands: {printable(str(error))}") from None

    def command(self, verb: str, *arguments: str | int) -> str:
        """Give the listener a command; its id."""
        return str(self.call(f"synapse.{verb}", *arguments))

    def result(self, command: str) -> Answer | None:
        """What became of a command; None while it waits."""
        text = str(self.call("synapse.result", command))
        try:
            return _ANSWER.validate_json(text) if text else None
        except ValidationError as error:
            raise TransientError(f"cannot read the answer: {printable(str(error))}") from None

    def answer(self, request: str, ok: bool, message: str) -> None:
        """Answer a command; it waits no longer."""
        self.call("synapse.answer", request, ok, message)

    def snapshot(self) -> Snapshot | None:
        """What the listener published last, with the states of now; None before it did."""
        text = self.call("synapse.models")
        return None if text == "" else snapshots.load(str(text))

    def start(self, name: str) -> None:
        """Ask for a start; a program that runs already is no error."""
        self._expecting(Fault.ALREADY_STARTED, "supervisor.startProcess", name, False)

    def signal(self, name: str, signal: str) -> None:
        """Send a signal, by its name; a program that does not run is no error."""
        self._expecting(Fault.NOT_RUNNING, "supervisor.signalProcess", name, signal)

    def stop(self, name: str) -> None:
        """Ask for a stop; a program that does not run is no error."""
        self._expecting(Fault.NOT_RUNNING, "supervisor.stopProcess", name, False)

    def reread(self) -> Reread:
        """Have supervisord read its files; nothing is acted on.

        Raises:
            Refused: CANT_REREAD, with supervisord's reason; nothing has changed.
        """
        answer = self.call("supervisor.reloadConfig")
        ((added, changed, removed),) = _validated(_REREAD, answer)
        return Reread(frozenset(added), frozenset(changed), frozenset(removed))

    def add(self, group: str) -> None:
        self._expecting(Fault.ALREADY_ADDED, "supervisor.addProcessGroup", group)

    def remove(self, group: str) -> None:
        """Forget a stopped group; one that is not there is no error."""
        self._expecting(Fault.BAD_NAME, "supervisor.removeProcessGroup", group)

    def shutdown(self) -> None:
        self.call("supervisor.shutdown")

    def _expecting(self, fine: Fault, method: str, *arguments: Any) -> None:
        try:
            self.call(method, *arguments)
        except Refused as refused:
            if refused.code != fine:
                raise
