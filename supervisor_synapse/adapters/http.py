"""Probes of llama-server over HTTP. A failed probe is a value, never an exception.

A probe goes to the host it was given and nowhere else: no redirect is followed, no proxy is used,
and no more than 1 MiB is read within the deadline.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import requests

from supervisor_synapse.core.model import Health

_LARGEST_ANSWER_BYTES = 1024 * 1024
_METRIC = re.compile(r"^llamacpp:(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens, and the key that it wants."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe found. None: not known, which is no failure."""

    health: Health
    seconds: float
    slots_busy: int | None = None


class Prober:
    """Asks one server; keeps its connection. For one thread at a time."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        self.endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._session.trust_env = False
        if endpoint.api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {endpoint.api_key}"

    def probe(self, *, with_slots: bool) -> Reading:
        """Readiness by /health, and how many slots are busy by /metrics."""
        begun = time.monotonic()
        status, _ = self._get("/health")
        health = _HEALTH.get(status, Health.BROKEN)
        seconds = time.monotonic() - begun
        busy = self._slots_busy() if with_slots and health is Health.READY else None
        return Reading(health, seconds, busy)

    def close(self) -> None:
        self._session.close()

    def _slots_busy(self) -> int | None:
        status, body = self._get("/metrics")
        if status != 200:
            return None
        return _busy(body.decode("utf-8", "replace"))

    def _get(self, path: str) -> tuple[int, bytes]:
        """Status and body; a negative status for what is no answer."""
        deadline = time.monotonic() + self._timeout_seconds
        try:
            with self._session.get(
                self.endpoint.url + path, timeout=self._timeout_seconds, stream=True,
                allow_redirects=False,
            ) as answer:  # fmt: skip
                return answer.status_code, _bounded_body(answer, deadline)
        except requests.Timeout:
            return _SILENT, b""
        except (requests.RequestException, OSError, ValueError):
            return _REFUSED, b""


_SILENT = -1
_REFUSED = -2
_HEALTH = {
    200: Health.READY, 503: Health.LOADING, _SILENT: Health.SILENT, _REFUSED: Health.REFUSED,
}  # fmt: skip


def _bounded_body(answer: requests.Response, deadline: float) -> bytes:
    body = b""
    for piece in answer.iter_content(65536):
        body += piece
        if len(body) > _LARGEST_ANSWER_BYTES:
            break
        if time.monotonic() > deadline:
            raise requests.Timeout
    return body


def _busy(text: str) -> int | None:
    for name, value in _METRIC.findall(text):
        if name == "requests_processing":
            try:
                return int(float(value))
            except (ValueError, OverflowError):
                return None
    return None
