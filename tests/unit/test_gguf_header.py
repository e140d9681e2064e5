"""Headers of every kind are read right, and no bytes give anything but a Header or CatalogError."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor_synapse.adapters import gguf_header
from supervisor_synapse.core.model import FileKind, Header
from supervisor_synapse.errors import CatalogError
from tests import gguf_factory
from tests.unit import fuzz_headers

MIB = 1024 * 1024
CHECKOUT = Path(__file__).resolve().parents[2]
FUZZED_HEADERS = 30_000

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = dict(zip(range(13), "BbHhIif?\0\0Qqd", strict=True))
Q4_K = int(gguf.GGMLQuantizationType.Q4_K)


# --- headers by hand: what no writer would write -------------------------------------------------


@dataclass(frozen=True)
class Array:
    """Elements of one type; `count` says how many where that is a lie."""

    kind: int
    elements: Sequence[Any] = ()
    count: int | None = None


@dataclass(frozen=True)
class Text:
    """A string; `length` says how long where that is a lie."""

    raw: bytes = b""
    length: int | None = None


Key = tuple[str | bytes | Text, int, Any]
Tensor = tuple[str | bytes, Sequence[int], int, int]  # name, shape, type, offset
ARCHITECTURE: Key = ("general.architecture", STRING, "llama")


def encode_text(text: str | bytes | Text) -> bytes:
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    if isinstance(text, bytes):
        text = Text(text)
    length = len(text.raw) if text.length is None else text.length
    return struct.pack("<Q", length) + text.raw


def encode(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return encode_text(value)
    if kind == ARRAY and isinstance(value, Array):
        count = len(value.elements) if value.count is None else value.count
        elements = b"".join(encode(value.kind, element) for element in value.elements)
        return struct.pack("<IQ", value.kind, count) + elements
    return bytes(value) if isinstance(value, bytes) else struct.pack("<" + _LETTERS[kind], value)


def build(
    keys: Iterable[Key] = (ARCHITECTURE,),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    data_bytes: int = 0,
    alignment: int = 32,
) -> bytes:
    """A file with these keys and tensors, padded, and `data_bytes` of zeros."""
    keys = list(keys)
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    parts = [magic + struct.pack("<IQQ", version, *counts)]
    for name, kind, value in keys:
        parts += [encode_text(name), struct.pack("<I", kind), encode(kind, value)]
    for tensor, shape, kind, offset in tensors:
        parts += [encode_text(tensor), struct.pack("<I", len(shape))]
        parts.append(struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment) + bytes(data_bytes)


def parse(data: bytes) -> Header:
    return gguf_header.parse(data, len(data))


def nested(depth: int) -> Array:
    """An array in an array in …, `depth` of them."""
    array = Array(U8, [1])
    for _ in range(depth - 1):
        array = Array(ARRAY, [array])
    return array


# --- facts ---------------------------------------------------------------------------------------


def _model(path: Path) -> Path:
    return gguf_factory.write_model(
        path, name="Small Talk", file_type="Q4_K_M", extra={"general.tags": ["chat", "tiny"]}
    )


def _experts(path: Path) -> Path:
    return gguf_factory.write_model(
        path, architecture="qwen3moe", experts=8, experts_used=2, chat_template=None, vocabulary=10
    )


def _windowed(path: Path) -> Path:
    pattern = {"gemma3.attention.sliding_window_pattern": [True, False]}
    return gguf_factory.write_model(
        path, architecture="gemma3", sliding_window=32, extra=pattern, tensor_type="Q8_0"
    )


def _architecture(architecture: str, **options: Any) -> Callable[[Path], Path]:
    return lambda path: gguf_factory.write_model(path, architecture=architecture, **options)


def _split(which: int) -> Callable[[Path], Path]:
    return lambda path: gguf_factory.write_split(path.parent, "split", shards=3)[which]


FACTS: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "text model": (
        _model,
        {
            "kind": FileKind.MODEL, "architecture": "llama", "name": "Small Talk",
            "quantization": "Q4_K_M", "layers": 2, "context_length": 512, "embedding_length": 64,
            "feed_forward_length": (32,), "heads": (4,), "heads_kv": (2,), "experts": 0,
            "vocabulary_size": 259 + 96, "tags": ("chat", "tiny"), "has_output": True,
            "pooling": None, "causal_attention": None, "classifier": False, "split_count": 0,
            "chat_template_sha256":
                hashlib.sha256(gguf_factory.CHAT_TEMPLATE.encode()).hexdigest(),
            "embedding_bytes": 355 * 64 * 2, "input_bytes": 355 * 64 * 2, "ungated": False,
            "block_bytes": (2 * (12_288 + 6_144 + 256),) * 2,
        },
    ),
    "mixture of experts": (
        _experts,
        {
            "kind": FileKind.MODEL, "architecture": "qwen3moe", "experts": 8, "experts_used": 2,
            "expert_feed_forward_length": 32, "key_length": 16, "value_length": 16,
            "expert_bytes": (8 * 3 * 64 * 32 * 2,) * 2,
            "chat_template_sha256": None, "quantization": "F16",
        },
    ),
    "sliding window": (
        _windowed,
        {
            "architecture": "gemma3", "sliding_window": 32, "sliding_window_pattern": (1, 0),
            "embedding_bytes": 355 * 64 // 32 * 34,
        },
    ),
    "latent attention": (
        _architecture("deepseek2", layers=3),
        {
            "kv_lora_rank": 32, "key_length": 32 + 8, "value_length": 32, "key_length_mla": 16,
            "value_length_mla": 16, "heads_kv": (1,), "shared_experts": 1,
            "expert_bytes": (0, *[4 * 3 * 64 * 32 * 2] * 2),
        },
    ),
    "delta net": (
        _architecture("qwen3next", layers=8),
        {
            "attention_interval": 4, "recurrent_state": (4, 64, 32, 2, 1), "ungated": False,
        },
    ),
    "recurrent layers among others": (
        _architecture("granitehybrid", layers=4),
        {"heads_kv": (0, 0, 0, 2), "recurrent_state": (4, 128, 32, 4, 1)},
    ),
    "short convolution": (_architecture("lfm2", layers=4), {"short_convolution": 3}),
    "layers that predict": (
        _architecture("glm4moe", layers=3, shape={"predicting": 1}), {"predicting_layers": 1},
    ),
    "tied": (
        _architecture("gemma2", tied=True, sliding_window=32),
        {"has_output": False, "input_bytes": 355 * 64 * 2, "expert_bytes": ()},
    ),
    "gate and projection in one": (_architecture("phi3"), {"ungated": False}),
    "first shard": (
        _split(0),
        {
            "kind": FileKind.MODEL, "architecture": "llama", "split_index": 0, "split_count": 3,
            "layers": 2, "context_length": 512, "tensors": 7,
        },
    ),
    "last shard": (
        _split(2),
        {
            "kind": FileKind.MODEL, "architecture": "", "split_index": 2, "split_count": 3,
            "layers": 0, "context_length": 0, "tensors": 7,
        },
    ),
    "embedding model": (
        gguf_factory.write_embedding,
        {
            "kind": FileKind.MODEL, "architecture": "bert", "pooling": 1,
            "causal_attention": False, "classifier": False, "context_length": 128,
            "ungated": True, "has_output": False,
        },
    ),
    "reranker": (
        gguf_factory.write_reranker,
        {"kind": FileKind.MODEL, "architecture": "bert", "pooling": 4, "classifier": True},
    ),
    "projector": (
        lambda path: gguf_factory.write_projector(path, 640),
        {
            "kind": FileKind.PROJECTOR, "architecture": "clip", "projection_dim": 640,
            "has_vision": True, "has_audio": False, "image": (16 * 16, 32, 64),
        },
    ),
    "image encoder": (
        lambda path: gguf_factory.write_vision_projector(path, image_size=140, embedding=96),
        {"kind": FileKind.PROJECTOR, "projection_dim": 64, "image": (100, 96, 192)},
    ),
    "encoder of images of any size": (
        lambda path: gguf_factory.write_projector(
            path, extra={"clip.projector_type": "qwen2vl_merger"}
        ),
        {"image": (92 * 92, 32, 64)},
    ),
    "audio projector": (
        lambda path: gguf_factory.write_projector(path, 96, vision=False, audio=True),
        {
            "kind": FileKind.PROJECTOR, "projection_dim": 96, "has_vision": False,
            "has_audio": True, "image": (0, 0, 0),
        },
    ),
    "adapter": (
        gguf_factory.write_adapter,
        {"kind": FileKind.ADAPTER, "architecture": "llama", "tensors": 2},
    ),
    "vocabulary": (
        gguf_factory.write_vocabulary_only,
        {"kind": FileKind.VOCABULARY, "vocabulary_size": 355, "tensors": 0, "tensor_bytes": 0},
    ),
    "importance matrix": (
        gguf_factory.write_imatrix,
        {"kind": FileKind.IMATRIX, "architecture": "", "quantization": "F32"},
    ),
    "draft": (
        gguf_factory.write_draft,
        {"kind": FileKind.MODEL, "architecture": "eagle3", "layers": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_the_facts_of_each_kind_of_file(tmp_path: Path, name: str) -> None:
    write, facts = FACTS[name]
    header = gguf_header.read(write(tmp_path / "file.gguf"))
    assert {fact: getattr(header, fact) for fact in facts} == facts


@pytest.mark.parametrize("name", FACTS)
def test_the_gguf_package_finds_the_same(tmp_path: Path, name: str) -> None:
    """Keys, tensors, parameters and places, as `gguf.GGUFReader` reads them."""
    path = FACTS[name][0](tmp_path / "file.gguf")
    header, theirs = gguf_header.read(path), gguf.GGUFReader(path)
    assert _key_names(path) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert header.tensors == len(theirs.tensors)
    assert header.parameters == sum(int(tensor.n_elements) for tensor in theirs.tensors)
    assert header.tensor_bytes == sum(int(tensor.n_bytes) for tensor in theirs.tensors)
    if theirs.tensors:
        assert header.header_bytes == theirs.data_offset
    tokens = theirs.fields.get("tokenizer.ggml.tokens")
    assert header.vocabulary_size == (len(tokens.data) if tokens else 0)
    for fact, key in COUNTS.items():
        field = theirs.fields.get(f"{header.architecture}.{key}")
        assert getattr(header, fact) == (field.contents() if field else 0), fact


COUNTS = {
    "layers": "block_count", "context_length": "context_length", "experts": "expert_count",
    "embedding_length": "embedding_length", "sliding_window": "attention.sliding_window",
    "key_length": "attention.key_length",
}  # fmt: skip


def _key_names(path: Path) -> set[str]:
    """The names of the keys, as the first of the reader's two steps finds them."""
    data = path.read_bytes()
    cursor = gguf_header._Cursor(lambda at, n: data[at : at + n], len(data), time.thread_time)
    _, count = gguf_header._read_preamble(cursor)
    return {key.decode() for key in gguf_header._index_values(cursor, count)}


