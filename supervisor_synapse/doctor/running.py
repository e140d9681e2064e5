"""Checks of what runs: supervisord, the listener, and servers that nobody looks after."""

from __future__ import annotations

import os
from collections.abc import Iterator

from supervisor_synapse.adapters.processes import Running
from supervisor_synapse.core.findings import Finding, error, fine, note, warning
from supervisor_synapse.core.model import FailureClass, Phase, ProcessState
from supervisor_synapse.doctor.case import SERVER, Case

LISTENER = "synapse"
_MOST_NAMED = 40
_SILENT_SECONDS = 15.0  # the listener gives a sign of life every 2 s
# Where a failure class says by itself what is to be done; else the model's log has to be read.
_MENDS = {
    FailureClass.OUT_OF_MEMORY: "give it less to hold (`context`, a smaller quantization) or free "
    "memory; `synapse plan` has the figures",
    FailureClass.BAD_ARGUMENT: "mend the argument in synapse.conf, then `synapse discover`; or in "
    "its block, then `supervisorctl update`",
    FailureClass.MODEL_MISSING: "download it again: `synapse pull`",
    FailureClass.MODEL_CORRUPT: "`synapse doctor --deep` compares checksums; download it again",
    FailureClass.PORT_IN_USE: "end the program that has the port, or choose another `port`",
}


def check_supervisord(case: Case) -> Iterator[Finding]:
    """Whether it runs and answers, and what one that is gone has left."""
    answers, deployment = case.supervisord, case.deployment
    running = [one for one in case.processes if _is_supervisord(case, one)]
    if len(running) > 1:
        pids = ", ".join(str(one.pid) for one in running)
        yield error(
            "supervisord-twice", str(deployment.main_config),
            f"several supervisords run on it: pids {pids}",
            f"`synapse down`, then end those that are left ({_kill(running)})",
        )  # fmt: skip
    if answers.is_up:
        yield fine("supervisord", f"answers; pid {answers.pid}, version {answers.version}")
        return
    if answers.trouble:
        yield error("supervisord-silent", str(deployment.socket), answers.trouble,
                    "wait a little; if it stays so, `synapse down`")  # fmt: skip
    elif running:
        yield error(
            "supervisord-unreachable", str(deployment.socket),
            f"supervisord runs (pid {running[0].pid}), and its socket is gone",
            f"`synapse down`, then `synapse up` ({_kill(running)} ends it too)",
        )  # fmt: skip
    elif case.is_laid_down:
        yield note("supervisord-down", "supervisord", "does not run", "`synapse up` starts it")
        yield from _left_behind(case)


def _is_supervisord(case: Case, process: Running) -> bool:
    words = process.command
    return str(case.deployment.main_config) in words and any(
        word == "supervisor.supervisord" or os.path.basename(word) == "supervisord"
        for word in words[:3]
    )


def _kill(processes: list[Running]) -> str:
    return "kill " + " ".join(str(one.pid) for one in processes)


def _left_behind(case: Case) -> Iterator[Finding]:
    for path, name in (
        (case.deployment.socket, "socket-stale"), (case.deployment.pidfile, "pidfile-stale"),
    ):  # fmt: skip
        if path.exists():
            yield note(
                name, str(path), "was left by a supervisord that is gone",
                "leave it: the next start takes its place",
            )  # fmt: skip


def check_listener(case: Case) -> Iterator[Finding]:
    """Whether our part in supervisord is loaded, and the listener lives and reports."""
    answers = case.supervisord
    if not answers.is_up:
        return
    if answers.api_version is None:
        yield error(
            "plugin-missing", "supervisord", "runs without [rpcinterface:synapse]: no model is "
            "shown, and no command is taken",
            "see to the main file, then `supervisorctl reload` (models restart too)",
        )  # fmt: skip
        return
    process = (answers.processes or {}).get(LISTENER)
    if process is None:
        yield error(
            "listener-missing", "supervisord", "knows no [eventlistener:synapse]: no model is "
            "started or healed", "see to the main file, then `supervisorctl update`",
        )  # fmt: skip
    elif process.state not in (ProcessState.RUNNING, ProcessState.STARTING):
        yield error(
            "listener-down", "listener", f"is {process.state.name}: nothing is started or healed",
            f"see {case.deployment.log / 'synapse.log'}, then `supervisorctl start synapse`",
        )  # fmt: skip
    elif answers.age_seconds is None or answers.snapshot is None:
        yield warning(
            "listener-silent", "listener", "has not reported yet",
            f"wait a few seconds; then see {case.deployment.log / 'synapse.log'}",
        )  # fmt: skip
    elif answers.age_seconds > _SILENT_SECONDS:
        yield error(
            "listener-silent", "listener",
            f"has not reported for {answers.age_seconds:.0f} s: what is shown is old",
            f"see {case.deployment.log / 'synapse.log'}; `supervisorctl restart synapse`",
        )  # fmt: skip
    else:
        count = len(answers.snapshot.models)
        yield fine("listener", f"reported {answers.age_seconds:.0f} s ago, of {count} models")


def check_fleet(case: Case) -> Iterator[Finding]:
    """Models that the listener has given up, and those that it is about to try again."""
    snapshot = case.supervisord.snapshot
    if snapshot is None:
        return
    for row in snapshot.models:
        if row.phase not in (Phase.FAILED, Phase.BACKOFF):
            continue
        failure = row.last_failure
        log = case.deployment.log / f"{row.name}.log"
        mend = _MENDS.get(failure.failure_class) if failure is not None else None
        tell = error if row.phase is Phase.FAILED else warning
        yield tell(
            "model-failed", row.name, row.explanation,
            mend or f"see what stands above the end in {log}",
        )  # fmt: skip
    yield fine("models", f"{len(snapshot.models)} looked at")


def check_processes(case: Case) -> Iterator[Finding]:
    """Servers of ours that no supervisord looks after, and other people's."""
    ours = os.path.join(str(case.deployment.run), "")
    supervisors = [one.pid for one in case.processes if _is_supervisord(case, one)]
    others = []
    for process in case.processes:
        record = case.record_of(process) if process.user == os.getuid() else ""
        if record.startswith(ours):
            if not any(case.is_below(process, pid) for pid in supervisors):
                yield _orphan(process, os.path.basename(record).removesuffix(".run"))
        elif process.program == SERVER and not case.is_below(process, os.getpid()):
            others.append(_numbered(process))
    if others:
        yield note(
            "servers-of-others", ", ".join(others[:_MOST_NAMED]),
            f"{len(others)} {SERVER} not of this deployment; what memory that takes is respected",
        )  # fmt: skip
    yield fine("processes", f"{len(case.processes)} looked at")


def _numbered(process: Running) -> str:
    """`pid 4711 (port 8080)`."""
    words = process.command
    at = words.index("--port") + 1 if "--port" in words[:-1] else 0
    return f"pid {process.pid} (port {words[at]})" if at else f"pid {process.pid}"


def _orphan(process: Running, name: str) -> Finding:
    return warning(
        "server-orphaned", f"{process.program} (pid {process.pid})",
        f"is a run of {name} that no supervisord looks after; it holds memory and a port",
        f"kill {process.pid}; the next start of {name} does it too",
    )  # fmt: skip
