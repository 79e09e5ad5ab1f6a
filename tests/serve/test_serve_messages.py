"""Anthropic's API, driven by the official anthropic client.

Oracle: the fake engine's script; the client, which parses every reply and puts streams together;
and the chat route, whose prompts these must be.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import web
from fake_engine import DEFAULT, FakeEngine
from live import Live
from openai import OpenAI
from served import LONG, SCRIPT, TIME, WEATHER

from patience import HANG_SECONDS
from rorqual.tokenizer import Tokenizer

anthropic = pytest.importorskip("anthropic", reason="the anthropic client is missing")

pytestmark = pytest.mark.concurrency

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"name": "weather", "description": "The weather.", "input_schema": CITY},
    {"name": "time", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
]
CHAT_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather.", "parameters": CITY},
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}},
]
QUESTIONS = ["hello", "call two", "say and call", "think first", "wide characters", "line ends"]


@pytest.fixture(scope="module")
def claude(live: Live) -> Any:
    return anthropic.Anthropic(
        base_url=live.url, api_key="none", max_retries=0, timeout=HANG_SECONDS
    )


def asked(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "sei", "max_tokens": 500, "messages": messages, **fields}


def plain(message: Any) -> dict[str, Any]:
    """A message but for what differs from one answer to the next."""
    body = message.to_dict()
    del body["id"]
    for block in body["content"]:
        block.pop("id", None)
    # The first of two equal prompts is not in the cache yet.
    usage = body["usage"]
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    return dict(body)


def test_a_whole_message(claude: Any, tokenizer: Tokenizer) -> None:
    message = claude.messages.create(**asked("hello"))
    assert (message.type, message.role, message.model) == ("message", "assistant", "sei")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": DEFAULT}]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len(tokenizer.encode(DEFAULT)) + 1
    assert message._request_id.startswith("req_")


@pytest.mark.parametrize("max_tokens", [500, 16])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_comes_to_the_same_message(claude: Any, question: str, max_tokens: int) -> None:
    fields = asked(question, tools=TOOLS) | {"max_tokens": max_tokens}
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    assert plain(streamed) == plain(whole)
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")


def test_the_events_of_a_stream_in_their_order(claude: Any) -> None:
    stream = claude.messages.create(**asked("think first", stream=True))
    events = [(event.type, getattr(event, "index", None)) for event in stream]
    seen = list(dict.fromkeys(events))
    assert seen == [
        ("message_start", None),
        *((f"content_block_{kind}", 0) for kind in ("start", "delta", "stop")),
        *((f"content_block_{kind}", 1) for kind in ("start", "delta", "stop")),
        ("message_delta", None),
        ("message_stop", None),
    ]


def test_thinking_is_a_block_of_its_own(claude: Any, tokenizer: Tokenizer) -> None:
    message = claude.messages.create(**asked("think first"))
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "The sea is deep.")
    assert thinking.signature
    assert (text.type, text.text) == ("text", "It is deep.")
    details = message.usage.output_tokens_details
    assert details.thinking_tokens == len(tokenizer.encode("The sea is deep."))
    omitted: Any = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    silent = claude.messages.create(**asked("think first", thinking=omitted))
    assert [getattr(block, "thinking", None) for block in silent.content] == ["", None]
    with claude.messages.stream(**asked("think first", thinking=omitted)) as stream:
        assert plain(stream.get_final_message()) == plain(silent)


def test_calls_are_blocks_whose_input_is_an_object(claude: Any) -> None:
    two = claude.messages.create(**asked("call two", tools=TOOLS))
    assert two.stop_reason == "tool_use"
    calls = [(block.type, block.name, block.input) for block in two.content]
    assert calls == [("tool_use", "weather", {"city": "Oslo"}), ("tool_use", "time", {})]
    assert len({block.id for block in two.content}) == 2
    said = claude.messages.create(**asked("say and call", tools=TOOLS))
    assert [block.type for block in said.content] == ["text", "tool_use"]
    one = {"type": "auto", "disable_parallel_tool_use": True}
    first = claude.messages.create(**asked("call two", tools=TOOLS, tool_choice=one))
    assert ([block.name for block in first.content], first.stop_reason) == (["weather"], "tool_use")


@pytest.mark.parametrize("is_bound", [False, True], ids=["free", "bound"])
def test_a_call_that_is_cut_off_loses_nothing_that_was_written(
    claude: Any, engine: FakeEngine, tokenizer: Tokenizer, is_bound: bool
) -> None:
    """However far it came. Oracle: the arguments' text, cut at the same token."""
    choice = {"tool_choice": {"type": "any"}} if is_bound else {}
    length = len(tokenizer.encode(SCRIPT["long call"], allow_special=True))
    arguments = LONG["function"]["arguments"]
    texts = []
    for max_tokens in range(1, length, 3):
        fields = asked("long call", tools=TOOLS, **choice) | {"max_tokens": max_tokens}
        whole = claude.messages.create(**fields)
        with claude.messages.stream(**fields) as stream:
            events = list(stream)
            last = stream.get_final_message()
        assert whole.stop_reason == "max_tokens"
        inputs = [block.input for block in whole.content if block.type == "tool_use"]
        if not is_bound:
            assert plain(last) == plain(whole)
        if inputs and inputs != [json.loads(arguments)]:
            told = "".join(event.partial_json for event in events if event.type == "input_json")
            text = inputs[0].get("INVALID_JSON", "")
            assert told == (text if is_bound else json.dumps(inputs[0]) if text else "")
            texts.append(text)
    assert '{"city"' in " ".join(texts)
    assert all(arguments.startswith(text) for text in texts)
    assert sorted(texts, key=len) == texts
    assert len(set(texts)) > 3
    assert (engine.requests[-1].params.grammar is not None) == is_bound


