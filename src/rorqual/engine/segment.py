"""A segment: what one sequence runs in a step, and what came of it.

It is frozen. Each stage of a step (schedule, draft, run, verify) makes new ones that hold its
results; only commit changes the sequences. So a step that fails before its commit leaves no trace
in an answer, and the next step does the same again.
"""

# T tokens of a segment with its drafts, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rorqual.engine.flat_step import Span
from rorqual.engine.logprobs import TokenLogprob
from rorqual.engine.mtp_state import DepthState
from rorqual.engine.sequence import TokenSequence
from rorqual.engine.verify import Verified


class Segment(NamedTuple):
    """The sequence's `num_tokens` tokens from `start` on, and drafts behind them: as many as
    `num_drafts` were wanted.

    `depths`: how far the MTP depths came while drafting. `verified`: the tokens that follow, where
    `is_last`. `prompt_logprobs`: of the prompt's tokens that follow one of these, if asked for.
    """

    sequence: TokenSequence
    start: int
    num_tokens: int
    is_last: bool
    """Whether it reaches the end of the text, so that the next token can be sampled."""
    num_drafts: int = 0
    drafts: tuple[int, ...] = ()
    depths: tuple[DepthState, ...] | None = None
    hidden_TD: Tensor | None = None
    verified: Verified | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()

    @property
    def is_decode(self) -> bool:
        """Whether it is one answer's next token, perhaps with drafts."""
        return self.is_last and self.num_tokens == 1

    @property
    def num_accepted(self) -> int:
        return 0 if self.verified is None else self.verified.num_accepted

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def span(self) -> Span:
        known = self.sequence.token_ids[self.start : self.stop]
        return Span([*known, *self.drafts], self.start, self.sequence.blocks)

    @property
    def hidden_states(self) -> Tensor:
        """The main model's hidden states of its tokens and drafts."""
        assert self.hidden_TD is not None, "the segment has not run"
        return self.hidden_TD


def segment_of(sequence: TokenSequence, num_tokens: int, num_drafts: int = 0) -> Segment:
    """The next tokens of a sequence, at most `num_tokens`."""
    num_left = len(sequence.token_ids) - sequence.num_computed
    num_tokens = min(num_tokens, num_left)
    is_last = num_tokens == num_left
    return Segment(sequence, sequence.num_computed, num_tokens, is_last, num_drafts)
