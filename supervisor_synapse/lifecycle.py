"""A deployment as a whole: start its supervisord, wait for the models, stop and verify.

supervisord is started in a session of its own, so that a Ctrl-C in the terminal reaches it only
through us. What is stopped is checked: every process that was there must be gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import psutil

from supervisor_synapse.adapters import config_files
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.supervisord import Absent, Answer, Supervisord
from supervisor_synapse.core.model import UNDER_WAY, ProcessState, Row, Snapshot
from supervisor_synapse.errors import ApplyError, ConfigError, ShuttingDown, TransientError

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
_STALE_SECONDS = 30.0
_COMMAND_SECONDS = 30.0  # a listener that was just restarted takes a few
_KILLED_SECONDS = 5.0
_QUICK_TIMEOUT_SECONDS = 5.0


class Interrupts:
    """Counts INT, TERM and HUP instead of dying of them, while it is entered."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in self._SIGNALS:
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal gave it

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def connect(deployment: Deployment) -> Supervisord | None:
    """The deployment's supervisord, if there is one.

    Raises:
        TransientError: there is one, and it does not answer.
    """
    rpc = Supervisord(deployment.socket, _QUICK_TIMEOUT_SECONDS)
    try:
        rpc.version()
    except (Absent, ShuttingDown):
        return None
    return rpc


def start_supervisord(deployment: Deployment) -> Supervisord:
    """Start supervisord and wait until it answers.

    Raises:
        ConfigError: it ended at once; says what it printed.
        ApplyError: it does not answer.
    """
    rpc = Supervisord(deployment.socket, _QUICK_TIMEOUT_SECONDS)
    with tempfile.TemporaryFile(dir=deployment.run) as printed:
        child = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--silent",
             "--configuration", str(deployment.main_config)],
            stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True,
            cwd=deployment.prefix,
        )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not rpc.is_up():
            if child.poll() is not None:
                printed.seek(0)
                why = _reason(printed.read(65536).decode("utf-8", "replace"))
                broken = config_files.broken_files(deployment.main_config)
                why = "; ".join(map(str, broken)) or why
                log = deployment.log / "supervisord.log"
                raise ConfigError(f"supervisord did not start: {why}; its log is {log}")
            if time.monotonic() > deadline:
                raise ApplyError(
                    f"supervisord (pid {child.pid}) gives no answer; it was left alone"
                )
            time.sleep(_POLL_SECONDS)
    return rpc


def _reason(printed: str) -> str:
    """What supervisord died of: the line that it calls an error, else its last."""
    lines = printed.strip().splitlines()
    errors = [line for line in lines if line.startswith("Error:")]
    return ascii((errors or lines)[-1]) if lines else "it said nothing"


def command(rpc: Supervisord, verb: str, *arguments: str | int) -> Answer:
    """Give the listener a command, and wait for what becomes of it.

    Raises:
        ApplyError: it does not answer.
        TransientError, ShuttingDown: supervisord does not, or refuses.
    """
    given = rpc.command(verb, *arguments)
    deadline = time.monotonic() + _COMMAND_SECONDS
    while time.monotonic() < deadline:
        answer = rpc.result(given)
        if answer is not None:
            return answer
        time.sleep(_POLL_SECONDS)
    raise ApplyError("the listener does not answer; see var/log/synapse.log")


def unknown_to(rpc: Supervisord, names: frozenset[str]) -> frozenset[str]:
    """Those of `names` that supervisord has no program for; nobody may wait for them."""
    try:
        return names - {process.name for process in rpc.processes()}
    except (TransientError, ShuttingDown):
        return frozenset()


def watch(rpc: Supervisord, interrupts: Interrupts) -> Iterator[Snapshot]:
    """Each new snapshot of the listener, until supervisord ends or somebody interrupts.

    A supervisord that is reloaded answers nothing for a while, and lives on.

    Raises:
        ApplyError: the listener has not reported for a long time, or supervisord, started by us,
            ended otherwise than by a stop.
    """
    supervisor = _process(rpc)
    seen_at, last = time.monotonic(), 0.0
    while not interrupts.count:
        snapshot = None
        try:
            snapshot = rpc.snapshot()
        except ShuttingDown:
            seen_at = time.monotonic()  # models drain for as long as they may
        except TransientError:
            if supervisor is None or not _alive_unburied(supervisor):
                _require_good_end(supervisor)
                return
        if snapshot is not None and snapshot.at != last:
            seen_at, last = time.monotonic(), snapshot.at
            yield snapshot
        elif time.monotonic() - seen_at > _STALE_SECONDS:
            raise ApplyError(
                f"the listener has not reported for {_STALE_SECONDS:.0f} s; see var/log/synapse.log"
            )
        time.sleep(_POLL_SECONDS)


