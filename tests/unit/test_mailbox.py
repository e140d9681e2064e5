"""Commands on their way to the listener: none is lost, none piles up."""

from __future__ import annotations

import pytest

from supervisor_synapse.plugin.mailbox import Answer, Full, KeyTaken, Mailbox

DONE = Answer(True, "a: enabled")


def _post_many(box: Mailbox) -> None:
    for number in range(10_000):
        box.post("enable", f"m{number}")


def test_a_command_waits_until_it_is_answered() -> None:
    """A listener that dies over it finds it again."""
    box = Mailbox()
    command = box.post("enable", "a")
    for _ in range(2):
        (waiting,) = box.waiting()
        assert (waiting.id, waiting.verb, waiting.model) == (command, "enable", "a")
    assert box.answer_to(command) is None
    box.answer(command, DONE)
    assert box.waiting() == []
    assert box.answer_to(command) == DONE


def test_an_answer_can_be_read_again() -> None:
    """Whoever asked may have lost the first."""
    box = Mailbox()
    command = box.post("enable", "a")
    box.answer(command, DONE)
    assert box.answer_to(command) == box.answer_to(command) == DONE


def test_the_oldest_comes_first() -> None:
    box = Mailbox()
    posted = [box.post("enable", name) for name in "abc"]
    box.answer(posted[0], DONE)
    posted.append(box.post("disable", "a"))
    assert [command.id for command in box.waiting()] == posted[1:]


def test_the_first_answer_holds() -> None:
    """A command may be carried out twice."""
    box = Mailbox()
    command = box.post("enable", "a")
    box.answer(command, DONE)
    box.answer(command, Answer(False, "too late"))
    assert box.answer_to(command) == DONE


def test_an_answer_to_nothing_is_forgotten() -> None:
    box = Mailbox()
    box.answer("nobody-1", DONE)
    assert not box.is_known("nobody-1")
    assert box.answer_to("nobody-1") is None


def test_ids_do_not_repeat_even_from_one_supervisord_to_the_next() -> None:
    boxes = [Mailbox() for _ in range(20)]
    ids = [box.post("enable", name) for box in boxes for name in "abc"]
    assert len(set(ids)) == len(ids)
    assert not boxes[0].is_known(ids[-1])
    assert all(command.isascii() for command in ids)


def test_where_nobody_takes_commands_they_are_refused() -> None:
    """And taken again when there is room."""
    box = Mailbox()
    first = box.post("enable", "a")
    with pytest.raises(Full):
        _post_many(box)
    assert len(box.waiting()) < 1000
    box.answer(first, DONE)
    assert box.post("enable", "b")


def test_old_answers_are_forgotten_before_new_ones() -> None:
    """Memory inside supervisord is bounded."""
    box = Mailbox()
    posted = []
    for _ in range(5000):
        posted.append(box.post("enable", "a"))
        box.answer(posted[-1], DONE)
    known = [command for command in posted if box.is_known(command)]
    assert known == posted[-len(known) :]
    assert 100 <= len(known) <= 2000


def test_a_command_about_two_models_names_both_and_one_about_one_names_none_beside() -> None:
    box = Mailbox()
    box.post("swap", "old", "new")
    box.post("drain", "old")
    assert [(one.verb, one.model, one.other) for one in box.waiting()] == [
        ("swap", "old", "new"), ("drain", "old", ""),
    ]  # fmt: skip


def test_a_swap_that_takes_hours_waits_without_holding_up_others() -> None:
    """The listener answers those that are done, in any order."""
    box = Mailbox()
    slow, quick = box.post("swap", "a", "b"), box.post("enable", "c")
    box.answer(quick, DONE)
    assert [command.id for command in box.waiting()] == [slow]
    assert box.answer_to(slow) is None
    assert box.is_known(slow)


# --- asked again ---------------------------------------------------------------------------------


def test_the_same_command_under_way_is_one_command() -> None:
    """A client that lost the answer to a swap of half an hour asks again."""
    box = Mailbox()
    first = box.post("swap", "a", "b")
    box.post("enable", "c")
    assert box.post("swap", "a", "b") == first
    assert len(box.waiting()) == 2


@pytest.mark.parametrize(
    "between", [("disable", "a", ""), ("swap", "a", "b"), ("swap", "b", "a"), ("rollback", "a", "")]
)
def test_a_command_after_another_one_of_the_same_model_is_a_new_one(
    between: tuple[str, str, str],
) -> None:
    """The last one asked has the last word."""
    box = Mailbox()
    posted = [box.post("enable", "a"), box.post(*between), box.post("enable", "a")]
    assert [command.id for command in box.waiting()] == posted
    assert len(set(posted)) == 3


@pytest.mark.parametrize(
    "other", [("swap", "b", "a"), ("drain", "a", ""), ("rollback", "a", "3"), ("enable", "b", "")]
)
def test_another_command_is_another_one(other: tuple[str, str, str]) -> None:
    box = Mailbox()
    assert box.post("swap", "a", "b") != box.post(*other)
    assert len(box.waiting()) == 2


def test_a_command_that_was_answered_is_carried_out_anew() -> None:
    box = Mailbox()
    first = box.post("enable", "a")
    box.answer(first, DONE)
    assert box.post("enable", "a") != first


def test_with_a_key_it_is_one_command_also_after_its_answer() -> None:
    box = Mailbox()
    first = box.post("rollback", "a", key="k")
    box.answer(first, DONE)
    box.post("rollback", "a")
    assert box.post("rollback", "a", key="k") == first
    assert box.answer_to(first) == DONE


def test_a_key_counts_for_a_command_that_was_under_way_without_it() -> None:
    box = Mailbox()
    first = box.post("swap", "a", "b")
    assert box.post("swap", "a", "b", key="k") == first
    box.answer(first, DONE)
    assert box.post("swap", "a", "b", key="k") == first


@pytest.mark.parametrize("other", [("enable", "b", ""), ("disable", "a", ""), ("swap", "a", "b")])
def test_a_key_of_another_command_is_refused(other: tuple[str, str, str]) -> None:
    box = Mailbox()
    box.post("enable", "a", key="k")
    with pytest.raises(KeyTaken):
        box.post(*other, key="k")
    assert len(box.waiting()) == 1


def test_a_key_is_forgotten_with_its_answer() -> None:
    """Memory inside supervisord is bounded; and a key may then be used anew."""
    box = Mailbox()
    first = box.post("enable", "a", key="k")
    box.answer(first, DONE)
    for number in range(5000):
        box.answer(box.post("enable", "b", key=str(number)), DONE)
    assert box.post("disable", "a", key="k") != first
    assert len(vars(box)["_keyed"]) < 2000


def test_asking_again_is_no_new_command_where_no_more_are_taken() -> None:
    box = Mailbox()
    first = box.post("enable", "m0")
    with pytest.raises(Full):
        _post_many(box)
    assert box.post("enable", "m0") == first