@pytest.mark.real
def test_the_facts_of_the_real_270m_model(real_model: Path) -> None:
    header = gguf_header.read(real_model)
    assert (header.kind, header.architecture) == (FileKind.MODEL, "gemma3")
    assert (header.name, header.quantization) == ("Gemma 3 270m", "Q4_K_M")
    assert (header.parameters, header.tensors, header.layers) == (268_098_176, 236, 18)
    assert (header.context_length, header.embedding_length) == (32_768, 640)
    assert (header.heads, header.heads_kv, header.key_length) == ((4,), (1,), 256)
    assert (header.sliding_window, header.sliding_window_pattern) == (512, ())
    assert header.vocabulary_size == 262_144
    assert header.header_bytes + header.tensor_bytes == real_model.stat().st_size
    assert sum(header.block_bytes) + header.embedding_bytes <= header.tensor_bytes
    assert not header.has_output


def test_a_count_may_have_any_integer_type() -> None:
    for kind in (U8, I8, U16, I16, U32, I32, U64, I64):
        header = parse(build([ARCHITECTURE, ("llama.context_length", kind, 100)]))
        assert header.context_length == 100


@pytest.mark.parametrize(
    ("key", "kind", "value", "fact", "expected"),
    [
        ("attention.key_length_swa", U32, 256, "window_key_length", 256),
        ("attention.value_length_swa", U32, 128, "window_value_length", 128),
        ("attention.shared_kv_layers", U32, 10, "shared_kv_layers", 10),
        ("attention.recurrent_layers", ARRAY, Array(BOOL, [1, 0]), "recurrent_layers", (1, 0)),
        ("full_attention_interval", U32, 4, "attention_interval", 4),
        ("wkv.head_size", U32, 64, "wkv_head_size", 64),
        ("token_shift_count", U32, 2, "token_shifts", 2),
        ("kda.head_dim", U32, 128, "kda_head_size", 128),
    ],
)
def test_what_memory_depends_on_in_few_architectures(
    key: str, kind: int, value: object, fact: str, expected: object
) -> None:
    assert getattr(parse(build([ARCHITECTURE, (f"llama.{key}", kind, value)])), fact) == expected


