"""Values for tests: each builder gives a plain, valid one, and takes what a test wants changed."""

from __future__ import annotations

from typing import Any

from supervisor_synapse.core.catalog import FoundFile, Model
from supervisor_synapse.core.model import (
    Device,
    Engine,
    Estimate,
    FileIdentity,
    FileKind,
    Header,
    Incarnation,
    Part,
    Phase,
    ProcessState,
    Program,
    Role,
    Row,
    Source,
    Tier,
)
from supervisor_synapse.core.plan import World
from supervisor_synapse.core.settings import ModelRule, ModelSettings

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

FLAGS = frozenset(
    {
        "--model", "--alias", "--host", "--port", "--ctx-size", "--parallel", "--kv-unified",
        "--cache-ram", "--metrics", "--slots", "--device", "--gpu-layers", "--sleep-idle-seconds",
    }
)  # fmt: skip


def header(**changes: Any) -> Header:
    """A dense model of two layers: 64 wide, 4 heads of 16, 2 of them for keys and values."""
    values: dict[str, Any] = {
        "kind": FileKind.MODEL, "architecture": "llama", "quantization": "Q4_K_M",
        "parameters": 1_000_000_000, "layers": 2, "context_length": 32768,
        "embedding_length": 64, "feed_forward_length": (128,), "heads": (4,), "heads_kv": (2,),
        "vocabulary_size": 1000, "tensor_bytes": 100 * MIB, "embedding_bytes": 10 * MIB,
        "has_output": True,
    }  # fmt: skip
    return Header(**(values | changes))


def model(**changes: Any) -> Model:
    """A text model named `name`; what belongs to its header goes into the header."""
    in_header = {key: changes.pop(key) for key in list(changes) if key in _ONLY_IN_HEADER}
    name = changes.get("name", "tiny-q4_k_m")
    in_header.setdefault("tensor_bytes", changes.get("size_bytes", 100 * MIB))
    values: dict[str, Any] = {
        "name": name, "key": f"owner/{name}", "repo": f"owner/{name}", "file": f"{name}.gguf",
        "path": f"/models/{name}.gguf", "shards": (), "size_bytes": 100 * MIB,
        "header": header(**in_header), "role": Role.TEXT, "quantization": "Q4_K_M",
    }  # fmt: skip
    return Model(**(values | changes))


def file(**changes: Any) -> FoundFile:
    """A text model's only file; `inode` tells its content from others."""
    identity = FileIdentity(1, changes.pop("inode", 1), 100 * MIB, 0)
    values: dict[str, Any] = {
        "repo": "owner/tiny", "file": "tiny-q4_k_m.gguf", "identity": identity,
        "size_bytes": 100 * MIB, "header": header(),
    }  # fmt: skip
    values |= changes
    values.setdefault("path", f"/models/{values['repo'] or 'folder'}/{values['file']}")
    return FoundFile(**values)


_ONLY_IN_HEADER = frozenset(Header.__dataclass_fields__) - frozenset(Model.__dataclass_fields__)


def taking(size_bytes: int, device: str = "CPU", source: Source = Source.HEADER) -> Estimate:
    """An estimate of so many bytes on one device."""
    return Estimate((Part(device, weights_bytes=size_bytes),), source)


def program(**changes: Any) -> Program:
    """What supervisord shall run for a tiny model."""
    values: dict[str, Any] = {
        "name": "tiny-q4_k_m", "key": "owner/tiny", "repo": "owner/tiny", "file": "tiny.gguf",
        "tier": Tier.FAST, "role": Role.TEXT, "priority": 10, "enabled": True,
        "reason": "fits: 200 MiB of 900 MiB left on CPU", "host": "127.0.0.1", "port": 8100,
        "alias": "tiny", "context": 4096, "parallel": 4, "device": "CPU",
        "estimate": taking(200 * MIB), "size_bytes": 100 * MIB,
        "quantization": "Q4_K_M", "parameters": 1_000_000_000, "model_path": "/models/tiny.gguf",
        "projector_path": None, "shards": (), "arguments": ("--port", "8100"),
    }  # fmt: skip
    return Program(**(values | changes))


def row(**changes: Any) -> Row:
    """A model that is ready."""
    values: dict[str, Any] = {
        "name": "tiny-q4_k_m", "repo": "owner/tiny", "file": "tiny.gguf", "tier": Tier.FAST,
        "role": Role.TEXT, "enabled": True, "phase": Phase.READY,
        "reason": "answers 1.2 s after its start", "state": ProcessState.RUNNING, "pid": 4711,
        "port": 8100, "url": "http://127.0.0.1:8100", "alias": "tiny", "context": 4096,
        "parallel": 4, "device": "CPU", "estimated_bytes": 200 * MIB,
        "estimate_source": "header", "measured_bytes": None, "slots_busy": None,
        "slots_total": 4, "restarts": 0, "ready_seconds": 1.25, "generation": 1, "trial": False,
        "last_failure": None, "next_retry_seconds": None,
    }  # fmt: skip
    return Row(**(values | changes))


def engine(**changes: Any) -> Engine:
    """An engine that knows all flags that we use."""
    values: dict[str, Any] = {"path": "/opt/llama-server", "version": "1", "flags": FLAGS}
    return Engine(**(values | changes))


def host(total_bytes: int = 64 * GIB, free_bytes: int | None = None) -> Device:
    """The memory of the machine itself."""
    return Device("CPU", total_bytes, total_bytes if free_bytes is None else free_bytes)


def gpu(name: str, total_bytes: int = 8 * GIB, free_bytes: int | None = None) -> Device:
    """A device to offload to."""
    return Device(name, total_bytes, total_bytes if free_bytes is None else free_bytes)


def world(**changes: Any) -> World:
    """A machine with plenty of memory, every port free, and nothing chosen before."""
    values: dict[str, Any] = {
        "devices": (host(),), "engine": engine(), "earlier": {}, "port_is_free": lambda port: True,
    }  # fmt: skip
    return World(**(values | changes))


def section(glob: str, **said: Any) -> ModelRule:
    """What a `[model:glob]` section says."""
    return ModelRule(glob, ModelSettings(**said), frozenset(said))


def run(number: int) -> Incarnation:
    """One run of a program, told from others by `number`."""
    return Incarnation(pid=1000 + number, started_at=number)
