"""Files with their headers → models. Pure: the same files give the same catalog, in any order.

A model is one loadable unit: a file, or all the shards of one. Each file is used at most once,
whatever names it has; each model gets a program name that it keeps.

What comes from outside (file and repo names, headers) is data here. It reaches `Problem`s and
program names only through `printable` and `_slug`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from supervisor_synapse.core.estimate import projector_bytes
from supervisor_synapse.core.model import FileIdentity, FileKind, Header, Problem, Role

PROGRAM_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# Words of supervisorctl, our own programs, and supervisord's own log file in var/log.
RESERVED_NAMES = frozenset({"all", "discover", "gateway", "synapse", "supervisord"})

_LONGEST_NAME = 63
_HASH_DIGITS = 6
_LONGEST_SHOWN = 200
_MOST_LISTED = 5

# llama.cpp finds the other shards by this very pattern ("%s-%05d-of-%05d.gguf"), in lower case.
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
PLAIN_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_.-]{1,96})?")
PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}")
_WORD = re.compile(r"[^a-z0-9]+")

_POOLING_RANK = 4
_POOLING_OF_EMBEDDINGS = (1, 2, 3)  # mean, cls, last
# Encoders: llama.cpp computes no logits for these.
_EMBEDDING_ARCHITECTURES = frozenset({
    "bert", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2",
    "jina-bert-v3", "eurobert", "t5encoder", "gemma-embedding", "llama-embed",
})  # fmt: skip
# These run only against the hidden states of the model that they draft for.
_DRAFT_ARCHITECTURES = frozenset({"eagle3", "dflash", "gemma4-assistant"})
# llama-server becomes ready with dream or llada, and answers each completion with an error.
_UNSERVED_ARCHITECTURES = {
    **dict.fromkeys(
        ("dream", "llada", "llada-moe", "rnd1"), "it writes by diffusion, not word by word"
    ),
    "wavtokenizer-dec": "it turns the codes of a speech model into sound",
}
_LARGEST_DRAFT_PARAMETERS = 2_000_000_000
_MOST_PREDICTION_LAYERS = 4

# Which of several projectors is taken: they are small, and F16 is what every backend computes in.
PROJECTOR_PRECISIONS = ("F16", "BF16", "Q8_0", "F32")
# Words of a projector's name that do not say which model it belongs to.
_PROJECTOR_WORDS = frozenset({"mmproj", "model", "f16", "bf16", "f32", "fp16", "q8", "0", "gguf"})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file named *.gguf, as discovery saw it."""

    repo: str | None  # None: found in a model directory
    file: str  # posix path within the snapshot or the model directory
    path: str  # absolute, as it shall be opened
    identity: FileIdentity  # of what the path resolves to
    size_bytes: int
    header: Header | None  # None: it cannot be read, which whoever looked has reported
    blob: str | None = None  # the hash that names its content in a hub cache


@dataclass(frozen=True, slots=True)
class Model:
    """One loadable unit.

    `key` is its identity across runs, revisions and names: printable ASCII. `repo` and `file` are
    for people, escaped where they are not plain; the paths are as they must be opened.
    """

    name: str  # of its program
    key: str
    repo: str | None
    file: str
    path: str  # the first shard's, where it is split
    shards: tuple[str, ...]  # all, in order; none where it is not split
    size_bytes: int  # of all shards
    header: Header  # merged over all shards
    role: Role
    quantization: str
    projector: str | None = None
    projector_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Catalog:
    """All models, in the order of their keys; and what was found beside them."""

    models: tuple[Model, ...]
    problems: tuple[Problem, ...]


def build_catalog(files: Sequence[FoundFile], names: Mapping[str, str]) -> Catalog:
    """The models among `files`. `names`: model key → the program name that it had before."""
    problems: list[Problem] = []
    ordered = sorted(files, key=_file_order)
    units = _servable(_distinct(_units(ordered, problems), names, problems), problems)
    pairs = _pair(units, _projectors(ordered), problems)
    called = _name(units, names)
    models = [_model(unit, called[unit.key], pairs.get(unit.key)) for unit in units]
    return Catalog(
        models=tuple(sorted(models, key=lambda model: model.key)),
        problems=tuple(sorted(set(problems), key=str)),
    )


