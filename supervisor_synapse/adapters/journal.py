"""var/lib/journal.json: operations under way, so that they are finished after a crash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store
from supervisor_synapse.core.swap import Swap

_SWAPS = TypeAdapter(list[Swap])


def load(path: Path) -> tuple[Swap, ...]:
    """The swaps under way; a file that does not validate is set aside."""
    value = store.read_json(path)
    if value is None:
        return ()
    try:
        return tuple(_SWAPS.validate_python(value))
    except ValidationError:
        store.set_aside(path)
        return ()


def save(path: Path, swaps: Sequence[Swap]) -> None:
    """Write all of them, or nothing.

    Raises:
        OSError: nothing was changed.
    """
    store.write_json(path, _SWAPS.dump_python(list(swaps), mode="json"))
