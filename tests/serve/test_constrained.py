"""Calls that must come and JSON that must fit, through the whole server, with real engines.

A random model never ends anything by itself, and the bundled one rambles: what comes whole was
closed in time. Oracle: a validator of JSON schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import web
from live import Live, running
from real import make_engine, serve_engine
from served import make_model
from stretched import stretched_tiny

from rorqual.engine import AsyncEngine, Engine
from rorqual.serve.app import create_app
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END
from rorqual.weights import ModelFolder

pytest.importorskip("llguidance")
validators = pytest.importorskip("jsonschema_rs")
pytestmark = pytest.mark.concurrency

MAX_TOKENS = 60
CALL_TOKENS = 100
"""The shortest call takes 57 tokens of this small vocabulary."""
TEXT, WHOLE, NUMBER, FLAG = ({"type": t} for t in ("string", "integer", "number", "boolean"))


def thing(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


def many(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


SCHEMAS = [
    thing({"name": TEXT, "age": WHOLE}),
    thing({"city": TEXT, "temperature": NUMBER, "is_raining": FLAG}),
    many(WHOLE, minItems=3),
    thing({"kind": {"enum": ["red", "green", "blue"]}, "tags": many(TEXT)}),
    thing({"person": thing({"first": TEXT, "last": TEXT}), "friends": many(thing({"a": TEXT}))}),
    thing({"x": NUMBER, "y": NUMBER, "label": TEXT}, ["x", "y"]),
    {"type": "object"},
    thing({"day": TEXT | {"format": "date"}, "title": TEXT}),
    thing({"v": {"anyOf": [WHOLE, TEXT, {"type": "null"}]}, "w": TEXT}),
    {"$defs": {"n": thing({"v": WHOLE, "k": many({"$ref": "#/$defs/n"})})}, "$ref": "#/$defs/n"},
    thing({"s": TEXT | {"minLength": 12}, "n": WHOLE | {"minimum": 137, "maximum": 141}}),
    thing({f"field_{index}": TEXT for index in range(8)}),
    {"enum": ["yes", "no"]},
    TEXT,
    thing({"code": TEXT | {"pattern": "^[A-Z]{3}-[0-9]{4}$"}}),
    many(thing({"q": TEXT, "a": TEXT}), minItems=2),
    thing({"a": {"const": "hello"}, "b": many(FLAG, minItems=4, maxItems=6)}),
    thing({"matrix": many(many(NUMBER))}),
    thing({"may": TEXT, "must": WHOLE}, ["must"]),
    thing({"long_description": TEXT, "steps": many(TEXT)}),
]


@pytest.fixture(scope="module", params=[("v3", 0), ("r1", 2)], ids=["v3", "r1-drafts"])
def server(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[tuple[Live, bool]]:
    """A server with a random model, and whether its template opens the reasoning, as R1's does."""
    is_open, drafts = request.param[0] == "r1", request.param[1]
    if is_open:
        end = "{% if add_generation_prompt %}" + THINK_BEGIN + "\n{% endif %}"
        tokenizer = replace(tokenizer, chat_template=tokenizer.chat_template + end)
    engine = make_engine(tokenizer, speculate=drafts, is_batch_invariant=bool(drafts))
    with running(create_app(*serve_engine(engine))) as live:
        yield live, is_open


