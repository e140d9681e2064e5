"""Devices as the surfaces show them: numbers that add up, and no guess where nothing is known."""

from __future__ import annotations

from supervisor_synapse.core.admission import Commitment, Ledger
from supervisor_synapse.core.model import Device, DeviceReading, Holding
from supervisor_synapse.core.overview import device_rows
from supervisor_synapse.core.settings import Reserve
from tests.unit.builders import GIB, MIB

CUDA = Device("CUDA0", 80 * GIB, 70 * GIB, "NVIDIA H100")
RESERVE = Reserve(bytes=512 * MIB)


def ledger(reading: DeviceReading, *commitments: Commitment) -> Ledger:
    return Ledger((reading,), commitments, RESERVE)


def test_what_models_hold_and_what_others_took_add_up_to_what_is_not_free() -> None:
    reading = DeviceReading("CUDA0", 80 * GIB, 60 * GIB)
    model = Commitment("a", (("CUDA0", 8 * GIB),), held=(("CUDA0", 7 * GIB),))
    (found,) = device_rows([CUDA], ledger(reading, model))
    assert found.description == "NVIDIA H100"
    assert found.models == (Holding("a", 7 * GIB, 8 * GIB),)
    assert found.others_bytes == 13 * GIB
    assert found.reserve_bytes == 512 * MIB
    assert found.room_bytes == 60 * GIB - 1 * GIB - 512 * MIB


def test_a_model_that_is_not_measured_there_has_only_its_commitment() -> None:
    loading = Commitment("a", (("CUDA0", 8 * GIB),), is_loading=True)
    (found,) = device_rows([CUDA], ledger(DeviceReading("CUDA0", 80 * GIB, 80 * GIB), loading))
    assert found.models == (Holding("a", None, 8 * GIB),)
    assert found.others_bytes == 0


def test_a_device_that_does_not_answer_shows_no_figures_and_says_why() -> None:
    reading = DeviceReading("CUDA0", 80 * GIB, None, problem="its reader does not answer")
    (found,) = device_rows([CUDA], ledger(reading))
    assert found.free_bytes is found.room_bytes is found.others_bytes is None
    assert found.problem == "its reader does not answer"


def test_a_model_elsewhere_is_not_shown_on_a_device() -> None:
    elsewhere = Commitment("a", (("CPU", GIB),), held=(("CPU", GIB),))
    (found,) = device_rows([CUDA], ledger(DeviceReading("CUDA0", 80 * GIB, 80 * GIB), elsewhere))
    assert found.models == ()


def test_weights_that_are_mapped_and_count_as_free_make_others_no_less_than_nothing() -> None:
    mapped = Commitment("a", (("CPU", 8 * GIB),), held=(("CPU", 8 * GIB),))
    reading = DeviceReading("CPU", 64 * GIB, 63 * GIB)
    (found,) = device_rows([], ledger(reading, mapped))
    assert found.others_bytes == 0
