"""What the listener knows of the blocks: which are applied, on trial, changed on disk, or broken.

Looked at once a turn; what is on disk is read only where it has changed. A block that somebody
edited by hand is a generation once supervisord has taken it up. One that supervisord could not read
is put aside before it can do harm, where it is a model's; a stranger's is only named.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from supervisor_synapse.adapters import conf_d, config_files, generations
from supervisor_synapse.adapters.conf_d import OnDisk
from supervisor_synapse.adapters.config_files import Broken
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.adapters.supervisord import Process, Refused, Reread, Supervisord
from supervisor_synapse.core import trials
from supervisor_synapse.core.admission import needs_of
from supervisor_synapse.core.model import Failure, FailureClass, ProcessState
from supervisor_synapse.core.trials import Standing, Trial
from supervisor_synapse.effects import Deployer
from supervisor_synapse.errors import SynapseError, TransientError

_AGAIN_SECONDS = 3.0  # what could not be done is tried again
_STILL_SECONDS = 1.5  # a file that was not written to for so long is no longer being saved
_SELDOM_SECONDS = 30.0  # what changes only when somebody does something is looked at less often
_REPEAT_SECONDS = 60.0
_MOST_TRIES = 256  # that are remembered

_log = logging.getLogger("synapse")


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at the blocks of all models, by program name."""

    standings: Mapping[str, Standing] = field(default_factory=dict)
    trials: Mapping[str, Trial] = field(default_factory=dict)
    untold: frozenset[str] = frozenset()  # supervisord may hold another block than the applied one
    outdated: frozenset[str] = frozenset()  # it does
    unadopted: frozenset[str] = frozenset()  # edited, taken up, and not yet taken note of; perhaps
    broken: str = ""  # a file of somebody else that supervisord cannot read: file, line and why


