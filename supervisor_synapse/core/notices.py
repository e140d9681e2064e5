"""Which transitions somebody is told of, and how many of them. Pure; monotonic time is passed in.

A bucket of tokens bounds the rate: half of a minute's notices at once, the rest evenly, and so
never more than `most_per_minute` in any minute. What finds no token is held: of each model the
newest, which takes the place of the one before. So a flood is cut short, what was left out is
counted, and the last word about each model is told all the same, as soon as there is a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.settings import NotifyPolicy

_MINUTE_SECONDS = 60.0
_MOST_HELD = 256  # models
_LONGEST_TEXT = 1000  # characters
_NEARLY = 1e-9  # a token that lacks no more than this is whole


@dataclass(frozen=True, slots=True)
class Notice:
    """One transition; `at` is wall clock. `failure_class` where something has failed."""

    at: float
    model: str
    before: str | None
    after: str
    reason: str
    failure_class: str | None = None
    evidence: str = ""
    pid: int | None = None
    started: int | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A notice that is to be told; `suppressed`: how many before it were left out."""

    notice: Notice
    suppressed: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """What waits for a token, each model once, and what was left out since something was told."""

    tokens: float | None = None  # None: as many as there may be
    counted_at: float = 0.0
    held: tuple[Notice, ...] = ()
    left_out: int = 0


def is_told(notice: Notice, policy: NotifyPolicy) -> bool:
    """Whether the settings want to hear of it."""
    if not any(fnmatchcase(notice.model, pattern.lower()) for pattern in policy.models):
        return False
    has_failed = notice.failure_class is not None
    has_come = notice.after != notice.before and Phase(notice.after) in policy.phases
    return has_come or (has_failed and policy.failures)


def hold(flow: Flow, notice: Notice) -> Flow:
    """One more notice waits; the one about the same model before it is left out.

    It takes that one's place in the row, so that nobody who is told of again and again waits for
    ever.
    """
    models = [one.model for one in flow.held]
    if notice.model in models:
        held = tuple(notice if one.model == notice.model else one for one in flow.held)
        return replace(flow, held=held, left_out=flow.left_out + 1)
    held = (*flow.held, notice)
    too_many = max(len(held) - _MOST_HELD, 0)
    return replace(flow, held=held[too_many:], left_out=flow.left_out + too_many)


def release(flow: Flow, now: float, most_per_minute: int) -> tuple[Flow, tuple[Told, ...]]:
    """What may be told now, first held first; the first of it says what was left out."""
    tokens = _tokens(flow, now, most_per_minute)
    count = min(int(tokens + _NEARLY), len(flow.held))
    due = tuple(
        Told(notice, 0 if index else flow.left_out)
        for index, notice in enumerate(flow.held[:count])
    )
    left_out = 0 if due else flow.left_out
    return Flow(tokens - count, now, flow.held[count:], left_out), due


def seconds_until_next(flow: Flow, most_per_minute: int) -> float | None:
    """How long, from the last release, until there is a token; None where nothing is held."""
    if not flow.held or flow.tokens is None:
        return None
    return max(1 - flow.tokens, 0.0) / _tokens_per_second(most_per_minute)


def _tokens(flow: Flow, now: float, most_per_minute: int) -> float:
    capacity = (most_per_minute + 1) // 2
    if flow.tokens is None:
        return capacity
    new = max(now - flow.counted_at, 0.0) * _tokens_per_second(most_per_minute)
    return min(flow.tokens + new, capacity)


def _tokens_per_second(most_per_minute: int) -> float:
    return max(most_per_minute // 2, 1) / _MINUTE_SECONDS


def payload(told: Told, hostname: str, prefix: str) -> dict[str, object]:
    """The object that a hook gets."""
    notice = told.notice
    run = None if notice.pid is None else {"pid": notice.pid, "started": notice.started}
    return {
        "when": notice.at, "model": notice.model, "from": notice.before, "to": notice.after,
        "reason": notice.reason[:_LONGEST_TEXT], "class": notice.failure_class,
        "evidence": notice.evidence[:_LONGEST_TEXT], "incarnation": run, "hostname": hostname,
        "prefix": prefix, "suppressed": told.suppressed,
    }  # fmt: skip


def selected(notices: Iterable[Notice], policy: NotifyPolicy) -> tuple[Notice, ...]:
    """Those that the settings want to hear of."""
    return tuple(notice for notice in notices if is_told(notice, policy))
