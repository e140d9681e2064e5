"""Which models start next: never a barrier, never more than there are places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.waves import next_starts


@pytest.mark.parametrize(
    ("pending", "loading", "max_parallel", "starts"),
    [
        ("", 0, 3, ""), ("a", 0, 3, "a"), ("abcde", 0, 3, "abc"), ("abcde", 1, 3, "ab"),
        ("abcde", 3, 3, ""), ("abcde", 0, 1, "a"), ("ab", 0, 64, "ab"), ("abc", 5, 3, ""),
    ],
)  # fmt: skip
def test_each_free_loading_place_is_given_to_the_first_that_waits(
    pending: str, loading: int, max_parallel: int, starts: str
) -> None:
    """More may be loading than allowed, where the user started them."""
    assert next_starts(tuple(pending), loading, max_parallel) == tuple(starts)


@given(
    pending=st.lists(st.text(), unique=True), loading=st.integers(0, 99), most=st.integers(1, 64)
)
def test_places_are_never_overrun_and_never_left_empty(
    pending: list[str], loading: int, most: int
) -> None:
    starts = next_starts(pending, loading, most)
    assert list(starts) == pending[: len(starts)]
    assert loading + len(starts) <= max(most, loading)
    assert len(starts) == len(pending) or loading + len(starts) >= most


@given(
    durations=st.lists(st.integers(1, 9), min_size=1, max_size=30), most=st.integers(1, 5),
    stuck=st.integers(0, 30),
)  # fmt: skip
def test_a_model_that_never_finishes_holds_back_nobody_else(
    durations: list[int], most: int, stuck: int
) -> None:
    """With another place free, all others have been started, in order; one place stays lost."""
    left: dict[int, int] = {}
    pending = list(range(len(durations)))
    started: list[int] = []
    for _ in range(sum(durations) + len(durations)):
        names = next_starts([str(number) for number in pending], len(left), most + 1)
        for number in map(int, names):
            pending.remove(number)
            started.append(number)
            left[number] = durations[number] if number != stuck else 10**9
        assert len(left) <= most + 1
        left = {number: rest - 1 for number, rest in left.items() if rest > 1}
    assert started == list(range(len(durations)))
    assert set(left) <= {stuck}