def printable(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """Text from outside in printable ASCII, all else escaped; cut in the middle."""
    escaped = _escaped(text)
    if len(escaped) <= longest:
        return escaped
    tail = (longest - 3) * 2 // 3  # the end of a path says more than its beginning
    return f"{escaped[: longest - 3 - tail]}...{escaped[-tail:]}"


def remedy_for(
    repo: str | None, file: str | None = None, *, afresh: bool = False, others: str = ""
) -> str:
    """How to get `file` again; where it is not known which, `FILE` stands for it.

    `afresh`: what is there of it is wrong, and would be taken for good. `others`: a pattern for
    all shards of a split. Names are shown only where a shell takes each as one word.
    """
    if repo is None or not PLAIN_REPO.fullmatch(repo):
        return "download it again"
    options = " --force-download" if afresh else ""
    if PLAIN_FILE.fullmatch(others.replace("*", "")):
        return f"`hf download{options} {repo} --include '{others}'`"
    is_plain = file is not None and PLAIN_FILE.fullmatch(file)
    return f"`hf download{options} {repo} {file if is_plain else 'FILE'}`"


def subject_of(repo: str | None, file: str, path: str) -> str:
    """What a `Problem` with one file is about."""
    return printable(f"{repo}/{file}" if repo is not None else path)


def _escaped(text: str) -> str:
    """One to one: a backslash is doubled; what cannot be encoded (surrogates) is escaped too."""
    return text.encode("unicode_escape").decode("ascii")


def _file_order(file: FoundFile) -> tuple[bool, str, str, str]:
    return (file.repo is None, file.repo or "", file.file, file.path)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _base(path: str) -> str:
    return path.rpartition("/")[2]


# --- units: files, and shards joined -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unit:
    """The files of one model, in order, and what their headers say together."""

    key: str
    files: tuple[FoundFile, ...]
    stem: str  # the file's name without shard number and ending
    words: frozenset[str]  # of the stem
    header: Header

    @property
    def first(self) -> FoundFile:
        return self.files[0]

    @property
    def home(self) -> str:
        """Where its projector may lie: its repo, or its folder."""
        return _home(self.first)


@dataclass(frozen=True, slots=True)
class _Split:
    """What the shards of one model have in common."""

    folder: str
    stem: str
    count: int


@dataclass(frozen=True, slots=True)
class _Shard:
    split: _Split
    number: int  # from 1


def _unit(files: Sequence[FoundFile], stem: str, header: Header) -> _Unit:
    return _Unit(_key(files[0]), tuple(files), stem, _words(stem), header)


def _key(file: FoundFile) -> str:
    """The revision is not part of it. A colon in a repo's name cannot be taken for ours."""
    if file.repo is None:
        return "file:" + _escaped(file.path)
    return "hf:" + _escaped(file.repo).replace(":", "\\x3a") + ":" + _escaped(file.file)


def _home(file: FoundFile) -> str:
    return f"repo {file.repo}" if file.repo is not None else f"folder {_folder(file.path)}"


def _shard(file: FoundFile) -> _Shard | None:
    named = SHARD.fullmatch(_base(file.path))
    if named is None:
        return None
    split = _Split(_folder(file.path), named["stem"], int(named["count"]))
    return _Shard(split, int(named["number"]))


def _stem(path: str) -> str:
    name = _base(path)
    return name[: -len(".gguf")] if name.lower().endswith(".gguf") else name


def _units(files: Iterable[FoundFile], problems: list[Problem]) -> list[_Unit]:
    units: list[_Unit] = []
    splits: defaultdict[_Split, dict[int, FoundFile]] = defaultdict(dict)
    for file in files:
        shard = _shard(file)
        if file.header is not None and file.header.kind is not FileKind.MODEL:
            continue
        if shard is not None and shard.split.count != 1:
            splits[shard.split].setdefault(shard.number, file)
        elif file.header is not None and file.header.split_count > 1:
            problems.append(_misnamed(file, file.header))
        elif file.header is not None:
            stem = shard.split.stem if shard else _stem(file.path)
            units.append(_unit([file], stem, file.header))
    problems += _mixed(splits)
    for split, shards in splits.items():
        joined = _join(split, shards)
        if isinstance(joined, _Unit):
            units.append(joined)
        else:
            problems.append(joined)
    return units


def _misnamed(file: FoundFile, header: Header) -> Problem:
    number, count = header.split_index + 1, header.split_count
    return Problem(
        subject_of(file.repo, file.file, file.path),
        f"is part {number} of {count}, but is not named so: llama-server cannot find the others",
        f"name it <model>-{number:05d}-of-{count:05d}.gguf",
    )


def _mixed(splits: Mapping[_Split, Mapping[int, FoundFile]]) -> Iterator[Problem]:
    """Shards of one name that come from splits into different numbers of parts."""
    counts: defaultdict[tuple[str, str], list[_Split]] = defaultdict(list)
    for split in splits:
        counts[split.folder, split.stem].append(split)
    for same in counts.values():
        if len(same) > 1:
            same.sort(key=lambda split: split.count)
            first = min(splits[same[0]].items())[1]
            sizes = _listed(str(split.count) for split in same)
            yield Problem(
                _split_subject(first, same[0]),
                f"parts of splits into {sizes} lie side by side",
                "remove those that do not belong together",
            )


def _join(split: _Split, shards: Mapping[int, FoundFile]) -> _Unit | Problem:
    """One unit of all shards, or what is wrong with them: nothing less can be loaded."""
    present = [shards[number] for number in sorted(shards)]
    missing = _missing(split, shards)
    wrong = missing or _damaged(split, shards) or _contradiction(split, shards)
    if wrong is not None:
        first = present[0]
        remedy = "put all parts of one download into one folder"
        if first.repo is not None:
            pattern = _split_pattern(_folder(first.file), split)
            remedy = remedy_for(first.repo, afresh=not missing, others=pattern)
        return Problem(_split_subject(first, split), wrong, remedy)
    headers = [file.header for file in present if file.header is not None]
    return _unit(present, split.stem, _merged(headers))


def _missing(split: _Split, shards: Mapping[int, FoundFile]) -> str | None:
    beyond = [number for number in shards if not 1 <= number <= split.count]
    if beyond:
        return f"part {min(beyond)} of {split.count} cannot be"
    if len(shards) < split.count:
        missing = (str(n) for n in range(1, split.count + 1) if n not in shards)
        return f"part {_listed(missing)} of {split.count} is missing"
    return None


def _damaged(split: _Split, shards: Mapping[int, FoundFile]) -> str | None:
    damaged = [number for number, file in sorted(shards.items()) if file.header is None]
    if damaged:
        return f"part {_listed(map(str, damaged))} of {split.count} is damaged"
    return None


def _contradiction(split: _Split, shards: Mapping[int, FoundFile]) -> str | None:
    """Names say one thing, headers another. Shards after the first need not name what they are."""
    headers = {number: file.header for number, file in sorted(shards.items()) if file.header}
    for number, header in headers.items():
        if (header.split_index, header.split_count) != (number - 1, split.count):
            stated = (
                f"part {header.split_index + 1} of {header.split_count}"
                if header.split_count > 1
                else "a whole model"
            )
            return f"part {number} of {split.count} by its name is {stated} by its header"
    architectures = sorted({header.architecture for header in headers.values()} - {""})
    if len(architectures) > 1:
        return f"its parts are of different architectures: {_listed(architectures)}"
    return None


def _split_subject(file: FoundFile, split: _Split) -> str:
    folder = _folder(file.file if file.repo is not None else file.path)
    pattern = _split_pattern(folder, split)
    return subject_of(file.repo, pattern, pattern)


def _split_pattern(folder: str, split: _Split) -> str:
    name = f"{split.stem}-*-of-{split.count:05d}.gguf"
    return f"{folder}/{name}" if folder else name


def _listed(words: Iterable[str]) -> str:
    first = list(itertools.islice(words, _MOST_LISTED + 1))
    return ", ".join(first[:_MOST_LISTED]) + (" ..." if len(first) > _MOST_LISTED else "")


def _merged(headers: Sequence[Header]) -> Header:
    """The first shard has the facts; bytes and counts are summed over all."""
    first = headers[0]
    blocks = itertools.zip_longest(*(header.block_bytes for header in headers), fillvalue=0)
    experts = itertools.zip_longest(*(header.expert_bytes for header in headers), fillvalue=0)
    largest = max(headers, key=lambda header: header.tensor_bytes)
    return replace(
        first,
        quantization=(
            largest.quantization if first.quantization == "unknown" else first.quantization
        ),
        parameters=sum(header.parameters for header in headers),
        classifier=any(header.classifier for header in headers),
        ungated=all(header.ungated for header in headers if any(header.block_bytes)),
        split_count=len(headers),
        tensors=sum(header.tensors for header in headers),
        header_bytes=sum(header.header_bytes for header in headers),
        tensor_bytes=sum(header.tensor_bytes for header in headers),
        block_bytes=tuple(sum(sizes) for sizes in blocks),
        expert_bytes=tuple(sum(sizes) for sizes in experts),
        embedding_bytes=sum(header.embedding_bytes for header in headers),
        input_bytes=sum(header.input_bytes for header in headers),
        has_output=any(header.has_output for header in headers),
    )


# --- each content once ---------------------------------------------------------------------------


def _distinct(
    units: Iterable[_Unit], names: Mapping[str, str], problems: list[Problem]
) -> list[_Unit]:
    """Each content and each key once.

    A unit that was served before goes before one that was not, so that a second name for its file
    does not rename its program; then repos before folders, by name.
    """
    kept: list[_Unit] = []
    seen: set[object] = set()
    keys: dict[str, _Unit] = {}
    for unit in sorted(units, key=lambda u: (u.key not in names, _file_order(u.first))):
        contents = _contents(unit)
        if not seen.isdisjoint(contents):
            continue
        if unit.key in keys:
            problems.append(_second_version(unit, keys[unit.key]))
            continue
        seen.update(contents)
        keys[unit.key] = unit
        kept.append(unit)
    return kept


def _contents(unit: _Unit) -> list[tuple[object, ...]]:
    """What names the bytes: the inodes, and the hashes where all shards have one."""
    inodes = tuple((file.identity.device, file.identity.inode) for file in unit.files)
    blobs = tuple(file.blob for file in unit.files)
    return [inodes] if None in blobs else [inodes, blobs]


def _second_version(unit: _Unit, served: _Unit) -> Problem:
    return Problem(
        subject_of(unit.first.repo, unit.first.file, unit.first.path),
        f"{printable(unit.first.path)} is another version of it, and is not served",
        f"keep one; served is {printable(served.first.path)}",
    )


def _servable(units: Iterable[_Unit], problems: list[Problem]) -> list[_Unit]:
    served = []
    for unit in units:
        why = _UNSERVED_ARCHITECTURES.get(unit.header.architecture)
        if why is None:
            served.append(unit)
        else:
            first = unit.first
            problems.append(
                Problem(
                    subject_of(first.repo, first.file, first.path),
                    f"llama-server cannot serve a model of architecture "
                    f"{unit.header.architecture}: {why}",
                )
            )
    return served


# --- roles and projectors ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Projector:
    file: FoundFile
    header: Header

    @property
    def order(self) -> tuple[int, tuple[bool, str, str, str]]:
        """Preferred first."""
        precision = self.header.quantization
        known = precision in PROJECTOR_PRECISIONS
        rank = PROJECTOR_PRECISIONS.index(precision) if known else len(PROJECTOR_PRECISIONS)
        return (rank, _file_order(self.file))


def _projectors(files: Iterable[FoundFile]) -> list[_Projector]:
    return [
        _Projector(file, file.header)
        for file in files
        if file.header is not None and file.header.kind is FileKind.PROJECTOR
    ]


def _pair(
    units: Iterable[_Unit], projectors: Iterable[_Projector], problems: list[Problem]
) -> dict[str, _Projector]:
    """Unit key → its projector. One that fits no model is noted: its model may be missing."""
    homes: defaultdict[str, list[_Unit]] = defaultdict(list)
    for unit in units:
        if not _is_draft(unit):
            homes[unit.home].append(unit)
    pairs: dict[str, _Projector] = {}
    for projector in sorted(projectors, key=lambda p: p.order):
        takers = _takers(projector, homes[_home(projector.file)])
        for unit in takers:
            pairs.setdefault(unit.key, projector)
        if not takers:
            problems.append(_unpaired(projector))
    return pairs


def _takers(projector: _Projector, neighbours: Sequence[_Unit]) -> list[_Unit]:
    """The models that a projector feeds: as wide as its output, and its own.

    A repo holds one model. A folder may hold any, and equal width is no kinship: where there are
    models of several kinds, one whose words all stand in the model's name belongs to it, and one
    without words of its own to the only kind that is as wide.
    """
    width = projector.header.projection_dim
    wide = [unit for unit in neighbours if width and unit.header.embedding_length == width]
    if projector.file.repo is not None or len(_kinds(neighbours)) == 1:
        return wide
    own = _words(_stem(projector.file.path)) - _PROJECTOR_WORDS
    if own:
        return [unit for unit in wide if own <= unit.words]
    return wide if len(_kinds(wide)) == 1 else []


def _kinds(units: Iterable[_Unit]) -> set[tuple[str, int]]:
    """What the quantizations and fine-tunes of one base have in common."""
    return {(unit.header.architecture, unit.header.layers) for unit in units}


def _unpaired(projector: _Projector) -> Problem:
    file = projector.file
    where = "repo" if file.repo is not None else "folder"
    return Problem(
        subject_of(file.repo, file.file, file.path),
        f"is a projector for a model {projector.header.projection_dim} wide, "
        f"and none in its {where} is known to be its own",
        f"put it with its model, in the same {where}",
    )


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.split(text.lower())) - {""}


