"""var/lib/state.json: what the listener remembers of each model, for the listener after it.

Times in it are monotonic, so the file holds only within one boot of the machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store
from supervisor_synapse.core.state import ModelState

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Remembered:
    """All states of one boot; `at` is monotonic."""

    boot: str
    at: float
    models: dict[str, ModelState] = field(default_factory=dict)


_REMEMBERED = TypeAdapter(Remembered)


def boot_id() -> str:
    """Names this boot of the machine; "" where the system has no name for it."""
    try:
        if sys.platform == "darwin":
            return subprocess.run(
                ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, check=True,
                text=True, timeout=5,
            ).stdout.strip()  # fmt: skip
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def load(path: Path, boot: str) -> dict[str, ModelState]:
    """The states that were saved since this boot; a file that does not validate is set aside."""
    value = store.read_json(path)
    if value is None:
        return {}
    try:
        remembered = _REMEMBERED.validate_python(value)
    except ValidationError:
        store.set_aside(path)
        return {}
    is_of_this_boot = remembered.boot == boot and remembered.at <= time.monotonic()
    if not is_of_this_boot:
        return {}
    # Another supervisord may run by now, which has stopped nothing yet.
    return {name: replace(model, stopped_at=None) for name, model in remembered.models.items()}


def save(path: Path, boot: str, models: Mapping[str, ModelState]) -> None:
    """Write all of them, or nothing.

    Raises:
        OSError: nothing was changed.
    """
    remembered = Remembered(boot, time.monotonic(), dict(models))
    store.write_json(path, _REMEMBERED.dump_python(remembered, mode="json"))
