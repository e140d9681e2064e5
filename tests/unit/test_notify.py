"""The rows of notices before hooks: bounded, never waited for, and what they miss is counted."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from supervisor_synapse.adapters import registry
from supervisor_synapse.adapters.deployment import Deployment
from supervisor_synapse.adapters.history import Line
from supervisor_synapse.adapters.hooks import Outcome
from supervisor_synapse.adapters.registry import Registry
from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.notices import Told
from supervisor_synapse.core.settings import NotifyPolicy, Settings
from supervisor_synapse.notify import Hook, Notifier
from tests.unit.test_notices import notice

FAILED = Outcome("ended with status 1", "oh no")
PASSES = Outcome("answered 500", may_pass=True)
BOUND_SECONDS = 30


class Recorder:
    """A way to deliver that notes what it got, and answers as it is told."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.got: list[Any] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self._outcomes = list(outcomes)

    def __call__(self, text: str, policy: NotifyPolicy) -> Outcome:
        self.got.append(json.loads(text))
        assert self.may_go.wait(BOUND_SECONDS)
        return self._outcomes.pop(0) if self._outcomes else Outcome()


def to_text(told: Told) -> str:
    return json.dumps({"at": told.notice.at, "suppressed": told.suppressed})


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(BOUND_SECONDS):
            await story

    asyncio.run(bounded())


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - other threads and processes do it
        await asyncio.sleep(0.005)


def put(hook: Hook, *times: float) -> None:
    for at in times:
        hook.put(Told(notice(at=at)), NotifyPolicy())


# --- one hook ------------------------------------------------------------------------------------


def test_notices_are_delivered_one_after_the_other_in_order() -> None:
    record = Recorder()

    async def story() -> None:
        hook = Hook("command", record, to_text)
        put(hook, 1, 2, 3)
        await until(lambda: len(record.got) == 3)
        put(hook, 4)
        await until(lambda: len(record.got) == 4)
        hook.close()

    run(story())
    assert [one["at"] for one in record.got] == [1, 2, 3, 4]


def test_a_hook_that_hangs_holds_up_nobody_and_costs_the_oldest() -> None:
    """Its row is short: 100. What was dropped is counted in the next one."""
    record = Recorder()
    record.may_go.clear()

    async def story() -> None:
        hook = Hook("command", record, to_text)
        put(hook, 0)
        await until(lambda: record.got)
        began = time.monotonic()
        put(hook, *range(1, 251))
        assert time.monotonic() - began < 1
        record.may_go.set()
        await until(lambda: len(record.got) == 101)
        hook.close()

    run(story())
    assert [one["at"] for one in record.got[1:]] == list(range(151, 251))
    assert [one["suppressed"] for one in record.got] == [0, 150, *[0] * 99]


def test_what_may_pass_is_tried_again_a_few_times() -> None:
    record = Recorder(PASSES, PASSES, Outcome())

    async def story() -> None:
        hook = Hook("webhook", record, to_text, (0.01, 0.01))
        put(hook, 1, 2)
        await until(lambda: len(record.got) == 4)
        hook.close()

    run(story())
    assert [one["at"] for one in record.got] == [1, 1, 1, 2]
    assert [one["suppressed"] for one in record.got] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("pauses", "outcomes", "tries"),
    [((0.01, 0.01), [PASSES] * 3, 3), ((0.01, 0.01), [FAILED], 1), ((), [PASSES], 1)],
    ids=["not for ever", "not what is refused", "not a command"],
)
def test_what_could_not_be_told_is_given_up_and_counted(
    pauses: tuple[float, ...], outcomes: list[Outcome], tries: int
) -> None:
    record = Recorder(*outcomes)

    async def story() -> None:
        hook = Hook("webhook", record, to_text, pauses)
        put(hook, 1, 2)
        await until(lambda: len(record.got) == tries + 1)
        hook.close()

    run(story())
    assert [one["at"] for one in record.got] == [1] * tries + [2]
    assert record.got[-1]["suppressed"] == 1


def test_failures_are_logged_once_a_minute_with_their_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = Recorder(*[FAILED] * 5)
    now = [100.0]

    async def story() -> None:
        hook = Hook("command", record, to_text, clock=lambda: now[0])
        put(hook, 1, 2, 3, 4)
        await until(lambda: len(record.got) == 4)
        now[0] += 61
        put(hook, 5, 6)
        await until(lambda: len(record.got) == 6)
        hook.close()

    with caplog.at_level(logging.WARNING, "synapse"):
        run(story())
    said = [vars(record) for record in caplog.records]
    assert [one["failures"] for one in said] == [1, 4]
    assert (said[0]["by"], said[0]["reason"], said[0]["output"]) == (
        "command", "ended with status 1", "oh no",
    )  # fmt: skip


