"""Tokens as text. Oracle: UTF-8's own decoder, byte by byte."""

from __future__ import annotations

import math

import pytest

from rorqual.engine import TokenLogprob
from rorqual.serve.tokens_text import LOWEST, CompletionTokens, chat_logprob, finite, join
from rorqual.tokenizer import Tokenizer, train_tokenizer

TEXT = "a€é🐳b"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """No merges: a token is a byte."""
    return train_tokenizer(["abc"], 300)


@pytest.mark.parametrize("cut", range(1, len(TEXT.encode())))
def test_offsets_count_whole_characters(tokenizer: Tokenizer, cut: int) -> None:
    """An offset is the number of characters that are complete before the token; over two pieces
    as in one.
    """
    ids = [token_id for byte in TEXT.encode() for token_id in byte_ids(tokenizer, byte)]
    raw = TEXT.encode()
    whole = [len(raw[:end].decode("utf-8", errors="ignore")) for end in range(len(raw))]
    tokens = CompletionTokens(tokenizer, 0)
    items = [TokenLogprob(token_id, -0.5, ()) for token_id in ids]
    parts = [tokens.put(ids[:cut], items[:cut]), tokens.put(ids[cut:], items[cut:])]
    found = join(parts)
    assert found.text_offset == whole
    assert found.tokens[:4] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert found.top_logprobs is None


def byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if tokenizer.bytes_of(i) == bytes([byte])][:1]


def test_a_prompts_first_token_has_no_probability_and_zero_is_finite(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    item = TokenLogprob(second, -math.inf, ((first, -0.25),))
    found = CompletionTokens(tokenizer, 1).put([first, second], [None, item])
    assert found.token_logprobs == [None, LOWEST]
    assert found.top_logprobs == [None, {"a": -0.25, "b": LOWEST}]
    reply = chat_logprob(item, tokenizer)
    assert (reply.token, reply.logprob, reply.bytes) == ("b", LOWEST, [ord("b")])
    assert [(top.token, top.logprob) for top in reply.top_logprobs] == [("a", -0.25)]
    assert finite(-1e5) == LOWEST
    assert finite(-1e3) == -1e3
