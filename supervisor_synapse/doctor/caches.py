"""Checks of where models lie: caches, the files in them, and the disks under them."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from supervisor_synapse.core.catalog import FoundFile, build_catalog
from supervisor_synapse.core.findings import Finding, error, fine, note, warning
from supervisor_synapse.core.model import Problem
from supervisor_synapse.core.plan import mib
from supervisor_synapse.core.settings import MIB
from supervisor_synapse.doctor.case import Case

_LOW_PERCENT = 5
_LOW_CACHE_BYTES = 2048 * MIB
_LOW_STATE_BYTES = 200 * MIB
_FULL_BYTES = 20 * MIB
# What a scan says of files -> how that kind of problem is called.
_KINDS = (
    ("a download is unfinished", "download-unfinished"),
    ("its content is missing", "link-broken"),
    ("its link leads out", "link-broken"),
    ("is only in another revision", "revision-outdated"),
    ("cannot look through", "folder-unreadable"),
)


def check_caches(case: Case) -> Iterator[Finding]:
    """The hub caches and folders of models themselves."""
    for folder in case.cache_dirs:
        yield from _cache(case, folder)
    for name in case.settings.model_dirs:
        if not os.path.isdir(name):
            yield warning("folder-missing", name, "is not there", "mend model_dirs in synapse.conf")


def _cache(case: Case, folder: Path) -> Iterator[Finding]:
    if not folder.exists():
        is_chosen = bool(case.settings.cache_dirs)
        make, mend = (
            (warning, "mend cache_dirs in synapse.conf, or mount it")
            if is_chosen
            else (note, "`synapse pull REPO` makes it, or name yours as cache_dirs")
        )
        yield make("cache-missing", str(folder), "this cache does not exist", mend)
    elif not os.access(folder, os.R_OK | os.X_OK):
        yield error("cache-unreadable", str(folder), "may not be read", f"chmod u+rx {folder}")
    elif not os.access(folder, os.W_OK):
        yield note(
            "cache-read-only", str(folder), "may be read, not written: nothing can be pulled",
            f"chmod u+w {folder}, where it is yours",
        )  # fmt: skip
    else:
        yield fine(str(folder), "can be read and written")


def check_models(case: Case) -> Iterator[Finding]:
    """The files in them: unfinished, broken, damaged, incomplete, or there twice."""
    scan = case.scan
    catalog = build_catalog(scan.files, case.registry.names())
    for problem in dict.fromkeys((*scan.problems, *catalog.problems)):
        yield warning(_kind(problem), problem.subject, problem.reason, problem.remedy)
    yield from _duplicates(scan.files)
    yield fine("models", f"{len(catalog.models)} can be served")


def _kind(problem: Problem) -> str:
    found = (kind for begins, kind in _KINDS if problem.reason.startswith(begins))
    return next(found, "model-unusable")


def _duplicates(files: tuple[FoundFile, ...]) -> Iterator[Finding]:
    """The same content under several inodes: each takes its space."""
    copies: defaultdict[str, dict[tuple[int, int], FoundFile]] = defaultdict(dict)
    for file in files:
        if file.blob is not None:
            copies[file.blob][file.identity.device, file.identity.inode] = file
    for same in copies.values():
        first, *others = same.values()
        if others:
            names = ", ".join(f"{one.repo}/{one.file}" for one in others[:3])
            yield note(
                "cache-duplicate", f"{first.repo}/{first.file}",
                f"lies {len(same)} times in the cache, {mib(first.size_bytes)} each; also as "
                f"{names}", "`hf cache rm` one of the repos",
            )  # fmt: skip


def check_disk(case: Case) -> Iterator[Finding]:
    """Room for models, and for our own state, without which nothing new can be remembered."""
    prefix = case.deployment.prefix
    if prefix.exists():
        yield from _room(prefix, _LOW_STATE_BYTES, is_ours=True)
    for folder in case.cache_dirs:
        if folder.exists():
            yield from _room(folder, _LOW_CACHE_BYTES, is_ours=False)


def _room(folder: Path, low_bytes: int, *, is_ours: bool) -> Iterator[Finding]:
    usage, status = shutil.disk_usage(folder), os.statvfs(folder)
    percent = 100 * usage.free // max(usage.total, 1)
    told = f"{mib(usage.free)} free of {mib(usage.total)} ({percent} %)"
    if is_ours and (usage.free < _FULL_BYTES or (status.f_files and not status.f_favail)):
        yield error(
            "disk-full", str(folder), 
            f"{told}: state and logs cannot be written; what runs goes on",
            "free some space; `hf cache prune` removes what no revision uses",
        )  # fmt: skip
    elif usage.free < low_bytes and percent < _LOW_PERCENT:
        yield warning(
            "disk-low", str(folder), told, "free some space; `hf cache ls` shows what takes it"
        )
    else:
        yield fine(str(folder), told)
