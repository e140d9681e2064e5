"""Looks through the Hugging Face hub cache and model folders for *.gguf; changes nothing there.

huggingface_hub's own scan says what a cache holds. It drops a whole repo for one broken link, and
the whole cache for one unreadable folder; what it drops is walked here instead, so that a broken
file costs only itself. Whatever is found and not served is a `Problem`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from supervisor_synapse.adapters.header_cache import HeaderCache, identity_of
from supervisor_synapse.core.catalog import PLAIN_REPO, FoundFile, printable, remedy_for, subject_of
from supervisor_synapse.core.model import FileIdentity, Header, Problem
from supervisor_synapse.errors import CatalogError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

_MODEL_PREFIX = "models--"  # datasets, spaces and kernels lie beside
_BLOB = re.compile(r"[0-9a-f]{64}")  # sha256 of LFS files, or the Xet hash of shared ones
_COMMIT = re.compile(r"[0-9A-Za-z._-]{1,100}")

_READERS = 4
_READ = "chmod u+rX it, or run as the user who owns it"


@dataclass(frozen=True, slots=True)
class Scan:
    """All files named *.gguf that lie where models are looked for; and what is wrong there."""

    files: tuple[FoundFile, ...]
    problems: tuple[Problem, ...]
    unread: tuple[str, ...] = ()  # folders that could not be looked into: what is there is unknown


@dataclass(frozen=True, slots=True)
class Limits:
    """How far one model directory, or one snapshot, is looked through."""

    depth: int = 12  # folders in folders [3: publisher/repo/quantization]
    entries: int = 200_000


def default_cache_dir() -> str:
    """Where huggingface_hub keeps its cache, by HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def scan(
    cache_dirs: Sequence[str],
    model_dirs: Sequence[str],
    headers: HeaderCache,
    limits: Limits = Limits(),
) -> Scan:
    """Look through `cache_dirs` (none: the default one, where it exists), then `model_dirs`.

    Headers come from `headers`, which is saved.
    """
    look = _Look(limits)
    if not cache_dirs and not os.path.lexists(default_cache_dir()):
        look.unread.append(default_cache_dir())  # as on a new machine: nothing to complain about
    for folder in cache_dirs or _default_cache_dirs():
        _look_through_cache(folder, look)
    for folder in model_dirs:
        _look_through_folder(folder, look)
    files = _read_headers(look, headers)
    unsaved = headers.save()
    if unsaved is not None:
        look.problems.append(unsaved)
    return Scan(tuple(files), tuple(look.problems), tuple(look.unread))


@dataclass(frozen=True, slots=True)
class _Place:
    """A file to be served, before it is read."""

    repo: str | None
    file: str
    path: str
    identity: FileIdentity
    blob: str | None

    @property
    def subject(self) -> str:
        return subject_of(self.repo, self.file, self.path)


