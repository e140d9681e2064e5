"""What llama-server is told, beside the files: pure, and only what this engine knows."""

from __future__ import annotations

from dataclasses import dataclass

from supervisor_synapse.core.estimate import prompt_cache_bytes
from supervisor_synapse.core.model import Engine, Role
from supervisor_synapse.core.settings import MIB

_LARGEST_EMBEDDING_BATCH = 2048


@dataclass(frozen=True, slots=True)
class Serving:
    """How one model shall be served."""

    host: str
    port: int
    alias: str
    role: Role
    context: int
    parallel: int
    device: str | None  # None: the engine's own choice
    gpu_layers: int | None
    sleep_idle_seconds: int
    kv_bytes: int
    extra: tuple[str, ...]


def embedding_batch(context: int) -> int:
    """Tokens of one input that an embedding model takes at once: it cannot split an input."""
    return min(context, _LARGEST_EMBEDDING_BATCH)


def server_arguments(serving: Serving, engine: Engine) -> tuple[str, ...]:
    """Tokens for llama-server. What the user gave in `args` comes last, so that it wins."""
    wanted: list[tuple[str, ...]] = [
        ("--alias", serving.alias),
        ("--host", serving.host),
        ("--port", str(serving.port)),
        ("--ctx-size", str(serving.context)),
        ("--parallel", str(serving.parallel)),
    ]
    optional: list[tuple[str, ...]] = [
        ("--kv-unified",),  # each request may use the whole context while the others are short
        ("--cache-ram", str(prompt_cache_bytes(serving.kv_bytes) // MIB)),
        ("--metrics",),
        ("--slots",),
    ]
    if serving.role is Role.EMBEDDING:
        wanted.append(("--embeddings",))
    if serving.role is Role.RERANKER:
        wanted.append(("--reranking",))
    if serving.role in (Role.EMBEDDING, Role.RERANKER):
        batch = str(embedding_batch(serving.context))
        wanted += [("--batch-size", batch), ("--ubatch-size", batch)]
    if serving.device is not None:
        optional.append(("--device", serving.device))
    if serving.gpu_layers is not None:
        optional.append(("--gpu-layers", str(serving.gpu_layers)))
    if serving.sleep_idle_seconds:
        optional.append(("--sleep-idle-seconds", str(serving.sleep_idle_seconds)))
    known = [tokens for tokens in optional if tokens[0] in engine.flags]
    given = {word.split("=", 1)[0] for word in serving.extra}
    rest = [tokens for tokens in known if tokens[0] not in given]
    return tuple(token for tokens in [*wanted, *rest] for token in tokens) + serving.extra

