"""Speculative decoding with the model's own MTP modules (report §5.4.3).

Depth d takes the hidden state that the depth before has at a position, and the token d places
further: so depth 1 guesses one token beyond the newest. Further drafts come from the next depths,
and beyond the last one from the last again, fed with its own output. Drafts are the likeliest
tokens; `verify` accepts exactly those that would have been sampled, so the text does not change.

Each depth has latents of its own. They follow the main model's: while a prompt is computed, right
behind it; while an answer grows, at the next draft, when the accepted tokens' true hidden states
are known, or a block at a time while nothing is drafted. What a draft wrote beyond the text is
overwritten then.
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


@dataclass
class _Guess:
    """A segment while it is drafted: the newest state, and all that the depth which gave it made of
    tokens beyond the text.
    """

    segment: Segment
    depths: tuple[DepthState, ...]
    last_1D: Tensor
    ahead_TD: Tensor
    drafts: list[int]


class Speculator:
    """Drafts for the segments that have room for drafts; without MTP depths it does nothing."""

    def __init__(self, runner: Runner, cache: PagedLatentCache) -> None:
        self._runner = runner
        self._boundary_PND, self._block_tokens = cache.boundary_PND, cache.block_tokens
        self._num_depths = cache.boundary_PND.shape[1]

    def draft(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments with drafts, at most `num_drafts` tokens each, and the depths behind them.

        Of the sequences nothing changes but latents in their blocks, which are written again if the
        step is done again.
        """
        live = [
            segment
            for segment in segments
            # In a text so short the last depths have no position yet.
            if segment.num_drafts and len(segment.sequence.token_ids) > self._num_depths
        ]
        if not live:
            return list(segments)
        sequences = [segment.sequence for segment in live]
        depths, firsts = self._catch_up(sequences, [len(s.token_ids) for s in sequences])
        guesses = {
            segment.sequence: _Guess(segment, known, state, state[:0], [draft])
            for segment, known, (state, draft) in zip(live, depths, firsts, strict=True)
        }
        going = list(guesses.values())
        for number in range(1, max(segment.num_drafts for segment in live)):
            going = [guess for guess in going if guess.segment.num_drafts > number]
            self._run_ahead(going, number)
        return [
            self._drafted(guesses[segment.sequence]) if segment.sequence in guesses else segment
            for segment in segments
        ]

    def _drafted(self, guess: _Guess) -> Segment:
        drafts = guess.segment.sequence.answer.state.prune(guess.drafts)
        return guess.segment._replace(drafts=tuple(drafts), depths=guess.depths)

    def note(self, segment: Segment, num_kept: int) -> None:
        """The segment's sequence takes the main model's hidden states of the first `num_kept`
        tokens, which are in the text for good.
        """
        if self._num_depths:
            sequence = segment.sequence
            first, *later = segment.depths or self._states(sequence)
            rows_TD = segment.hidden_states[:num_kept]
            first = self._extended(sequence, 0, first, segment.start + 1, rows_TD)
            sequence.depths = (first, *later)

    def follow(self, segments: Sequence[Segment]) -> None:
        """Brings the depths behind prompts that were just computed.

        Answers that grow without drafts follow a block at a time, all together: then their blocks
        can be published, what waits for the depths stays small, and drafting can begin anew.
        """
        if not self._num_depths:
            return
        prompts = [segment.sequence for segment in segments if not segment.is_decode]
        answers = [segment.sequence for segment in segments if segment.is_decode]
        due = [s for s in answers if s.answer.finish_reason is not None and self._has_block(s)]
        if any(s.num_computed - self.num_complete(s) >= self._block_tokens for s in answers):
            due = answers
        if late := [*prompts, *due]:
            depths, _ = self._catch_up(late, [sequence.num_computed for sequence in late])
            for sequence, known in zip(late, depths, strict=True):
                sequence.depths = known

    def num_complete(self, sequence: TokenSequence) -> int:
        """How many tokens have their latents in every layer that is in use."""
        states = self._states(sequence)
        return min([sequence.num_computed, *(state.next_slot for state in states)])

    def _has_block(self, sequence: TokenSequence) -> bool:
        """Whether a block becomes complete if the depths follow."""
        size = self._block_tokens
        return sequence.num_computed // size > self.num_complete(sequence) // size

    def _states(self, sequence: TokenSequence) -> tuple[DepthState, ...]:
        """Begun where the sequence begins: at its start, or behind blocks from the cache."""
        if sequence.depths is not None or not self._num_depths:
            return sequence.depths or ()
        num_known = sequence.num_computed
        before_ND = self._boundary_PND[sequence.blocks[num_known // self._block_tokens - 1]]
        return tuple(
            DepthState(num_known, before_ND[i : i + 1])
            if num_known
            else DepthState(i + 1, before_ND[:0])
            for i in range(self._num_depths)
        )

    def _extended(
        self, sequence: TokenSequence, index: int, state: DepthState, slot: int, rows_TD: Tensor
    ) -> DepthState:
        """With more input states for the depth of this index, the first of them for `slot`.

        The one at the beginning of a block is kept with the block before.
        """
        size = self._block_tokens
        for place in range(-slot % size, len(rows_TD), size):
            block = sequence.blocks[(slot + place) // size - 1]
            self._boundary_PND[block, index] = rows_TD[place]
        return DepthState(state.next_slot, torch.cat([state.rows_TD, rows_TD]))

    def _catch_up(
        self, sequences: Sequence[TokenSequence], stops: Sequence[int]
    ) -> tuple[list[tuple[DepthState, ...]], list[tuple[Tensor, int]]]:
        """Runs every depth up to the slots before `stops`: each sequence's depths then, and of the
        first depth its last state (1, D) and the likeliest token there, of those that it ran for.
        """
        depths = [list(self._states(sequence)) for sequence in sequences]
        firsts: list[tuple[Tensor, int]] = []
        for index in range(self._num_depths):
            late = [i for i, stop in enumerate(stops) if depths[i][index].next_slot < stop]
            if not late:
                continue
            spans, rows = [], []
            for i in late:
                first, stop, sequence = depths[i][index].next_slot, stops[i], sequences[i]
                spans.append(Span(sequence.token_ids[first:stop], first, sequence.blocks))
                rows.append(depths[i][index].rows_TD[: stop - first])
            if index == 0:
                outs, drafts = self._runner.draft(1, spans, rows)
                firsts = [(out[-1:], draft) for out, draft in zip(outs, drafts, strict=True)]
            else:
                outs = self._runner.run_mtp(index + 1, spans, rows)
            for i, out_TD in zip(late, outs, strict=True):
                state = depths[i][index]
                if index + 1 < self._num_depths:
                    depths[i][index + 1] = self._extended(
                        sequences[i], index + 1, depths[i][index + 1], state.next_slot + 1, out_TD
                    )
                left_TD = state.rows_TD[stops[i] - state.next_slot :].clone()
                depths[i][index] = DepthState(stops[i], left_TD)
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
            if number < self._num_depths:
                spans.append(Span(drafts, end, sequence.blocks))
                rows.append(torch.cat([guess.depths[number].rows_TD, guess.ahead_TD]))
            else:
                spans.append(Span(drafts[-1:], end + number - 1, sequence.blocks))
                rows.append(guess.last_1D)
        outs, drafts = self._runner.draft(min(number + 1, self._num_depths), spans, rows)
        for guess, out_TD, draft in zip(guesses, outs, drafts, strict=True):
            guess.last_1D, guess.ahead_TD = out_TD[-1:], out_TD
            guess.drafts.append(draft)
