"""A model that is given up is stood in for by its fallback, on its port and under its alias, and
takes its place again when it is well: real servers, and faults that they really have.

Who serves is told by the file in the server's command line.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import (
    Deployment,
    chat,
    deployed,
    holds_for,
    promised,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("llama_server")

COOLDOWN_SECONDS = 6.0
HEALTHY_SECONDS = 20.0
SETTINGS = f"""
enable = none
when_full = wait
[probe]
period_seconds = 1
[restart]
backoff_initial_seconds = 0.2
intensity = 2
period_seconds = {HEALTHY_SECONDS}
cooldown_seconds = {COOLDOWN_SECONDS}
[stop]
drain_seconds = 2
[model:*]
context = 2048
[model:main]
enabled = true
fallback = spare
"""


def add(at: Deployment) -> None:
    """A model, and a smaller one as its fallback."""
    at.add("main", layers=4, feed_forward=512)
    at.add("spare", layers=1, feed_forward=64)


@contextlib.contextmanager
def ready() -> Iterator[Deployment]:
    """A model that is ready, and has a fallback."""
    with deployed(SETTINGS) as deployment:
        add(deployment)
        deployment.discover_first()
        deployment.start_supervisord()
        deployment.wait_for({"main": "ready"})
        assert serving(deployment) == "main"
        yield deployment


def server(at: Deployment) -> psutil.Process | None:
    """The one server under the model's alias."""
    found = [process for alias, process in at.all_servers() if alias == "main"]
    assert len(found) <= 1, found
    return found[0] if found else None


def serving(at: Deployment) -> str:
    """Whose weights are served under the model's alias: by the server's command line."""
    process = server(at)
    if process is None:
        return ""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return Path(words[words.index("--model") + 1]).stem if "--model" in words else ""
    return ""


def await_serving(at: Deployment, who: str, seconds: float) -> dict[str, Any]:
    """The row of the model once it is ready and `who` answers in its place."""

    def is_so() -> dict[str, Any] | None:
        row = at.rows().get("main")
        return row if row and row["phase"] == "ready" and serving(at) == who else None

    found = wait_until(is_so, seconds, f"{who} serves")
    assert found is not None
    return found


def kill_server(at: Deployment) -> None:
    wait_until(lambda: server(at), promised(10), "a server")
    process = server(at)
    assert process is not None
    process.kill()


def crash_again_and_again(at: Deployment) -> None:
    """Until the breaker opens."""
    for nth in range(2):
        if nth:
            await_serving(at, "main", promised(10))
        kill_server(at)


def file_of(at: Deployment, name: str = "main") -> Path:
    (blob,) = (at.hub.repo(f"acme/{name}") / "blobs").iterdir()
    return blob


def put_in_place(path: Path, content: bytes) -> None:
    """As a download does: a new file takes the place of the old one, which may be mapped."""
    new = path.with_name("incomplete")
    new.write_bytes(content)
    os.replace(new, path)


def spoil(at: Deployment) -> bytes:
    """The file's header is cut, and its server dies; what it was."""
    good = file_of(at).read_bytes()
    put_in_place(file_of(at), good[:100])
    kill_server(at)
    return good


def replace_listener(at: Deployment) -> None:
    """Kill the listener; the next one is there."""
    wait_until(at.listener, 15, "a listener")
    killed = at.listener()
    assert killed is not None
    killed.kill()

    def another() -> bool:
        now = at.listener()
        return now is not None and now.pid != killed.pid

    wait_until(another, 15, "another listener")


def reasons(at: Deployment) -> list[str]:
    return [str(step["reason"]) for step in at.steps("main")]


def test_a_model_that_crashes_again_and_again_is_stood_in_for_and_takes_its_place_again() -> None:
    with ready() as at:
        before = at.model("main")
        crash_again_and_again(at)
        row = await_serving(at, "spare", promised(15))
        given_up = time.monotonic()
        assert (row["port"], row["alias"]) == (before["port"], before["alias"])
        assert chat(row)
        why = "crashed; 2 failures within 20 s"
        assert f"fallback spare serves in its place: {why}" in row["reason"]
        assert row["last_failure"]["class"] == "crashed"
        assert 0 <= row["next_retry_in"] <= COOLDOWN_SECONDS
        assert f"{why}; fallback spare serves in its place" in reasons(at)
        assert "fallback spare" in at.ctl("models").out
        back = await_serving(at, "main", promised(COOLDOWN_SECONDS + 15))
        assert time.monotonic() - given_up >= COOLDOWN_SECONDS - 3
        assert chat(back)
        assert "on trial" in back["reason"]
        assert any(reason.startswith("its cooldown is over") for reason in reasons(at))
        wait_until(
            lambda: "well again" in at.rows()["main"]["reason"],
            promised(HEALTHY_SECONDS + 10), "well again",
        )  # fmt: skip
        assert serving(at) == "main"


