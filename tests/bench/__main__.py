"""Every benchmark, each in a process of its own; fails when a goal was missed.

Run: make bench
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    missed = [
        path.stem
        for path in sorted(Path(__file__).parent.glob("bench_*.py"))
        if subprocess.run([sys.executable, "-m", f"{__package__}.{path.stem}"]).returncode
    ]
    print(f"\nmissed: {', '.join(missed)}" if missed else "\nall goals met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
