"""What memory depends on in a model's layers: header → profile, whatever the arguments are.

The header says most of it; what it does not say is what llama.cpp does for each architecture, and
stands here in tables. Sizes are elements (of a token, unless another is named) or bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

from supervisor_synapse.core.model import Header


class _Windows(NamedTuple):
    """Which layers have a window, where the header gives its size but no list of them."""

    period: int  # one layer of so many sees everything; 0: none does
    full_first: bool = False  # it is the first one, not the last


# For other architectures a window without a list means nothing.
_WINDOWS = {
    "afmoe": _Windows(4), "cohere2": _Windows(4), "exaone-moe": _Windows(4),
    "exaone4": _Windows(4), "gemma-embedding": _Windows(6), "gemma2": _Windows(2),
    "gemma3": _Windows(6), "gemma3n": _Windows(5), "gpt-oss": _Windows(2),
    "laguna": _Windows(4, full_first=True), "llama4": _Windows(4),
    "modern-bert": _Windows(3, full_first=True), "olmo2": _Windows(4), "plamo3": _Windows(8),
    "smallthinker": _Windows(4, full_first=True),
}  # fmt: skip
_FIXED_WINDOW = {"llama4": 8192, "smallthinker": 4096}  # whatever the header says, if it says any

# Architectures that llama.cpp gives no cache: they see all their input at once.
_WITHOUT_CACHE = frozenset(
    {
        "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada",
        "llada-moe", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1",
        "wavtokenizer-dec",
    }
)  # fmt: skip
_WITHOUT_OUTPUT = frozenset(name for name in _WITHOUT_CACHE if "bert" in name)
_WITHOUT_LOGITS = _WITHOUT_OUTPUT | {"gemma-embedding"}

# Gated delta nets: every fourth layer attends unless the header says otherwise.
_DELTA_NETS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_DELTA_NET_INTERVAL = 4
_RECURRENT_BESIDE_ATTENTION = frozenset({"falcon-h1"})  # both in every layer
# A layer without attention recurs only where it does not feed forward.
_RECURRENT_OR_FEEDING = frozenset({"nemotron_h", "nemotron_h_moe"})
_CACHES_OF_GEMMA3N = 20  # layers; the others use theirs
# Behind the attention of the last layer only tokens that have an output go on, but not in these.
_FEEDS_EVERY_TOKEN = frozenset({"gpt-oss", *_DELTA_NETS})


class Kind(NamedTuple):
    """What memory depends on in one layer; most models have two or three kinds."""

    attends: bool
    windowed: bool
    keys: int  # in one cell of its cache; 0 where it keeps none of its own
    values: int
    queries: int
    latent: int  # in the widest step of MLA; 0 elsewhere
    recurs: bool
    has_experts: bool
    fed: int  # gate, projection and product of the feed forward, or of the experts in use
    given: int  # what the experts give, where that does not fit where gate and projection were

    @property
    def attended(self) -> int:
        """In the widest step of its attention, beside what each head heeds."""
        return max(self.latent, self.queries)


Kinds = tuple[tuple[Kind, int], ...]  # with how many layers there are of each


@dataclass(frozen=True, slots=True, eq=False)  # the same object for the same header
class Profile:
    """A header's layers. In sums, element i is the sum over the layers before i."""

    layers: int
    computing: int  # of these, the first ones: those that predict further tokens stay unused
    counts: tuple[tuple[Kind, tuple[int, ...]], ...]  # sums, for each kind
    everywhere: Kinds  # all of them
    each: tuple[Kind, ...]  # by layer
    masks: tuple[Kind, ...]  # of all that compute
    block_bytes: tuple[int, ...]  # sums
    expert_bytes: tuple[int, ...]  # sums
    largest_bytes: tuple[int, ...]  # by layer: of one weight, about
    input_bytes: int  # weights that never leave the host
    copied_bytes: int  # of these, what is copied to the device of the output layer
    output_bytes: int  # weights beside blocks and inputs
    width: int  # of the hidden state
    heads: int
    has_cache: bool  # an encoder has none
    window: int  # tokens
    beside: int  # each step: the layer's input, its normed copy and the room that queries leave
    looked_up: int  # rows that become the first layer's input
    words: int  # for which the last step gives a figure
    vocabulary: int  # words for which the host keeps one
    handed: int  # by experts, to be summed up
    gives_embeddings: bool  # every token has an output
    feeds_every_token: bool  # in the last layer, too
    state: tuple[int, int]  # of one slot in a recurrent layer: of its convolution, of its scan
    scan: tuple[int, int]  # the widest step of a recurrent layer: of a token, of a slot

    def between(self, sums: tuple[int, ...], first: int, last: int) -> int:
        """The sum over the layers from `first` to before `last`, as far as there are any."""
        end = min(last, self.layers)
        return sums[end] - sums[first] if first < end else 0

    def kinds_between(self, first: int, last: int) -> Kinds:
        """Which kinds of layers there are, as far as there are any."""
        end = min(last, self.layers)
        if first == 0 and end == self.layers:
            return self.everywhere
        if first >= end:
            return ()
        counts = [(kind, sums[end] - sums[first]) for kind, sums in self.counts]
        return tuple([one for one in counts if one[1]])