def _role(unit: _Unit, projector: _Projector | None) -> Role:
    header = unit.header
    if _is_draft(unit):
        return Role.DRAFT
    if _is_reranker(unit):
        return Role.RERANKER
    if _is_embedding(header):
        return Role.EMBEDDING
    if projector is not None and not _hears_only(projector.header):
        return Role.VISION
    return Role.TEXT


def _hears_only(projector: Header) -> bool:
    """Files from before audio say neither, and see."""
    return projector.has_audio and not projector.has_vision


def _is_draft(unit: _Unit) -> bool:
    """Serves speculation only.

    "draft" in a name counts for a model small enough to be one. "mtp" counts for the prediction
    layers alone: whole models that contain them are called so too.
    """
    header = unit.header
    if header.architecture in _DRAFT_ARCHITECTURES or _lacks_trunk(header):
        return True
    if "draft" in unit.words:
        return header.parameters <= _LARGEST_DRAFT_PARAMETERS
    return "mtp" in unit.words and header.layers <= _MOST_PREDICTION_LAYERS


def _lacks_trunk(header: Header) -> bool:
    """Most of its layers have no tensors: the prediction layers of a model, without the model."""
    empty = header.block_bytes.count(0)
    return empty < len(header.block_bytes) < 2 * empty


def _is_reranker(unit: _Unit) -> bool:
    """Ranks, or has a classifier; with both a classifier and another pooling, its name decides.

    Some embedding models carry the head of their pre-training.
    """
    header = unit.header
    if header.pooling == _POOLING_RANK:
        return True
    if not header.classifier:
        return False
    return header.pooling not in _POOLING_OF_EMBEDDINGS or "rerank" in unit.stem.lower()


