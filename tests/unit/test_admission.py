"""The ledger: two bounds on each device, and who makes room for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core import admission
from supervisor_synapse.core.admission import Claim, Commitment, Idle, Ledger, Rung
from supervisor_synapse.core.model import DeviceReading, Source
from supervisor_synapse.core.settings import Reserve
from tests.unit.builders import GIB, MIB, taking


def ledger(
    *commitments: Commitment, free: int | None = 8 * GIB, total: int = 8 * GIB, reserve: int = 0
) -> Ledger:
    return Ledger((DeviceReading("CUDA0", total, free),), commitments, Reserve(reserve))


def on_gpu(name: str, size: int, held: int | None = None, *, loading: bool = False) -> Commitment:
    told = () if held is None else (("CUDA0", held),)
    return Commitment(name, (("CUDA0", size),), told, is_loading=loading)


@pytest.mark.parametrize(
    ("found", "room"),
    [
        (ledger(), 8 * GIB),
        (ledger(reserve=GIB), 7 * GIB),
        (ledger(free=2 * GIB), 2 * GIB),  # strangers
        (ledger(on_gpu("a", 3 * GIB, loading=True)), 5 * GIB),  # nothing of it is taken yet
        (ledger(on_gpu("a", 3 * GIB, GIB, loading=True), free=7 * GIB), 5 * GIB),  # a part is
        (ledger(on_gpu("a", 3 * GIB)), 5 * GIB),  # its device tells nobody that it is taken
        (ledger(on_gpu("a", 3 * GIB, 3 * GIB), free=5 * GIB), 5 * GIB),
        (ledger(on_gpu("a", 3 * GIB, 4 * GIB), free=4 * GIB), 4 * GIB),  # more than it should
        (ledger(on_gpu("a", 3 * GIB, 3 * GIB), free=GIB), GIB),  # and strangers beside it
        (ledger(on_gpu("a", 9 * GIB)), -GIB),
    ],
)
def test_the_smaller_of_two_bounds_is_what_is_left(found: Ledger, room: int) -> None:
    assert found.room("CUDA0") == room


def test_a_device_of_which_nothing_is_known_admits_nothing() -> None:
    blind = Ledger((DeviceReading("CUDA0", GIB, None, problem="its driver does not answer"),))
    (short,) = blind.shortages([("CUDA0", 1)])
    assert "its driver does not answer" in str(short)
    (short,) = ledger().shortages([("CUDA7", MIB)])
    assert "was not read" in str(short)


def test_a_shortage_names_the_numbers() -> None:
    shortages = ledger(free=300 * MIB).shortages([("CUDA0", 900 * MIB)])
    assert admission.in_words(shortages) == "needs 900 MiB on CUDA0, 300 MiB left"
    assert ledger(free=900 * MIB).shortages([("CUDA0", 900 * MIB)]) == ()


def test_what_sleeps_keeps_room_for_its_waking_unless_it_may_be_overcommitted() -> None:
    asleep = Commitment("a", (("CUDA0", 3 * GIB),), (("CUDA0", GIB),))
    assert ledger(asleep, free=7 * GIB).room("CUDA0") == 5 * GIB
    risky = Commitment("a", (("CUDA0", 3 * GIB),), (("CUDA0", GIB),), is_asleep=True)
    assert ledger(risky, free=7 * GIB).room("CUDA0") == 7 * GIB


def test_needs_hold_the_margin_of_their_source() -> None:
    (learned,) = admission.needs_of(taking(1000 * MIB, source=Source.LEARNED))
    (formula,) = admission.needs_of(taking(1000 * MIB))
    assert 1000 * MIB < learned[1] < formula[1]


LADDER = Claim(
    rungs=tuple(Rung(f"{size} GiB", (("CUDA0", size * GIB),)) for size in (8, 4, 2, 1)), rung=0
)


@pytest.mark.parametrize(("free", "rung"), [(8, 1), (4, 1), (3, 2), (1, 3), (0, None)])
def test_the_next_rung_that_fits_is_taken(free: int, rung: int | None) -> None:
    assert admission.first_that_fits(ledger(free=free * GIB), LADDER) == rung


def test_a_rung_up_counts_what_the_model_itself_would_give_back() -> None:
    low = Claim(rungs=LADDER.rungs, rung=2)
    here = on_gpu("m", 2 * GIB, 2 * GIB)
    assert admission.may_climb(ledger(here, free=3 * GIB), "m", low)
    assert not admission.may_climb(ledger(here, free=2 * GIB), "m", low)  # exact, none to spare
    assert not admission.may_climb(ledger(), "m", LADDER)  # there is none above


def test_who_could_be_stopped_is_named_by_size() -> None:
    found = ledger(on_gpu("a", GIB), on_gpu("b", 3 * GIB), Commitment("c", (("CPU", GIB),)))
    assert admission.could_be_stopped(found, ["CUDA0"]) == "b (3072 MiB), a (1024 MiB)"


# --- who makes room ------------------------------------------------------------------------------


def test_the_least_important_goes_and_among_equals_the_longest_idle() -> None:
    found = ledger(*(on_gpu(name, 2 * GIB, 2 * GIB) for name in "abcd"), free=0)
    idle = [Idle("a", 20, 5.0), Idle("b", 30, 1.0), Idle("c", 30, 9.0), Idle("d", 10, 99.0)]
    need = (("CUDA0", 2 * GIB),)
    assert admission.victims(found, need, 10, idle) == ("c",)
    assert admission.victims(found, need, 20, idle) == ("c",)
    assert admission.victims(found, need, 30, idle) == ()  # nobody is less important


def test_nobody_goes_in_vain() -> None:
    found = ledger(on_gpu("a", GIB, GIB), on_gpu("big", 4 * GIB, 4 * GIB), free=0)
    idle = [Idle("a", 30, 9.0), Idle("big", 30, 1.0)]
    assert admission.victims(found, [("CUDA0", 9 * GIB)], 10, idle) == ()
    assert admission.victims(found, [("CUDA0", 4 * GIB)], 10, idle) == ("big",)


SIZES = st.integers(1, 8)


@given(
    held=st.lists(st.tuples(SIZES, st.sampled_from([10, 20, 30])), max_size=6),
    need=SIZES,
    priority=st.sampled_from([10, 20, 30]),
    free=st.integers(0, 4),
)
def test_evictions_suffice_are_less_important_and_none_is_idle_talk(
    held: list[tuple[int, int]], need: int, priority: int, free: int
) -> None:
    total = (sum(size for size, _ in held) + free) * GIB
    found = ledger(
        *(on_gpu(str(n), size * GIB, size * GIB) for n, (size, _) in enumerate(held)),
        free=free * GIB, total=total,
    )  # fmt: skip
    idle = [Idle(str(n), importance, float(n)) for n, (_, importance) in enumerate(held)]
    wanted = (("CUDA0", need * GIB),)
    chosen = admission.victims(found, wanted, priority, idle)
    assert all(held[int(name)][1] > priority for name in chosen)
    if chosen:
        assert not found.without(chosen).shortages(wanted)
        assert all(
            found.without([one for one in chosen if one != name]).shortages(wanted)
            for name in chosen
        )
    elif found.shortages(wanted):
        lower = [str(n) for n, (_, importance) in enumerate(held) if importance > priority]
        assert found.without(lower).shortages(wanted)


@pytest.mark.parametrize(("free", "low"), [(GIB, False), (600 * MIB, False), (500 * MIB, True)])
def test_pressure_is_less_than_half_of_what_shall_be_kept_free(free: int, low: bool) -> None:
    assert admission.under_pressure(DeviceReading("CUDA0", 8 * GIB, free), Reserve(GIB)) is low
