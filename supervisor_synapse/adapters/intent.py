"""var/lib/intent.json: which models were enabled or disabled by command; survives everything.

Written by the listener alone; discovery reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store

_INTENT = TypeAdapter(dict[str, bool])


def load(path: Path) -> dict[str, bool]:
    """Program name → enabled; a file that does not validate is set aside."""
    value = store.read_json(path)
    if value is None:
        return {}
    try:
        return _INTENT.validate_python(value, strict=True)
    except ValidationError:
        store.set_aside(path)
        return {}


def save(path: Path, intent: Mapping[str, bool]) -> None:
    """Write all of it, or nothing.

    Raises:
        OSError: nothing was changed.
    """
    store.write_json(path, dict(sorted(intent.items())))
