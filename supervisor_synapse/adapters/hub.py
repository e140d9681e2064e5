"""The Hugging Face hub, through huggingface_hub: what a repo holds, and bringing files of it here.

A part that was downloaded is kept beside the blob as `<etag>.incomplete` and gone on with, also by
another process: huggingface_hub itself goes on only within one (newer ones remove what they had).
It streams, shows progress, and lays out the cache; content is checked against its sha256 before it
becomes a blob. Files are brought by commit, and `refs/main` is moved when all are there: so what is
served is not touched by a download that was interrupted.

Names, sizes and hashes from the hub are hostile: what does not pass the allow-list is left out.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import checksums, store
from supervisor_synapse.core.catalog import printable
from supervisor_synapse.core.offers import HubFile
from supervisor_synapse.errors import ApplyError, ConfigError, SynapseError, TransientError

_ANSWER_SECONDS = 20.0
_MOST_FILES = 20_000
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")
_PATH = re.compile(r"[A-Za-z0-9_][^\\\0-\x1f\x7f]{0,400}")
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repo holds at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


def endpoint() -> str:
    """Where the hub is asked for: HF_ENDPOINT, else huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def require_online() -> None:
    """Refuse what cannot be: HF_HUB_OFFLINE forbids every question.

    Raises:
        ConfigError: it is set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be downloaded: unset it")


def look(repo: str) -> Listing:
    """What is in a repo now.

    Raises:
        ConfigError: there is none, or it is not for us to see.
        TransientError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    with _explained(repo):
        info = HfApi().model_info(repo, files_metadata=True, timeout=_ANSWER_SECONDS)
    commit = str(info.sha or "")
    if not _COMMIT.fullmatch(commit):
        raise TransientError(f"cannot read what {endpoint()} says of {repo}: it names no commit")
    found = []
    for sibling in (info.siblings or ())[:_MOST_FILES]:
        lfs = sibling.lfs
        sha256 = str(lfs.sha256) if lfs is not None else ""
        size_bytes = sibling.size
        if is_safe(sibling.rfilename) and isinstance(size_bytes, int) and size_bytes >= 0:
            known = sha256 if _SHA256.fullmatch(sha256) else None
            found.append(HubFile(sibling.rfilename, size_bytes, known))
    return Listing(repo, commit, tuple(found))


def is_safe(path: object) -> bool:
    """Whether a name from a hub stays within the folder that it is written to."""
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


# --- what is here --------------------------------------------------------------------------------


def folder_of(cache: Path, repo: str) -> Path:
    """Where a cache keeps a repo."""
    return cache / f"models--{repo.replace('/', '--')}"


def missing_bytes(cache: Path, repo: str, files: Sequence[HubFile]) -> int:
    """How much of these files is still to be downloaded."""
    return sum(max(file.size_bytes - _present_bytes(cache, repo, file), 0) for file in files)


def _present_bytes(cache: Path, repo: str, file: HubFile) -> int:
    if file.sha256 is None:
        return 0
    blob = folder_of(cache, repo) / "blobs" / file.sha256
    return file.size_bytes if blob.exists() else _size_of(_incomplete(blob))


def served_beside(cache: Path, listing: Listing, chosen: Sequence[HubFile]) -> tuple[HubFile, ...]:
    """Files that the served revision has, and that are the same in this one.

    Without them, moving to a new revision would take other quantizations out of sight.
    """
    folder = folder_of(cache, listing.repo)
    try:
        served = (folder / "refs" / "main").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ()
    if served == listing.commit or not _COMMIT.fullmatch(served):
        return ()
    snapshot = folder / "snapshots" / served
    names = {file.path for file in chosen}
    return tuple(
        file
        for file in listing.files
        if file.path not in names
        and file.path.lower().endswith(".gguf")
        and file.sha256 is not None
        and os.path.basename(os.path.realpath(snapshot / file.path)) == file.sha256
        and (folder / "blobs" / file.sha256).exists()
    )


# --- bringing ------------------------------------------------------------------------------------