class _Look:
    """What one scan has found so far."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.places: list[_Place] = []
        self.problems: list[Problem] = []
        self.unread: list[str] = []

    def report(self, subject: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(printable(subject), reason, remedy))


def _default_cache_dirs() -> list[str]:
    folder = default_cache_dir()
    return [folder] if os.path.lexists(folder) else []


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or "such a path cannot be"


# --- hub caches ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Revision:
    """One snapshot: its *.gguf files by posix path within it, dangling links included."""

    name: str
    folder: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Repo:
    name: str
    folder: str
    revisions: tuple[_Revision, ...]
    is_empty: bool  # no file of any kind in any snapshot


@dataclass(frozen=True, slots=True)
class _HubScan:
    """What huggingface_hub made of a cache: repos by folder, and why it dropped others."""

    repos: Mapping[str, CachedRepoInfo]
    warnings: tuple[str, ...]

    def warning_about(self, folder: str) -> str | None:
        """The message that names `folder` or something in it."""
        for text in self.warnings:
            if f"{folder}/" in text or f"{folder})" in text or text.endswith(folder):
                return text
        return None


def _look_through_cache(cache: str, look: _Look) -> None:
    try:
        root = os.path.realpath(cache)
        names = sorted(name for name in os.listdir(root) if name.startswith(_MODEL_PREFIX))
    except (OSError, ValueError) as error:
        remedy = "mend cache_dirs in synapse.conf" if _is_missing(error) else _READ
        look.report(cache, f"cannot look through this cache: {_why(error)}", remedy)
        look.unread.append(cache)
        return
    hub = _hub_scan(root) if names else _HubScan({}, ())
    for name in names:
        folder = f"{root}/{name}"
        known = hub.repos.get(folder)
        seen = len(look.problems)
        repo = _repo_from_hub(known) if known else _repo_by_hand(name, folder, look)
        _look_through_repo(repo, root, look)
        warning = None if known else hub.warning_about(folder)
        if warning and seen == len(look.problems) and _concerns_us(repo):
            look.report(repo.name, printable(warning), remedy_for(repo.name))


def _is_missing(error: OSError | ValueError) -> bool:
    return isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)


def _hub_scan(root: str) -> _HubScan:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        info = scan_cache_dir(root)
    except (OSError, ValueError, RuntimeError, CacheNotFound):
        # One folder that it may not read, one name that is no UTF-8, one loop of links.
        return _HubScan({}, ())
    repos = {str(repo.repo_path): repo for repo in info.repos if repo.repo_type == "model"}
    return _HubScan(repos, tuple(str(warning) for warning in info.warnings))


def _repo_name(folder_name: str) -> str:
    return folder_name.removeprefix(_MODEL_PREFIX).replace("--", "/")


def _repo_from_hub(info: CachedRepoInfo) -> _Repo:
    folder = str(info.repo_path)
    revisions = tuple(
        _Revision(
            name=revision.commit_hash,
            folder=str(revision.snapshot_path),
            files=_gguf_files(
                str(revision.snapshot_path), (str(file.file_path) for file in revision.files)
            ),
        )
        for revision in info.revisions
    )
    return _Repo(_repo_name(os.path.basename(folder)), folder, revisions, info.nb_files == 0)


def _gguf_files(folder: str, paths: Iterable[str]) -> dict[str, str]:
    """By posix path within `folder`; hidden ones are passed over, as in `_walk`."""
    files = {path[len(folder) + 1 :]: path for path in sorted(paths) if _is_gguf(path)}
    return {file: path for file, path in files.items() if "/." not in f"/{file}"}


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _repo_by_hand(name: str, folder: str, look: _Look) -> _Repo:
    revisions = []
    count = 0
    snapshots = f"{folder}/snapshots"
    for commit in _subfolders(snapshots, look):
        place = f"{snapshots}/{commit}"
        paths = [entry.path for entry in _walk(place, look)]
        count += len(paths)
        revisions.append(_Revision(commit, place, _gguf_files(place, paths)))
    return _Repo(_repo_name(name), folder, tuple(revisions), count == 0)


def _subfolders(folder: str, look: _Look) -> list[str]:
    """Names of the folders in `folder`, which need not exist."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if _is_folder(entry, follow=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        look.report(folder, f"cannot look through this folder: {_why(error)}", _READ)
        look.unread.append(folder)
        return []


def _look_through_repo(repo: _Repo, root: str, look: _Look) -> None:
    served = _served_revision(repo)
    if served is not None:
        for file, path in served.files.items():
            _look_at(repo.name, file, path, root, look)
        _report_outdated(repo, served, look)
    for size_bytes, path in _unfinished(repo):
        look.report(
            repo.name,
            f"a download is unfinished ({size_bytes} bytes in {printable(os.path.basename(path))})",
            _resumed(repo.name, os.path.basename(path)),
        )


def _served_revision(repo: _Repo) -> _Revision | None:
    """What refs/main names; else the one that was downloaded into last."""
    main = _main_commit(repo.folder)
    named = [revision for revision in repo.revisions if revision.name == main]
    if named:
        return named[0]
    return max(repo.revisions, key=lambda r: (_changed_ns(r.folder), r.name), default=None)