def _process(rpc: Supervisord) -> psutil.Process | None:
    with contextlib.suppress(TransientError, ShuttingDown, psutil.Error):
        return psutil.Process(rpc.pid())
    return None


def _alive_unburied(process: psutil.Process) -> bool:
    """As `_alive`, but a child that has ended is left to be asked how."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _require_good_end(supervisor: psutil.Process | None) -> None:
    """Of a supervisord that is not our child nothing is known.

    Raises:
        ApplyError: it did not end by a stop.
    """
    # One that went before we knew its pid was the only child that we had.
    asked = -1 if supervisor is None else supervisor.pid
    deadline = time.monotonic() + _KILLED_SECONDS
    pid = status = 0
    while not pid and time.monotonic() < deadline:  # it has ended, but may have yet to be told
        try:
            pid, status = os.waitpid(asked, os.WNOHANG)
        except ChildProcessError:
            return
        time.sleep(0 if pid else _POLL_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        raise ApplyError(f"supervisord {how}; its models ended with it: var/log/supervisord.log")


def is_settled(rows: tuple[Row, ...], expected: frozenset[str]) -> bool:
    """Whether all of `expected` are there and every enabled model has come to rest."""
    names = {row.name for row in rows}
    return expected <= names and not any(
        row.phase in UNDER_WAY or (row.enabled and row.state is ProcessState.STARTING)
        for row in rows
    )


@dataclass(frozen=True, slots=True)
class Stopped:
    """How a stop went: what was there, and what is still there (`left`), described."""

    processes: int
    seconds: float
    left: tuple[str, ...]


def stop(
    deployment: Deployment,
    bound_seconds: float,
    hurry: Callable[[], bool] = lambda: False,
) -> Stopped | None:
    """Shut supervisord down and verify that all its processes are gone; None: nothing ran.

    Models drain first, for as long as they may (`bound_seconds` covers that); when `hurry` says
    so the drain ends at once. A supervisord that does not go is killed, and its programs with it.
    """
    supervisor = _supervisor_process(deployment)
    if supervisor is None:
        return None
    begun = time.monotonic()
    family = _family(supervisor)
    _ask_to_stop(deployment, supervisor)
    hurried = False
    deadline = begun + bound_seconds
    while _alive([supervisor]) and time.monotonic() < deadline:
        if hurry() and not hurried:
            hurried = True
            _signal(_launchers(family, supervisor), signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    if _alive([supervisor]):
        _signal([supervisor], signal.SIGKILL)
    deadline = time.monotonic() + _KILLED_SECONDS
    while _alive(family) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    left = tuple(_describe(process) for process in _alive(family))
    return Stopped(len(family), time.monotonic() - begun, left)


def _supervisor_process(deployment: Deployment) -> psutil.Process | None:
    """The deployment's supervisord: by its own word, else by its pid file, else by looking.

    One that could not open its socket yet answers nothing and has written no pid file.
    """
    rpc = Supervisord(deployment.socket, _QUICK_TIMEOUT_SECONDS)
    with contextlib.suppress(TransientError, ShuttingDown, psutil.Error):
        return psutil.Process(rpc.pid())
    with contextlib.suppress(OSError, ValueError, OverflowError, psutil.Error):
        process = psutil.Process(int(deployment.pidfile.read_text()))
        if _runs_supervisord(process, deployment):
            return process
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == os.getuid() and _runs_supervisord(process, deployment):
                return process
    return None


def _runs_supervisord(process: psutil.Process, deployment: Deployment) -> bool:
    """Whether it is supervisord on our main file; an editor that has it open is not."""
    words = process.cmdline()
    return str(deployment.main_config) in words and any(
        word == "supervisor.supervisord" or os.path.basename(word) == "supervisord"
        for word in words[:3]
    )


def _family(supervisor: psutil.Process) -> list[psutil.Process]:
    try:
        return [supervisor, *supervisor.children(recursive=True)]
    except psutil.Error:
        return [supervisor]


def _launchers(family: list[psutil.Process], supervisor: psutil.Process) -> list[psutil.Process]:
    """The direct children; a second TERM tells a launcher to drain no longer."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.Error):
            if process.ppid() == supervisor.pid:
                found.append(process)
    return found


def _ask_to_stop(deployment: Deployment, supervisor: psutil.Process) -> None:
    try:
        Supervisord(deployment.socket, _QUICK_TIMEOUT_SECONDS).shutdown()
    except ShuttingDown:
        pass
    except TransientError:
        _signal([supervisor], signal.SIGTERM)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            process.send_signal(number)


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie is one that its parent has yet to bury, and holds nothing.

    supervisord is our own child in the foreground, and is buried here.
    """
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _describe(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline()[:4])
    except psutil.Error:
        words = "?"
    return f"pid {process.pid} ({words!a})"