def test_all_that_turns_tokens_into_input_is_told_from_the_rest(tmp_path: Path) -> None:
    names = ("token_embd", "token_embd_norm", "token_types", "position_embd")
    names += ("per_layer_token_embd", "output", "output_norm", "token_embdx")
    tensors = {f"{name}.weight": np.zeros((2, 8), dtype=np.float32) for name in names}
    path = gguf_factory.write_gguf(tmp_path / "x.gguf", "gemma3n", {}, tensors, tensor_type="F32")
    header = gguf_header.read(path)
    assert (header.embedding_bytes, header.input_bytes) == (64, 5 * 64)


def test_a_count_may_differ_from_layer_to_layer() -> None:
    counts = Array(I32, [4, 0, 8])
    assert parse(build([ARCHITECTURE, ("llama.attention.head_count_kv", ARRAY, counts)])).heads_kv \
        == (4, 0, 8)  # fmt: skip


def test_the_order_of_keys_does_not_matter() -> None:
    """`{arch}.…` may stand before the architecture is named."""
    assert parse(build([("llama.block_count", U32, 3), ARCHITECTURE])).layers == 3


def test_version_2_is_read_as_version_3() -> None:
    assert parse(build(version=2)) == parse(build(version=3))


def test_a_header_is_read_though_its_file_is_only_there_in_part(tmp_path: Path) -> None:
    """The first bytes of a download are enough."""
    data = gguf_factory.write_model(tmp_path / "model.gguf").read_bytes()
    header = parse(data)
    assert gguf_header.parse(data[: header.header_bytes], len(data)) == header
    assert gguf_header.parse(memoryview(data)[: header.header_bytes], len(data)) == header