def test_one_crash_on_trial_brings_the_fallback_back_and_the_next_trial_is_later() -> None:
    with ready() as at:
        crash_again_and_again(at)
        await_serving(at, "spare", promised(15))
        await_serving(at, "main", promised(COOLDOWN_SECONDS + 15))
        kill_server(at)
        row = await_serving(at, "spare", promised(10))
        assert chat(row)
        assert "failed its trial" in row["reason"]
        left = row["next_retry_in"]
        assert COOLDOWN_SECONDS < left <= 2 * COOLDOWN_SECONDS
        assert holds_for(lambda: serving(at) == "spare", COOLDOWN_SECONDS)
        await_serving(at, "main", promised(COOLDOWN_SECONDS + 15))


def test_a_model_whose_file_is_corrupt_is_stood_in_for_until_the_file_is_mended() -> None:
    with ready() as at:
        good = spoil(at)
        row = await_serving(at, "spare", promised(20))
        assert chat(row)
        assert row["last_failure"]["class"] == "model-corrupt"
        assert "model-corrupt" in row["reason"]
        assert holds_for(lambda: serving(at) == "spare", COOLDOWN_SECONDS * 2)
        put_in_place(file_of(at), good)
        assert chat(await_serving(at, "main", promised(20)))
        assert any("files or arguments have changed" in reason for reason in reasons(at))


def test_a_wrong_argument_that_was_mended_hands_back_and_other_discoveries_change_nothing() -> None:
    with deployed(f"{SETTINGS}args = --no-such-flag") as at:
        add(at)
        at.discover_first()
        at.start_supervisord()
        row = await_serving(at, "spare", promised(20))
        assert row["last_failure"]["class"] == "bad-argument"
        pid = row["pid"]
        changes = at.discover()["changes"]
        assert (changes["added"], changes["changed"], changes["removed"]) == ([], [], [])
        assert holds_for(lambda: at.rows()["main"]["pid"] == pid, 3)
        at.configure(SETTINGS)
        at.discover()
        assert chat(await_serving(at, "main", promised(20)))


def test_started_by_hand_after_a_stop_the_model_itself_is_tried() -> None:
    with ready() as at:
        good = spoil(at)
        await_serving(at, "spare", promised(20))
        at.ctl("stop", "main")
        at.wait_for({"main": "stopped"}, promised(10))
        assert holds_for(lambda: not serving(at), 3)
        at.ctl("start", "main")  # which is in vain yet
        wait_until(lambda: any(r.startswith("it was asked for") for r in reasons(at)), promised(15))
        row = await_serving(at, "spare", promised(20))
        assert row["last_failure"]["class"] == "model-corrupt"
        put_in_place(file_of(at), good)
        at.ctl("enable", "main")
        await_serving(at, "main", promised(20))


def test_after_a_restart_of_everything_the_model_itself_is_tried() -> None:
    with ready() as at:
        good = spoil(at)
        await_serving(at, "spare", promised(20))
        at.down()
        put_in_place(file_of(at), good)
        at.start_supervisord()
        row = await_serving(at, "main", promised(20))
        assert "trial" not in row["reason"]


@pytest.mark.timeout(300)
def test_a_listener_killed_in_each_of_these_states_carries_on() -> None:
    with ready() as at:
        crash_again_and_again(at)
        replace_listener(at)  # as it fails over
        row = await_serving(at, "spare", promised(30))
        assert row["last_failure"]["class"] == "crashed"
        replace_listener(at)  # while the fallback serves
        since = time.time()
        at.wait_for_step("main", since, promised(COOLDOWN_SECONDS + 15), to="stopping")
        replace_listener(at)  # as it hands back
        await_serving(at, "main", promised(30))
        replace_listener(at)  # on trial
        wait_until(lambda: "main" in at.rows(), promised(10))
        kill_server(at)
        row = await_serving(at, "spare", promised(30))
        assert chat(row)
        assert "failed its trial" in row["reason"]


@pytest.mark.timeout(300)
def test_a_listener_killed_again_and_again_on_the_way_carries_on() -> None:
    """At moments a little later each time, through one failover and its return."""
    with ready() as at:
        good = spoil(at)
        for nth in range(6):
            replace_listener(at)
            holds_for(lambda: True, 0.15 * nth)
        await_serving(at, "spare", promised(30))
        put_in_place(file_of(at), good)
        at.wait_for_step("main", time.time(), promised(30), to="stopping")
        for nth in range(6):
            replace_listener(at)
            holds_for(lambda: True, 0.15 * nth)
        assert chat(await_serving(at, "main", promised(30)))