def bring(cache: Path, listing: Listing, file: HubFile) -> Path:
    """Download one file, or what is missing of it, into the cache; where it stands then.

    Raises:
        ConfigError: it is not for us to have.
        TransientError: the hub does not answer, or broke off.
        ApplyError: there is no room, or what came is not what was promised.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    with _explained(listing.repo):
        url = hf_hub_url(listing.repo, file.path, revision=listing.commit)
        told = get_hf_file_metadata(url, timeout=_ANSWER_SECONDS)
        etag, size_bytes = told.etag, told.size
        if etag is None or not _ETAG.fullmatch(etag) or size_bytes is None:
            raise ApplyError(
                f"cannot download {printable(file.path)}: {endpoint()} tells neither its size nor "
                "its hash as a hub does; check HF_ENDPOINT"
            )
        # Larger ones are handed out in pieces only (Xet), which huggingface_hub puts together.
        if size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _fetch(cache, listing.repo, file, url, etag, size_bytes)
        return Path(
            hf_hub_download(listing.repo, file.path, revision=listing.commit, cache_dir=cache)
        )


def _fetch(cache: Path, repo: str, file: HubFile, url: str, etag: str, size_bytes: int) -> None:
    """The content as a blob of the cache; what is there of it is gone on with."""
    blob = folder_of(cache, repo) / "blobs" / etag
    # huggingface_hub locks by the same file, so that two downloads of one blob wait for each other.
    lock = cache / ".locks" / folder_of(cache, repo).name / f"{etag}.lock"
    for place in (blob.parent, lock.parent):
        place.mkdir(parents=True, exist_ok=True)
    with store.exclusive(lock, whose="another download of this file"):
        if blob.exists():
            return
        part = _incomplete(blob)
        _stream_on(part, url, file.path, size_bytes)
        if _SHA256.fullmatch(etag) and checksums.sha256_of(part) != etag:
            part.unlink()
            raise ApplyError(
                f"{printable(file.path)}: what came is not what the hub promised (its sha256 is "
                "another); it was removed: try again"
            )
        os.replace(part, blob)


def _stream_on(part: Path, url: str, name: str, size_bytes: int) -> None:
    """Stream until all is there; who breaks off is asked again as long as something came.

    Not every version of huggingface_hub does that itself.
    """
    while True:
        there = _size_of(part)
        try:
            return _stream(part, url, name, size_bytes)
        except Exception as error:
            if not _is_of_transport(error) or _size_of(part) <= there:
                raise


def _stream(part: Path, url: str, name: str, size_bytes: int) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    if _size_of(part) > size_bytes:
        part.unlink()
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as target:
        target.seek(0, os.SEEK_END)
        http_get(
            url, target, resume_size=target.tell(), headers=build_hf_headers(),
            expected_size=size_bytes, displayed_filename=printable(name.rpartition("/")[2]),
        )  # fmt: skip
        target.flush()
        os.fsync(target.fileno())


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def point_main(cache: Path, listing: Listing) -> None:
    """From now on the files of this commit are the ones that are served."""
    refs = folder_of(cache, listing.repo) / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    if not (refs / "main").exists() or (refs / "main").read_text() != listing.commit:
        store.write_text(refs / "main", listing.commit)


# --- what goes wrong -----------------------------------------------------------------------------


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of huggingface_hub and what lies under it, in a line each with how to mend it."""
    try:
        yield
    except SynapseError:
        raise
    except Exception as error:
        known = _known(repo, error) or _on_disk(error) or _on_the_way(error)
        if known is None:
            raise
        raise known from None


def _known(repo: str, error: Exception) -> SynapseError | None:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return ConfigError(
                f"{repo} is gated: accept its terms on {endpoint()}/{repo}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        case errors.RepositoryNotFoundError():
            return ConfigError(
                f"{endpoint()} has no repo {repo}, or none that you may see: check its name; for a "
                "private one log in with `hf auth login` or set HF_TOKEN"
            )
        case errors.OfflineModeIsEnabled():
            return ConfigError("HF_HUB_OFFLINE is set, so nothing can be downloaded: unset it")
        case errors.LocalEntryNotFoundError():
            return _unreachable("its last answer did not come")
        case errors.EntryNotFoundError() | errors.RevisionNotFoundError():
            return TransientError(f"{repo} changed on the hub just now: try again")
        case errors.HfHubHTTPError():
            return _by_status(repo, getattr(error.response, "status_code", 0))
        case errors.HFValidationError():
            return ConfigError(f"{repo!a} names no repo: OWNER/NAME, or OWNER/NAME:Q4_K_M")
    return None


def _by_status(repo: str, status: int) -> SynapseError:
    if status in (401, 403):
        return ConfigError(
            f"{endpoint()} does not let you have {repo} (status {status}): log in with "
            "`hf auth login`, or check HF_TOKEN"
        )
    if status == 429:
        return TransientError(f"{endpoint()} is asked too often (status 429): try again later")
    return TransientError(f"{endpoint()} answers with status {status}: try again later")


def _on_disk(error: Exception) -> SynapseError | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApplyError(
            "the disk is full; what came so far is kept: free some space (`hf cache prune`), then "
            "give the same command again"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = printable(str(error.filename or "the cache"))
        return ApplyError(f"cannot write {where}: {error.strerror}; make it yours, or choose "
                          "another folder as cache_dirs in synapse.conf")  # fmt: skip
    return None


def _is_of_transport(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def _on_the_way(error: Exception) -> SynapseError | None:
    """Which library carries the requests depends on the version of huggingface_hub."""
    if _is_of_transport(error) or isinstance(error, OSError):
        return _unreachable(printable(str(error).split("\n")[0]) or type(error).__name__)
    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
        return TransientError(
            f"cannot read what {endpoint()} says: it does not answer as a hub does; check "
            "HF_ENDPOINT, and whether a network asks for a login first"
        )
    return None


def _unreachable(why: str) -> TransientError:
    return TransientError(
        f"cannot reach {endpoint()}, or it broke off: {why}; what came so far is kept: give "
        "the same command again"
    )