def _is_embedding(header: Header) -> bool:
    if header.pooling in _POOLING_OF_EMBEDDINGS or header.architecture in _EMBEDDING_ARCHITECTURES:
        return True
    return header.causal_attention is False


def _model(unit: _Unit, name: str, projector: _Projector | None) -> Model:
    first = unit.first
    return Model(
        name=name,
        key=unit.key,
        repo=None if first.repo is None else _escaped(first.repo),
        file=_escaped(first.file),
        path=first.path,
        shards=tuple(file.path for file in unit.files) if len(unit.files) > 1 else (),
        size_bytes=sum(file.size_bytes for file in unit.files),
        header=unit.header,
        role=_role(unit, projector),
        quantization=unit.header.quantization,
        projector=projector.file.path if projector else None,
        projector_bytes=projector_bytes(projector.header) if projector else 0,
    )


# --- program names -------------------------------------------------------------------------------


def _name(units: Sequence[_Unit], names: Mapping[str, str]) -> dict[str, str]:
    """Unit key → program name.

    Names of earlier runs are kept, those of models that are away too. Then in rounds, the plainest
    proposal first: who alone proposes a free name gets it, so that the order never matters.
    """
    called = _kept_names(units, names)
    taken = {*RESERVED_NAMES, *names.values(), *called.values()}
    for propose in _PROPOSALS:
        left = [unit for unit in units if unit.key not in called]
        proposals = {unit.key: propose(unit) for unit in left}
        often = Counter(proposals.values())
        won = {
            key: name
            for key, name in proposals.items()
            if name and often[name] == 1 and name not in taken
        }
        called |= won
        taken.update(won.values())
    left = [unit for unit in units if unit.key not in called]
    for unit in sorted(left, key=lambda u: u.key):
        called[unit.key] = next(name for name in _hashed_names(unit) if name not in taken)
        taken.add(called[unit.key])
    return called


