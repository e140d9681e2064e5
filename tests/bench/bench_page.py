"""What a view of /synapse.html costs supervisord with 50 models: its own CPU time, whole.

A real supervisord with the plugin and 50 programs, none of them running; the snapshot and a full
history are published as the listener does. Views as a browser asks for them, packed, over TCP,
with the password; idle turns are taken off. Beside it supervisord's own page with as many programs.

Run: python -m tests.bench.bench_page
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import sys
import time
from collections.abc import Iterator
from typing import Any

from supervisor_synapse.core.model import (
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    Row,
    Snapshot,
)
from tests.bench.table import Figure, show
from tests.integration.bare_supervisord import LOGIN, BareSupervisord, bare_supervisord
from tests.unit.builders import GIB, MIB, row

MODELS = 50
_ROUNDS = 5
_VIEWS = 40
_LINES_OF_EACH = 50


def fleet(count: int) -> tuple[Row, ...]:
    """Models as they are met: most of them ready, some in trouble, all with something to say."""
    rows = []
    for number in range(count):
        phase = (Phase.READY,) * 6 + (Phase.DEFERRED, Phase.FAILED, Phase.BACKOFF, Phase.LOADING)
        failure = Failure(FailureClass.CRASHED, f"ggml_abort: line {number} of a log", time.time())
        rows.append(
            row(
                name=f"model-{number}-q4_k_m", repo=f"owner/Model-{number}-Instruct-GGUF",
                phase=phase[number % len(phase)], port=8100 + number,
                url=f"http://127.0.0.1:{8100 + number}", slots_busy=1, started_at=1_700_000_000,
                last_failure=failure if number % 5 == 0 else None, generation=number,
                reason="answers 1.2 s after its start, as it did before and will again",
                failures=(("crashed", 2),), restarts=number % 3, measured_bytes=200 * MIB,
            )
        )  # fmt: skip
    return tuple(rows)


def device(rows: tuple[Row, ...]) -> DeviceRow:
    """One that holds them all."""
    holdings = tuple(Holding(one.name, 180 * MIB, 200 * MIB) for one in rows)
    return DeviceRow(
        "CUDA0", "NVIDIA H100", 80 * GIB, 60 * GIB, 512 * MIB, 40 * GIB, 4 * GIB, holdings
    )


def history(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """As many lines as are kept of each."""
    return [
        {
            "when": 1_700_000_000.0 + turn, "model": one.name, "from": "loading", "to": "ready",
            "reason": "answers 1.2 s after its start", "class": None, "evidence": None,
            "incarnation": None,
        }
        for turn in range(_LINES_OF_EACH)
        for one in rows
    ]  # fmt: skip


@contextlib.contextmanager
def running(count: int) -> Iterator[BareSupervisord]:
    """supervisord with so many models, and all there is to say of them."""
    rows = fleet(count)
    listener = ListenerRow(1, "1.0", time.time(), 0.01, 0.0)
    with bare_supervisord(one.name for one in rows) as host:
        host.publish(Snapshot(time.time(), rows, (device(rows),), listener), history(rows))
        yield host


def views(host: BareSupervisord, path: str) -> tuple[float, int]:
    """CPU milliseconds of supervisord a view, and the bytes of one."""
    token = base64.b64encode(":".join(LOGIN).encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Accept-Encoding": "gzip"}
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=30)
    before, size = _cpu_seconds(host), 0
    for _ in range(_VIEWS):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        size = len(answer.read())
        assert answer.status == 200
    spent = _cpu_seconds(host) - before
    connection.close()
    return spent / _VIEWS * 1000, size


def _cpu_seconds(host: BareSupervisord) -> float:
    times = host.process.cpu_times()
    return float(times.user + times.system)


def main() -> int:
    with running(MODELS) as host:
        views(host, "/synapse.html")
        ours = [views(host, "/synapse.html") for _ in range(_ROUNDS)]
        stock = [views(host, "/index.html") for _ in range(_ROUNDS)]
    figures = [
        Figure("a view of the page, supervisord's CPU time", min(ours)[0], "ms", 5.0),
        Figure("what is sent", ours[0][1] / 1024, "KiB"),
        Figure("a view of supervisord's own page", min(stock)[0], "ms"),
    ]
    return not show(f"the page with {MODELS} models", figures)


if __name__ == "__main__":
    sys.exit(main())
