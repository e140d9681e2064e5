"""Which tests need the machine for themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# They hold what happens against few seconds, or load the machine; the others only wait.
ALONE = frozenset({"test_changes", "test_gateway", "test_launcher", "test_stopping", "test_stress"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, for the Makefile."""
    for item in items:
        if item.path.parent == HERE and item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)