def _kept_names(units: Iterable[_Unit], names: Mapping[str, str]) -> dict[str, str]:
    """Earlier names that may still be used; of two that claim one, the first by key has it."""
    kept: dict[str, str] = {}
    taken = set(RESERVED_NAMES)
    for key in sorted(unit.key for unit in units):
        name = names.get(key, "")
        if PROGRAM_NAME.fullmatch(name) and name not in taken:
            kept[key] = name
            taken.add(name)
    return kept


def _plain_name(unit: _Unit) -> str:
    """From the file; where nothing is left of that, from the repo."""
    repo = unit.first.repo or ""
    return _cut(unit, _slug(unit.stem) or _slug(_base(repo)) or "model")


def _name_with_quantization(unit: _Unit) -> str:
    """For repos that keep quantizations apart by folder only."""
    quantization = _slug(unit.header.quantization)
    plain = _slug(unit.stem)
    if not plain or not quantization or quantization in plain:
        return ""
    return _cut(unit, f"{plain}-{quantization}")


def _name_with_owner(unit: _Unit) -> str:
    first = unit.first
    owner = first.repo.partition("/")[0] if first.repo is not None else _base(_folder(first.path))
    slug = _slug(owner)
    return _cut(unit, f"{slug}-{_plain_name(unit)}") if slug else ""


