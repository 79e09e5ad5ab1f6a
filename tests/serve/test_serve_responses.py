"""`/v1/responses`, driven by the official openai client.

Oracle: the fake engine's script; the client, which parses every reply and puts streams together;
and the chat route, whose prompts these must be.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import web
from fake_engine import DEFAULT, FakeEngine, logprob_of
from live import Live, running
from openai import APIStatusError, NotFoundError, OpenAI
from pydantic import BaseModel
from served import SCRIPT, TIME, WEATHER, make_model

from patience import HANG_SECONDS
from rorqual.serve.app import create_app
from rorqual.serve.notes import IGNORED_HEADER
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": CITY, "strict": False},
    {"type": "function", "name": "time", "parameters": None, "strict": None},
]
CHAT_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
QUESTIONS = ["hello", "call two", "say and call", "think first", "wide characters", "line ends"]
KEYS = ("first-key-0001", "second-key-0002")


def ask(client: OpenAI, given: Any, **fields: Any) -> Any:
    return client.responses.create(model="sei", input=given, **fields)


def plain(response: Any) -> dict[str, Any]:
    """A response but for what differs from one to the next."""
    body = json.loads(response.to_json() if hasattr(response, "to_json") else json.dumps(response))
    for name in ("id", "created_at", "completed_at"):
        body.pop(name, None)
    for item in body["output"]:
        item.pop("id")
        item.pop("call_id", None)
        item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    body["usage"].pop("input_tokens_details")  # the first of two is not in the cache yet
    return dict(body)


def test_a_whole_response(client: OpenAI, tokenizer: Tokenizer) -> None:
    response = ask(client, "hello")
    assert (response.object, response.status, response.model) == ("response", "completed", "sei")
    assert response.output_text == DEFAULT
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    usage = response.usage
    assert usage.input_tokens == len(ids)
    assert usage.output_tokens == len(tokenizer.encode(DEFAULT)) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    again = ask(client, "hello").usage
    assert again.input_tokens_details.cached_tokens > 0
    count = client.responses.input_tokens.count(model="sei", input="hello")
    assert count.input_tokens == usage.input_tokens


@pytest.mark.parametrize("max_tokens", [500, 16])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_comes_to_the_same_response(
    client: OpenAI, question: str, max_tokens: int
) -> None:
    """Its last event, what the client put together on the way, the whole reply, and the store."""
    fields: dict[str, Any] = {"tools": TOOLS, "max_output_tokens": max_tokens}
    whole = ask(client, question, **fields)
    with client.responses.stream(model="sei", input=question, **fields) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last: Any = events[-1]
    assert last.type == f"response.{whole.status}"
    assert plain(last.response) == plain(whole)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [each.to_dict() for each in done] == [each.to_dict() for each in raw(last)]
    stored = client.responses.retrieve(last.response.id)
    assert stored.to_dict() == {**last.response.to_dict(), "output": stored.to_dict()["output"]}
    assert plain(stored) == plain(whole)
    assert_deltas_come_to_the_items(events, done)


def raw(event: Any) -> list[Any]:
    return [type(item).construct(**plain_item(item)) for item in event.response.output]


def plain_item(item: Any) -> dict[str, Any]:
    body = item.to_dict()
    body.pop("parsed_arguments", None)
    for part in body.get("content") or []:
        part.pop("parsed", None)
    return dict(body)


def assert_deltas_come_to_the_items(events: list[Any], items: list[Any]) -> None:
    texts = [""] * len(items)
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta
            assert event.item_id == items[event.output_index].id
    for item, text in zip(items, texts, strict=True):
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_the_events_of_a_stream_in_their_order(client: OpenAI) -> None:
    kinds: dict[str, list[str]] = {}
    for question in ("think first", "say and call"):
        stream = ask(client, question, tools=TOOLS, stream=True)
        kinds[question] = list(
            dict.fromkeys((event.type, getattr(event, "output_index", None)) for event in stream)
        )
    begin, text = (
        ["created", "in_progress"],
        ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"],
    )
    thought = [
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    for question, first, second in (("think first", thought, text), ("say and call", text, call)):
        wanted: list[tuple[str, int | None]] = [(name, None) for name in begin]
        for index, names in enumerate((first, second)):
            wanted += [(name, index) for name in ("output_item.added", *names, "output_item.done")]
        wanted.append(("completed", None))
        assert kinds[question] == [(f"response.{name}", index) for name, index in wanted]


def test_reasoning_is_an_item_of_its_own(client: OpenAI, tokenizer: Tokenizer) -> None:
    response = ask(client, "think first", reasoning={"effort": "low", "summary": "auto"})
    thought, message = response.output
    assert (thought.type, thought.summary) == ("reasoning", [])
    assert thought.content[0].text == "The sea is deep."
    assert message.content[0].text == response.output_text == "It is deep."
    details = response.usage.output_tokens_details
    assert details.reasoning_tokens == len(tokenizer.encode("The sea is deep."))
    assert (response.reasoning.effort, response.reasoning.summary) == ("low", "auto")


def test_calls_are_items(client: OpenAI) -> None:
    response = ask(client, "call two", tools=TOOLS)
    calls = [(item.type, item.name, item.arguments, item.status) for item in response.output]
    assert calls == [
        ("function_call", "weather", '{"city": "Oslo"}', "completed"),
        ("function_call", "time", "{}", "completed"),
    ]
    assert len({item.call_id for item in response.output}) == 2
    assert [item.type for item in ask(client, "say and call", tools=TOOLS).output] == [
        "message",
        "function_call",
    ]
    one = ask(client, "call two", tools=TOOLS, parallel_tool_calls=False)
    assert [item.name for item in one.output] == ["weather"]
    assert one.parallel_tool_calls is False


def test_custom_tools_take_text(client: OpenAI, engine: FakeEngine) -> None:
    """Streamed or not, and on the way back. Oracle: the chat route's own custom tools."""
    shell: Any = {"type": "custom", "name": "shell", "description": "Runs it."}
    response = ask(client, "custom call", tools=[shell, TOOLS[0]])
    (call,) = response.output
    assert (call.type, call.name, call.input) == ("custom_tool_call", "shell", "ls -l")
    with client.responses.stream(model="sei", input="custom call", tools=[shell]) as stream:
        events = list(stream)
    deltas = [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == "ls -l"
    assert plain(events[-1].response)["output"] == plain(response)["output"]  # type: ignore[union-attr]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "a b"}
    ask(client, [output], previous_response_id=response.id, tools=[shell])
    custom = {"name": "shell", "input": "ls -l"}
    chat: list[Any] = [
        {"role": "user", "content": "custom call"},
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": custom}]},
        {"role": "tool", "tool_call_id": "a", "content": "a b"},
    ]
    tool: Any = {"type": "custom", "custom": {"name": "shell", "description": "Runs it."}}
    client.chat.completions.create(model="sei", messages=chat, tools=[tool])
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids
    form = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
    ask(
        client,
        "x",
        tools=[shell | {"format": form}],
        tool_choice={"type": "custom", "name": "shell"},
    )
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert "[a-z]+" in grammar.text


def test_only_the_allowed_tools(client: OpenAI, engine: FakeEngine) -> None:
    named: Any = [{"type": "function", "name": "time"}]
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": named}
    response = ask(client, "x", tools=TOOLS, tool_choice=choice)
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert "weather" not in grammar.text
    assert response.tool_choice.type == "allowed_tools"
    assert [tool.name for tool in response.tools] == ["weather", "time"]


def test_an_answer_that_is_cut_is_incomplete(client: OpenAI, tokenizer: Tokenizer) -> None:
    for question, max_tokens, kind in (
        ("count up", 3, "message"),
        ("long call", 0, "function_call"),
    ):
        length = len(tokenizer.encode(SCRIPT[question], allow_special=True))
        fields: Any = {"tools": TOOLS, "max_output_tokens": max_tokens or length - 8}
        response = ask(client, question, **fields)
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert (response.output[-1].type, response.output[-1].status) == (kind, "incomplete")
        assert client.responses.retrieve(response.id).status == "incomplete"


class Depth(BaseModel):
    depth: int


def test_forms_of_the_text_are_grammars(client: OpenAI, engine: FakeEngine) -> None:
    parsed = client.responses.parse(model="sei", input="whole json", text_format=Depth)
    assert parsed.output_parsed == Depth(depth=11)
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)["required"]) == ("json_schema", ["depth"])
    with client.responses.stream(model="sei", input="whole json", text_format=Depth) as stream:
        assert stream.get_final_response().output_parsed == Depth(depth=11)
    ask(client, "whole json", text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert engine.requests[-1].params.grammar.kind == "json_object"
    ask(client, "hello", text={"format": {"type": "text"}})
    assert engine.requests[-1].params.grammar is None
    ask(client, "hello", tools=TOOLS, tool_choice={"type": "function", "name": "time"})
    assert "weather" not in engine.requests[-1].params.grammar.text
    ask(client, "hello", tools=TOOLS, tool_choice="required")
    assert "weather" in engine.requests[-1].params.grammar.text


def test_fields_reach_the_engine_unchanged(client: OpenAI, engine: FakeEngine) -> None:
    response = ask(
        client,
        "hello",
        temperature=1.7,
        top_p=0.9,
        max_output_tokens=9,
        metadata={"a": "b"},
        user="somebody",
        service_tier="auto",
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        extra_body={"top_k": 4, "seed": 7, "stop": ["x"], "tools": []},
    )
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (1.7, 0.9, 9)
    assert (params.top_k, params.seed, params.stop) == (4, 7, ("x",))
    assert (response.temperature, response.top_p) == (1.7, 0.9)
    assert (response.metadata, response.user, response.max_output_tokens) == (
        {"a": "b"},
        "somebody",
        9,
    )
    ask(client, "hello")
    assert engine.requests[-1].params.temperature == 0.25


def test_logprobs(client: OpenAI, tokenizer: Tokenizer) -> None:
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    ids = tokenizer.encode(DEFAULT)
    part = ask(client, "hello", **fields).output[0].content[0]
    assert [entry.logprob for entry in part.logprobs] == [logprob_of(i, 0).logprob for i in ids]
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2] * len(ids)
    deltas = [e for e in ask(client, "hello", stream=True, **fields) if e.type.endswith(".delta")]
    streamed = [entry.logprob for event in deltas for entry in event.logprobs]
    assert streamed == [entry.logprob for entry in part.logprobs]
    thought = ask(client, "think first", **fields).output[1].content[0].logprobs
    assert "".join(entry.token for entry in thought) == "It is deep."


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_token_that_ends_within_a_character_has_its_logprob(
    client: OpenAI, tokenizer: Tokenizer, is_stream: bool
) -> None:
    """The answer's last: no text comes after it that would bring it along."""
    ids = tokenizer.encode(SCRIPT["wide characters"])
    fields: Any = {"include": ["message.output_text.logprobs"], "stream": is_stream}
    for number in range(1, len(ids)):
        reply = ask(client, "wide characters", max_output_tokens=number, **fields)
        if is_stream:
            deltas = [event for event in reply if event.type == "response.output_text.delta"]
            entries = [entry for event in deltas for entry in event.logprobs]
        else:
            entries = reply.output[0].content[0].logprobs
        assert [entry.logprob for entry in entries] == [
            logprob_of(i, 0).logprob for i in ids[:number]
        ]


