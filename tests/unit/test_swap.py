"""The steps of a swap, whatever becomes of its two models: it ends, and it says the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core.model import Phase
from supervisor_synapse.core.swap import Outcome, Step, Swap, advance, begin

AT_REST = (Phase.STOPPED, Phase.DISABLED, Phase.FAILED)
ON_ITS_WAY = (
    Phase.PENDING, Phase.LOADING, Phase.DRAINING, Phase.STOPPING, Phase.VERIFYING,
)  # fmt: skip
BOUND = 12  # looks, once the world does what it is asked


def swap(step: Step, *, together: bool = True, old_served: bool = True) -> Swap:
    why = "b did not become ready (it crashed)"
    return Swap("1", "a", "b", step, together, old_served, why)


def look(at: Swap, old: Phase, new: Phase, **reasons: str) -> Swap | Outcome:
    return advance(at, {"a": old, "b": new}, reasons)


def step_after(at: Swap, old: Phase, new: Phase) -> Step | None:
    """The step that follows; None: the swap is over."""
    after = look(at, old, new)
    return after.step if isinstance(after, Swap) else None


# --- what each step wants -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "together", "old", "new"),
    [
        (Step.NEW_FIRST, True, True, True),
        (Step.OLD_LEAVES, True, False, True),
        (Step.OLD_LEAVES, False, False, False),
        (Step.NEW_ALONE, True, False, True),
        (Step.NEW_ALONE, False, False, True),
        (Step.NEW_LEAVES, True, True, False),
        (Step.NEW_LEAVES, False, False, False),
        (Step.OLD_RETURNS, True, True, False),
        (Step.OLD_RETURNS, False, True, False),
    ],
)
def test_each_step_wants_no_more_than_there_is_room_for(
    step: Step, together: bool, old: bool, new: bool
) -> None:
    at = swap(step, together=together)
    assert (at.wants("a"), at.wants("b"), at.wants("c")) == (old, new, None)


@given(st.sampled_from(Step), st.booleans())
def test_an_old_one_that_did_not_serve_is_never_started(step: Step, together: bool) -> None:
    assert swap(step, together=together, old_served=False).wants("a") is False


@given(st.sampled_from(Step))
def test_both_are_wanted_at_once_only_where_both_fit(step: Step) -> None:
    at = swap(step, together=False)
    if step is not Step.NEW_FIRST:  # which never is a step where both do not fit
        assert not (at.wants("a") and at.wants("b"))


def test_where_both_fit_the_new_one_comes_first_else_the_old_one_leaves() -> None:
    assert begin("1", "a", "b", together=True, old_served=True).step is Step.NEW_FIRST
    assert begin("1", "a", "b", together=False, old_served=True).step is Step.OLD_LEAVES


# --- step by step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", list(Step))
@pytest.mark.parametrize("phase", ON_ITS_WAY)
def test_what_is_on_its_way_is_waited_for(step: Step, phase: Phase) -> None:
    """Neither a slow load nor a long drain has an end of its own here."""
    at = swap(step)
    assert look(at, phase, phase) is at


@pytest.mark.parametrize("phase", [*AT_REST, Phase.BACKOFF, Phase.UNHEALTHY])
@pytest.mark.parametrize("step", [Step.NEW_FIRST, Step.NEW_ALONE])
def test_a_new_one_that_does_not_become_ready_leaves_and_its_reason_is_kept(
    step: Step, phase: Phase
) -> None:
    after = look(swap(step), Phase.READY, phase, b="out-of-memory; starts again after 1.0 s")
    assert isinstance(after, Swap)
    assert after.step is Step.NEW_LEAVES
    assert "b did not become ready (out-of-memory" in after.why_undone


def test_where_the_room_for_both_is_gone_the_old_one_leaves_first() -> None:
    after = look(swap(Step.NEW_FIRST), Phase.READY, Phase.DEFERRED)
    assert isinstance(after, Swap)
    assert after.step is Step.OLD_LEAVES


def test_a_new_one_that_does_not_even_fit_alone_did_not_come() -> None:
    reason = "needs 900 MiB on CUDA0, 300 MiB left"
    after = look(swap(Step.NEW_ALONE), Phase.STOPPED, Phase.DEFERRED, b=reason)
    assert isinstance(after, Swap)
    assert after.step is Step.NEW_LEAVES
    assert reason in after.why_undone


@pytest.mark.parametrize("phase", [Phase.UNHEALTHY, Phase.BACKOFF, *ON_ITS_WAY, Phase.READY])
def test_the_old_one_does_not_come_back_before_the_new_one_is_stopped(phase: Phase) -> None:
    """A new one that hangs still holds the memory that the old one needs."""
    at = swap(Step.NEW_LEAVES, together=False)
    assert look(at, Phase.DISABLED, phase) is at
    assert at.wants("a") is False


@pytest.mark.parametrize("phase", AT_REST)
def test_the_old_one_comes_back_when_the_new_one_is_stopped(phase: Phase) -> None:
    at = swap(Step.NEW_LEAVES, together=False)
    assert step_after(at, Phase.DISABLED, phase) is Step.OLD_RETURNS


def test_an_old_one_that_never_stopped_goes_on() -> None:
    over = look(swap(Step.NEW_LEAVES), Phase.READY, Phase.DISABLED)
    assert over == Outcome(False, "b did not become ready (it crashed); a goes on")


def test_the_swap_has_failed_only_when_the_old_one_is_ready_again() -> None:
    at = swap(Step.OLD_RETURNS, together=False)
    for phase in (Phase.BACKOFF, Phase.UNHEALTHY, *ON_ITS_WAY):
        assert look(at, phase, Phase.DISABLED) is at
    over = look(at, Phase.READY, Phase.DISABLED)
    assert over == Outcome(False, "b did not become ready (it crashed); a is back")


@pytest.mark.parametrize("phase", AT_REST)
def test_where_neither_comes_up_both_reasons_are_told(phase: Phase) -> None:
    """Also where the old one is stopped by hand while it comes back: nobody waits for it then."""
    over = look(swap(Step.OLD_RETURNS), phase, Phase.DISABLED, a="stopped by hand")
    assert isinstance(over, Outcome)
    assert not over.ok
    assert "it crashed" in over.message
    assert "a did not become ready (stopped by hand)" in over.message


def test_where_the_old_one_did_not_serve_nothing_comes_back() -> None:
    over = look(swap(Step.NEW_LEAVES, old_served=False), Phase.STOPPED, Phase.FAILED)
    assert over == Outcome(False, "b did not become ready (it crashed)")


@pytest.mark.parametrize("together", [True, False])
def test_a_swap_succeeds_only_when_the_new_one_serves_and_the_old_one_is_stopped(
    together: bool,
) -> None:
    """Not where the new one died while the old one drained, nor where the old one was started."""
    leaves, alone = (swap(step, together=together) for step in (Step.OLD_LEAVES, Step.NEW_ALONE))
    done = Outcome(True, "b serves, a is stopped")
    for old in Phase:
        for new in Phase:
            for at in (leaves, alone):
                serves = new is Phase.READY and old in AT_REST
                assert (look(at, old, new) == done) == serves, (at.step, old, new)


@pytest.mark.parametrize("together", [True, False])
def test_a_model_that_is_gone_from_the_configuration_ends_the_swap(together: bool) -> None:
    at: Swap | Outcome = begin("1", "a", "b", together=together, old_served=True)
    for _ in range(BOUND):
        if isinstance(at, Swap):
            at = advance(at, {"a": Phase.READY if at.wants("a") else Phase.DISABLED}, {})
    assert isinstance(at, Outcome)
    assert "there is no such model" in at.message
    other: Swap | Outcome = begin("1", "a", "b", together=together, old_served=True)
    for _ in range(BOUND):
        if isinstance(other, Swap):
            other = advance(other, {"b": Phase.READY}, {})
    assert other == Outcome(True, "b serves, a is stopped")


@pytest.mark.parametrize("old", [Phase.DISABLED, Phase.READY])
def test_no_undoing_ends_while_the_new_one_is_on_its_way(old: Phase) -> None:
    at = swap(Step.OLD_RETURNS)
    assert look(at, old, Phase.PENDING) is at


# --- whatever happens -----------------------------------------------------------------------------


@dataclass(slots=True)
class Pair:
    """Two models that do what a swap wants of them, each at a look, unless something happens."""

    phases: dict[str, Phase]
    is_broken: dict[str, bool] = field(default_factory=lambda: {"a": False, "b": False})

    def obey(self, at: Swap) -> None:
        for name in ("a", "b"):
            phase = self.phases[name]
            if at.wants(name):
                up = Phase.FAILED if self.is_broken[name] else Phase.READY
                by_hand = phase is Phase.STOPPED  # and not resumed: it stays
                self.phases[name] = phase if by_hand or phase is Phase.FAILED else up
            elif phase not in AT_REST:
                self.phases[name] = Phase.DISABLED

    def ask(self, before: Swap | None, after: Swap) -> None:
        """A step that wants a model which the one before it did not want has it started."""
        for name in ("a", "b"):
            was_wanted = before is not None and before.wants(name)
            if after.wants(name) and not was_wanted and self.phases[name] in AT_REST:
                self.phases[name] = Phase.PENDING


@given(
    together=st.booleans(),
    old=st.sampled_from(Phase),
    new=st.sampled_from(Phase),
    history=st.lists(st.tuples(st.sampled_from(("a", "b")), st.sampled_from(Phase)), max_size=12),
    broken=st.sets(st.sampled_from(("a", "b"))),
)
def test_every_history_ends_with_one_of_the_two_or_neither_with_a_reason(
    together: bool, old: Phase, new: Phase, history: list[tuple[str, Phase]], broken: set[str]
) -> None:
    """Phases come and go as they like; once they follow what is wanted, the swap is soon over."""
    at: Swap | Outcome = begin("1", "a", "b", together=together, old_served=old is Phase.READY)
    assert isinstance(at, Swap)
    pair = Pair({"a": old, "b": new}, {name: name in broken for name in ("a", "b")})
    pair.ask(None, at)
    seen = at
    for number in range(len(history) + BOUND):
        if number < len(history):
            pair.phases[history[number][0]] = history[number][1]
        else:
            pair.obey(seen)
        at = advance(seen, pair.phases, {})
        if isinstance(at, Outcome):
            break
        if at is not seen:
            pair.ask(seen, at)
        seen = at
    assert isinstance(at, Outcome), (seen.step, pair.phases)
    serving = {name for name, phase in pair.phases.items() if phase is Phase.READY}
    if at.ok:
        assert serving == {"b"}
        assert pair.phases["a"] in AT_REST
    else:
        assert "b" not in serving
        assert pair.phases["b"] in AT_REST
        assert "did not become ready" in at.message
        assert serving == {"a"} or not seen.old_served or at.message.count("did not become") == 2
