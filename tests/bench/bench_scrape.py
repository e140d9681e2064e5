"""What a scrape of /metrics costs supervisord, which does nothing else meanwhile.

A real supervisord with 50 running programs and a snapshot of 50 busy models on two devices. The
processor time is supervisord's own, from request to the last byte. Beside it: what
prometheus_client would take for the text alone.

Run: python -m tests.bench.bench_scrape
"""

from __future__ import annotations

import contextlib
import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from supervisor_synapse.adapters.supervisord import Supervisord
from supervisor_synapse.core.model import (
    DeviceRow,
    Holding,
    ListenerRow,
    Row,
    Snapshot,
    Usage,
)
from tests.bench.table import Figure, show
from tests.integration.harness import BIN, Deployment, deployed, wait_until
from tests.ports import free_ports
from tests.unit.builders import GIB, MIB, row

_MODELS = 50
_SCRAPES = 200
_ROUNDS = 9
_KIB = 1024
_PROGRAM = "[program:{name}]\ncommand=/bin/sleep 3600\nautostart=true\nstartsecs=0\n"


def snapshot() -> Snapshot:
    """Fifty models at work, on two devices, with all that can be known of them."""
    rows = tuple(_row(number) for number in range(_MODELS))
    devices = tuple(_device(f"CUDA{half}", rows[half::2]) for half in range(2))
    now = time.time()
    return Snapshot(now, rows, devices, ListenerRow(1, "0.1.0", now, 0.0123, 0.0012))


def _row(number: int) -> Row:
    usage = Usage(number % 3, 100_003 * number, 20_011 * number, 0.00123 * number)
    return row(
        name=f"qwen2.5-{number}b-instruct-q4_k_m", repo=f"Qwen/Qwen2.5-{number}B-Instruct-GGUF",
        file=f"qwen2.5-{number}b-instruct-q4_k_m.gguf", alias=f"qwen2.5-{number}b",
        device=f"CUDA{number % 2}", measured_bytes=number * 100 * MIB + 7, slots_busy=number % 4,
        restarts=number, started_at=1_760_000_000 + number, failures=(("crashed", number),),
        usage=usage,
    )  # fmt: skip


def _device(name: str, rows: tuple[Row, ...]) -> DeviceRow:
    holdings = tuple(Holding(one.name, one.measured_bytes, 3 * GIB) for one in rows)
    return DeviceRow(
        name, "NVIDIA H100 80GB", 80 * GIB, 9 * GIB, GIB // 2, 8 * GIB, 2 * GIB, holdings
    )


@contextlib.contextmanager
def _supervisord() -> Iterator[tuple[psutil.Process, int]]:
    """A supervisord that has the snapshot, and the port of its web server."""
    with deployed() as at:
        at.synapse("init")
        port = free_ports(1)
        main = at.etc / "supervisord.conf"
        text = main.read_text().replace("autostart=true\nautorestart=true", "autostart=false")
        main.write_text(f"{text}\n[inet_http_server]\nport=127.0.0.1:{port}\n")
        for one in snapshot().models:
            (at.conf_d / f"{one.name}.conf").write_text(_PROGRAM.format(name=one.name))
        with _running(at) as process:
            yield process, port


@contextlib.contextmanager
def _running(at: Deployment) -> Iterator[psutil.Process]:
    rpc = Supervisord(at.prefix / "var" / "run" / "supervisor.sock")
    command = [str(BIN / "supervisord"), "-n", "-s", "-c", str(at.etc / "supervisord.conf")]
    with subprocess.Popen(command, env=at.environment(), stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(rpc.is_up, 20)
            rpc.publish(snapshot())
            wait_until(lambda: len(psutil.Process(process.pid).children()) == _MODELS, 60)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


@dataclass(frozen=True)
class _Cost:
    """Of one scrape."""

    cpu_seconds: float
    wall_seconds: float
    sent_bytes: int


def _scraped(process: psutil.Process, port: int) -> _Cost:
    """What supervisord spends on each of many, one after the other."""
    _scrape(port)  # warm
    took, before = [], _cpu_seconds(process)
    for _ in range(_SCRAPES):
        begun = time.monotonic()
        size = len(_scrape(port))
        took.append(time.monotonic() - begun)
    spent = _cpu_seconds(process) - before
    return _Cost(spent / _SCRAPES, statistics.median(took), size)


def _scrape(port: int) -> bytes:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as client:
        client.request("GET", "/metrics")
        answer = client.getresponse()
        assert answer.status == 200
        return answer.read()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class _Again(Collector):
    """What a page tells, for prometheus_client to tell it."""

    def __init__(self, text: str) -> None:
        self._families = list(text_string_to_metric_families(text))

    def collect(self) -> list[Metric]:
        return self._families


def _library_seconds(port: int) -> tuple[float, float]:
    """Of one core, for the text and for OpenMetrics; the values are at hand already."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Again(_scrape(port).decode()))
    return (
        _median(lambda: generate_latest(registry)),
        _median(lambda: openmetrics.generate_latest(registry)),
    )


def _median(function: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def run() -> bool:
    """Whether the goal was met."""
    with _supervisord() as (process, port):
        cost = _scraped(process, port)
        memory = process.memory_full_info().uss
        text, as_openmetrics = _library_seconds(port)
    return show(
        f"a scrape of {_MODELS} models, in supervisord",
        [
            Figure("of one core", 1000 * cost.cpu_seconds, "ms", 5.0),
            Figure("until answered", 1000 * cost.wall_seconds, "ms"),
            Figure("sent", cost.sent_bytes / _KIB, "KiB"),
            Figure("prometheus_client, text alone", 1000 * text, "ms"),
            Figure("prometheus_client, OpenMetrics alone", 1000 * as_openmetrics, "ms"),
            Figure("supervisord: memory of its own", memory / _KIB / _KIB, "MiB"),
        ],
    )


if __name__ == "__main__":
    sys.exit(not run())
