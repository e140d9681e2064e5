"""Reads the facts in a GGUF header, within bounds: any bytes give a `Header` or a `CatalogError`.

Two steps. First the keys are indexed: each value is skipped over and only its place is kept, so
that a vocabulary of 262,144 strings builds no object. Then the few keys that matter are read.

The file is read through a small window with pread, not mapped: a mapped file that shrinks under
us (an interrupted download, a network share) kills the process with SIGBUS, while a read that
fails costs only that file. The limits below hold whatever the bytes claim.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import os
import re
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from supervisor_synapse.core.model import FileKind, Header
from supervisor_synapse.errors import CatalogError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32  # where general.alignment is absent, by the format

# Limits, each well above what real models have (in brackets, the largest seen).
_MAX_HEADER_BYTES = 256 * 1024 * 1024  # [about 40 MiB, with an embedded tokenizer.json]
_MAX_KEYS = 16_384  # [about 100]
_MAX_TENSORS = 65_536  # [about 3,000]
_MAX_KEY_BYTES = 1024  # [about 60]
_MAX_TENSOR_NAME_BYTES = 256  # [63: llama.cpp's GGML_MAX_NAME]
_MAX_TEXT_BYTES = 64 * 1024  # of a value that is read, not of one skipped
_MAX_TEMPLATE_BYTES = 4 * 1024 * 1024  # [about 30 KiB]
_MAX_WALKED = 4_000_000  # strings and nested arrays over all values [about 800,000]
_MAX_NESTING = 4  # arrays in arrays [1]
_MAX_DIMENSIONS = 4  # llama.cpp's GGML_MAX_DIMS
_MAX_LAYERS = 1024  # [512: llama.cpp's LLAMA_MAX_LAYERS]
_MAX_ELEMENTS = 2**63 - 1  # of one tensor; llama.cpp counts in int64
_MAX_NUMBER = 2**32 - 1  # llama.cpp reads its counts as uint32
_MAX_TAGS = 32
_MAX_TAG_CHARACTERS = 64
_MAX_NAME_CHARACTERS = 128
_MAX_SECONDS = 1.5

_WINDOW_BYTES = 256 * 1024
_CHECK_EVERY = 1024  # keys or tensors between two looks at the clock

_PATCHES_OF_ANY_IMAGE = (2 * 46) ** 2  # llama.cpp's set_warmup_n_tokens for Qwen-VL and its like

_ARCHITECTURE = re.compile(r"[a-z0-9._-]{1,64}")
_BLOCK = re.compile(rb"blk\.(\d{1,9})\.")
# What `--n-cpu-moe` moves (llama.cpp's LLM_FFN_EXPS_REGEX).
_EXPERTS = re.compile(rb"blk\.(\d{1,9})\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps")
# What llama.cpp lists as LLM_TENSOR_LAYER_INPUT: such tensors never leave the host.
_INPUTS = tuple(
    name + b"."
    for name in (
        b"token_embd", b"token_embd_norm", b"token_types", b"position_embd",
        b"per_layer_token_embd",
    )
)  # fmt: skip

# Value types of fixed size, by GGUFValueType: struct's letter.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_SIZES = {kind: struct.calcsize("<" + letter) for kind, letter in _SCALARS.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
_FLAGS = frozenset({_BOOL})

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_Fetch = Callable[[int, int], bytes]
_Clock = Callable[[], float]


def read(path: str | os.PathLike[str], *, clock: _Clock = time.thread_time) -> Header:
    """The header of the GGUF file `path`; at most 256 KiB of it are held at a time.

    Raises:
        CatalogError: not a regular file, unreadable, or see `parse`. The path is not in the text.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _error(_why(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _error("not a regular file")

        def fetch(offset: int, count: int) -> bytes:
            return os.pread(descriptor, count, offset)

        return _parse(fetch, status.st_size, status.st_size, clock)
    except OSError as error:
        raise _error(_why(error)) from None
    finally:
        os.close(descriptor)


def parse(
    buffer: bytes | bytearray | memoryview | mmap.mmap,
    size_bytes: int,
    *,
    clock: _Clock = time.thread_time,
) -> Header:
    """The header at the start of `buffer`, for a file of `size_bytes` (of which it may be a part).

    `clock` counts seconds of computing: a slow disk is no fault of the file.

    Raises:
        CatalogError: damaged, truncated, hostile or of an unsupported version; one printable line.
    """
    return _parse(
        lambda offset, count: bytes(buffer[offset : offset + count]),
        min(len(buffer), size_bytes),
        size_bytes,
        clock,
    )


def _parse(fetch: _Fetch, readable_bytes: int, size_bytes: int, clock: _Clock) -> Header:
    cursor = _Cursor(fetch, readable_bytes, clock)
    tensor_count, key_count = _read_preamble(cursor)
    places = _index_values(cursor, key_count)
    tensors = _read_tensors(cursor, tensor_count)
    end = cursor.position
    values = _Values(cursor, places)
    start = _align(end, values.alignment())
    sizes = _measure(tensors, start, size_bytes, values.alignment())
    return _header(values, tensors, sizes, header_bytes=start if tensors else end)


# --- text from the file in messages -------------------------------------------------------------


def _error(why: str) -> CatalogError:
    return CatalogError(f"cannot read header: {why}")


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or "the path cannot be opened"


def _shown(raw: bytes) -> str:
    """Bytes from the file, escaped and cut, for a message: ASCII, as it may travel by RPC."""
    return ascii(raw[:48].decode("utf-8", "replace")) + ("..." if len(raw) > 48 else "")


def _clean(text: str, longest: int) -> str:
    """Printable characters only (no control, bidi or private ones), blanks folded, cut."""
    folded = " ".join(text[: 8 * longest].split())
    return "".join(c for c in folded if c.isprintable())[:longest].strip()


# --- bytes ---------------------------------------------------------------------------------------


class _Cursor:
    """A position in the header and the window of bytes around it."""

    __slots__ = ("_base", "_clock", "_deadline", "_end", "_fetch", "_walked", "_window", "position")

    def __init__(self, fetch: _Fetch, readable_bytes: int, clock: _Clock) -> None:
        self._fetch = fetch
        self._end = readable_bytes
        self._clock = clock
        self._deadline = clock() + _MAX_SECONDS
        self._window = b""
        self._base = 0
        self._walked = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, which the caller has bounded."""
        begin = self.position - self._base
        if begin < 0 or begin + count > len(self._window):
            self._refill(count)
            begin = 0
        self.position += count
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        """Pass over `count` bytes without reading them."""
        self._require(count)
        self.position += count

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def text(self, longest: int, what: str) -> bytes:
        """A string's bytes: uint64 length, then UTF-8."""
        length = self.u64()
        if length > longest:
            raise _error(f"{what} is {length} bytes long, at most {longest} are allowed")
        return self.take(length)

    def skip_strings(self, count: int) -> None:
        """Pass over `count` strings; the hot loop, 0.1 µs each."""
        self.walk(count)
        unpack = _U64.unpack_from
        while count:
            self.check_time()
            if not 0 <= self.position - self._base <= len(self._window) - 8:
                self._refill(8)
            window, at = self._window, self.position - self._base
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.position = self._base + at
            self._require(0)

    def walk(self, count: int) -> None:
        """Account for `count` more things to be passed one by one."""
        self._walked += count
        if self._walked > _MAX_WALKED:
            raise _error(f"more than {_MAX_WALKED} array elements")

    def check_time(self) -> None:
        if self._clock() > self._deadline:
            raise _error(f"took longer than {_MAX_SECONDS} s")

    def _require(self, count: int) -> None:
        end = self.position + count
        if end > self._end:
            raise _error(f"truncated: the header reaches past the end of the file ({self._end})")
        if end > _MAX_HEADER_BYTES:
            raise _error(f"header longer than {_MAX_HEADER_BYTES} bytes")

    def _refill(self, count: int) -> None:
        self._require(count)
        self._base = self.position
        wanted = min(max(count, _WINDOW_BYTES), self._end - self._base)
        self._window = self._fetch(self._base, wanted)
        if len(self._window) < count:
            raise _error("truncated: the file shrank while it was read")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """The counts of tensors and keys, from magic, version and counts: 24 bytes."""
    magic = cursor.take(4)
    if magic != _MAGIC:
        raise _error(f"not a GGUF file: it begins with {_shown(magic)}")
    version = cursor.u32()
    if version and version & 0xFFFF == 0:  # llama.cpp's own test
        raise _error("big-endian GGUF files are not supported")
    if version not in _VERSIONS:
        raise _error(f"GGUF version {version} is not supported, 2 and 3 are")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    if tensor_count > _MAX_TENSORS:
        raise _error(f"claims {tensor_count} tensors, at most {_MAX_TENSORS} are allowed")
    if key_count > _MAX_KEYS:
        raise _error(f"claims {key_count} keys, at most {_MAX_KEYS} are allowed")
    return tensor_count, key_count


# --- keys ----------------------------------------------------------------------------------------


def _index_values(cursor: _Cursor, count: int) -> dict[bytes, int]:
    """Where the value of each key begins (with its type)."""
    places: dict[bytes, int] = {}
    for number in range(count):
        if number % _CHECK_EVERY == 0:
            cursor.check_time()
        key = cursor.text(_MAX_KEY_BYTES, f"key {number}")
        if key in places:
            raise _error(f"key {_shown(key)} stands twice")
        places[key] = cursor.position
        _skip_value(cursor, cursor.u32(), key)
    return places


def _skip_value(cursor: _Cursor, kind: int, key: bytes) -> None:
    if kind in _SIZES:
        cursor.skip(_SIZES[kind])
    elif kind == _STRING:
        cursor.skip(cursor.u64())
    elif kind == _ARRAY:
        _skip_array(cursor, key, nesting=1)
    else:
        raise _unknown_type(key, kind)


def _skip_array(cursor: _Cursor, key: bytes, nesting: int) -> None:
    if nesting > _MAX_NESTING:
        raise _error(f"key {_shown(key)} nests arrays deeper than {_MAX_NESTING}")
    kind, count = cursor.u32(), cursor.u64()
    if kind in _SIZES:
        cursor.skip(count * _SIZES[kind])
    elif kind == _STRING:
        cursor.skip_strings(count)
    elif kind == _ARRAY:
        cursor.walk(count)
        for number in range(count):
            if number % _CHECK_EVERY == 0:
                cursor.check_time()
            _skip_array(cursor, key, nesting + 1)
    else:
        raise _unknown_type(key, kind)


def _unknown_type(key: bytes, kind: int) -> CatalogError:
    return _error(f"key {_shown(key)} has the unknown type {kind}")


class _Values:
    """The indexed keys; each method reads one, by a name in which `{arch}` may stand.

    A key that is absent gives the empty value; one of the wrong type is a CatalogError, as it is
    to llama.cpp.
    """

    __slots__ = ("_cursor", "_places", "architecture")

    def __init__(self, cursor: _Cursor, places: dict[bytes, int]) -> None:
        self._cursor = cursor
        self._places = places
        self.architecture = ""
        self.architecture = self._read_architecture()

    def has(self, name: str) -> bool:
        return self._key(name) in self._places

    def has_prefix(self, prefix: bytes) -> bool:
        return any(key.startswith(prefix) for key in self._places)

    def number(self, name: str, largest: int = _MAX_NUMBER) -> int:
        """A count, in any integer type; 0 where absent."""
        found = self._numbers(name, _INTEGERS, single=True, largest=largest)
        return found[0] if found else 0

    def numbers(self, name: str) -> tuple[int, ...]:
        """A count, or one for each layer."""
        return self._numbers(name, _INTEGERS, single=False)

    def flag(self, name: str) -> bool | None:
        found = self._numbers(name, _FLAGS, single=True)
        return bool(found[0]) if found else None

    def pattern(self, name: str) -> tuple[int, ...]:
        """A period, or a flag for each layer."""
        return self._numbers(name, _INTEGERS | _FLAGS, single=False)

    def raw(self, name: str, longest: int = _MAX_TEXT_BYTES) -> bytes | None:
        """A string's bytes."""
        kind = self._seek(name)
        if kind is None:
            return None
        if kind != _STRING:
            raise self._wrong_type(name, kind)
        return self._cursor.text(longest, f"the value of {_shown(self._key(name))}")

    def text(self, name: str, longest: int) -> str | None:
        """A string fit to show: see `_clean`; None where nothing is left of it."""
        raw = self.raw(name)
        return _clean(raw.decode("utf-8", "replace"), longest) or None if raw else None

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """The first `most` strings of an array, fit to show."""
        opened = self._open_array(name)
        if opened is None:
            return ()
        kind, count = opened
        if kind != _STRING:
            raise self._wrong_type(name, kind)
        found = [self._cursor.text(_MAX_TEXT_BYTES, "a tag") for _ in range(min(count, most))]
        cleaned = (_clean(raw.decode("utf-8", "replace"), longest) for raw in found)
        return tuple(text for text in cleaned if text)

    def length(self, name: str) -> int:
        """How many elements an array has; 0 where absent."""
        opened = self._open_array(name)
        return opened[1] if opened else 0

    def alignment(self) -> int:
        """Bytes to whose multiples tensor data is padded: a power of two."""
        if not self.has("general.alignment"):
            return _DEFAULT_ALIGNMENT
        alignment = self.number("general.alignment")
        if alignment.bit_count() != 1:
            raise _error(f"general.alignment is {alignment}, not a power of two")
        return alignment

    def _read_architecture(self) -> str:
        raw = self.raw("general.architecture")
        if raw is None:
            return ""
        name = raw.decode("utf-8", "replace")
        if not _ARCHITECTURE.fullmatch(name):
            raise _error(f"general.architecture is {_shown(raw)}, not a plain name")
        return name

    def _key(self, name: str) -> bytes:
        return name.replace("{arch}", self.architecture).encode()

    def _seek(self, name: str) -> int | None:
        """Go to the value of a key; its type, or None where it is absent."""
        place = self._places.get(self._key(name))
        if place is None:
            return None
        self._cursor.position = place
        return self._cursor.u32()

    def _open_array(self, name: str) -> tuple[int, int] | None:
        """Go to an array's first element; type and count of its elements."""
        kind = self._seek(name)
        if kind is None:
            return None
        if kind != _ARRAY:
            raise self._wrong_type(name, kind)
        return self._cursor.u32(), self._cursor.u64()

    def _numbers(
        self, name: str, kinds: frozenset[int], *, single: bool, largest: int = _MAX_NUMBER
    ) -> tuple[int, ...]:
        kind, count = self._seek(name), 1
        if kind is None:
            return ()
        if kind == _ARRAY and not single:
            kind, count = self._cursor.u32(), self._cursor.u64()
        if kind not in kinds:
            raise self._wrong_type(name, kind)
        if count > _MAX_LAYERS:
            raise _error(f"{_shown(self._key(name))} has {count} values, at most {_MAX_LAYERS}")
        raw = self._cursor.take(count * _SIZES[kind])
        found: tuple[int, ...] = struct.unpack(f"<{count}{_SCALARS[kind]}", raw)
        if not all(0 <= value <= largest for value in found):
            raise _error(f"{_shown(self._key(name))} is out of range")
        return found

    def _wrong_type(self, name: str, kind: int) -> CatalogError:
        return _error(f"{_shown(self._key(name))} has the wrong type ({_type_name(kind)})")


# --- tensors -------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    name: bytes
    shape: tuple[int, ...]  # fastest dimension first
    kind: int  # GGMLQuantizationType, or one newer than the package
    offset: int  # from the start of the data

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _read_tensors(cursor: _Cursor, count: int) -> list[_Tensor]:
    tensors: list[_Tensor] = []
    names: set[bytes] = set()
    for number in range(count):
        if number % _CHECK_EVERY == 0:
            cursor.check_time()
        tensor = _read_tensor(cursor, number)
        if tensor.name in names:
            raise _error(f"tensor {_shown(tensor.name)} stands twice")
        names.add(tensor.name)
        tensors.append(tensor)
    return tensors


def _read_tensor(cursor: _Cursor, number: int) -> _Tensor:
    name = cursor.text(_MAX_TENSOR_NAME_BYTES, f"the name of tensor {number}")
    dimensions = cursor.u32()
    if dimensions > _MAX_DIMENSIONS:
        raise _error(f"tensor {_shown(name)} has {dimensions} dimensions, at most 4 are allowed")
    *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", cursor.take(8 * dimensions + 12))
    tensor = _Tensor(name, tuple(shape), kind, offset)
    if tensor.elements > _MAX_ELEMENTS:
        raise _error(f"tensor {_shown(name)} has more than 2^63 elements")
    return tensor


def _measure(
    tensors: list[_Tensor], start: int, size_bytes: int, alignment: int
) -> dict[bytes, int]:
    """Bytes of each tensor's data.

    From type and shape where the type is known, else up to the next tensor (or the file's end), so
    that a quantization newer than the gguf package costs nothing.

    Raises:
        CatalogError: data outside the file, overlapping, or not aligned.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    data_bytes = size_bytes - start
    ends = [following.offset for following in ordered[1:]] + [data_bytes]
    sizes: dict[bytes, int] = {}
    past_end = 0
    for index, (tensor, end) in enumerate(zip(ordered, ends, strict=False)):  # none: one end
        if tensor.offset % alignment:
            raise _error(f"tensor {_shown(tensor.name)} is not aligned to {alignment} bytes")
        exact = _exact_bytes(tensor)
        size = max(end - tensor.offset, 0) if exact is None else exact
        sizes[tensor.name] = size
        past_end = max(past_end, tensor.offset + size - data_bytes)
        if index < len(ordered) - 1 and tensor.offset + size > end:
            raise _error(f"tensor {_shown(tensor.name)} overlaps the one after it")
    if past_end > 0:
        raise _error(f"truncated: tensor data reaches {past_end} bytes past the end")
    return sizes


def _exact_bytes(tensor: _Tensor) -> int | None:
    """Bytes by type and shape; None for a type that the package does not know."""
    block = _block_sizes().get(tensor.kind)
    if block is None:
        return None
    block_elements, block_bytes = block
    row = tensor.shape[0] if tensor.shape else 1
    if row % block_elements:
        raise _error(f"tensor {_shown(tensor.name)} has rows of {row}, not of whole blocks")
    return tensor.elements // block_elements * block_bytes


# --- facts ---------------------------------------------------------------------------------------


def _header(
    values: _Values, tensors: list[_Tensor], sizes: dict[bytes, int], header_bytes: int
) -> Header:
    split_index, split_count = _split(values)
    kind = _kind(values, tensors, split_count)
    _require_architecture(values.architecture, kind, split_index)
    layers = values.number("{arch}.block_count", largest=_MAX_LAYERS)
    template = values.raw("tokenizer.chat_template", _MAX_TEMPLATE_BYTES)
    return Header(
        kind=kind,
        architecture=values.architecture,
        name=values.text("general.name", _MAX_NAME_CHARACTERS),
        quantization=_quantization(values, tensors),
        parameters=sum(tensor.elements for tensor in tensors),
        layers=layers,
        context_length=values.number("{arch}.context_length"),
        embedding_length=values.number("{arch}.embedding_length"),
        feed_forward_length=values.numbers("{arch}.feed_forward_length"),
        heads=values.numbers("{arch}.attention.head_count"),
        heads_kv=values.numbers("{arch}.attention.head_count_kv"),
        key_length=values.number("{arch}.attention.key_length"),
        value_length=values.number("{arch}.attention.value_length"),
        key_length_mla=values.number("{arch}.attention.key_length_mla"),
        value_length_mla=values.number("{arch}.attention.value_length_mla"),
        kv_lora_rank=values.number("{arch}.attention.kv_lora_rank"),
        sliding_window=values.number("{arch}.attention.sliding_window"),
        sliding_window_pattern=values.pattern("{arch}.attention.sliding_window_pattern"),
        window_key_length=values.number("{arch}.attention.key_length_swa"),
        window_value_length=values.number("{arch}.attention.value_length_swa"),
        shared_kv_layers=values.number("{arch}.attention.shared_kv_layers"),
        attention_interval=values.number("{arch}.full_attention_interval"),
        recurrent_layers=values.pattern("{arch}.attention.recurrent_layers"),
        predicting_layers=values.number("{arch}.nextn_predict_layers"),
        experts=values.number("{arch}.expert_count"),
        experts_used=values.number("{arch}.expert_used_count"),
        expert_feed_forward_length=values.number("{arch}.expert_feed_forward_length"),
        shared_experts=values.number("{arch}.expert_shared_count"),
        ungated=_is_ungated(tensors),
        recurrent_state=_recurrent_state(values),
        short_convolution=values.number("{arch}.shortconv.l_cache"),
        wkv_head_size=values.number("{arch}.wkv.head_size"),
        token_shifts=values.number("{arch}.token_shift_count"),
        kda_head_size=values.number("{arch}.kda.head_dim"),
        pooling=_pooling(values),
        causal_attention=values.flag("{arch}.attention.causal"),
        classifier=_has_classifier(values, tensors),
        vocabulary_size=_vocabulary_size(values),
        chat_template_sha256=hashlib.sha256(template).hexdigest() if template else None,
        has_vision=bool(values.flag("clip.has_vision_encoder")),
        has_audio=bool(values.flag("clip.has_audio_encoder")),
        projection_dim=_projection_dim(values, tensors),
        image=_image(values),
        tags=values.texts("general.tags", _MAX_TAGS, _MAX_TAG_CHARACTERS),
        split_index=split_index,
        split_count=split_count,
        tensors=len(tensors),
        header_bytes=header_bytes,
        tensor_bytes=sum(sizes.values()),
        block_bytes=_block_bytes(sizes, layers, _BLOCK),
        expert_bytes=_expert_bytes(sizes, layers),
        embedding_bytes=sizes.get(b"token_embd.weight", 0),
        input_bytes=sum(size for name, size in sizes.items() if name.startswith(_INPUTS)),
        has_output=b"output.weight" in sizes,
    )


def _kind(values: _Values, tensors: list[_Tensor], split_count: int) -> FileKind:
    stated = values.raw("general.type")
    is_clip = values.architecture == "clip" or values.has_prefix(b"clip.")
    if stated == b"mmproj" or is_clip:
        return FileKind.PROJECTOR
    # A control vector is laid over a model as an adapter is.
    is_adapter = values.architecture == "controlvector" or values.has_prefix(b"adapter.")
    if stated == b"adapter" or is_adapter:
        return FileKind.ADAPTER
    if stated == b"imatrix" or values.has_prefix(b"imatrix."):
        return FileKind.IMATRIX
    if not tensors and split_count <= 1:
        return FileKind.VOCABULARY
    return FileKind.MODEL


def _require_architecture(architecture: str, kind: FileKind, split_index: int) -> None:
    """Only shards after the first (which state nothing but their place) and imatrices have none."""
    if not architecture and kind is not FileKind.IMATRIX and not split_index:
        raise _error("general.architecture is missing")


def _split(values: _Values) -> tuple[int, int]:
    """Index from 0, and count."""
    index, count = values.number("split.no"), values.number("split.count")
    if index and index >= count:
        raise _error(f"split.no is {index} of {count}")
    return index, count


def _quantization(values: _Values, tensors: list[_Tensor]) -> str:
    """The stated file type's name, else the type that most elements have.

    Not the one that most tensors have: small F32 norms outnumber the weights.
    """
    if values.has("general.file_type"):
        name = _file_types().get(values.number("general.file_type"))
        if name:
            return name
    elements: Counter[int] = Counter()
    for tensor in tensors:
        elements[tensor.kind] += tensor.elements
    commonest = max(elements, key=lambda kind: (elements[kind], -kind), default=-1)
    return _tensor_types().get(commonest, "unknown")


def _recurrent_state(values: _Values) -> tuple[int, int, int, int, int]:
    return (
        values.number("{arch}.ssm.conv_kernel"),
        values.number("{arch}.ssm.inner_size"),
        values.number("{arch}.ssm.state_size"),
        values.number("{arch}.ssm.time_step_rank"),
        values.number("{arch}.ssm.group_count"),
    )


def _pooling(values: _Values) -> int | None:
    name = "{arch}.pooling_type"
    return values.number(name) if values.has(name) else None


def _has_classifier(values: _Values, tensors: list[_Tensor]) -> bool:
    if values.has("{arch}.classifier.output_labels"):
        return True
    return any(tensor.name == b"cls" or tensor.name.startswith(b"cls.") for tensor in tensors)


def _vocabulary_size(values: _Values) -> int:
    return values.length("tokenizer.ggml.tokens") or values.number("{arch}.vocab_size")


def _projection_dim(values: _Values, tensors: list[_Tensor]) -> int:
    """Width of the text model fed.

    LLaVA's files state CLIP's own width; there the last layer's bias has the text model's, as in
    llama.cpp's clip_n_mmproj_embd.
    """
    projector = values.raw("clip.projector_type")
    if projector in (None, b"mlp"):
        for tensor in tensors:
            if tensor.name == b"mm.2.bias" and tensor.shape:
                return min(tensor.shape[0], _MAX_NUMBER)
    vision = values.number("clip.vision.projection_dim")
    audio = values.number("clip.audio.projection_dim")
    return vision or audio or values.number("clip.projection_dim")


def _image(values: _Values) -> tuple[int, int, int]:
    """Patches of the image for which the engine lays out its graph, and the encoder's widths."""
    size, patch = values.number("clip.vision.image_size"), values.number("clip.vision.patch_size")
    patches = (size // patch) ** 2 if patch else 0
    if b"vl" in (values.raw("clip.projector_type") or b""):  # takes images of any size
        patches = max(patches, _PATCHES_OF_ANY_IMAGE)
    return (
        min(patches, _MAX_NUMBER),
        values.number("clip.vision.embedding_length"),
        values.number("clip.vision.feed_forward_length"),
    )


def _block_bytes(
    sizes: dict[bytes, int], layers: int, wanted: re.Pattern[bytes]
) -> tuple[int, ...]:
    """Data of the `wanted` tensors by their block; as long as there are layers, stated or found."""
    blocks: Counter[int] = Counter()
    for name, size in sizes.items():
        if found := wanted.match(name):
            blocks[int(found[1])] += size
    count = max(layers, max(blocks, default=-1) + 1)
    if count > _MAX_LAYERS:
        raise _error(f"has {count} layers, at most {_MAX_LAYERS} are allowed")
    return tuple(blocks[index] for index in range(count))


def _expert_bytes(sizes: dict[bytes, int], layers: int) -> tuple[int, ...]:
    """As `_block_bytes`; empty where there are none."""
    found = _block_bytes(sizes, layers, _EXPERTS)
    return found if any(found) else ()


def _is_ungated(tensors: list[_Tensor]) -> bool:
    """Whether no gate stands beside the projection up, or is one with it (twice as wide)."""
    widths: dict[bytes, int] = {}
    for tensor in tensors:
        _, _, part = tensor.name.partition(b".ffn_")
        if part.startswith(b"gate"):
            return False
        if part == b"up.weight" and len(tensor.shape) > 1:
            widths[b"up"] = tensor.shape[1]
        if part == b"down.weight" and tensor.shape:
            widths[b"down"] = tensor.shape[0]
    return bool(widths) and widths.get(b"up") == widths.get(b"down")


# --- the gguf package's tables -------------------------------------------------------------------


@cache
def _constants() -> ModuleType:
    """The submodule gguf.constants, without running `gguf/__init__`.

    That imports numpy: 30 MB and 0.1 s that a scan of headers has no use for. It is loaded by its
    place, and is not put into `sys.modules`, so that `import gguf` elsewhere gets the real package.
    """
    package = importlib.util.find_spec("gguf")
    places = package.submodule_search_locations if package else None
    if not places:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
    spec = importlib.util.spec_from_file_location(
        "_synapse_gguf_constants", Path(next(iter(places)), "constants.py")
    )
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'gguf.constants'", name="gguf.constants")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of one block, by tensor type."""
    return {int(kind): size for kind, size in _constants().GGML_QUANT_SIZES.items()}


@cache
def _tensor_types() -> dict[int, str]:
    return {int(kind): str(kind.name) for kind in _constants().GGMLQuantizationType}


@cache
def _file_types() -> dict[int, str]:
    """Names as people write them: "Q4_K_M" for MOSTLY_Q4_K_M."""
    return {
        int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in _constants().LlamaFileType
        if kind.name != "GUESSED"
    }


def _type_name(kind: int) -> str:
    try:
        return str(_constants().GGUFValueType(kind).name).lower()
    except ValueError:
        return str(kind)
