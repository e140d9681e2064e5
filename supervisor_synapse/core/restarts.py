"""When a model that failed is started again: exponential backoff, and a circuit breaker.

Closed: each failure waits longer than the one before. Open: `intensity` failures within
`period_seconds`; nothing is tried for `cooldown_seconds`. Half-open: one trial; its failure opens
the breaker again, a full healthy period closes it. Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from supervisor_synapse.core.settings import RestartPolicy

_JITTER = 0.2  # a delay is this part shorter or longer, so that models do not fail in step


@dataclass(frozen=True, slots=True)
class Restarts:
    """What is remembered of a model's failures."""

    attempt: int = 0  # failures since the last full healthy period
    failures: tuple[float, ...] = ()  # when, within the last period
    retry_at: float | None = None
    is_open: bool = False
    is_trial: bool = False  # half-open: started once more after the cooldown


def after_failure(before: Restarts, now: float, jitter: float, policy: RestartPolicy) -> Restarts:
    """One more failure; `jitter` is chance, within [0, 1)."""
    recent = tuple(at for at in before.failures if now - at < policy.period_seconds)
    failures = (*recent, now)[-policy.intensity :]
    attempt = before.attempt + 1
    if before.is_trial or len(failures) >= policy.intensity:
        return Restarts(attempt, failures, now + policy.cooldown_seconds, is_open=True)
    return Restarts(attempt, failures, now + delay_seconds(attempt, jitter, policy))


def delay_seconds(attempt: int, jitter: float, policy: RestartPolicy) -> float:
    """The wait before start number `attempt + 1`; geometric up to the maximum, then jittered."""
    longest = policy.backoff_max_seconds
    delay = policy.backoff_initial_seconds
    for _ in range(attempt - 1):
        delay *= policy.backoff_factor
        if delay >= longest:
            break
    return min(delay, longest) * (1 - _JITTER + 2 * _JITTER * jitter)


def is_due(state: Restarts, now: float) -> bool:
    """Whether the wait is over."""
    return state.retry_at is None or now >= state.retry_at


def on_start(state: Restarts) -> Restarts:
    """The wait is over; a start out of an open breaker is the trial."""
    return replace(state, retry_at=None, is_open=False, is_trial=state.is_trial or state.is_open)


def after_healthy(state: Restarts, healthy_seconds: float, policy: RestartPolicy) -> Restarts:
    """All is forgotten, but only after a full healthy period."""
    return Restarts() if healthy_seconds >= policy.period_seconds else state
