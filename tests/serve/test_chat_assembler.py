"""Chunks of a chat. Oracle: the whole reply that the same pieces give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rorqual.engine import Piece, TokenLogprob, Usage
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.chat_assembler import ChatAssembler, ReplyHead
from rorqual.tokenizer import Tokenizer, train_tokenizer

HEAD = ReplyHead(id="chatcmpl-1", created=1, model="sei")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["abc"], 300)


def pieces_of(texts: Sequence[str], finish_reason: Any, end_ids: tuple[int, ...]) -> list[Piece]:
    """One token a piece; its text may be empty, as that of half a character is."""
    pieces = [
        Piece(text, (10 + number,), (TokenLogprob(10 + number, -0.1 * number, ()),))
        for number, text in enumerate(texts)
    ]
    ends = tuple(TokenLogprob(token_id, -0.5, ()) for token_id in end_ids)
    usage = Usage(3, len(texts), 0)
    return [*pieces, Piece("", end_ids, ends, finish_reason=finish_reason, usage=usage)]


def assembled(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[dict[str, Any]], Any]:
    """The choice of every chunk, and that of the whole."""
    reader = AnswerReader(tokenizer, has_tools=False, is_thinking=False)
    assembler = ChatAssembler(HEAD, tokenizer, [reader], has_logprobs=True)
    chunks = [json.loads(text) for piece in pieces for text in assembler.put(0, piece)]
    return [chunk["choices"][0] for chunk in chunks], json.loads(assembler.whole())["choices"][0]


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "b"],
        ["", "", "é", "b"],
        ["a", "", "é"],
        ["a", "", ""],
        ["a", "<thi", "nk", ">b</", "think", ">c"],
        [],
    ],
)
@pytest.mark.parametrize("ending", ["eos", "length", "length with a token"])
def test_no_probability_is_lost_on_the_way(
    tokenizer: Tokenizer, texts: list[str], ending: str
) -> None:
    """Each token's comes once, in order, also of one whose text is held back or comes later."""
    end_ids = {"eos": (tokenizer.eos_id,), "length": (), "length with a token": (99,)}[ending]
    reason = "stop" if ending == "eos" else "length"
    chunks, whole = assembled(tokenizer, pieces_of(texts, reason, end_ids))
    streamed = [
        entry for choice in chunks for entry in (choice["logprobs"] or {}).get("content", [])
    ]
    assert streamed == whole["logprobs"]["content"]
    assert len(streamed) == len(texts) + (ending == "length with a token")
    text = "".join(choice["delta"].get("content") or "" for choice in chunks)
    assert text == whole["message"]["content"]
    assert chunks[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in chunks][-1] == whole["finish_reason"] == reason
    assert not any(choice["finish_reason"] for choice in chunks[:-1])
