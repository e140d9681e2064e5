"""Files with their headers become models: whatever they are called, in whatever order they come."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.catalog import (
    PROGRAM_NAME,
    RESERVED_NAMES,
    Catalog,
    FoundFile,
    Model,
    build_catalog,
    printable,
    remedy_for,
)
from supervisor_synapse.core.model import FileIdentity, FileKind, Header, Role

REPO = "owner/Some-Model-GGUF"
TEXT = Header(
    FileKind.MODEL,
    "qwen2",
    quantization="Q4_K_M",
    parameters=500_000_000,
    layers=2,
    embedding_length=896,
    tensors=20,
    tensor_bytes=1000,
    block_bytes=(400, 400),
    embedding_bytes=200,
)
PROJECTOR = Header(
    FileKind.PROJECTOR, "clip", quantization="F16", has_vision=True, projection_dim=896
)
_inodes = itertools.count(1)


def hub(
    file: str,
    header: Header | None = TEXT,
    repo: str = REPO,
    *,
    inode: int | None = None,
    blob: str | None = None,
    cache: str = "/cache",
) -> FoundFile:
    """A file in a hub cache, of its own inode unless said otherwise."""
    path = f"{cache}/models--{repo.replace('/', '--')}/snapshots/abc/{file}"
    size_bytes = header.tensor_bytes + 100 if header else 7
    identity = FileIdentity(1, inode or next(_inodes), size_bytes, 0)
    return FoundFile(repo, file, path, identity, size_bytes, header, blob)


def local(path: str, header: Header | None = TEXT, *, inode: int | None = None) -> FoundFile:
    """A file in the model directory /models."""
    return replace(
        hub("x", header, inode=inode), repo=None, path=path, file=path.removeprefix("/models/")
    )


def shard(number: int, count: int, **facts: object) -> Header:
    """What a shard of TEXT says: after the first only where it stands."""
    known: dict[str, object] = {} if number == 1 else {"architecture": "", "embedding_length": 0}
    stated = known | {"split_index": number - 1, "split_count": count} | facts
    return replace(TEXT, **stated)  # type: ignore[arg-type]


def split(stem: str, count: int, repo: str = REPO) -> list[FoundFile]:
    return [
        hub(f"{stem}-{number:05d}-of-{count:05d}.gguf", shard(number, count), repo)
        for number in range(1, count + 1)
    ]


def only(catalog: Catalog) -> Model:
    (model,) = catalog.models
    return model


def role_of(file: str, header: Header) -> Role:
    return only(build_catalog([hub(file, header)], {})).role


def reasons(files: Iterable[FoundFile]) -> list[str]:
    return [str(problem) for problem in build_catalog(list(files), {}).problems]


# --- one file, several files ---------------------------------------------------------------------


def test_a_file_is_a_model_with_the_facts_of_its_header() -> None:
    catalog = build_catalog([hub("Some-Model-Q4_K_M.gguf")], {})
    model = only(catalog)
    assert model.name == "some-model-q4_k_m"
    assert model.key == f"hf:{REPO}:Some-Model-Q4_K_M.gguf"
    assert (model.repo, model.file) == (REPO, "Some-Model-Q4_K_M.gguf")
    assert model.path.endswith("/snapshots/abc/Some-Model-Q4_K_M.gguf")
    assert model.shards == ()
    assert model.size_bytes == 1100
    assert model.header == TEXT
    assert (model.role, model.quantization) == (Role.TEXT, "Q4_K_M")
    assert (model.projector, model.projector_bytes) == (None, 0)
    assert catalog.problems == ()


def test_quantizations_of_a_repo_are_models_of_their_own() -> None:
    files = [hub(f"m-{q}.gguf", replace(TEXT, quantization=q)) for q in ("Q4_K_M", "Q8_0", "F16")]
    assert [model.name for model in build_catalog(files, {}).models] == [
        "m-f16", "m-q4_k_m", "m-q8_0",
    ]  # fmt: skip


def test_a_model_in_a_folder_is_known_by_its_path() -> None:
    model = only(build_catalog([local("/models/pub/m.gguf")], {}))
    assert (model.key, model.repo, model.file) == ("file:/models/pub/m.gguf", None, "pub/m.gguf")


@pytest.mark.parametrize(
    "kind", [FileKind.PROJECTOR, FileKind.ADAPTER, FileKind.VOCABULARY, FileKind.IMATRIX]
)
def test_what_is_no_model_by_its_header_is_never_served_whatever_its_name(kind: FileKind) -> None:
    assert build_catalog([hub("chat-Q4_K_M.gguf", replace(TEXT, kind=kind))], {}).models == ()


def test_a_model_that_is_called_like_a_projector_is_a_model() -> None:
    assert only(build_catalog([hub("mmproj-chat.gguf")], {})).role is Role.TEXT


@pytest.mark.parametrize(
    "architecture", ["dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec"]
)
def test_what_llama_server_loads_but_cannot_serve_is_reported(architecture: str) -> None:
    """It answers each request with an error: no logits, or no words."""
    header = replace(TEXT, architecture=architecture, causal_attention=False)
    catalog = build_catalog([hub("m-Q4_K_M.gguf", header)], {})
    assert catalog.models == ()
    assert [architecture in problem.reason for problem in catalog.problems] == [True]


def test_a_file_that_could_not_be_read_costs_only_itself() -> None:
    catalog = build_catalog([hub("broken.gguf", None), hub("good.gguf")], {})
    assert only(catalog).name == "good"
    assert catalog.problems == ()  # whoever read it has reported it


# --- shards --------------------------------------------------------------------------------------


def test_shards_are_one_model_and_its_header_is_all_of_theirs() -> None:
    first, second, third = split("Some-Model-Q4_K_M", 3)
    second = replace(second, header=shard(2, 3, block_bytes=(0, 0, 50), has_output=True))
    model = only(build_catalog([third, first, second], {}))
    assert model.name == "some-model-q4_k_m"
    assert model.key == f"hf:{REPO}:Some-Model-Q4_K_M-00001-of-00003.gguf"
    assert model.path == first.path
    assert model.shards == (first.path, second.path, third.path)
    assert model.size_bytes == 3300
    assert model.header.architecture == "qwen2"
    assert model.header.parameters == 1_500_000_000
    assert model.header.tensor_bytes == 3000
    assert model.header.tensors == 60
    assert model.header.block_bytes == (800, 800, 50)
    assert model.header.embedding_bytes == 600
    assert model.header.has_output


def test_a_first_shard_without_tensors_takes_the_quantization_of_the_others() -> None:
    files = split("m", 2)
    files[0] = replace(files[0], header=shard(1, 2, quantization="unknown", tensor_bytes=0))
    assert only(build_catalog(files, {})).quantization == "Q4_K_M"


def test_a_split_into_one_part_is_a_plain_file() -> None:
    model = only(build_catalog([hub("m-00001-of-00001.gguf")], {}))
    assert (model.name, model.shards) == ("m", ())


def _renumbered(file: FoundFile, header: Header) -> FoundFile:
    return replace(file, header=header)


BROKEN_SPLITS = {
    "a part is missing": (split("m", 3)[:1] + split("m", 3)[2:], "part 2 of 3 is missing"),
    "many parts are missing": (split("m", 40)[:2], "part 3, 4, 5, 6, 7 ... of 40 is missing"),
    "only the last is there": (split("m", 2)[1:], "part 1 of 2 is missing"),
    "a part is damaged": (
        [split("m", 2)[0], replace(split("m", 2)[1], header=None)],
        "part 2 of 2 is damaged",
    ),
    "a part is beyond the last": (
        [*split("m", 2), hub("m-00003-of-00002.gguf", shard(3, 3))],
        "part 3 of 2 cannot be",
    ),
    "a part of none": ([hub("m-00001-of-00000.gguf")], "part 1 of 0 cannot be"),
    "names in another order than headers": (
        [replace(file, header=shard(3 - n, 2)) for n, file in enumerate(split("m", 2), 1)],
        "part 1 of 2 by its name is part 2 of 2 by its header",
    ),
    "another number of parts by the header": (
        [replace(file, header=shard(n, 3)) for n, file in enumerate(split("m", 2), 1)],
        "part 1 of 2 by its name is part 1 of 3 by its header",
    ),
    "a whole model called a part": (
        [replace(file, header=TEXT) for file in split("m", 2)],
        "part 1 of 2 by its name is a whole model by its header",
    ),
    "parts of two models": (
        [split("m", 2)[0], hub("m-00002-of-00002.gguf", shard(2, 2, architecture="llama"))],
        "different architectures: llama, qwen2",
    ),
    "a part that is not called one": (
        [hub("m.gguf", shard(2, 3))],
        "is part 2 of 3, but is not named so",
    ),
    "an ending that llama.cpp does not look for": (
        [hub("m-00001-of-00002.GGUF", shard(1, 2))],
        "is part 1 of 2, but is not named so",
    ),
}


@pytest.mark.parametrize("case", BROKEN_SPLITS)
def test_a_broken_split_is_reported_and_nothing_of_it_is_served(case: str) -> None:
    files, reason = BROKEN_SPLITS[case]
    catalog = build_catalog([*files, hub("other.gguf")], {})
    assert only(catalog).name == "other"
    (problem,) = catalog.problems
    assert reason in problem.reason
    assert problem.subject.startswith(f"{REPO}/m")
    assert problem.remedy


def test_all_parts_of_a_split_are_asked_for_and_wrong_ones_are_replaced() -> None:
    """What is in the cache already is not downloaded, and would stay wrong, unless told."""
    first, second = split("Q4/m", 2)
    pattern = f"{REPO} --include 'Q4/m-*-of-00002.gguf'"
    for files, remedy in (
        ([first], f"`hf download {pattern}`"),
        ([first, replace(second, header=None)], f"`hf download --force-download {pattern}`"),
    ):
        (problem,) = build_catalog(files, {}).problems
        assert problem.remedy == remedy


def test_parts_of_two_splits_are_told_apart_and_the_whole_one_is_served() -> None:
    catalog = build_catalog([*split("m", 2), *split("m", 3)[:2]], {})
    assert len(only(catalog).shards) == 2
    assert [problem.reason for problem in catalog.problems] == [
        "parts of splits into 2, 3 lie side by side",
        "part 3 of 3 is missing",
    ]


def test_shards_in_different_folders_do_not_make_a_model() -> None:
    """llama.cpp looks for the other shards beside the first."""
    files = [
        local("/models/a/m-00001-of-00002.gguf", shard(1, 2)),
        local("/models/b/m-00002-of-00002.gguf", shard(2, 2)),
    ]
    assert len(reasons(files)) == 2
    assert not build_catalog(files, {}).models


def test_a_remedy_names_a_repo_only_where_a_shell_takes_it_as_one_word() -> None:
    assert remedy_for("owner/n-GGUF", "q/n.gguf") == "`hf download owner/n-GGUF q/n.gguf`"
    for repo in ("a/$(reboot)", "a/b;c", "-rf", "a/b/c", "a b", "a/b\n", "ünïcode/x", None):
        assert remedy_for(repo, "n.gguf") == "download it again"


def test_a_remedy_names_a_file_only_where_a_shell_takes_it_as_one_word() -> None:
    for file in ("$(reboot).gguf", "a;b.gguf", "-rf", "a b.gguf", "a`id`", "a'b", "é.gguf", None):
        assert remedy_for("o/n", file) == "`hf download o/n FILE`"
        assert remedy_for("o/n", others=f"{file or ''}'-*") == "`hf download o/n FILE`"


# --- the same content once -----------------------------------------------------------------------


DUPLICATES = {
    "two links to one file": (hub("a.gguf", inode=5), hub("b.gguf", inode=5)),
    "a repo and a folder": (hub("a.gguf", inode=5), local("/models/z.gguf", inode=5)),
    "two caches": (
        hub("a.gguf", blob="f" * 64),
        hub("a.gguf", repo="zed/copy", blob="f" * 64, cache="/second"),
    ),
    "a folder within a folder": (
        local("/models/sub/a.gguf", inode=5),
        replace(local("/models/sub/a.gguf", inode=5), file="a.gguf"),
    ),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_the_same_content_twice_is_one_model(case: str) -> None:
    first, second = DUPLICATES[case]
    catalog = build_catalog([first, second], {})
    assert only(catalog).path == min(first.path, second.path)
    assert build_catalog([second, first], {}) == catalog
    assert catalog.problems == ()


def test_the_same_shards_twice_are_one_model() -> None:
    files = split("m", 2)
    links = [
        local(f"/models/link-0000{n}-of-00002.gguf", file.header, inode=file.identity.inode)
        for n, file in enumerate(files, 1)
    ]
    assert only(build_catalog([*links, *files], {})).repo == REPO


def test_a_second_name_for_a_file_does_not_rename_its_program() -> None:
    older, newer = hub("z.gguf", inode=5), hub("a.gguf", inode=5)
    before = only(build_catalog([older], {}))
    after = only(build_catalog([newer, older], {before.key: before.name}))
    assert (after.key, after.name) == (before.key, before.name)


def test_two_versions_of_one_file_in_two_caches_are_reported_and_one_is_served() -> None:
    first, second = hub("a.gguf"), hub("a.gguf", cache="/second")
    catalog = build_catalog([second, first], {})
    assert only(catalog).path == first.path
    assert [second.path in str(problem) for problem in catalog.problems] == [True]


# --- projectors ----------------------------------------------------------------------------------


def test_a_projector_is_given_to_all_models_of_its_repo_that_are_as_wide() -> None:
    files = [
        hub("mmproj-F16.gguf", replace(PROJECTOR, tensor_bytes=300)),
        hub("m-Q4_K_M.gguf"),
        hub("BF16/m-BF16.gguf"),
        hub("m-wider.gguf", replace(TEXT, embedding_length=2048)),
        hub("m-Q4_K_M.gguf", repo="owner/elsewhere"),
    ]
    models = {model.key: model for model in build_catalog(files, {}).models}
    paired = {key.rpartition(":")[2] for key, model in models.items() if model.projector}
    assert paired == {"m-Q4_K_M.gguf", "BF16/m-BF16.gguf"}
    seeing = models[f"hf:{REPO}:m-Q4_K_M.gguf"]
    assert (seeing.role, seeing.projector, seeing.projector_bytes) == (
        Role.VISION, files[0].path, 300,
    )  # fmt: skip
    assert models[f"hf:{REPO}:m-wider.gguf"].role is Role.TEXT


def test_of_several_projectors_the_conventional_precision_is_taken() -> None:
    """F16, then BF16, Q8_0, F32, then what there is."""
    order = ["F16", "BF16", "Q8_0", "F32", "Q4_0"]
    projectors = [hub(f"mmproj-{p}.gguf", replace(PROJECTOR, quantization=p)) for p in order]
    while projectors:
        shuffled = random.Random(len(projectors)).sample(projectors, len(projectors))
        assert only(build_catalog([hub("m.gguf"), *shuffled], {})).projector == projectors[0].path
        del projectors[0]


def test_a_projector_that_hears_makes_no_vision_model() -> None:
    hearing = replace(PROJECTOR, has_vision=False, has_audio=True)
    model = only(build_catalog([hub("mmproj.gguf", hearing), hub("m.gguf")], {}))
    assert (model.role, model.projector is not None) == (Role.TEXT, True)


def test_a_projector_from_before_audio_says_neither_and_sees() -> None:
    silent = replace(PROJECTOR, has_vision=False)
    assert only(build_catalog([hub("mmproj.gguf", silent), hub("m.gguf")], {})).role is Role.VISION


def test_a_projector_without_its_model_is_noted_and_not_served() -> None:
    catalog = build_catalog([hub("mmproj-F16.gguf", PROJECTOR)], {})
    assert catalog.models == ()
    (note,) = catalog.problems
    assert "projector for a model 896 wide" in note.reason


def test_a_draft_gets_no_projector() -> None:
    files = [hub("mmproj.gguf", PROJECTOR), hub("m-draft.gguf")]
    assert only(build_catalog(files, {})).projector is None


FOLDERS = {
    # files of a folder: name → architecture; the projector's name; who is paired
    "one model's own folder, any name": (
        {"pixtral-12b-Q4_K_M": "llama"}, "mmproj-pixtral-12b-2409-f16", {"pixtral-12b-Q4_K_M"},
    ),
    "several kinds, one of them named": (
        {"gemma-3-4b-it-Q4_K_M": "gemma3", "qwen3-4b-Q8_0": "qwen3"},
        "mmproj-gemma-3-4b-it-f16", {"gemma-3-4b-it-Q4_K_M"},
    ),
    "several kinds, another one named": (
        {"qwen3-4b-Q8_0": "qwen3", "llama-3b": "llama"}, "mmproj-gemma-3-4b-it-f16", set(),
    ),
    "several kinds, none named": (
        {"gemma-3-4b-it-Q4_K_M": "gemma3", "qwen3-4b-Q8_0": "qwen3"}, "mmproj-model-f16", set(),
    ),
    "two quantizations of one kind, none named": (
        {"a-Q4_K_M": "gemma3", "a-Q8_0": "gemma3"}, "mmproj-model-f16", {"a-Q4_K_M", "a-Q8_0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_in_a_folder_equal_width_is_no_kinship(case: str) -> None:
    models, projector, expected = FOLDERS[case]
    files = [
        local(f"/models/{name}.gguf", replace(TEXT, architecture=architecture))
        for name, architecture in models.items()
    ]
    catalog = build_catalog([*files, local(f"/models/{projector}.gguf", PROJECTOR)], {})
    paired = {m.file.removesuffix(".gguf") for m in catalog.models if m.projector}
    assert paired == expected
    assert len(catalog.problems) == (0 if expected else 1)


def test_a_nameless_projector_goes_to_the_only_kind_that_is_as_wide() -> None:
    files = [
        local("/models/seeing.gguf"),
        local("/models/other.gguf", replace(TEXT, embedding_length=64, architecture="llama")),
        local("/models/mmproj-model-f16.gguf", PROJECTOR),
        local("/models/sub/seeing.gguf"),
    ]
    paired = [model.file for model in build_catalog(files, {}).models if model.projector]
    assert paired == ["seeing.gguf"]


# --- roles ---------------------------------------------------------------------------------------


ROLES = [
    ("a chat model", "chat.gguf", TEXT, Role.TEXT),
    ("pooling none", "chat.gguf", replace(TEXT, pooling=0), Role.TEXT),
    ("called an embedding only", "embedding.gguf", TEXT, Role.TEXT),
    ("called a reranker only", "reranker.gguf", TEXT, Role.TEXT),
    ("pooling mean", "m.gguf", replace(TEXT, pooling=1), Role.EMBEDDING),
    ("pooling cls", "m.gguf", replace(TEXT, pooling=2), Role.EMBEDDING),
    ("pooling last", "qwen3-embedding.gguf", replace(TEXT, pooling=3), Role.EMBEDDING),
    ("a bert", "m.gguf", replace(TEXT, architecture="bert"), Role.EMBEDDING),
    ("pooling left to the caller", "m.gguf",
     replace(TEXT, architecture="nomic-bert", pooling=0), Role.EMBEDDING),
    ("an encoder", "m.gguf", replace(TEXT, architecture="t5encoder"), Role.EMBEDDING),
    ("sees both ways", "m.gguf", replace(TEXT, causal_attention=False), Role.EMBEDDING),
    ("says that it does not", "m.gguf", replace(TEXT, causal_attention=True), Role.TEXT),
    ("a chat model with a telling name", "openPangu-Embedded-7B.gguf",
     replace(TEXT, architecture="pangu-embedded"), Role.TEXT),
    ("pooling rank", "m.gguf", replace(TEXT, pooling=4), Role.RERANKER),
    ("a bert that ranks", "m.gguf",
     replace(TEXT, architecture="bert", pooling=4, classifier=True), Role.RERANKER),
    ("a classifier", "m.gguf",
     replace(TEXT, architecture="bert", classifier=True), Role.RERANKER),
    ("the head of its pre-training", "granite-embedding.gguf",
     replace(TEXT, architecture="modern-bert", pooling=2, classifier=True), Role.EMBEDDING),
    ("a head and a telling name", "bge-reranker-v2.gguf",
     replace(TEXT, architecture="bert", pooling=2, classifier=True), Role.RERANKER),
    ("eagle", "m.gguf", replace(TEXT, architecture="eagle3"), Role.DRAFT),
    ("dflash", "m.gguf", replace(TEXT, architecture="dflash"), Role.DRAFT),
    ("an assistant", "m.gguf", replace(TEXT, architecture="gemma4-assistant"), Role.DRAFT),
    ("a small one for the purpose", "DeepSeek-R1-DRAFT-0.6B-Q4_0.gguf", TEXT, Role.DRAFT),
    ("a large one about drafting", "draft-writer-70b.gguf",
     replace(TEXT, parameters=70_000_000_000), Role.TEXT),
    ("another word", "draftsman.gguf", TEXT, Role.TEXT),
    ("prediction layers alone", "mtp-Q8_0.gguf",
     replace(TEXT, layers=5, block_bytes=(0, 0, 0, 0, 9)), Role.DRAFT),
    ("prediction layers without a trunk, called otherwise", "head.gguf",
     replace(TEXT, layers=5, block_bytes=(0, 0, 0, 0, 9)), Role.DRAFT),
    ("one layer", "mtp-head.gguf", replace(TEXT, layers=1), Role.DRAFT),
    ("a whole model with prediction layers", "Qwen3.5-27B-MTP-Q4_K_M.gguf",
     replace(TEXT, layers=65, block_bytes=(9,) * 65), Role.TEXT),
    ("layers that are called otherwise", "t5.gguf",
     replace(TEXT, architecture="t5", block_bytes=(0, 0)), Role.TEXT),
    ("some layers left out", "nemotron-ultra.gguf",
     replace(TEXT, layers=5, block_bytes=(9, 0, 0, 9, 9)), Role.TEXT),
]  # fmt: skip


@pytest.mark.parametrize(("case", "file", "header", "role"), ROLES, ids=[row[0] for row in ROLES])
def test_a_role_follows_from_the_header(case: str, file: str, header: Header, role: Role) -> None:
    assert role_of(file, header) is role


# --- names ---------------------------------------------------------------------------------------


NAMES = {
    "Qwen2.5-1.5B-Instruct-Q4_K_M.gguf": "qwen2.5-1.5b-instruct-q4_k_m",
    "UPPER.GGUF": "upper",
    "Größe Modèle é.gguf": "gro-e-modele-e",
    "ﬁne-①.gguf": "fine-1",
    "a  b -- c.gguf": "a-b-c",
    "-_.x._-.gguf": "x",
    "../../etc/passwd.gguf": "passwd",
    "..gguf": "some-model-gguf",
    ".gguf": "some-model-gguf",
    "模型.gguf": "some-model-gguf",
    "a\nb\r[program:x]\ncommand=rm.gguf": "a-b-program-x-command-rm",
    "%(here)s ; x # y.gguf": "here-s-x-y",
    "\udcff\udcfe-q4.gguf": "q4",
    "x\u202egnp.gguf": "x-gnp",
    "all.gguf": "all-q4_k_m",
    "Synapse.gguf": "synapse-q4_k_m",
    "gateway.gguf": "gateway-q4_k_m",
    "discover.gguf": "discover-q4_k_m",
    "supervisord.gguf": "supervisord-q4_k_m",
    "x" * 300 + "-Q4_K_M.gguf": "x" * 56 + "-q4_k_m",
    "x" * 300 + ".gguf": "x" * 63,
    "w-" * 150 + "Q4_K_M.gguf": "w-" * 27 + "w-q4_k_m",
}


@pytest.mark.parametrize("file", NAMES)
def test_a_program_is_called_after_its_file(file: str) -> None:
    assert only(build_catalog([hub(file)], {})).name == NAMES[file]


def test_where_nothing_is_left_of_a_name_it_is_called_model() -> None:
    assert only(build_catalog([hub("模型.gguf", repo="所有/者")], {})).name == "model"


def _named(files: list[FoundFile], names: dict[str, str]) -> dict[str, str]:
    return {model.key: model.name for model in build_catalog(files, names).models}


def test_quantizations_that_only_folders_keep_apart_are_told_by_their_headers() -> None:
    files = [
        hub(f"{q}/model.gguf", replace(TEXT, quantization=q)) for q in ("Q4_K_M", "Q8_0", "BF16")
    ]
    assert sorted(_named(files, {}).values()) == ["model-bf16", "model-q4_k_m", "model-q8_0"]


def test_models_of_one_name_are_told_apart_by_their_owners() -> None:
    files = [hub("m-Q4_K_M.gguf", repo=f"{owner}/m") for owner in ("Bartowski", "unsloth")]
    assert sorted(_named(files, {}).values()) == ["bartowski-m-q4_k_m", "unsloth-m-q4_k_m"]


def test_models_in_folders_are_told_apart_by_these() -> None:
    files = [local(f"/models/{folder}/m-Q4_K_M.gguf") for folder in ("one", "two")]
    assert sorted(_named(files, {}).values()) == ["one-m-q4_k_m", "two-m-q4_k_m"]


def test_what_nothing_tells_apart_gets_a_hash_and_keeps_it() -> None:
    files = [hub("m-Q4_K_M.gguf", repo=f"owner/{n}") for n in range(50)]
    names = _named(files, {})
    assert len(set(names.values())) == 50
    assert all(name.startswith("m-q4_k_m-") for name in names.values())
    assert _named(files[:7], {}).items() <= names.items()


def test_a_hash_leaves_room_for_the_quantization_of_a_long_name() -> None:
    files = [hub("x" * 90 + "-Q4_K_M.gguf", repo=f"owner/{n}") for n in range(2)]
    for name in _named(files, {}).values():
        assert len(name) == 63
        assert name[:-6].endswith("x-q4_k_m-")


def test_a_model_keeps_its_name_when_a_rival_comes() -> None:
    old, rival = hub("m.gguf", repo="zed/m"), hub("m.gguf", repo="abe/m")
    before = _named([old], {})
    after = _named([rival, old], before)
    assert after == before | {"hf:abe/m:m.gguf": "m-q4_k_m"}
    assert _named([old, rival], after) == after


def test_a_model_that_is_away_finds_its_name_free() -> None:
    old, rival = hub("m.gguf", repo="zed/m"), hub("m.gguf", repo="abe/m")
    names = _named([old], {})
    names |= _named([rival], names)
    assert _named([old, rival], names) == names
    assert len(set(names.values())) == 2


@pytest.mark.parametrize("bad", ["all", "", "Upper", "a b", "a\n", "-x", "x" * 64, "supervisord"])
def test_an_earlier_name_that_may_not_be_is_given_up(bad: str) -> None:
    file = hub("m.gguf")
    assert _named([file], {f"hf:{REPO}:m.gguf": bad}) == {f"hf:{REPO}:m.gguf": "m"}


def test_of_two_models_with_one_earlier_name_one_keeps_it() -> None:
    files = [hub("a.gguf"), hub("b.gguf")]
    keys = [f"hf:{REPO}:{letter}.gguf" for letter in "ab"]
    assert _named(files, dict.fromkeys(keys, "same")) == {keys[0]: "same", keys[1]: "b"}


def test_a_revision_is_no_part_of_a_key() -> None:
    file = hub("m.gguf")
    moved = replace(
        file, path=file.path.replace("/abc/", "/def/"), identity=FileIdentity(1, 9, 9, 9)
    )
    assert _named([file], {}) == _named([moved], {})


def test_different_files_never_share_a_key() -> None:
    files = [
        hub("c.gguf", repo="a/b"),
        hub("b:c.gguf", repo="a"),
        hub("c.gguf", repo="a:b"),
        hub("c.gguf", repo="a\\x3ab"),
        hub("b/c.gguf", repo="a"),
        hub("é.gguf"),
        hub("\\xe9.gguf"),
        hub("\udce9.gguf"),
        local("/models/c.gguf"),
    ]
    catalog = build_catalog(files, {})
    assert len(catalog.models) == len(files)
    assert catalog.problems == ()


# --- what comes from outside ---------------------------------------------------------------------


def test_text_from_outside_is_printable_ascii_and_short() -> None:
    shown = printable("/models/\x1b[31m\u202e\udcff\n" + "x" * 4000 + "/end.gguf")
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) == 200
    assert shown.startswith("/models/\\x1b[31m\\u202e\\udcff\\n")
    assert shown.endswith("/end.gguf")


_PIECES = [
    "\n", "\r", "\r\n", "]", "[", "[program:x]", "%(here)s", "%(ENV_HOME)s", "%%", " ;", " #", '"',
    "'", "`", "$(x)", "\\", "..", "../", "/", "//", "\udcff", "\udc80\udcfe", "\x00", "\x1b[2J",
    "\u202e", "\u2028", "all", "synapse", "mmproj-", "-00001-of-00002", "-00002-of-00002",
    "-00000-of-00000", "-99999-of-99999", "draft", "mtp", "Q4_K_M", "é", "ﬃ", "模型", "😀", ":",
    "=", " ", "\t", ".gguf", ".GGUF", "-", "_", ".", "x" * 4000, "é" * 4000, "\udcff" * 4000,
]  # fmt: skip


def _fuzzed(count: int, seed: int) -> Iterator[FoundFile]:
    """Files of hostile names, in repos of hostile names, saying any of what headers say."""
    chance = random.Random(seed)

    def name(most: int) -> str:
        return "".join(chance.choices(_PIECES, k=chance.randint(0, most)))

    for inode in range(1, count + 1):
        index, parts = chance.choice([(0, 0), (0, 0), (0, 2), (1, 2), (3, 0)])
        header = chance.choice([TEXT, TEXT, PROJECTOR, None, replace(TEXT, architecture="bert")])
        if header is not None:
            header = replace(header, split_index=index, split_count=parts)
        file, repo = name(4) + ".gguf", chance.choice([None, name(3), "owner/repo"])
        path = f"/cache/{repo or ''}/{file}"
        yield FoundFile(repo, file, path, FileIdentity(1, inode, 9, 9), 9, header)


def _assert_sound(catalog: Catalog) -> None:
    names = [model.name for model in catalog.models]
    assert all(PROGRAM_NAME.fullmatch(name) for name in names)
    assert len(set(names)) == len(names)
    assert RESERVED_NAMES.isdisjoint(names)
    assert len({model.key for model in catalog.models}) == len(names)
    for model in catalog.models:
        for text in (model.key, model.repo or "", model.file):
            assert text.isascii()
            assert text.isprintable()
    for problem in catalog.problems:
        assert str(problem).isascii()
        assert str(problem).isprintable()
        assert len(str(problem)) < 1000


def test_ten_thousand_hostile_names_harm_nothing_and_take_seconds_at_most() -> None:
    """A thousand files at a time, as a folder might hold them, ten times; then all at once."""
    everything: list[FoundFile] = []
    for seed in range(10):
        files = list(_fuzzed(1000, seed))
        before = time.process_time()
        catalog = build_catalog(files, {})
        assert time.process_time() - before < 2
        assert catalog.models
        assert catalog.problems
        _assert_sound(catalog)
        everything += [
            replace(file, identity=FileIdentity(seed, file.identity.inode, 9, 9)) for file in files
        ]
    _assert_sound(build_catalog(everything, {}))


_TEXTS = st.one_of(
    st.sampled_from(_PIECES),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=30),
    st.lists(st.sampled_from(_PIECES[:-3]), max_size=4).map("".join),
)
_HEADERS = st.builds(
    Header,
    kind=st.sampled_from(FileKind),
    architecture=st.sampled_from(["", "llama", "bert", "eagle3", "clip"]),
    quantization=st.sampled_from(["unknown", "Q4_K_M", "F16"]) | st.text(max_size=80),
    layers=st.integers(0, 5),
    embedding_length=st.sampled_from([0, 64]),
    projection_dim=st.sampled_from([0, 64]),
    pooling=st.sampled_from([None, 0, 1, 4, 77]),
    causal_attention=st.sampled_from([None, True, False]),
    classifier=st.booleans(),
    split_index=st.integers(0, 2),
    split_count=st.integers(0, 3),
    block_bytes=st.lists(st.integers(0, 2), max_size=4).map(tuple),
)
_FILES = st.builds(
    lambda repo, folder, stem, part, inode, header, blob: FoundFile(
        repo,
        f"{folder}{stem}{part}.gguf",
        f"/r/{repo or ''}/{folder}{stem}{part}.gguf",
        FileIdentity(1, inode, 9, 9),
        9,
        header,
        blob,
    ),
    repo=st.none() | st.sampled_from(["a/b", "a/c", "a"]) | _TEXTS,
    folder=st.sampled_from(["", "q4/", "q8/"]),
    stem=st.sampled_from(["m", "model-Q4_K_M", "mmproj", "all", "a-m"]) | _TEXTS,
    part=st.sampled_from(["", "", "-00001-of-00002", "-00002-of-00002", "-00001-of-00001"]),
    inode=st.integers(1, 30),
    header=st.none() | _HEADERS,
    blob=st.none() | st.sampled_from(["e" * 64, "f" * 64]),
)
_EARLIER = st.dictionaries(
    st.sampled_from(["hf:a/b:m.gguf", "hf:a/c:m.gguf", "file:/r//m.gguf"]) | _TEXTS,
    st.sampled_from(["m", "all", "a-m", "M", ""]) | _TEXTS,
    max_size=4,
)


# One path has one content.
_LISTS = st.lists(_FILES, max_size=12, unique_by=lambda file: file.path)


@given(files=_LISTS, names=_EARLIER, seed=st.integers())
def test_any_files_in_any_order_make_one_sound_catalog(
    files: list[FoundFile], names: dict[str, str], seed: int
) -> None:
    catalog = build_catalog(files, names)
    _assert_sound(catalog)
    shuffled = random.Random(seed).sample(files, len(files))
    assert build_catalog(shuffled, names) == catalog


@given(files=st.lists(_FILES, max_size=12), names=_EARLIER)
def test_looking_again_changes_nothing(files: list[FoundFile], names: dict[str, str]) -> None:
    catalog = build_catalog(files, names)
    kept = names | {model.key: model.name for model in catalog.models}
    assert build_catalog(files, kept).models == catalog.models


@given(files=st.lists(_FILES, max_size=12), count=st.integers(0, 12))
def test_a_model_keeps_its_name_whatever_comes_beside_it(
    files: list[FoundFile], count: int
) -> None:
    before = {model.key: model.name for model in build_catalog(files[:count], {}).models}
    after = {model.key: model.name for model in build_catalog(files, before).models}
    assert all(after.get(key, name) == name for key, name in before.items())
