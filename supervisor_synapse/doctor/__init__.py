"""`synapse doctor`: looks at everything a deployment stands on, and changes nothing.

Each check is a small function from a `Case` (what is there) to findings. Checks run beside each
other, each in a thread of its own: one that crashes is itself a finding, one that is still asking
when its time is over is left behind, and the others go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core.findings import (
    Examination,
    Examined,
    Finding,
    Severity,
    error,
    shown,
)
from supervisor_synapse.doctor import (
    blobs,
    caches,
    configuration,
    engine,
    exposure,
    network,
    permissions,
    running,
    versions,
)
from supervisor_synapse.doctor.case import Case

CHECK_SECONDS = 25.0  # the engine and the disk may be slow the first time


@dataclass(frozen=True, slots=True)
class Check:
    """What is looked at, and by which function."""

    name: str
    run: Callable[[Case], Iterable[Finding]]


CHECKS = (
    Check("settings", configuration.check_settings),
    Check("main file", configuration.check_main_file),
    Check("blocks", configuration.check_blocks),
    Check("state", configuration.check_state),
    Check("engine", engine.check_engine),
    Check("processor", engine.check_processor),
    Check("devices", engine.check_devices),
    Check("cache", caches.check_caches),
    Check("models", caches.check_models),
    Check("disk", caches.check_disk),
    Check("ports", network.check_ports),
    Check("hosts", network.check_hosts),
    Check("web server", network.check_web_server),
    Check("permissions", permissions.check_deployment),
    Check("programs", permissions.check_programs),
    Check("socket", permissions.check_socket),
    Check("keys", exposure.check_keys),
    Check("key files", exposure.check_key_files),
    Check("supervisord", running.check_supervisord),
    Check("listener", running.check_listener),
    Check("fleet", running.check_fleet),
    Check("processes", running.check_processes),
    Check("versions", versions.check_versions),
    Check("gateway", network.check_gateway),
)


def examine(
    deployment: Deployment,
    *,
    checks: Sequence[Check] = CHECKS,
    seconds: float = CHECK_SECONDS,
    deep: Callable[[int, int], None] | None = None,
) -> Examination:
    """Run all checks; nothing is raised for what they find, or for what they die of.

    `deep`: compare the content of blobs too, and be told how many bytes of how many are read.
    """
    case = Case(deployment)
    threads = [_Thread(check, case) for check in checks]
    deadline = time.monotonic() + seconds
    done = [thread.result(max(deadline - time.monotonic(), 0.0), seconds) for thread in threads]
    if deep is not None:
        check = Check("checksums", partial(blobs.check_blobs, progress=deep))
        done.append(Examined(check.name, _run(check, case)))
    return Examination(tuple(done), versions.of(case))


@dataclass
class _Thread:
    """One check under way. A thread that hangs does not keep the process from ending."""

    check: Check
    case: Case
    _found: list[tuple[Finding, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name=self.check.name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._found.append(_run(self.check, self.case))

    def result(self, wait_seconds: float, allowed_seconds: float) -> Examined:
        self._thread.join(wait_seconds)
        findings = self._found[0] if self._found else (_late(self.check, allowed_seconds),)
        return Examined(self.check.name, findings)


def _run(check: Check, case: Case) -> tuple[Finding, ...]:
    found = []
    try:
        for finding in check.run(case):
            found.append(shown(finding))
    except Exception as failure:  # whatever a check dies of costs only what it had still to find
        said = f"this check failed: {type(failure).__name__}: {failure}"
        mend = "nothing is known of what it looks at; please report this"
        found.append(shown(Finding(Severity.ERROR, "check-failed", check.name, said, mend)))
    return tuple(found)


def _late(check: Check, seconds: float) -> Finding:
    return error(
        "check-late", check.name, f"gave no answer within {seconds:g} s",
        "look whether a disk, a driver or supervisord hangs",
    )  # fmt: skip
