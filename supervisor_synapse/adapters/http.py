"""Questions to llama-server over HTTP. A failed probe is a value, never an exception.

A question goes to the host it was given and nowhere else: no redirect is followed, no proxy is
used, and no more than 1 MiB is read within the deadline. *Quick* questions are bounded by the
probe timeout; *patient* ones by the stall time, since a server may answer them only between two
batches.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError
from urllib3.util import Timeout, parse_url

from supervisor_synapse.core.model import Health, Role
from supervisor_synapse.core.probes import Activity

_LARGEST_ANSWER_BYTES = 1024 * 1024
_MOST_SLOTS = 1024

_SILENT = -1
_REFUSED = -2
_HEALTH = {
    200: Health.READY, 503: Health.LOADING, _SILENT: Health.SILENT, _REFUSED: Health.REFUSED,
}  # fmt: skip

_METRIC = re.compile(r"^llamacpp:(\w+)(?:\{[^}\n]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
# Counters of llama-server's /metrics that move when something was computed. The first moves with
# each batch; the others only when a request ends, so that they alone prove nothing.
_DECODES = "n_decode_total"
_MOVING_METRICS = (_DECODES, "prompt_tokens_total", "tokens_predicted_total")
# The same in /slots; builds differ in what they show and where.
_MOVING_SLOT_KEYS = frozenset(
    {
        "id_task", "n_decoded", "n_past", "n_remain", "n_prompt_tokens",
        "n_prompt_tokens_processed", "n_tokens",
    }
)  # fmt: skip
# Of these, some move while a request is worked on.
_PROGRESS_SLOT_KEYS = frozenset({"n_decoded", "n_past", "n_prompt_tokens_processed", "n_tokens"})

# What makes a model compute one token, by what it is for.
_CANARIES: Mapping[Role, tuple[str, Mapping[str, object]]] = {
    Role.EMBEDDING: ("/v1/embeddings", {"input": "a"}),
    Role.RERANKER: ("/v1/rerank", {"query": "a", "documents": ["a"]}),
}
_COMPLETION: tuple[str, Mapping[str, object]] = (
    "/completion", {"prompt": "a", "n_predict": 1, "temperature": 0},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens, and the key that it wants."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """How a patient question came back. Answered without an activity: the server does not tell."""

    answered: bool
    activity: Activity | None = None


class Prober:
    """Asks one server and keeps its connections. One thread at a time for each kind of question."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, patience_seconds: float) -> None:
        self.endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        where = parse_url(endpoint.url)
        self._prefix = (where.path or "").rstrip("/")
        # The counters may be asked for while a token is awaited: each has its own connection.
        self._quick, self._patient = (
            _Pool(where.host or "", where.port, maxsize=connections) for connections in (1, 2)
        )
        self._headers = {"Accept": "*/*"}
        if endpoint.api_key is not None:
            self._headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._counters = "/metrics"

    def health(self) -> Health:
        """Whether it serves: one quick question to /health."""
        status, _ = self._get(self._quick, "/health", self._timeout_seconds)
        return _HEALTH.get(status, Health.BROKEN)

    def is_asleep(self) -> bool:
        """Whether it says that it sleeps. /props is the one question that does not wake it."""
        status, body = self._get(self._quick, "/props", self._timeout_seconds)
        if status != 200:
            return False
        try:
            props = json.loads(body)
        except (ValueError, RecursionError):
            return False
        return isinstance(props, dict) and props.get("is_sleeping") is True

    def activity(self) -> Told:
        """What its slots do: one patient question to /metrics, or to /slots where that is off or
        does not tell.
        """
        told = self._told()
        if told.answered and told.activity is None and self._counters == "/metrics":
            self._counters = "/slots"
            told = self._told()
        return told

    def _told(self) -> Told:
        status, body = self._get(self._patient, self._counters, self._patience_seconds)
        if status < 0 or status == 503:
            return Told(answered=False)
        parse = parse_metrics if self._counters == "/metrics" else parse_slots
        return Told(answered=True, activity=parse(body) if status == 200 else None)

    def canary(self, role: Role) -> bool:
        """Whether it answers when one token is asked for; whatever it answers, it computes or
        says why it does not.
        """
        path, body = _CANARIES.get(role, _COMPLETION)
        status, _ = self._ask(self._patient, "POST", path, self._patience_seconds, body)
        return status >= 0 and status != 503

    def close(self) -> None:
        self._quick.close()
        self._patient.close()

    def _get(self, pool: HTTPConnectionPool, path: str, seconds: float) -> tuple[int, bytes]:
        return self._ask(pool, "GET", path, seconds)

    def _ask(
        self,
        pool: HTTPConnectionPool,
        method: str,
        path: str,
        seconds: float,
        body: Mapping[str, object] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body; a negative status for what is no answer.

        A server may close a kept connection just as it is used again, so a refusal is asked twice.
        """
        deadline = _thread.deadline = time.monotonic() + seconds
        headers, content = self._headers, None
        if body is not None:
            headers, content = headers | {"Content-Type": "application/json"}, json.dumps(body)
        for is_last in (False, True):
            try:
                answer = pool.urlopen(
                    method, self._prefix + path, content, headers, retries=False, redirect=False,
                    timeout=Timeout(connect=min(self._timeout_seconds, seconds), read=seconds),
                    preload_content=False,
                )  # fmt: skip
                with contextlib.closing(answer):  # what was read to its end is kept
                    return answer.status, answer.read(_LARGEST_ANSWER_BYTES)
            except (HTTPError, OSError, ValueError) as error:
                is_refused = isinstance(error, NewConnectionError)  # by some versions a timeout
                if isinstance(error, Urllib3TimeoutError) and not is_refused:
                    return _SILENT, b""
                if time.monotonic() >= deadline:  # a body that came too slowly
                    return _SILENT, b""
                if is_last:
                    return _REFUSED, b""
        raise AssertionError("the second try returns")


# --- one deadline for a whole answer, where urllib3 has a timeout for each piece of it -----------

_thread = threading.local()  # .deadline of the question that this thread asks


class _Socket(socket.socket):
    """Receives nothing after the deadline."""

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        left_seconds = _thread.deadline - time.monotonic()
        if left_seconds <= 0:
            raise TimeoutError("the deadline is over")
        self.settimeout(left_seconds)
        return super().recv_into(*arguments, **options)


class _Connection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        plain = self.sock
        self.sock = _Socket(fileno=plain.detach())
        self.sock.settimeout(self.timeout)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


def parse_metrics(body: bytes) -> Activity | None:
    """llama-server's Prometheus text; None where it does not say what it processes and decodes."""
    found = {}
    for name, value in _METRIC.findall(body.decode("utf-8", "replace")):
        try:
            found[name] = int(float(value))
        except (ValueError, OverflowError):
            continue
    busy = found.get("requests_processing")
    if busy is None or busy < 0 or _DECODES not in found:
        return None
    return Activity(
        busy, tuple(found.get(name, 0) for name in _MOVING_METRICS),
        queued=found.get("requests_deferred"), prompt_tokens=found.get("prompt_tokens_total"),
        generated_tokens=found.get("tokens_predicted_total"),
    )  # fmt: skip


def parse_slots(body: bytes) -> Activity | None:
    """llama-server's list of slots; None where it is none, or shows of a busy one no progress."""
    try:
        slots = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
        return None
    counters = [_counters(slot) for slot in slots[:_MOST_SLOTS]]
    is_busy = [slot.get("is_processing") is True for slot in slots[:_MOST_SLOTS]]
    for busy, found in zip(is_busy, counters, strict=True):
        if busy and not any(key in _PROGRESS_SLOT_KEYS for key, _ in found):
            return None
    return Activity(sum(is_busy), tuple(value for found in counters for _, value in found))


def _counters(slot: Mapping[str, object]) -> list[tuple[str, int]]:
    """The moving counters of a slot, also those one level down (`next_token`)."""
    inner = slot.get("next_token")
    parts = [slot, *(inner if isinstance(inner, list) else [inner])]
    return [
        (key, value)
        for part in parts
        if isinstance(part, dict)
        for key, value in part.items()
        if key in _MOVING_SLOT_KEYS and isinstance(value, int)
    ]
