"""A small real model for a machine that has none: generated, not downloaded, always the same bytes.

It is a hand-set Markov chain in the shape of a llama. Each word stands in one slot of a sentence.
Its embedding is the unit vector of the slot that follows; its output row is the unit vector of its
own slot. So the next word is any word of the following slot, all equally likely, and after the last
slot the text ends. The one block adds nothing. What stands in no slot leads to the first one.

The tokenizer is a unigram one without byte tokens: whatever is drawn is valid UTF-8.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor_synapse.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

REPO = "supervisor-synapse/demo"
FILE = "demo-f16.gguf"

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PAD, _BEGIN, _END = 0, 1, 2
_UNKNOWN = "<unk>"

# A line for each slot; "_" is the blank before a word. A word stands in one slot only: it is all
# that the next one depends on.
_SENTENCES = """
Hello! Welcome! Greetings!
_I
_am
_a
_tiny _small _little
_demo
_model,
_and
_this
_server
_works.
_Today _Tonight _Tomorrow
_one _another
_quiet _gentle _curious _patient _clever _friendly
_river _sailor _teacher _baker _gardener _painter _neighbour _traveller
_finds _carries _paints _remembers _follows _repairs
_some _several _many
_bright _blue _golden _silver _wooden _forgotten
_letters _lanterns _bridges _boats _gardens _stories
_slowly. _gladly. _carefully. _together. _again.
_Put
_your
_own
_models
_into
_the
_cache
_for
_better
_answers.
"""
_SLOTS = [line.replace("_", "▁").split() for line in _SENTENCES.strip().splitlines()]

# Words that a question may be made of; others are read letter by letter.
_QUESTIONS = """
Hello hello Hi hi hey please thanks thank you me my we us our they them their he him his she her it
its who whom whose what which when where why how is are was were be been being do does did done have
has had can could will would shall should may might must not no yes of in on at by to from with
without about over under between after before during through up down out off or but if then than so
as because while until also only very more most less least much few all any each every both other
such same new old good bad great large big long short high low first last next early late young
right wrong easy hard fast slow hot cold warm dark light red green white black time day night week
month year morning evening hour minute people person man woman child friend name word world life
hand eye head heart mind house home room door window table paper book page story letter line list
number question answer example idea problem system computer program code file model data language
sentence poem song music water fire air earth sun moon star sea tree flower bird dog cat horse fish
food bread city country street road school work money game say says said tell ask write read speak
talk explain describe show give get take make made use find know think see look hear feel want need
like love help try start stop open close run walk go come came live play learn teach count sort add
The A An What Who Why How When Where Is Are Can Could Do Does Tell Write Say Give Explain Describe
List Translate Please
"""
_LETTERS = [c for c in string.printable if c.isprintable() and c != " "]

_EMBEDDING, _HEADS, _FEED_FORWARD, _CONTEXT = 64, 4, 64, 2048
_CONSTANT = _EMBEDDING - 1  # a dimension that is the same for every token; slots come before it
_PULL = 8.0  # output weight of a token's own slot; any other is e^-45 as likely
_AVERSION = -8.0  # output weight of the constant for what is never said


def generate(hub_cache: Path) -> Path:
    """Write the demo model into the Hugging Face hub cache at `hub_cache`; its path in there.

    Folders are made as needed. Blob, link and ref come in this order, each whole or not at all,
    and what is there already, and right, is not touched.

    Raises:
        ConfigError: the cache cannot be written.
    """
    repo = hub_cache / ("models--" + REPO.replace("/", "--"))
    try:
        repo.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".generating-", dir=repo) as folder:
            return _install(repo, Path(folder))
    except OSError as error:
        raise ConfigError(
            f"{hub_cache}: cannot write the demo model: {error.strerror or error}; make the folder "
            "writable, or name another in cache_dirs"
        ) from None


def _install(repo: Path, temporary: Path) -> Path:
    """The model into `repo` by way of the folder `temporary`, which is on the same file system."""
    made = temporary / "blob"
    write(made)
    digest = _sha256(made)
    _place(made, repo / "blobs" / digest, is_right=_sha256(repo / "blobs" / digest) == digest)

    commit = hashlib.sha256(f"{FILE}\0{digest}".encode()).hexdigest()[:40]
    link = repo / "snapshots" / commit / FILE
    target = f"../../blobs/{digest}"
    made = temporary / "link"
    made.symlink_to(target)
    _place(made, link, is_right=link.is_symlink() and os.readlink(link) == target)

    ref = repo / "refs" / "main"
    made = temporary / "ref"
    made.write_text(commit)
    _place(made, ref, is_right=ref.is_file() and ref.read_bytes() == commit.encode())
    return link


def _place(made: Path, destination: Path, *, is_right: bool) -> None:
    if not is_right:
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, destination)


def _sha256(path: Path) -> str:
    """Of a file's content; "" where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    kind: int  # gguf.TokenType
    slot: int | None = None  # where it is said; None: never
    following: int = 0  # the slot that it leads to


