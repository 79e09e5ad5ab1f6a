"""The scheduler: which tokens of which sequences run in a step, and who gets the blocks.

Bookkeeping without tensors. A step's budget of tokens goes to the running answers first, a token
each and their drafts, then to prompts in chunks. Requests of one owner are admitted first come,
first served. One that finds too few blocks may be overtaken by smaller ones, but only
`MAX_OVERTAKEN` times: then all others wait for it. When a running answer needs a block and none is
free, the newest sequence is preempted: its blocks go, and it waits to be computed again from its
text.

Owners share alike (max-min fairness): whoever has the fewest running comes first, a full batch
gives a place to an owner who has two fewer than another, the one with the most is preempted first,
and the tokens of a step that prompts may have are divided among owners. What runs in the background
has what the others leave.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from rorqual.engine.blocks import BlockPool
from rorqual.engine.segment import Segment, segment_of
from rorqual.engine.sequence import TokenSequence, Turn

MAX_OVERTAKEN = 32
LOOK_AHEAD = 8  # Choice: how many that wait are tried in a step


@dataclass(frozen=True)
class Limits:
    """What a step may hold, and how a sequence's text is cut into blocks. A prompt that nobody
    waits beside has `max_lone_tokens` a step.
    """

    block_tokens: int
    max_batch: int
    max_step_tokens: int
    use_prefix_cache: bool
    max_lone_tokens: int = 0


class Scheduler:
    """`waiting` and `running` are in the order of arrival."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self._pool, self._limits = pool, limits
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def add(self, sequence: TokenSequence) -> None:
        """Puts a sequence in the queue. Whoever adds it has checked that alone it fits the pool."""
        insort(self.waiting, sequence, key=attrgetter("arrival"))

    def remove(self, sequence: TokenSequence) -> None:
        """Takes a sequence out, done or not; its blocks are free at once.

        A step that an exception cut short may have it in neither list.
        """
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._pool.release(sequence.forget())

    @property
    def num_decoding(self) -> int:
        """How many answers want their next token."""
        return sum(1 for sequence in self.running if sequence.is_decoding)

    def schedule(self, num_drafts: int = 0) -> list[Segment]:
        """The next step, with at most `num_drafts` an answer. Every segment's sequence owns the
        blocks of all its slots.
        """
        self._make_way()
        segments = {segment.sequence: segment for segment in self._decodes(num_drafts)}
        if len(segments) == len(self.running) and not self.waiting:
            return list(segments.values())
        budget = self._limits.max_step_tokens
        if len(self.running) + len(self.waiting) == 1:
            budget = max(budget, self._limits.max_lone_tokens)
        budget -= sum(segment.num_tokens + segment.num_drafts for segment in segments.values())
        prompts = [sequence for sequence in self.running if not sequence.is_decoding]
        shares = self._shares(prompts, budget)
        num_given: Counter[TokenSequence] = Counter()
        for prompt in prompts:
            chunk = segment_of(prompt, shares[prompt.turn])
            num_given[prompt] = chunk.num_tokens
            shares[prompt.turn] -= chunk.num_tokens
            budget -= chunk.num_tokens
            if chunk.num_tokens:
                segments[prompt] = chunk
        admitted = self._admitted(segments.values())
        while budget > 0 and (newcomer := next(admitted, None)) is not None:
            segments[newcomer] = segment_of(newcomer, budget)
            budget -= segments[newcomer].num_tokens
        for prompt in prompts:  # what was kept for newcomers who did not come
            chunk = segment_of(prompt, num_given[prompt] + budget)
            budget -= chunk.num_tokens - num_given[prompt]
            if chunk.num_tokens:
                segments[prompt] = chunk
        return list(segments.values())

    def publish(self, sequence: TokenSequence) -> None:
        """Makes the blocks findable that are full."""
        if not self._limits.use_prefix_cache:
            return
        num_full = sequence.num_computed // self._limits.block_tokens
        for number in range(sequence.num_published, num_full):
            self._pool.publish(sequence.blocks[number], sequence.key(number))
        sequence.num_published = max(sequence.num_published, num_full)

    def _decodes(self, max_drafts: int) -> Iterator[Segment]:
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        # Whoever runs was admitted within a budget that held all others, so each gets its token.
        spare = self._limits.max_step_tokens - len(decoding)
        for sequence in decoding:
            num_drafts = min(max_drafts, sequence.answer.num_left - 1, spare)
            num_tokens = len(sequence.token_ids)
            if not self._can_grow(sequence, num_tokens + num_drafts):
                num_drafts = 0
            if self._make_room(sequence, num_tokens):
                self._grow(sequence, num_tokens + num_drafts)
                spare -= num_drafts
                yield segment_of(sequence, 1, num_drafts)

    def _make_room(self, sequence: TokenSequence, num_slots: int) -> bool:
        """Preempts the newest until the sequence can grow; False if it was itself preempted.

        Older ones had their turn in this step before it, so none that runs in it is touched.
        """
        while sequence in self.running and not self._can_grow(sequence, num_slots):
            self._preempt(self.running[self.running.index(sequence) :])
        return sequence in self.running

    def _preempt(self, sequences: Iterable[TokenSequence]) -> None:
        """Sets back one of these: the newest of the owner who has the most running."""
        counts = Counter(sequence.turn for sequence in self.running)
        last = max(sequences, key=lambda s: (s.is_background, counts[s.turn], s.arrival))
        self.running.remove(last)
        self._pool.release(last.forget())
        self.num_preemptions += 1
        self.add(last)

    def set_all_back(self) -> None:
        """Everything that runs is to be computed again, and no beginning is known any more."""
        for sequence in self.running[::-1]:
            self.running.remove(sequence)
            self._pool.release(sequence.forget())
            self.add(sequence)
        self._pool.forget()

    def _make_way(self) -> None:
        """Sets answers back for owners who wait with at least two places fewer than another has.

        Two, since one would only change who waits. It happens before anybody's turn in the step.
        """
        if not self.waiting:
            return
        num_vacant = min(self._limits.max_batch, self._limits.max_step_tokens) - len(self.running)
        for num_places, newcomer in self._in_turn()[num_vacant:LOOK_AHEAD]:
            counts = Counter(sequence.turn for sequence in self.running)
            behind, most = max(
                ((turn.is_background, count) for turn, count in counts.items()), default=(False, 0)
            )
            is_alike = newcomer.is_background == behind
            is_fair = num_places + 1 < most if is_alike else behind
            if is_fair and self._fits(newcomer, self._known_blocks(newcomer)):
                self._preempt(self.running)

    def _in_turn(self) -> list[tuple[int, TokenSequence]]:
        """Who waits, in the order in which they may run, each with the number of places that its
        owner will have before it: the fewest come first.
        """
        places = Counter(sequence.turn for sequence in self.running)
        order = []
        for sequence in self.waiting:
            is_aged = sequence.num_overtaken >= MAX_OVERTAKEN
            order.append((not is_aged, sequence.is_background, places[sequence.turn], sequence))
            places[sequence.turn] += 1
        order.sort(key=lambda item: item[:3])  # stable: of equals the one that came first
        return [item[2:] for item in order]

    def _shares(self, prompts: Sequence[TokenSequence], budget: int) -> Counter[Turn]:
        """How many tokens each owner's prompts may have, newcomers included: the least who want
        little, and the others alike.
        """
        wanted: Counter[Turn] = Counter()
        for sequence in prompts:
            wanted[sequence.turn] += len(sequence.token_ids) - sequence.num_computed
        num_places = self._limits.max_batch - len(self.running)
        for _, newcomer in self._in_turn()[: min(num_places, LOOK_AHEAD)]:
            wanted[newcomer.turn] += len(newcomer.token_ids)
        shares: Counter[Turn] = Counter()
        for is_background in (False, True):
            turns = [turn for turn in wanted if turn.is_background == is_background]
            turns.sort(key=lambda turn: wanted[turn])
            for number, turn in enumerate(turns):
                shares[turn] = min(wanted[turn], budget // (len(turns) - number))
                budget -= shares[turn]
        return shares

    def _admitted(self, segments: Collection[Segment]) -> Iterator[TokenSequence]:
        """Each that finds room, admitted when the caller asks for it.

        One whose next block is being computed in this very step waits for it: several answers to
        one prompt compute it once.
        """
        passed: list[TokenSequence] = []
        for _, sequence in self._in_turn()[:LOOK_AHEAD]:
            if len(self.running) >= self._limits.max_batch:
                return
            shared = self._known_blocks(sequence)
            if self._is_coming(sequence, len(shared), segments):
                continue
            if self._fits(sequence, shared):
                for older in passed:
                    older.num_overtaken += 1
                self._admit(sequence, shared)
                yield sequence
            elif sequence.num_overtaken >= MAX_OVERTAKEN:
                return
            else:
                passed.append(sequence)

    def _known_blocks(self, sequence: TokenSequence) -> list[int]:
        """Blocks of its beginning that are in the cache, but for the last token: it has to run."""
        if not self._limits.use_prefix_cache or sequence.answer.needs_prompt_logprobs:
            return []
        num_full = (len(sequence.token_ids) - 1) // self._limits.block_tokens
        return self._pool.find(sequence.key(number) for number in range(num_full))

    def _is_coming(
        self, sequence: TokenSequence, number: int, segments: Collection[Segment]
    ) -> bool:
        """Whether a segment will fill the same block as the sequence's block `number`."""
        size = self._limits.block_tokens
        stop = (number + 1) * size
        is_shared = self._limits.use_prefix_cache and not sequence.answer.needs_prompt_logprobs
        return (
            is_shared
            and stop < len(sequence.token_ids)
            and any(
                segment.start < stop <= segment.stop
                and segment.sequence.key(number) == sequence.key(number)
                for segment in segments
            )
        )

    def _fits(self, sequence: TokenSequence, shared: list[int]) -> bool:
        num_new = self._num_blocks(len(sequence.token_ids)) - len(shared)
        # Choice: each that runs may grow by a block before the newcomer would be preempted again.
        num_needed = num_new + self._pool.num_idle(shared) + len(self.running)
        return num_needed <= self._pool.num_free

    def _admit(self, sequence: TokenSequence, shared: list[int]) -> None:
        self.waiting.remove(sequence)
        self._pool.hold(shared)
        sequence.blocks = list(shared)
        sequence.num_published = len(shared)
        sequence.num_computed = len(shared) * self._limits.block_tokens
        self._grow(sequence, len(sequence.token_ids))
        insort(self.running, sequence, key=attrgetter("arrival"))
        if not sequence.answer.token_ids:  # a preempted one asks again for what it had
            sequence.answer.num_cached_tokens = sequence.num_computed
            self.num_queried_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed

    def _can_grow(self, sequence: TokenSequence, num_slots: int) -> bool:
        count = self._num_blocks(num_slots) - len(sequence.blocks)
        return count <= 0 or count <= self._pool.num_free

    def _grow(self, sequence: TokenSequence, num_slots: int) -> None:
        count = self._num_blocks(num_slots) - len(sequence.blocks)
        if count > 0:
            last = sequence.blocks[-1] if sequence.blocks else None
            sequence.blocks += self._pool.take(count, after=last)

    def _num_blocks(self, num_slots: int) -> int:
        return -(-num_slots // self._limits.block_tokens)