ITEMS: list[Any] = [
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": [{"type": "input_text", "text": "Where"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
        {"type": "reasoning_text", "text": "Hm."}]},
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
        {"type": "output_text", "text": "Let me look.", "annotations": []}]},
    {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Oslo"}'},
    {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}", "id": "fc_1"},
    {"type": "function_call_output", "call_id": "b", "output": "noon"},
    {"type": "function_call_output", "call_id": "a", "output": [
        {"type": "input_text", "text": "rain"}]},
    {"role": "user", "content": "And now?"},
]  # fmt: skip


def test_the_prompt_is_the_chat_routes(client: OpenAI, engine: FakeEngine) -> None:
    """Every kind of item, against the same conversation in the older shape."""
    ask(client, ITEMS, instructions="Be brief.", tools=TOOLS)
    calls = [{"id": "a", **WEATHER}, {"id": "b", **TIME}]
    said = {"content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": calls}
    chat: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where"},
        {"role": "assistant", **said},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
        {"role": "user", "content": "And now?"},
    ]
    client.chat.completions.create(model="sei", messages=chat, tools=CHAT_TOOLS)
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids


def test_a_conversation_that_the_server_keeps(client: OpenAI, engine: FakeEngine) -> None:
    """Turn by turn, with calls and reasoning: the prompts of the same items sent whole."""
    first = ask(client, "say and call", instructions="Be brief.", tools=TOOLS)
    call = first.output[1]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = ask(client, [output], previous_response_id=first.id, tools=TOOLS)
    assert second.previous_response_id == first.id
    history: list[Any] = [
        {"role": "user", "content": "say and call"},
        *(item.to_dict() for item in first.output),
        output,
    ]
    ask(client, history, tools=TOOLS, store=False)
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids
    third = ask(client, "think first", previous_response_id=second.id)
    ask(
        client,
        [
            *history,
            *(item.to_dict() for item in second.output),
            {"role": "user", "content": "think first"},
        ],
    )
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids
    assert ask(client, [], previous_response_id=third.id).previous_response_id == third.id


