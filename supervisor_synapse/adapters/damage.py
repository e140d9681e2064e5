"""What is wrong with a model's files, where its server ended without a word about it.

The header reader's tables are large and seldom needed in the listener, so it runs in a process of
its own: python -m supervisor_synapse.adapters.damage FILE ...
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.errors import CatalogError

_SECONDS = 4.0


def find(paths: Sequence[str]) -> str:
    """The first thing that is wrong, in a line; "" where nothing is, or nothing could be told."""
    command = [sys.executable, "-m", __name__, *paths]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=_SECONDS, check=False, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 1 else ""


def main(paths: Sequence[str]) -> int:
    """Print the first problem; exit status 1 where there is one."""
    for path in paths:
        try:
            gguf_header.read(path)
        except CatalogError as error:
            print(ascii(path), error, sep=": ")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
