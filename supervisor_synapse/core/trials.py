"""Which blocks have proved themselves: trials, and the way back. Pure.

A block is known by the sha256 of its text. A changed one is on trial until its model has been
ready without a break for the trial time; then it is good for ever. One that fails its trial is
rejected: its model goes back to the block that was last good, and the same text is not tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from supervisor_synapse.core.model import Failure, FailureClass

_MOST_GOOD = 20
_MOST_REJECTED = 40
# Who applies a generation.
DISCOVER = "discover"
UPDATE = "update"  # a block that was edited by hand, and `supervisorctl update`
ROLLBACK = "rollback"

SEVERAL = 2  # so many models that fail take their whole generation back


@dataclass(frozen=True, slots=True)
class Good:
    """A block that has proved itself."""

    digest: str
    generation: int  # in which it came


@dataclass(frozen=True, slots=True)
class Rejected:
    """A block that failed, or was refused before it was tried."""

    digest: str
    generation: int  # in which it came, or would have come
    failure: Failure | None  # None: somebody went back by command
    was_tried: bool = True
    is_meant: bool = False  # what the settings say, refused before it was tried


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one model's blocks."""

    digest: str = ""  # of the one that is applied
    generation: int = 0  # in which it came
    good: tuple[Good, ...] = ()  # the newest last
    rejected: tuple[Rejected, ...] = ()
    refused: Rejected | None = None  # what the applied one stands in for

    @property
    def on_trial(self) -> bool:
        return all(one.digest != self.digest for one in self.good)

    @property
    def former(self) -> Good | None:
        """The block that was last good, beside the applied one."""
        others = [one for one in self.good if one.digest != self.digest]
        return others[-1] if others else None

    def rejection(self, digest: str) -> Rejected | None:
        """Why a block is not tried again."""
        return next((one for one in self.rejected if one.digest == digest), None)


Standings = Mapping[str, Standing]


@dataclass(frozen=True, slots=True)
class Trial:
    """What is at stake while a block is on trial; `former_needs`: memory, by device."""

    digest: str
    generation: int
    former: Good | None = None  # None: there is no way back
    former_needs: tuple[tuple[str, int], ...] = ()
    has_other_port: bool = False  # than the former one
    rejection: Rejected | None = None  # the same text failed before
    broken: tuple[tuple[str, FailureClass], ...] = ()  # by the same generation, and how


@dataclass(frozen=True, slots=True)
class Generation:
    """One set of blocks that was applied."""

    number: int
    at: float  # wall clock, seconds since the epoch
    surface: str  # who applied it
    why: str
    blocks: Mapping[str, str] = field(default_factory=dict)  # digest by program name
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)  # why blocks were taken back
    command: str = ""  # the id of the command that asked for it


def rejected(standing: Standing, rejection: Rejected, beside: str = "") -> Standing:
    """A block is not to be tried (again), nor is what was left `beside` of it (a digest)."""
    new = (
        (rejection, replace(rejection, digest=beside, was_tried=False)) if beside else (rejection,)
    )
    digests = {one.digest for one in new}
    others = tuple(one for one in standing.rejected if one.digest not in digests)
    return replace(standing, rejected=(*others, *new)[-_MOST_REJECTED:], refused=rejection)


def proven(standing: Standing) -> Standing:
    """The applied block has proved itself, and is the one to go back to from now on."""
    others = tuple(one for one in standing.good if one.digest != standing.digest)
    newest = Good(standing.digest, standing.generation)
    return replace(standing, good=(*others, newest)[-_MOST_GOOD:])


def rendered_anew(standing: Standing, digest: str) -> Standing:
    """The same configuration on another port or rung: it is trusted as much as before."""
    if digest == standing.digest:
        return standing
    after = replace(standing, digest=digest)
    return after if standing.on_trial else proven(after)


def taken_up(standings: Standings, generation: Generation) -> dict[str, Standing]:
    """The standings after a generation; what it has done already is not done again."""
    after = {name: one for name, one in standings.items() if name not in generation.removed}
    for name in (*generation.added, *generation.changed):
        standing = after.get(name, Standing())
        if standing.generation < generation.number:
            after[name] = _taken_up(standing, generation, generation.blocks[name], name)
    return after


def _taken_up(standing: Standing, generation: Generation, digest: str, name: str) -> Standing:
    fresh = replace(standing, digest=digest, generation=generation.number)
    if generation.surface == ROLLBACK:
        left = Rejected(standing.digest, standing.generation, generation.failures.get(name))
        others = tuple(one for one in standing.rejected if one.digest != digest)
        return proven(rejected(replace(fresh, rejected=others), left))
    # Whoever has discovery write a block means it: it may be tried once more. Of those that are
    # edited by hand, the ones that failed stay rejected. What was left by command is history.
    is_meant = generation.surface != UPDATE
    kept = tuple(
        one
        for one in standing.rejected
        if one.failure is not None and not (is_meant and one.digest == digest)
    )
    after = replace(fresh, rejected=kept, refused=None)
    # One that was good before is the one to go back to from now on.
    return after if after.on_trial else proven(after)


def as_meant(standing: Standing) -> Standing:
    """The settings mean the applied block: what they meant before is no longer told."""
    failed = tuple(one for one in standing.rejected if one.failure is not None)
    refused = standing.refused
    is_over = refused is not None and (refused.is_meant or refused.failure is None)
    return replace(standing, rejected=failed, refused=None if is_over else refused)


def broken_by(standings: Standings, generation: int) -> tuple[tuple[str, FailureClass], ...]:
    """Models whose blocks of one generation failed when they were tried, and how."""
    return tuple(
        (name, one.failure.failure_class)
        for name, standing in standings.items()
        for one in standing.rejected
        if one.generation == generation and one.was_tried and one.failure is not None
    )


def verdict(standing: Standing, digest: str) -> str:
    """How far a block is trusted, in a word."""
    if any(one.digest == digest for one in standing.good):
        return "good"
    if standing.rejection(digest) is not None:
        return "rejected"
    return "on trial" if digest == standing.digest else "not proved"


def in_use(generations: Iterable[Generation], standings: Standings) -> frozenset[str]:
    """Digests of blocks that somebody may still go back to."""
    found = {digest for one in generations for digest in one.blocks.values()}
    for standing in standings.values():
        found |= {standing.digest, *(one.digest for one in standing.good)}
    return frozenset(found)
