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
from rorqual.engine.scheduler import Segment
from rorqual.engine.sequence import TokenSequence


@dataclass
class _Guess:
    """A segment while it is drafted: the newest state, and all that the depth which gave it made of
    tokens beyond the text.
    """

    segment: Segment
    last_1D: Tensor
    ahead_TD: Tensor


class Speculator:
    """Drafts for the segments that have room for drafts; without MTP depths it does nothing."""

    def __init__(self, runner: Runner, cache: PagedLatentCache, vocab_size: int) -> None:
        self._runner, self._vocab_size = runner, vocab_size
        self._boundary_PND, self._block_tokens = cache.boundary_PND, cache.block_tokens
        self._num_depths = cache.boundary_PND.shape[1]

    def draft(self, segments: Sequence[Segment]) -> None:
        """Fills `drafts` of the segments, at most `num_drafts` tokens each."""
        live = [
            segment
            for segment in segments
            # In a text so short the last depths have no position yet.
            if segment.num_drafts and len(segment.sequence.token_ids) > self._num_depths
        ]
        if not live:
            return
        sequences = [segment.sequence for segment in live]
        states = self._catch_up(sequences, [len(s.token_ids) for s in sequences])
        guesses = [_Guess(s, state, state[:0]) for s, state in zip(live, states, strict=True)]
        self._put_likeliest(guesses)
        for number in range(1, max(segment.num_drafts for segment in live)):
            guesses = [guess for guess in guesses if guess.segment.num_drafts > number]
            self._run_ahead(guesses, number)
            self._put_likeliest(guesses)
        for segment in segments:
            segment.drafts = segment.sequence.answer.state.prune(segment.drafts)

    def note(self, sequence: TokenSequence, start: int, h_TD: Tensor) -> None:
        """Takes the main model's hidden states of tokens that are in the text for good."""
        if self._num_depths:
            self._extend(sequence, 0, start + 1, h_TD)

    def follow(self, prompts: Sequence[TokenSequence], answers: Sequence[TokenSequence]) -> None:
        """Brings the depths behind prompts that were just computed.

        Answers that grow without drafts follow a block at a time, all together: then their blocks
        can be published, what waits for the depths stays small, and drafting can begin anew.
        """
        if not self._num_depths:
            return
        due = [s for s in answers if s.answer.finish_reason is not None and self._has_block(s)]
        if any(s.num_computed - self.num_complete(s) >= self._block_tokens for s in answers):
            due = list(answers)
        if late := [*prompts, *due]:
            self._catch_up(late, [sequence.num_computed for sequence in late])

    def num_complete(self, sequence: TokenSequence) -> int:
        """How many tokens have their latents in every layer that is in use."""
        states = self._states(sequence)
        return min([sequence.num_computed, *(state.next_slot for state in states)])

    def _has_block(self, sequence: TokenSequence) -> bool:
        """Whether a block becomes complete if the depths follow."""
        size = self._block_tokens
        return sequence.num_computed // size > self.num_complete(sequence) // size

    def _states(self, sequence: TokenSequence) -> list[DepthState]:
        """Begun where the sequence begins: at its start, or behind blocks from the cache."""
        if sequence.depths is None:
            num_known = sequence.num_computed
            before_ND = self._boundary_PND[sequence.blocks[num_known // self._block_tokens - 1]]
            sequence.depths = [
                DepthState(num_known, before_ND[i : i + 1])
                if num_known
                else DepthState(i + 1, before_ND[:0])
                for i in range(self._num_depths)
            ]
        return sequence.depths

    def _extend(self, sequence: TokenSequence, index: int, slot: int, rows_TD: Tensor) -> None:
        """More input states for the depth of this index, the first of them for `slot`.

        The one at the beginning of a block is kept with the block before.
        """
        state = self._states(sequence)[index]
        state.rows_TD = torch.cat([state.rows_TD, rows_TD])
        size = self._block_tokens
        for place in range(-slot % size, len(rows_TD), size):
            block = sequence.blocks[(slot + place) // size - 1]
            self._boundary_PND[block, index] = rows_TD[place]

    def _catch_up(self, sequences: Sequence[TokenSequence], stops: Sequence[int]) -> list[Tensor]:
        """Runs every depth up to the slots before `stops`; the first depth's last states (1, D) of
        those that it ran for.
        """
        states = []
        for index in range(self._num_depths):
            late = [
                (sequence, self._states(sequence)[index], stop)
                for sequence, stop in zip(sequences, stops, strict=True)
                if self._states(sequence)[index].next_slot < stop
            ]
            if not late:
                continue
            spans = [
                Span(sequence.token_ids[state.next_slot : stop], state.next_slot, sequence.blocks)
                for sequence, state, stop in late
            ]
            rows = [state.rows_TD[: stop - state.next_slot] for _, state, stop in late]
            outs = self._runner.run_mtp(index + 1, spans, rows)
            for (sequence, state, stop), out_TD in zip(late, outs, strict=True):
                if index == 0:
                    states.append(out_TD[-1:])
                if index + 1 < self._num_depths:
                    self._extend(sequence, index + 1, state.next_slot + 1, out_TD)
                state.rows_TD = state.rows_TD[stop - state.next_slot :].clone()
                state.next_slot = stop
        return states

    def _run_ahead(self, guesses: Sequence[_Guess], number: int) -> None:
        """Moves to the states from which draft `number` (from 0) is read.

        A depth that has not run over the drafts yet takes them all, from what the depth before made
        of the text and of them; the last depth, run again, takes the newest alone.
        """
        spans, rows = [], []
        for guess in guesses:
            sequence, drafts = guess.segment.sequence, guess.segment.drafts
            end = len(sequence.token_ids)
            if number < self._num_depths:
                spans.append(Span(drafts, end, sequence.blocks))
                rows.append(torch.cat([self._states(sequence)[number].rows_TD, guess.ahead_TD]))
            else:
                spans.append(Span(drafts[-1:], end + number - 1, sequence.blocks))
                rows.append(guess.last_1D)
        outs = self._runner.run_mtp(min(number + 1, self._num_depths), spans, rows)
        for guess, out_TD in zip(guesses, outs, strict=True):
            guess.last_1D, guess.ahead_TD = out_TD[-1:], out_TD

    def _put_likeliest(self, guesses: Sequence[_Guess]) -> None:
        last_ND = torch.cat([guess.last_1D for guess in guesses])
        logits_NV = self._runner.logits(last_ND)[:, : self._vocab_size]
        for guess, token_id in zip(guesses, logits_NV.argmax(-1).tolist(), strict=True):
            guess.segment.drafts.append(token_id)