@lru_cache(maxsize=1024)
def profile(header: Header) -> Profile:
    """Kept by header: a plan asks for many loads of each."""
    kinds, layers = _kinds(header)
    counts = tuple((kind, _sums([layer is kind for layer in layers])) for kind in kinds)
    computing = max(header.layers - header.predicting_layers, 0)
    blocks = header.block_bytes[: header.layers]
    inputs = max(header.input_bytes, header.embedding_bytes)
    name, words = header.architecture, header.vocabulary_size
    is_tied = not header.has_output and name not in _WITHOUT_OUTPUT
    return Profile(
        layers=header.layers,
        computing=computing,
        counts=counts,
        everywhere=tuple([(kind, sums[-1]) for kind, sums in counts]),
        each=tuple(layers),
        masks=masks(kind for kind, sums in counts if sums[computing]),
        block_bytes=_sums(_at_most(blocks[:computing], header.layers)),
        expert_bytes=_sums(_at_most(header.expert_bytes[:computing], header.layers)),
        largest_bytes=_largest(header, computing),
        input_bytes=inputs,
        copied_bytes=header.embedding_bytes if is_tied else 0,
        output_bytes=max(header.tensor_bytes - inputs - sum(blocks), 0),
        width=header.embedding_length,
        heads=max(header.heads, default=0),
        has_cache=name not in _WITHOUT_CACHE,
        window=_window(header),
        beside=2 * header.embedding_length + max((kind.queries for kind in kinds), default=0),
        looked_up=3 if name in _WITHOUT_OUTPUT else 2,
        words=0 if name in _WITHOUT_LOGITS else words,
        vocabulary=words,
        handed=header.experts_used * header.embedding_length,
        gives_embeddings=bool(header.pooling),
        feeds_every_token=name in _FEEDS_EVERY_TOKEN or bool(header.pooling),
        state=_state(header),
        scan=_scan(header),
    )


def masks(kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    """One of those that attend within a window and one of the others: each needs a mask."""
    return tuple({kind.windowed: kind for kind in kinds if kind.attends}.values())


def _sums(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))


def _at_most(values: tuple[int, ...], count: int) -> list[int]:
    """So many values, 0 where there are fewer."""
    return [*values[:count], *[0] * (count - len(values))]


def _each(values: tuple[int, ...], count: int) -> list[int]:
    """One value for each layer; the last one stands for those that have none of their own."""
    return [*values[:count], *values[-1:] * (count - len(values))] if values else [0] * count


