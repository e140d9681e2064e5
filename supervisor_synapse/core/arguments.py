"""What llama-server is told, beside the files, and what its words mean: pure.

It is told only what this engine knows. What is read back may have been written by anybody: what
makes no sense is as if it had not been said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

from supervisor_synapse.core.estimate import Load, prompt_cache_bytes
from supervisor_synapse.core.model import Engine, Role, http_url
from supervisor_synapse.core.settings import MIB

_LARGEST_EMBEDDING_BATCH = 2048
# What we say, and other names under which the user may say it.
_OPTIONAL = {
    "--kv-unified": ("-kvu", "--no-kv-unified", "-no-kvu"),
    "--metrics": (),
    "--slots": (),
    "--log-verbosity": ("-lv", "--verbosity"),
    "--sleep-idle-seconds": (),
    "--rpc": (),
    "--device": ("-dev",),
    "--fit": ("-fit",),
    "--gpu-layers": ("-ngl", "--n-gpu-layers"),
    "--tensor-split": ("-ts",),
    "--cache-ram": ("-cram",),
}


@dataclass(frozen=True, slots=True)
class Serving:
    """How one model shall be served, wherever it lies."""

    host: str
    port: int
    alias: str
    role: Role
    parallel: int
    sleep_idle_seconds: int
    extra: tuple[str, ...]


class Extent(NamedTuple):
    """How much of a model lies where."""

    context: int
    device: str | None  # "CUDA0", "CUDA0,CUDA1", "none"; None: there is nothing to choose
    gpu_layers: int | None
    split: tuple[int, ...] = ()  # layers on each of several devices
    rpc: tuple[str, ...] = ()  # host:port of the servers that its devices are reached through


def embedding_batch(context: int) -> int:
    """Tokens of one input that an embedding model takes at once: it cannot split an input."""
    return min(context, _LARGEST_EMBEDDING_BATCH)


def naming_words(serving: Serving) -> tuple[str, ...]:
    """Under which name and where a model is served: no other is told the same."""
    return (
        "--alias", serving.alias, "--host", serving.host, "--port", str(serving.port),
    )  # fmt: skip


def standing_words(serving: Serving, engine: Engine) -> tuple[str, ...]:
    """What else is said of a model wherever it lies."""
    ours = _ours(serving.extra, engine.flags)
    words = ["--parallel", str(serving.parallel)]
    if serving.role is Role.EMBEDDING:
        words.append("--embeddings")
    if serving.role is Role.RERANKER:
        words.append("--reranking")
    if "--kv-unified" in ours:  # each request may use the whole context while the others are short
        words.append("--kv-unified")
    words += [option for option in ("--metrics", "--slots") if option in ours]
    if "--log-verbosity" in ours:  # from 4 on the size of each buffer stands in the log
        words += ["--log-verbosity", "4"]
    if serving.sleep_idle_seconds and "--sleep-idle-seconds" in ours:
        words += ["--sleep-idle-seconds", str(serving.sleep_idle_seconds)]
    return tuple(words)


def placing_words(extent: Extent, serving: Serving, engine: Engine) -> tuple[str, ...]:
    """How much lies where: all said, lest the engine move layers as it finds room."""
    ours = _ours(serving.extra, engine.flags)
    words = ["--ctx-size", str(extent.context)]
    if serving.role in (Role.EMBEDDING, Role.RERANKER):
        batch = str(embedding_batch(extent.context))
        words += ["--batch-size", batch, "--ubatch-size", batch]
    if extent.rpc and "--rpc" in ours:
        words += ["--rpc", ",".join(extent.rpc)]
    if extent.device is not None:
        if "--device" in ours:
            words += ["--device", extent.device]
        if "--fit" in ours:
            words += ["--fit", "off"]
    if extent.gpu_layers is not None and "--gpu-layers" in ours:
        words += ["--gpu-layers", str(extent.gpu_layers)]
    if len(extent.split) > 1 and "--tensor-split" in ours:
        words += ["--tensor-split", ",".join(map(str, extent.split))]
    return tuple(words)


def prompt_cache_words(kv_bytes: int, serving: Serving, engine: Engine) -> tuple[str, ...]:
    """A bound for the prompts that are kept on the host, by the size of the cache."""
    if "--cache-ram" not in _ours(serving.extra, engine.flags):
        return ()
    return ("--cache-ram", str(prompt_cache_bytes(kv_bytes) // MIB))


@lru_cache(maxsize=1024)
def _ours(extra: tuple[str, ...], flags: frozenset[str]) -> frozenset[str]:
    """The options that are ours to say: known to the engine, and not said by the user."""
    said = {word.split("=", 1)[0] for word in extra}
    return frozenset(
        option
        for option, others in _OPTIONAL.items()
        if option in flags and said.isdisjoint((option, *others))
    )


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


# --- what memory depends on ----------------------------------------------------------------------

_DEFAULT_PARALLEL = 4
_ALL_LAYERS = 9999
_CACHE_TYPES = frozenset(
    {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}
)  # fmt: skip
_OFF = frozenset({"off", "false", "0", "disabled"})
_UNBOUNDED_CACHE_RAM_MIB = 8192  # what the engine itself keeps to where it is not told


def load_of(*words: Sequence[str], trained_context: int = 0, devices: Sequence[str] = ()) -> Load:
    """What memory depends on, of a server with these arguments, in groups of whole options.

    The last word on a thing counts. `trained_context`: the context where none is said. `devices`:
    those that the engine has; where the arguments name none, it takes all of them.
    """
    return _load_of(tuple(map(tuple, words)), trained_context, tuple(devices))


@lru_cache(maxsize=2048)
def _load_of(
    words: tuple[tuple[str, ...], ...], trained_context: int, devices: tuple[str, ...]
) -> Load:
    """Kept: many models of a plan are told the same."""
    said: dict[str, Any] = {}
    for group in words:
        said.update(_said(group))
    parallel: int | None = said.get("parallel")
    said.setdefault("context", trained_context)
    said.setdefault("devices", devices)
    said.setdefault("unified", parallel is None)
    said["parallel"] = parallel or _DEFAULT_PARALLEL
    said["ubatch"] = min(said.get("ubatch", 512), said.pop("batch", 2048))
    return Load(**said)


@lru_cache(maxsize=4096)
def _said(words: tuple[str, ...]) -> Mapping[str, Any]:
    """Each option's value by what it is about; one that cannot be understood is left out."""
    said: dict[str, Any] = {}
    for at, word in enumerate(words):
        if word in _SWITCHES:
            about, value = _SWITCHES[word]
            said[about] = value
            continue
        flag, has_value, text = word.partition("=") if "=" in word else (word, "", "")
        option = _OPTIONS.get(flag)
        if option is None:
            continue
        if not has_value:
            text = words[at + 1] if at + 1 < len(words) else ""
        about, parse = option
        try:
            said[about] = parse(text)
        except ValueError:
            continue
    return said


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError(f"{number} is below {least}")
        return number

    return parse


