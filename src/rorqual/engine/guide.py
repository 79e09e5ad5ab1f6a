"""What guides an answer token by token: its grammar, and where reasoning has to end.

A guide moves with each token, so the rows of an answer that has one are looked at one after the
other. `verify` moves a fork and rewinds it; `SamplingState.commit` takes the fork over.
"""

# V vocabulary

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rorqual.engine.closing import Closing
from rorqual.engine.grammar import CompiledGrammar
from rorqual.engine.params import SamplingParams
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END
from rorqual.tokenizer.thinking import is_thinking


class Guide:
    """A prompt that ends inside `<think>` lets the model think first: the grammar begins after the
    `</think>`, unless it names that token itself.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        max_tokens: int,
        compiled: CompiledGrammar | None,
    ) -> None:
        self._vocab_size, self._eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self._special_ids = [*tokenizer.special_ids.values()]
        self._end_ids = frozenset(end_ids)
        self._max_thinking_tokens = params.max_thinking_tokens
        self._think_ids = tuple(tokenizer.special_ids.get(n) for n in (THINK_BEGIN, THINK_END))
        self._is_thinking, self._num_thinking = is_thinking(prompt_ids, tokenizer), 0
        self._waits = False
        self._matcher = None if compiled is None else compiled.matcher()
        self._matched: list[int] = []  # by the matcher, since this guide was forked
        self._closing: Closing | None = None
        if compiled is not None and self._matcher is not None and params.grammar is not None:
            is_aware = params.grammar.kind == "grammar" and THINK_END in params.grammar.text
            self._waits = self._is_thinking and not is_aware
            names = compiled.names
            self._closing = Closing(self._matcher, tokenizer, self._end_ids, max_tokens, names)

    def fork(self) -> Guide:
        """One that stands in the same place. They share the matcher, since a copy of it costs the
        more the longer the answer is: one of them moves at a time, and is rewound.
        """
        other = copy.copy(self)
        other._matched = []
        other._closing = None if self._closing is None else self._closing.fork()
        return other

    def rewind(self) -> None:
        """Brings the matcher back to where the fork began. One that gave up has no way back."""
        if self._matcher is not None and self._matched and not self.is_cut_short:
            self._matcher.rollback(len(self._matched))

    def settle(self) -> None:
        """Moves the matcher, for good, to where the fork stands."""
        for token_id in self._matched:
            assert self._matcher is not None, "tokens were matched"
            self._matcher.put(token_id)
        self._matched = []

    @property
    def is_cut_short(self) -> bool:
        """Whether the grammar had to give up, so that the answer is no complete text of it."""
        return self._matcher is not None and self._matcher.failure is not None

    def allowed(self) -> Tensor:
        """(V,) bool: what may come next."""
        allowed_V = self._allowed_by_grammar()
        end_id = self._think_ids[1]
        if self._is_thinking and end_id is not None and self._must_end_thinking():
            # A grammar that speaks of reasoning itself may want the rest of a character first.
            return self._only(end_id) if allowed_V[end_id] else allowed_V
        return allowed_V

    def admits(self, token_id: int) -> bool:
        """Whether the grammar can still come to its end in time after this token; else the next
        `allowed` leaves it out.
        """
        if self._closing is None or self._waits or self.is_cut_short:
            return True
        return self._closing.admits(token_id)

    def put(self, token_id: int) -> None:
        """Takes a token of the answer."""
        begin_id, end_id = self._think_ids
        was_thinking, self._is_thinking = (
            self._is_thinking,
            token_id != end_id if self._is_thinking else token_id == begin_id,
        )
        self._num_thinking += was_thinking and self._is_thinking
        if self._matcher is None or self._closing is None or token_id in self._end_ids:
            return
        if self._waits:
            self._waits = self._is_thinking
            self._closing.count()
        else:
            self._matcher.put(token_id)
            self._matched.append(token_id)
            self._closing.put(token_id)

    def prune(self, draft_ids: Sequence[int]) -> list[int]:
        """The first of these drafts, as many as the grammar allows: running more would be vain."""
        drafts = list(draft_ids)
        if self._matcher is None:
            return drafts
        start = 0
        if self._waits:
            _, end_id = self._think_ids
            if end_id not in drafts:
                return drafts
            start = drafts.index(end_id) + 1
        ends = [index for index in range(start, len(drafts)) if drafts[index] in self._end_ids]
        end = min(ends, default=len(drafts))
        num_possible = self._matcher.num_possible(drafts[start:end])
        # An end after possible tokens is left to `verify`: it knows whether the text may end there.
        is_all = start + num_possible == end
        return drafts[: end + 1] if is_all else drafts[: start + num_possible]

    def _must_end_thinking(self) -> bool:
        limit = self._max_thinking_tokens
        is_over = limit is not None and self._num_thinking >= limit
        return is_over or (self._waits and self._closing is not None and self._closing.must_begin())

    def _allowed_by_grammar(self) -> Tensor:
        matcher, closing = self._matcher, self._closing
        if matcher is None or closing is None or self._waits:
            allowed_V = torch.ones(self._vocab_size, dtype=torch.bool)
            if matcher is not None:  # the answer to the grammar is still to come
                allowed_V[self._special_ids] = False
                allowed_V[self._think_ids[1]] = True
            return allowed_V
        allowed_V = matcher.allowed()
        if matcher.failure is None and (only_id := closing.only()) is not None:
            return self._only(only_id)
        allowed_V[closing.refused] = False
        if allowed_V[self._eos_id]:
            allowed_V[list(self._end_ids)] = True
        return allowed_V

    def _only(self, token_id: int) -> Tensor:
        allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed_V[token_id] = True
        return allowed_V