def test_a_hook_that_is_closed_begins_nothing_more() -> None:
    record = Recorder()
    record.may_go.clear()

    async def story() -> None:
        hook = Hook("command", record, to_text)
        put(hook, 1, 2)
        await until(lambda: record.got)
        hook.close()
        record.may_go.set()
        await asyncio.sleep(0)

    run(story())
    assert [one["at"] for one in record.got] == [1]


# --- the whole -----------------------------------------------------------------------------------


def line(model: str, after: str = "ready", at: float = 17.25) -> Line:
    return Line(at, model, "loading", after, "answers", pid=7, started=99)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A command that adds what it gets to `got` beside it."""
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\ncat >> {tmp_path}/got\n")
    path.chmod(0o700)
    return path


def got(box: Path) -> list[Any]:
    path = box.parent / "got"
    return [json.loads(one) for one in path.read_text().splitlines()] if path.exists() else []


def test_transitions_that_are_wanted_reach_the_command(box: Path) -> None:
    policy = NotifyPolicy(command=(str(box),), models=("a*",))

    async def story() -> None:
        notifier = Notifier(Deployment(box.parent))
        notifier.tell([line("a1"), line("b"), line("a2", "loading"), line("a3")], policy)
        await until(lambda: len(got(box)) == 2)
        notifier.close()

    run(story())
    assert [one["model"] for one in got(box)] == ["a1", "a3"]
    assert got(box)[0]["prefix"] == str(box.parent)
    assert got(box)[0]["hostname"]
    assert got(box)[0]["incarnation"] == {"pid": 7, "started": 99}


def test_a_flood_is_limited_and_its_last_word_comes_by_itself(box: Path) -> None:
    """At 1000 a minute 500 are told at once, and one more each 0.12 s."""
    policy = NotifyPolicy(command=(str(box),), most_per_minute=1000)
    now = [0.0]

    async def story() -> None:
        notifier = Notifier(Deployment(box.parent), clock=lambda: now[0])
        notifier.tell([line(f"m{index}") for index in range(500)], NotifyPolicy())
        assert got(box) == []
        for at in range(503):
            notifier.tell([line("a", at=at)], policy)
        now[0] = 1.0
        await until(lambda: got(box) and got(box)[-1]["when"] == 502)
        notifier.close()

    run(story())
    told = got(box)
    assert sum(1 + one["suppressed"] for one in told) == 503
    assert len(told) <= 103  # one that ran, 100 that waited, the last word


def test_where_the_settings_name_nobody_nothing_is_kept(box: Path) -> None:
    async def story() -> None:
        notifier = Notifier(Deployment(box.parent))
        notifier.tell([line("a")], NotifyPolicy())
        notifier.tell([line("b")], NotifyPolicy(command=(str(box),)))
        await until(lambda: got(box))
        notifier.close()

    run(story())
    assert [one["model"] for one in got(box)] == ["b"]
    assert got(box)[0]["suppressed"] == 0


def test_a_command_that_cannot_be_run_is_named(
    tmp_path: Path, box: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box.chmod(stat.S_IMODE(box.stat().st_mode) | 0o020)

    async def story() -> None:
        notifier = Notifier(Deployment(tmp_path))
        notifier.tell([line("a")], NotifyPolicy(command=(str(box),)))
        await until(lambda: caplog.records)
        notifier.close()

    with caplog.at_level(logging.WARNING, "synapse"):
        run(story())
    assert f"chmod go-w {box}" in vars(caplog.records[0])["reason"]
    assert got(box) == []


def test_settings_of_hooks_are_kept_as_they_were_applied(tmp_path: Path) -> None:
    """In the registry, from which the listener has them; one from before hooks has none."""
    path = tmp_path / "registry.json"
    policy = NotifyPolicy(("/opt/hook", "a b"), "https://x/", "/keys", (Phase.FAILED,), False)
    registry.save(path, Registry(settings=Settings(notify=policy)))
    assert registry.load(path).settings.notify == policy
    value = json.loads(path.read_text())
    del value["settings"]["notify"]
    path.write_text(json.dumps(value))
    assert registry.load(path).settings == Settings()
