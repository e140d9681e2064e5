"""Real folders are looked through, and only what is broken is left out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.adapters import gguf_header, hfcache
from supervisor_synapse.adapters.header_cache import HeaderCache, identity_of
from supervisor_synapse.adapters.hfcache import Limits, Scan
from supervisor_synapse.core.catalog import build_catalog
from supervisor_synapse.core.model import FileIdentity, FileKind, Header, Problem, Role
from supervisor_synapse.errors import CatalogError
from tests.gguf_factory import (
    HubCache,
    hub_cache,
    write_adapter,
    write_embedding,
    write_model,
    write_projector,
    write_split,
)

REPO = "owner/Model-GGUF"


class Reads:
    """Reads headers, and remembers which."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, path: str) -> Header:
        self.paths.append(path)
        return gguf_header.read(path)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return hub_cache(tmp_path / "hub")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> None:
    """What discovery imports only when it is needed."""
    cache = hub_cache(tmp_path_factory.mktemp("hub"))
    cache.add(REPO, {"a.gguf": model.read_bytes(), "b.gguf": model.read_bytes() + b"\0"})
    assert len(names(look([cache.root], headers=HeaderCache(cache.root / "headers.json")))) == 2


def look(
    caches: Sequence[Path] = (),
    folders: Sequence[Path] = (),
    headers: HeaderCache | None = None,
    limits: Limits | None = None,
) -> Scan:
    """The default cache of whoever runs the tests is never looked through."""
    assert caches or folders
    nowhere = [tempfile.gettempdir() + "/" + "none" * 8] if not caches else []
    found = hfcache.scan(
        [*map(str, caches), *nowhere],
        [str(path) for path in folders],
        headers or HeaderCache(),
        limits or Limits(),
    )
    problems = [p for p in found.problems if not nowhere or p.subject != nowhere[0]]
    return Scan(found.files, tuple(problems))


def names(found: Scan) -> list[str]:
    """What is found and has a header, by repo and file."""
    return sorted(f"{file.repo or ''}:{file.file}" for file in found.files if file.header)


