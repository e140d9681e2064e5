"""Backoff and breaker, as tables of failures in time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.restarts import (
    Restarts,
    after_failure,
    after_healthy,
    delay_seconds,
    is_due,
    on_start,
)
from supervisor_synapse.core.settings import RestartPolicy

POLICY = RestartPolicy()
MIDDLE = 0.5  # the chance that leaves a delay as it is


def fail(*times: float, policy: RestartPolicy = POLICY, jitter: float = MIDDLE) -> Restarts:
    """Failures at these times, with a start between each two."""
    state = Restarts()
    for at in times:
        state = after_failure(on_start(state), at, jitter, policy)
    return state


@pytest.mark.parametrize(
    ("attempt", "seconds"),
    [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (8, 128.0), (9, 256.0), (10, 300.0), (1000, 300.0)],
)
def test_delays_are_geometric_up_to_the_maximum(attempt: int, seconds: float) -> None:
    assert delay_seconds(attempt, MIDDLE, POLICY) == pytest.approx(seconds)


def test_a_factor_of_one_waits_the_same_each_time() -> None:
    policy = RestartPolicy(backoff_factor=1.0)
    assert {delay_seconds(attempt, MIDDLE, policy) for attempt in (1, 2, 50)} == {1.0}


def test_a_huge_factor_and_many_attempts_stay_at_the_maximum() -> None:
    """No overflow on the way."""
    policy = RestartPolicy(backoff_factor=100.0)
    assert delay_seconds(10**6, MIDDLE, policy) == pytest.approx(300.0)


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True))
def test_jitter_stays_within_a_fifth(attempt: int, jitter: float) -> None:
    nominal = delay_seconds(attempt, MIDDLE, POLICY)
    tolerance = 1e-9 * nominal
    assert 0.8 * nominal - tolerance <= delay_seconds(attempt, jitter, POLICY)
    assert delay_seconds(attempt, jitter, POLICY) <= 1.2 * nominal + tolerance


def test_a_first_failure_waits_for_the_initial_delay() -> None:
    state = fail(100.0)
    assert (state.retry_at, state.is_open) == (101.0, False)
    assert not is_due(state, 100.9)
    assert is_due(state, 101.0)


def test_nothing_to_wait_for_is_due() -> None:
    assert is_due(Restarts(), 0.0)


def test_the_failure_that_makes_up_the_intensity_opens_the_breaker() -> None:
    """Four do not, five do; then it is the cooldown that counts."""
    assert not fail(0, 2, 5, 10).is_open
    state = fail(0, 2, 5, 10, 20)
    assert (state.is_open, state.retry_at) == (True, 20 + POLICY.cooldown_seconds)


def test_failures_longer_ago_than_a_period_do_not_count_for_the_breaker() -> None:
    """But for the delay they do."""
    state = fail(0, 200, 400, 590, 601)
    assert not state.is_open
    assert state.retry_at == pytest.approx(601 + 16)


def test_an_intensity_of_one_opens_at_the_first_failure() -> None:
    assert fail(0.0, policy=RestartPolicy(intensity=1)).is_open


def test_a_trial_that_fails_opens_the_breaker_at_once() -> None:
    """Also long after the failures that had opened it."""
    trial = on_start(fail(0, 1, 2, 3, 4))
    assert (trial.is_trial, trial.is_open, trial.retry_at) == (True, False, None)
    failed = after_failure(trial, 5000.0, MIDDLE, POLICY)
    assert (failed.is_open, failed.retry_at) == (True, 5000.0 + POLICY.cooldown_seconds)


def test_a_trial_stays_one_however_often_its_start_is_seen() -> None:
    trial = on_start(on_start(fail(0, 1, 2, 3, 4)))
    assert trial.is_trial


def test_only_a_full_healthy_period_closes_the_breaker() -> None:
    trial = on_start(fail(0, 1, 2, 3, 4))
    assert after_healthy(trial, POLICY.period_seconds - 0.1, POLICY) == trial
    assert after_healthy(trial, POLICY.period_seconds, POLICY) == Restarts()


@given(
    st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 6),
)
def test_never_more_starts_in_a_period_than_the_intensity(
    waits: list[float], jitter: float, intensity: int
) -> None:
    """A start happens no earlier than it is due; each one fails after some time."""
    policy = RestartPolicy(intensity=intensity)
    state, now, starts = Restarts(), 0.0, []
    for wait in waits:
        now = max(now, state.retry_at or 0.0)
        starts.append(now)
        state = on_start(state)
        now += wait
        state = after_failure(state, now, jitter, policy)
        assert state.retry_at is not None
        assert state.retry_at > now
    windows = [
        [at for at in starts if first <= at < first + policy.period_seconds] for first in starts
    ]
    # The last one of a window may be young when its failure is counted.
    assert max(map(len, windows)) <= intensity + 1


@given(st.lists(st.floats(0.1, 100.0), min_size=2, max_size=8))
def test_delays_never_shrink_while_failures_go_on(waits: list[float]) -> None:
    policy = RestartPolicy(intensity=1000)
    state, now, delays = Restarts(), 0.0, []
    for wait in waits:
        now += wait
        state = after_failure(on_start(state), now, MIDDLE, policy)
        delays.append((state.retry_at or 0.0) - now)
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(delays))


def test_what_is_remembered_stays_small() -> None:
    """However many failures there were."""
    state = fail(*[float(number) for number in range(500)])
    assert len(state.failures) <= POLICY.intensity
