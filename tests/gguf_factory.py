"""Small GGUF files and hub caches for tests. What says that it loads, loads in the real server.

Every file comes from the gguf package's own writer, so that a reader is tested against what
others write, not against our idea of the format. The same arguments give the same bytes.

Answers are valid UTF-8 whatever the weights are: dimension 0 of the hidden state holds a large
constant, and the output rows of byte and control tokens weigh it with -`_AVERSION`, so that only
words are ever drawn, and no end of text: a completion runs to its `n_predict`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests import gguf_architectures
from tests.gguf_architectures import Random, Shape, Value, ones, zeros

_Tensors = gguf_architectures.Tensors

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROJECTOR_TYPES = {"vision": "gemma3", "audio": "ultravox"}

_CONSTANT = 8.0  # dimension 0 of every embedding, before the norm
_AVERSION = 6.0  # weight of that dimension against byte and control tokens
# Matrices that the engine computes with as F32.
_KEPT_F32 = (
    "token_types.weight", "position_embd.weight", "ssm_conv1d.weight", "ssm_a", "ssm_d",
    "ssm_norm.weight", "shortconv.conv.weight", ".bias",
)  # fmt: skip
_TEXT = (
    "the a one this that each every some small large quiet bright green blue old new early late "
    "river road house garden window table paper stone tree bird boat lamp letter market harbour "
    "morning evening winter summer child friend teacher baker sailor walks runs reads writes sings "
    "waits opens closes finds keeps brings carries and but or so near under over behind between "
    "slowly quickly gently again often never always today tomorrow here there with without "
    "bridge field forest island mountain village kitchen mirror ladder basket ribbon silver"
)
_WORDS = _TEXT.split()


# --- writing -------------------------------------------------------------------------------------


def _type_of(value: Value) -> gguf.GGUFValueType:
    """The GGUF type of a Python value: whole numbers are uint32, or int32 where negative."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**32:
        return gguf.GGUFValueType.UINT64
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Value] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    *,
    tensor_type: str = "F16",
    shards: int = 1,
) -> Path:
    """Any GGUF file: `keys` as they stand (None leaves one out), then `tensors`.

    Matrices are stored as `tensor_type` (a GGMLQuantizationType that gguf can quantize to), what
    has one dimension and `_KEPT_F32` as F32, as llama.cpp wants it. Lists are arrays of the type
    of their first element; `general.architecture` is written first, or not at all where it is
    empty. With `shards` see `write_split` for how the files are called.
    """
    tensors = dict(tensors or {})
    per_shard = -(-len(tensors) // shards)
    writer = gguf.GGUFWriter(None, architecture, split_max_tensors=per_shard if shards > 1 else 0)
    if not architecture:
        writer.kv_data[0].clear()
    for key, value in (keys or {}).items():
        if value is None:
            continue
        elements = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        writer.add_key_value(
            key,
            value,
            gguf.GGUFValueType.ARRAY if elements else _type_of(value),
            sub_type=_type_of(value[0]) if elements and value else None,  # type: ignore[index]
        )
    wanted = gguf.GGMLQuantizationType[tensor_type]
    for name, array in tensors.items():
        if array.ndim > 1 and array.dtype == np.float32 and not name.endswith(_KEPT_F32):
            writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, array)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _file_type(name: str) -> int:
    """LlamaFileType by its short name, "Q4_K_M"."""
    for prefix in ("MOSTLY_", "ALL_"):
        if prefix + name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[prefix + name])
    raise KeyError(name)


# --- vocabularies --------------------------------------------------------------------------------


def words(count: int) -> list[str]:
    """`count` different words: plain English ones, then invented ones such as "bamiro"."""
    return list(itertools.islice(itertools.chain(_WORDS, _invented()), count))


def _invented() -> Iterator[str]:
    syllables = [c + v for c in "bdfglmnprstvz" for v in "aeiou"]
    for length in itertools.count(3):
        yield from ("".join(parts) for parts in itertools.product(syllables, repeat=length))


@dataclass(frozen=True)
class _Vocabulary:
    keys: dict[str, Value]
    size: int
    averted: int  # the first so many tokens shall never be drawn


