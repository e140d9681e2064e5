"""What llama-server is told, beside the files: pure, and only what this engine knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from supervisor_synapse.core.estimate import prompt_cache_bytes
from supervisor_synapse.core.model import Engine, Role, http_url
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


@dataclass(frozen=True, slots=True)
class Served:
    """What a running server was told, read back from its command line (which a user may edit)."""

    host: str
    port: int
    alias: str
    context: int
    parallel: int
    api_key_file: str | None
    sleep_seconds: int  # frees its weights when idle for so long; 0: never

    @property
    def sleeps(self) -> bool:
        """Asking for its slots would wake it, or keep it awake."""
        return self.sleep_seconds > 0

    @property
    def url(self) -> str:
        return http_url(self.host, self.port)


_SERVED_FLAGS = {
    "--host": "host", "--port": "port", "--alias": "alias", "-a": "alias",
    "--ctx-size": "context", "-c": "context", "--parallel": "parallel", "-np": "parallel",
    "--api-key-file": "api_key_file", "--sleep-idle-seconds": "sleep_seconds",
}  # fmt: skip


def parse_served(command: Sequence[str], planned: Served) -> Served | None:
    """What a launcher's command line says; None where it is not one (yet).

    `planned` fills in what the line does not say, and stands where the line makes no sense.
    Between fork and exec a process still shows its parent's command line.
    """
    if "--" not in command:
        return None
    words = list(command[command.index("--") + 1 :])
    said: dict[str, str] = {}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, has_value, value = word.partition("=")
        if flag in _SERVED_FLAGS:
            said[_SERVED_FLAGS[flag]] = value if has_value else following
    try:
        return Served(
            host=said.get("host", planned.host),
            port=_port(said["port"]) if "port" in said else planned.port,
            alias=said.get("alias", planned.alias),
            context=int(said.get("context", planned.context)),
            parallel=int(said.get("parallel", planned.parallel)),
            api_key_file=said.get("api_key_file"),
            sleep_seconds=int(said.get("sleep_seconds", 0)),
        )
    except ValueError:
        return planned


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    return port
