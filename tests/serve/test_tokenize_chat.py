"""`/tokenize` of a conversation. Oracle: the chat route, its prompts and its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from served import CONTEXT, TIME, WEATHER, make_model

from rorqual.serve.app import create_app
from rorqual.serve.notes import IGNORED_HEADER
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

SWITCH = "{%- if add_generation_prompt -%}{{ '<think>' if thinking else '</think>' }}{%- endif -%}"
HELLO = {"role": "user", "content": "hello 鯨"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": CITY}},
    {"type": "function", "function": {"name": "time", "description": "The time."}},
]
CALLS = {"role": "assistant", "tool_calls": [{"id": "a", **WEATHER}, {"id": "b", **TIME}]}
ROUNDS = [
    HELLO,
    CALLS,
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]},
    {"role": "assistant", "content": "Rain.", "reasoning_content": "Hm."},
    {"role": "user", "content": "<｜Assistant｜>And?"},
    {**CALLS, "content": "Again."},
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
]
PREFIX = {"role": "assistant", "content": "So", "prefix": True}
GOOD: list[dict[str, Any]] = [
    {"messages": [HELLO]},
    {"messages": [{"role": "developer", "content": "Be brief."}, HELLO], "model": "minke"},
    {"messages": ROUNDS, "tools": TOOLS},
    {"messages": ROUNDS, "tools": TOOLS, "tool_choice": "none"},
    {"messages": ROUNDS[:4], "tools": TOOLS, "tool_choice": "required", "n": 2},
    {"messages": [HELLO], "thinking": True},
    {"messages": [HELLO], "chat_template_kwargs": {"thinking": False}, "temperature": 1},
    {"messages": [HELLO, PREFIX], "reasoning_effort": "high", "stream": True},
    {"messages": [HELLO, PREFIX | {"reasoning_content": "Hm"}], "logprobs": True},
    {"messages": [HELLO, PREFIX | {"content": "", "reasoning_content": "Hm"}]},
    {"messages": [HELLO], "verbosity": "low", "whatever": 1},
]
BAD: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]},
    {"messages": [HELLO, CALLS, {"role": "tool", "content": "x", "tool_call_id": "c"}]},
    {"messages": [PREFIX, HELLO]},
    {"messages": [HELLO], "tools": [{"type": "function", "function": {"strict": True}}]},
    {"messages": [HELLO], "tools": [TOOLS[0], TOOLS[0]]},
    {"messages": [HELLO], "tool_choice": "required"},
    {"messages": [HELLO], "temperature": 3},
    {"messages": [HELLO], "functions": [{"name": "f"}]},
    {"messages": [HELLO], "model": "other"},
]


@pytest.fixture(scope="module")
def switched(tokenizer: Tokenizer) -> Any:
    able = replace(tokenizer, chat_template=tokenizer.chat_template + SWITCH)
    engine = FakeEngine(able)
    with running(create_app(engine, make_model(able))) as live:
        yield live, engine


@pytest.mark.parametrize("body", GOOD)
def test_the_ids_are_those_that_the_engine_gets(
    switched: tuple[Live, FakeEngine], body: dict[str, Any]
) -> None:
    live, engine = switched
    chat = web.post(live.url + "/v1/chat/completions", json=body)
    assert chat.status_code == 200, chat.text
    told = web.post(live.url + "/tokenize", json={**body, "return_token_strs": True})
    assert told.status_code == 200, told.text
    assert told.json()["tokens"] == list(engine.requests[-1].prompt_ids)
    assert told.json()["count"] == len(told.json()["token_strs"])
    assert told.headers.get(IGNORED_HEADER) == chat.headers.get(IGNORED_HEADER)


@pytest.mark.parametrize("body", BAD)
def test_what_the_chat_route_refuses_is_refused_alike(live: Live, body: dict[str, Any]) -> None:
    chat = web.post(live.url + "/v1/chat/completions", json=body)
    told = web.post(live.url + "/tokenize", json=body)
    assert chat.status_code in (400, 404, 422)
    assert told.status_code == chat.status_code
    assert told.json() == chat.json()


def test_a_conversation_is_counted_also_where_it_does_not_fit(live: Live) -> None:
    messages = [{"role": "user", "content": "whale " * CONTEXT}]
    told = web.post(live.url + "/tokenize", json={"messages": messages}).json()
    assert told["count"] > told["max_model_len"] == CONTEXT


def test_a_conversation_may_end_where_no_answer_begins(live: Live, tokenizer: Tokenizer) -> None:
    body = {"messages": [HELLO], "add_generation_prompt": False}
    told = web.post(live.url + "/tokenize", json=body).json()
    assert told["tokens"] == tokenizer.encode_chat([HELLO], add_generation_prompt=False)
