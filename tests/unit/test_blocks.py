"""The listener's look at the blocks, with a supervisord that answers by script."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import xmlrpc.client
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse import revise, rollback
from supervisor_synapse.adapters.supervisord import Process, Supervisord
from supervisor_synapse.blocks import Blocks
from supervisor_synapse.core.model import ProcessState
from supervisor_synapse.effects import Deployer
from tests.unit import scripted
from tests.unit.applied import Applied, tiny


@pytest.fixture
def at() -> Iterator[Applied]:
    """alpha and beta are good, and supervisord has read what is on disk."""
    folder = Path(tempfile.mkdtemp(prefix="syn", dir="/tmp"))
    found = Applied.at(folder / "at")
    found.discover(tiny("alpha"), tiny("beta", port=8101))
    found.prove("alpha", "beta")
    with scripted.on_unix_socket(found.deployment.socket, partial(answer, found)):
        yield found
    shutil.rmtree(folder)


def answer(at: Applied, connection: socket.socket, request: bytes) -> None:
    _, method = xmlrpc.client.loads(request.partition(b"\r\n\r\n")[2])
    waiting = at.deployment.run / "waiting"  # what supervisord holds otherwise than it stands
    value: Any = [[[], waiting.read_text().split() if waiting.exists() else [], []]]
    if method == "supervisor.getAllConfigInfo":
        value = [
            {"name": path.stem, "command": command_of(path.read_text())}
            for path in at.deployment.blocks.glob("*.conf")
            if path.is_file()
        ]
    scripted.http(200, xmlrpc.client.dumps((value,), methodresponse=True).encode())(
        connection, request
    )


def command_of(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("command="))[8:]


def looking(at: Applied) -> Blocks:
    bound = {
        name: partial(getattr(rollback, done, None) or getattr(revise, done), at.deployment)
        for name, done in {
            "move_port": "move_port", "set_rung": "set_rung", "renew": "renew", "bless": "bless",
            "roll_back": "roll_back", "roll_back_to": "roll_back", "adopt": "adopt",
            "forget_untold": "told_of", "set_aside": "set_aside",
        }.items()
    }  # fmt: skip
    return Blocks(at.deployment, Supervisord(at.deployment.socket), Deployer(**bound))


def table(*running: str) -> dict[str, Process]:
    return {
        name: Process(
            name, name, ProcessState.RUNNING if name in running else ProcessState.STOPPED,
            4711 if name in running else 0, 1 if name in running else 0, 0, 2, 0, "", "/l",
        )
        for name in ("alpha", "beta")
    }  # fmt: skip


def test_nothing_new_is_nothing_to_take_note_of(at: Applied) -> None:
    sight = looking(at).look(at.registry(), table("alpha"))
    assert (sight.unadopted, sight.untold, sight.trials) == (frozenset(), frozenset(), {})


def test_an_edit_that_supervisord_has_taken_up_is_on_trial_at_once(at: Applied) -> None:
    edited = at.edit("alpha", "--verbose")
    sight = looking(at).look(at.registry(), table("beta"))
    assert sight.trials["alpha"].digest == edited
    assert sight.unadopted == frozenset()


def test_of_a_model_that_runs_with_an_edit_on_disk_nobody_can_tell_what_it_runs(
    at: Applied,
) -> None:
    """`update` and a start by hand may have come between two looks."""
    at.edit("alpha", "--verbose")
    before = at.standings()
    look = looking(at)
    waiting = at.deployment.run / "waiting"
    waiting.write_text("alpha")
    assert look.look(at.registry(), table("alpha", "beta")).unadopted == {"alpha"}
    assert at.standings() == before
    waiting.unlink()
    sight = look.look(at.registry(), table("beta"))
    assert sight.unadopted == frozenset()
    assert sight.trials["alpha"].digest == at.on_disk()["alpha"]


def test_a_named_pipe_in_place_of_a_block_is_not_waited_for(at: Applied) -> None:
    path = at.deployment.block("alpha")
    path.unlink()
    os.mkfifo(path)
    before = at.standings()
    sight = looking(at).look(at.registry(), table("beta"))
    assert sight.unadopted == frozenset()
    assert at.standings() == before
