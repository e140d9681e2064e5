"""Models of every kind, and what the real engine takes for them, by its own log.

Shapes have the proportions of models that people run, and the weights of none: an F16 model of
zeros costs nothing to write, and is never asked anything. Devices are `ggml-rpc-server` processes
on loopback, which hold the buffers for real.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor_synapse.core.estimate import Load
from supervisor_synapse.core.load_log import Loaded, parse_load
from tests import gguf_factory
from tests.conftest import Engine
from tests.ports import free_port

_LOAD_SECONDS = 120.0
_START_SECONDS = 10.0
_POLL_SECONDS = 0.02
_LISTENS = b"listening on http"
_TRAINED_CONTEXT = 131072
_VOCABULARY = 5000


@dataclass(frozen=True)
class Shape:
    """A model that the engine loads. `kind` decides how near an estimate must come."""

    name: str
    kind: str  # dense, experts, window, latent, hybrid, recurrent or encoder
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_recurrent(self) -> bool:
        """ggml-rpc-server ends while two of them share such a model."""
        return self.kind in ("hybrid", "recurrent")

    def write(self, folder: Path) -> Path:
        """The model's file, made once."""
        path = folder / f"{self.name}.gguf"
        if path.exists():
            return path
        if self.architecture == "bert":
            return gguf_factory.write_embedding(path, seed=None, **self.options)
        defaults: dict[str, Any] = {
            "architecture": self.architecture, "layers": 8, "context": _TRAINED_CONTEXT,
            "vocabulary": _VOCABULARY, "seed": None,
        }  # fmt: skip
        return gguf_factory.write_model(path, **(defaults | dict(self.options)))


