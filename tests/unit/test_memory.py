"""What the listener tells launchers of memory, and what it hears from them meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from supervisor_synapse import launcher
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.core.admission import Claim, Commitment, Ledger, Rung
from supervisor_synapse.core.model import DeviceReading, Incarnation
from supervisor_synapse.core.settings import Reserve
from supervisor_synapse.memory import Memory
from tests.unit.builders import GIB, MIB

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
