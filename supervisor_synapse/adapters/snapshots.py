"""The listener's snapshot as ASCII JSON text, the form in which it crosses XML-RPC.

XML-RPC has no null and no integer beyond 32 bits, and supervisord cuts non-ASCII replies short;
JSON in an ASCII string has none of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from supervisor_synapse.core.failures import printable
from supervisor_synapse.core.model import (
    DeviceRow,
    Failure,
    ListenerRow,
    ProcessState,
    Row,
    Snapshot,
    Usage,
)
from supervisor_synapse.errors import TransientError

_ROW = TypeAdapter(Row)
_DEVICE = TypeAdapter(DeviceRow)
_LISTENER = TypeAdapter(ListenerRow)


def dump(snapshot: Snapshot) -> str:
    """`{"at": …, "models": […], "devices": […], "listener": {…}}`."""
    return json.dumps(
        {
            "at": snapshot.at, "models": public(snapshot.models),
            "devices": public_devices(snapshot.devices),
            "listener": None if snapshot.listener is None else asdict(snapshot.listener),
        }
    )  # fmt: skip


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
        "started_at": row.started_at,
        "breaker": row.breaker.value,
        "failures": dict(row.failures),
        "usage": {
            "queued": row.usage.queued,
            "prompt_tokens": row.usage.prompt_tokens,
            "generated_tokens": row.usage.generated_tokens,
            "probe_seconds": row.usage.probe_seconds,
            "asleep": row.usage.is_asleep,
        },
    }


def public_devices(rows: Iterable[DeviceRow]) -> list[dict[str, Any]]:
    """The objects of `devices --json`: sizes in bytes."""
    return [
        {
            "name": row.name, "description": row.description, "total": row.total_bytes,
            "free": row.free_bytes, "reserve": row.reserve_bytes, "room": row.room_bytes,
            "others": row.others_bytes, "problem": row.problem,
            "models": [
                {"name": one.model, "held": one.held_bytes, "committed": one.committed_bytes}
                for one in row.models
            ],
        }
        for row in rows
    ]  # fmt: skip


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
        devices = tuple(_device(item) for item in value.get("devices") or ())
        listener = value.get("listener")
        return Snapshot(
            float(value["at"]), rows, devices,
            None if listener is None else _LISTENER.validate_python(listener),
        )  # fmt: skip
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
        "failures": tuple(item.get("failures", {}).items()), "usage": _usage(item.get("usage", {})),
    }  # fmt: skip
    return _ROW.validate_python(flat)


def _usage(item: dict[str, Any]) -> dict[str, Any]:
    known = {key: item[key] for key in Usage.__dataclass_fields__ if key in item}
    return known | {"is_asleep": item.get("asleep", False)}


def _device(item: dict[str, Any]) -> DeviceRow:
    holdings = [
        {"model": one["name"], "held_bytes": one["held"], "committed_bytes": one["committed"]}
        for one in item["models"]
    ]
    flat = {
        "name": item["name"], "description": item["description"], "total_bytes": item["total"],
        "free_bytes": item["free"], "reserve_bytes": item["reserve"], "room_bytes": item["room"],
        "others_bytes": item["others"], "models": holdings, "problem": item["problem"],
    }  # fmt: skip
    return _DEVICE.validate_python(flat)
