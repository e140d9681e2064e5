"""Models are packed on devices by what they really take: real servers, devices with set memory.

Each device is a real `ggml-rpc-server` whose memory is set, and held to, by a relay before it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.harness import Deployment, chat, deployed, holds_for, wait_until
from tests.integration.rpc_devices import RpcDevice, rpc_device

pytestmark = pytest.mark.usefixtures("llama_server")

LARGE = 16 << 30
MODEL: dict[str, Any] = {"layers": 4, "feed_forward": 256, "context": 8192}
SETTINGS = """
enable = none
memory_reserve = 0
max_parallel = 4
when_full = {when_full}
rpc = {endpoint}
[stop]
drain_seconds = 2
[restart]
backoff_initial_seconds = 0.2
[model:*]
device = RPC0
context = 4096
gpu_layers = 99
"""
OVERHEAD = 8 << 20  # set aside for each process on an RPC device, beside what it allocates
FIXED = "context = 4096\ngpu_layers = 99\n"
NAMES = ("a", "b", "c", "d")


@contextlib.contextmanager
def fleet(
    when_full: str, room_for: float, more: str = ""
) -> Iterator[tuple[Deployment, RpcDevice]]:
    """Four models of one size, enabled, on a device with room for so many; not yet up."""
    with rpc_device(LARGE) as device:
        settings = SETTINGS.format(when_full=when_full, endpoint=device.endpoint)
        enabled = "[model:?]\nenabled = true\n"
        with deployed(settings + enabled + more) as deployment:
            deployment.add(*NAMES, **MODEL)
            deployment.synapse("init")
            device.total_bytes = int(need(deployment) * room_for)
            yield deployment, device


def need(deployment: Deployment) -> int:
    """What is set aside for one of them, with the margin of a figure from the header."""
    sizes = {model["memory"]["devices"]["RPC0"] for model in deployment.plan()["models"]}
    return int(max(sizes) * 1.06) + (4 << 20)


def phases(deployment: Deployment) -> dict[str, str]:
    return {name: model["phase"] for name, model in deployment.rows().items()}


def test_of_four_that_fit_two_at_a_time_the_right_two_are_ready_and_the_next_follows() -> None:
    """Started cold, all four may load at once; the rest say what is missing, in numbers."""
    with fleet("wait", 2.5) as (deployment, device):
        deployment.synapse("up", "--detach", expect=None)
        settled = {"a": "ready", "b": "ready", "c": "deferred", "d": "deferred"}
        wait_until(lambda: phases(deployment) == settled, 40, "two ready, two deferred")
        rows = deployment.rows()
        assert all(chat(rows[name]) for name in ("a", "b"))
        for name in ("c", "d"):
            assert "MiB on RPC0" in rows[name]["reason"]
            assert "MiB left" in rows[name]["reason"]
        assert device.used_bytes <= device.total_bytes
        assert all(step["class"] != "out-of-memory" for step in deployment.history())
        deployment.ctl("stop", "a")
        wait_until(lambda: phases(deployment)["c"] == "ready", 30, "the next one")
        assert phases(deployment) == {"a": "stopped", "b": "ready", "c": "ready", "d": "deferred"}


def test_what_a_load_took_is_learned_and_is_what_the_next_is_judged_by() -> None:
    with fleet("wait", 1.5) as (deployment, _):
        deployment.synapse("up", "--detach", expect=None)
        wait_until(lambda: phases(deployment)["a"] == "ready", 30, "ready")
        learned = wait_until(
            lambda: (row := deployment.rows()["a"]["memory"])["source"] == "learned" and row,
            20, "learned",
        )  # fmt: skip
        assert learned["estimated"] > 0
        planned = {model["name"]: model["memory"] for model in deployment.plan()["models"]}
        assert planned["a"]["source"] == "learned"
        assert deployment.discover()["changes"]["changed"] == []


def test_where_the_formula_leaves_it_in_doubt_the_engine_is_asked() -> None:
    """Two models on a device of 4 GiB, whose reserve leaves room for them and next to nothing
    more. Then another context is reckoned with the scratch that the engine told.
    """
    with rpc_device(4 << 30) as device:
        settings = SETTINGS.format(when_full="wait", endpoint=device.endpoint)
        enabled = "[model:?]\nenabled = true\n"
        with deployed(settings + enabled) as deployment:
            deployment.add("a", "b", **MODEL)
            deployment.synapse("init")
            roomy = {row["name"]: row["memory"] for row in deployment.plan()["models"]}
            assert {memory["source"] for memory in roomy.values()} == {"header"}
            reserve = (4 << 30) - int(2.05 * need(deployment))
            settings = settings.replace("reserve = 0", f"reserve = {reserve >> 20} MiB")
            deployment.configure(settings + enabled)
            asked = {row["name"]: row["memory"] for row in deployment.plan()["models"]}
            assert {memory["source"] for memory in asked.values()} == {"dry-run"}
            deployment.synapse("up", "--detach")
            deployment.wait_ready()
            used = device.used_bytes
            told = sum(memory["devices"]["RPC0"] for memory in asked.values())
            overheads = 2 * OVERHEAD
            assert abs(told - overheads - used) <= 2 * (3 << 20)
            settings = settings.replace("context = 4096", "context = 2048")
            deployment.configure(settings + enabled)
            other = {row["name"]: row["memory"] for row in deployment.plan()["models"]}
            assert {memory["source"] for memory in other.values()} == {"calibrated"}


def test_a_start_by_hand_goes_through_the_same_ledger() -> None:
    """The launcher refuses with the numbers and names what could be stopped; nothing is started."""
    with fleet("wait", 1.5) as (deployment, device):
        deployment.synapse("up", "--detach", expect=None)
        wait_until(lambda: phases(deployment)["a"] == "ready", 30, "ready")
        deployment.ctl("disable", "b")
        used = device.used_bytes
        deployment.ctl("start", "b", expect=None)
        said = wait_until(
            lambda: "does not fit" in (text := deployment.log_of("b")) and text, 10, "refused"
        )
        assert "MiB on RPC0" in said
        assert "could be stopped: a (" in said
        wait_until(
            lambda: (row := deployment.rows()["b"])["phase"] == "disabled"
            and "does not fit" in row["reason"],
            10, "as it was, with the reason",
        )  # fmt: skip
        assert device.used_bytes == used
        assert "b" not in deployment.servers()


def test_memory_that_a_stranger_takes_is_respected_until_it_is_back() -> None:
    with fleet("wait", 1.5) as (deployment, device):
        taken = device.total_bytes // 2
        device.take(taken)
        deployment.synapse("up", "--detach", expect=None)
        wait_until(lambda: phases(deployment).get("a") == "deferred", 30, "deferred")
        assert holds_for(lambda: not deployment.servers(), 2)
        device.give_back(taken)
        wait_until(lambda: phases(deployment)["a"] == "ready", 30, "ready")


def test_a_less_important_idle_model_makes_room() -> None:
    """It is stopped and verified first, says for whom, and comes back when there is room."""
    more = "[model:d]\ntier = balanced\n[model:c]\npinned = true\ntier = powerful\n"
    with fleet("evict", 2.5, more) as (deployment, device):
        deployment.synapse("init")
        deployment.discover()
        deployment.start_supervisord()
        for name in ("a", "b"):
            deployment.ctl("disable", name)
        deployment.wait_for({"c": "ready", "d": "ready"})
        since = time.time()
        deployment.ctl("enable", "a")
        deployment.wait_for({"a": "ready", "c": "ready", "d": "deferred"})
        assert device.used_bytes <= device.total_bytes
        stopped = [step for step in deployment.steps("d", since) if step["to"] == "stopping"]
        assert stopped
        deployment.ctl("disable", "a")
        deployment.wait_for({"d": "ready"})


def test_what_does_not_fit_steps_down_its_ladder_and_climbs_back() -> None:
    more = "climb_after_seconds = 1\n"
    with rpc_device(LARGE) as device:
        settings = SETTINGS.format(when_full="degrade", endpoint=device.endpoint)
        settings = settings.replace("[stop]", f"{more}[stop]").replace(FIXED, "")
        with deployed(f"{settings}[model:a]\nenabled = true\n") as deployment:
            deployment.add("a", **{**MODEL, "layers": 16, "context": 16384})
            deployment.synapse("init")
            deployment.discover()
            (model,) = deployment.plan()["models"]
            top = model["memory"]["devices"]["RPC0"]
            device.total_bytes = int(top * 1.07) + (8 << 20)
            device.take(device.total_bytes // 10)
            deployment.start_supervisord()
            ready = deployment.wait_for({"a": "ready"}, 40)["a"]
            assert ready["context"] < model["context"]
            assert "stepped down to" in ready["reason"]
            assert chat(ready)
            device.give_back(device.taken)
            wait_until(
                lambda: (row := deployment.rows()["a"])["phase"] == "ready"
                and row["context"] == model["context"],
                40, "back on the top of its ladder",
            )  # fmt: skip


def test_what_runs_out_of_memory_as_it_loads_steps_down_its_ladder_and_climbs_back() -> None:
    """The device tells more free memory than it gives: admission cannot know, the load fails."""
    with rpc_device(LARGE) as device:
        settings = SETTINGS.format(when_full="degrade", endpoint=device.endpoint)
        settings = settings.replace("[stop]", "climb_after_seconds = 1\n[stop]")
        settings = settings.replace(FIXED, "")
        with deployed(f"{settings}[model:a]\nenabled = true\n") as deployment:
            deployment.add("a", "b", **{**MODEL, "layers": 16, "context": 16384})
            deployment.synapse("init")
            deployment.discover()
            planned = {model["name"]: model for model in deployment.plan()["models"]}["a"]
            takes = planned["memory"]["devices"]["RPC0"] - OVERHEAD
            device.total_bytes = 2 * takes + OVERHEAD
            device.unusable_bytes = device.total_bytes - takes * 9 // 10
            deployment.start_supervisord()
            ready = deployment.wait_for({"a": "ready"}, 60)["a"]
            assert ready["context"] < planned["context"]
            assert "stepped down to" in ready["reason"]
            assert chat(ready)
            failed = [step for step in deployment.steps("a") if step["class"] == "out-of-memory"]
            assert failed[0]["reason"].startswith("out-of-memory; steps down to ")
            assert "failed to allocate" in failed[0]["evidence"]
            device.unusable_bytes = 0
            wait_until(
                lambda: (row := deployment.rows()["a"])["phase"] == "ready"
                and row["context"] == planned["context"],
                60, "back on the top of its ladder",
            )  # fmt: skip


def test_a_sleeper_whose_memory_was_given_away_waits_for_it_and_has_not_failed() -> None:
    """Sleepers may be overcommitted: a wake that finds no room is answered by no server, waits
    deferred with the numbers, and comes back when there is room.
    """
    more = "[model:a]\nsleep_idle_seconds = 2\n"
    with fleet("wait", 1.5, more) as (deployment, device):
        path = deployment.etc / "synapse.conf"
        path.write_text(path.read_text().replace("[stop]", "overcommit_sleepers = true\n[stop]"))
        deployment.discover()
        deployment.start_supervisord()
        for name in ("c", "d"):
            deployment.ctl("disable", name)
        sleeper = deployment.wait_for({"a": "ready", "b": "deferred"})["a"]
        wait_until(lambda: device.used_bytes == 0, 20, "asleep")
        deployment.wait_for({"a": "ready", "b": "ready"})
        taken = device.total_bytes - device.used_bytes - (4 << 20)
        device.take(taken)  # the servers take less than is set aside for them
        with pytest.raises(ConnectionError):
            chat(sleeper)
        waiting = deployment.wait_for({"a": "deferred", "b": "ready"})["a"]
        assert "MiB left" in waiting["reason"]
        assert waiting["last_failure"]["class"] == "out-of-memory"
        steps = deployment.steps("a")
        assert [step["from"] for step in steps if step["class"] == "out-of-memory"] == ["ready"]
        assert not [step for step in steps if step["to"] in ("backoff", "failed")]
        device.give_back(taken)
        deployment.ctl("stop", "b")
        assert chat(deployment.wait_for({"a": "ready"})["a"])
