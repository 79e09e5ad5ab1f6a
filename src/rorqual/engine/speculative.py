"""Speculative decoding with the model's own MTP modules (report §5.4.3).

Depth d takes the hidden state that the depth before has at a position, and the token d places
further: so depth 1 guesses one token beyond the newest. Further drafts come from the next depths,
and beyond the last one from the last again, fed with its own output. Drafts are the likeliest
tokens; `verify` accepts exactly those that would have been sampled, so the text does not change.

Each depth has latents of its own. They follow the main model's at the next draft, when the accepted
tokens' true hidden states are known: until then these are kept. Of a text that grows while nothing
is drafted the last ones alone are kept, and a depth that follows later looks back no further; so
too behind blocks from the prefix cache that no depth went through. What a draft wrote beyond the
text is overwritten then.
"""

# T tokens of a span, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.engine.flat_step import Span
from rorqual.engine.mtp_state import DepthState
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.engine.segment import Segment
from rorqual.engine.sequence import TokenSequence

KEPT_TOKENS = 256
"""Choice: a depth that follows so many tokens late sees enough to guess well, and costs little."""


@dataclass
class _Guess:
    """A segment while it is drafted: all that the depth which gave the newest state made of tokens
    beyond the text, that state being its last; of the text's own last token, before that.
    """

    segment: Segment
    depths: tuple[DepthState, ...]
    newest_TD: Tensor
    drafts: list[int]