def only(found: Scan) -> Problem:
    (problem,) = found.problems
    assert problem.remedy
    return problem


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder in which permissions count: root becomes nobody for the block.

    Nobody may not be able to import anything: see `imported`.
    """
    path = Path(tempfile.mkdtemp(prefix="synapse-test-"))
    path.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(path, 65534, 65534)
            os.seteuid(65534)
        yield path
    finally:
        if root:
            os.seteuid(0)
        for parent, folders, _ in os.walk(path):
            for name in folders:
                os.chmod(f"{parent}/{name}", 0o700)
        shutil.rmtree(path)


# --- hub caches ----------------------------------------------------------------------------------


def test_a_cache_with_everything_in_it_yields_exactly_the_right_models(
    cache: HubCache, tmp_path: Path
) -> None:
    shards = write_split(tmp_path, "big-Q4_K_M", 2, file_type="Q4_K_M")
    seeing = write_model(tmp_path / "seeing.gguf", embedding=128)
    cache.add("owner/text-GGUF", {"text-F16.gguf": write_model(tmp_path / "a.gguf", seed=1)})
    cache.add("owner/big-GGUF", {f"Q4_K_M/{shard.name}": shard for shard in shards})
    cache.add("owner/embed-GGUF", {"embed-F16.gguf": write_embedding(tmp_path / "e.gguf")})
    cache.add("owner/vision-GGUF", {
        "vision-F16.gguf": seeing,
        "mmproj-F16.gguf": write_projector(tmp_path / "p.gguf", 128),
        "lora.gguf": write_adapter(tmp_path / "l.gguf"),
        "README.md": b"read me",
    })  # fmt: skip
    cache.add_incomplete("owner/broken-GGUF", "broken-Q4_K_M.gguf")
    cache.add_dangling("owner/gone-GGUF", "gone-Q4_K_M.gguf")
    found = look([cache.root])
    catalog = build_catalog(found.files, {})
    assert {(m.name, m.role, len(m.shards), bool(m.projector)) for m in catalog.models} == {
        ("text-f16", Role.TEXT, 0, False),
        ("big-q4_k_m", Role.TEXT, 2, False),
        ("embed-f16", Role.EMBEDDING, 0, False),
        ("vision-f16", Role.VISION, 0, True),
    }
    assert catalog.problems == ()
    assert [(problem.subject, problem.remedy.partition(":")[0]) for problem in found.problems] == [
        ("owner/broken-GGUF", "`synapse pull owner/broken-GGUF"),
        ("owner/gone-GGUF/gone-Q4_K_M.gguf", "`hf download owner/gone-GGUF gone-Q4_K_M.gguf`"),
    ]


def test_a_file_is_known_by_its_place_in_the_snapshot_and_its_blob(
    cache: HubCache, model: Path
) -> None:
    link = cache.add(REPO, {"sub/m.gguf": model})["sub/m.gguf"]
    (file,) = look([cache.root]).files
    assert (file.repo, file.file, file.path) == (REPO, "sub/m.gguf", str(link))
    assert file.identity == identity_of(link.stat())
    assert file.size_bytes == model.stat().st_size
    assert file.header == gguf_header.read(model)
    assert file.blob == link.resolve().name


def test_a_broken_file_does_not_drop_its_repo(cache: HubCache, model: Path) -> None:
    """huggingface_hub drops a repo for one dangling link."""
    cache.add(REPO, {"good.gguf": model})
    cache.add_dangling(REPO, "gone.gguf")
    assert not scan_cache_dir(cache.root).repos
    found = look([cache.root])
    assert names(found) == [f"{REPO}:good.gguf"]
    assert only(found).subject == f"{REPO}/gone.gguf"
    assert "leads nowhere" in only(found).reason


def test_a_header_that_cannot_be_read_costs_only_its_file(cache: HubCache, model: Path) -> None:
    cache.add(REPO, {"good.gguf": model, "cut.gguf": model.read_bytes()[:1000], "empty.gguf": b""})
    found = look([cache.root])
    assert names(found) == [f"{REPO}:good.gguf"]
    assert [(problem.subject, "truncated" in problem.reason) for problem in found.problems] == [
        (f"{REPO}/cut.gguf", True),
        (f"{REPO}/empty.gguf", True),
    ]


def test_of_two_revisions_the_one_that_main_names_is_served(
    cache: HubCache, tmp_path: Path
) -> None:
    """Also where it is the older one; a file that only the other has is reported."""
    new = cache.add(
        REPO, {"m.gguf": write_model(tmp_path / "2.gguf", seed=2)}, revision="new", ref=None
    )
    extra = write_model(tmp_path / "3.gguf", seed=3)
    cache.add(REPO, {"extra.gguf": extra, "other.gguf": extra}, revision="new", ref=None)
    old = cache.add(REPO, {"m.gguf": write_model(tmp_path / "1.gguf", seed=1)}, revision="old")
    assert new["m.gguf"].resolve() != old["m.gguf"].resolve()
    found = look([cache.root])
    assert [file.path for file in found.files] == [str(old["m.gguf"])]
    assert only(found).subject == f"{REPO}/extra.gguf"
    assert "only in another revision" in only(found).reason
    assert "and 1 more" in only(found).reason


@pytest.mark.parametrize("main", [None, "gone", "../../x", "\xff"])
def test_of_two_revisions_without_a_main_the_newest_is_served(
    cache: HubCache, tmp_path: Path, main: str | None
) -> None:
    """Two of these make huggingface_hub drop the repo, or the whole cache."""
    for age, revision in enumerate(["c", "a", "b"]):
        model = write_model(tmp_path / f"{age}.gguf", seed=age)
        cache.add(REPO, {"m.gguf": model}, revision=revision, ref=None)
        os.utime(cache.snapshot(REPO, revision), (1e9 - age, 1e9 - age))
    if main is not None:
        (cache.repo(REPO) / "refs").mkdir()
        (cache.repo(REPO) / "refs" / "main").write_bytes(main.encode("latin-1"))
    found = look([cache.root])
    assert [file.path for file in found.files] == [str(cache.snapshot(REPO, "c") / "m.gguf")]


def test_what_huggingface_hub_finds_wrong_with_a_repo_is_reported(
    cache: HubCache, model: Path
) -> None:
    cache.add(REPO, {"m.gguf": model})
    cache.point(REPO, "pr/1", "elsewhere")
    found = look([cache.root])
    assert names(found) == [f"{REPO}:m.gguf"]
    assert only(found).subject == REPO
    assert "missing commit hashes" in only(found).reason


def test_what_is_not_for_llama_cpp_is_passed_over_in_silence(cache: HubCache, model: Path) -> None:
    """Broken or not: datasets, other formats, locks, hidden files, files of the cache itself."""
    cache.add("owner/safetensors", {"model.safetensors": b"x", "._m.gguf": b"x"})
    cache.add_dangling("owner/safetensors", "model-2.safetensors")
    (cache.repo("owner/safetensors") / "blobs" / ("e" * 64 + ".incomplete")).write_bytes(b"x")
    cache.add("owner/data", {"m.gguf": model})
    cache.repo("owner/data").rename(cache.root / "datasets--owner--data")
    (cache.root / ".locks").mkdir()
    (cache.root / "version.txt").write_text("1")
    (cache.root / "models--owner--nothing" / "refs").mkdir(parents=True)
    assert look([cache.root]) == Scan((), ())


UNFINISHED: list[tuple[str, bytes, bytes | None, int]] = [
    # repo, partial blob, finished file beside it, reported
    ("owner/x-GGUF", b"", b"x", 1),
    ("owner/x", b"GGUF", b"x", 1),
    ("owner/x", b"\0\0\0\0", None, 1),
    ("owner/x", b"\0\0\0\0", b"x", 0),
]


@pytest.mark.parametrize(("repo", "partial", "other", "reported"), UNFINISHED)
def test_a_partial_download_is_reported_where_it_may_be_a_model(
    cache: HubCache, repo: str, partial: bytes, other: bytes | None, reported: int
) -> None:
    cache.add_incomplete(repo, "m.gguf", partial)
    if other is not None:
        cache.add(repo, {"config.json": other})
    assert len(look([cache.root]).problems) == reported


def test_the_rest_of_a_download_that_was_finished_later_is_nothing_to_report(
    cache: HubCache, model: Path
) -> None:
    blob = cache.add(REPO, {"m.gguf": model})["m.gguf"].resolve()
    blob.with_name(f"{blob.name}.1f2e3d.incomplete").write_bytes(b"GGUF")
    found = look([cache.root])
    assert (names(found), found.problems) == ([f"{REPO}:m.gguf"], ())


def test_a_link_that_leaves_the_cache_is_not_followed(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    cache.add(REPO, {"good.gguf": model})
    secret = shutil.copy(model, tmp_path / "secret.gguf")
    (cache.snapshot(REPO) / "out.gguf").symlink_to(secret)
    reads = Reads()
    found = look([cache.root], headers=HeaderCache(read=reads))
    assert names(found) == [f"{REPO}:good.gguf"]
    assert str(secret) in only(found).reason
    assert "leads out of the cache" in only(found).reason
    assert len(reads.paths) == 1


def test_a_repo_that_is_a_link_out_of_the_cache_is_not_followed(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    cache.add(REPO, {"m.gguf": model})
    moved = cache.repo(REPO).rename(tmp_path / "moved")
    cache.repo(REPO).symlink_to(moved)
    assert "leads out of the cache" in only(look([cache.root])).reason


def test_a_folder_beside_the_cache_whose_name_begins_like_its_is_out_of_it(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    cache.add(REPO, {})
    cache.snapshot(REPO).mkdir(parents=True)
    (tmp_path / "hub2").mkdir()
    (cache.snapshot(REPO) / "m.gguf").symlink_to(shutil.copy(model, tmp_path / "hub2" / "m.gguf"))
    assert "leads out of the cache" in only(look([cache.root])).reason


def test_a_cache_that_is_itself_reached_by_a_link_is_looked_through(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    cache.add(REPO, {"m.gguf": model})
    (tmp_path / "link").symlink_to(cache.root)
    found = look([tmp_path / "link"])
    assert (names(found), found.problems) == ([f"{REPO}:m.gguf"], ())


def test_blobs_that_repos_share_are_served_once(cache: HubCache, model: Path) -> None:
    """huggingface_hub may keep the content in a store of the cache, and link each repo's to it."""
    store = cache.root / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    (cache.root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    shutil.copy(model, store)
    for repo in (REPO, "zed/copy"):
        blob = cache.add(repo, {"m.gguf": model})["m.gguf"].resolve()
        blob.unlink()
        blob.symlink_to(os.path.relpath(store, blob.parent))
    reads = Reads()
    found = look([cache.root], headers=HeaderCache(read=reads))
    assert names(found) == [f"{REPO}:m.gguf", "zed/copy:m.gguf"]
    assert {file.blob for file in found.files} == {store.name}
    assert found.problems == ()
    assert len(reads.paths) == 1
    assert [m.repo for m in build_catalog(found.files, {}).models] == [REPO]


def test_one_content_in_two_caches_is_one_model(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    second = hub_cache(tmp_path / "second")
    cache.add(REPO, {"m.gguf": model})
    second.add("zed/copy", {"m.gguf": model.read_bytes()})
    found = look([cache.root, second.root])
    assert len(found.files) == 2
    assert [m.repo for m in build_catalog(found.files, {}).models] == [REPO]


# --- caches and folders that are not there -------------------------------------------------------


def test_a_cache_that_was_named_and_is_missing_is_reported(tmp_path: Path, model: Path) -> None:
    cache = hub_cache(tmp_path / "hub")
    cache.add(REPO, {"m.gguf": model})
    found = look([tmp_path / "none", cache.root])
    assert names(found) == [f"{REPO}:m.gguf"]
    assert only(found).subject == str(tmp_path / "none")
    assert "No such file" in only(found).reason
    assert "cache_dirs" in only(found).remedy


@pytest.mark.parametrize("bad", ["file", "file/below", "nul\0nul", "loop", "x" * 300, "y/" * 3000])
def test_a_place_that_cannot_be_a_folder_is_reported(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for found in (look([tmp_path / bad]), look(folders=[tmp_path / bad])):
        assert found.files == ()
        assert str(only(found)).isprintable()
        assert len(only(found).subject) <= 200


def _in_fresh_process(code: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"],
        env=os.environ | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def test_the_default_cache_is_huggingface_hubs_own_and_may_be_missing(
    cache: HubCache, model: Path, tmp_path: Path
) -> None:
    cache.add(REPO, {"m.gguf": model})
    code = (
        "from supervisor_synapse.adapters import hfcache\n"
        "from supervisor_synapse.adapters.header_cache import HeaderCache\n"
        "found = hfcache.scan([], [], HeaderCache())\n"
        "print(json.dumps([hfcache.default_cache_dir(), len(found.files), len(found.problems)]))"
    )
    there, missing = str(cache.root), str(tmp_path / "home" / "hub")
    assert _in_fresh_process(code, HF_HUB_CACHE=there) == [there, 1, 0]
    environment = {"HF_HOME": str(tmp_path / "home")}
    assert _in_fresh_process(f"import os; os.environ.pop('HF_HUB_CACHE', 0)\n{code}",
                             **environment) == [missing, 0, 0]  # fmt: skip


def test_where_nothing_is_to_be_read_nothing_slow_is_imported(folder: Path) -> None:
    code = (
        "import sys\n"
        "from supervisor_synapse.adapters import hfcache\n"
        "from supervisor_synapse.adapters.header_cache import HeaderCache\n"
        f"hfcache.scan([{str(folder)!r}], [{str(folder)!r}], HeaderCache())\n"
        "slow = ['pydantic', 'huggingface_hub.utils', 'gguf', 'numpy', 'concurrent.futures']\n"
        "print(json.dumps([name for name in slow if name in sys.modules]))"
    )
    assert _in_fresh_process(code) == []


# --- model directories ---------------------------------------------------------------------------


def test_a_folder_is_looked_through_to_its_depths_whatever_the_case(
    folder: Path, model: Path
) -> None:
    for name in ("a.gguf", "pub/repo/B.GGUF", "pub/repo/q4/c.gguf", "pub/notes.txt", "d.gguf.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model, folder / name)
    found = look(folders=[folder])
    assert names(found) == [":a.gguf", ":pub/repo/B.GGUF", ":pub/repo/q4/c.gguf"]
    assert [file.path for file in found.files] == [str(folder / f.file) for f in found.files]
    assert {file.blob for file in found.files} == {None}
    assert found.problems == ()


def test_hidden_files_and_folders_are_passed_over(folder: Path, model: Path) -> None:
    for name in (".cache/huggingface/m.gguf", "._m.gguf", ".m.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model, folder / name)
    assert look(folders=[folder]) == Scan((), ())


def test_a_link_to_a_file_elsewhere_is_followed_from_a_folder(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    (folder / "m.gguf").symlink_to(model)
    found = look(folders=[folder])
    assert [file.path for file in found.files] == [str(folder / "m.gguf")]
    assert found.files[0].identity == identity_of(model.stat())
    assert found.problems == ()


def test_links_to_folders_are_never_followed(folder: Path, model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(model, outside / "m.gguf")
    (folder / "out").symlink_to(outside)
    (folder / "sub").mkdir()
    shutil.copy(model, folder / "sub" / "m.gguf")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "same").symlink_to("sub")
    found = look(folders=[folder])
    assert names(found) == [":sub/m.gguf"]
    assert only(found).subject == str(folder / "out")
    assert str(outside) in only(found).reason


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _loop, _dangling, _device, Path.touch])
def test_what_is_called_a_model_and_is_none_is_reported(
    folder: Path, model: Path, make: Callable[[Path], None]
) -> None:
    make(folder / "bad.gguf")
    shutil.copy(model, folder / "good.gguf")
    found = look(folders=[folder])
    assert names(found) == [":good.gguf"]
    assert only(found).subject == str(folder / "bad.gguf")


def test_a_folder_called_like_a_model_is_a_folder(folder: Path, model: Path) -> None:
    (folder / "m.gguf").mkdir()
    shutil.copy(model, folder / "m.gguf" / "m.gguf")
    found = look(folders=[folder])
    assert (names(found), found.problems) == ([":m.gguf/m.gguf"], ())


def test_a_folder_that_is_too_deep_is_left_and_named(folder: Path, model: Path) -> None:
    (folder / "1/2/3").mkdir(parents=True)
    shutil.copy(model, folder / "1/2/near.gguf")
    shutil.copy(model, folder / "1/2/3/far.gguf")
    found = look(folders=[folder], limits=Limits(depth=2))
    assert names(found) == [":1/2/near.gguf"]
    assert only(found).subject == str(folder / "1/2")


def test_a_folder_with_too_much_in_it_is_left_and_named(folder: Path, model: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        shutil.copy(model, folder / name / "m.gguf")
    for number in range(10):
        (folder / "b" / f"{number}.txt").touch()
    found = look(folders=[folder], limits=Limits(entries=10))
    assert names(found) == [":a/m.gguf"]
    assert str(folder / "b") in only(found).reason


# --- permissions ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("imported")
def test_an_unreadable_repo_costs_only_itself(model: Path) -> None:
    """huggingface_hub's scan fails as a whole."""
    content = model.read_bytes()
    with unprivileged() as path:
        cache = hub_cache(path / "hub")
        for repo in ("owner/a-GGUF", "owner/b-GGUF", "owner/c-GGUF"):
            cache.add(repo, {"m.gguf": content})
        cache.repo("owner/a-GGUF").chmod(0)
        (cache.repo("owner/b-GGUF") / "blobs").chmod(0)
        found = look([cache.root])
    assert names(found) == ["owner/c-GGUF:m.gguf"]
    assert [("Permission denied" in p.reason, "chmod" in p.remedy) for p in found.problems] == [
        (True, True),
        (True, True),
    ]


@pytest.mark.usefixtures("imported")
def test_an_unreadable_file_is_reported_and_served_once_it_can_be_read(model: Path) -> None:
    """Permissions change without a trace in what a header is remembered by."""
    content = model.read_bytes()
    with unprivileged() as path:
        folder, kept = path / "models", path / "headers.json"
        (folder / "closed").mkdir(parents=True)
        for name in ("m.gguf", "n.gguf", "closed/m.gguf"):
            (folder / name).write_bytes(content)
        (folder / "m.gguf").chmod(0)
        (folder / "closed").chmod(0)
        before = look(folders=[folder], headers=HeaderCache(kept))
        (folder / "m.gguf").chmod(0o600)
        (folder / "closed").chmod(0o700)
        after = look(folders=[folder], headers=HeaderCache(kept))
    assert names(before) == [":n.gguf"]
    assert sorted(problem.subject for problem in before.problems) == [
        str(folder / "closed"),
        str(folder / "m.gguf"),
    ]
    assert all("chmod" in problem.remedy for problem in before.problems)
    assert names(after) == [":closed/m.gguf", ":m.gguf", ":n.gguf"]
    assert after.problems == ()


def test_a_file_that_goes_while_it_is_looked_at_costs_only_itself(
    folder: Path, model: Path
) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(model, folder / name)

    def read(path: str) -> Header:
        if path.endswith("a.gguf"):
            os.unlink(path)
        return gguf_header.read(path)

    found = look(folders=[folder], headers=HeaderCache(read=read))
    assert names(found) == [":b.gguf"]
    assert only(found).subject == str(folder / "a.gguf")


# --- hostile names -------------------------------------------------------------------------------


HOSTILE = [
    b"a\nb.gguf", b"a\rb.gguf", b"a]b[program x].gguf", b"%(here)s.gguf", b"a ; b # c.gguf",
    b"a\"b'c`d$(e).gguf", b"...gguf", b"..x.gguf", b"-rf.gguf", b"\xff\xfe.gguf", b"\xc3(.gguf",
    "é 模型 \u202e\u2028😀.gguf".encode(), b"all.gguf", b"\x1b[2J\x07.gguf", b"\\n.gguf", b" .gguf",
    b"x" * 250 + b".gguf",
]  # fmt: skip


def test_hostile_names_are_served_or_passed_over_and_shown_in_plain_ascii(
    cache: HubCache, model: Path, folder: Path
) -> None:
    repo = cache.add(REPO, {"m.gguf": model})["m.gguf"].parent
    for name in map(os.fsdecode, HOSTILE):
        shutil.copy(model, f"{folder}/{name}")
        os.symlink("nowhere", f"{folder}/d{name[-240:]}")
        os.link(os.path.realpath(repo / "m.gguf"), f"{repo}/{name}")
        shutil.copytree(cache.repo(REPO), f"{cache.root}/models--{name[:200]}", symlinks=True)
    found = look([cache.root], [folder])
    visible = [name for name in HOSTILE if not name.startswith(b".")]
    served = [file for file in found.files if file.repo is None and file.header]
    assert len(served) == len(visible)
    assert len([file for file in found.files if file.repo == REPO]) == len(visible) + 1
    assert len({file.repo for file in found.files}) == len(HOSTILE) + 2
    assert len(found.problems) == len(HOSTILE)  # each dangling link, whose name is not hidden
    for problem in [*found.problems, *build_catalog(found.files, {}).problems]:
        assert str(problem).isascii()
        assert str(problem).isprintable()


def test_paths_longer_than_the_system_takes_are_reported(folder: Path, model: Path) -> None:
    """Folders can be nested beyond PATH_MAX by whoever goes down step by step."""
    shutil.copy(model, folder / "near.gguf")
    descriptor = os.open(folder, os.O_RDONLY)
    for depth in range(1, 21):
        os.mkdir("d" * 250, dir_fd=descriptor)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
        if depth == 14:
            target = os.open("far.gguf", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=descriptor)
            os.write(target, model.read_bytes())
            os.close(target)
    os.close(descriptor)
    found = look(folders=[folder], limits=Limits(depth=100))
    shutil.rmtree(folder)
    assert [len(file.file) for file in found.files if file.header] == [
        len("near.gguf"),
        251 * 14 + 8,
    ]
    assert "File name too long" in only(found).reason
    assert len(only(found).subject) == 200


# --- headers that are remembered -----------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "headers.json"


def _identity(path: Path) -> FileIdentity:
    return identity_of(path.stat())


def _remember(kept: Path, *files: Path) -> Reads:
    """One run that reads `files`; which of them were really read."""
    reads = Reads()
    headers = HeaderCache(kept, reads)
    for file in files:
        with contextlib.suppress(CatalogError):
            headers.header(str(file), _identity(file))
    assert headers.save() is None
    return reads


def test_a_header_is_read_once_as_long_as_its_file_stays_the_same(model: Path, kept: Path) -> None:
    assert len(_remember(kept, model, model).paths) == 1
    written = kept.stat()
    assert _remember(kept, model).paths == []
    assert HeaderCache(kept).header("unused", _identity(model)) == gguf_header.read(model)
    assert kept.stat().st_ino == written.st_ino  # nothing new, nothing written
    assert stat.S_IMODE(written.st_mode) == 0o600


def test_a_file_that_changed_is_read_anew(tmp_path: Path, kept: Path) -> None:
    path = write_model(tmp_path / "m.gguf", seed=1)
    _remember(kept, path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert len(_remember(kept, path).paths) == 1
    write_model(path, layers=3)
    assert len(_remember(kept, path).paths) == 1


def test_what_a_run_does_not_see_is_forgotten(tmp_path: Path, kept: Path) -> None:
    paths = [write_model(tmp_path / f"{n}.gguf", seed=n) for n in range(2)]
    _remember(kept, *paths)
    assert _remember(kept, paths[0]).paths == []
    assert _remember(kept, *paths).paths == [str(paths[1])]


def test_why_a_file_has_no_header_is_remembered(tmp_path: Path, kept: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUX")
    assert len(_remember(kept, path).paths) == 1
    assert _remember(kept, path).paths == []
    with pytest.raises(CatalogError, match="not a GGUF file: it begins with 'GGUX'"):
        HeaderCache(kept).header(str(path), _identity(path))


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, kept: Path) -> None:
    path = write_model(tmp_path / "m.gguf")

    def read(name: str) -> Header:
        header = gguf_header.read(name)
        os.utime(name, ns=(1, 1))
        return header

    headers = HeaderCache(kept, read)
    before = _identity(path)
    headers.header(str(path), before)
    assert not headers.knows(before)
    assert headers.save() is None
    assert not kept.exists()


def _entries(kept: Path) -> Any:
    return json.loads(kept.read_text())["files"]


def _rewrite(kept: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(kept.read_text())
    change(value)
    kept.write_text(json.dumps(value))


def _set_field(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda kept: kept["files"][0][4].update({name: value})


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no list of files": lambda kept: kept.update(files={}),
    "no files": lambda kept: kept.pop("files"),
    "an entry that is none": lambda kept: kept["files"].append(7),
    "an empty entry": lambda kept: kept["files"].append([]),
    "a short entry": lambda kept: kept["files"][0].pop(0),
    "a long entry": lambda kept: kept["files"][0].insert(0, 1),
    "an identity of text": lambda kept: kept["files"][0].__setitem__(0, "1"),
    "an identity of booleans": lambda kept: kept["files"][0].__setitem__(0, True),
    "a header of numbers": lambda kept: kept["files"][0].__setitem__(4, 7),
    "an unknown field": _set_field("surprise", 1),
    "no architecture": lambda kept: kept["files"][0][4].pop("architecture"),
    "an unknown kind": _set_field("kind", "sculpture"),
    "a kind that is a list": _set_field("kind", []),
    "a negative number": _set_field("layers", -1),
    "a broken number": _set_field("layers", 1.5),
    "a boolean for a number": _set_field("layers", True),
    "a number for a boolean": _set_field("has_output", 1),
    "a number for text": _set_field("architecture", 1),
    "a number for a list": _set_field("block_bytes", 1),
    "text among numbers": _set_field("block_bytes", [1, "2"]),
    "four numbers of five": _set_field("recurrent_state", [1, 2, 3, 4]),
    "text for a number or nothing": _set_field("pooling", "mean"),
    "nothing for a number": _set_field("layers", None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_memory_is_set_aside_and_made_anew(case: str, model: Path, kept: Path) -> None:
    _remember(kept, model)
    whole = _entries(kept)
    _rewrite(kept, DAMAGE[case])
    assert len(_remember(kept, model).paths) == 1
    assert _entries(kept) == whole
    assert kept.with_name("headers.json.corrupt").exists()


@pytest.mark.parametrize("torn", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"reader": ['])
def test_a_torn_memory_is_set_aside_and_made_anew(torn: bytes, model: Path, kept: Path) -> None:
    kept.write_bytes(torn)
    assert len(_remember(kept, model).paths) == 1
    assert _remember(kept, model).paths == []
    assert kept.with_name("headers.json.corrupt").read_bytes() == torn


@pytest.mark.parametrize("other", [[], None, [["kind"], [1, 2], [3, 4]]])
def test_what_another_reader_remembered_is_read_anew(
    other: object, model: Path, kept: Path
) -> None:
    """An update of the reader, or of the gguf package, is another reader."""
    _remember(kept, model)
    _rewrite(kept, lambda value: value.update(reader=other))
    assert len(_remember(kept, model).paths) == 1
    assert _remember(kept, model).paths == []


@pytest.mark.usefixtures("imported")
def test_a_memory_that_cannot_be_written_is_done_without(folder: Path, model: Path) -> None:
    content = model.read_bytes()
    with unprivileged() as path:
        (path / "m.gguf").write_bytes(content)
        (path / "lib").mkdir()
        (path / "lib").chmod(0o500)
        found = look(folders=[path], headers=HeaderCache(path / "lib" / "headers.json"))
    assert names(found) == [":m.gguf"]
    assert only(found).subject.endswith("lib/headers.json")
    assert "Permission denied" in only(found).reason


def test_a_memory_whose_place_is_taken_is_done_without(folder: Path, model: Path) -> None:
    shutil.copy(model, folder / "m.gguf")
    (folder / "headers.json").mkdir()
    found = look(folders=[folder], headers=HeaderCache(folder / "headers.json"))
    assert names(found) == [":m.gguf"]
    assert "cannot be written" in only(found).reason
    assert sorted(os.listdir(folder)) == ["headers.json", "m.gguf"]  # no temporary file is left


def test_before_there_is_a_deployment_nothing_is_written(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copy(model, folder / "m.gguf")
    found = look(folders=[folder], headers=HeaderCache(tmp_path / "none" / "headers.json"))
    assert (names(found), found.problems) == ([":m.gguf"], ())
    assert not (tmp_path / "none").exists()


_NUMBERS = st.integers(0, 2**70)
_ANY_HEADER = st.builds(
    Header,
    kind=st.sampled_from(FileKind),
    architecture=st.text(max_size=5),
    name=st.none() | st.text(max_size=5),
    layers=_NUMBERS,
    heads=st.lists(_NUMBERS, max_size=3).map(tuple),
    recurrent_state=st.tuples(*[_NUMBERS] * 5),
    pooling=st.none() | _NUMBERS,
    causal_attention=st.none() | st.booleans(),
    classifier=st.booleans(),
    chat_template_sha256=st.none() | st.text(max_size=5),
    tags=st.lists(st.text(max_size=5), max_size=3).map(tuple),
)


@given(headers=st.lists(_ANY_HEADER | st.text(min_size=1), max_size=4))
def test_what_is_remembered_is_what_was_read(headers: list[Header | str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        kept = Path(place, "headers.json")
        files = {Path(place, f"{n}.gguf"): found for n, found in enumerate(headers)}
        for file in files:
            file.touch()
        by_path = {str(file): found for file, found in files.items()}

        def read(path: str) -> Header:
            found = by_path[path]
            if isinstance(found, str):
                raise CatalogError(found)
            return found

        def recall(memory: HeaderCache) -> dict[str, Header | str]:
            recalled: dict[str, Header | str] = {}
            for file in files:
                try:
                    recalled[str(file)] = memory.header(str(file), _identity(file))
                except CatalogError as error:
                    recalled[str(file)] = str(error)
            return recalled

        first = HeaderCache(kept, read)
        assert recall(first) == by_path
        assert first.save() is None

        def unexpected(path: str) -> Header:
            raise AssertionError(f"{path} was read again")

        assert recall(HeaderCache(kept, unexpected)) == by_path
