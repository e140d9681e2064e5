"""The pictures of the page in docs/images, of a made-up fleet on one machine.

Run: python -m tests.screenshots
"""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

from supervisor_synapse.core.model import (
    DeviceRow,
    Failure,
    FailureClass,
    Holding,
    ListenerRow,
    Phase,
    ProcessState,
    Row,
    Snapshot,
    Tier,
    Usage,
)
from tests.integration.bare_supervisord import LOGIN, bare_supervisord
from tests.integration.browser import Browser, browser
from tests.unit.builders import GIB, MIB, row

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
NOW = time.time()
PICTURES = {
    "page-light": {"width": 1280, "height": 1680},
    "page-dark": {"width": 1280, "height": 1050, "dark": True},
    "page-phone": {"width": 390, "height": 1200, "dark": True},
}


def model(name: str, repo: str, size: int, port: int, **more: Any) -> Row:
    """One that is up and idle."""
    values: dict[str, Any] = {
        "name": name, "repo": repo, "port": port, "url": f"http://127.0.0.1:{port}",
        "device": "CUDA0", "context": 16384, "measured_bytes": size - 60 * MIB,
        "estimated_bytes": size, "estimate_source": "learned", "slots_busy": 0,
        "reason": "answered 1.2 s after its start", "started_at": int(NOW) - 3700,
    }  # fmt: skip
    return row(**(values | more))


CRASH = Failure(
    FailureClass.CRASHED,
    "ggml_cuda_compute_forward: MUL_MAT failed; CUDA error: an illegal memory access",
    NOW - 9,
)
DOWN = {"pid": 0, "started_at": None, "measured_bytes": None, "slots_busy": None}
FLEET = (
    model("qwen2.5-1.5b-instruct-q4_k_m", "Qwen/Qwen2.5-1.5B-Instruct-GGUF", 1510 * MIB, 8100,
          slots_busy=1, generation=3),
    model("gemma-3-4b-it-q4_k_m", "unsloth/gemma-3-4b-it-GGUF", 3660 * MIB, 8101, slots_busy=4,
          usage=Usage(queued=2)),
    model("qwen2.5-7b-instruct-q4_k_m", "Qwen/Qwen2.5-7B-Instruct-GGUF", 5180 * MIB, 8102,
          tier=Tier.BALANCED, trial=True, generation=4),
    model("llama-3.1-8b-instruct-q5_k_m", "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF", 7228 * MIB,
          8103, tier=Tier.BALANCED, phase=Phase.LOADING, reason="loading; its memory still grows",
          measured_bytes=None, slots_busy=None, started_at=int(NOW) - 9),
    model("nomic-embed-text-v1.5-q8_0", "nomic-ai/nomic-embed-text-v1.5-GGUF", 300 * MIB, 8104,
          phase=Phase.BACKOFF, state=ProcessState.EXITED, restarts=2, last_failure=CRASH,
          reason="crashed; starts again after 4.1 s", next_retry_seconds=4,
          failures=(("crashed", 2),), **DOWN),
    model("qwen2.5-72b-instruct-q4_k_m", "Qwen/Qwen2.5-72B-Instruct-GGUF", 48128 * MIB, 8105,
          tier=Tier.POWERFUL, phase=Phase.DEFERRED, state=ProcessState.STOPPED,
          reason="needs 48128 MiB on CUDA0, 4586 MiB left", **DOWN),
    model("mistral-7b-instruct-v0.3-q4_k_m", "MaziyarPanahi/Mistral-7B-Instruct-v0.3-GGUF",
          5200 * MIB, 8106, tier=Tier.BALANCED, phase=Phase.DISABLED, enabled=False,
          state=ProcessState.STOPPED, reason="disabled by command", **DOWN),
)  # fmt: skip
DEVICES = (
    DeviceRow(
        "CUDA0", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB - 1900 * MIB - 10170 * MIB,
        512 * MIB, 4586 * MIB, 1900 * MIB,
        models=tuple(
            Holding(one.name, one.measured_bytes, one.estimated_bytes) for one in FLEET[:4]
        ),
    ),
    DeviceRow("CPU", "host memory", 64 * GIB, 44 * GIB, 512 * MIB, 44 * GIB - 512 * MIB, 20 * GIB),
)  # fmt: skip
HISTORY = (
    ("gemma-3-4b-it-q4_k_m", "loading", "ready", "answered 1.2 s after its start", None, 3700),
    ("qwen2.5-72b-instruct-q4_k_m", "pending", "deferred", FLEET[5].reason, None, 3699),
    ("nomic-embed-text-v1.5-q8_0", "ready", "backoff", FLEET[4].reason, CRASH, 9),
    ("llama-3.1-8b-instruct-q5_k_m", "pending", "loading", "its process runs", None, 9),
)


def lines() -> list[dict[str, Any]]:
    return [
        {
            "when": NOW - ago, "model": name, "from": before, "to": after, "reason": reason,
            "class": failure.failure_class.value if failure else None,
            "evidence": failure.message if failure else "", "incarnation": None,
        }
        for name, before, after, reason, failure, ago in HISTORY
    ]  # fmt: skip


def main() -> None:
    """Write each picture."""
    listener = ListenerRow(1, "", NOW - 3800, 0.01, 0.0)
    with bare_supervisord() as host, browser() as window:
        host.publish(Snapshot(NOW, FLEET, DEVICES, listener), lines())
        window.open(f"{host.url}/synapse.html", LOGIN)
        window.wait_for("document.querySelectorAll('details').length > 0", "the page")
        window.js("document.querySelectorAll('details').forEach(one => one.open = true)")
        for name, view in PICTURES.items():
            _take(window, name, view)


def _take(window: Browser, name: str, view: dict[str, Any]) -> None:
    window.look(**view)
    found = window.command("Page.captureScreenshot", format="png")
    (IMAGES / f"{name}.png").write_bytes(base64.b64decode(found["data"]))
    print(f"wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()
