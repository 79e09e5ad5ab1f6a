"""The chat route, driven by the official openai client.

Oracle: the fake engine's script, and the client's own schemas (it parses every reply).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import web
from fake_engine import DEFAULT, FakeEngine, logprob_of
from live import Live
from openai import OpenAI
from served import TIME, WEATHER

from rorqual.serve.errors import ApiError
from rorqual.serve.prompts import chat_messages
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALL_END, TOOL_CALLS_END
from tool_call_texts import render_tool_calls

pytestmark = pytest.mark.concurrency

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time", "description": "The time."}},
]


def ask(client: OpenAI, text: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="sei", messages=messages, **fields)


def fold(stream: Any) -> dict[str, Any]:
    """What a client has when it has put all chunks of choice 0 together."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            whole["content"] += delta.content or ""
            whole["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                known = whole["calls"].setdefault(call.index, {"name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
                known["id"] = call.id or known["id"]
            whole["finish"] = choice.finish_reason or whole["finish"]
    return whole


def test_a_whole_reply(client: OpenAI, tokenizer: Tokenizer) -> None:
    reply = ask(client, "hello")
    assert reply.object == "chat.completion"
    assert reply.model == "sei"
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", DEFAULT)
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert reply.usage.completion_tokens == len(tokenizer.encode(DEFAULT)) + 1
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_has_the_same_text_and_ends_with_usage(client: OpenAI) -> None:
    chunks = list(ask(client, "hello", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert fold(chunks) == {"content": DEFAULT, "reasoning": "", "calls": {}, "finish": "stop"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_options_has_no_usage_chunk(client: OpenAI) -> None:
    chunks = list(ask(client, "hello", stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_half_characters_never_show(client: OpenAI) -> None:
    deltas = [c.choices[0].delta.content or "" for c in ask(client, "wide characters", stream=True)]
    assert "".join(deltas) == "Whales: 鯨 🐋 ñ."
    assert not any("\ufffd" in delta for delta in deltas)


def test_the_second_turn_hits_the_cache(client: OpenAI) -> None:
    first = ask(client, "a question of some length about whales").usage
    second = ask(client, "a question of some length about whales").usage
    extra = second.model_extra
    assert first.prompt_tokens == second.prompt_tokens
    assert extra["prompt_cache_hit_tokens"] > 0
    hits, misses = extra["prompt_cache_hit_tokens"], extra["prompt_cache_miss_tokens"]
    assert hits + misses == second.prompt_tokens
    assert second.prompt_tokens_details.cached_tokens == hits


def test_usage_tells_what_speculation_did(client: OpenAI) -> None:
    details = ask(client, "hello").usage.completion_tokens_details
    assert details.accepted_prediction_tokens == 14  # 8 at the first position, 6 at the second
    assert details.rejected_prediction_tokens == 6
    assert details.model_extra["acceptance_by_position"] == [0.8, 0.6]


def test_several_choices_count_the_prompt_once(client: OpenAI, engine: FakeEngine) -> None:
    num_before = len(engine.requests)
    reply = ask(client, "hello", n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == [DEFAULT] * 3
    assert [request.params.seed for request in engine.requests[num_before:]] == [7, 8, 9]
    alone = ask(client, "hello").usage
    assert reply.usage.prompt_tokens == alone.prompt_tokens
    assert reply.usage.completion_tokens == 3 * alone.completion_tokens


def test_fields_reach_the_engine_unchanged(client: OpenAI, engine: FakeEngine) -> None:
    ask(
        client,
        "hello",
        temperature=1.7,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": -100, "6": 3.5},
        seed=-1,
        stop=["x", "yy"],
        max_completion_tokens=9,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2},
    )
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.7, 0.9, 4, 0.1)
    assert (params.frequency_penalty, params.presence_penalty) == (0.5, -0.5)
    assert params.repetition_penalty == 1.2
    assert dict(params.logit_bias or {}) == {5: -100, 6: 3.5}
    assert params.seed == 2**63 - 1
    assert params.stop == ("x", "yy")
    assert params.max_tokens == 9


def test_what_is_left_out_is_the_models_advice(client: OpenAI, engine: FakeEngine) -> None:
    ask(client, "hello")
    params = engine.requests[-1].params
    assert (params.temperature, params.max_tokens, params.seed) == (0.25, 4096, None)


def test_stop_and_length(client: OpenAI) -> None:
    stopped = ask(client, "count up", stop=" 7").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("0 1 2 3 4 5 6", "stop")
    cut = ask(client, "count up", max_tokens=3).choices[0]
    assert cut.finish_reason == "length"


@pytest.mark.parametrize("question", ["call two", "say and call"])
def test_tool_calls_are_the_same_streamed_or_not(client: OpenAI, question: str) -> None:
    whole = ask(client, question, tools=TOOLS).choices[0]
    streamed = fold(ask(client, question, tools=TOOLS, stream=True))
    assert whole.finish_reason == streamed["finish"] == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    expected = [WEATHER, TIME] if question == "call two" else [WEATHER]
    assert calls == [(c["function"]["name"], c["function"]["arguments"]) for c in expected]
    assert calls == [(c["name"], c["arguments"]) for c in streamed["calls"].values()]
    assert (whole.message.content or "") == streamed["content"]
    assert len({call.id for call in whole.message.tool_calls}) == len(calls)
    assert all(call["id"] for call in streamed["calls"].values())


@pytest.mark.parametrize("question", ["call two", "say and call"])
def test_without_parallel_calls_the_first_one_ends_the_answer(
    client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer, question: str
) -> None:
    one: Any = {"tools": TOOLS, "parallel_tool_calls": False}
    whole = ask(client, question, **one)
    streamed = fold(ask(client, question, **one, stream=True))
    choice = whole.choices[0]
    assert choice.finish_reason == streamed["finish"] == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("weather", '{"city": "Oslo"}')]
    assert calls == [(c["name"], c["arguments"]) for c in streamed["calls"].values()]
    assert (choice.message.content or "") == streamed["content"]
    assert TOOL_CALL_END not in (choice.message.content or "")
    said = "Let me look." if question == "say and call" else ""
    first = said + render_tool_calls([WEATHER]).removesuffix(TOOL_CALLS_END)
    assert whole.usage.completion_tokens == len(tokenizer.encode(first, allow_special=True))
    many = ask(client, question, tools=TOOLS, parallel_tool_calls=True).choices[0]
    assert len(many.message.tool_calls) == (2 if question == "call two" else 1)
    assert ask(client, "hello", **one).choices[0].finish_reason == "stop"


def test_a_call_that_is_cut_off_is_no_tool_call(client: OpenAI) -> None:
    whole = ask(client, "say and call", tools=TOOLS, max_tokens=16).choices[0]
    streamed = fold(ask(client, "say and call", tools=TOOLS, max_tokens=16, stream=True))
    assert whole.finish_reason == streamed["finish"] == "length"
    assert (whole.message.content or "") == streamed["content"]


def test_without_tools_nothing_is_parsed_as_a_call(client: OpenAI) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = ask(client, "say and call", **fields).choices[0]
        assert choice.finish_reason == "stop"
        assert "weather" in choice.message.content


def test_a_forced_call_is_a_grammar(client: OpenAI, engine: FakeEngine) -> None:
    ask(client, "call two", tools=TOOLS, tool_choice="required")
    both = engine.requests[-1].params.grammar
    ask(client, "x", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "time"}})
    named = engine.requests[-1].params.grammar
    assert both is not None
    assert named is not None
    assert both.kind == named.kind == "grammar"
    assert "weather" in both.text
    assert "weather" not in named.text
    ask(client, "x", tools=TOOLS)
    assert engine.requests[-1].params.grammar is None


def test_tools_and_outputs_are_shown_in_the_order_of_the_calls(
    client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    calls: Any = [{"id": "a", **WEATHER}, {"id": "b", **TIME}]
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where"}, text_part(" and when?")]},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    client.chat.completions.create(model="minke", messages=messages, tools=TOOLS)
    plain: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where and when?"},
        {"role": "assistant", "content": None, "tool_calls": [WEATHER, TIME]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "noon"},
    ]
    assert engine.requests[-1].prompt_ids == tokenizer.encode_chat(plain, TOOLS)


USER, SYSTEM = {"role": "user", "content": "x"}, {"role": "system", "content": "Be brief."}
CALLING = {"role": "assistant", "tool_calls": [{"id": "a", **WEATHER}, {"id": "b", **TIME}]}
RAIN = {"role": "tool", "tool_call_id": "a", "content": "rain"}
NOON = {"role": "tool", "tool_call_id": "b", "content": "noon"}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_between_outputs_changes_nothing_of_them(role: str) -> None:
    """The prompt has no ids of calls: the first output is the first call's."""
    system = SYSTEM | {"role": role}

    def shown(*outputs: Any) -> list[str]:
        body = ChatRequest.model_validate({"messages": [USER, CALLING, *outputs]})
        return [message["content"] for message in chat_messages(body)[2:]]

    assert shown(NOON, system, RAIN) == ["rain", "Be brief.", "noon"]
    assert shown(system, NOON, RAIN, system) == ["Be brief.", "rain", "noon", "Be brief."]
    assert shown(system, NOON) == ["Be brief.", "noon"]
    assert shown(NOON, RAIN, USER, CALLING, RAIN)[:3] == ["rain", "noon", "x"]
    for outputs, words in (
        ((RAIN, system, RAIN), r"messages\[4\].*has its output already"),
        ((RAIN, USER, NOON), r"messages\[4\].*no call of the assistant message before it"),
        ((RAIN, {"role": "assistant", "content": "x"}, NOON), r"messages\[4\].*no call"),
    ):
        with pytest.raises(ApiError, match=words):
            shown(*outputs)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_reasoning_is_a_field_of_its_own(client: OpenAI, tokenizer: Tokenizer) -> None:
    reply = ask(client, "think first")
    message = reply.choices[0].message
    assert message.content == "It is deep."
    assert message.model_extra["reasoning_content"] == "The sea is deep."
    streamed = fold(ask(client, "think first", stream=True))
    assert (streamed["reasoning"], streamed["content"]) == ("The sea is deep.", "It is deep.")
    num_reasoning = len(tokenizer.encode("The sea is deep."))
    assert reply.usage.completion_tokens_details.reasoning_tokens == num_reasoning


def test_a_prefix_is_continued(
    client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer, live: Live
) -> None:
    messages: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "The wh", "prefix": True},
    ]
    beta = OpenAI(base_url=live.url + "/beta", api_key="none")
    assert beta.chat.completions.create(model="sei", messages=messages).choices
    ids = engine.requests[-1].prompt_ids
    assert ids == tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids).endswith("The wh")
    messages[1] = {"role": "assistant", "content": "", "prefix": True, "reasoning_content": "Hm"}
    client.chat.completions.create(model="sei", messages=messages)
    assert tokenizer.decode(engine.requests[-1].prompt_ids).endswith("<think>Hm")


