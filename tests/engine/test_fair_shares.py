"""How owners share the places and the tokens of steps. Oracle: max-min fairness, by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from test_scheduler import Desk, shape

from rorqual.engine.sequence import TokenSequence


def running(desk: Desk) -> Counter[str]:
    return Counter(sequence.answer.request.owner for sequence in desk.scheduler.running)


def steps_until(desk: Desk, sequence: TokenSequence) -> int:
    """How many steps it takes to the first token."""
    for number in range(1, 100):
        desk.step()
        if sequence.answer.token_ids:
            return number
    raise AssertionError("it never had its turn")


def test_a_newcomer_gets_a_place_of_a_full_batch_at_once() -> None:
    """256 answers of one client wait or run for a long time; two others ask for one each."""
    desk = Desk(1000, max_batch=8, max_step_tokens=64)
    for _ in range(256):
        desk.add([1] * 4, 200, owner="hog")
    desk.step()
    assert running(desk) == {"hog": 8}
    one, two = (desk.add([2] * 4, 3, owner=owner) for owner in ("one", "two"))
    assert steps_until(desk, one) == 1
    assert two.answer.token_ids
    assert running(desk) == {"hog": 6, "one": 1, "two": 1}
    assert desk.scheduler.num_preemptions == 2
    for _ in range(3):
        desk.step()
    assert running(desk) == {"hog": 8}


def test_those_who_want_much_get_alike() -> None:
    desk = Desk(1000, max_batch=9, max_step_tokens=64)
    for owner in "abc":
        for _ in range(20):
            desk.add([1] * 4, 500, owner=owner)
    for _ in range(4):
        desk.step()
    assert running(desk) == {"a": 3, "b": 3, "c": 3}
    assert desk.scheduler.num_preemptions == 0


def test_nobody_is_set_back_for_what_would_only_change_who_waits() -> None:
    desk = Desk(1000, max_batch=3, max_step_tokens=64)
    for _ in range(2):
        desk.add([1] * 4, 500, owner="a")
    for _ in range(2):
        desk.add([1] * 4, 500, owner="b")
    for _ in range(20):
        desk.step()
    assert desk.scheduler.num_preemptions == 0
    assert sorted(running(desk).values()) == [1, 2]


def test_a_short_prompt_passes_the_long_ones_of_another() -> None:
    desk = Desk(10_000, max_batch=8, max_step_tokens=16)
    long = [desk.add([1] * 2000, owner="hog") for _ in range(6)]
    desk.step()
    short = desk.add([2] * 4, owner="new")
    assert steps_until(desk, short) == 1
    before = long[0].num_computed
    desk.step()
    assert long[0].num_computed - before == 15  # all but the newcomer's token


def test_long_prompts_of_two_owners_share_the_tokens() -> None:
    desk = Desk(10_000, max_batch=8, max_step_tokens=16)
    first = [desk.add([1] * 500, owner="a") for _ in range(3)]
    second = desk.add([2] * 500, owner="b")
    for _ in range(11):
        desk.step()
    total = sum(sequence.num_computed for sequence in first)
    assert total + second.num_computed == 11 * 16
    assert second.num_computed == 10 * 8  # the first step was over before anybody waited


@pytest.mark.parametrize("num_blocks", [6, 7])
def test_who_has_the_most_is_set_back_where_blocks_run_out(num_blocks: int) -> None:
    """The oldest answer needs a block: the newest is another's only one, and keeps it."""
    desk = Desk(num_blocks, max_step_tokens=50)
    desk.add([1] * 3, 30, owner="hog")
    desk.add([1] * 3, 30, owner="hog")
    new = desk.add([2] * 3, 30, owner="new")
    while not desk.scheduler.num_preemptions:
        desk.step()
    assert new in desk.scheduler.running
    assert running(desk)["hog"] == 1


def test_background_has_what_the_others_leave() -> None:
    desk = Desk(1000, max_batch=4, max_step_tokens=64)
    for _ in range(6):
        desk.add([1] * 4, 50, owner="a", is_background=True)
    desk.step()
    assert running(desk) == {"a": 4}
    live = [desk.add([2] * 4, 5, owner="a") for _ in range(4)]
    desk.step()
    assert [sequence in desk.scheduler.running for sequence in live] == [True] * 4
    desk.add([1] * 4, 50, owner="b", is_background=True)
    for _ in range(4):
        desk.step()
        assert not any(s.is_background for s in desk.scheduler.running)
    desk.step()
    assert all(s.is_background for s in desk.scheduler.running)
    assert running(desk)["b"] == 1


@pytest.mark.parametrize("num_new", [1, 2, 3])
def test_vacant_places_go_to_newcomers_first(num_new: int) -> None:
    """Whoever runs goes on while there is a place for each who came; then one of theirs goes."""
    desk = Desk(1000, max_batch=6, max_step_tokens=64)
    for _ in range(4):
        desk.add([1] * 4, 50, owner="hog")
    desk.step()
    for number in range(num_new):
        desk.add([2] * 4, 50, owner=f"new {number}")
    desk.step()
    num_set_back = max(num_new - 2, 0)
    assert running(desk)["hog"] == 4 - num_set_back
    assert desk.scheduler.num_preemptions == num_set_back
    assert len(desk.scheduler.running) == min(4 + num_new, 6)


def test_a_newcomer_who_does_not_fit_sets_nobody_back() -> None:
    """Else each step would set an answer back in vain."""
    desk = Desk(10, max_batch=2, max_step_tokens=64)
    for _ in range(2):
        desk.add([1] * 4, 12, owner="hog")
    desk.step()
    desk.add([2] * 36, 1, owner="new")
    for _ in range(8):
        desk.step()
    assert desk.scheduler.num_preemptions == 0


def test_what_was_kept_for_a_newcomer_who_does_not_fit_goes_to_the_others() -> None:
    """Two prompts of 40 tokens run in 20 of the 24 blocks; of 12 tokens a third owner's are 4."""
    desk = Desk(24, max_step_tokens=12)
    desk.add([1] * 40, owner="a")
    desk.add([2] * 40, owner="b")
    assert shape(desk.step()) == [(0, 12)]
    assert shape(desk.step()) == [(0, 6), (1, 6)]
    desk.add([3] * 40, owner="c")
    assert shape(desk.step()) == [(0, 8), (1, 4)]
    assert shape(desk.step()) == [(0, 8), (1, 4)]
    assert shape(desk.step()) == [(0, 6), (1, 6)]  # the first has no more than these
