"""Every row of the table of fields of `/v1/responses` and `/v1/messages`, in a real request.

Oracles: what reaches the engine, and the reply, beside those of the same request without the field;
and the two SDKs, whose types list what their services document.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import web
from fake_engine import FakeEngine
from field_tables import CLAUDE_PLACES, RESPONSE_PLACES
from live import Live
from openai.types.responses import Response as SdkResponse
from pydantic import TypeAdapter

from rorqual.engine import Request
from rorqual.serve.field_row import (
    CHAT,
    CLAUDE,
    CLAUDE_BLOCKS,
    CLAUDE_OUTPUT,
    CLAUDE_TOOLS,
    COMPLETIONS,
    COUNT_TOKENS,
    INPUT_TOKENS,
    RESPONSE_ITEMS,
    RESPONSE_PARTS,
    RESPONSE_REASONING,
    RESPONSE_TEXT,
    RESPONSE_TOOLS,
    RESPONSES,
    FieldRow,
)
from rorqual.serve.fields import BY_PLACE, ROWS
from rorqual.serve.notes import IGNORED_HEADER, NOTES_HEADER
from rorqual.serve.schemas_messages import CountRequest, MessagesRequest
from rorqual.serve.schemas_responses import InputRequest, ResponseRequest

pytestmark = pytest.mark.concurrency

PATHS = {
    RESPONSES: "/v1/responses",
    INPUT_TOKENS: "/v1/responses/input_tokens",
    CLAUDE: "/v1/messages",
    COUNT_TOKENS: "/v1/messages/count_tokens",
}
OWN = [row for row in ROWS if row.place in (*RESPONSE_PLACES, *CLAUDE_PLACES)]
HONOURED = [row for row in OWN if row.fate == "honoured"]
REFUSED = [row for row in OWN if row.fate == "refused"]
UNHEARD = [row for row in OWN if row.fate in ("ignored", "noted")]
TYPED = {
    (INPUT_TOKENS, "parallel_tool_calls"),
    (INPUT_TOKENS, "text"),
    (COUNT_TOKENS, "output_config"),
    (COUNT_TOKENS, "output_format"),
}
"""Without effect on a count, but checked, for they are those of the requests that are counted."""
ANYTHING: tuple[Any, ...] = (None, True, 3, 0.5, "a text", ["x"], {"a": {"b": [1]}})
TELLING = {"max_tool_calls", "prompt_cache_key", "safety_identifier", "user", "summary"}
"""What a response tells again of its request."""
HELLO = {"role": "user", "content": "hello"}
SIMPLE: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "hello"},
    INPUT_TOKENS: {"input": "hello"},
    CLAUDE: {"messages": [HELLO], "max_tokens": 50},
    COUNT_TOKENS: {"messages": [HELLO]},
}
PARAMS = {
    RESPONSES: "",
    INPUT_TOKENS: "",
    RESPONSE_ITEMS: "input[0].",
    RESPONSE_PARTS: "input[0].content[0].",
    RESPONSE_TOOLS: "tools[0].",
    RESPONSE_TEXT: "text.",
    RESPONSE_REASONING: "reasoning.",
    CLAUDE: "",
    COUNT_TOKENS: "",
    CLAUDE_BLOCKS: "messages[0].content[0].",
    CLAUDE_TOOLS: "tools[0].",
    CLAUDE_OUTPUT: "output_config.",
}


def body_of(place: str) -> dict[str, Any]:
    """A request that has the place: fresh, so that it may be changed."""
    if place in (INPUT_TOKENS, COUNT_TOKENS):
        return dict(SIMPLE[place])
    if place in RESPONSE_PLACES:
        return {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
            "tools": [{"type": "function", "name": "f"}],
            "text": {"format": {"type": "text"}},
            "reasoning": {},
        }
    return {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 50,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "output_config": {},
    }


def part_of(body: dict[str, Any], place: str) -> Any:
    """The object at `place`."""
    part: Any = body
    for name in PARAMS[place].replace("[0]", ".0").split("."):
        if name:
            part = part[int(name) if name.isdigit() else name]
    return part


def path_of(place: str) -> str:
    return PATHS.get(place) or PATHS[RESPONSES if place in RESPONSE_PLACES else CLAUDE]


def plain(reply: Any) -> Any:
    """Without what differs from time to time, and what is told again."""
    drop = {"id", "created_at", "completed_at", "usage", "text", *TELLING}
    if isinstance(reply, dict):
        return {name: plain(value) for name, value in reply.items() if name not in drop}
    return [plain(value) for value in reply] if isinstance(reply, list) else reply


def send(
    live: Live, engine: FakeEngine, place: str, changes: dict[str, Any]
) -> tuple[httpx.Response, list[Request], Any]:
    body = body_of(place)
    part_of(body, place).update(changes)
    num_before = len(engine.requests)
    response = web.post(live.url + path_of(place), json=body)
    return response, engine.requests[num_before:], plain(response.json())


def name_of(row: FieldRow) -> str:
    return f"{row.place}-{row.name}".replace(" ", "")


def ignored(response: httpx.Response) -> set[str]:
    return set(filter(None, response.headers.get(IGNORED_HEADER, "").split(", ")))


@pytest.fixture(scope="module")
def bare(live: Live, engine: FakeEngine) -> dict[str, Any]:
    """`send` of each place's request without the fields."""
    return {place: send(live, engine, place, {}) for place in PARAMS}