def test_logprobs(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(DEFAULT)
    whole = ask(client, "hello", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [tuple(item.bytes) for item in whole] == [tuple(tokenizer.bytes_of(i)) for i in ids]
    assert [item.logprob for item in whole] == [logprob_of(i, 0).logprob for i in ids]
    assert [len(item.top_logprobs) for item in whole] == [2] * len(ids)
    streamed = []
    for chunk in ask(client, "hello", logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole


def test_json_formats_are_grammars(client: OpenAI, engine: FakeEngine) -> None:
    reply = ask(client, "whole json", response_format={"type": "json_object"})
    assert json.loads(reply.choices[0].message.content) == {"depth": 11}
    assert engine.requests[-1].params.grammar.kind == "json_object"
    named = {"name": "city", "schema": CITY, "strict": True}
    ask(client, "whole json", response_format={"type": "json_schema", "json_schema": named})
    grammar = engine.requests[-1].params.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", CITY)
    ask(client, "whole json", response_format={"type": "text"})
    assert engine.requests[-1].params.grammar is None
    extensions: Any = {"type": "choice", "choices": ["yes", "no"]}
    ask(client, "whole json", response_format=extensions)
    assert engine.requests[-1].params.grammar.kind == "choice"


@pytest.mark.parametrize("path", ["/chat/completions", "/beta/chat/completions"])
def test_deepseeks_base_paths(live: Live, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    reply = web.post(live.url + path, json=body).json()
    assert reply["choices"][0]["message"]["content"] == DEFAULT


def test_line_ends_of_unicode_break_no_event(live: Live) -> None:
    messages = [{"role": "user", "content": "line ends"}]
    body = {"messages": messages, "stream": True}
    text = ""
    with web.stream("POST", live.url + "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():  # these split by Python's rules
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                text += delta.get("content", "")
    assert text == "one\u2028two\u0085three"


def test_events_are_framed_as_the_standard_says(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    response = web.post(live.url + "/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


def test_usage_as_it_goes(live: Live, client: OpenAI) -> None:
    """vLLM's `continuous_usage_stats`: each chunk says what there is so far, the last one all."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, "count up", stream=True, stream_options=options, max_tokens=20))
    usages = [chunk.usage for chunk in chunks]
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == 20
    assert len({usage.prompt_tokens for usage in usages}) == 1
    assert all(usage.total_tokens == usage.prompt_tokens + count
               for usage, count in zip(usages, counts, strict=True))  # fmt: skip
    body = {"prompt": "count up", "stream": True, "stream_options": options, "max_tokens": 20}
    text = web.post(live.url + "/v1/completions", json=body).text
    lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [line["usage"]["completion_tokens"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert len({line["usage"]["prompt_tokens"] for line in lines}) == 1
