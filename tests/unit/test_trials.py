"""What is gone back to."""

from __future__ import annotations

from supervisor_synapse.core.trials import (
    DISCOVER,
    UPDATE,
    Generation,
    Standing,
    proven,
    taken_up,
)


def _applied(standing: Standing, number: int, digest: str, surface: str) -> Standing:
    generation = Generation(number, 0.0, surface, "", {"a": digest}, changed=("a",))
    return taken_up({"a": standing}, generation)["a"]


def test_a_former_block_that_was_applied_anew_is_the_one_to_go_back_to() -> None:
    """Not the one that proved itself in between, which was given up."""
    for surface in (DISCOVER, UPDATE):
        standing = proven(_applied(Standing(), 1, "first", surface))
        standing = proven(_applied(standing, 2, "second", surface))
        standing = _applied(standing, 3, "first", surface)
        assert not standing.on_trial
        standing = _applied(standing, 4, "bad", surface)
        assert standing.former is not None
        assert (standing.former.digest, standing.former.generation) == ("first", 3)