ONE_VALUE = [
    pytest.param(row, (ANYTHING[number % len(ANYTHING)],), id=name_of(row))
    for number, row in enumerate(UNHEARD)
]
ALL_VALUES = [
    pytest.param(row, ANYTHING, id=f"{name_of(row)}-all", marks=pytest.mark.slow) for row in UNHEARD
]


@pytest.mark.parametrize(("row", "values"), [*ONE_VALUE, *ALL_VALUES])
def test_a_field_without_effect_has_none(
    live: Live, engine: FakeEngine, bare: dict[str, Any], row: FieldRow, values: tuple[Any, ...]
) -> None:
    first, own, reply = bare[row.place]
    assert first.status_code == 200, first.text
    for value in (*values, *row.off):
        if (row.place, row.name) in TYPED and value is not None:
            continue
        response, requests, answer = send(live, engine, row.place, {row.name: value})
        assert response.status_code == 200, (value, response.text)
        assert (requests, answer) == (own, reply), value
        is_named = row.fate == "noted" and not row.is_off(value)
        named = {PARAMS[row.place].replace("[0]", "") + row.name} if is_named else set()
        assert ignored(response) - ignored(first) == named


@pytest.mark.parametrize("place", PARAMS)
def test_null_asks_for_nothing(
    live: Live, engine: FakeEngine, bare: dict[str, Any], place: str
) -> None:
    names = [row.name for row in (*UNHEARD, *REFUSED) if row.place == place]
    response, *found = send(live, engine, place, dict.fromkeys(names))
    first, *own = bare[place]
    assert response.status_code == 200, response.text
    assert found == own
    assert ignored(response) == ignored(first)