def test_references_to_items_that_are_stored(client: OpenAI, engine: FakeEngine) -> None:
    first = ask(client, "think first")
    (given,) = client.responses.input_items.list(first.id).data
    items: list[Any] = [
        {"type": "item_reference", "id": given.id},
        *({"id": item.id} for item in first.output),
        {"role": "user", "content": "Well?"},
    ]
    ask(client, items)
    ask(client, "Well?", previous_response_id=first.id)
    assert engine.requests[-2].prompt_ids == engine.requests[-1].prompt_ids
    for wrong in ("msg_1", first.output[0].id + "9", first.id):
        with pytest.raises(NotFoundError, match="no stored item") as caught:
            ask(client, [{"type": "item_reference", "id": wrong}])
        assert (caught.value.code, caught.value.param) == ("item_not_found", "input[0].id")


def test_what_is_stored(client: OpenAI, live: Live) -> None:
    response = ask(client, ITEMS, tools=TOOLS)
    assert plain(client.responses.retrieve(response.id)) == plain(response)
    ascending = list(client.responses.input_items.list(response.id, order="asc", limit=2))
    assert len(ascending) == len(ITEMS)
    assert [item.type for item in ascending] == [item.get("type", "message") for item in ITEMS]
    descending = list(client.responses.input_items.list(response.id))
    assert [item.id for item in descending] == [item.id for item in ascending][::-1]
    assert len({item.id for item in ascending}) == len(ITEMS)
    client.responses.delete(response.id)
    for gone in (response.id, "resp_0", ask(client, "hello", store=False).id):
        with pytest.raises(NotFoundError) as caught:
            client.responses.retrieve(gone)
        assert caught.value.code == "response_not_found"
        with pytest.raises(APIStatusError) as lost:
            ask(client, "x", previous_response_id=gone)
        assert lost.value.code == "previous_response_not_found"
        assert lost.value.param == "previous_response_id"
    assert web.get(f"{live.url}/responses/{ask(client, 'hello').id}").status_code == 200