def test_arguments_that_are_no_json_come_as_anthropic_has_them(claude: Any) -> None:
    for question, text in (("bad call", "{city: Oslo}"), ("list call", "[1]")):
        whole = claude.messages.create(**asked(question, tools=TOOLS))
        assert whole.content[0].input == {"INVALID_JSON": text}
        with claude.messages.stream(**asked(question, tools=TOOLS)) as stream:
            assert plain(stream.get_final_message()) == plain(whole)


def test_which_stop_sequence_ended_it(claude: Any) -> None:
    stops = [" 9", " 7"]
    message = claude.messages.create(**asked("count up", stop_sequences=stops))
    assert message.content[0].text == "0 1 2 3 4 5 6"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " 7")
    with claude.messages.stream(**asked("count up", stop_sequences=stops)) as stream:
        assert plain(stream.get_final_message()) == plain(message)
    cut = claude.messages.create(**asked("count up") | {"max_tokens": 3})
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)
    none = claude.messages.create(**asked("hello", stop_sequences=stops))
    assert (none.stop_reason, none.stop_sequence) == ("end_turn", None)


def test_a_context_that_is_full_is_told_apart(
    claude: Any, live: Live, tokenizer: Tokenizer
) -> None:
    model = live.app.state.service.model
    prompt = asked("count up")
    count = claude.messages.count_tokens(model="sei", messages=prompt["messages"]).input_tokens
    room = model.max_positions - count
    full = claude.messages.create(**prompt | {"max_tokens": 10**6})
    assert full.stop_reason == "end_turn"  # the script ends before the context does
    assert room > full.usage.output_tokens


def test_fields_reach_the_engine_unchanged(claude: Any, engine: FakeEngine) -> None:
    fields = asked(
        "hello",
        extra_body={"temperature": 0.75, "top_p": 0.9, "top_k": 4},
        stop_sequences=["x", "yy"],
        metadata={"user_id": "somebody"},
        service_tier="auto",
        thinking={"type": "adaptive"},
        cache_control={"type": "ephemeral"},
    )
    claude.messages.create(**fields | {"max_tokens": 9})
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.75, 0.9, 4)
    assert (params.stop, params.max_tokens) == (("x", "yy"), 9)
    claude.messages.create(**asked("hello", stop_sequences=[], extra_body={"top_k": 0}))
    params = engine.requests[-1].params
    assert (params.temperature, params.top_k, params.stop) == (0.25, None, ())


@pytest.mark.parametrize("is_stream", [False, True])
def test_fields_without_effect_are_named(live: Live, is_stream: bool) -> None:
    tools = [TOOLS[0] | {"input_schema": CITY | {"minContains": 1}, "strict": False}]
    body = asked("hello", tools=tools, tool_choice={"type": "any"}, stream=is_stream, colour="red")
    reply = web.post(live.url + "/v1/messages", json=body)
    assert reply.status_code == 200
    names = reply.headers["x-rorqual-ignored-fields"].split(", ")
    assert sorted(names) == ["colour", "tools.input_schema.minContains"]
    form = {"type": "json_schema", "schema": CITY | {"minContains": 1}}
    body = asked("hello", output_config={"format": form}, stream=is_stream)
    reply = web.post(live.url + "/v1/messages", json=body)
    assert reply.status_code == 200
    assert reply.headers["x-rorqual-ignored-fields"] == "output_config.format.schema.minContains"


