"""How long discovery of many models takes, each run in a process of its own.

    python -m tests.bench.bench_discovery

Fifty repos in a hub cache, each a file of its own with the real 270M model's header (a vocabulary
of 262,144 tokens) and a hole in place of the weights, which discovery never reads. Measured from
outside, less what the bare interpreter takes. Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from supervisor_synapse.adapters import gguf_header
from tests import real_model
from tests.bench.table import Figure, show

MODELS = 50
RUNS = 5
COLD_GOAL_SECONDS = 3.0
WARM_GOAL_SECONDS = 0.3

_DISCOVERY = """
import sys
from pathlib import Path
from supervisor_synapse.adapters.header_cache import HeaderCache
from supervisor_synapse.adapters import hfcache
from supervisor_synapse.core.catalog import build_catalog
found = hfcache.scan([sys.argv[1]], [], HeaderCache(Path(sys.argv[2])))
catalog = build_catalog(found.files, {})
assert not found.problems and not catalog.problems, (found.problems, catalog.problems)
print(len(catalog.models))
"""


def write_cache(root: Path, model: Path, count: int) -> list[Path]:
    """A hub cache of `count` repos with one file each; their blobs."""
    with model.open("rb") as file:
        header = file.read(gguf_header.read(model).header_bytes)
    blobs = []
    for number in range(count):
        repo = root / f"models--bench--copy-{number:02d}-GGUF"
        blob = repo / "blobs" / f"{number:064x}"
        snapshot = repo / "snapshots" / f"{number:040x}"
        for folder in (blob.parent, snapshot, repo / "refs"):
            folder.mkdir(parents=True)
        with blob.open("wb") as file:
            file.write(header)
            file.truncate(model.stat().st_size)
            os.fsync(file.fileno())
        (snapshot / model.name).symlink_to(os.path.relpath(blob, snapshot))
        (repo / "refs" / "main").write_text(snapshot.name)
        blobs.append(blob)
    return blobs


def forget(files: list[Path]) -> None:
    """Drop files from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(code: str, *arguments: str) -> float:
    """How long a Python process takes for `code`, which prints how many models it found."""
    before = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    elapsed = time.perf_counter() - before
    if arguments and int(run.stdout) != MODELS:
        raise SystemExit(f"found {run.stdout.strip()} models instead of {MODELS}")
    return elapsed


def measure(root: Path, model: Path) -> list[Figure]:
    """Seconds beyond the interpreter's own."""
    blobs = write_cache(root / "hub", model, MODELS)
    arguments = (str(root / "hub"), str(root / "headers.json"))
    interpreter = statistics.median(seconds("pass") for _ in range(RUNS))
    cold = []
    for _ in range(3):
        (root / "headers.json").unlink(missing_ok=True)
        forget(blobs)
        cold.append(seconds(_DISCOVERY, *arguments))
    warm = [seconds(_DISCOVERY, *arguments) for _ in range(RUNS)]
    return [
        Figure("cold", statistics.median(cold) - interpreter, "s", COLD_GOAL_SECONDS),
        Figure(
            "from the header cache", statistics.median(warm) - interpreter, "s", WARM_GOAL_SECONDS
        ),
    ]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="synapse-bench-") as folder:
        figures = measure(Path(folder), real_model.original())
    return int(not show(f"discovery of {MODELS} models of 262k words each", figures))


if __name__ == "__main__":
    sys.exit(main())
