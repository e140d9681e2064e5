"""Which models start next: by priority, and no more loading at once than allowed."""

from __future__ import annotations

from collections.abc import Sequence


def next_starts(pending: Sequence[str], loading: int, max_parallel: int) -> tuple[str, ...]:
    """The first of `pending` (highest priority first) for which there is a loading place.

    A wave is not a barrier: each place that becomes free is given away at once, so that one slow
    or failed model never holds back the next.
    """
    return tuple(pending[: max(max_parallel - loading, 0)])