class Blocks:
    """The blocks of one deployment. For the thread that speaks XML-RPC."""

    def __init__(self, deployment: Deployment, rpc: Supervisord, deployer: Deployer) -> None:
        self._deployment = deployment
        self._rpc = rpc
        self._deployer = deployer
        self._stamp: object = None
        self._standings: Mapping[str, Standing] = {}
        self._trials: Mapping[str, Trial] = {}
        self._on_disk: dict[str, OnDisk] = {}
        self._checked: Mapping[str, OnDisk] | None = None  # found fit for supervisord
        self._still_since: tuple[float, Mapping[str, OnDisk]] = (0.0, {})
        self._reread: tuple[float, object, Reread | None] = (0.0, None, None)
        self._unadopted: frozenset[str] = frozenset()
        self._broken = ""
        self._is_others = False  # what was found broken last is nobody's of us
        self._tried_at: dict[str, float] = {}

    def look(self, found: Registry, table: Mapping[str, Process]) -> Sight:
        """What there is now; what follows from it at once is done: edits are taken note of, broken
        blocks set aside, removed programs dismissed.

        Raises:
            TransientError, ShuttingDown: supervisord did not answer.
        """
        self._read_standings()
        self._scan()
        unadopted = self._adopt(found, table)
        self._check_files(found)
        self._read_standings()
        outdated = self._look_at_untold(found, table)
        return Sight(
            self._standings, self._trials, frozenset(found.untold), outdated, unadopted,
            self._broken,
        )  # fmt: skip

    def _read_standings(self) -> None:
        stamp = generations.stamp(self._deployment)
        if stamp == self._stamp:
            return
        self._standings = generations.standings(self._deployment)
        self._trials = {
            name: self._trial(standing)
            for name, standing in self._standings.items()
            if standing.on_trial
        }
        self._stamp = stamp

    def _trial(self, standing: Standing) -> Trial:
        former = standing.former
        kept = generations.kept(self._deployment, former.digest) if former else None
        now = generations.kept(self._deployment, standing.digest)
        return Trial(
            standing.digest, standing.generation, former if kept else None,
            needs_of(kept.program.estimate) if kept else (),
            has_other_port=kept is not None and now is not None
            and kept.program.port != now.program.port,
            rejection=standing.rejection(standing.digest),
            broken=trials.broken_by(self._standings, standing.generation),
        )  # fmt: skip

    def _scan(self) -> None:
        try:
            self._on_disk = conf_d.scan(self._deployment.blocks, self._on_disk)
        except OSError as error:
            self._complain("conf.d not read", "conf.d", str(error.strerror))

    # --- edits ------------------------------------------------------------------------------------

    def _adopt(self, found: Registry, table: Mapping[str, Process]) -> frozenset[str]:
        """Take note of blocks that supervisord has taken up, and that nobody of us wrote; those
        with which that failed.
        """
        news = [
            program.name
            for program in found.programs
            if program.name in self._on_disk
            and program.name not in found.untold
            and self._is_news(program.name, found, table.get(program.name))
        ]
        # What runs may have begun with the edited block, or with the one before: nobody can tell.
        running = frozenset(name for name in news if table[name].pid)
        # Tried anew as soon as supervisord has replaced one: the next start would be of its block.
        tries = [
            (name, self._on_disk[name].stamp, table[name].start, table[name].stop) for name in news
        ]
        # Where all of them run, nothing comes of it before supervisord replaces one.
        wait = _SELDOM_SECONDS if len(running) == len(news) else _AGAIN_SECONDS
        if not news or not self._may_try(f"adopt {tries}", wait):
            return (self._unadopted & set(news)) | running
        taken = {name: self._on_disk[name].digest for name in self._taken_up(news, table)}
        adopted: frozenset[str] = frozenset()
        if taken and self._do("edited blocks", partial(self._deployer.adopt, taken)):
            taken, adopted = {}, frozenset(taken)
        self._unadopted = frozenset(taken)
        return self._unadopted | (running - adopted)

    def _taken_up(self, news: Sequence[str], table: Mapping[str, Process]) -> list[str]:
        """Those that supervisord holds as they stand on disk, in all that a block says: also an
        environment may break a model. `update` takes one after the other, and is one change: those
        that run still come with it.
        """
        try:
            changed = self._rpc.reread().changed
            held = self._held_commands()
        except Refused as refused:
            self._complain("configuration not told", "supervisord", str(refused))
            return []
        is_under_way = any(not table[name].pid and name not in changed for name in news)
        is_over = changed.isdisjoint(news)
        return [
            name
            for name in news
            if (held is None or self._is_held(name, held))
            and (name not in changed or (is_under_way and table[name].pid))
            and (is_under_way or is_over or not self._standings)
        ]

    def _is_news(self, name: str, found: Registry, process: Process | None) -> bool:
        """Whether a block is not the applied one; of which nothing is known yet only if it is ours,
        or does not run.
        """
        standing, there = self._standings.get(name), self._on_disk[name].digest
        if process is None or (standing is not None and standing.digest == there):
            return False
        is_ours = there in found.digests().get(name, ())
        return standing is not None or is_ours or not process.pid

    def _held_commands(self) -> Mapping[str, str] | None:
        """None where they cannot be told: a control character in any block is no XML."""
        try:
            return self._rpc.commands()
        except Refused:
            raise
        except TransientError as error:
            self._complain("commands not told", "supervisord", str(error))
            return None

    def _is_held(self, name: str, held: Mapping[str, str]) -> bool:
        """Whether supervisord holds the block that is on disk: `reread` alone is not `update`."""
        if not self._on_disk[name].digest:
            return False  # a named pipe is not waited for
        try:
            text = self._deployment.block(name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        words = conf_d.command_words(text)
        return bool(words) and conf_d.command_words(f"command={held.get(name, '')}") == words

    # --- broken files -----------------------------------------------------------------------------

    def _check_files(self, found: Registry) -> None:
        """Files that changed and are not being written any more: could supervisord read them?"""
        now = time.monotonic()
        since, seen = self._still_since
        if self._on_disk != seen:
            self._still_since = (now, dict(self._on_disk))
            self._is_others = False
            return
        if self._on_disk == self._checked or now - since < _STILL_SECONDS:
            return
        # Others' files are mended by others, perhaps outside of conf.d.
        if not self._may_try("check", _SELDOM_SECONDS if self._is_others else _AGAIN_SECONDS):
            return
        ours = {self._deployment.block(program.name): program.name for program in found.programs}
        self._broken = ""
        broken = config_files.broken_files(self._deployment.main_config)
        named = {one.path for one in broken}
        broken += tuple(one for one in self._without_programs(ours) if one.path not in named)
        self._is_others = all(ours.get(one.path) not in self._standings for one in broken)
        for one in broken:
            name = ours.get(one.path)
            if name is None or name not in self._standings:
                self._broken = self._broken or str(one)
                self._complain("broken configuration", str(one.path), str(one))
                continue
            failure = Failure(FailureClass.BAD_ARGUMENT, str(one), time.time())
            digest = self._on_disk[name].digest
            self._do("broken block", partial(self._deployer.set_aside, name, digest, failure))
        if not broken:
            self._checked = dict(self._on_disk)

    def _without_programs(self, ours: Mapping[Path, str]) -> list[Broken]:
        """Blocks of models that no longer say what program it is: it would be gone in silence."""
        found = []
        for path, name in ours.items():
            there, standing = self._on_disk.get(name), self._standings.get(name)
            if there is None or standing is None or there.digest == standing.digest:
                continue
            with contextlib.suppress(OSError, ValueError):
                text = path.read_text(encoding="utf-8")
                section = f"program:{name}"
                if all(one.section != section for one in config_files.options_of(text)):
                    found.append(Broken(path, None, f"has no section [{section}]"))
        return found

    # --- what supervisord is still to be told -----------------------------------------------------

    def _look_at_untold(self, found: Registry, table: Mapping[str, Process]) -> frozenset[str]:
        if not found.untold:
            return frozenset()
        reread = self._read_again(found.untold)
        if reread is None:
            return frozenset()
        ours = {program.name for program in found.programs}
        told = [
            name
            for name in found.untold
            if name not in reread.changed | reread.added | reread.removed
            and (table[name].pid if name in table else name not in ours)
        ]
        if told:
            self._do("told", partial(self._deployer.forget_untold, told))
        new = [name for name in found.untold if name in ours and name not in table]
        if new and self._may_try(f"add {new}"):
            self._do("added", partial(self._deployer.renew, new))
        for name in found.untold:
            if name not in ours and name in table and name not in told:
                self._dismiss(name, table[name])
        return reread.changed & frozenset(found.untold)

    def _read_again(self, untold: Mapping[str, str]) -> Reread | None:
        at, of, reread = self._reread
        now = time.monotonic()
        if dict(untold) == of and now - at < _AGAIN_SECONDS:
            return reread
        try:
            reread = self._rpc.reread()
        except Refused as refused:
            self._complain("supervisord cannot read its files", "supervisord", str(refused))
            reread = None
        self._reread = (now, dict(untold), reread)
        return reread

    def _dismiss(self, name: str, process: Process) -> None:
        """A program whose block was removed: it drains, then it goes."""
        if process.pid:
            if process.state is not ProcessState.STOPPING and self._may_try(f"stop {name}"):
                self._rpc.stop(name)
        elif self._may_try(f"remove {name}"):
            self._do("removed", partial(self._deployer.renew, (name,)))

    # --- trying and telling -----------------------------------------------------------------------

    def _may_try(self, what: str, wait_seconds: float = _AGAIN_SECONDS) -> bool:
        now = time.monotonic()
        at = self._tried_at.get(what)
        if at is not None and now - at < wait_seconds:
            return False
        self._note_try(what, now)
        return True

    def _note_try(self, what: str, now: float) -> None:
        self._tried_at.pop(what, None)
        self._tried_at[what] = now
        if len(self._tried_at) > _MOST_TRIES:
            del self._tried_at[next(iter(self._tried_at))]  # the oldest

    def _do(self, what: str, change: Callable[[], object]) -> bool:
        """Whether it was done; why not is told."""
        try:
            said = change()
        except (SynapseError, OSError, ValueError) as error:
            self._complain(f"{what}: not done", what, str(error))
            return False
        _log.info(what, extra={"done": said if isinstance(said, str) else ""})
        return True

    def _complain(self, what: str, about: str, reason: str) -> None:
        """Once a minute about the same."""
        key, now = f"{what}: {about}: {reason}", time.monotonic()
        at = self._tried_at.get(key)
        if at is None or now - at >= _REPEAT_SECONDS:
            self._note_try(key, now)
            _log.warning(what, extra={"about": about, "reason": reason})
