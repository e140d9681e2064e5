"""Places for models that load."""

from __future__ import annotations

import pytest

from supervisor_synapse.core.waves import free_places


@pytest.mark.parametrize(
    ("loading", "max_parallel", "places"), [(0, 3, 3), (2, 3, 1), (3, 3, 0), (5, 3, 0), (0, 1, 1)]
)
def test_no_more_load_at_once_than_allowed(loading: int, max_parallel: int, places: int) -> None:
    """Also where more load already, since the limit was lowered meanwhile."""
    assert free_places(loading, max_parallel) == places
