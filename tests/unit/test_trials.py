"""Which blocks are trusted: each rule as a sentence, and what holds whatever happens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor_synapse.core import trials
from supervisor_synapse.core.model import Failure, FailureClass
from supervisor_synapse.core.trials import (
    DISCOVER,
    ROLLBACK,
    UPDATE,
    Generation,
    Good,
    Rejected,
    Standing,
    rendered_anew,
    taken_up,
)

FAILURE = Failure(FailureClass.BAD_ARGUMENT, "error: invalid argument", 1.0)


def generation(number: int, surface: str = DISCOVER, **blocks: str) -> Generation:
    """One that changed these blocks."""
    return Generation(number, 1.0, surface, "", blocks, changed=tuple(blocks))


def back(number: int, failure: Failure | None = FAILURE, **blocks: str) -> Generation:
    failures = dict.fromkeys(blocks, failure) if failure else {}
    return replace(generation(number, ROLLBACK, **blocks), failures=failures)


def after(*generations: Generation, good: str = "") -> Standing:
    """The standing of `a` after these; each digest in `good` proved itself when it came."""
    standings: Mapping[str, Standing] = {}
    for one in generations:
        standings = taken_up(standings, one)
        if standings["a"].digest in good:
            standings = {"a": trials.proven(standings["a"])}
    return standings["a"]


def test_a_new_block_is_on_trial_and_has_no_way_back() -> None:
    standing = after(generation(1, a="A"))
    assert (standing.digest, standing.generation) == ("A", 1)
    assert standing.on_trial
    assert standing.former is None


def test_a_block_that_proved_itself_is_good_for_ever() -> None:
    standing = after(generation(1, a="A"), generation(2, a="B"), generation(3, a="A"), good="A")
    assert not standing.on_trial


def test_the_former_block_is_the_one_that_was_good_last() -> None:
    standing = after(
        generation(1, a="A"), generation(2, a="B"), generation(3, a="C"), generation(4, a="D"),
        good="AB",
    )  # fmt: skip
    assert standing.former == Good("B", 2)


def test_a_good_block_that_is_applied_again_is_the_last_good_one_again() -> None:
    standing = after(
        generation(1, a="A"), generation(2, a="B"), back(3, None, a="A"), generation(4, a="C"),
        good="AB",
    )  # fmt: skip
    assert standing.former == Good("A", 3)


def test_what_is_gone_back_from_is_rejected_with_its_reason() -> None:
    standing = after(generation(1, a="A"), generation(2, a="B"), back(3, a="A"), good="A")
    assert standing.rejection("B") == standing.refused == Rejected("B", 2, FAILURE)
    assert not standing.on_trial


def test_discovery_forgets_a_rejection_of_what_it_writes_again() -> None:
    """It does so only where somebody forces it."""
    standing = after(
        generation(1, a="A"), generation(2, a="B"), back(3, a="A"), generation(4, a="B"), good="A"
    )
    assert standing.on_trial
    assert standing.rejection("B") is None
    assert standing.refused is None


def test_an_edit_back_to_what_failed_does_not_make_it_good_for_another_try() -> None:
    standing = after(
        generation(1, a="A"), generation(2, a="B"), back(3, a="A"), generation(4, UPDATE, a="B"),
        good="A",
    )  # fmt: skip
    assert standing.rejection("B") == Rejected("B", 2, FAILURE)


def test_an_edit_back_to_what_was_left_by_command_is_one_like_any_other() -> None:
    standing = after(
        generation(1, a="A"), generation(2, a="B"), back(3, None, a="A"),
        generation(4, UPDATE, a="B"), good="A",
    )  # fmt: skip
    assert standing.rejection("B") is None


def test_going_back_to_what_was_left_by_command_forgets_that() -> None:
    standing = after(
        generation(1, a="A"), generation(2, a="B"), back(3, None, a="A"), back(4, None, a="B"),
        good="AB",
    )  # fmt: skip
    assert standing.rejection("B") is None
    assert standing.rejection("A") is not None


def test_another_port_or_rung_is_trusted_as_the_block_was() -> None:
    good = rendered_anew(after(generation(1, a="A"), good="A"), "A'")
    assert not good.on_trial
    assert good.former == Good("A", 1)
    tried = rendered_anew(after(generation(1, a="A"), generation(2, a="B"), good="A"), "B'")
    assert tried.on_trial
    assert tried.former == Good("A", 1)
    assert rendered_anew(tried, "B'") is tried


def test_what_was_removed_is_forgotten_and_comes_back_on_trial() -> None:
    gone = Generation(2, 1.0, DISCOVER, "", {}, removed=("a",))
    standings = taken_up({"a": after(generation(1, a="A"), good="A")}, gone)
    assert standings == {}
    assert taken_up(standings, generation(3, a="A"))["a"].on_trial


def test_only_what_a_generation_names_changes() -> None:
    other = Standing("B", 1)
    assert taken_up({"b": other}, generation(2, a="A"))["b"] is other


def test_a_generation_is_broken_by_what_failed_when_it_was_tried() -> None:
    def standing(number: int, failure: Failure | None, *, tried: bool = True) -> Standing:
        return Standing("x", 9, rejected=(Rejected("y", number, failure, tried),))

    standings = {
        "failed": standing(2, FAILURE), "other generation": standing(1, FAILURE),
        "by command": standing(2, None), "refused": standing(2, FAILURE, tried=False),
        "well": Standing("x", 2),
    }  # fmt: skip
    assert trials.broken_by(standings, 2) == (("failed", FailureClass.BAD_ARGUMENT),)


@pytest.mark.parametrize(
    ("digest", "word"),
    [("A", "good"), ("B", "rejected"), ("C", "on trial"), ("D", "not proved"), ("", "not proved")],
)
def test_how_far_a_block_is_trusted_is_a_word(digest: str, word: str) -> None:
    standing = Standing("C", 3, (Good("A", 1),), (Rejected("B", 2, FAILURE),))
    assert trials.verdict(standing, digest) == word


def test_no_more_is_remembered_than_is_of_use() -> None:
    standing = Standing()
    for number in range(50):
        standing = trials.proven(replace(standing, digest=f"g{number}"))
        standing = trials.rejected(standing, Rejected(f"r{number}", number, FAILURE))
    assert [one.digest for one in standing.good] == [f"g{number}" for number in range(30, 50)]
    assert [one.digest for one in standing.rejected] == [f"r{number}" for number in range(10, 50)]


def test_what_may_be_gone_back_to_is_in_use() -> None:
    standing = Standing("A", 3, (Good("B", 1),), (Rejected("C", 2, FAILURE),))
    assert trials.in_use([generation(1, a="D")], {"a": standing}) == {"A", "B", "D"}


# --- whatever happens -----------------------------------------------------------------------------


class Life:
    """Blocks that come and go, and what they have really done."""

    def __init__(self) -> None:
        self.standings: dict[str, Standing] = {}
        self.number = 0
        self.proved: defaultdict[str, set[str]] = defaultdict(set)
        self.failed: defaultdict[str, set[str]] = defaultdict(set)

    def standing(self, name: str) -> Standing:
        return self.standings.get(name, Standing())

    def apply(self, one: Generation) -> None:
        self.standings = taken_up(self.standings, one)
        assert taken_up(self.standings, one) == self.standings, "it is taken up once"
        assert {one.generation <= self.number for one in self.standings.values()} <= {True}

    def next(self, surface: str, **blocks: str) -> Generation:
        self.number += 1
        return generation(self.number, surface, **blocks)

    def discover(self, name: str, digest: str, *, forced: bool = False) -> None:
        """As `discovery` does: what failed is not tried again, where there is another way."""
        standing = self.standing(name)
        if digest == standing.digest:
            return
        if standing.good and standing.rejection(digest) is not None and not forced:
            return
        self.failed[name].discard(digest)
        self.apply(self.next(DISCOVER, **{name: digest}))

    def edit(self, name: str, digest: str) -> None:
        if name in self.standings and digest != self.standing(name).digest:
            self.apply(self.next(UPDATE, **{name: digest}))

    def fail(self, name: str) -> None:
        """As `rollout` does: on trial, and there is a way back."""
        standing = self.standing(name)
        if name in self.standings and standing.on_trial and standing.former:
            self.failed[name].add(standing.digest)
            self._go_back(name, FAILURE)

    def go_back(self, name: str) -> None:
        """By command."""
        if self.standing(name).former:
            self._go_back(name, None)

    def _go_back(self, name: str, failure: Failure | None) -> None:
        former = self.standing(name).former
        assert former is not None
        assert former.digest in self.proved[name], "only what was good is gone back to"
        self.number += 1
        self.apply(back(self.number, failure, **{name: former.digest}))
        assert not self.standing(name).on_trial

    def prove(self, name: str) -> None:
        """As `rollout` does: not where the same text failed before."""
        standing = self.standing(name)
        if name in self.standings and standing.rejection(standing.digest) is None:
            self.proved[name].add(standing.digest)
            self.standings[name] = trials.proven(standing)

    def render(self, name: str, digest: str) -> None:
        """On another port, or rung: a text that was never there."""
        standing, digest = self.standing(name), f"{digest}{self.number}'{len(self.proved[name])}"
        if name in self.standings and digest != standing.digest:
            if not standing.on_trial:
                self.proved[name].add(digest)
            self.standings[name] = rendered_anew(standing, digest)

    def remove(self, name: str) -> None:
        self.number += 1
        self.apply(Generation(self.number, 1.0, DISCOVER, "", {}, removed=(name,)))
        self.proved.pop(name, None)
        self.failed.pop(name, None)

    def check(self) -> None:
        for name, standing in self.standings.items():
            assert {one.digest for one in standing.good} <= self.proved[name]
            if standing.digest in self.failed[name]:
                rejection = standing.rejection(standing.digest)
                assert rejection is not None, "what failed before is known to have"
                assert rejection.failure is not None
                assert standing.on_trial
                assert standing.former is not None, "and it is taken back without a try"
            if standing.refused is not None:
                assert standing.refused.digest != standing.digest


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["discover", "discover", "force", "edit", "edit", "fail", "fail", "prove", "prove",
             "go_back", "render", "remove"]
        ),
        st.sampled_from("ab"),
        st.sampled_from("ABCD"),
    ),
    max_size=30,
)  # fmt: skip


def act(life: Life, step: str, name: str, digest: str) -> None:
    calls: dict[str, Any] = {
        "discover": lambda: life.discover(name, digest),
        "force": lambda: life.discover(name, digest, forced=True),
        "edit": lambda: life.edit(name, digest),
        "render": lambda: life.render(name, digest),
        "fail": lambda: life.fail(name), "prove": lambda: life.prove(name),
        "go_back": lambda: life.go_back(name), "remove": lambda: life.remove(name),
    }  # fmt: skip
    calls[step]()


@given(STEPS)
def test_only_what_was_good_is_gone_back_to_and_what_failed_stays_out(
    steps: list[tuple[str, str, str]],
) -> None:
    life = Life()
    for step in steps:
        act(life, *step)
        life.check()


@given(STEPS, st.integers(0, 40))
def test_older_generations_that_are_taken_up_again_change_nothing(
    steps: list[tuple[str, str, str]], which: int
) -> None:
    """Only the newest ever is; but a number that was taken up is taken up."""
    life = Life()
    for step in steps:
        act(life, *step)
    known = [one for one in life.standings.values() if one.generation]
    if known:
        number = known[which % len(known)].generation
        names = [name for name, one in life.standings.items() if one.generation >= number]
        again = generation(number, UPDATE, **dict.fromkeys(names, "Z"))
        assert taken_up(life.standings, again) == life.standings


@pytest.mark.parametrize("surface", [DISCOVER, UPDATE])
def test_a_former_block_that_was_applied_anew_is_the_one_to_go_back_to(surface: str) -> None:
    """Not the one that proved itself in between, which was given up."""
    first, second = generation(1, surface, a="A"), generation(2, surface, a="B")
    again, bad = generation(3, surface, a="A"), generation(4, surface, a="C")
    standing = after(first, second, again, bad, good="AB")
    assert standing.former == Good("A", 3)
