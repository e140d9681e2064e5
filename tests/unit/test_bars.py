"""Bars of memory: nothing that is there is left out, and nothing is wider than the bar."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core import bars
from supervisor_synapse.core.bars import Kind, Part
from supervisor_synapse.core.model import DeviceRow, Holding
from tests.unit.builders import GIB, MIB

SIZES = st.integers(min_value=0, max_value=2**45)


def device(*models: Holding, **changes: object) -> DeviceRow:
    values: dict[str, object] = {
        "name": "CUDA0", "description": "", "total_bytes": 80 * GIB, "free_bytes": 30 * GIB,
        "reserve_bytes": GIB, "room_bytes": 27 * GIB, "others_bytes": 10 * GIB,
    }  # fmt: skip
    return DeviceRow(**(values | changes | {"models": models}))  # type: ignore[arg-type]


def test_the_parts_of_a_device_add_up_to_it() -> None:
    held = Holding("a", 38 * GIB, 40 * GIB), Holding("b", 2 * GIB, 2 * GIB)
    assert bars.parts(device(*held)) == [
        Part(Kind.OURS, 38 * GIB, "a"), Part(Kind.TO_COME, 2 * GIB, "a"),
        Part(Kind.OURS, 2 * GIB, "b"), Part(Kind.OTHERS, 10 * GIB),
        Part(Kind.FREE, 27 * GIB), Part(Kind.RESERVE, GIB),
    ]  # fmt: skip


def test_where_no_reader_tells_what_is_set_aside_is_known_and_the_rest_is_not() -> None:
    silent = device(Holding("a", None, 8 * GIB), free_bytes=None, others_bytes=None)
    assert bars.parts(silent) == [
        Part(Kind.TO_COME, 8 * GIB, "a"), Part(Kind.UNKNOWN, 71 * GIB), Part(Kind.RESERVE, GIB),
    ]  # fmt: skip


def test_the_reserve_is_what_is_left_of_it() -> None:
    full = device(Holding("a", 79 * GIB, 79 * GIB), others_bytes=512 * MIB)
    assert bars.parts(full)[-1] == Part(Kind.RESERVE, 512 * MIB)
    assert Kind.FREE not in {part.kind for part in bars.parts(full)}


def test_an_idle_device_is_free_but_for_the_reserve() -> None:
    idle = device(others_bytes=0)
    assert [part.kind for part in bars.parts(idle)] == [Kind.FREE, Kind.RESERVE]


@given(
    models=st.lists(st.tuples(st.none() | SIZES, SIZES), max_size=4), others=st.none() | SIZES,
    total=SIZES, reserve=SIZES, free=st.none() | SIZES,
)  # fmt: skip
def test_whatever_is_told_no_part_is_empty_and_they_fill_the_device(
    models: list[tuple[int | None, int]], others: int | None, total: int, reserve: int,
    free: int | None,
) -> None:  # fmt: skip
    held = (Holding(str(number), *sizes) for number, sizes in enumerate(models))
    one = device(
        *held, others_bytes=others, total_bytes=total, reserve_bytes=reserve, free_bytes=free
    )
    parts = bars.parts(one)
    assert all(part.size_bytes > 0 for part in parts)
    assert sum(part.size_bytes for part in parts) >= total


def test_cells_are_shared_out_by_size() -> None:
    assert bars.cells([50, 30, 20], 10) == [5, 3, 2]
    assert bars.cells([1, 1, 1], 10) == [4, 3, 3]
    assert bars.cells([10**9, 1, 1], 10) == [8, 1, 1]
    assert bars.cells([], 10) == []
    assert bars.cells([0, 0], 10) == [0, 0]


@given(st.lists(SIZES, max_size=12), st.integers(min_value=0, max_value=200))
def test_a_bar_is_as_wide_as_it_is_to_be_and_nothing_is_left_out(
    sizes: list[int], width: int
) -> None:
    found = bars.cells(sizes, width)
    assert sum(found) == (width if sum(sizes) else 0)
    there = sum(size > 0 for size in sizes)
    for size, cell in zip(sizes, found, strict=True):
        assert cell >= (1 if size and width >= there else 0)
        assert size or not cell
