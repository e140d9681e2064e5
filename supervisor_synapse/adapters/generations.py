"""var/lib/generations and var/lib/trials.json: what was applied, and what of that is good.

    generations/000012.json       one set of blocks: when, why, by whom, and their digests
    generations/blocks/SHA.json   one block, and what the registry held of its model then
    trials.json                   by model: the applied block, the good ones, those that failed

Blocks are named by their content, so what did not change is not written again. All is written
under the lock of the deployment (deploy.py); readers need none.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from supervisor_synapse.adapters import store
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core import trials
from supervisor_synapse.core.model import Program
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.trials import Generation, Standing

MOST_KEPT = 20

_T = TypeVar("_T")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[0-9]{6}|[1-9][0-9]{6,17}")  # as `_path` writes it


@dataclass(frozen=True, slots=True)
class Kept:
    """One block as it was applied, and what the registry held of its model."""

    name: str
    text: str
    is_ours: bool  # as discovery rendered it, not edited by hand
    program: Program
    choice: Choice

    @property
    def digest(self) -> str:
        return digest(self.text)


_GENERATION = TypeAdapter(Generation)
_KEPT = TypeAdapter(Kept)
_STANDINGS = TypeAdapter(dict[str, Standing])


def digest(text: str) -> str:
    """Names the content of a block."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_or_none(text: str) -> str | None:
    """None of what JSON can hold, and a file cannot."""
    try:
        return digest(text)
    except UnicodeEncodeError:
        return None


def keep(deployment: Deployment, blocks: Iterable[Kept]) -> None:
    """Write those blocks that are not kept yet, or no longer whole.

    Raises:
        OSError: some may be missing.
    """
    folder = deployment.kept_blocks
    for block in blocks:
        path = folder / f"{block.digest}.json"
        if kept(deployment, block.digest) is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            store.write_json(path, _KEPT.dump_python(block, mode="json"))


def kept(deployment: Deployment, block_digest: str) -> Kept | None:
    """A block that was applied once; None where it is not kept, or no longer what it was."""
    if not _DIGEST.fullmatch(block_digest):
        return None
    path = deployment.kept_blocks / f"{block_digest}.json"
    found = _read(path, _KEPT)
    if found is not None and _digest_or_none(found.text) != block_digest:
        store.set_aside(path)
        return None
    return found


def record(deployment: Deployment, generation: Generation) -> None:
    """Write one generation down.

    Raises:
        OSError: nothing was changed.
    """
    store.write_json(
        _path(deployment, generation.number), _GENERATION.dump_python(generation, mode="json")
    )


def load(deployment: Deployment, number: int) -> Generation | None:
    """One generation; None where it is not kept."""
    found = _read(_path(deployment, number), _GENERATION)
    return found if found is not None and found.number == number else None


def every(deployment: Deployment) -> tuple[Generation, ...]:
    """All that are kept, oldest first."""
    found = (load(deployment, number) for number in numbers(deployment))
    return tuple(one for one in found if one is not None)


def mention(deployment: Deployment, word: str) -> bool:
    """Whether a block that is kept names `word` (ASCII), so that it is needed to go back."""
    needle = word.encode("ascii")
    for path in deployment.kept_blocks.glob("*.json"):
        with contextlib.suppress(OSError):
            if needle in path.read_bytes():
                return True
    return False


def numbers(deployment: Deployment) -> list[int]:
    """Of all that are kept, oldest first; files of other names are not ours."""
    found = (path.stem for path in deployment.generations.glob("*.json"))
    return sorted(int(stem) for stem in found if _NUMBER.fullmatch(stem))


def prune(deployment: Deployment, standings: trials.Standings) -> None:
    """Forget all but the newest generations, and the blocks that nobody can go back to; what cannot
    be removed stays.
    """
    for number in numbers(deployment)[:-MOST_KEPT]:
        _remove(_path(deployment, number))
    used = trials.in_use(every(deployment), standings)
    for path in deployment.kept_blocks.glob("*.json"):
        if path.stem not in used:
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def standings(deployment: Deployment) -> dict[str, Standing]:
    """What is known of each model's blocks; a file that does not validate is set aside."""
    return _read(deployment.trials, _STANDINGS) or {}


def save_standings(deployment: Deployment, found: Mapping[str, Standing]) -> None:
    """Write all of them, or nothing.

    Raises:
        OSError: nothing was changed.
    """
    store.write_json(deployment.trials, _STANDINGS.dump_python(dict(found), mode="json"))


def stamp(deployment: Deployment) -> tuple[int, int]:
    """Changes when the standings do."""
    with contextlib.suppress(OSError):
        status = deployment.trials.stat()
        return status.st_mtime_ns, status.st_ino
    return 0, 0


def _path(deployment: Deployment, number: int) -> Path:
    return deployment.generations / f"{number:06}.json"


def _read(path: Path, shape: TypeAdapter[_T]) -> _T | None:
    value = store.read_json(path)
    if value is None:
        return None
    try:
        return shape.validate_python(value)
    except ValidationError:
        store.set_aside(path)
        return None