def _vocabulary() -> list[_Token]:
    """Special tokens, then the words that are said, then those that are only heard."""
    from gguf import TokenType

    last = len(_SLOTS)  # the end of the text has a slot of its own
    tokens = [
        _Token(text, TokenType.CONTROL, slot=last if number == _END else None)
        for number, text in enumerate(_SPECIAL)
    ]
    tokens.append(_Token(_UNKNOWN, TokenType.UNKNOWN))
    for slot, words in enumerate(_SLOTS):
        tokens += [_Token(word, TokenType.NORMAL, slot, slot + 1) for word in words]
    said = {token.text for token in tokens}
    heard = dict.fromkeys(["▁" + word for word in _QUESTIONS.split()] + ["▁", *_LETTERS])
    tokens += [_Token(text, TokenType.NORMAL) for text in heard if text not in said]
    return tokens


def write(path: Path) -> None:
    """The model alone, as a file.

    Raises:
        OSError: it cannot be written.
    """
    from gguf import GGUFWriter

    tokens = _vocabulary()
    with contextlib.closing(GGUFWriter(path, "llama")) as writer:
        _add_keys(writer, tokens)
        for name, array in _tensors(tokens).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_keys(writer: GGUFWriter, tokens: list[_Token]) -> None:
    from gguf import LlamaFileType

    writer.add_type("model")
    writer.add_name("Synapse demo")
    writer.add_description("Says that the server works; generated, knows nothing.")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_EMBEDDING)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("t5")  # a unigram tokenizer, to llama.cpp
    writer.add_token_list([token.text for token in tokens])
    # The best sum wins: as few pieces as can be, and words before letters.
    writer.add_token_scores([-1.0 if len(token.text) > 1 else -2.0 for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    writer.add_pad_token_id(_PAD)
    writer.add_bos_token_id(_BEGIN)
    writer.add_eos_token_id(_END)
    writer.add_unk_token_id(next(i for i, token in enumerate(tokens) if token.text == _UNKNOWN))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _tensors(tokens: list[_Token]) -> dict[str, NDArray[np.generic]]:
    """By name. Matrices are F16, norms F32, as llama.cpp wants them."""
    import numpy as np

    embedding = np.zeros((len(tokens), _EMBEDDING), dtype=np.float16)
    output = np.zeros_like(embedding)
    for row, token in enumerate(tokens):
        embedding[row, [token.following, _CONSTANT]] = 1.0
        if token.slot is None:
            output[row, _CONSTANT] = _AVERSION
        else:
            output[row, token.slot] = _PULL
    norm = np.ones(_EMBEDDING, dtype=np.float32)
    square = np.zeros((_EMBEDDING, _EMBEDDING), dtype=np.float16)
    inner = np.zeros((_FEED_FORWARD, _EMBEDDING), dtype=np.float16)
    return {
        "token_embd.weight": embedding,
        "blk.0.attn_norm.weight": norm,
        "blk.0.attn_q.weight": square,
        "blk.0.attn_k.weight": square,
        "blk.0.attn_v.weight": square,
        "blk.0.attn_output.weight": square,
        "blk.0.ffn_norm.weight": norm,
        "blk.0.ffn_gate.weight": inner,
        "blk.0.ffn_up.weight": inner,
        "blk.0.ffn_down.weight": inner.T.copy(),
        "output_norm.weight": norm,
        "output.weight": output,
    }
