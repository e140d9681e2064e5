"""Which tests need the machine for themselves."""

from __future__ import annotations

import pytest

# They hold what happens against seconds that were promised; the others only wait for it.
ALONE = frozenset(
    {
        "test_changes", "test_changes_attacked", "test_failover", "test_gateway", "test_healing",
        "test_launcher", "test_memory", "test_notifications", "test_rpc_devices", "test_stopping",
        "test_stress", "test_swapping",
    }
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, for the Makefile."""
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)
