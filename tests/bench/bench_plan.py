"""`synapse plan --json` on 200 models with a warm header cache: the whole process.

Run: python -m tests.bench.bench_plan
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import gguf_factory
from tests.bench.table import Figure, show

_MODELS = 200
_ROUNDS = 5
_SYNAPSE = Path(sys.executable).parent / "synapse"


def _plan(prefix: Path) -> tuple[float, int]:
    """Seconds of one whole process, and how many models it planned."""
    begun = time.monotonic()
    done = subprocess.run(
        [_SYNAPSE, "--prefix", prefix, "plan", "--json"], check=True, capture_output=True
    )
    return time.monotonic() - begun, len(json.loads(done.stdout)["models"])


def run() -> bool:
    """Whether the goal was met."""
    os.umask(0o077)
    with tempfile.TemporaryDirectory(prefix="syn") as folder:
        root = Path(folder)
        cache = gguf_factory.hub_cache(root / "hub")
        for number in range(_MODELS):
            file = gguf_factory.write_model(root / f"{number}.gguf", seed=number)
            cache.add(f"bench/model-{number}", {f"model-{number}-q4_k_m.gguf": file})
        prefix = root / "p"
        subprocess.run([_SYNAPSE, "--prefix", prefix, "init"], check=True, capture_output=True)
        (prefix / "etc" / "synapse.conf").write_text(
            f"[synapse]\ncache_dirs = {root}/hub\nport_range = 20000-20999\n"
        )
        cold, count = _plan(prefix)
        warm = statistics.median(_plan(prefix)[0] for _ in range(_ROUNDS))
    return show(
        f"synapse plan --json, {count} models, whole process",
        [Figure("cold", cold, "s"), Figure("warm", warm, "s", 1.0)],
    )


if __name__ == "__main__":
    sys.exit(not run())
