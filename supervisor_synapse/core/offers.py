"""The names of a repo's files -> what can be had from it, before any of it is here. Pure.

Only names and sizes are known: a quantization is what a file's name says of it, and a projector is
a file that calls itself one. The headers decide later, when the files are found on disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from supervisor_synapse.core.catalog import PROJECTOR_PRECISIONS, SHARD

_ENDING = ".gguf"
_QUANTIZATION = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q[1-9](?:_(?:k|xxs|xs|s|m|xl|l|nl|[0-9]))*|tq[12]_0|bf16|fp?16|fp?32"
    r"|mxfp4(?:_moe)?|nvfp4)(?![a-z0-9])",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^a-z0-9]+")
_PROJECTOR = "mmproj"
# Files that no server is started with.
_HELPERS = frozenset({"imatrix", "lora", "adapter", "vocab"})
# Files that serve speculation only: had when they are asked for by name.
_ASIDE = frozenset({"draft", "mtp"})

# Which is had where none was asked for, the first of these that there is: the usual balance of size
# and quality, then what is near it, the better before the smaller.
_PREFERRED = (
    "Q4_K_M", "UD-Q4_K_XL", "Q4_K_L", "Q4_K_S", "IQ4_XS", "IQ4_NL", "MXFP4_MOE", "MXFP4", "Q4_0",
    "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q3_K_L", "Q3_K_M", "Q6_K", "Q8_0",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repo. `sha256`: of its content, where the hub says."""

    path: str  # posix, within the repo
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """One loadable unit: a file, or all the shards of one, in order."""

    quantization: str  # "" where the name says none
    stem: str  # without folder, shard number and ending
    files: tuple[HubFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def label(self) -> str:
        """What one asks for it by."""
        return self.quantization or self.stem

    @property
    def is_aside(self) -> bool:
        return not _ASIDE.isdisjoint(_words(self.stem))


def offers(files: Iterable[HubFile]) -> tuple[Offer, ...]:
    """What can be served of these files, the smallest first. A split that lacks a part is none."""
    found: defaultdict[tuple[str, str, int], dict[int, HubFile]] = defaultdict(dict)
    for file in files:
        if _is_gguf(file) and not _words(_stem(file.path)) & (_HELPERS | {_PROJECTOR}):
            folder, _, base = file.path.rpartition("/")
            shard = SHARD.fullmatch(base)
            stem, count = (shard["stem"], int(shard["count"])) if shard else (_stem(base), 1)
            found[folder, stem, count][int(shard["number"]) if shard else 1] = file
    made = [
        Offer(_quantization(folder, stem), stem, tuple(shards[number] for number in sorted(shards)))
        for (folder, stem, count), shards in found.items()
        if set(shards) == set(range(1, count + 1))
    ]
    return tuple(sorted(made, key=lambda offer: (offer.size_bytes, offer.stem)))


def projector_of(files: Iterable[HubFile]) -> HubFile | None:
    """The projector that belongs to a repo's models; of several the one that is served later."""
    found = [file for file in files if _is_gguf(file) and _PROJECTOR in _words(_stem(file.path))]
    return min(found, key=_projector_order, default=None)


def asked_for(offered: Sequence[Offer], wanted: str) -> tuple[Offer, ...]:
    """Those that a word names: a quantization, or a file's name; whole models before drafts."""
    word = wanted.lower().removesuffix(_ENDING)
    found = [
        one
        for one in offered
        if word in (one.quantization.lower(), one.stem.lower())
        or word in (file.path.lower().removesuffix(_ENDING) for file in one.files)
    ]
    return tuple([one for one in found if not one.is_aside] or found)


def preferred(offered: Sequence[Offer]) -> tuple[Offer, ...]:
    """What is had where nothing was asked for; several where the names leave it open."""
    whole = [one for one in offered if not one.is_aside] or list(offered)
    for quantization in _PREFERRED:
        found = tuple(one for one in whole if one.quantization == quantization)
        if found:
            return found
    return tuple(whole[:1])


def _is_gguf(file: HubFile) -> bool:
    return file.path.lower().endswith(_ENDING)


def _stem(path: str) -> str:
    base = path.rpartition("/")[2]
    return base[: -len(_ENDING)] if base.lower().endswith(_ENDING) else base


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.split(text.lower())) - {""}


def _quantization(folder: str, stem: str) -> str:
    """What the name says, else the folder; the last word of that kind counts."""
    for text in (stem, folder):
        found = _QUANTIZATION.findall(text)
        if found:
            return str(found[-1]).upper()
    return ""


def _projector_order(file: HubFile) -> tuple[int, str]:
    precision = _quantization("", _stem(file.path))
    known = precision in PROJECTOR_PRECISIONS
    rank = PROJECTOR_PRECISIONS.index(precision) if known else len(PROJECTOR_PRECISIONS)
    return rank, file.path