def test_the_prompt_is_the_chat_routes(
    claude: Any, client: OpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    """Every kind of block, against the same conversation in OpenAI's shape."""
    mark = {"cache_control": {"type": "ephemeral"}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Where", **mark}]},
        {"role": "user", "content": "and when?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "b", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": "noon", "is_error": False},
                {
                    "type": "tool_result",
                    "tool_use_id": "a",
                    "content": [{"type": "text", "text": "ra"}, {"type": "text", "text": "in"}],
                    **mark,
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be brief.", **mark}, {"type": "text", "text": "Be kind."}]
    fields: Any = {"model": "sei", "messages": messages, "system": system, "tools": TOOLS}
    claude.messages.create(**fields, max_tokens=9)
    calls = [{"id": "a", **WEATHER}, {"id": "b", **TIME}]
    said = {"content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": calls}
    chat: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where\n\nand when?"},
        {"role": "assistant", **said},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "user", "content": "And now?"},
    ]
    client.chat.completions.create(model="sei", messages=chat, tools=CHAT_TOOLS)
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids
    count = claude.messages.count_tokens(**fields).input_tokens
    assert count == len(engine.requests[-1].prompt_ids)
    claude.messages.create(**fields | {"system": "Be brief.\n\nBe kind."}, max_tokens=9)
    assert engine.requests[-1].prompt_ids == engine.requests[-2].prompt_ids


def test_a_message_without_blocks_is_an_empty_text(claude: Any, engine: FakeEngine) -> None:
    for content in ("", []):
        message: Any = {"role": "user", "content": content}
        claude.messages.create(model="sei", max_tokens=9, messages=[message])
    assert engine.requests[-1].prompt_ids == engine.requests[-2].prompt_ids


def test_a_count_is_what_a_message_then_uses(claude: Any) -> None:
    """All of it: what came from the cache too."""
    question = asked("a question of some length about whales and counts", tools=TOOLS)
    count = claude.messages.count_tokens(**{k: question[k] for k in ("model", "messages", "tools")})
    first, second = (claude.messages.create(**question).usage for _ in range(2))
    assert first.input_tokens + first.cache_read_input_tokens == count.input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == count.input_tokens
    assert second.cache_read_input_tokens > first.cache_read_input_tokens
    assert second.cache_creation_input_tokens == 0


def test_a_last_message_of_the_assistant_is_continued(
    claude: Any, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    messages: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "The wh"}]},
    ]
    claude.messages.create(model="sei", max_tokens=9, messages=messages)
    assert tokenizer.decode(engine.requests[-1].prompt_ids).endswith("The wh")


@pytest.mark.parametrize(
    ("choice", "kind"),
    [("auto", None), ("none", None), ("any", "grammar"), ("tool", "grammar")],
)
def test_choices_of_a_tool(claude: Any, engine: FakeEngine, choice: str, kind: str | None) -> None:
    tool_choice = {"type": choice} | ({"name": "time"} if choice == "tool" else {})
    message = claude.messages.create(**asked("call two", tools=TOOLS, tool_choice=tool_choice))
    grammar = engine.requests[-1].params.grammar
    assert (grammar.kind if grammar else None) == kind
    if choice == "tool":
        assert "weather" not in grammar.text
    assert (message.stop_reason == "tool_use") == (choice != "none")


def test_a_form_of_the_output_is_a_grammar(claude: Any, engine: FakeEngine) -> None:
    form = {"type": "json_schema", "schema": CITY}
    for fields in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
        message = claude.messages.create(**asked("whole json", **fields))
        assert json.loads(message.content[0].text) == {"depth": 11}
        grammar = engine.requests[-1].params.grammar
        assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", CITY)


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://x"}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
PICTURE = RESULT | {"content": [IMAGE]}
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "content[0]: blocks of type 'image'"),
    ({"messages": [{"role": "user", "content": [PICTURE]}]}, "content[0]: blocks of type 'image'"),
    ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages[0].content[0]: a block"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "[0].content[0].text'"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
    ({"messages": []}, "messages"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_p": 7}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "type 'web_search_2025"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "two tools are named 'weather'"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice names 'x'"),
    ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice of type 'tool'"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, "found 3003 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), FAULTS)
def test_what_is_at_fault_is_told_by_its_place(
    claude: Any, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**asked("hello"), extra_body=fields)
    error = caught.value
    assert words in error.api_message
    assert (error.type, error.body["type"]) == ("invalid_request_error", "error")
    assert error.request_id == error.body["request_id"]


def test_other_faults_have_anthropics_shape_too(claude: Any, live: Live) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**asked("hello") | {"model": "claude"})
    assert caught.value.type == "not_found_error"
    url = live.url + "/v1/messages"
    for response, status, kind in (
        (web.get(url), 405, "invalid_request_error"),
        (web.post(url, content=b"{"), 400, "invalid_request_error"),
        (web.post(url, content=b"x" * (5 << 20)), 413, "request_too_large"),
        (web.post(url + "/batches", json={}), 404, "not_found_error"),
    ):
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
        assert response.json()["request_id"] == response.headers["request-id"]


def test_models_are_listed_for_its_client_too(claude: Any, live: Live) -> None:
    cards = list(claude.models.list())
    assert [(card.id, card.type) for card in cards] == [("sei", "model"), ("minke", "model")]
    card = claude.models.retrieve("minke")
    assert card.created_at.timestamp() == live.app.state.service.model.created
    assert card.max_input_tokens == live.app.state.service.model.max_positions


def test_deepseeks_base_address(live: Live) -> None:
    claude = anthropic.Anthropic(base_url=live.url + "/anthropic", api_key="none")
    assert claude.messages.create(**asked("hello")).content[0].text == DEFAULT
    messages = asked("hello")["messages"]
    assert claude.messages.count_tokens(model="sei", messages=messages).input_tokens > 0
    assert claude.beta.messages.create(**asked("hello")).content[0].text == DEFAULT
