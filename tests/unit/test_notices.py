"""Which transitions are told, and how many: a flood is cut short and its last word still told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.notices import (
    Flow,
    Notice,
    Told,
    hold,
    is_told,
    payload,
    release,
    seconds_until_next,
)
from supervisor_synapse.core.settings import NotifyPolicy

POLICY = NotifyPolicy()


def notice(**changes: Any) -> Notice:
    """A model that became ready."""
    values: dict[str, Any] = {
        "at": 17.25, "model": "tiny", "before": "loading", "after": "ready", "reason": "answers",
    }  # fmt: skip
    return Notice(**(values | changes))


CRASH = notice(before="ready", after="backoff", reason="crashed", failure_class="crashed")
REFUSED = notice(before="ready", after="ready", failure_class="bad-argument")


# --- which ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "policy", "told"),
    [
        (notice(), POLICY, True),
        (notice(before="pending", after="loading"), POLICY, False),
        (notice(before="pending", after="loading"), replace(POLICY, phases=tuple(Phase)), True),
        (notice(before=None), POLICY, True),
        (CRASH, POLICY, True),
        (CRASH, replace(POLICY, failures=False), False),
        (CRASH, replace(POLICY, failures=False, phases=(Phase.BACKOFF,)), True),
        (REFUSED, POLICY, True),
        (REFUSED, replace(POLICY, failures=False), False),
        (notice(), replace(POLICY, models=("qwen*", "t?ny")), True),
        (notice(), replace(POLICY, models=("TINY",)), True),
        (notice(), replace(POLICY, models=("qwen*",)), False),
        (notice(), replace(POLICY, models=()), False),
    ],
)
def test_a_notice_is_told_by_its_phase_its_failure_and_its_model(
    one: Notice, policy: NotifyPolicy, told: bool
) -> None:
    assert is_told(one, policy) is told


# --- how many ------------------------------------------------------------------------------------


def told_of(
    moments: list[tuple[float, str]], rate: int, until: float = 0.0
) -> list[tuple[float, Told]]:
    """Who is told when, of models that change at these times; a timer wakes us, as in notify.py."""
    flow, found = Flow(), []
    waiting = [(at, model) for at, model in sorted(moments)]
    now = 0.0
    while True:
        pause = seconds_until_next(flow, rate)
        wake = None if pause is None else now + pause
        if waiting and (wake is None or waiting[0][0] <= wake):
            now, model = waiting.pop(0)
            flow = hold(flow, notice(at=now, model=model))
        elif wake is not None and wake <= until:
            now = wake
        else:
            return found
        flow, due = release(flow, now, rate)
        found += [(now, one) for one in due]


def test_what_comes_now_and_then_is_told_at_once_and_whole() -> None:
    found = told_of([(0, "a"), (10, "a"), (10, "b"), (60, "a")], rate=30)
    assert [(at, one.notice.model, one.suppressed) for at, one in found] == [
        (0, "a", 0), (10, "a", 0), (10, "b", 0), (60, "a", 0),
    ]  # fmt: skip


def test_a_flood_is_cut_short_counted_and_its_last_word_told() -> None:
    """100 in ten seconds at 6 a minute: three at once, one more, and the very last one."""
    flood = [(index * 0.1, "a") for index in range(101)]
    found = told_of(flood, rate=6, until=1000)
    assert [round(at) for at, _ in found] == [0, 0, 0, 20]
    assert found[-1][1].notice.at == pytest.approx(10)
    assert sum(1 + one.suppressed for _, one in found) == len(flood)


def test_the_last_word_about_each_model_is_told_first_come_first() -> None:
    """Also while one of them goes on and on."""
    moments = [(0.0, "x")] * 3 + [(1.0, "a"), (1.0, "b")] + [(2 + i / 10, "a") for i in range(50)]
    found = told_of(moments, rate=6, until=1000)[3:]
    assert [one.notice.model for _, one in found] == ["a", "b"]
    assert [one.suppressed for _, one in found] == [50, 0]


def test_more_models_than_can_be_held_cost_the_oldest_and_are_counted() -> None:
    moments = [(0.0, f"m{index}") for index in range(1000)]
    found = told_of(moments, rate=2, until=10**6)
    assert found[-1][1].notice.model == "m999"
    assert sum(1 + one.suppressed for _, one in found) == 1000


def test_a_lower_rate_counts_at_once() -> None:
    flow, _ = release(hold(Flow(), notice()), 0.0, 1000)
    for model in "abcdef":
        flow = hold(flow, notice(model=model))
    flow, due = release(flow, 0.0, 2)
    assert len(due) == 1
    assert seconds_until_next(flow, 2) == pytest.approx(60)


def test_where_nothing_is_held_nobody_needs_to_wake() -> None:
    assert seconds_until_next(Flow(), 30) is None


@given(
    moments=st.lists(st.tuples(st.floats(0, 300), st.sampled_from("abc")), max_size=200),
    rate=st.integers(1, 40),
)
def test_no_minute_has_more_than_that_and_nothing_gets_lost(
    moments: list[tuple[float, str]], rate: int
) -> None:
    found = told_of(moments, rate, until=10**6)
    times = [at for at, _ in found]
    for begin in times:
        assert len([at for at in times if begin <= at < begin + 59.999]) <= rate
    assert sum(1 + one.suppressed for _, one in found) == len(moments)
    for model in {model for _, model in moments}:
        newest = max(at for at, name in moments if name == model)
        assert [o.notice.at for _, o in found if o.notice.model == model][-1] == newest


# --- what ----------------------------------------------------------------------------------------


def test_a_hook_gets_when_what_from_to_why_and_with_what_evidence() -> None:
    one = replace(CRASH, evidence="signal 9", pid=7, started=99)
    assert payload(Told(one, 3), "box", "/p") == {
        "when": 17.25, "model": "tiny", "from": "ready", "to": "backoff", "reason": "crashed",
        "class": "crashed", "evidence": "signal 9", "incarnation": {"pid": 7, "started": 99},
        "hostname": "box", "prefix": "/p", "suppressed": 3,
    }  # fmt: skip


def test_texts_are_bounded() -> None:
    long = notice(reason="x" * 10**6, evidence="y" * 10**6)
    sent = payload(Told(long), "box", "/p")
    assert len(str(sent)) < 3000
    assert sent["incarnation"] is None
