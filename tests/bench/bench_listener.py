"""What watching costs: 50 real llama-servers with tiny models, probed every 5 s.

The processor time of the listener and of supervisord over a minute in which nothing happens, and
the listener's memory. Run: python -m tests.bench.bench_listener
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil

from tests.bench.table import Figure, show
from tests.gguf_factory import write_model
from tests.integration.harness import Deployment, deployed

_MODELS = 50
_SETTLE_SECONDS = 10.0
_WINDOW_SECONDS = 60.0
_READY_SECONDS = 180.0
_MIB = 1024 * 1024


@dataclass(frozen=True)
class _Cost:
    """Of one process, over the window."""

    cpu_share: float
    memory_bytes: int


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _measure(deployment: Deployment) -> tuple[_Cost, _Cost]:
    """The listener's and supervisord's."""
    supervisord = deployment.supervisord()
    listener = psutil.Process(int(deployment.ctl("pid", "synapse").out))
    processes = (listener, supervisord)
    time.sleep(_SETTLE_SECONDS)  # a measurement of a steady state, not a wait for one
    begun = time.monotonic()
    before = [_cpu_seconds(process) for process in processes]
    time.sleep(_WINDOW_SECONDS)
    elapsed = time.monotonic() - begun
    after = [_cpu_seconds(process) for process in processes]
    costs = [
        _Cost((late - early) / elapsed, process.memory_info().rss)
        for process, early, late in zip(processes, before, after, strict=True)
    ]
    return costs[0], costs[1]


def run() -> bool:
    """Whether the goals were met."""
    with deployed("enable = all\nmax_parallel = 8", ports=_MODELS + 5) as deployment:
        for number in range(_MODELS):
            source = write_model(deployment.sources / f"{number}.gguf", seed=number)
            deployment.hub.add(f"bench/tiny-{number}", {f"tiny-{number}.gguf": source})
        deployment.synapse("up", "--detach")
        deployment.wait_ready(_READY_SECONDS)
        listener, supervisord = _measure(deployment)
    return show(
        f"watching {_MODELS} idle models, probes every 5 s",
        [
            Figure("listener: share of one core", 100 * listener.cpu_share, "%", 3.0),
            Figure("listener: memory", listener.memory_bytes / _MIB, "MiB", 80.0),
            Figure("supervisord: share of one core", 100 * supervisord.cpu_share, "%", 5.0),
        ],
    )


if __name__ == "__main__":
    sys.exit(not run())