def _sentencepiece(count: int) -> _Vocabulary:
    """Three control tokens, 256 bytes, `count` words: an input is read byte by byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    averted = len(tokens)
    tokens += ["▁" + word for word in words(count)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * count
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * averted + [-float(rank) for rank in range(count)],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return _Vocabulary(keys, len(tokens), averted)


def _wordpiece(count: int) -> _Vocabulary:
    """BERT's: whole words, and the letters that the rest is made of."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
    tokens = [*special, *("▁" + c for c in letters), *letters]
    tokens += ["▁" + word for word in words(count) if len(word) > 1]
    kinds = [int(gguf.TokenType.CONTROL)] * len(special)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds + [1] * (len(tokens) - len(kinds)),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,  # llama.cpp's own spelling
        "tokenizer.ggml.mask_token_id": 4,
    }
    return _Vocabulary(keys, len(tokens), 0)


# --- models --------------------------------------------------------------------------------------


def _decoder(
    architecture: str, shape: Shape, vocabulary: _Vocabulary, seed: int | None, *, tied: bool
) -> _Tensors:
    random = Random(seed)
    embedding = random.matrix(vocabulary.size, shape.embedding) * 20  # words differ by about 1
    embedding[:, 0] = _CONSTANT
    output = random.matrix(vocabulary.size, shape.embedding) * 20
    output[:, 0] = 0
    output[: vocabulary.averted, 0] = -_AVERSION
    tensors: _Tensors = {"token_embd.weight": embedding}
    for layer in range(shape.layers):
        block = gguf_architectures.block(architecture, shape, random, layer)
        tensors |= {f"blk.{layer}.{name}": array for name, array in block.items()}
    tensors |= {gguf_architectures.final_norm(architecture): ones(shape.embedding)}
    return tensors if tied else tensors | {"output.weight": output}


def _model(
    *,
    architecture: str = "llama",
    layers: int = 2,
    embedding: int = 64,
    heads: int = 4,
    heads_kv: int = 2,
    head: int | None = None,
    feed_forward: int | None = None,
    context: int = 512,
    vocabulary: int = 96,
    experts: int = 0,
    experts_used: int = 2,
    expert_feed_forward: int | None = None,
    sliding_window: int = 0,
    tied: bool = False,
    file_type: str = "F16",
    name: str | None = None,
    seed: int | None = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    shape: Mapping[str, Any] | None = None,
    extra: Mapping[str, Value] | None = None,
) -> tuple[dict[str, Value], _Tensors]:
    inner = feed_forward or embedding // 2
    made = Shape(
        layers, embedding, heads, heads_kv, head or embedding // heads, inner, experts,
        experts_used, expert_feed_forward or inner, sliding_window=sliding_window,
        **(shape or {}),
    )  # fmt: skip
    made = gguf_architectures.fitted(architecture, made)
    pieces = _sentencepiece(vocabulary)
    own = {
        "context_length": context,
        "vocab_size": pieces.size,
        **gguf_architectures.keys(architecture, made),
    }
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _file_type(file_type),
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **pieces.keys,
        "tokenizer.chat_template": chat_template,
    }
    tensors = _decoder(architecture, made, pieces, seed, tied=tied)
    return keys | dict(extra or {}), tensors


def write_model(path: Path, *, tensor_type: str = "F16", **options: Any) -> Path:
    """A text model that the real server loads, and whose completions are English words.

    Options, all by name: `architecture` ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3"),
    `layers`, `embedding` (width), `heads`, `heads_kv`, `feed_forward` (None: half the
    embedding), `context` (trained), `vocabulary` (words, beside 259 bytes and control tokens),
    `experts`, `experts_used`, `sliding_window`, `file_type` (what the header says: "Q4_K_M" …),
    `name`, `seed` (other weights: another sha256), `chat_template` (None: none), `extra` (further
    keys; None takes one out). `tensor_type` is how matrices are really stored: leave it at F16
    where the file is served, since quantized kernels may need a newer processor than ours.

    The default has 190 KB; a larger `layers`, `embedding` or `vocabulary` makes a slower, larger
    one. It never ends a completion by itself: give `n_predict`.
    """
    keys, tensors = _model(**options)
    return write_gguf(
        path, options.get("architecture", "llama"), keys, tensors, tensor_type=tensor_type
    )


