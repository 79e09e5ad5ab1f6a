"""Who owns which block of the paged cache, and which blocks hold a known text (no tensors here).

A block is room for the latents of `block_tokens` tokens of one sequence in every layer. A full
block can be *published* under a key that stands for its tokens and all that come before them;
another sequence that begins with the same text then *holds* the same block instead of computing it
(automatic prefix cache, after vLLM's and SGLang's). Blocks that nobody holds stay findable until
their room is needed; the one that was let go first goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block's content: a hash chain over all tokens up to its end.

    Cryptographic, so that no user can make a text that is taken for another's.
    """
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=32).digest()


class BlockPool:
    """Blocks 0 to `num_blocks - 1`; each is held by some sequences, or cached, or empty."""

    def __init__(self, num_blocks: int) -> None:
        self._num_holders = [0] * num_blocks
        self._is_empty = np.ones(num_blocks, dtype=bool)  # not held and without content
        self._num_empty = num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # not held, with content; oldest first

    @property
    def num_blocks(self) -> int:
        return len(self._num_holders)

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give: empty and cached ones."""
        return self._num_empty + len(self._cached)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks for one new holder: neighbours where possible, the first behind `after`.

        Empty blocks come first, then the cached ones that were let go longest ago.
        """
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} are free"
        blocks = self._neighbours(count, after)
        if len(blocks) < count:
            blocks += np.flatnonzero(self._is_empty)[: count - len(blocks)].tolist()
            self._occupy(blocks)
            blocks += sorted(self._evict(count - len(blocks)))
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a chain of keys."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds: holding them takes as many from the free ones."""
        return sum(1 for block in blocks if not self._num_holders[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for blocks that `find` gave."""
        for block in blocks:
            self._cached.pop(block, None)
            self._num_holders[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Makes a full block findable; a second one of the same content stays private."""
        assert self._num_holders[block], f"block {block} is published by nobody"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. The end of a text is forgotten before its beginning."""
        for block in reversed(blocks):
            assert self._num_holders[block], f"block {block} is released by nobody"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._is_empty[block] = True
                self._num_empty += 1

    def forget(self) -> None:
        """What blocks hold stands for no text any more; those that nobody holds are empty."""
        self._is_empty[list(self._cached)] = True
        self._num_empty += len(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()

    def _evict(self, count: int) -> list[int]:
        blocks = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            del self._block_of[self._key_of.pop(block)]
        return blocks

    def _occupy(self, blocks: list[int]) -> None:
        self._num_empty -= int(self._is_empty[blocks].sum())
        self._is_empty[blocks] = False

    def _neighbours(self, count: int, after: int | None) -> list[int]:
        """As many of `count` empty neighbours as there are in one place, at least one if any."""
        start = 0 if after is None else after + 1
        if after is None or not self._is_empty[start : start + 1].any():
            start = self._place_to_begin(count)
        run = self._is_empty[start : start + count]
        length = len(run) if run.all() else int(run.argmin())
        blocks = list(range(start, start + length))
        self._occupy(blocks)
        return blocks

    def _place_to_begin(self, count: int) -> int:
        """Where the longest run of empty blocks begins, or its middle if `count` fits there.

        Choice: halving the room leaves each sequence space to grow into neighbours.
        """
        edges = np.flatnonzero(np.diff(self._is_empty, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]
        if not len(starts):
            return self.num_blocks
        longest = int((stops - starts).argmax())
        start, length = int(starts[longest]), int(stops[longest] - starts[longest])
        is_first = start == 0 and length == self.num_blocks
        half = length // 2
        return start + half if count <= length - half and not is_first else start