def _main_commit(folder: str) -> str | None:
    try:
        commit = _beginning(f"{folder}/refs/main", 128).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _beginning(path: str, count: int) -> bytes:
    """The first bytes of a file; a named pipe is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, count)
    finally:
        os.close(descriptor)


def _changed_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _report_outdated(repo: _Repo, served: _Revision, look: _Look) -> None:
    """Files that only another revision has would vanish in silence."""
    others = {file for revision in repo.revisions for file in revision.files}
    gone = sorted(others - served.files.keys())
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        look.report(
            f"{repo.name}/{gone[0]}",
            f"is only in another revision than the served one ({printable(served.name[:12])})"
            f"{more}: not served",
            f"{remedy_for(repo.name, gone[0])} to have it again, "
            "or `hf cache prune` to be rid of it",
        )


def _unfinished(repo: _Repo) -> Iterator[tuple[int, str]]:
    """Size and path of partial downloads that are of GGUF files, or may be.

    A partial blob does not say which file it will be.
    """
    try:
        names = set(os.listdir(f"{repo.folder}/blobs"))
    except OSError:
        return
    for name in sorted(names):
        # `<etag>.incomplete`, or `<etag>.<random>.incomplete` of a process that was killed.
        if not name.endswith(".incomplete") or name.partition(".")[0] in names:
            continue
        path = f"{repo.folder}/blobs/{name}"
        try:
            begins = _beginning(path, 4)
            size_bytes = os.stat(path).st_size
        except OSError:
            continue
        if begins == b"GGUF" or repo.is_empty or _concerns_us(repo):
            yield size_bytes, path


def _resumed(repo: str, name: str) -> str:
    """What goes on with a partial blob; one with a number of its own nobody goes on with."""
    if not PLAIN_REPO.fullmatch(repo) or name.count(".") > 1:
        return f"{remedy_for(repo)}, and remove this file where no download is under way"
    return f"`synapse pull {repo}:QUANT` goes on where it stopped"


def _concerns_us(repo: _Repo) -> bool:
    """A broken repo of another format is nothing to report."""
    return "gguf" in repo.name.lower() or any(revision.files for revision in repo.revisions)


def _look_at(repo: str | None, file: str, path: str, within: str | None, look: _Look) -> None:
    """Add the file at `path`, or report why not. `within`: it must resolve to somewhere in there.

    A link that leaves a hub cache is none of huggingface_hub's making: those lead to the blobs of
    the same repo, or to the blobs that the cache's repos share.
    """
    subject = subject_of(repo, file, path)
    try:
        real = os.path.realpath(path, strict=True)
        status = os.stat(real)
    except FileNotFoundError:
        look.report(
            subject,
            "its content is missing: the link leads nowhere; "
            "the download was interrupted, or the file was deleted",
            remedy_for(repo, file) if repo else "remove the link, or bring the file back",
        )
        return
    except (OSError, ValueError) as error:
        remedy = _READ if isinstance(error, PermissionError) else "remove it, or mend the link"
        look.report(subject, f"cannot be looked at: {_why(error)}", remedy)
        return
    if within is not None and not real.startswith(within.rstrip("/") + "/"):
        look.report(
            subject,
            f"its link leads out of the cache, to {printable(real)}: not served",
            "if that file is yours, add its folder to model_dirs in synapse.conf",
        )
    elif not stat.S_ISREG(status.st_mode):
        look.report(subject, "is not a regular file", "remove it or rename it")
    else:
        name = os.path.basename(real)
        blob = name if within is not None and _BLOB.fullmatch(name) else None
        look.places.append(_Place(repo, file, path, identity_of(status), blob))


# --- model directories ---------------------------------------------------------------------------


def _look_through_folder(folder: str, look: _Look) -> None:
    try:
        root = os.path.realpath(folder, strict=True)
        is_folder = os.path.isdir(root)
    except (OSError, ValueError) as error:
        look.report(
            folder,
            f"cannot look through this folder: {_why(error)}",
            "mend model_dirs in synapse.conf" if _is_missing(error) else _READ,
        )
        look.unread.append(folder)
        return
    if not is_folder:
        look.report(folder, "is not a folder", "mend model_dirs in synapse.conf")
        return
    for entry in _walk(root, look):
        if _is_gguf(entry.name):
            _look_at(None, entry.path[len(root.rstrip("/")) + 1 :], entry.path, None, look)


def _walk(root: str, look: _Look) -> Iterator[os.DirEntry[str]]:
    """All that is no folder in the tree at `root`, in order of names, within limits.

    Hidden files and folders are passed over (partial downloads, trash, and the shadow files that
    macOS leaves on other file systems). Links to folders are never followed, so that there is no
    way out of the tree and no loop.
    """
    folders = [(root, 0)]
    left = look.limits.entries
    while folders:
        folder, depth = folders.pop()
        entries = _listing(folder, look)
        left -= len(entries)
        if left < 0:
            look.report(
                root,
                f"has more than {look.limits.entries} entries: {printable(folder)} "
                "and what comes after were not looked at",
                "name the folders with models in model_dirs",
            )
            return
        below = []
        for entry in entries:
            if _is_folder(entry, follow=False):
                below.append((entry.path, depth + 1))
            elif _is_folder(entry, follow=True):
                _report_link_out(entry, root, look)
            else:
                yield entry
        if below and depth >= look.limits.depth:
            look.report(
                folder,
                f"lies {depth} folders deep: what is below was not looked at",
                "name that folder in model_dirs",
            )
        else:
            folders += reversed(below)


def _listing(folder: str, look: _Look) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        look.report(folder, f"cannot look through this folder: {_why(error)}", _READ)
        look.unread.append(folder)
        return []
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a loop of links
        return False


def _report_link_out(entry: os.DirEntry[str], root: str, look: _Look) -> None:
    """What a link within the tree leads to is found anyway."""
    real = os.path.realpath(entry.path)
    if not f"{real}/".startswith(root.rstrip("/") + "/"):
        look.report(
            entry.path,
            f"links to the folder {printable(real)}: links to folders are not followed",
            "add that folder to model_dirs in synapse.conf",
        )


# --- headers -------------------------------------------------------------------------------------


def _read_headers(look: _Look, headers: HeaderCache) -> list[FoundFile]:
    """Each content is read once; a file without a usable header is reported, and kept as such."""
    found = _headers({place.identity: place.path for place in reversed(look.places)}, headers)
    for place in look.places:
        result = found[place.identity]
        if isinstance(result, CatalogError):
            look.report(place.subject, str(result), _remedy_for_header(place, result))
    return [
        FoundFile(
            repo=place.repo,
            file=place.file,
            path=place.path,
            identity=place.identity,
            size_bytes=place.identity.size_bytes,
            header=result if isinstance(result := found[place.identity], Header) else None,
            blob=place.blob,
        )
        for place in look.places
    ]


def _headers(
    paths: Mapping[FileIdentity, str], headers: HeaderCache
) -> dict[FileIdentity, Header | CatalogError]:
    """Several at once where more than one must be read: disks and networks make one wait.

    On a network share with 2 ms a read, fifty headers take 1.6 s with four readers and 3.8 s with
    one; on a local disk it makes no difference. The pool is imported only then (10 ms).
    """
    if sum(not headers.knows(identity) for identity in paths) < 2:
        return {identity: _header(headers, identity, path) for identity, path in paths.items()}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_READERS, thread_name_prefix="header") as pool:
        results = pool.map(lambda item: _header(headers, *item), paths.items())
        return dict(zip(paths, results, strict=True))


def _remedy_for_header(place: _Place, error: CatalogError) -> str:
    if isinstance(error.__context__, PermissionError):
        return _READ
    if place.repo is None:
        return "replace it, or remove it"
    return remedy_for(place.repo, place.file, afresh=True)  # else the damaged one would be kept


def _header(headers: HeaderCache, identity: FileIdentity, path: str) -> Header | CatalogError:
    try:
        return headers.header(path, identity)
    except CatalogError as error:
        return error
