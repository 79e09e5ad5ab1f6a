"""Log-probabilities of `/v1/responses`, however the answer comes in pieces. Oracle: the text, which
the tokens of a message put together.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import SCRIPT, TIME, WEATHER

from rorqual.engine import Piece, TokenLogprob, Usage
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.responses_assembler import ResponsesAssembler
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALL_BEGIN, TOOL_CALLS_END
from tool_call_texts import render_tool_calls

CALLS = render_tool_calls([WEATHER, TIME])
ANSWERS = {
    "a text": "The sea is deep.",
    "a text and a call": SCRIPT["say and call"],
    "calls": CALLS,
    "a text, calls and a text": f"Let me look.{CALLS}Both are on their way.",
    "thoughts, a text and calls": f"<think>The sea is deep.</think>It is deep.{CALLS}",
    "thoughts that name a call": f"<think>No {TOOL_CALL_BEGIN} now.</think>It is deep.",
    "a text after a call that nothing closes": CALLS.replace(TOOL_CALLS_END, "") + "On its way.",
    "no call": f"Look: {TOOL_CALL_BEGIN}it is none.",
}


@pytest.mark.parametrize("has_tools", [True, False])
@pytest.mark.parametrize("answer", ANSWERS)
def test_each_text_has_the_logprobs_of_its_tokens(
    tokenizer: Tokenizer, answer: str, has_tools: bool
) -> None:
    ids = [*tokenizer.encode(ANSWERS[answer], allow_special=True), tokenizer.eos_id]
    for num_tokens in range(1, len(ids) + 1):
        for part, events in messages(tokenizer, ids, num_tokens, has_tools=has_tools):
            plain = "".join(entry["token"] for entry in part["logprobs"])
            assert plain == without_marks(part["text"], tokenizer), num_tokens
            assert events == part["logprobs"], num_tokens


def without_marks(text: str, tokenizer: Tokenizer) -> str:
    """Special tokens are no text, and have no entry even where their names are shown."""
    for name in tokenizer.special_ids:
        text = text.replace(name, "")
    return text


def messages(
    tokenizer: Tokenizer, ids: list[int], num_tokens: int, *, has_tools: bool
) -> list[tuple[Any, list[Any]]]:
    """(the part, the entries of its deltas) of each message; so many tokens a piece."""
    reader = AnswerReader(tokenizer, has_tools=has_tools, is_thinking=False)
    assembler = ResponsesAssembler(
        {"id": "resp_1"}, reader, tokenizer, is_stream=True, has_logprobs=True
    )
    decoder = tokenizer.stream()
    texts: list[str] = []
    for at in range(0, len(ids), num_tokens):
        chunk = tuple(ids[at : at + num_tokens])
        is_last = at + num_tokens >= len(ids)
        piece = Piece(
            "".join(decoder.put(i) for i in chunk if i != tokenizer.eos_id),
            chunk,
            tuple(TokenLogprob(i, -i / 100, ()) for i in chunk),
            finish_reason="stop" if is_last else None,
            usage=Usage(3, 0, len(ids)) if is_last else None,
        )
        texts += assembler.put(0, piece)
    entries: dict[str, list[Any]] = {}
    for event in map(json.loads, texts):
        if event["type"] == "response.output_text.delta":
            entries.setdefault(event["item_id"], []).extend(event["logprobs"])
    items = [item for item in assembler.response()["output"] if item["type"] == "message"]
    return [(item["content"][0], entries[item["id"]]) for item in items]