TOLD: dict[str, tuple[Any, ...]] = {
    "max_tool_calls": (3,),
    "prompt_cache_key": ("a text",),
    "safety_identifier": ("a text",),
    "user": ("a text",),
    "reasoning.summary": ("auto", "concise", "detailed"),
    "text.verbosity": ("low", "medium", "high"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_a_response_tells_again_has_its_type(live: Live, name: str) -> None:
    """Oracle: the types of OpenAI's SDK, which reads another value without a word."""
    inside, _, last = name.rpartition(".")
    for value in (*ANYTHING, *TOLD[name]):
        change = {inside: {last: value}} if inside else {last: value}
        text = web.post(live.url + PATHS[RESPONSES], json=SIMPLE[RESPONSES] | change).text
        reply = TypeAdapter(SdkResponse).validate_json(text, strict=True).to_dict()
        told: Any = reply[inside] if inside else reply
        assert told.get(last) == (value if value in TOLD[name] else None), value


@pytest.mark.parametrize("row", REFUSED, ids=name_of)
def test_what_would_change_the_answer_is_refused_by_name(
    live: Live, engine: FakeEngine, bare: dict[str, Any], row: FieldRow
) -> None:
    response, requests, reply = send(live, engine, row.place, {row.name: row.example})
    is_claude = row.place in CLAUDE_PLACES
    assert (response.status_code, requests) == (400 if is_claude else 422, [])
    error, place = reply["error"], PARAMS[row.place] + row.name
    if not is_claude:
        assert (error["param"], error["code"]) == (place, "unsupported")
    assert error["message"].startswith(f"{place} is not supported")
    assert row.note in error["message"]
    _, own, whole = bare[row.place]
    for value in row.off:
        response, requests, answer = send(live, engine, row.place, {row.name: value})
        assert response.status_code == 200, (value, response.text)
        assert (requests, answer) == (own, whole), value


BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    (RESPONSES, "tool_choice"): {"tools": [{"type": "function", "name": "f"}]},
    (INPUT_TOKENS, "tool_choice"): {"tools": [{"type": "function", "name": "f"}]},
    (RESPONSES, "parallel_tool_calls"): {"tools": [{"type": "function", "name": "f"}]},
    (CLAUDE, "tool_choice"): {"tools": [{"name": "f", "input_schema": {}}]},
    (COUNT_TOKENS, "tool_choice"): {"tools": [{"name": "f", "input_schema": {}}]},
}
ELSEWHERE = {(INPUT_TOKENS, "truncation")}
"""Takes a full context to have an effect: see `test_old_turns_make_room`."""


@pytest.mark.parametrize("row", HONOURED, ids=name_of)
def test_an_honoured_field_has_its_effect(live: Live, engine: FakeEngine, row: FieldRow) -> None:
    """On the requests that reach the engine, or on the reply: which, say the routes' tests."""
    key = (row.place, row.name)
    is_change = "." in row.name
    change = row.example if is_change else {row.name: row.example}
    seen = []
    for fields in ({}, change) if is_change else ({}, change, {row.name: None}):
        body = SIMPLE[row.place] | BESIDE.get(key, {}) | fields
        num_before = len(engine.requests)
        response = web.post(live.url + PATHS[row.place], json=body)
        text = re.sub(r'"(id|\w+_id|\w+_at)": ?("[^"]*"|\d+)', "", response.text)
        notes = {key: response.headers.get(key) for key in (IGNORED_HEADER, NOTES_HEADER)}
        seen.append((response.status_code, engine.requests[num_before:], text, notes))
    assert seen[0][0] == 200
    assert seen[0] != seen[1] or key in ELSEWHERE
    is_needed = row.name in SIMPLE[row.place]
    assert is_change or (seen[2][0] in (400, 422)) == is_needed
    assert is_change or is_needed or seen[2][1] == seen[0][1]  # null asks for nothing


def test_every_declared_field_is_in_the_table() -> None:
    for schema in (ResponseRequest, InputRequest, MessagesRequest, CountRequest):
        listed = {name.partition(".")[0] for name in BY_PLACE[schema.PLACE]}
        assert set(schema.model_fields) <= listed
        for row in HONOURED:
            if row.place == schema.PLACE:
                assert row.name.partition(".")[0] in schema.model_fields, row


def sdk_fields() -> Iterator[tuple[str, set[str]]]:
    """What the types of the SDKs list, by place."""
    of_openai, of_anthropic = "openai.types.", "anthropic.types."
    for place, types in {
        CHAT: (f"{of_openai}chat.completion_create_params CompletionCreateParamsBase",),
        COMPLETIONS: (f"{of_openai}completion_create_params CompletionCreateParamsBase",),
        RESPONSES: (f"{of_openai}responses.response_create_params ResponseCreateParamsBase",),
        INPUT_TOKENS: (f"{of_openai}responses.input_token_count_params InputTokenCountParams",),
        RESPONSE_TOOLS: (
            f"{of_openai}responses.function_tool_param FunctionToolParam",
            f"{of_openai}responses.custom_tool_param CustomToolParam",
        ),
        RESPONSE_TEXT: (
            f"{of_openai}responses.response_text_config_param ResponseTextConfigParam",
        ),
        RESPONSE_REASONING: (f"{of_openai}shared_params.reasoning Reasoning",),
        CLAUDE: (
            f"{of_anthropic}message_create_params MessageCreateParamsBase",
            f"{of_anthropic}beta.message_create_params MessageCreateParamsBase",
        ),
        COUNT_TOKENS: (
            f"{of_anthropic}message_count_tokens_params MessageCountTokensParams",
            f"{of_anthropic}beta.message_count_tokens_params MessageCountTokensParams",
        ),
        CLAUDE_TOOLS: (f"{of_anthropic}tool_param ToolParam",),
        CLAUDE_OUTPUT: (f"{of_anthropic}beta.beta_output_config_param BetaOutputConfigParam",),
        CLAUDE_BLOCKS: tuple(
            f"{of_anthropic}{kind}_block_param {name}BlockParam"
            for kind, name in (
                ("text", "Text"),
                ("tool_use", "ToolUse"),
                ("tool_result", "ToolResult"),
                ("thinking", "Thinking"),
            )
        ),
    }.items():
        yield place, {name for each in types for name in annotations(*each.split())}


def annotations(module: str, name: str) -> set[str]:
    return set(getattr(importlib.import_module(module), name).__annotations__)


DECLARED = {
    RESPONSE_TOOLS: "type name description parameters strict format",
    RESPONSE_TEXT: "format",
    RESPONSE_REASONING: "effort",
    CLAUDE_TOOLS: "type name description input_schema strict",
    CLAUDE_OUTPUT: "format",
    CLAUDE_BLOCKS: "type text thinking id name input tool_use_id content",
}
"""What an object has that the table tells with the object."""


def test_what_the_sdks_document_is_in_the_table() -> None:
    pytest.importorskip("anthropic")
    for place, names in sdk_fields():
        known = {name.partition(".")[0] for name in BY_PLACE[place]}
        assert names - known - set(DECLARED.get(place, "").split()) == set(), place


@pytest.mark.parametrize("place", PATHS)
def test_unknown_fields_are_ignored_and_named(live: Live, engine: FakeEngine, place: str) -> None:
    _, own, reply = send(live, engine, place, {})
    response, requests, answer = send(live, engine, place, {"tempreature": 1})
    assert (requests, answer) == (own, reply)
    assert "tempreature" in ignored(response)