_PROPOSALS: tuple[Callable[[_Unit], str], ...] = (
    _plain_name,
    _name_with_quantization,
    _name_with_owner,
)


def _hashed_names(unit: _Unit) -> Iterator[str]:
    """Names from the key, without end; the first is free unless someone wanted otherwise."""
    for salt in itertools.count():
        digest = hashlib.sha256(f"{unit.key}\0{salt}".encode("ascii")).hexdigest()[:_HASH_DIGITS]
        stem = _cut(unit, _plain_name(unit), _LONGEST_NAME - _HASH_DIGITS - 1)
        yield f"{stem}-{digest}"


def _slug(text: str) -> str:
    """Lower-case ASCII of the allowed characters; accents dropped, everything else a hyphen."""
    decomposed = unicodedata.normalize("NFKD", text)
    base = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
    return re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9._-]", "-", base)).strip("-._")


def _cut(unit: _Unit, name: str, longest: int = _LONGEST_NAME) -> str:
    """At most `longest` characters; a quantization at the end stays there."""
    if len(name) <= longest:
        return name
    quantization = _slug(unit.header.quantization)
    tail = f"-{quantization}" if name.endswith(quantization) else ""
    if not quantization or len(tail) > longest // 2:
        tail = ""
    return name[: longest - len(tail)].rstrip("-._") + tail
