"""Checks of versions: what is installed, what it needs, and what runs of it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import supervisor_synapse
from supervisor_synapse.core.findings import Finding, error, fine, warning
from supervisor_synapse.core.model import Engine
from supervisor_synapse.doctor.case import Case
from supervisor_synapse.doctor.engine import engine_of
from supervisor_synapse.version import VERSION

_DISTRIBUTION = "supervisor_synapse"
_SHOWN = ("supervisor", "pydantic", "huggingface_hub", "psutil", "jinja2", "gguf")
_NEEDED = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)\s*$")
_STARTED_AFTER_SECONDS = 2.0  # what is installed in the same moment is not newer


def of(case: Case) -> tuple[tuple[str, str], ...]:
    """Name and version of everything that takes part, for a report of a bug."""
    found = [("supervisor_synapse", VERSION), ("python", platform.python_version())]
    found += [(name, installed(name)) for name in _SHOWN]
    engine = engine_of(case)
    found.append(("engine", engine.version if isinstance(engine, Engine) else ""))
    found.append(("system", f"{platform.system()} {platform.release()} {platform.machine()}"))
    answers = case.supervisord
    if answers.is_up:
        found.append(("running supervisor", answers.version))
        found.append(("running namespace", answers.api_version or ""))
        found.append(("running listener", _listener(case)))
    return tuple(found)


def _listener(case: Case) -> str:
    snapshot = case.supervisord.snapshot
    return snapshot.listener.version if snapshot is not None and snapshot.listener else ""


def installed(name: str) -> str:
    """The version of a distribution; "" where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def check_versions(case: Case) -> Iterator[Finding]:
    """What is needed and not there, and whether what runs is what is installed."""
    for name, least in _needed():
        version = installed(name)
        if not version:
            yield error(
                "package-missing", name, "is not installed", f"pip install '{name}>={least}'"
            )
        elif _numbers(version) < _numbers(least):
            yield error(
                "package-old", name, f"is {version}, and {least} or newer is needed",
                f"pip install --upgrade '{name}>={least}'",
            )  # fmt: skip
    yield from _as_installed(case)
    yield fine("supervisor_synapse", VERSION)


def _needed() -> Iterator[tuple[str, str]]:
    """The requirements of every installation, extras left out."""
    try:
        required = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    for line in required:
        match = _NEEDED.fullmatch(line)
        if match:
            yield match[1], match[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _as_installed(case: Case) -> Iterator[Finding]:
    """A supervisord goes on with the code that it was started with."""
    answers = case.supervisord
    if not answers.is_up:
        return
    running = _listener(case)
    mend = "`supervisorctl reload`, or `synapse down` and `synapse up` (models restart too)"
    if running and running != VERSION:
        yield warning(
            "version-differs", "listener", f"runs {running}, installed is {VERSION}", mend
        )
    process = case.process(answers.pid)
    if process is not None and process.started_at + _STARTED_AFTER_SECONDS < _changed_at():
        yield warning(
            "package-newer", "supervisord", "was started before the package was changed, and runs "
            "the former code", "`synapse down`, then `synapse up`",
        )  # fmt: skip


def _changed_at() -> float:
    """When what runs inside supervisord was written last."""
    folder = Path(supervisor_synapse.__file__).parent
    files = [*folder.glob("*.py"), *folder.glob("plugin/*.py"), *folder.glob("core/*.py")]
    return max((path.stat().st_mtime for path in files), default=0.0)
