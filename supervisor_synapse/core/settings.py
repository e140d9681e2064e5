"""What the user may choose, as frozen values; `config.py` reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from supervisor_synapse.core.model import Phase, Tier

MIB = 1024 * 1024


class Enable(Enum):
    """Which models are brought up when no `[model:…]` section says."""

    FIT = "fit"
    ALL = "all"
    NONE = "none"


class WhenFull(Enum):
    """What happens to a model for which there is no memory."""

    DEGRADE = "degrade"
    EVICT = "evict"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Reserve:
    """Memory kept free on each device: so many bytes, or so large a part of the device."""

    bytes: int = 512 * MIB
    fraction: float = 0.0

    def of(self, total_bytes: int) -> int:
        """Bytes to keep free on a device of `total_bytes`."""
        return max(self.bytes, int(total_bytes * self.fraction))


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """Kubernetes' words. `stall_seconds`: busy, and nothing moved for so long, is wedged."""

    period_seconds: float = 5.0
    timeout_seconds: float = 2.0
    failure_threshold: int = 3
    stall_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential backoff, and a breaker: `intensity` restarts within `period_seconds` open it."""

    backoff_initial_seconds: float = 1.0
    backoff_factor: float = 2.0
    backoff_max_seconds: float = 300.0
    intensity: int = 5
    period_seconds: float = 600.0
    cooldown_seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class StopPolicy:
    """How a stop proceeds: drain, TERM, a second TERM, KILL."""

    drain_seconds: int = 30
    term_seconds: int = 2

    @property
    def longest_seconds(self) -> int:
        """After this long a stop has ended, one way or the other."""
        return self.drain_seconds + 2 * self.term_seconds + 5


@dataclass(frozen=True, slots=True)
class NotifyPolicy:
    """Who is told of transitions (nobody where there is neither command nor url), and of which."""

    command: tuple[str, ...] = ()  # a program and its arguments
    url: str = ""
    url_header_file: str = ""
    phases: tuple[Phase, ...] = (Phase.DEFERRED, Phase.READY, Phase.FAILED)  # that are entered
    failures: bool = True  # also whatever else is told with a failure
    models: tuple[str, ...] = ("*",)  # patterns for program names
    timeout_seconds: float = 10.0
    most_per_minute: int = 30


@dataclass(frozen=True, slots=True)
class TierRule:
    """One tier: models up to `max_parameters` (None: any) that no smaller tier took."""

    tier: Tier
    max_parameters: int | None
    priority: int  # lower comes first
    min_context: int
    max_context: int


DEFAULT_TIERS = (
    TierRule(Tier.FAST, 7_000_000_000, 10, 2048, 16384),
    TierRule(Tier.BALANCED, 15_000_000_000, 20, 4096, 32768),
    TierRule(Tier.POWERFUL, None, 30, 4096, 32768),
)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One `[model:GLOB]` section, or several merged; None: not said, or `auto`."""

    enabled: bool | None = None
    tier: Tier | None = None
    alias: str | None = None
    port: int | None = None
    context: int | None = None
    parallel: int | None = None
    gpu_layers: int | None = None
    device: str | None = None
    fallback: str | None = None
    sleep_idle_seconds: int | None = None
    pinned: bool | None = None
    args: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelRule:
    """Settings for every model whose program name or `repo/file` matches `glob`.

    `said` names the keys that the section sets, so that `context = auto` in a later
    section can undo a number in an earlier one.
    """

    glob: str
    settings: ModelSettings
    said: frozenset[str]

    def matches(self, name: str, repo_file: str) -> bool:
        glob = self.glob.lower()
        return fnmatchcase(name, glob) or fnmatchcase(repo_file.lower(), glob)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of etc/synapse.conf."""

    cache_dirs: tuple[str, ...] = ()
    model_dirs: tuple[str, ...] = ()
    engine: str = "auto"
    rpc: tuple[str, ...] = ()  # host:port of further devices, for the engine's --rpc
    first_port: int = 8100
    last_port: int = 8199
    host: str = "127.0.0.1"
    enable: Enable = Enable.FIT
    max_parallel: int = 3
    memory_reserve: Reserve = Reserve()
    when_full: WhenFull = WhenFull.DEGRADE
    climb_after_seconds: int = 60  # how long there must be room before a model steps up again
    overcommit_sleepers: bool = False  # what sleeps holds only what it has
    trial_seconds: int = 60  # a changed block that was ready for so long has proved itself
    probe: ProbePolicy = ProbePolicy()
    restart: RestartPolicy = RestartPolicy()
    stop: StopPolicy = StopPolicy()
    notify: NotifyPolicy = NotifyPolicy()
    tiers: tuple[TierRule, ...] = DEFAULT_TIERS
    models: tuple[ModelRule, ...] = field(default=())

    def tier_of(self, parameters: int) -> TierRule:
        """The first tier, smallest first, that takes so many parameters."""
        for rule in self.tiers:
            if rule.max_parameters is None or parameters <= rule.max_parameters:
                return rule
        return self.tiers[-1]

    def rule(self, tier: Tier) -> TierRule:
        return next(rule for rule in self.tiers if rule.tier is tier)

    def for_model(self, name: str, repo_file: str) -> ModelSettings:
        """What the sections that match say, later ones winning key by key."""
        merged: dict[str, object] = {}
        for rule in self.models:
            if rule.matches(name, repo_file):
                merged.update((key, getattr(rule.settings, key)) for key in rule.said)
        return ModelSettings(**merged)  # type: ignore[arg-type]  # keys and types: ModelSettings'
