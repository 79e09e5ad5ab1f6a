"""What sampling remembers of one answer: counts for the penalties, its guide, its random numbers.

The state moves only by tokens that are in the answer for good: `rows` says what the tokens after
drafts are sampled by as if these were accepted, and `commit` takes those that were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from rorqual.engine.grammar import CompiledGrammar, GrammarCompiler
from rorqual.engine.guide import Guide
from rorqual.engine.logit_changes import LogitChanges, TokenCounts
from rorqual.engine.params import BAN, SamplingParams
from rorqual.engine.sampler import Row, random_source
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer

UNIFORMS_AT_ONCE = 32


class SamplingState:
    """Belongs to one answer; only its commit moves it.

    UsageError for a grammar that cannot be used, and for ids that the tokenizer does not have.
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
        self.end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.end_ids |= {tokenizer.eos_id}
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._early_ids = torch.tensor(sorted(self.end_ids), dtype=torch.long)
        self._num_tokens = 0
        self._source = random_source(params)
        self._uniforms: deque[float] = deque()
        self._counts: TokenCounts | None = None
        if params.has_penalties:
            # A prompt may hold ids of the model that the tokenizer does not have.
            is_prompt_seen = params.repetition_penalty != 1
            seen = [i for i in prompt_ids if i < self.vocab_size] if is_prompt_seen else []
            self._counts = TokenCounts(seen)
        self._changes = self._fixed_changes()
        is_changed = self._counts is not None or self._changes.is_any
        self._is_greedy = params.temperature <= 0 and params.logprobs is None and not is_changed
        self.guide: Guide | None = None
        if params.grammar is not None and compiled is None:
            assert grammars is not None, "a grammar needs the engine's GrammarCompiler"
            compiled = grammars.compile(params.grammar)
        if params.grammar is not None or params.max_thinking_tokens is not None:
            most = params.max_tokens if max_tokens is None else max_tokens
            is_bound = params.grammar is not None
            self.guide = Guide(
                params, prompt_ids, tokenizer, self.end_ids, most, compiled if is_bound else None
            )

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is, and nothing else is asked of logits."""
        is_early = self._num_tokens < self.params.min_tokens
        return self._is_greedy and self.guide is None and not is_early

    @property
    def is_cut_short(self) -> bool:
        """Whether the grammar had to give up, so that the answer is no complete text of it."""
        return self.guide is not None and self.guide.is_cut_short

    def uniform(self, offset: int = 0) -> float:
        """The random number of the token `offset` places ahead."""
        while len(self._uniforms) <= offset:
            block = torch.rand(UNIFORMS_AT_ONCE, dtype=torch.float64, generator=self._source)
            self._uniforms.extend(block.tolist())
        return self._uniforms[offset]

    def row(self, drafts: Sequence[int] = (), guide: Guide | None = None) -> Row:
        """What the token after these drafts is sampled by, if they are accepted and the guide
        stands behind them.
        """
        changes, num_drafts = self._changes, len(drafts)
        if guide is not None:
            changes = replace(changes, allowed_V=guide.allowed())
        if self._counts is not None:
            changes = replace(changes, seen=self._counts.after(drafts))
        if self._num_tokens + num_drafts < self.params.min_tokens:
            changes = replace(changes, early_ids=self._early_ids)
        uniform = self.uniform(num_drafts) if self.params.temperature > 0 else 0.0
        return Row(self.params, uniform, changes)

    def commit(self, token_ids: Sequence[int], guide: Guide | None = None) -> None:
        """Takes tokens of the answer, and the fork of its guide that stands behind them."""
        if guide is not None:
            guide.settle()
        self.guide = guide
        self._num_tokens += len(token_ids)
        for token_id in token_ids:
            if self._uniforms:
                self._uniforms.popleft()
            if self._counts is not None:
                self._counts.add(token_id)

    def prune(self, draft_ids: Sequence[int]) -> list[int]:
        """The first of these drafts, as many as the guide allows: running more would be vain."""
        return list(draft_ids) if self.guide is None else self.guide.prune(draft_ids)

    def _fixed_changes(self) -> LogitChanges:
        """What stays the same from token to token."""
        params, bias = self.params, self.params.logit_bias or {}
        self._check_ids("logit_bias", list(bias))
        added = {token_id: value for token_id, value in bias.items() if value > BAN}
        banned = [token_id for token_id in bias if token_id not in added]
        allowed = params.allowed_token_ids
        self._check_ids("allowed_token_ids", allowed or ())
        return LogitChanges(
            penalties=(
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            ),
            bias=(
                torch.tensor(list(added)),
                torch.tensor(list(added.values()), dtype=torch.float32),
            )
            if added
            else None,
            banned_ids=torch.tensor(banned) if banned else None,
            only_ids=torch.tensor(allowed) if allowed is not None else None,
        )

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
        if unknown:
            raise UsageError(
                f"{name} has a token id that does not exist",
                found=unknown[0],
                expected=f"0 to {self.vocab_size - 1}",
            )