def test_a_key_sees_its_own(tokenizer: Tokenizer) -> None:
    engine, settings = FakeEngine(tokenizer, SCRIPT), ServerSettings(api_keys=KEYS)
    with running(create_app(engine, make_model(tokenizer), settings)) as live:
        one, other = (
            OpenAI(base_url=live.url + "/v1", api_key=key, timeout=HANG_SECONDS) for key in KEYS
        )
        response = ask(one, "hello")
        assert one.responses.retrieve(response.id).id == response.id
        for call in (
            lambda: other.responses.retrieve(response.id),
            lambda: other.responses.delete(response.id),
            lambda: other.responses.input_items.list(response.id),
            lambda: ask(other, [{"id": response.output[0].id}]),
            lambda: ask(other, "x", previous_response_id=response.id),
        ):
            with pytest.raises(APIStatusError, match=r"there is no|not found"):
                call()
        assert ask(one, "x", previous_response_id=response.id).status == "completed"


def test_old_turns_make_room(
    client: OpenAI,
    live: Live,
    engine: FakeEngine,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As few as are in the way; instructions stay, and so do turns when nothing helps. All that is
    tried counts as the client's own work.
    """
    service = live.app.state.service
    aside, callers = service.aside, []

    async def noted(work: Any, param: str, caller: Any, num_chars: int) -> Any:
        callers.append(caller.owner)
        return await aside(work, param, caller, num_chars)

    monkeypatch.setattr(service, "aside", noted)
    turns = [{"role": "user", "content": f"turn {number} " + "x" * 400} for number in range(8)]
    fields: Any = {"instructions": "Be brief.", "max_output_tokens": 20}
    with pytest.raises(APIStatusError) as caught:
        ask(client, turns, **fields)
    assert caught.value.code == "context_length_exceeded"
    assert ask(client, turns, truncation="auto", **fields).truncation == "auto"
    prompt = tokenizer.decode(engine.requests[-1].prompt_ids)
    kept = [number for number in range(8) if f"turn {number} " in prompt]
    assert kept == [4, 5, 6, 7]
    assert "Be brief." in prompt
    assert len(engine.requests[-1].prompt_ids) + 20 <= 2000
    with pytest.raises(APIStatusError, match="does not fit"):
        ask(client, "x" * 3000, truncation="auto")
    assert len(callers) > 3
    assert set(callers) == {"address 127.0.0.1"}


IMAGE = {"type": "input_image", "image_url": "https://x"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "'input_image'"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "type 'web_search_call'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing field"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "input[0].role"),
    ({"input": [{"role": "user", "content": "x"}, OUTPUT]}, "input[1].call_id", "no call"),
    ({"input": None}, "input", "missing field 'input'"),
    ({"input": "x" * 3000}, "input", "found 3003 tokens"),
    ({"temperature": 3}, "temperature", "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs", "top_logprobs"),
    ({"stop": [""]}, "stop[0]", "stop[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "tools of type 'web_search'"),
    ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name", "tools[0].name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two tools are named 'weather'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search_preview"}}, "tool_choice", "web_search"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"background": True}, "background", "background is not supported"),
    ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
    ({"prompt": {"id": "x"}}, "prompt", "prompt is not supported"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), FAULTS)
def test_what_is_at_fault_is_told_by_its_place(
    live: Live, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "sei", "input": "hello"} | fields
    response = web.post(live.url + "/v1/responses", json=body)
    assert response.status_code in (400, 422)
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_what_has_no_effect_is_named(live: Live) -> None:
    body: dict[str, Any] = {
        "input": [{"role": "user", "content": "x", "weight": 1}],
        "reasoning": {"effort": "high"},
        "sprockets": 2,
        "service_tier": "flex",
    }
    for is_stream in (False, True):
        response = web.post(live.url + "/v1/responses", json=body | {"stream": is_stream})
        assert response.status_code == 200
        names = set(response.headers[IGNORED_HEADER].split(", "))
        assert names == {"sprockets", "input.weight", "reasoning.effort"}


def test_a_stored_response_is_not_streamed_again(client: OpenAI, live: Live) -> None:
    url = f"{live.url}/v1/responses/{ask(client, 'hello').id}"
    assert web.get(url, params={"stream": "true"}).json()["error"]["param"] == "stream"
    assert web.get(url + "/input_items", params={"after": "x"}).status_code == 404
