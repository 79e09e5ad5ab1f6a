"""Oracle: a plain model of ownership, beside which hypothesis drives the pool."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rorqual.engine.blocks import BlockPool, block_key

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share, publish and release blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.owners: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what each block was last published as
        self.num_keys = 0

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        after = data.draw(st.none() | st.integers(0, NUM_BLOCKS - 1))
        blocks = self.pool.take(count, after)
        assert len(set(blocks)) == count
        held = {block for owner in self.owners for block in owner}
        assert not held & set(blocks), "a block with two owners"
        for block in blocks:
            self.contents.pop(block, None)
        self.owners.append(blocks)

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for owner in self.owners for b in owner]))
        if block not in self.contents:
            self.num_keys += 1
            key = block_key(b"", [self.num_keys])
            self.pool.publish(block, key)
            self.contents[block] = key
            assert self.pool.find([key]) == [block]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.contents.values())), unique=True))
        blocks = self.pool.find(keys)
        assert [self.contents[block] for block in blocks] == keys
        self.pool.hold(blocks)
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.release(self.owners.pop(at))

    @invariant()
    def nothing_leaks(self) -> None:
        held = {block for owner in self.owners for block in owner}
        assert self.pool.num_free == NUM_BLOCKS - len(held)

    def teardown(self) -> None:
        for owner in self.owners:
            self.pool.release(owner)
        assert self.pool.num_free == NUM_BLOCKS
        assert sorted(self.pool.take(NUM_BLOCKS)) == list(range(NUM_BLOCKS))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_key_stands_for_all_that_came_before() -> None:
    first = block_key(b"", [1, 2])
    assert first == block_key(b"", (1, 2)) != block_key(b"", [2, 1])
    assert block_key(first, [3]) != block_key(b"", [3])
    assert block_key(b"", [1]) != block_key(b"", [1, 0])


def test_neighbours_are_given_where_there_are_some() -> None:
    pool = BlockPool(64)
    first = pool.take(4)
    assert first == [0, 1, 2, 3]
    other = pool.take(3)
    assert other == list(range(other[0], other[0] + 3))
    assert other[0] > 20, "the first has no room to grow"
    assert pool.take(1, after=first[-1]) == [4]
    assert pool.take(2, after=other[-1]) == [other[-1] + 1, other[-1] + 2]


def test_the_longest_forgotten_goes_first_and_an_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    keys = [block_key(b"", [n]) for n in range(4)]
    old, new = pool.take(2), pool.take(2)
    for block, key in zip(old + new, keys, strict=True):
        pool.publish(block, key)
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4
    assert pool.take(1) == [old[1]]
    assert pool.find([keys[0], keys[1]]) == [old[0]]
    pool.hold([old[0]])  # in use again: the new ones are next
    assert set(pool.take(2)) == set(new)
    assert pool.num_free == 0


def test_a_block_of_known_content_stays_private() -> None:
    """A key names the block that had it first; a block keeps the key that it had first."""
    pool = BlockPool(4)
    one, two = pool.take(2)
    keys = [block_key(b"", [n]) for n in range(2)]
    pool.publish(one, keys[0])
    pool.publish(two, keys[0])
    assert pool.find([keys[0]]) == [one]
    pool.publish(one, keys[1])
    assert pool.find([keys[1]]) == []
    assert pool.find([keys[1], keys[0]]) == [], "a chain is known from its beginning"
    pool.release([two])  # it is empty now, not cached
    assert pool.num_free == 3
    assert pool.num_idle([one, two]) == 1
    pool.release([one])
    assert pool.find([keys[0]]) == [one]
    assert pool.num_idle([one, two]) == 2


def test_a_block_is_free_with_its_last_holder() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.publish(blocks[0], block_key(b"", [1]))
    pool.hold(blocks)
    pool.release(blocks)
    assert (pool.num_free, pool.num_idle(blocks)) == (1, 0)
    pool.release(blocks)
    assert (pool.num_free, pool.num_idle(blocks)) == (2, 1)


def test_room_is_given_where_there_is_most() -> None:
    """From the middle of the longest run, so that whoever is before it may grow; from its
    beginning where the middle is too short; over several runs where none is long enough.
    """
    pool = BlockPool(20)
    everything = pool.take(20)
    pool.release(everything[2:5])
    pool.release(everything[8:16])
    assert pool.take(4) == [12, 13, 14, 15]
    pool.release([12, 13, 14, 15])
    assert pool.take(5) == [8, 9, 10, 11, 12]
    assert pool.take(5) == [2, 3, 4, 13, 14]
    assert pool.take(1, after=14) == [15]
    assert pool.num_free == 0
