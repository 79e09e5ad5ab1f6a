"""What sampling remembers of one answer: counts for the penalties, its grammar, its random numbers.

The state moves only by tokens that are in the answer for good, so speculation needs no way back:
`verify` looks at a draft's logits after the drafts before it were accepted, and stops at the first
that was not.
"""

# V vocabulary

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.engine.closing import Closing
from rorqual.engine.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from rorqual.engine.params import BAN, SamplingParams
from rorqual.engine.sampler import random_source
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END
from rorqual.tokenizer.thinking import is_thinking

UNIFORMS_AT_ONCE = 32


class SamplingState:
    """Belongs to one answer; only `verify` moves it.

    UsageError for a grammar that cannot be used, and for ids that the tokenizer does not have. A
    prompt that ends inside `<think>` lets the model think first: the grammar begins after the
    `</think>`, unless it names that token itself.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        grammars: GrammarCompiler | None = None,
        compiled: CompiledGrammar | None = None,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self.params = params
        self.vocab_size = tokenizer.vocab_size
        self._eos_id, self._special_ids = tokenizer.eos_id, [*tokenizer.special_ids.values()]
        self.end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.end_ids |= {tokenizer.eos_id}
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._ends = torch.tensor(sorted(self.end_ids), dtype=torch.long)
        self._num_tokens = 0
        self._source = random_source(params)
        self._uniforms: deque[float] = deque()
        self._begin_penalties(prompt_ids)
        self._begin_bias()
        self._think_ids = tuple(tokenizer.special_ids.get(n) for n in (THINK_BEGIN, THINK_END))
        self._is_thinking = self._waits = False
        self._num_thinking = 0
        self._matcher: GrammarMatcher | None = None
        self._closing: Closing | None = None
        if params.grammar is not None or params.max_thinking_tokens is not None:
            self._is_thinking = is_thinking(prompt_ids, tokenizer)
        if params.grammar is not None:
            if compiled is None:
                assert grammars is not None, "a grammar needs the engine's GrammarCompiler"
                compiled = grammars.compile(params.grammar)
            self._matcher = compiled.matcher()
            is_aware = params.grammar.kind == "grammar" and THINK_END in params.grammar.text
            self._waits = self._is_thinking and not is_aware
            max_tokens = params.max_tokens if max_tokens is None else max_tokens
            names = compiled.names
            self._closing = Closing(self._matcher, tokenizer, self.end_ids, max_tokens, names)

    @property
    def is_cut_short(self) -> bool:
        """Whether the grammar had to give up, so that the answer is no complete text of it."""
        return self._matcher is not None and self._matcher.failure is not None

    def uniform(self, offset: int = 0) -> float:
        """The random number of the token `offset` places ahead."""
        while len(self._uniforms) <= offset:
            block = torch.rand(UNIFORMS_AT_ONCE, dtype=torch.float64, generator=self._source)
            self._uniforms.extend(block.tolist())
        return self._uniforms[offset]

    def adjust(self, logits_V: Tensor) -> Tensor:
        """The logits that temperature and filters work on; what may not come next has -inf."""
        params = self.params
        if self._matcher is not None or params.max_thinking_tokens is not None:
            logits_V = logits_V.masked_fill(~self._allowed(), -torch.inf)
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            logits_V = torch.where(self._is_seen_V, penalised_V, logits_V)
        if params.frequency_penalty or params.presence_penalty:
            logits_V = logits_V - params.frequency_penalty * self._counts_V
            logits_V = logits_V - params.presence_penalty * (self._counts_V > 0)
        if params.logit_bias:
            logits_V = logits_V.index_add(0, self._bias_ids, self._biases)
            left_V = logits_V.index_fill(0, self._banned_ids, -torch.inf)
            if left_V.max() > -torch.inf:  # else the grammar leaves banned tokens only
                logits_V = left_V
        if params.allowed_token_ids is not None:
            left_V = logits_V.masked_fill(self._is_barred_V, -torch.inf)
            if left_V.max() > -torch.inf:
                logits_V = left_V
        if self._num_tokens < params.min_tokens:
            left_V = logits_V.index_fill(0, self._ends, -torch.inf)
            if left_V.max() > -torch.inf:  # else the grammar leaves the end only
                logits_V = left_V
        return logits_V

    def commit(self, token_id: int) -> None:
        """Takes a token of the answer."""
        self._num_tokens += 1
        if self._uniforms:
            self._uniforms.popleft()
        if self.params.repetition_penalty != 1:
            self._is_seen_V[token_id] = True
        if self.params.frequency_penalty or self.params.presence_penalty:
            self._counts_V[token_id] += 1
        begin_id, end_id = self._think_ids
        was_thinking, self._is_thinking = (
            self._is_thinking,
            token_id != end_id if self._is_thinking else token_id == begin_id,
        )
        self._num_thinking += was_thinking and self._is_thinking
        if self._matcher is None or self._closing is None or token_id in self.end_ids:
            return
        if self._waits:
            self._waits = self._is_thinking
            self._closing.count()
        else:
            self._matcher.put(token_id)
            self._closing.put(token_id)

    def admits(self, token_id: int) -> bool:
        """Whether the grammar can still come to its end in time after this token; else the next
        `adjust` leaves it out.
        """
        if self._closing is None or self._waits or self.is_cut_short:
            return True
        return self._closing.admits(token_id)

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
        ends = [index for index in range(start, len(drafts)) if drafts[index] in self.end_ids]
        end = min(ends, default=len(drafts))
        num_possible = self._matcher.num_possible(drafts[start:end])
        # An end after possible tokens is left to `verify`: it knows whether the text may end there.
        is_all = start + num_possible == end
        return drafts[: end + 1] if is_all else drafts[: start + num_possible]

    def _allowed(self) -> Tensor:
        allowed_V = self._allowed_by_grammar()
        end_id = self._think_ids[1]
        if self._is_thinking and end_id is not None and self._must_end_thinking():
            # A grammar that speaks of reasoning itself may want the rest of a character first.
            return self._only(end_id) if allowed_V[end_id] else allowed_V
        return allowed_V

    def _must_end_thinking(self) -> bool:
        limit = self.params.max_thinking_tokens
        is_over = limit is not None and self._num_thinking >= limit
        return is_over or (self._waits and self._closing is not None and self._closing.must_begin())

    def _allowed_by_grammar(self) -> Tensor:
        matcher, closing = self._matcher, self._closing
        if matcher is None or closing is None or self._waits:
            allowed_V = torch.ones(self.vocab_size, dtype=torch.bool)
            if matcher is not None:  # the answer to the grammar is still to come
                allowed_V[self._special_ids] = False
                allowed_V[self._think_ids[1]] = True
            return allowed_V
        allowed_V = matcher.allowed()
        if matcher.failure is None and (only_id := closing.only()) is not None:
            return self._only(only_id)
        allowed_V[closing.refused] = False
        if allowed_V[self._eos_id]:
            allowed_V[list(self.end_ids)] = True
        return allowed_V

    def _only(self, token_id: int) -> Tensor:
        allowed_V = torch.zeros(self.vocab_size, dtype=torch.bool)
        allowed_V[token_id] = True
        return allowed_V

    def _begin_penalties(self, prompt_ids: Sequence[int]) -> None:
        params = self.params
        if params.repetition_penalty != 1:
            self._is_seen_V = torch.zeros(self.vocab_size, dtype=torch.bool)
            # A prompt may hold ids of the model that the tokenizer does not have.
            known = [token_id for token_id in set(prompt_ids) if token_id < self.vocab_size]
            self._is_seen_V[known] = True
        if params.frequency_penalty or params.presence_penalty:
            self._counts_V = torch.zeros(self.vocab_size)

    def _begin_bias(self) -> None:
        bias = self.params.logit_bias or {}
        self._check_ids("logit_bias", list(bias))
        added = {token_id: value for token_id, value in bias.items() if value > BAN}
        self._bias_ids = torch.tensor(list(added), dtype=torch.long)
        self._biases = torch.tensor(list(added.values()), dtype=torch.float32)
        banned = [token_id for token_id in bias if token_id not in added]
        self._banned_ids = torch.tensor(banned, dtype=torch.long)
        if (allowed := self.params.allowed_token_ids) is not None:
            self._check_ids("allowed_token_ids", allowed)
            self._is_barred_V = torch.ones(self.vocab_size, dtype=torch.bool)
            self._is_barred_V[list(allowed)] = False

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
        if unknown:
            raise UsageError(
                f"{name} has a token id that does not exist",
                found=unknown[0],
                expected=f"0 to {self.vocab_size - 1}",
            )
