"""Every route, plain, with a schema and with a forced tool, whole and streamed, at 8,192 positions.

The shipped weights with a prompt of more than 2,000 tokens. Oracle: the chat route, which says the
same to everybody; a validator of JSON schemas; and the streamed reply against the whole one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import web
from live import Live, running
from real import serve_engine
from stretched import POSITIONS, stretched_tiny

from rorqual.engine import Engine
from rorqual.serve.app import create_app

pytest.importorskip("llguidance")
validators = pytest.importorskip("jsonschema_rs")
pytestmark = [pytest.mark.concurrency, pytest.mark.slow]

MIN_PROMPT, MAX_TOKENS = 2000, 48
STORY = " ".join(f"On day {day} the whale swam {3 * day} miles to the north." for day in range(150))
QUESTION = f"{STORY} How far did it swim on day 7?"
WHOLE = {"type": "integer"}
SCHEMA = {"type": "object", "properties": {"miles": WHOLE, "far": {"type": "boolean"}},
          "required": ["miles", "far"], "additionalProperties": False}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
TURNS = [{"role": "user", "content": QUESTION}]
FORMS = ("plain", "schema", "tool")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    engine = Engine(stretched_tiny(tmp_path_factory.mktemp("stretched")), max_batch=4)
    assert engine.max_positions == POSITIONS
    with running(create_app(*serve_engine(engine))) as live:
        yield live


def post(live: Live, route: str, body: dict[str, Any]) -> str:
    reply = web.post(live.url + route, json={"temperature": 0} | body)
    assert reply.status_code == 200, reply.text
    return reply.text


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def chat(live: Live, form: str, *, is_stream: bool) -> tuple[str, int]:
    """(what was said, or the call's arguments; the prompt's tokens)."""
    function = {"name": "note", "parameters": SCHEMA}
    more: dict[str, Any] = {
        "plain": {},
        "schema": {"response_format": FORM},
        "tool": {"tools": [{"type": "function", "function": function}], "tool_choice": "required",
                 "parallel_tool_calls": False},
    }[form]  # fmt: skip
    body = {"messages": TURNS, "max_tokens": MAX_TOKENS, **more}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    text = post(live, "/v1/chat/completions", body)
    chunks = events(text) if is_stream else [json.loads(text)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    messages = [choice["delta" if is_stream else "message"] for choice in choices]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if form == "tool":
        assert choices[-1]["finish_reason"] == "tool_calls"
        said = "".join(call["function"].get("arguments", "") for call in calls)
    else:
        said = "".join(message.get("content") or "" for message in messages)
    return said, chunks[-1]["usage"]["prompt_tokens"]


def respond(live: Live, form: str, *, is_stream: bool) -> tuple[str, int]:
    tool = {"type": "function", "name": "note", "parameters": SCHEMA}
    kind = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    more: dict[str, Any] = {
        "plain": {},
        "schema": {"text": {"format": kind}},
        "tool": {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False},
    }[form]
    body = {"input": QUESTION, "max_output_tokens": MAX_TOKENS, "stream": is_stream, **more}
    text = post(live, "/v1/responses", body)
    response = json.loads(text) if not is_stream else events(text)[-1]["response"]
    (item,) = response["output"]
    said = item["arguments"] if form == "tool" else item["content"][0]["text"]
    if is_stream:
        kinds = ("response.output_text.delta", "response.function_call_arguments.delta")
        deltas = [event["delta"] for event in events(text) if event["type"] in kinds]
        assert "".join(deltas) == said
    return said, response["usage"]["input_tokens"]


def message(live: Live, form: str, *, is_stream: bool) -> tuple[str, int]:
    more: dict[str, Any] = {
        "plain": {},
        "schema": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "tool": {"tools": [{"name": "note", "input_schema": SCHEMA}],
                 "tool_choice": {"type": "tool", "name": "note"}},
    }[form]  # fmt: skip
    body = {"messages": TURNS, "max_tokens": MAX_TOKENS, "stream": is_stream, **more}
    text = post(live, "/v1/messages", body)
    if not is_stream:
        reply = json.loads(text)
        block = reply["content"][-1]
        said = json.dumps(block["input"]) if form == "tool" else block["text"]
        return said, reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"]
    found = events(text)
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    usage = found[0]["message"]["usage"] | (found[-2].get("usage") or {})
    said = "".join(delta.get("text") or delta.get("partial_json") or "" for delta in deltas)
    return said, usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_every_route_says_the_same_of_a_long_prompt(live: Live, form: str) -> None:
    wanted, num_prompt = chat(live, form, is_stream=False)
    assert MIN_PROMPT < num_prompt < POSITIONS
    if form != "plain":
        assert validators.is_valid(SCHEMA, json.loads(wanted))
    for route in (chat, respond, message):
        for is_stream in (False, True):
            said, num_tokens = route(live, form, is_stream=is_stream)
            assert num_tokens == num_prompt, (route, is_stream)
            if form == "tool":
                said, expected = json.loads(said), json.loads(wanted)
            else:
                expected = wanted
            assert said == expected, (route, is_stream)


@pytest.mark.parametrize(
    "more",
    [{}, {"suffix": " THE END."}, {"n": 2, "echo": True}, {"response_format": FORM, "n": 2}],
    ids=["plain", "middle", "echo", "schema"],
)
def test_a_long_completion(live: Live, more: dict[str, Any]) -> None:
    body = {"prompt": QUESTION, "max_tokens": MAX_TOKENS, **more}
    reply = json.loads(post(live, "/v1/completions", body))
    assert MIN_PROMPT < reply["usage"]["prompt_tokens"] < POSITIONS
    streamed: dict[int, str] = {}
    for chunk in events(post(live, "/v1/completions", body | {"stream": True})):
        for choice in chunk["choices"]:
            streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    whole = {choice["index"]: choice["text"] for choice in reply["choices"]}
    assert whole == streamed
    assert len(whole) == more.get("n", 1)
    assert all(text.startswith(QUESTION) == ("echo" in more) for text in whole.values())
    if "response_format" in more:
        assert all(validators.is_valid(SCHEMA, json.loads(text)) for text in whole.values())


def test_what_is_beyond_is_refused(live: Live) -> None:
    """And nothing is left of all these answers."""
    turns = [{"role": "user", "content": STORY * 4}]
    reply = web.post(live.url + "/v1/chat/completions", json={"messages": turns})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    stats = live.app.state.service.engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