def write_split(
    folder: Path, stem: str, shards: int = 2, *, tensor_type: str = "F16", **options: Any
) -> list[Path]:
    """`write_model` in shards named as llama.cpp wants them; their paths in order.

    Each states its place (split.no, split.count, split.tensors.count), only the first the rest;
    the server is given the first.
    """
    keys, tensors = _model(**options)
    architecture = options.get("architecture", "llama")
    write_gguf(
        folder / f"{stem}.gguf", architecture, keys, tensors,
        tensor_type=tensor_type, shards=shards,
    )  # fmt: skip
    paths = [folder / f"{stem}-{no:05d}-of-{shards:05d}.gguf" for no in range(1, shards + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{len(tensors)} tensors make fewer than {shards} shards: {missing}")
    return paths


def _bert(
    layers: int,
    embedding: int,
    heads: int,
    context: int,
    pooling: gguf.PoolingType,
    seed: int | None,
    feed_forward: int | None = None,
    vocabulary: int = len(_WORDS),
) -> tuple[dict[str, Value], _Tensors]:
    random, inner = Random(seed), feed_forward or 2 * embedding
    pieces = _wordpiece(vocabulary)
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.file_type": _file_type("F16"),
        "bert.context_length": context,
        "bert.embedding_length": embedding,
        "bert.block_count": layers,
        "bert.feed_forward_length": inner,
        "bert.attention.head_count": heads,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": int(pooling),
        **pieces.keys,
    }
    tensors: _Tensors = {
        "token_embd.weight": random.matrix(pieces.size, embedding),
        "position_embd.weight": random.matrix(context, embedding),
        "token_types.weight": random.matrix(2, embedding),
        "token_embd_norm.weight": ones(embedding),
        "token_embd_norm.bias": zeros(embedding),
    }
    for layer in range(layers):
        block: _Tensors = {}
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            block |= {f"{part}.weight": random.matrix(embedding, embedding)}
            block |= {f"{part}.bias": zeros(embedding)}
        block |= {"ffn_up.weight": random.matrix(inner, embedding), "ffn_up.bias": zeros(inner)}
        block |= {"ffn_down.weight": random.matrix(embedding, inner)}
        block |= {"ffn_down.bias": zeros(embedding)}
        for norm in ("attn_output_norm", "layer_output_norm"):
            block |= {f"{norm}.weight": ones(embedding), f"{norm}.bias": zeros(embedding)}
        tensors |= {f"blk.{layer}.{name}": array for name, array in block.items()}
    return keys, tensors


def write_embedding(
    path: Path,
    *,
    layers: int = 1,
    embedding: int = 64,
    heads: int = 4,
    context: int = 128,
    pooling: gguf.PoolingType = gguf.PoolingType.MEAN,
    feed_forward: int | None = None,
    vocabulary: int = len(_WORDS),
    name: str | None = None,
    seed: int | None = 0,
    extra: Mapping[str, Value] | None = None,
) -> Path:
    """A BERT with a pooling type; the real server with `--embeddings` answers /v1/embeddings."""
    keys, tensors = _bert(
        layers, embedding, heads, context, pooling, seed, feed_forward, vocabulary
    )
    return write_gguf(path, "bert", keys | {"general.name": name} | dict(extra or {}), tensors)


def write_reranker(
    path: Path,
    *,
    layers: int = 1,
    embedding: int = 64,
    heads: int = 4,
    context: int = 128,
    name: str | None = None,
    seed: int = 0,
    extra: Mapping[str, Value] | None = None,
) -> Path:
    """A BERT with pooling `rank` and a classifier; `--reranking` answers /v1/rerank."""
    keys, tensors = _bert(layers, embedding, heads, context, gguf.PoolingType.RANK, seed)
    random = Random(seed + 1)
    keys |= {"general.name": name, "bert.classifier.output_labels": ["relevance"]}
    tensors |= {"cls.weight": random.matrix(embedding, embedding), "cls.bias": zeros(embedding)}
    tensors |= {"cls.output.weight": random.matrix(1, embedding), "cls.output.bias": zeros(1)}
    return write_gguf(path, "bert", keys | dict(extra or {}), tensors)


# --- files that are no model ---------------------------------------------------------------------


def write_projector(
    path: Path,
    projection_dim: int = 64,
    *,
    vision: bool = True,
    audio: bool = False,
    name: str | None = None,
    seed: int = 0,
    extra: Mapping[str, Value] | None = None,
) -> Path:
    """A multimodal projector's header facts, for a text model `projection_dim` wide.

    The server does not load it: it has a single tensor.
    """
    keys: dict[str, Value] = {
        "general.type": "mmproj",
        "general.name": name,
        "general.file_type": _file_type("F16"),
        "clip.has_vision_encoder": vision,
        "clip.has_audio_encoder": audio,
        "clip.projector_type": PROJECTOR_TYPES["vision" if vision else "audio"],
    }
    if vision:
        keys |= {
            "clip.vision.image_size": 224, "clip.vision.patch_size": 14,
            "clip.vision.embedding_length": 32, "clip.vision.feed_forward_length": 64,
            "clip.vision.block_count": 1, "clip.vision.attention.head_count": 4,
            "clip.vision.attention.layer_norm_epsilon": 1e-6,
            "clip.vision.projection_dim": projection_dim,
        }  # fmt: skip
    if audio:
        keys |= {
            "clip.audio.num_mel_bins": 80, "clip.audio.embedding_length": 32,
            "clip.audio.block_count": 1, "clip.audio.projection_dim": projection_dim,
        }  # fmt: skip
    tensors = {"mm.input_projection.weight": Random(seed).matrix(32, projection_dim)}
    return write_gguf(path, "clip", keys | dict(extra or {}), tensors)


def write_vision_projector(
    path: Path,
    projection_dim: int = 64,
    *,
    layers: int = 1,
    embedding: int = 64,
    heads: int = 4,
    feed_forward: int | None = None,
    image_size: int = 112,
    seed: int | None = 0,
) -> Path:
    """An image encoder of Gemma 3's kind, which the server loads beside a text model so wide."""
    random, patch, inner = Random(seed), 14, feed_forward or 2 * embedding
    places = (image_size // patch) ** 2
    keys: dict[str, Value] = {
        "general.type": "mmproj",
        "general.file_type": _file_type("F16"),
        "clip.has_vision_encoder": True,
        "clip.projector_type": "gemma3",
        "clip.use_gelu": True,
        "clip.vision.image_size": image_size,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": embedding,
        "clip.vision.feed_forward_length": inner,
        "clip.vision.block_count": layers,
        "clip.vision.attention.head_count": heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projection_dim": projection_dim,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    tensors: _Tensors = {
        "v.patch_embd.weight": random.matrix(embedding, 3, patch, patch),
        "v.patch_embd.bias": zeros(embedding),
        "v.position_embd.weight": random.matrix(places, embedding),
        "v.post_ln.weight": ones(embedding),
        "v.post_ln.bias": zeros(embedding),
        "mm.input_projection.weight": random.matrix(embedding, projection_dim),
        "mm.soft_emb_norm.weight": ones(embedding),
    }
    shapes = {
        "attn_q": (embedding, embedding), "attn_k": (embedding, embedding),
        "attn_v": (embedding, embedding), "attn_out": (embedding, embedding),
        "ffn_up": (inner, embedding), "ffn_down": (embedding, inner),
    }  # fmt: skip
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"v.blk.{layer}.{name}.weight"] = random.matrix(*shape)
            tensors[f"v.blk.{layer}.{name}.bias"] = zeros(shape[0])
        for name in ("ln1", "ln2"):
            tensors[f"v.blk.{layer}.{name}.weight"] = ones(embedding)
            tensors[f"v.blk.{layer}.{name}.bias"] = zeros(embedding)
    return write_gguf(path, "clip", keys, tensors)


def write_adapter(path: Path, *, rank: int = 4, embedding: int = 64, seed: int = 0) -> Path:
    """A LoRA adapter for the query weights of `write_model`'s first block."""
    keys: dict[str, Value] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    random = Random(seed)
    tensors = {
        "blk.0.attn_q.weight.lora_a": random.matrix(rank, embedding),
        "blk.0.attn_q.weight.lora_b": random.matrix(embedding, rank),
    }
    return write_gguf(path, "llama", keys, tensors)


def write_vocabulary_only(path: Path, *, vocabulary: int = 96) -> Path:
    """A model's keys and tokenizer without any tensor."""
    keys, _ = _model(vocabulary=vocabulary)
    return write_gguf(path, "llama", keys)


def write_imatrix(path: Path, *, embedding: int = 64) -> Path:
    """An importance matrix as llama-imatrix writes it: no architecture, sums per tensor."""
    keys: dict[str, Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": 10,
        "imatrix.chunk_size": 512,
    }
    tensors = {
        "blk.0.attn_q.weight.in_sum2": np.ones((1, embedding), dtype=np.float32),
        "blk.0.attn_q.weight.counts": np.ones((1, 1), dtype=np.float32),
    }
    return write_gguf(path, "", keys, tensors, tensor_type="F32")


DRAFT_ARCHITECTURES = ("eagle3", "dflash", "gemma4-assistant")


def write_draft(
    path: Path, *, architecture: str = "eagle3", embedding: int = 64, seed: int = 0
) -> Path:
    """The header of a model that only drafts for another: one of `DRAFT_ARCHITECTURES`.

    llama.cpp knows these architectures, the gguf package (0.19) does not yet. A plain small model
    used as a draft has nothing in its header that says so. The server does not load this file.
    """
    keys: dict[str, Value] = {
        "general.type": "model",
        "general.file_type": _file_type("F16"),
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": embedding,
        f"{architecture}.block_count": 1,
        f"{architecture}.feed_forward_length": embedding,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
    }
    tensors = {"fc.weight": Random(seed).matrix(embedding, 3 * embedding)}
    return write_gguf(path, architecture, keys, tensors)


# --- a Hugging Face hub cache --------------------------------------------------------------------


class HubCache:
    """Lays out a hub cache as huggingface_hub does: blobs, snapshots of links to them, refs.

    >>> cache = HubCache(tmp_path / "hub")
    >>> cache.add("owner/repo", {"model-Q4_K_M.gguf": write_model(tmp_path / "m.gguf")})
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def repo(self, repo: str) -> Path:
        """The folder of `owner/name`."""
        return self.root / ("models--" + repo.replace("/", "--"))

    def snapshot(self, repo: str, revision: str = "main") -> Path:
        """The folder of a revision, given as a commit or any name for one."""
        return self.repo(repo) / "snapshots" / commit(repo, revision)

    def add(
        self,
        repo: str,
        files: Mapping[str, Path | bytes],
        *,
        revision: str = "main",
        ref: str | None = "main",
        sha: str | None = None,
    ) -> dict[str, Path]:
        """Put `files` (name in the repo → content, or a file with it) into one snapshot.

        `revision` is a 40-hex commit, or any name, from which one is made. `ref` becomes a name
        for it (None: none). A blob is named by the sha256 of its content, or by `sha`, for a cache
        that lies. A file given by path is hard-linked where that works. The snapshot's paths by
        name.
        """
        links = {
            name: self._link(repo, revision, name, self._blob(repo, content, sha))
            for name, content in files.items()
        }
        if ref is not None:
            self.point(repo, ref, revision)
        return links

    def point(self, repo: str, ref: str, revision: str) -> None:
        """Make `refs/<ref>` name `revision`."""
        path = self.repo(repo) / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit(repo, revision))

    def add_incomplete(self, repo: str, filename: str, content: bytes = b"GGUF") -> Path:
        """A download that was cut off: the repo's folders and a partial blob, no snapshot entry."""
        blob = self._blobs(repo) / (hashlib.sha256(filename.encode()).hexdigest() + ".incomplete")
        blob.write_bytes(content)
        self.snapshot(repo).mkdir(parents=True, exist_ok=True)
        self.point(repo, "main", "main")
        return blob

    def add_dangling(
        self, repo: str, filename: str, *, revision: str = "main", ref: str | None = "main"
    ) -> Path:
        """A snapshot entry whose blob is gone."""
        blob = self._blobs(repo) / hashlib.sha256(filename.encode()).hexdigest()
        link = self._link(repo, revision, filename, blob)
        if ref is not None:
            self.point(repo, ref, revision)
        return link

    def _blobs(self, repo: str) -> Path:
        folder = self.repo(repo) / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _blob(self, repo: str, content: Path | bytes, sha: str | None) -> Path:
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = self._blobs(repo) / (sha or hashlib.sha256(data).hexdigest())
        if blob.exists():
            return blob
        if isinstance(content, bytes):
            blob.write_bytes(content)
            return blob
        try:
            os.link(content, blob)
        except OSError:
            shutil.copyfile(content, blob)
        return blob

    def _link(self, repo: str, revision: str, name: str, blob: Path) -> Path:
        link = self.snapshot(repo, revision) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return link


def hub_cache(root: Path) -> HubCache:
    """An empty hub cache in `root`, which is made."""
    return HubCache(root)


def commit(repo: str, revision: str) -> str:
    """`revision` where it is a 40-hex commit, else one made from it and the repo."""
    if len(revision) == 40 and set(revision) <= set("0123456789abcdef"):
        return revision
    return hashlib.sha1(f"{repo}@{revision}".encode(), usedforsecurity=False).hexdigest()