def test_a_tensor_type_newer_than_the_package_costs_nothing() -> None:
    """Its size comes from where the next tensor begins, or the file ends."""
    tensors = [
        ("token_embd.weight", (256, 4), 250, 64),
        ("blk.0.ffn_up.weight", (256, 2), 250, 0),
        ("blk.0.norm.weight", (8,), 0, 160),
    ]
    header = parse(build(tensors=tensors, data_bytes=192))
    assert (header.embedding_bytes, header.block_bytes) == (96, (64 + 32,))
    assert header.quantization == "unknown"


def test_quantization_without_a_file_type_is_that_of_most_elements() -> None:
    """Small F32 norms outnumber the weights, but do not outweigh them."""
    norms: list[Tensor] = [(f"blk.{i}.norm.weight", (8,), 0, 32 * i) for i in range(9)]
    weights: list[Tensor] = [("blk.0.ffn_up.weight", (256, 2), Q4_K, 288)]
    assert parse(build(tensors=norms + weights, data_bytes=600)).quantization == "Q4_K"


def test_text_from_the_file_is_made_fit_to_show() -> None:
    name = "a\nb\x1b[31m \u202eevil\u2066 \ud7ff\ue000 ü " + "x" * 300
    header = parse(build([ARCHITECTURE, ("general.name", STRING, name)]))
    assert header.name is not None
    assert header.name.isprintable()
    assert header.name.startswith("a b[31m evil")
    assert len(header.name) == 128
    assert parse(build([ARCHITECTURE, ("general.name", STRING, " \x00\n")])).name is None


def test_tags_are_bounded() -> None:
    tags = Array(STRING, ["t" * 100] * 50)
    header = parse(build([ARCHITECTURE, ("general.tags", ARRAY, tags)]))
    assert header.tags == ("t" * 64,) * 32


LLAVA: list[Key] = [
    ("general.architecture", STRING, "clip"),
    ("clip.has_vision_encoder", BOOL, True),
    ("clip.vision.projection_dim", U32, 768),
]


def test_an_older_projector_states_its_width_in_its_last_layer() -> None:
    """LLaVA's own projection_dim is CLIP's, not the text model's."""
    bias: list[Tensor] = [("mm.2.bias", (4096,), 0, 0)]
    header = parse(build(LLAVA, bias, data_bytes=4 * 4096))
    assert (header.kind, header.projection_dim) == (FileKind.PROJECTOR, 4096)


