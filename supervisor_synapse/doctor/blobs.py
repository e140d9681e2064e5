"""Whether files still hold what was downloaded: content against the hashes that name it.

A file that was damaged and has its former size loads, and answers nonsense with status 200.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from supervisor_synapse.adapters import checksums
from supervisor_synapse.core.findings import Finding, error, fine, warning
from supervisor_synapse.doctor.case import Case

_MOST_BYTES_BETWEEN = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Blob:
    """A blob of a hub cache, and the file that it is."""

    path: Path
    repo: str
    file: str
    size_bytes: int


def check_blobs(case: Case, progress: Callable[[int, int], None]) -> Iterator[Finding]:
    """Files that models use come first. `progress` is told how many bytes of how many are read."""
    blobs = _blobs(case)
    total, done = sum(blob.size_bytes for blob in blobs), 0
    for blob in blobs:
        before = done

        def read(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        try:
            is_whole = checksums.is_whole(blob.path, blob.path.name, read)
        except OSError as failure:
            yield warning(
                "blob-unreadable", f"{blob.repo}/{blob.file}",
                f"cannot be read: {failure.strerror}", "look whether its disk is failing",
            )  # fmt: skip
            is_whole = True
        done = before + blob.size_bytes
        if not is_whole:
            yield error(
                "blob-damaged", f"{blob.repo}/{blob.file}",
                f"its content is not what was downloaded: {blob.path} has another hash than its "
                "name says; a model answers nonsense with it",
                f"stop its model, then `rm {blob.path}`, `synapse pull {blob.repo}:{_stem(blob)}` "
                "and start it again; look whether the disk or memory is failing",
            )  # fmt: skip
    yield fine("checksums", f"{len(blobs)} blobs compared, {total} bytes")


def _stem(blob: _Blob) -> str:
    return os.path.basename(blob.file).removesuffix(".gguf")


def _blobs(case: Case) -> list[_Blob]:
    """Each blob that is compared, once: those of models, then what else lies in their snapshots.

    What is shared between repos is named by another hash (Xet's), and lies elsewhere.
    """
    used = {
        os.path.realpath(path)
        for program in case.registry.programs
        for path in (program.model_path, program.projector_path, *program.shards)
        if path
    }
    found: dict[Path, _Blob] = {}
    for cache in case.cache_dirs:
        for folder in sorted(cache.glob("models--*")):
            for link in sorted((folder / "snapshots").glob("*/**/*")):
                real = Path(os.path.realpath(link))
                is_blob = real.parent == Path(os.path.realpath(folder / "blobs"))
                if is_blob and real not in found and checksums.can_tell(real.name):
                    repo = folder.name.removeprefix("models--").replace("--", "/")
                    file = "/".join(link.parts[len(folder.parts) + 2 :])
                    found[real] = _Blob(real, repo, file, _size(real))
    present = [blob for blob in found.values() if blob.path.is_file()]
    return sorted(present, key=lambda blob: (str(blob.path) not in used, blob.repo, blob.file))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