def _wide(
    embedding: int,
    heads: int,
    heads_kv: int,
    feed_forward: int,
    head: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    return {
        "embedding": embedding, "heads": heads, "heads_kv": heads_kv,
        "feed_forward": feed_forward, "head": head, **others,
    }  # fmt: skip


def _experts(count: int, used: int, feed_forward: int) -> dict[str, Any]:
    return {"experts": count, "experts_used": used, "expert_feed_forward": feed_forward}


SHAPES = (
    Shape("llama", "dense", "llama", _wide(512, 8, 2, 2048)),
    Shape("qwen2", "dense", "qwen2", _wide(448, 7, 1, 2432)),
    Shape("qwen3", "dense", "qwen3", _wide(512, 16, 8, 1536, 64)),
    Shape("phi3", "dense", "phi3", _wide(768, 8, 8, 2048)),
    Shape("qwen3moe", "experts", "qwen3moe", _wide(512, 8, 1, 1536, 64, **_experts(32, 8, 192))),
    Shape("olmoe", "experts", "olmoe", _wide(512, 8, 8, 256, **_experts(16, 8, 256))),
    Shape(
        "glm4moe", "experts", "glm4moe",
        _wide(512, 12, 2, 1344, 64, **_experts(16, 4, 192), shape={"predicting": 1}),
    ),
    Shape(
        "gpt-oss", "window", "gpt-oss",
        _wide(720, 16, 2, 720, 64, **_experts(8, 4, 720), sliding_window=128),
    ),
    Shape(
        "gemma3", "window", "gemma3",
        _wide(640, 4, 1, 2048, 256, sliding_window=512, tied=True, layers=18),
    ),
    Shape(
        "gemma2", "window", "gemma2",
        _wide(576, 8, 4, 2304, 64, sliding_window=1024, tied=True),
    ),
    Shape(
        "deepseek2", "latent", "deepseek2",
        _wide(
            512, 4, 4, 2736, 192, **_experts(16, 6, 352),
            shape={"kv_rank": 128, "q_rank": 384, "rope": 64, "shared_experts": 2},
        ),
    ),
    Shape(
        "qwen3next", "hybrid", "qwen3next",
        _wide(512, 4, 1, 1280, 256, **_experts(32, 10, 128), shape={"scan": (4, 1024, 128, 8, 4)}),
    ),
    Shape(
        "granitehybrid", "hybrid", "granitehybrid",
        _wide(768, 12, 4, 2048, 64, shape={"scan": (4, 1536, 128, 48, 1)}),
    ),
    Shape(
        "falcon-h1", "hybrid", "falcon-h1",
        _wide(512, 4, 2, 1024, 64, shape={"scan": (4, 768, 128, 12, 1)}),
    ),
    Shape("lfm2", "hybrid", "lfm2", _wide(512, 8, 4, 2304)),
    Shape(
        "mamba", "recurrent", "mamba",
        _wide(768, 1, 1, 0, shape={"scan": (4, 1536, 16, 48, 0)}),
    ),
    Shape(
        "mamba2", "recurrent", "mamba2",
        _wide(768, 1, 1, 0, shape={"scan": (4, 1536, 128, 24, 1)}),
    ),
    Shape(
        "bert", "encoder", "bert",
        {"embedding": 384, "heads": 12, "layers": 6, "feed_forward": 1536, "context": 2048,
         "vocabulary": 20000},
    ),
    Shape(
        "gemma-embedding", "encoder", "gemma-embedding",
        _wide(
            768, 3, 1, 1152, 256, sliding_window=512, tied=True, layers=6, context=2048,
            vocabulary=40000, extra={"gemma-embedding.pooling_type": 1},
        ),
    ),
    Shape(
        "qwen3-embedding", "encoder", "qwen3",
        _wide(512, 8, 4, 1536, 64, tied=True, vocabulary=40000, extra={"qwen3.pooling_type": 3}),
    ),
)  # fmt: skip


# The most that an estimate of everything may be off, as a part of what is taken.
_GOALS = {
    "dense": 0.02, "experts": 0.02, "window": 0.02, "latent": 0.06, "hybrid": 0.06,
    "recurrent": 0.06, "encoder": 0.06,
}  # fmt: skip
_PARTIAL_GOAL = 0.05


def goal(shape: Shape, load: Load) -> float:
    """Where part of the layers stays on the host, more is left to the engine's scheduler."""
    is_partial = bool(load.devices) and (
        load.gpu_layers is not None or load.expert_layers_on_host > 0
    )
    return max(_GOALS[shape.kind], _PARTIAL_GOAL if is_partial else 0)


def label(load: Load) -> str:
    """What is special in it, in few words."""
    parts = [f"{load.context} x {load.parallel}"]
    if load.ubatch != 512:
        parts.append(f"batch {load.ubatch}")
    if load.devices:
        layers = "all" if load.gpu_layers is None else load.gpu_layers
        parts.append(f"{layers} on {','.join(load.devices)}")
    if load.split:
        parts.append("split " + ":".join(f"{part:g}" for part in load.split))
    if (load.cache_type_k, load.cache_type_v) != ("f16", "f16"):
        parts.append(f"{load.cache_type_k}/{load.cache_type_v}")
    if load.expert_layers_on_host:
        parts.append(f"experts of {load.expert_layers_on_host} on host")
    flags = {
        "slots apart": not load.unified,
        "no flash attention": not load.flash_attention,
        "full windows": load.swa_full,
    }
    return ", ".join([*parts, *(name for name, is_set in flags.items() if is_set)])


def arguments(load: Load, *, embeddings: bool = False) -> list[str]:
    """What llama-server is told for this load, beside model, address and devices."""
    words: list[object] = [
        "--ctx-size", load.context, "--parallel", load.parallel, "--ubatch-size", load.ubatch,
        "--batch-size", max(load.ubatch, 512),
        "--kv-unified" if load.unified else "--no-kv-unified",
        "--cache-type-k", load.cache_type_k, "--cache-type-v", load.cache_type_v,
        "--flash-attn", "on" if load.flash_attention else "off", "--no-warmup",
        # A mapped file is told by its span from first to last, whatever lies between.
        "--no-mmap",
    ]  # fmt: skip
    if load.devices:
        words += ["--gpu-layers", 999 if load.gpu_layers is None else load.gpu_layers]
    if load.split:
        words += ["--tensor-split", ",".join(f"{part:g}" for part in load.split)]
    if load.swa_full:
        words.append("--swa-full")
    if load.expert_layers_on_host:
        words += ["--n-cpu-moe", load.expert_layers_on_host]
    if embeddings:
        words.append("--embeddings")
    return [str(word) for word in words]


@contextlib.contextmanager
def rpc_devices(engine: Engine, count: int) -> Iterator[Sequence[str]]:
    """Addresses of so many devices, each a process of its own: RPC0, RPC1 …"""
    with contextlib.ExitStack() as running:
        yield [running.enter_context(_rpc_device(engine)) for _ in range(count)]


@contextlib.contextmanager
def _rpc_device(engine: Engine) -> Iterator[str]:
    port = free_port()
    server = Path(engine.path).with_name("ggml-rpc-server")
    command = [str(server), "-d", "CPU", "-p", str(port)]
    with subprocess.Popen(
        command, env=engine.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            _wait_until_open(process, port)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_until_open(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(_POLL_SECONDS)
    raise AssertionError("ggml-rpc-server does not listen")


def load_for_real(
    engine: Engine,
    model: Path,
    load: Load,
    endpoints: Sequence[str],
    *words: str,
    embeddings: bool = False,
) -> Loaded:
    """What the engine's log says of a real load, which ends as soon as the server listens.

    `words`: further arguments.
    """
    told = [*arguments(load, embeddings=embeddings), *words]
    text = _log_of_load(engine, model, load, endpoints, told)
    loaded = parse_load(text)
    assert loaded is not None, f"not loaded:\n{text[-2000:]}"
    return loaded


def _log_of_load(
    engine: Engine,
    model: Path,
    load: Load,
    endpoints: Sequence[str],
    words: Sequence[str],
) -> str:
    devices = ["--device", "none"]
    if load.devices:
        used = endpoints[: len(load.devices)]
        devices = ["--rpc", ",".join(used), "--device", ",".join(load.devices)]
    command = [
        engine.path, "--model", str(model), "--host", "127.0.0.1", "--port", str(free_port()),
        "--log-verbosity", "4", "-fit", "off", *devices, *words,
    ]  # fmt: skip
    text = b""
    deadline = time.monotonic() + _LOAD_SECONDS
    with subprocess.Popen(
        command, env=engine.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            while _LISTENS not in text and time.monotonic() < deadline:
                if not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
                    continue
                piece = process.stdout.read1(65536)  # type: ignore[attr-defined]
                if not piece:
                    break
                text += piece
        finally:
            process.kill()
    return text.decode("utf-8", "replace")