KINDS_WITHOUT_A_TYPE: dict[str, tuple[list[Key], FileKind]] = {
    "clip": ([("general.architecture", STRING, "clip")], FileKind.PROJECTOR),
    "clip keys": ([ARCHITECTURE, ("clip.has_audio_encoder", BOOL, True)], FileKind.PROJECTOR),
    "lora": ([ARCHITECTURE, ("adapter.type", STRING, "lora")], FileKind.ADAPTER),
    "control vector": ([("general.architecture", STRING, "controlvector")], FileKind.ADAPTER),
    "imatrix": ([("imatrix.chunk_count", U32, 1)], FileKind.IMATRIX),
    "quantized with an imatrix": (
        [ARCHITECTURE, ("quantize.imatrix.file", STRING, "imatrix.dat")], FileKind.MODEL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS_WITHOUT_A_TYPE)
def test_the_kind_is_found_where_the_header_does_not_state_it(name: str) -> None:
    keys, kind = KINDS_WITHOUT_A_TYPE[name]
    tensors: list[Tensor] = [("a", (8,), 0, 0)]
    assert parse(build(keys, tensors, data_bytes=32)).kind is kind


def test_labels_alone_make_a_classifier() -> None:
    labels: Key = ("llama.classifier.output_labels", ARRAY, Array(STRING, ["yes", "no"]))
    assert parse(_with(labels)).classifier
    assert not parse(build()).classifier


def test_a_vocabulary_that_is_not_in_the_file_is_counted_as_stated() -> None:
    assert parse(_with(("llama.vocab_size", U32, 32_000))).vocabulary_size == 32_000


def test_a_first_shard_may_hold_no_tensor() -> None:
    keys: list[Key] = [ARCHITECTURE, ("split.no", U16, 0), ("split.count", U16, 2)]
    assert parse(build(keys)).kind is FileKind.MODEL


# --- hostile headers -----------------------------------------------------------------------------


def _with(*keys: Key) -> bytes:
    return build([ARCHITECTURE, *keys])


def _tensors(*tensors: Tensor, data_bytes: int = 1024) -> bytes:
    return build(tensors=tensors, data_bytes=data_bytes)


MANY = 2**40
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "truncated"),
    "three bytes": (b"GGU", "truncated"),
    "wrong magic": (build(magic=b"GGML"), "not a GGUF file: it begins with 'GGML'"),
    "a web page": (b"<!doctype html>" + bytes(99), "not a GGUF file: it begins with '<!do'"),
    "version 0": (build(version=0), "version 0 is not supported, 2 and 3 are"),
    "version 1": (build(version=1), "version 1 is not supported"),
    "version 4": (build(version=4), "version 4 is not supported"),
    "big-endian version 3": (build(version=3 << 24), "big-endian"),
    "2^40 tensors": (build(tensor_count=MANY), f"claims {MANY} tensors"),
    "2^40 keys": (build(key_count=MANY), f"claims {MANY} keys"),
    "65,537 tensors": (build(tensor_count=65_537), "claims 65537 tensors"),
    "one key too many": (build(key_count=2, alignment=1), "truncated"),
    "a key of 2^40 bytes": (_with((Text(length=MANY), U8, 1)), "key 1 is .* bytes long"),
    "a key of 1,025 bytes": (_with(("k" * 1025, U8, 1)), "key 1 is 1025 bytes long"),
    "a string of 2^40 bytes": (_with(("x", STRING, Text(length=MANY))), "truncated"),
    "a string of 2^64-1 bytes": (_with(("x", STRING, Text(length=2**64 - 1))), "truncated"),
    "a name of 65,537 bytes": (
        _with(("general.name", STRING, "n" * 65_537)), "'general.name' is 65537 bytes long",
    ),
    "a template of 4 MiB + 1": (
        _with(("tokenizer.chat_template", STRING, "n" * (4 * MIB + 1))), "bytes long, at most",
    ),
    "an array of 2^40 bytes": (_with(("x", ARRAY, Array(U8, count=MANY))), "truncated"),
    "an array of 2^64-1 doubles": (_with(("x", ARRAY, Array(F64, count=2**64 - 1))), "truncated"),
    "an array of 2^40 strings": (
        _with(("x", ARRAY, Array(STRING, count=MANY))), "more than 4000000 array elements",
    ),
    "an array of 2^40 arrays": (
        _with(("x", ARRAY, Array(ARRAY, count=MANY))), "more than 4000000 array elements",
    ),
    "a string of 2^40 bytes in an array": (
        _with(("x", ARRAY, Array(STRING, [Text(length=MANY)]))), "truncated",
    ),
    "arrays in arrays, 5 deep": (_with(("x", ARRAY, nested(5))), "nests arrays deeper than 4"),
    "arrays in arrays, a million deep": (
        _with(("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1_000_000)), "nests arrays deeper than 4",
    ),
    "an unknown type": (_with(("x", 13, b"")), "key 'x' has the unknown type 13"),
    "an unknown type in an array": (_with(("x", ARRAY, Array(99, [b""]))), "unknown type 99"),
    "the same key twice": (_with(("x", U8, 1), ("x", U8, 1)), "key 'x' stands twice"),
    "the architecture twice": (_with(ARCHITECTURE), "'general.architecture' stands twice"),
    "no architecture": (build([("x", U8, 1)]), "general.architecture is missing"),
    "an empty architecture": (build([("general.architecture", STRING, "")]), "not a plain name"),
    "an architecture with a newline": (
        build([("general.architecture", STRING, "llama\n[program:x]")]), "not a plain name",
    ),
    "a number for an architecture": (build([("general.architecture", U32, 1)]), "wrong type"),
    "a string for a count": (_with(("llama.block_count", STRING, "2")), "wrong type .string"),
    "a fraction for a count": (_with(("llama.context_length", F32, 1.5)), "wrong type .float32"),
    "an array for a count": (
        _with(("llama.context_length", ARRAY, Array(U32, [1]))), "wrong type .array",
    ),
    "a negative count": (_with(("llama.context_length", I32, -1)), "out of range"),
    "a count of 2^40": (_with(("llama.context_length", U64, MANY)), "out of range"),
    "1,025 layers": (_with(("llama.block_count", U32, 1025)), "out of range"),
    "a block 1,024": (_tensors(("blk.1024.x", (8,), 0, 0)), "has 1025 layers"),
    "a block 999,999,999": (_tensors(("blk.999999999.x", (8,), 0, 0)), "layers, at most 1024"),
    "heads for 1,025 layers": (
        _with(("llama.attention.head_count", ARRAY, Array(U32, [1] * 1025))), "has 1025 values",
    ),
    "tokens that are no array": (_with(("tokenizer.ggml.tokens", U32, 5)), "wrong type"),
    "numbers for tags": (_with(("general.tags", ARRAY, Array(U8, [1]))), "wrong type"),
    "alignment 0": (_with(("general.alignment", U32, 0)), "not a power of two"),
    "alignment 48": (_with(("general.alignment", U32, 48)), "not a power of two"),
    "alignment 2^31": (
        build([ARCHITECTURE, ("general.alignment", U32, 2**31)], [("a", (8,), 0, 0)]), "truncated",
    ),
    "shard 3 of 2": (_with(("split.no", U16, 2), ("split.count", U16, 2)), "split.no is 2 of 2"),
    "5 dimensions": (_tensors(("a", (1,) * 5, 0, 0)), "has 5 dimensions"),
    "2^64 elements": (_tensors(("a", (2**32, 2**32), 0, 0)), "more than 2.63 elements"),
    "2^256 elements": (_tensors(("a", (2**64 - 1,) * 4, 0, 0)), "more than 2.63 elements"),
    "a row of half a block": (_tensors(("a", (128,), Q4_K, 0)), "rows of 128, not of whole blocks"),
    "the same tensor twice": (
        _tensors(("a", (8,), 0, 0), ("a", (8,), 0, 32)), "tensor 'a' stands twice",
    ),
    "tensors that overlap": (
        _tensors(("a", (9,), 0, 0), ("b", (8,), 0, 32)), "tensor 'a' overlaps",
    ),
    "a tensor out of line": (_tensors(("a", (8,), 0, 8)), "not aligned to 32"),
    "a tensor at 2^40": (_tensors(("a", (8,), 0, MANY)), "bytes past the end"),
    "a tensor of 2^40 bytes": (_tensors(("a", (2**38,), 0, 0)), "bytes past the end"),
    "a new type beyond the end": (_tensors(("a", (8,), 250, MANY)), "bytes past the end"),
    "a tensor name of 257 bytes": (_tensors(("n" * 257, (8,), 0, 0)), "257 bytes long"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_its_reason(name: str) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(CatalogError, match=reason) as caught:
        parse(data)
    _assert_fit_to_show(caught.value)


def _assert_fit_to_show(error: CatalogError) -> None:
    text = str(error)
    assert text.startswith("cannot read header: ")
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 300


def test_what_a_message_quotes_is_escaped_and_cut() -> None:
    evil = "\x1b]0;\n[program:x]\r" + "k" * 200
    with pytest.raises(CatalogError, match="stands twice") as caught:
        parse(_with((evil, U8, 1), (evil, U8, 1)))
    _assert_fit_to_show(caught.value)


def test_a_big_endian_file_from_the_real_writer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CatalogError, match="big-endian"):
        gguf_header.read(tmp_path / "big.gguf")


def test_cut_at_every_byte_of_the_first_4_kib_it_is_refused(tmp_path: Path) -> None:
    """A download that stopped anywhere costs that file only."""
    path = gguf_factory.write_model(tmp_path / "model.gguf")
    for length in range(4096, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CatalogError, match="truncated") as caught:
            gguf_header.read(path)
    _assert_fit_to_show(caught.value)


def test_cut_by_one_byte_of_the_last_tensor_it_is_refused(tmp_path: Path) -> None:
    path = gguf_factory.write_model(tmp_path / "model.gguf")
    header = gguf_header.read(path)
    os.truncate(path, header.header_bytes + header.tensor_bytes)
    assert gguf_header.read(path).tensor_bytes == header.tensor_bytes
    os.truncate(path, header.header_bytes + header.tensor_bytes - 1)
    with pytest.raises(CatalogError, match="tensor data reaches 1 bytes past the end"):
        gguf_header.read(path)


def test_a_header_that_takes_too_long_is_given_up() -> None:
    """The limit is on computing time, which the clock given counts: 2 s at each look here."""
    clock = map(float, itertools.count(step=2)).__next__
    with pytest.raises(CatalogError, match=r"took longer than 1\.5 s"):
        gguf_header.parse(build(), 1000, clock=clock)


# --- files ---------------------------------------------------------------------------------------


def test_a_header_beyond_256_mib_is_refused_though_the_file_is_longer(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(_with(("x", ARRAY, Array(U8, count=257 * MIB))))
    os.truncate(path, 2**30)
    with pytest.raises(CatalogError, match="header longer than 268435456 bytes"):
        gguf_header.read(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CatalogError, match="truncated"):
        gguf_header.read(tmp_path / "empty.gguf")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="not a regular file"):
        gguf_header.read(tmp_path)


def test_a_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CatalogError, match="not a regular file"):
        gguf_header.read(tmp_path / "pipe.gguf")


def test_a_device_is_refused() -> None:
    with pytest.raises(CatalogError, match="not a regular file"):
        gguf_header.read("/dev/zero")


def test_a_missing_file_and_a_link_to_itself_are_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    for path in (tmp_path / "missing.gguf", loop):
        with pytest.raises(CatalogError) as caught:
            gguf_header.read(path)
        assert str(tmp_path) not in str(caught.value)  # the caller names the file, escaped


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000])
def test_a_path_that_cannot_be_opened_is_refused(path: str) -> None:
    with pytest.raises(CatalogError):
        gguf_header.read(path)


