"""What a look at an unchanged fleet costs, and what one changed model of fifty disturbs.

Fifty real llama-servers with tiny models. `synapse discover`, as a user runs it, from start to
end: nothing is restarted and no file touched. Then one model gets another context: only its
process may change. Run: python -m tests.bench.bench_changes
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from tests.bench.table import Figure, show
from tests.gguf_factory import write_model
from tests.integration.harness import Deployment, deployed

_MODELS = 50
_RUNS = 5
_READY_SECONDS = 180.0
_SETTINGS = "enable = all\nmax_parallel = 8"


def _timed(deployment: Deployment) -> float:
    began = time.perf_counter()
    deployment.synapse("discover")
    return time.perf_counter() - began


def _files(deployment: Deployment) -> dict[Path, int]:
    """Modification times of what a discovery may write."""
    listeners_own = {"state.json", "memory.json"}
    return {
        path: path.stat().st_mtime_ns
        for path in (*deployment.etc.rglob("*"), *deployment.lib.rglob("*"))
        if path.is_file() and path.name not in listeners_own
    }


def run() -> bool:
    """Whether the goals were met."""
    with deployed(_SETTINGS, ports=_MODELS + 5) as deployment:
        for number in range(_MODELS):
            path = write_model(deployment.sources / f"m{number:02d}.gguf", seed=number)
            deployment.hub.add(f"acme/m{number:02d}", {path.name: path})
        deployment.synapse("up", "--detach", expect=None)
        deployment.wait_ready(_READY_SECONDS)
        _timed(deployment)  # what loads have taught is in the registry from now on
        files, pids = _files(deployment), deployment.pids()
        same = [_timed(deployment) for _ in range(_RUNS)]
        touched = sum(files[path] != now for path, now in _files(deployment).items())
        restarted = sum(pids[name] != pid for name, pid in deployment.pids().items())

        deployment.configure(f"{_SETTINGS}\n[model:m07]\ncontext = 256")
        one = _timed(deployment)
        deployment.wait_for({"m07": "ready"}, _READY_SECONDS)
        changed = [name for name, pid in deployment.pids().items() if pids[name] != pid]
    return show(
        f"Changes, {_MODELS} models up",
        [
            Figure("discover, nothing changed", statistics.median(same), "s", 1.0),
            Figure("  files touched", touched, "", 0.0),
            Figure("  models restarted", restarted, "", 0.0),
            Figure("discover, one model changed, until it is ready", one, "s"),
            Figure("  models restarted beside it", len(set(changed) - {"m07"}), "", 0.0),
        ],
    )


if __name__ == "__main__":
    sys.exit(0 if run() else 1)