def ask(live: Live, *, is_stream: bool = False, **body: Any) -> list[dict[str, Any]]:
    """The choices, put together from events where it is a stream."""
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], **body}
    body = {"temperature": 1, "seed": 4, "max_tokens": MAX_TOKENS, "stream": is_stream, **body}
    reply = web.post(live.url + "/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not is_stream:
        return list(reply.json()["choices"])
    found: dict[int, dict[str, Any]] = {}
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                _join(found.setdefault(choice["index"], {"message": {}}), choice)
    return [found[index] for index in sorted(found)]


def _join(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    whole["finish_reason"] = choice["finish_reason"]
    message, delta = whole["message"], choice["delta"]
    for name in ("content", "reasoning_content"):
        message[name] = (message.get(name) or "") + (delta.get(name) or "")
    for call in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({"function": {"name": "", "arguments": ""}})
        for name, text in call["function"].items():
            calls[call["index"]]["function"][name] += text or ""


def tool(schema: dict[str, Any], name: str = "note") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def wanted(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}, **more}


def check_calls(choice: dict[str, Any], schema: dict[str, Any], num_calls: int | None) -> None:
    assert choice["finish_reason"] == "tool_calls"
    calls = choice["message"]["tool_calls"]
    assert len(calls) >= 1 if num_calls is None else len(calls) == num_calls
    for call in calls:
        assert validators.is_valid(schema, read(call["function"]["arguments"]))


def read(text: str) -> Any:
    """-12e726 is a number of JSON, and to Python infinite, which is none to the validator."""
    return json.loads(text, parse_float=lambda number: 0.5)


def share_of_space(text: str) -> float:
    """White space outside of texts, of all characters."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    return sum(character.isspace() for character in bare) / len(text)


@pytest.mark.parametrize(
    ("body", "num_calls"),
    [
        ({"tool_choice": "required", "is_stream": True, "n": 2}, None),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1),
        ({"tool_choice": {"type": "function", "function": {"name": "note"}}}, 1),
    ],
    ids=["required", "single", "named"],
)
def test_a_forced_call_comes(
    server: tuple[Live, bool], body: dict[str, Any], num_calls: int | None
) -> None:
    live, is_open = server
    answers = ask(live, tools=[tool(SCHEMAS[0])], max_tokens=CALL_TOKENS, **body)
    assert len(answers) == body.get("n", 1)
    for answer in answers:
        check_calls(answer, SCHEMAS[0], num_calls)
        assert is_open or not answer["message"].get("reasoning_content")


def test_reasoning_before_a_forced_call_takes_a_quarter_at_most(server: tuple[Live, bool]) -> None:
    live, is_open = server
    schema = SCHEMAS[0]
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": CALL_TOKENS,
        "temperature": 1,
    }
    body |= {"tools": [tool(schema)], "tool_choice": "required", "seed": 4}
    reply = web.post(live.url + "/v1/chat/completions", json=body).json()
    check_calls(reply["choices"][0], schema, None)
    details = reply["usage"].get("completion_tokens_details") or {}
    assert details.get("reasoning_tokens", 0) <= CALL_TOKENS // 4
    assert is_open or not details.get("reasoning_tokens")


@pytest.mark.parametrize("is_stream", [False, True])
def test_json_comes_whole(server: tuple[Live, bool], is_stream: bool) -> None:
    live, _ = server
    for schema in (SCHEMAS[4], SCHEMAS[9]):
        for answer in ask(live, response_format=wanted(schema), is_stream=is_stream, n=2):
            assert answer["finish_reason"] == "stop"
            assert validators.is_valid(schema, read(answer["message"]["content"]))


def test_json_is_compact_unless_asked_otherwise(
    server: tuple[Live, bool], tokenizer: Tokenizer
) -> None:
    live, _ = server
    spaces = {" ", "\n", "\t"}
    bias = {str(tokenizer.encode(text)[0]): 8.0 for text in spaces}
    bias[str(tokenizer.special_ids[THINK_END])] = 100.0  # no reasoning to speak of
    for form in ({"type": "json_object"}, wanted(SCHEMAS[3])):
        texts = {
            flag: ask(live, response_format=form | {"whitespace": flag}, logit_bias=bias)[0]
            for flag in (None, False, True)
        }
        contents = {flag: answer["message"]["content"] for flag, answer in texts.items()}
        assert contents[None] == contents[False]
        assert not re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', "", contents[None]))
        assert re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', "", contents[True]))


def test_what_fits_in_no_way_ends_by_its_length(server: tuple[Live, bool]) -> None:
    live, _ = server
    (answer,) = ask(live, response_format=wanted(SCHEMAS[11]), max_tokens=12)
    assert answer["finish_reason"] == "length"
    (answer,) = ask(live, tools=[tool(SCHEMAS[0])], tool_choice="required", max_tokens=5)
    assert answer["finish_reason"] == "length"


def test_stop_texts_and_a_least_number_of_tokens_keep_their_meaning(
    server: tuple[Live, bool],
) -> None:
    live, _ = server
    form = wanted(thing({"a": {"const": "x"}, "b": TEXT}))
    (cut,) = ask(live, response_format=form, stop='"b"')
    assert cut["message"]["content"].endswith(",")
    assert cut["finish_reason"] == "stop"
    (whole,) = ask(live, response_format=form, min_tokens=MAX_TOKENS)
    json.loads(whole["message"]["content"])
    assert whole["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_the_bundled_model_answers_twenty_of_twenty(tmp_path: Path) -> None:
    """Forced calls, JSON schemas, and at most a tenth of it white space."""
    folder = ModelFolder.find(str(stretched_tiny(tmp_path / "tiny")))
    engine = Engine(folder.load_model("auto"), folder.load_tokenizer(), max_batch=8)
    model = make_model(engine.tokenizer, max_positions=engine.max_positions)
    texts = []
    with running(create_app(AsyncEngine(engine, max_queue=64), model)) as live:
        for index, schema in enumerate(SCHEMAS):
            settings: dict[str, Any] = {"temperature": (0.3, 1.0)[index % 2], "max_tokens": 128}
            (answer,) = ask(live, response_format=wanted(schema), **settings)
            texts.append(answer["message"]["content"])
            assert answer["finish_reason"] == "stop"
            assert validators.is_valid(schema, read(texts[-1]))
            wrapped = schema if schema.get("type") == "object" else thing({"value": schema})
            if "$defs" in schema:
                wrapped = SCHEMAS[0]
            body = {"tools": [tool(wrapped), tool(SCHEMAS[1], "other")], "tool_choice": "required"}
            (answer,) = ask(live, **body, **settings)
            assert answer["finish_reason"] == "tool_calls"
            for call in answer["message"]["tool_calls"]:
                named = wrapped if call["function"]["name"] == "note" else SCHEMAS[1]
                texts.append(call["function"]["arguments"])
                assert validators.is_valid(named, read(texts[-1]))
    assert max(map(share_of_space, texts)) <= 0.1
