"""What is seen of the models, what is remembered of them, and what may be done about them.

The frozen values that decisions are made of; see decide.py for what a model is, act.py for what is
to be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from supervisor_synapse.core.admission import Claim, Ledger
from supervisor_synapse.core.failures import Ending
from supervisor_synapse.core.model import Failure, Incarnation, Phase, ProcessState
from supervisor_synapse.core.probes import Verdict
from supervisor_synapse.core.restarts import Restarts
from supervisor_synapse.core.settings import Reserve, RestartPolicy, WhenFull
from supervisor_synapse.core.trials import Trial


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found of one model."""

    name: str
    enabled: bool  # by settings and commands together
    why: str  # it is enabled, or not
    state: ProcessState
    incarnation: Incarnation | None  # None: no process
    run: int  # names its newest run, also when that is over; 0: never started
    age_seconds: float = 0.0  # of the incarnation
    verdict: Verdict = Verdict.UNKNOWN  # of this incarnation
    verdict_reason: str = ""
    busy: bool = False
    ending: Ending | None = None  # where the process has ended by itself
    spawn_error: str = ""
    file_stamp: int = 0  # changes when the model's file does
    has_files: bool = False  # they are there, and can be read; looked at when its run has ended
    is_leaving: bool = False  # its last run is over, and what it left is being looked for
    residue: str = ""  # what its last run left behind for good
    is_asleep: bool = False
    is_swapped: bool = False  # with another, at the moment
    own_stamp: int = 0  # of its own files and arguments, whatever serves; 0: nobody looked
    claim: Claim = field(default_factory=Claim)  # on memory
    digest: str = ""  # of the block that is applied
    trial: Trial | None = None  # while that has not proved itself
    is_untold: bool = False  # supervisord may hold another block than the applied one
    is_outdated: bool = False  # it does
    is_unadopted: bool = False  # its block was edited, and that is not yet taken note of
    is_foreign: bool = False  # what runs is no server that synapse-run started

    @property
    def is_fresh(self) -> bool:
        """Never started since supervisord knows this program."""
        return self.run == 0


@dataclass(frozen=True, slots=True)
class Failover:
    """A model was given up, and its fallback serves; or it is on trial after that."""

    rung: int  # of the model itself, to which it returns
    why: str  # it was given up
    failure: Failure | None  # of the model itself
    stamp: int  # of its files and arguments, then
    trial_at: float | None  # None: not before something has changed
    trials: int = 0  # that failed
    trial: str = ""  # why it is tried, while it is
    new_stamp: int = 0  # where its files or arguments have changed
    changed_at: float | None = None
    retries: Restarts = field(default_factory=Restarts)  # of the model itself


@dataclass(frozen=True, slots=True)
class ModelState:
    """What is remembered of one model between two looks. Times are monotonic seconds."""

    phase: Phase = Phase.DISABLED
    reason: str = ""
    incarnation: Incarnation | None = None
    seen_at: float | None = None  # this incarnation, for the first time
    started_at: float | None = None  # None: nobody was looking
    ready_seconds: float | None = None
    was_ready: bool = False  # this incarnation, at some time
    ready_at: float | None = None  # ready without a break since then
    has_slept: bool = False  # this incarnation, and so freed what it held
    restarts: int = 0  # starts after a failure, by ourselves
    retries: Restarts = field(default_factory=Restarts)
    last_failure: Failure | None = None
    failed_run: int = 0  # the run whose end was judged
    failed_stamp: int = 0  # of its file, then
    asked_at: float | None = None  # a start was asked for
    condemned: Failure | None = None  # why this incarnation must go
    killed_at: float | None = None
    is_out: bool = False  # a model that had been ready was taken out and is not back
    is_by_hand: bool = False  # started although it is not enabled
    resume: bool = False  # enabled by command since it was stopped
    drain: bool = False  # to be stopped when it is idle
    moved_run: int = 0  # the failed run for which another port was asked for
    idle_since: float | None = None  # ready, and no slot works
    target_rung: int | None = None  # of the ladder: to be deployed before the next start
    replaced_at: float | None = None  # another rung was asked for
    immovable_until: float = 0.0  # its block was not ours to change
    roomy_since: float | None = None  # the rung above fits since then
    falls: int = 0  # rungs it was driven down by running out of memory
    is_refused: bool = False  # for want of memory, until it is started by hand or enabled
    evicted_for: str = ""  # who got its memory, while it is on its way out
    tried: str = ""  # the block with which its newest run began
    blessed_at: float | None = None  # when that was last said to have proved itself
    back_at: float | None = None  # when it was last told to go back to the former block
    back_from: str = ""  # from which one,
    back_since: float | None = None  # and when it was first told
    untold_at: float | None = None  # its block has changed since then
    renewed_at: float | None = None  # when supervisord was last to take that up
    out_since: float | None = None  # it was ready, and is out for another block
    rests: bool = False  # it was stopped by hand when its block changed
    stopped_at: float | None = None  # by hand; since then at rest, as seen by this listener
    failover: Failover | None = None
    is_wanted_itself: bool = False  # by a command, or by whoever started it, and not its fallback
    demanded_at: float | None = None  # somebody last said then that he waits for it
    is_dormant: bool = False  # stopped because nobody used it, until it is asked for


@dataclass(frozen=True, slots=True)
class Start:
    """Ask supervisord to start a model."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask supervisord to stop a model; it drains."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End a run that answers no more: it is not asked."""

    name: str
    incarnation: Incarnation
    reason: str


@dataclass(frozen=True, slots=True)
class MovePort:
    """Give a model another port: a stranger has its own."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetRung:
    """Deploy another rung of a model's ladder; it does not run."""

    name: str
    rung: int
    reason: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Have supervisord take up the block of a model that does not run."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Bless:
    """The block of a model has proved itself."""

    name: str
    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Put the former good block of a model in place of the one that is on trial, which failed."""

    name: str
    digest: str  # of the one that failed
    failure: Failure
    reason: str


Action = Start | Stop | Kill | MovePort | SetRung | Renew | Bless | RollBack


@dataclass(frozen=True, slots=True)
class Transition:
    """A model went from one phase to another."""

    model: str
    before: Phase | None  # None: seen for the first time
    after: Phase
    reason: str
    incarnation: Incarnation | None = None
    failure: Failure | None = None  # what caused it, where something failed


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say of these decisions."""

    max_parallel: int = 3
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    reserve: Reserve = field(default_factory=Reserve)
    when_full: WhenFull = WhenFull.DEGRADE
    climb_after_seconds: float = 60.0
    overcommit_sleepers: bool = False
    trial_seconds: float = 60.0
    idle_stop_seconds: float = 0.0  # 0: what nobody uses is left alone


@dataclass(frozen=True, slots=True)
class Now:
    """The two clocks and one chance in [0, 1), read once for each decision."""

    monotonic: float
    wall: float
    chance: float = 0.5


@dataclass(frozen=True, slots=True)
class Decision:
    """New states by name, what to do, what has changed, and what is committed of the devices."""

    states: Mapping[str, ModelState]
    actions: tuple[Action, ...]
    transitions: tuple[Transition, ...]
    ledger: Ledger = field(default_factory=Ledger)
