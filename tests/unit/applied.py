"""A deployment on disk, changed as discovery changes it: what is under test is on disk afterwards.

The blocks are rendered by the real templates, and written by the real `apply`. There is no
supervisord, and an engine only by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import deploy, render
from supervisor_synapse.adapters import generations, registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.registry import Entry, Registry
from supervisor_synapse.core import trials
from supervisor_synapse.core.changes import Changes, Deployed, compare
from supervisor_synapse.core.model import Failure, FailureClass, Program, Variant
from supervisor_synapse.core.plan import Choice
from supervisor_synapse.core.settings import Settings
from supervisor_synapse.core.trials import Standing
from supervisor_synapse.discovery import Change
from tests.unit.builders import program, taking

FAILURE = Failure(FailureClass.BAD_ARGUMENT, "error: invalid argument: --nonsense", 1700000000.0)


@dataclass
class Applied:
    """One deployment, and the programs that discovery would find."""

    deployment: Deployment

    @classmethod
    def at(cls, folder: Path) -> Applied:
        """One that is laid down, and holds nothing yet."""
        deployment = Deployment(folder)
        deploy.initialize(deployment)
        engine = folder / "llama-server"
        engine.write_text("#!/bin/false\n")
        engine.chmod(0o700)
        return cls(deployment)

    # --- changes ----------------------------------------------------------------------------------

    def change(self, *programs: Program, forced: tuple[str, ...] = ()) -> Change:
        """What discovery would say of exactly these programs."""
        earlier = registry.load(self.deployment.registry)
        settings = Settings(engine=str(self.deployment.prefix / "llama-server"))
        blocks = {one.name: self.rendered(one) for one in programs}
        digests = {name: generations.digest(block.text) for name, block in blocks.items()}
        written = earlier.digests()
        deployed = {
            path.stem: Deployed(_sha(path), written.get(path.stem, ()))
            for path in self.deployment.blocks.glob("*.conf")
        }
        changes = compare(digests, deployed, forced)
        entries = {key: replace(one, present=False) for key, one in earlier.entries.items()}
        for one in programs:
            known = earlier.entries.get(one.key)
            old = known.digests if known else ()
            entries[one.key] = Entry(
                one.name, one.key, Choice(one.port, one.context, one.device, True, "basis"),
                registry.with_digest(old, digests[one.name]), present=True,
            )  # fmt: skip
        number = earlier.generation + bool(changes)
        after = Registry(entries, tuple(programs), settings, number, untold=earlier.untold)
        return Change(blocks=blocks, links={}, changes=changes, registry=after, earlier=earlier)

    def discover(self, *programs: Program, forced: tuple[str, ...] = ()) -> Changes:
        """Apply that, with no supervisord about."""
        change = self.change(*programs, forced=forced)
        deploy.apply(self.deployment, change, None, lambda line: None)
        return change.changes

    def rendered(self, one: Program) -> render.Block:
        path = self.deployment
        around = render.Surroundings(
            ("/usr/bin/synapse-run",), str(path.prefix / "llama-server"), Settings().stop,
            str(path.prefix), str(path.log), str(path.run),
        )  # fmt: skip
        return render.render_program(render.Templates(path.templates), one, around)

    def edit(self, name: str, words: str) -> str:
        """Add to a block's command by hand; the digest of the result."""
        path = self.deployment.block(name)
        path.write_text(re.sub(r"^(command=.*)$", rf"\1 {words}", path.read_text(), flags=re.M))
        return _sha(path)

    def prove(self, *names: str) -> None:
        """Have the applied blocks be good."""
        known = self.standings()
        after = {name: trials.proven(known[name]) for name in names}
        generations.save_standings(self.deployment, known | after)

    # --- looks ------------------------------------------------------------------------------------

    def registry(self) -> Registry:
        return registry.load(self.deployment.registry)

    def standings(self) -> dict[str, Standing]:
        return generations.standings(self.deployment)

    def on_disk(self) -> dict[str, str]:
        """Digests of the blocks by name."""
        return {path.stem: _sha(path) for path in self.deployment.blocks.glob("*.conf")}

    def on_disk_of(self, name: str) -> str:
        return _sha(self.deployment.block(name))

    def picture(self) -> Any:
        """All that matters of a deployment, but times, and whom supervisord is still to be told."""
        found = self.registry()
        newest = generations.load(self.deployment, found.generation)
        return (
            replace(found, untold={}, entries=_newest_digests(found.entries)),
            self.standings(),
            newest and replace(newest, at=0.0),
            self.on_disk(),
        )

    def stray_files(self) -> list[str]:
        """Torn state, which nobody should have left."""
        return [str(path) for path in self.deployment.prefix.rglob("*.corrupt")]


def _newest_digests(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {key: replace(one, digests=one.digests[:1]) for key, one in entries.items()}


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny(name: str, *words: str, port: int = 8100, **changes: Any) -> Program:
    """A program whose server gets these arguments; it has a ladder of two rungs."""
    arguments = ("--port", str(port), *words)
    path = f"/models/{name}.gguf"
    rungs = tuple(
        Variant(label, f"file:{name}", context, "CPU", (*arguments, "--ctx-size", str(context)),
                taking(context * 1024), path)
        for label, context in (("as configured", 4096), ("context 2048", 2048))
    )  # fmt: skip
    return program(
        name=name, key=f"file:{name}", file=f"{name}.gguf", alias=name, port=port,
        arguments=rungs[0].arguments, model_path=path, estimate=rungs[0].estimate,
        **({"ladder": rungs} | changes),
    )  # fmt: skip


# --- faults --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Our process is gone: nothing that it would still have done happens."""


class Faults:
    """Counts what a process does to the file system; from `at` on, it fails."""

    def __init__(self, at: int, error: BaseException, *, lasts: bool) -> None:
        self.count = 0
        self.did_strike = False
        self._at, self._error, self._lasts = at, error, lasts

    def strike(self) -> None:
        self.count += 1
        if self.count == self._at or (self._lasts and self.count > self._at):
            self.did_strike = True
            raise self._error


_WRITES = os.O_CREAT | os.O_TRUNC


@contextlib.contextmanager
def faulty(faults: Faults) -> Iterator[None]:
    """Each file that is created, synced, renamed or removed is counted, and may fail."""
    opened = os.open

    def guarded_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & _WRITES and not str(path).endswith(".lock"):
            faults.strike()
        return opened(path, flags, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", guarded_open)
        for name in ("fsync", "fchmod", "replace", "unlink", "mkdir", "symlink", "rmdir"):
            patch.setattr(os, name, _guarded(getattr(os, name), faults))
        yield


def _guarded(call: Any, faults: Faults) -> Any:
    def guarded(*arguments: Any, **named: Any) -> Any:
        faults.strike()
        return call(*arguments, **named)

    return guarded


def on_disk(deployment: Deployment, *names: str) -> dict[str, str]:
    """The digests of blocks as they stand, by name; "" where there is none to be read."""
    found = {}
    for name in names:
        path = deployment.block(name)
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found