class Speculator:
    """Drafts for the segments that have room for drafts; without MTP depths it does nothing."""

    def __init__(self, runner: Runner, cache: PagedLatentCache) -> None:
        self._runner = runner
        self._boundary_PND, self._block_tokens = cache.boundary_PND, cache.block_tokens
        self._num_depths = cache.boundary_PND.shape[1]
        # Whether all depths went through a block, with all that comes before it in sight.
        self._has_depths = bytearray(len(cache.boundary_PND))

    def draft(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments with drafts, at most `num_drafts` tokens each, and the depths behind them.

        Of the sequences nothing changes but latents in their blocks, which are written again if the
        step is done again.
        """
        live = [segment for segment in segments if self._can_draft(segment)]
        if not live:
            return list(segments)
        sequences = [segment.sequence for segment in live]
        depths, firsts = self._catch_up(sequences, [len(s.token_ids) for s in sequences])
        if len(segments) == 1 == segments[0].num_drafts:
            (known,), ((newest_TD, draft),) = depths, firsts
            return [self._drafted(_Guess(segments[0], known, newest_TD, [draft]))]
        guesses = {
            segment.sequence: _Guess(segment, known, newest_TD, [draft])
            for segment, known, (newest_TD, draft) in zip(live, depths, firsts, strict=True)
        }
        going = list(guesses.values())
        for number in range(1, max(segment.num_drafts for segment in live)):
            going = [guess for guess in going if guess.segment.num_drafts > number]
            self._run_ahead(going, number)
        return [
            self._drafted(guesses[segment.sequence]) if segment.sequence in guesses else segment
            for segment in segments
        ]

    def _can_draft(self, segment: Segment) -> bool:
        """In a text so short, or known so far, the last depth has no position yet."""
        if not segment.num_drafts:
            return False
        last = self._states(segment.sequence)[-1]
        return last.next_slot < len(segment.sequence.token_ids)

    def _drafted(self, guess: _Guess) -> Segment:
        drafts = guess.segment.sequence.answer.state.prune(guess.drafts)
        return guess.segment._replace(drafts=tuple(drafts), depths=guess.depths)

    def note(self, segment: Segment, num_kept: int) -> None:
        """The segment's sequence takes the main model's hidden states of the first `num_kept`
        tokens, which are in the text for good.
        """
        if not self._num_depths:
            return
        sequence, start, size = segment.sequence, segment.start, self._block_tokens
        states = segment.depths or self._states(sequence)
        for slot in range(start + -start % size, start + num_kept, size):
            self._has_depths[sequence.blocks[slot // size]] = False  # its content begins anew
        rows_TD = segment.hidden_states
        if num_kept < segment.num_tokens + len(segment.drafts):
            rows_TD = rows_TD[:num_kept]
        self._keep_boundaries(sequence, 0, start + 1, rows_TD, num_kept)
        sequence.depths = (states[0].with_rows(rows_TD, num_kept), *states[1:])

    def follow(self, segments: Sequence[Segment], *, is_drafting: bool) -> None:
        """After what was noted: brings depths behind texts that wait for long, or end within reach
        of a whole block, while anything is drafted; else the oldest hidden states go.
        """
        if not self._num_depths:
            return
        late = []
        for sequence in [segment.sequence for segment in segments]:
            num_waiting = self._states(sequence)[0].num_rows
            if is_drafting and (num_waiting > KEPT_TOKENS or self._ends_with_block(sequence)):
                late.append(sequence)
            elif num_waiting > 2 * KEPT_TOKENS:
                sequence.depths = _begun(sequence.num_computed - KEPT_TOKENS, sequence.depths)
        if late:
            depths, _ = self._catch_up(late, [sequence.num_computed for sequence in late])
            for sequence, known in zip(late, depths, strict=True):
                sequence.depths = known
        for segment in segments:
            self._mark_blocks(segment)

    def _ends_with_block(self, sequence: TokenSequence) -> bool:
        """Whether it has ended, and a block becomes complete if the depths follow."""
        if sequence.answer.finish_reason is None:
            return False
        size, states = self._block_tokens, self._states(sequence)
        reached = min(state.next_slot for state in states)
        return sequence.num_computed // size > reached // size

    def _mark_blocks(self, segment: Segment) -> None:
        """Marks the sequence's blocks that all depths went through, of which all is known."""
        sequence, size = segment.sequence, self._block_tokens
        states = self._states(sequence)
        stop = min(sequence.num_computed, *(state.next_slot for state in states)) // size
        if stop == sequence.num_followed:
            return
        if all(state.first_slot == depth for depth, state in enumerate(states, 1)):
            for number in range(sequence.num_followed, stop):
                self._has_depths[sequence.blocks[number]] = True
            sequence.num_followed = stop

    def _states(self, sequence: TokenSequence) -> tuple[DepthState, ...]:
        """Begun where the sequence begins: at its start, or behind blocks from the cache."""
        if sequence.depths is not None or not self._num_depths:
            return sequence.depths or ()
        size = self._block_tokens
        number = num_known = sequence.num_computed // size
        while number and self._has_depths[sequence.blocks[number - 1]]:
            number -= 1
        if number == num_known:
            return tuple(
                DepthState(num_known * size + depth, num_known * size + depth)
                for depth in range(1, self._num_depths + 1)
            )
        before_ND = self._boundary_PND[sequence.blocks[num_known - 1]]
        return tuple(
            DepthState(
                max(number * size, depth), num_known * size, 1, (before_ND[depth - 1 : depth],)
            )
            for depth in range(1, self._num_depths + 1)
        )

    def _keep_boundaries(
        self, sequence: TokenSequence, index: int, slot: int, rows_TD: Tensor, num: int
    ) -> None:
        """Of these `num` input states for the depth of this index, the first of them for `slot`,
        those at the beginning of a block are kept with the block before.
        """
        size = self._block_tokens
        for place in range(-slot % size, num, size):
            block = sequence.blocks[(slot + place) // size - 1]
            self._boundary_PND[block, index] = rows_TD[place]

    def _catch_up(
        self, sequences: Sequence[TokenSequence], stops: Sequence[int]
    ) -> tuple[list[tuple[DepthState, ...]], list[tuple[Tensor, int]]]:
        """Runs every depth up to the slots before `stops`: each sequence's depths then, and of the
        first depth its states (T, D) and the likeliest token behind them, of those that it ran for.
        """
        depths = [list(self._states(sequence)) for sequence in sequences]
        firsts: list[tuple[Tensor, int]] = []
        for index in range(self._num_depths):
            late = [i for i, stop in enumerate(stops) if depths[i][index].next_slot < stop]
            if not late:
                continue
            spans, rows = [], []
            for i in late:
                state, stop, sequence = depths[i][index], stops[i], sequences[i]
                start = state.next_slot
                ids = sequence.token_ids[start:stop]
                spans.append(Span(ids, start, sequence.blocks, state.first_slot))
                rows_TD, depths[i][index] = state.taken(stop - start)
                rows.append(rows_TD)
            if index == 0:
                outs, drafts = self._runner.draft(1, spans, rows)
                firsts = list(zip(outs, drafts, strict=True))
            else:
                outs = self._runner.run_mtp(index + 1, spans, rows)
            if index + 1 < self._num_depths:
                for i, span, out_TD in zip(late, spans, outs, strict=True):
                    start, num = span.start + 1, len(span.token_ids)
                    self._keep_boundaries(sequences[i], index + 1, start, out_TD, num)
                    depths[i][index + 1] = depths[i][index + 1].with_rows(out_TD, num)
        return [tuple(known) for known in depths], firsts

    def _run_ahead(self, guesses: Sequence[_Guess], number: int) -> None:
        """Moves to the states from which draft `number` (from 0) is read.

        A depth that has not run over the drafts yet takes them all, from what the depth before made
        of the text and of them; the last depth, run again, takes the newest alone.
        """
        spans, rows = [], []
        for guess in guesses:
            sequence, drafts = guess.segment.sequence, guess.drafts
            end = len(sequence.token_ids)
            state = guess.depths[min(number, self._num_depths - 1)]
            if number < self._num_depths:
                spans.append(Span(drafts, end, sequence.blocks, state.first_slot))
                ahead_TD = guess.newest_TD[len(guess.newest_TD) - number + 1 :]
                rows.append(torch.cat([*state.rows, ahead_TD]))
            else:
                start = end + number - 1
                spans.append(Span(drafts[-1:], start, sequence.blocks, state.first_slot))
                rows.append(guess.newest_TD[-1:])
        outs, more = self._runner.draft(min(number + 1, self._num_depths), spans, rows)
        for guess, out_TD, draft in zip(guesses, outs, more, strict=True):
            guess.newest_TD = out_TD
            guess.drafts.append(draft)


def _begun(slot: int, depths: tuple[DepthState, ...] | None) -> tuple[DepthState, ...]:
    """Depths that begin anew at a slot, from hidden states that are kept."""
    first, *later = depths or ()
    _, left = first.taken(slot - first.next_slot)
    return (
        DepthState(slot, slot, left.num_rows, left.rows),
        *(DepthState(slot + place, slot + place) for place in range(1, len(later) + 1)),
    )
