"""The listener's snapshot as ASCII JSON text, the form in which it crosses XML-RPC.

XML-RPC has no null and no integer beyond 32 bits, and supervisord cuts non-ASCII replies short;
JSON in an ASCII string has none of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter

from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import Failure, ProcessState, Row, Snapshot
from supervisor_synapse.errors import TransientError

_ROW = TypeAdapter(Row)


def dump(snapshot: Snapshot) -> str:
    """`{"at": …, "models": […]}`."""
    return json.dumps({"at": snapshot.at, "models": public(snapshot.models)})


def public(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The objects of `models --json`: sizes in bytes, times in seconds."""
    return [_public(row) for row in rows]


def _public(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "repo": row.repo,
        "file": row.file,
        "tier": row.tier.label,
        "role": row.role.value,
        "enabled": row.enabled,
        "phase": row.phase.value,
        "reason": row.reason,
        "state": row.state.name,
        "pid": row.pid,
        "port": row.port,
        "url": row.url,
        "alias": row.alias,
        "context": row.context,
        "parallel": row.parallel,
        "device": row.device,
        "memory": {
            "estimated": row.estimated_bytes,
            "source": row.estimate_source,
            "measured": row.measured_bytes,
        },
        "slots": {"busy": row.slots_busy, "total": row.slots_total},
        "restarts": row.restarts,
        "ready_seconds": row.ready_seconds,
        "generation": row.generation,
        "trial": row.trial,
        "last_failure": _failure(row.last_failure),
        "next_retry_in": row.next_retry_seconds,
    }


def _failure(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "class": failure.failure_class.value, "message": failure.message, "at": failure.at,
    }  # fmt: skip


def load(text: str) -> Snapshot:
    """The inverse of `dump`.

    Raises:
        TransientError: the text is not such a snapshot.
    """
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        rows = tuple(_row(item) for item in value["models"])
        return Snapshot(float(value["at"]), rows)
    except (
        ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        why = printable(str(error))
        raise TransientError(f"cannot read the listener's snapshot: {why}") from None


def age_seconds(text: str) -> float | None:
    """How long ago the plugin took the snapshot that it answers with; None: it does not say."""
    try:
        age = json.loads(text)["age_seconds"]
        return float(age) if isinstance(age, int | float) and math.isfinite(age) else None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def _finite(text: str) -> float:
    """A JSON number; NaN and infinities are none, though Python writes and reads them."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number")
    return number


def _row(item: dict[str, Any]) -> Row:
    memory, slots, failure = item["memory"], item["slots"], item["last_failure"]
    flat = {key: item[key] for key in Row.__dataclass_fields__ if key in item}
    flat |= {
        "tier": item["tier"].lower(),
        "state": ProcessState[item["state"]],
        "estimated_bytes": memory["estimated"],
        "estimate_source": memory["source"],
        "measured_bytes": memory["measured"],
        "slots_busy": slots["busy"],
        "slots_total": slots["total"],
        "next_retry_seconds": item["next_retry_in"],
        "last_failure": failure
        and {
            "failure_class": failure["class"], "message": failure["message"], "at": failure["at"],
        },
    }  # fmt: skip
    return _ROW.validate_python(flat)
