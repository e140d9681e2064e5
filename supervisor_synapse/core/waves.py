"""How many models may load at once.

A wave is not a barrier: each place that becomes free is given away at once, in the order of
priority, so that one slow or failed model never holds back the next.
"""

from __future__ import annotations


def free_places(loading: int, max_parallel: int) -> int:
    """Places for further models beside `loading` ones."""
    return max(max_parallel - loading, 0)
