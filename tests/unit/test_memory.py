"""What the listener tells launchers of memory, and what it hears from them meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from supervisor_synapse import launcher
from supervisor_synapse.adapters import footprints
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.gpu import drivers
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.core.admission import Claim, Commitment, Ledger, Rung
from supervisor_synapse.core.load_log import Loaded
from supervisor_synapse.core.model import DeviceReading, Incarnation, Part
from supervisor_synapse.core.settings import Reserve
from supervisor_synapse.memory import Memory, Run
from tests.unit.builders import GIB, MIB, engine, gpu, program

US = Incarnation(os.getpid(), 1)
CLAIMS = {"a": Claim((Rung("as configured", (("CUDA0", 600 * MIB),)),))}
READINGS = (DeviceReading("CUDA0", GIB, GIB),)
BEFORE = Ledger(READINGS, (), Reserve(bytes=0))
ADMITTED = BEFORE.with_one(Commitment("a", (("CUDA0", 600 * MIB),), is_loading=True))


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    found = Deployment(tmp_path / "p")
    found.run.mkdir(parents=True)
    return found


def tell(memory: Memory, found: Ledger, up: Iterable[Incarnation] = ()) -> bool:
    up = tuple(up)
    return asyncio.run(memory.tell(found, CLAIMS, up, up))


def claim(deployment: Deployment) -> None:
    """Somebody starts a model by hand: by the word that stands, this process is its launcher."""
    launcher.require_memory(str(deployment.ledger), "a")


def is_admitted(deployment: Deployment) -> bool:
    return launcher.read_word(str(deployment.ledger), "a") is None


def test_what_is_admitted_is_told(deployment: Deployment) -> None:
    memory = Memory(deployment)
    assert tell(memory, BEFORE)
    assert not is_admitted(deployment)
    assert tell(memory, ADMITTED)
    assert is_admitted(deployment)


def test_what_was_claimed_meanwhile_is_decided_anew(deployment: Deployment) -> None:
    """Both would take the same memory: the word that admits ours is not given."""
    memory = Memory(deployment)
    assert tell(memory, BEFORE)
    claim(deployment)
    assert not tell(memory, ADMITTED)
    assert not is_admitted(deployment)


def test_once_the_run_is_seen_its_claim_holds_up_nothing(deployment: Deployment) -> None:
    memory = Memory(deployment)
    tell(memory, BEFORE)
    claim(deployment)
    assert tell(memory, ADMITTED, [US])
    assert is_admitted(deployment)


def test_a_claim_of_nobody_that_supervisord_knows_holds_up_only_once(
    deployment: Deployment,
) -> None:
    memory = Memory(deployment)
    tell(memory, BEFORE)
    claim(deployment)
    assert not tell(memory, ADMITTED)
    assert tell(memory, ADMITTED)
    assert is_admitted(deployment)


def test_where_the_lock_is_not_to_be_had_the_word_is_given_all_the_same(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_LOCK_SECONDS", 0.05)
    held = launcher.take_lock(f"{deployment.ledger}.lock")
    assert held is not None
    try:
        assert tell(Memory(deployment), BEFORE)
    finally:
        os.close(held)
    assert not is_admitted(deployment)


# --- learning -----------------------------------------------------------------------------------


def learned_bytes(deployment: Deployment) -> list[int]:
    """What each load of the only footprint took on the GPU."""
    (footprint,) = footprints.load(deployment.footprints).by_key.values()
    return [part.total_bytes for load in footprint.loads for part in load.parts if part.device]


def test_what_grows_after_it_was_ready_is_learned_again(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers make things for the first requests; a little more is no news."""
    deployment.lib.mkdir(parents=True)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    served = program(name="a", model_path=str(path), device="CUDA0")
    registry = Registry(programs=(served,), devices=(gpu("CUDA0", GIB),))
    loaded = Loaded((Part("CUDA0", weights_bytes=600 * MIB),), 3, 3)
    run = Run(served, US, is_ready=True, loaded=loaded)
    held = [700 * MIB, 701 * MIB, 740 * MIB, 741 * MIB]
    reading = iter(held)

    def read_all(*_: object) -> tuple[DeviceReading, ...]:
        return (DeviceReading("CUDA0", GIB, GIB // 4, (("a", next(reading)),)),)

    monkeypatch.setattr(drivers, "read_all", read_all)
    monkeypatch.setattr(Memory, "_find_engine", lambda *_: engine())
    monkeypatch.setattr("supervisor_synapse.memory._READ_OFTEN_SECONDS", 0.0)

    async def looks() -> None:
        memory = Memory(deployment)
        for _ in held:
            await memory.look(registry, 1, {"a": run}, frozenset(), is_awaited=True)
            await asyncio.gather(
                *(task for task in asyncio.all_tasks() if task is not asyncio.current_task())
            )
        memory.close()

    asyncio.run(looks())
    assert learned_bytes(deployment) == [700 * MIB, 740 * MIB]