def _layers(text: str) -> int | None:
    """None: all of them; the engine's `auto` takes all that it can."""
    if text in ("auto", "all"):
        return None
    number = int(text)
    return number if number >= 0 else None


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names or text.startswith("-"):
        raise ValueError(f"{text} names no device")
    return () if "none" in names else names


def _split(text: str) -> tuple[float, ...]:
    parts = tuple(float(part) for part in text.replace("/", ",").split(","))
    if not all(0 <= part < 1e9 for part in parts):  # neither negative nor infinite nor NaN
        raise ValueError(f"{text} does not split anything")
    return parts


def _flash_attention(text: str) -> bool:
    """`auto`, and the bare flag of older engines, mean on."""
    return text.lower() not in _OFF


def _cache_type(text: str) -> str:
    if text not in _CACHE_TYPES:
        raise ValueError(f"{text} is no cache type")
    return text


def _cache_ram(text: str) -> int:
    number = int(text)
    return (number if number >= 0 else _UNBOUNDED_CACHE_RAM_MIB) * MIB


_OPTIONS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    name: (about, parse)
    for names, about, parse in (
        ("-c --ctx-size", "context", _at_least(1)),
        ("-np --parallel", "parallel", _at_least(1)),
        ("-b --batch-size", "batch", _at_least(1)),
        ("-ub --ubatch-size", "ubatch", _at_least(1)),
        ("-dev --device", "devices", _devices),
        ("-ts --tensor-split", "split", _split),
        ("-ngl --gpu-layers --n-gpu-layers", "gpu_layers", _layers),
        ("-ctk --cache-type-k", "cache_type_k", _cache_type),
        ("-ctv --cache-type-v", "cache_type_v", _cache_type),
        ("-fa --flash-attn", "flash_attention", _flash_attention),
        ("-ncmoe --n-cpu-moe", "expert_layers_on_host", _at_least(0)),
        ("-cram --cache-ram", "prompt_cache_bytes", _cache_ram),
    )
    for name in names.split()
}
_SWITCHES: Mapping[str, tuple[str, Any]] = {
    name: (about, value)
    for names, about, value in (
        ("-kvu --kv-unified", "unified", True),
        ("-no-kvu --no-kv-unified", "unified", False),
        ("--swa-full", "swa_full", True),
        ("--embedding --embeddings --rerank --reranking", "embeddings", True),
        ("-cmoe --cpu-moe", "expert_layers_on_host", _ALL_LAYERS),
    )
    for name in names.split()
}
