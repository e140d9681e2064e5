"""The header of the real 270M model (262,144 tokens): our reader beside gguf.GGUFReader.

Run as `python -m tests.bench.bench_headers`. Every reading has a process of its own, so that what
one loads or keeps does not help the other. Exit status 1: a goal is missed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import real_model
from tests.bench.table import Figure, show

GOAL_MS = 60.0
GOAL_MIB = 40.0

# What both share: the peak before anything is loaded, the import, the reading, the peak after.
_CHILD = """
import json, resource, sys, time

def peak_kib():
    if sys.platform == "linux":  # ru_maxrss begins with the parent's there
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before_kib, begun = peak_kib(), time.perf_counter()
{load}
loaded = time.perf_counter()
tensors = {read}
done = time.perf_counter()
print(json.dumps([(loaded - begun) * 1e3, (done - loaded) * 1e3,
                  (peak_kib() - before_kib) / 1024, tensors]))
"""


@dataclass(frozen=True, slots=True)
class Reader:
    load: str
    read: str
    runs: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the runs; memory is the peak over the bare interpreter's."""

    import_ms: float
    read_ms: float
    peak_mib: float
    tensors: int


READERS = (
    Reader(
        "from supervisor_synapse.adapters import gguf_header",
        "gguf_header.read(sys.argv[1]).tensors",
        runs=9,
    ),
    Reader(
        "import gguf",
        "len(gguf.GGUFReader(sys.argv[1]).tensors)",
        runs=1,  # it takes seconds
    ),
)


def measure(reader: Reader, model: Path) -> Figures:
    script = _CHILD.format(load=reader.load, read=reader.read)
    runs: list[list[float]] = []
    for _ in range(reader.runs):
        child = subprocess.run(
            [sys.executable, "-c", script, str(model)], check=True, capture_output=True
        )
        runs.append(json.loads(child.stdout))
    import_ms, read_ms, peak_mib, tensors = (
        statistics.median(column) for column in zip(*runs, strict=True)
    )
    return Figures(import_ms, read_ms, peak_mib, int(tensors))


def main() -> int:
    published = real_model.original()
    ours, theirs = (measure(reader, published) for reader in READERS)
    met = show(
        "The header of the real 270M model, each reader in fresh processes "
        f"(medians of {' and '.join(str(reader.runs) for reader in READERS)})",
        [
            Figure("ours: time", ours.read_ms, "ms", GOAL_MS),
            Figure("ours: peak over the interpreter", ours.peak_mib, "MiB", GOAL_MIB),
            Figure("ours: import", ours.import_ms, "ms"),
            Figure("gguf.GGUFReader: time", theirs.read_ms, "ms"),
            Figure("gguf.GGUFReader: peak over the interpreter", theirs.peak_mib, "MiB"),
            Figure("gguf.GGUFReader: import", theirs.import_ms, "ms"),
        ],
    )
    if ours.tensors != theirs.tensors:
        print("the readers disagree about the number of tensors", file=sys.stderr)
    return 0 if met and ours.tensors == theirs.tensors else 1


if __name__ == "__main__":
    sys.exit(main())
