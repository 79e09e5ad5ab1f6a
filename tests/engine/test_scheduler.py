"""The order and the budget of steps, by hand; hypothesis drives whole lives of sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.answer import Answer
from rorqual.engine.blocks import BlockPool
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Request
from rorqual.engine.scheduler import LOOK_AHEAD, MAX_OVERTAKEN, Limits, Scheduler
from rorqual.engine.segment import Segment
from rorqual.engine.sequence import TokenSequence

SIZE = 4


@dataclass(eq=False)
class FakeAnswer:
    """What the scheduler sees of an answer."""

    request: Request
    num_left: int
    token_ids: list[int] = field(default_factory=list)
    needs_prompt_logprobs: bool = False
    num_cached_tokens: int = 0


class Desk:
    """A scheduler, and a model that answers with ever new tokens."""

    def __init__(self, num_blocks: int, num_drafts: int = 0, **changes: object) -> None:
        values = {
            "block_tokens": SIZE,
            "max_batch": 8,
            "max_step_tokens": 10,
            "use_prefix_cache": False,
        }
        self.pool = BlockPool(num_blocks)
        limits = Limits(**{**values, **changes})  # type: ignore[arg-type]
        self.scheduler, self.max_step_tokens = Scheduler(self.pool, limits), limits.max_step_tokens
        self.num_drafts = num_drafts
        self.numbers = count(1000)
        self.arrivals = count()

    def add(
        self, prompt: list[int], num_left: int = 50, owner: str = "", is_background: bool = False
    ) -> TokenSequence:
        request = Request(prompt, SamplingParams(), owner, is_background)
        answer = FakeAnswer(request, num_left)
        sequence = TokenSequence(cast(Answer, answer), next(self.arrivals), SIZE)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Segment]:
        """Schedules, checks what must always hold, and takes one token where a text has ended."""
        segments = self.scheduler.schedule(self.num_drafts)
        owners = [segment.sequence for segment in segments]
        assert len(set(map(id, owners))) == len(owners), "a sequence runs twice"
        num_tokens = sum(segment.num_tokens + segment.num_drafts for segment in segments)
        assert num_tokens <= self.max_step_tokens, "more than a step may hold"
        for segment in segments:
            end = segment.start + segment.num_tokens + segment.num_drafts
            assert end <= len(segment.sequence.blocks) * SIZE, "a token without a block"
            assert segment.start == segment.sequence.num_computed
        for segment in segments:
            sequence = segment.sequence
            is_last = segment.is_last
            sequence.num_computed = segment.start + segment.num_tokens
            if is_last:
                answer = cast(FakeAnswer, sequence.answer)
                answer.num_left -= 1
                answer.token_ids.append(next(self.numbers))
                sequence.token_ids.append(answer.token_ids[-1])
            self.scheduler.publish(sequence)
            if sequence.answer.num_left == 0:
                self.scheduler.remove(sequence)
        return segments


def shape(segments: list[Segment]) -> list[tuple[int, int]]:
    return [(segment.sequence.arrival, segment.num_tokens) for segment in segments]


def test_answers_come_first_and_prompts_share_the_rest() -> None:
    desk = Desk(100)
    desk.add([1] * 6)
    desk.add([2] * 15)
    desk.add([3] * 3)
    assert shape(desk.step()) == [(0, 6), (1, 4)]
    assert shape(desk.step()) == [(0, 1), (1, 9)]
    assert shape(desk.step()) == [(0, 1), (1, 2), (2, 3)]
    assert shape(desk.step()) == [(0, 1), (1, 1), (2, 1)]


def test_a_lone_prompt_has_larger_steps_until_somebody_comes() -> None:
    desk = Desk(100, max_lone_tokens=25)
    desk.max_step_tokens = 25
    desk.add([1] * 70)
    assert shape(desk.step()) == [(0, 25)]
    desk.add([2] * 30)
    desk.max_step_tokens = 10
    assert shape(desk.step()) == [(0, 10)]
    few = Desk(100, max_lone_tokens=3)  # never fewer than of a shared step
    few.add([1] * 70)
    assert shape(few.step()) == [(0, 10)]


def test_the_budget_bounds_how_many_run() -> None:
    desk = Desk(100, max_step_tokens=2, num_drafts=3)
    for number in range(4):
        desk.add([number], num_left=3)
    for _ in range(3):
        segments = desk.step()
        assert shape(segments) == [(0, 1), (1, 1)]
        assert sum(segment.num_drafts for segment in segments) == 0
    assert shape(desk.step()) == [(2, 1), (3, 1)]


def test_drafts_take_what_the_budget_leaves_and_never_outlive_the_answer() -> None:
    desk = Desk(100, num_drafts=3, max_step_tokens=7)
    desk.add([1] * 2)
    desk.add([2] * 2, num_left=3)
    desk.step()
    assert [segment.num_drafts for segment in desk.step()] == [3, 1]
    assert [segment.num_drafts for segment in desk.step()] == [3, 0]


def test_the_newest_is_preempted_and_waits_first() -> None:
    desk = Desk(6, max_step_tokens=50)
    old, new = desk.add([1] * 7), desk.add([2] * 7)
    desk.add([3] * 7)
    assert shape(desk.step()) == [(0, 7), (1, 7)]  # the third would leave no room to grow
    while desk.scheduler.num_preemptions == 0:
        segments = desk.step()
    assert [segment.sequence for segment in segments] == [old]
    assert desk.scheduler.waiting[0] is new
    assert (new.num_computed, new.blocks) == (0, [])
    assert len(new.answer.token_ids) > 0


def test_small_ones_overtake_only_so_often() -> None:
    desk = Desk(30, max_step_tokens=200)
    desk.add([1] * 20, num_left=10_000)
    desk.step()
    big = desk.add([2] * 100)
    for number in range(2 * MAX_OVERTAKEN):
        small = desk.add([3, number], num_left=1)
        desk.step()
        was_overtaken = small not in desk.scheduler.waiting
        assert was_overtaken == (number < MAX_OVERTAKEN)
        if not was_overtaken:
            break
    assert big.num_overtaken == MAX_OVERTAKEN
    assert desk.scheduler.waiting[0] is big


def test_known_beginnings_are_shared_and_the_last_token_runs() -> None:
    desk = Desk(50, use_prefix_cache=True, max_step_tokens=100)
    desk.add([1] * 8, num_left=1)
    desk.step()
    again = desk.add([1] * 8)
    longer = desk.add([1] * 8 + [2] * 3)
    assert shape(desk.step()) == [(1, 4), (2, 3)]
    assert again.blocks[0] == longer.blocks[0]
    assert again.blocks[1] != longer.blocks[1]
    assert again.answer.num_cached_tokens == 4
    assert desk.scheduler.num_hit_tokens == 4 + 8
    assert desk.scheduler.num_queried_tokens == 8 + 8 + 11


def test_answers_to_one_prompt_compute_it_once() -> None:
    desk = Desk(50, use_prefix_cache=True, max_step_tokens=100)
    for _ in range(3):
        desk.add([1] * 10)
    desk.add([2] * 3)
    assert shape(desk.step()) == [(0, 10), (3, 3)]
    assert shape(desk.step()) == [(0, 1), (3, 1), (1, 2), (2, 2)]
    # The last block of a prompt is not shared, so nobody waits for it.
    desk = Desk(50, use_prefix_cache=True, max_step_tokens=6)
    desk.add([1] * 8)
    desk.add([1] * 8)
    assert shape(desk.step()) == [(0, 6)]
    assert shape(desk.step()) == [(0, 2), (1, 4)]
    apart = Desk(50, max_step_tokens=100)
    for _ in range(2):
        apart.add([1] * 10)
    assert shape(apart.step()) == [(0, 10), (1, 10)]


@given(
    st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 20), st.integers(0, 3), st.sampled_from("ABCab")
        ),
        max_size=12,
    ),
    st.integers(13, 30),
    st.integers(1, 20),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_everyone_is_served_and_every_block_comes_back(
    requests: list[tuple[int, int, int, str]],
    num_blocks: int,
    max_step_tokens: int,
    num_drafts: int,
    use_prefix_cache: bool,
) -> None:
    desk = Desk(
        num_blocks,
        max_step_tokens=max_step_tokens,
        num_drafts=num_drafts,
        use_prefix_cache=use_prefix_cache,
        max_batch=5,
    )
    sequences = []
    for length, num_left, pause, owner in requests:
        is_background = owner.islower()
        sequences.append(desk.add([length % 3] * length, num_left, owner.upper(), is_background))
        for _ in range(pause):
            desk.step()
    for _ in range(5000):
        if not desk.scheduler.waiting and not desk.scheduler.running:
            break
        assert desk.step(), "nobody runs although somebody waits"
    assert [len(s.answer.token_ids) for s in sequences] == [left for _, left, _, _ in requests]
    assert desk.pool.num_free == num_blocks


def test_one_who_takes_the_last_free_block_leaves_the_others_room_to_grow() -> None:
    """A newcomer needs its own blocks and one for each that runs, and not one more."""
    for num_blocks, is_admitted in ((4, False), (5, True)):
        desk = Desk(num_blocks, max_step_tokens=50)
        desk.add([1] * 7)  # two blocks
        desk.step()
        desk.add([2] * 8)  # two blocks, and one for the first
        assert (len(desk.step()) == 2) == is_admitted


def test_so_many_run_and_no_more() -> None:
    desk = Desk(100, max_batch=2)
    for number in range(3):
        desk.add([number], num_left=2)
    assert shape(desk.step()) == [(0, 1), (1, 1)]
    assert desk.scheduler.num_decoding == 2
    assert shape(desk.step()) == [(0, 1), (1, 1)]
    assert shape(desk.step()) == [(2, 1)]


def test_shared_blocks_that_nobody_holds_count_as_taken() -> None:
    """Of five blocks two are cached: the text again needs these, one of its own, and no more."""
    desk = Desk(5, use_prefix_cache=True, max_step_tokens=50)
    desk.add([1] * 9, num_left=1)
    desk.step()
    assert desk.pool.num_free == 5
    again = desk.add([1] * 9)
    desk.step()
    assert (again.num_published, len(again.blocks)) == (2, 3)
    assert desk.pool.num_free == 2
    third = desk.add([1] * 9 + [2] * 4)  # two shared, two new, and one for who runs
    desk.step()
    assert third in desk.scheduler.waiting


def test_what_was_taken_out_while_it_waited_leaves_nothing() -> None:
    desk = Desk(100, max_step_tokens=4)
    first, second = desk.add([1] * 4), desk.add([2] * 4)
    desk.step()
    desk.scheduler.remove(second)
    desk.scheduler.remove(first)
    assert (desk.scheduler.waiting, desk.scheduler.running) == ([], [])
    assert desk.pool.num_free == 100


def test_who_asks_for_the_prompts_probabilities_computes_it_whole() -> None:
    """Neither blocks that are known nor blocks that are coming are taken; afterwards they are."""
    desk = Desk(50, use_prefix_cache=True, max_step_tokens=100)
    desk.add([1] * 12)
    asks = desk.add([1] * 12)
    cast(FakeAnswer, asks.answer).needs_prompt_logprobs = True
    assert shape(desk.step()) == [(0, 12), (1, 12)]
    again = desk.add([1] * 12)
    cast(FakeAnswer, again.answer).needs_prompt_logprobs = True
    assert (2, 12) in shape(desk.step())
    assert again.answer.num_cached_tokens == 0
    plain = desk.add([1] * 12)
    assert (3, 4) in shape(desk.step())
    assert plain.answer.num_cached_tokens == 8


def test_a_preempted_answer_is_no_second_query() -> None:
    desk = Desk(6, max_step_tokens=50, use_prefix_cache=True)
    desk.add([1] * 7, num_left=14)
    new = desk.add([2] * 7, num_left=14)
    while desk.scheduler.waiting or desk.scheduler.running:
        desk.step()
    assert desk.scheduler.num_preemptions > 0
    assert desk.scheduler.num_queried_tokens == 14
    assert desk.scheduler.num_hit_tokens == new.answer.num_cached_tokens == 0


def test_no_more_that_wait_are_looked_at_than_a_few() -> None:
    desk = Desk(10, max_step_tokens=50, max_batch=50)
    desk.add([1] * 20, num_left=1000)
    desk.step()
    for number in range(LOOK_AHEAD):
        desk.add([2 + number] * 24)  # none of these fits
    small = desk.add([99], num_left=1)
    desk.step()
    assert small in desk.scheduler.waiting
    desk.scheduler.remove(desk.scheduler.waiting[0])
    desk.step()
    assert small not in desk.scheduler.waiting


def test_what_a_broken_step_lost_can_still_be_removed() -> None:
    """An exception between the two lists, where the sequence is in neither."""
    desk = Desk(num_blocks=10)
    sequence = desk.add([1, 2, 3])
    desk.scheduler.schedule()
    desk.scheduler.running.remove(sequence)
    desk.scheduler.remove(sequence)
    assert desk.pool.num_free == 10
    desk.scheduler.remove(sequence)
    assert desk.pool.num_free == 10