def _largest(header: Header, computing: int) -> tuple[int, ...]:
    """A third of the experts, where there are any, else of the block: gate, up or down."""
    experts = _at_most(header.expert_bytes[:computing], header.layers)
    blocks = _at_most(header.block_bytes[:computing], header.layers)
    return tuple([(expert or block) // 3 for expert, block in zip(experts, blocks, strict=True)])


class _Facts(NamedTuple):
    """All that tells one layer from another."""

    heads: int
    heads_kv: int
    feed_forward: int
    has_experts: bool
    recurs: bool
    windowed: bool
    has_cache: bool  # if it attends at all


def _kinds(header: Header) -> tuple[tuple[Kind, ...], list[Kind]]:
    """All kinds, in the order in which they come; and the kind of each layer."""
    count = header.layers
    has_experts = [header.experts > 0] * count
    if header.expert_bytes:
        has_experts = [size > 0 for size in _at_most(header.expert_bytes, count)]
    layers = zip(
        _each(header.heads, count),
        _each(header.heads_kv or header.heads, count),
        _each(header.feed_forward_length, count),
        has_experts,
        _recurrent_layers(header),
        _windowed_layers(header),
        _cached_layers(header),
        strict=True,
    )
    made: dict[tuple[object, ...], Kind] = {}
    same: dict[Kind, Kind] = {}  # one object for each kind, however it came about
    each: list[Kind] = []
    for facts, alike in groupby(layers):
        if facts not in made:
            kind = _kind(header, _Facts(*facts))
            made[facts] = same.setdefault(kind, kind)
        each += [made[facts]] * len(list(alike))
    return tuple(same), each


def _kind(header: Header, facts: _Facts) -> Kind:
    beside = header.architecture in _RECURRENT_BESIDE_ATTENTION
    attends = facts.heads_kv > 0 and (beside or not facts.recurs)
    windowed = attends and facts.windowed
    keys, values, queries = 0, 0, 0
    if attends:
        queries = facts.heads * (header.key_length_mla or _key_length(header))
        if facts.has_cache:
            keys, values = _cell(header, facts.heads_kv, windowed=windowed)
    fed, given = _fed(header, facts, queries)
    return Kind(
        attends=attends, windowed=windowed, keys=keys, values=values, queries=queries,
        latent=_latent(header, queries) if attends else 0, recurs=facts.recurs,
        has_experts=facts.has_experts, fed=fed, given=given,
    )  # fmt: skip


# --- attention -----------------------------------------------------------------------------------


def _default_head(header: Header) -> int:
    heads = header.heads[0] if header.heads else 0
    return header.embedding_length // heads if heads else 0


def _key_length(header: Header) -> int:
    return header.key_length or _default_head(header)


def _cached_layers(header: Header) -> list[bool]:
    """Encoders keep none; some layers use the cache of one before them."""
    own = header.layers - header.shared_kv_layers
    if header.architecture in _WITHOUT_CACHE:
        own = 0
    elif header.architecture == "gemma3n":
        own = _CACHES_OF_GEMMA3N
    own = min(max(own, 0), header.layers)
    return [True] * own + [False] * (header.layers - own)


def _cell(header: Header, heads: int, *, windowed: bool) -> tuple[int, int]:
    """Keys and values of one cell."""
    key, value = _key_length(header), header.value_length or _default_head(header)
    if windowed:
        key, value = header.window_key_length or key, header.window_value_length or value
    if _is_mla(header):  # one compressed row, among the keys
        value = 0
    return heads * key, heads * value


def _is_mla(header: Header) -> bool:
    """llama_hparams::is_mla; older files of such models are served as any other."""
    return bool(header.key_length_mla and header.value_length_mla)


def _latent(header: Header, queries: int) -> int:
    """Queries as they are, compressed, and what comes of both."""
    if not _is_mla(header):
        return 0
    rank = header.kv_lora_rank
    turned = max(header.key_length - rank, 0)
    return max(header.heads, default=0) * (2 * rank + turned) + queries + header.embedding_length


def _window(header: Header) -> int:
    if not header.sliding_window:
        return 0
    return _FIXED_WINDOW.get(header.architecture, header.sliding_window)


def _windowed_layers(header: Header) -> list[bool]:
    if not header.sliding_window:
        return [False] * header.layers
    pattern = header.sliding_window_pattern
    if len(pattern) > 1:
        return [bool(value) for value in _each(pattern, header.layers)]
    known = _WINDOWS.get(header.architecture, _Windows(1))
    period = pattern[0] if pattern else known.period
    if period == 0:
        return [True] * header.layers
    full = 0 if known.full_first else period - 1
    return [layer % period != full for layer in range(header.layers)]


# --- feed forward --------------------------------------------------------------------------------


def _fed(header: Header, facts: _Facts, queries: int) -> tuple[int, int]:
    """Gate, projection and product; and what experts give."""
    if not facts.has_experts and header.ungated:  # it takes the room that queries leave
        return max(facts.feed_forward - queries, 0), 0
    if not facts.has_experts:
        return 3 * facts.feed_forward, 0
    used, width = header.experts_used, header.embedding_length
    inner = header.expert_feed_forward_length or facts.feed_forward
    kept = width if header.shared_experts and not queries else 0
    return 3 * used * inner + kept, used * width if width > 2 * inner else 0


# --- recurrence ----------------------------------------------------------------------------------


def _recurrent_layers(header: Header) -> list[bool]:
    count, name = header.layers, header.architecture
    if header.recurrent_layers:
        return [bool(value) for value in _each(header.recurrent_layers, count)]
    if not any(_state(header)):
        return [False] * count
    if header.attention_interval or name in _DELTA_NETS:
        interval = header.attention_interval or _DELTA_NET_INTERVAL
        return [(layer + 1) % interval != 0 for layer in range(count)]
    if name in _RECURRENT_BESIDE_ATTENTION:
        return [True] * count
    without = [heads == 0 for heads in _each(header.heads_kv or header.heads, count)]
    if name in _RECURRENT_OR_FEEDING:
        feeds = _each(header.feed_forward_length, count)
        return [found and not width for found, width in zip(without, feeds, strict=True)]
    return without


def _state(header: Header) -> tuple[int, int]:
    """llama_hparams::n_embd_r and n_embd_s."""
    width = header.embedding_length
    kernel, inner, state, _, groups = header.recurrent_state
    if header.wkv_head_size:
        return header.token_shifts * width, width * header.wkv_head_size
    if header.short_convolution:
        return width * (header.short_convolution - 1), 0
    if header.kda_head_size:
        heads = max(header.heads, default=0)
        convolved = 3 * max(kernel - 1, 0) * heads * header.kda_head_size
        return convolved, header.kda_head_size**2 * heads
    return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner


def _scan(header: Header) -> tuple[int, int]:
    _, inner, state, rank, groups = header.recurrent_state
    convolution, scanned = _state(header)
    if header.kda_head_size:
        return 9 * max(header.heads, default=0) * header.kda_head_size, 2 * scanned
    if header.wkv_head_size:
        return 8 * header.embedding_length, convolution + scanned
    if header.short_convolution:
        return 5 * header.embedding_length, 2 * convolution
    convolved = inner + 2 * groups * state
    if header.architecture in _DELTA_NETS:
        return 2 * convolved + 3 * inner, 2 * scanned
    if groups:  # Mamba 2
        return 2 * inner + 3 * convolved + rank, scanned + 2 * convolution
    return 5 * inner, scanned + 2 * convolution
