"""The plan for 200 models on 8 devices, headers known; and `synapse plan --json`, whole.

The second with a warm header cache, on the devices of this machine.

Run: python -m tests.bench.bench_plan
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from supervisor_synapse.core.catalog import Model
from supervisor_synapse.core.plan import make_plan
from supervisor_synapse.core.settings import Settings
from tests import gguf_factory
from tests.bench.table import Figure, show
from tests.unit.builders import FLAGS, GIB, engine, gpu, host, model, world

_MODELS = 200
_ROUNDS = 5
_SYNAPSE = Path(sys.executable).parent / "synapse"


_TIMES_PLANNED = 7
_BILLIONS = (1, 3, 7, 8, 13, 30, 70)
_QUANTIZATIONS = {"Q2_K": 0.35, "Q4_K_M": 0.6, "Q8_0": 1.06}  # bytes a parameter


def _fleet(seed: int) -> list[Model]:
    """Models as people have them: of several sizes, some in several quantizations."""
    chance = random.Random(seed)
    models = []
    while len(models) < _MODELS:
        number, billions = len(models), chance.choice(_BILLIONS)
        layers = chance.choice((24, 28, 32, 40, 48, 64, 80))
        for quantization in chance.sample(sorted(_QUANTIZATIONS), chance.randint(1, 3)):
            size = int(billions * 10**9 * _QUANTIZATIONS[quantization])
            name = f"m{number}-{quantization.lower()}"
            models.append(
                model(
                    name=name, key=name, repo=f"o/m{number}", quantization=quantization,
                    size_bytes=size, parameters=billions * 10**9, layers=layers,
                    block_bytes=(size // (layers + 2),) * layers, heads=(32,), heads_kv=(8,),
                    embedding_bytes=size // (layers + 2), embedding_length=4096,
                    feed_forward_length=(14336,), vocabulary_size=128_000, context_length=131072,
                )
            )  # fmt: skip
    return models[:_MODELS]


def _made(devices: int) -> float:
    """CPU seconds of one plan, each time with headers that were not seen before."""
    flags = FLAGS | {"--fit", "--log-verbosity", "--tensor-split", "--rpc"}
    gpus = [gpu(f"CUDA{number}", 80 * GIB) for number in range(devices)]
    where = world(devices=(*gpus, host(512 * GIB)), engine=engine(flags=flags))
    settings = Settings(first_port=20000, last_port=20999)
    times = []
    for seed in range(_TIMES_PLANNED):
        models = _fleet(seed)
        begun = time.process_time()
        plan = make_plan(models, settings, where)
        times.append(time.process_time() - begun)
        assert len(plan.programs) == _MODELS
    return statistics.median(times)


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
    made = show(
        f"the plan for {_MODELS} models on 8 devices, headers known",
        [Figure("made, of one core", 1000 * _made(devices=8), "ms", 100)],
    )
    told = show(
        f"synapse plan --json, {count} models, whole process",
        [Figure("cold", cold, "s"), Figure("warm", warm, "s", 1.0)],
    )
    return made and told


if __name__ == "__main__":
    sys.exit(not run())