@contextmanager
def _without_privileges() -> Iterator[None]:
    """As a user whom permissions bind: root is nobody for a while."""
    user = os.geteuid()
    if user:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = gguf_factory.write_model(tmp_path / "secret.gguf")
    path.chmod(0o000)
    with _without_privileges(), pytest.raises(CatalogError, match="Permission denied"):
        gguf_header.read(path)


class _Scissors:
    """A clock that stands still, and cuts the file when it is looked at for the `moment`th time."""

    def __init__(self, path: Path, moment: int) -> None:
        self.path, self.moment, self.looks = path, moment, 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks == self.moment:
            os.truncate(self.path, 30)
        return 0.0


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """At any moment: the reader looks at its clock as it goes."""
    path = gguf_factory.write_vocabulary_only(tmp_path / "shrinks.gguf", vocabulary=50_000)
    whole = path.read_bytes()
    never = _Scissors(path, moment=0)
    gguf_header.read(path, clock=never)
    assert never.looks > 5
    for moment in range(1, never.looks):
        path.write_bytes(whole)
        with pytest.raises(CatalogError, match="shrank"):
            gguf_header.read(path, clock=_Scissors(path, moment))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = gguf_factory.write_model(tmp_path / "good.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    free = os.dup(0)
    os.close(free)
    for _ in range(3):
        gguf_header.read(good)
        with pytest.raises(CatalogError):
            gguf_header.read(bad)
    again = os.dup(0)
    os.close(again)
    assert again == free


def test_numpy_is_not_loaded() -> None:
    """The gguf package would: 30 MB and 0.1 s for each scan."""
    script = (
        "import sys; from supervisor_synapse.adapters import gguf_header as g; "
        "g._file_types(), g._tensor_types(), g._block_sizes(); "
        "sys.exit(sum(name in sys.modules for name in ('numpy', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# --- fuzz ----------------------------------------------------------------------------------------


def _write_giants(folder: Path) -> None:
    """Headers as large as the limits allow; sparse where they are mostly zeros."""

    def put(name: str, data: bytes, size: int = 0) -> None:
        (folder / name).write_bytes(data)
        os.truncate(folder / name, max(size, len(data)))

    put("four million empty strings", _with(("x", ARRAY, Array(STRING, count=4_000_000))), 2**30)
    put("four million empty arrays", _with(("x", ARRAY, Array(ARRAY, count=3_999_999))), 2**30)
    put("a string of 200 MiB", _with(("x", STRING, Text(length=200 * MIB))), 2**30)
    put("an array of 300 MiB", _with(("x", ARRAY, Array(U8, count=300 * MIB))), 2**30)
    put("a template of 4 MiB", _with(("tokenizer.chat_template", STRING, "x" * 4 * MIB)))
    put("16,384 keys", build([ARCHITECTURE, *((f"{i:01024}", U8, 1) for i in range(16_383))]))
    tensors = b"".join(
        encode_text(f"blk.{i % 1024}.{i:0247}") + struct.pack("<IQQQQIQ", 4, 8, 1, 1, 1, 0, 32 * i)
        for i in range(65_536)
    )
    put("65,536 tensors", build(tensor_count=65_536, alignment=1) + tensors, 2**26)


def test_thirty_thousand_damaged_headers_within_2_seconds_and_256_mib_each(
    tmp_path: Path,
) -> None:
    """Nothing but a Header or a CatalogError, in a process that may not take more memory."""
    for name in FACTS:
        path = FACTS[name][0](tmp_path / f"{name.replace(' ', '-')}.gguf")
        assert path.parent == tmp_path
    (tmp_path / "types.gguf").write_bytes(build(EVERY_TYPE))
    _write_giants(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", fuzz_headers.__name__, tmp_path, str(FUZZED_HEADERS), "1"],
        capture_output=True, check=False, cwd=CHECKOUT, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    report = json.loads(run.stdout)
    assert report["strangers"] == []
    assert sum(report["outcomes"].values()) >= FUZZED_HEADERS
    assert report["slowest"][0] <= 2.0, report["slowest"]
    assert report["peak_bytes"] <= fuzz_headers.ADDRESS_SPACE_BYTES
    # The damage goes deep enough to be worth its time: neither all refused, nor all for one reason.
    assert report["outcomes"]["accepted"] > FUZZED_HEADERS // 50
    assert len(report["reasons"]) >= 20


EVERY_TYPE: list[Key] = [
    ARCHITECTURE,
    *((f"scalar.{kind}", kind, 1) for kind in _LETTERS if kind not in (STRING, ARRAY)),
    *((f"array.{kind}", ARRAY, Array(kind, [1, 0, 1])) for kind in (U8, I16, F32, BOOL, U64, F64)),
    ("array.text", ARRAY, Array(STRING, ["one", "", "three"])),
    ("array.array", ARRAY, Array(ARRAY, [Array(STRING, ["a"]), nested(3), Array(U8)])),
]


# --- properties ----------------------------------------------------------------------------------


_INTEGERS = {U8: (0, 255), I8: (-128, 127), U16: (0, 2**16 - 1), I16: (-(2**15), 2**15 - 1),
             U32: (0, 2**32 - 1), I32: (-(2**31), 2**31 - 1), U64: (0, 2**64 - 1),
             I64: (-(2**63), 2**63 - 1)}  # fmt: skip


def _values(kind: int, depth: int = 3) -> st.SearchStrategy[Any]:
    if kind in _INTEGERS:
        return st.integers(*_INTEGERS[kind])
    if kind == STRING:
        return st.binary(max_size=40)
    if kind == ARRAY:
        kinds = st.sampled_from([k for k in _LETTERS if k != ARRAY or depth > 0])
        return kinds.flatmap(
            lambda k: st.lists(_values(k, depth - 1), max_size=4).map(lambda e: Array(k, e))
        )
    return st.booleans() if kind == BOOL else st.floats(width=32)


_STRANGE_KEYS = st.lists(
    st.sampled_from(list(_LETTERS)).flatmap(
        lambda kind: st.tuples(
            st.binary(max_size=20).map(lambda name: b"strange." + name),
            st.just(kind),
            _values(kind),
        )
    ),
    max_size=8,
    unique_by=lambda key: key[0],
)
_KNOWN_KEYS: list[Key] = [
    ARCHITECTURE,
    ("llama.block_count", U32, 3),
    ("llama.attention.head_count_kv", ARRAY, Array(U32, [2, 2, 1])),
    ("general.name", STRING, "known"),
    ("tokenizer.ggml.tokens", ARRAY, Array(STRING, ["a", "bc", ""])),
]
_TENSORS: list[Tensor] = [("token_embd.weight", (8, 3), 0, 0), ("blk.2.x", (8,), 0, 96)]


@settings(deadline=None, max_examples=300)
@given(strange=_STRANGE_KEYS, data=st.data())
def test_keys_that_do_not_matter_change_nothing(strange: list[Key], data: st.DataObject) -> None:
    """Whatever their types and wherever they stand, what comes after them is found."""
    expected = parse(build(_KNOWN_KEYS, _TENSORS, data_bytes=128))
    shuffled = data.draw(st.permutations([*_KNOWN_KEYS, *strange]))
    found = parse(build(shuffled, _TENSORS, data_bytes=128))
    assert replace(found, header_bytes=expected.header_bytes) == expected


@settings(deadline=None, max_examples=300)
@given(
    keys=st.lists(
        st.tuples(
            st.sampled_from(["general.tags", "general.alignment", "split.no", "general.type",
                             "llama.block_count", "tokenizer.ggml.tokens", "llama.pooling_type",
                             "llama.feed_forward_length", "tokenizer.chat_template"]),
            st.sampled_from(list(_LETTERS)),
        ).flatmap(lambda key: st.tuples(st.just(key[0]), st.just(key[1]), _values(key[1]))),
        max_size=6,
    ),
    tail=st.binary(max_size=60),
    tensor_count=st.integers(0, 3),
)  # fmt: skip
def test_known_keys_of_any_type_give_a_header_or_a_catalog_error(
    keys: list[Key], tail: bytes, tensor_count: int
) -> None:
    data = build([ARCHITECTURE, *keys], tensor_count=tensor_count, alignment=1) + tail
    try:
        header = parse(data)
    except CatalogError as error:
        _assert_fit_to_show(error)
    else:
        assert header.architecture == "llama"


@settings(deadline=None, max_examples=300)
@given(rest=st.binary(max_size=200), version=st.sampled_from([2, 3]))
def test_any_bytes_give_a_header_or_a_catalog_error(rest: bytes, version: int) -> None:
    data = b"GGUF" + struct.pack("<I", version) + rest
    try:
        parse(data)
    except CatalogError as error:
        _assert_fit_to_show(error)
