"""Tokens as text in replies: names for half characters, offsets, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rorqual.engine import TokenLogprob
from rorqual.serve.schemas_completions import CompletionLogprobs
from rorqual.serve.schemas_replies import TokenLogprobReply, TopLogprob
from rorqual.tokenizer import Tokenizer

LOWEST = -9999.0
"""Shown for a token of probability zero, as OpenAI does: JSON has no infinity."""


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; bytes that are no UTF-8 by themselves show as `bytes:\\xe2\\x80`."""
    raw = tokenizer.bytes_of(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST) if math.isfinite(logprob) else LOWEST


def chat_logprob(item: TokenLogprob, tokenizer: Tokenizer) -> TokenLogprobReply:
    """One token of `choices[].logprobs.content`."""
    return TokenLogprobReply(
        **_top(item.token_id, item.logprob, tokenizer).model_dump(),
        top_logprobs=[_top(token_id, logprob, tokenizer) for token_id, logprob in item.top],
    )


def _top(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = list(tokenizer.bytes_of(token_id))
    text = token_text(token_id, tokenizer)
    return TopLogprob(token=text, logprob=finite(logprob), bytes=raw)


class CompletionTokens:
    """Builds `choices[].logprobs` of a completion token by token; offsets count characters."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top
        self._decoder = tokenizer.stream()
        self._offset = 0

    def put(
        self, token_ids: Sequence[int], items: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        """The entries of these tokens; an item is None for a prompt's first token."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, item in zip(token_ids, items, strict=True):
            tokens.append(token_text(token_id, self._tokenizer))
            logprobs.append(None if item is None else finite(item.logprob))
            tops.append(None if item is None else self._top_of(item))
            offsets.append(self._offset)
            self._offset += len(self._decoder.put(token_id))
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=logprobs,
            top_logprobs=tops if self._num_top else None,
            text_offset=offsets,
        )

    def _top_of(self, item: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one if it is not among them, as OpenAI gives."""
        pairs = [*item.top, (item.token_id, item.logprob)]
        return {token_text(token_id, self._tokenizer): finite(p) for token_id, p in pairs}


def join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Entries of one answer, put together in order."""
    has_tops = bool(parts) and parts[0].top_logprobs is not None
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[t for part in parts for t in part.top_logprobs or []] if has_tops else None,
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
