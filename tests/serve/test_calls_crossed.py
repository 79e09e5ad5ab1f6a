"""Tool calls crossed with what else a request may ask for. Oracle: the unstreamed reply, and the
calls that the script was written from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from served import make_model

from rorqual.engine import Piece, Usage
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.app import create_app
from rorqual.serve.parse_stream import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)

CITY, NONE = '{"city": "Tromsø 鯨", "fence": "```"}', "{}"
V3 = f"{TOOL_CALL_BEGIN}function{TOOL_SEP}weather\n``` json\n{CITY}``` \n{TOOL_CALL_END}"
V31 = f"{TOOL_CALL_BEGIN}time{TOOL_SEP}{NONE}\n```{TOOL_CALL_END}"
SAID = f"I look.{TOOL_CALLS_BEGIN}{V3}\n{V31}{TOOL_CALLS_END}"
CALLS = [("weather", CITY), ("time", NONE)]
TOOLS = [{"type": "function", "function": {"name": name}} for name, _ in CALLS]
SWITCH = "{%- if add_generation_prompt -%}{{ '<think>' if thinking else '</think>' }}{%- endif -%}"
PREFIX = {"role": "assistant", "content": "", "prefix": True, "reasoning_content": "Hm"}


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer) -> Iterator[Live]:
    able = replace(tokenizer, chat_template=tokenizer.chat_template + SWITCH)
    script = {"<think>": f"Well.\n</think>\n\n{SAID}", "</think>": SAID}
    with running(create_app(FakeEngine(able, script, step_tokens=2), make_model(able))) as live:
        yield live


def folded(text: str) -> list[dict[str, Any]]:
    """By choice: what the chunks of a stream put together say."""
    choices: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else []:
            whole = choices.setdefault(
                choice["index"], {"reasoning": "", "content": "", "calls": {}, "logprobs": []}
            )
            delta = choice["delta"]
            whole["reasoning"] += delta.get("reasoning_content") or ""
            whole["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                known = whole["calls"].setdefault(call["index"], ["", ""])
                known[0] += call["function"].get("name") or ""
                known[1] += call["function"].get("arguments") or ""
            whole["logprobs"] += (choice["logprobs"] or {}).get("content") or []
            whole["finish"] = choice["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def told(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    return {
        "reasoning": message.get("reasoning_content") or "",
        "content": message["content"] or "",
        "calls": {i: list(call["function"].values()) for i, call in enumerate(calls)},
    }


@pytest.mark.parametrize(
    ("thinking", "has_prefix", "has_tools"), product([True, False], [True, False], [True, False])
)
def test_a_stream_says_what_the_whole_reply_says(
    live: Live, thinking: bool, has_prefix: bool, has_tools: bool
) -> None:
    """With near misses of fences, several choices and log-probabilities."""
    messages = [{"role": "user", "content": "hello"}, *([PREFIX] if has_prefix else [])]
    body: dict[str, Any] = {"messages": messages, "n": 2, "logprobs": True, "thinking": thinking}
    body |= {"tools": TOOLS} if has_tools else {}
    url = live.url + "/v1/chat/completions"
    choices = web.post(url, json=body).json()["choices"]
    streamed = folded(web.post(url, json=body | {"stream": True}).text)
    assert len(streamed) == len(choices) == 2
    for choice, stream in zip(choices, streamed, strict=True):
        whole = told(choice["message"])
        assert {key: stream[key] for key in whole} == whole
        assert stream["logprobs"] == choice["logprobs"]["content"]
        assert stream["finish"] == choice["finish_reason"]
        assert whole["reasoning"] == ("Well." if thinking or has_prefix else "")
        assert whole["content"] == ("I look." if has_tools else SAID)
        assert [tuple(call) for call in whole["calls"].values()] == (CALLS if has_tools else [])
        assert choice["finish_reason"] == ("tool_calls" if has_tools else "stop")


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_markers_in_ordinary_tokens_are_text(tokenizer: Tokenizer, step: int) -> None:
    """The ids tell a token from its name that the model spells."""
    quoted = json.dumps({"end": f"{TOOL_CALL_END}\n```{TOOL_CALLS_END}"}, ensure_ascii=False)
    special = tokenizer.special_ids
    ids = [
        *tokenizer.encode("<think>a</think>"),
        *(special[TOOL_CALLS_BEGIN], special[TOOL_CALL_BEGIN]),
        *tokenizer.encode("function"),
        special[TOOL_SEP],
        *tokenizer.encode(f"f\n```json\n{quoted}\n```{TOOL_CALL_END}\n```"),
        *(special[TOOL_CALL_END], special[TOOL_CALLS_END], tokenizer.eos_id),
    ]
    reader = AnswerReader(tokenizer, has_tools=True, is_thinking=False)
    decoder = tokenizer.stream()
    events: list[Event] = []
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        text = "".join(decoder.put(token_id) for token_id in some if token_id != tokenizer.eos_id)
        is_last = start + step >= len(ids)
        usage = Usage(1, 0, len(ids)) if is_last else None
        piece = Piece(text, tuple(some), (), "stop" if is_last else None, usage)
        events += reader.put(piece)
    assert not any(isinstance(event, Reasoning) for event in events)
    content = "".join(event.text for event in events if isinstance(event, Content))
    assert content == "<think>a</think>"
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == ["f"]
    arguments = "".join(event.text for event in events if isinstance(event, ToolCallArguments))
    assert arguments == f"{quoted}\n```{TOOL_CALL_END}"
    assert reader.finish_reason == "tool_calls"
