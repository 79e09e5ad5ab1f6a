"""Every row of the table of fields, in a real request. Oracle: what reaches the engine, and the
reply, beside those of the same request without the field.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import httpx
import pytest
import web
from fake_engine import FakeEngine
from field_tables import CLAUDE_PLACES, RESPONSE_PLACES, tables, written
from live import Live, running
from served import make_model

from patience import wait_until
from rorqual.engine import Request
from rorqual.serve.app import create_app
from rorqual.serve.field_row import (
    CALLS,
    CHAT,
    COMPLETIONS,
    FUNCTIONS,
    MESSAGES,
    PARTS,
    STRUCTURED,
    TOOLS,
    FieldRow,
)
from rorqual.serve.fields import BY_PLACE, ROWS
from rorqual.serve.notes import IGNORED_HEADER, MAX_HEADER_BYTES, NOTES_HEADER, Notes
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions"}
TOOL: list[Any] = [{"type": "function", "function": {"name": "f"}}]
SIMPLE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    COMPLETIONS: {"prompt": "hello"},
}
ANYTHING: tuple[Any, ...] = (None, True, 3, 0.5, "a text", ["x"], {"a": {"b": [1]}})
"""What a field without effect may hold."""
OWN = [row for row in ROWS if row.place not in (*RESPONSE_PLACES, *CLAUDE_PLACES)]
"""Those of the other two APIs are in test_fields_apis.py."""
HONOURED = [row for row in OWN if row.fate == "honoured"]
REFUSED = [row for row in OWN if row.fate == "refused"]
UNHEARD = [row for row in OWN if row.fate in ("ignored", "noted")]
NO_DEFAULT = {
    *("cache_salt", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "watermarking"),
    *("session_params", "task", "personality", "context_management", "task_budget"),
}
"""Noted: objects and names, which nobody sends who does not mean them."""
TYPED = ("user", "metadata", "store")
"""Fields without effect whose type is checked all the same."""


def body_of(place: str) -> dict[str, Any]:
    """A request that has the place: fresh, so that it may be changed."""
    if place == COMPLETIONS:
        return {"prompt": "hello"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {
        "messages": [
            {"role": "assistant", "content": [{"type": "text", "text": "x"}], "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "a"},
            {"role": "user", "content": "hello"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        **({"structured_outputs": {"json_object": True}} if place == STRUCTURED else {}),
    }


def part_of(body: dict[str, Any], place: str) -> dict[str, Any]:
    """The object at `place`."""
    part: dict[str, Any] = {
        CHAT: lambda: body,
        COMPLETIONS: lambda: body,
        MESSAGES: lambda: body["messages"][0],
        PARTS: lambda: body["messages"][0]["content"][0],
        CALLS: lambda: body["messages"][0]["tool_calls"][0],
        TOOLS: lambda: body["tools"][0],
        FUNCTIONS: lambda: body["tools"][0]["function"],
        STRUCTURED: lambda: body["structured_outputs"],
    }[place]()
    return part


PARAMS = {
    CHAT: "",
    COMPLETIONS: "",
    MESSAGES: "messages[0].",
    PARTS: "messages[0].content[0].",
    CALLS: "messages[0].tool_calls[0].",
    TOOLS: "tools[0].",
    FUNCTIONS: "tools[0].function.",
    STRUCTURED: "structured_outputs.",
}


def send(
    live: Live, engine: FakeEngine, place: str, changes: dict[str, Any]
) -> tuple[httpx.Response, list[Request], Any]:
    """(response, what reached the engine, the reply without what differs from time to time)."""
    body = body_of(place)
    part_of(body, place).update(changes)
    num_before = len(engine.requests)
    path = PATHS[COMPLETIONS if place == COMPLETIONS else CHAT]
    response = web.post(live.url + path, json=body)
    reply = response.json()
    for name in ("id", "created", "usage"):
        reply.pop(name, None)
    return response, engine.requests[num_before:], reply


def name_of(row: FieldRow) -> str:
    return f"{row.place}-{row.name}"


@pytest.fixture(scope="module")
def plain(live: Live, engine: FakeEngine) -> dict[str, Any]:
    """(what reached the engine, the reply) of each place's request without the fields."""
    return {place: send(live, engine, place, {})[1:] for place in PARAMS}


ONE_VALUE = [
    pytest.param(row, (ANYTHING[number % len(ANYTHING)],), id=name_of(row))
    for number, row in enumerate(UNHEARD)
]
ALL_VALUES = [
    pytest.param(row, ANYTHING, id=f"{name_of(row)}-all", marks=pytest.mark.slow) for row in UNHEARD
]


@pytest.mark.parametrize(("row", "values"), [*ONE_VALUE, *ALL_VALUES])
def test_a_field_without_effect_has_none(
    live: Live, engine: FakeEngine, plain: dict[str, Any], row: FieldRow, values: tuple[Any, ...]
) -> None:
    for value in () if row.name in TYPED else (*values, *row.off):
        response, *found = send(live, engine, row.place, {row.name: value})
        assert response.status_code == 200, (value, response.text)
        assert tuple(found) == plain[row.place], value
        is_named = row.fate == "noted" and not row.is_off(value)
        place = PARAMS[row.place].replace("[0]", "") + row.name
        assert response.headers.get(IGNORED_HEADER) == (place if is_named else None)


@pytest.mark.parametrize("place", PARAMS)
def test_null_asks_for_nothing(
    live: Live, engine: FakeEngine, plain: dict[str, Any], place: str
) -> None:
    names = [row.name for row in (*UNHEARD, *REFUSED) if row.place == place]
    response, *found = send(live, engine, place, dict.fromkeys(names))
    assert response.status_code == 200, response.text
    assert tuple(found) == plain[place]
    assert IGNORED_HEADER not in response.headers


def test_what_asks_for_nothing_is_not_told_as_ignored() -> None:
    """Each field that a reply names has the value its server has without it, but for those whose
    server has none.
    """
    without = {row.name for row in ROWS if row.fate == "noted" and not row.off}
    assert without == NO_DEFAULT
    assert not [row for row in ROWS if row.fate == "ignored" and row.off]


@pytest.mark.parametrize("row", REFUSED, ids=name_of)
def test_what_would_change_the_answer_is_refused_by_name(
    live: Live, engine: FakeEngine, plain: dict[str, Any], row: FieldRow
) -> None:
    response, requests, reply = send(live, engine, row.place, {row.name: row.example})
    assert (response.status_code, requests) == (422, [])
    error = reply["error"]
    assert (error["param"], error["code"]) == (PARAMS[row.place] + row.name, "unsupported")
    assert row.note in error["message"]
    for value in row.off:
        response, *found = send(live, engine, row.place, {row.name: value})
        assert response.status_code == 200, (value, response.text)
        assert tuple(found) == plain[row.place], value
        assert IGNORED_HEADER not in response.headers


BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": TOOL},
    "parallel_tool_calls": {"tools": TOOL},
    "stream_options.include_usage": {"stream": True},
    "stream_options.continuous_usage_stats": {"stream": True},
    "parse_special": {"prompt": "<|User|>hello"},
}
"""What a field needs beside it to have an effect."""


@pytest.mark.parametrize("row", HONOURED, ids=name_of)
def test_an_honoured_field_has_its_effect(live: Live, engine: FakeEngine, row: FieldRow) -> None:
    """On the requests that reach the engine, or on the reply: which, say the route's tests."""
    path, beside = PATHS[row.place], BESIDE.get(row.name, {})
    is_change = "." in row.name or "[" in row.name
    change = row.example if is_change else {row.name: row.example}
    seen = []
    for fields in ({}, change) if is_change else ({}, change, {row.name: None}):
        body = (SIMPLE[row.place] | beside) | fields
        num_before = len(engine.requests)
        response = web.post(live.url + path, json=body)
        text = re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", response.text)
        notes = {key: response.headers.get(key) for key in (IGNORED_HEADER, NOTES_HEADER)}
        seen.append((response.status_code, engine.requests[num_before:], text, notes))
    assert seen[0][0] == 200
    assert seen[0] != seen[1]
    is_needed = row.name in SIMPLE[row.place]
    assert is_change or (seen[2][0] == 422) == is_needed
    assert is_change or is_needed or seen[2][1] == seen[0][1]  # null asks for nothing


def test_every_declared_field_is_in_the_table() -> None:
    for schema in (ChatRequest, CompletionRequest):
        listed = {name.partition(".")[0] for name in BY_PLACE[schema.PLACE]}
        assert set(schema.model_fields) <= listed
    declared = {CHAT: ChatRequest.model_fields, COMPLETIONS: CompletionRequest.model_fields}
    for row in HONOURED:
        assert row.name.partition(".")[0].partition("[")[0] in declared[row.place], row


def test_the_documentation_has_the_table() -> None:
    assert written() == tables(), "python tests/serve/field_tables.py writes it"


def test_unknown_fields_are_ignored_and_named(live: Live, engine: FakeEngine) -> None:
    for place in PARAMS:
        _, plain, reply = send(live, engine, place, {})
        for value in (1, None, {"a": "b"}):
            response, requests, answer = send(live, engine, place, {"tempreature": value})
            assert (requests, answer) == (plain, reply)
            where = PARAMS[place].replace("[0]", "")
            assert response.headers[IGNORED_HEADER] == where + "tempreature"


def test_the_header_comes_before_a_stream(live: Live) -> None:
    for place, path in PATHS.items():
        body = body_of(place) | {"stream": True, "sprockets": 2, "verbosity": "low"}
        with web.stream("POST", live.url + path, json=body) as response:
            assert response.headers[IGNORED_HEADER] == "sprockets, verbosity"
            assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("names", "header"),
    [
        (["b", "a", "b"], "b, a"),
        (["a\r\nset-cookie: x"], "..."),
        (["ä", "ok", "a b", "", "a,b", "9"], "ok, ..."),
        ([f"name_{n}" for n in range(20)], ", ".join(f"name_{n}" for n in range(20))),
        ([f"n{n}" for n in range(21)], ", ".join([*(f"n{n}" for n in range(20)), "..."])),
        (["a" * 64, "a" * 65], "a" * 64 + ", ..."),
        (["messages[0].weight", "messages[17].weight"], "messages.weight"),
    ],
)
def test_nothing_of_a_request_breaks_the_header(names: list[str], header: str) -> None:
    notes = Notes()
    for name in names:
        notes.ignore(name)
    assert notes.headers() == {IGNORED_HEADER: header}


def test_the_header_stays_small() -> None:
    notes = Notes()
    for number in range(30):
        notes.ignore(f"{'x' * 60}{number}")
    header = notes.headers()[IGNORED_HEADER]
    assert len(header) <= MAX_HEADER_BYTES
    assert header.count("x" * 60) == 15  # of 64 bytes each with what parts them
    assert header.endswith(", ...")


@pytest.mark.parametrize("size", range(33, 39))
def test_a_name_is_shown_if_the_header_still_has_room_for_it(size: int) -> None:
    """And for the word behind it that there are more: 15 * 64 + 35 + 5 bytes are 1,000."""
    names = [f"{'x' * 60}{number}" for number in range(10, 25)]
    notes = Notes()
    for name in (*names, "y" * size, "no name"):
        notes.ignore(name)
    shown = ["y" * size] if size <= 35 else []
    assert notes.headers()[IGNORED_HEADER] == ", ".join([*names, *shown, "..."])


def test_hostile_names_in_a_real_request(live: Live) -> None:
    names = ["a\r\nx-evil: 1", "\u0000", "鯨", "x" * 10_000, "__class__", "_notes", "model_fields"]
    body = {"messages": [{"role": "user", "content": "hello", "a\nb": 1}], "fine": 1}
    response = web.post(live.url + PATHS[CHAT], json=body | dict.fromkeys(names, 1))
    assert response.status_code == 200
    assert response.headers[IGNORED_HEADER] == "fine, __class__, _notes, model_fields, ..."
    assert "x-evil" not in response.headers


def test_the_log_names_a_field_once(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(FakeEngine(tokenizer), make_model(tokenizer))
    with caplog.at_level(logging.INFO, logger="rorqual.serve"), running(app) as live:
        for name in ("once_only", "once_only", "x\nforged line"):
            assert web.post(live.url + PATHS[CHAT], json=body_of(CHAT) | {name: 1}).is_success
        for _ in range(2):
            web.post(live.url + PATHS[CHAT], json=body_of(CHAT) | {"reasoning": {"enabled": False}})
    lines = [record.getMessage() for record in caplog.records if "without effect" in record.msg]
    start = "requests have fields without effect: "
    assert lines == [start + "once_only", start + "reasoning"]


@pytest.mark.parametrize(
    ("place", "changes", "param", "words"),
    [
        (CHAT, {"tempreature": 1}, "tempreature", "did you mean 'temperature'"),
        (CHAT, {"srvice_tier": 1}, "srvice_tier", "did you mean 'service_tier'"),
        (CHAT, {"nonsense": None}, "nonsense", "unknown field 'nonsense'"),
        (COMPLETIONS, {"promtp": "x"}, "promtp", "did you mean 'prompt'"),
        (MESSAGES, {"weight": 1}, "messages[0].weight", "unknown"),
        (MESSAGES, {"contnet": 1}, "messages[0].contnet", "did you mean 'messages[0].content'"),
        (FUNCTIONS, {"strictt": 1}, "tools[0].function.strictt", "'tools[0].function.strict'"),
        (CHAT, {"stream_options": {"x": 1}}, "stream_options.x", "unknown"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema.shema",
            "did you mean 'response_format.json_schema.schema'",
        ),
        (CHAT, {f"f{n}": 1 for n in range(9)}, "f0", "and 4 more"),
    ],
)
def test_strict_fields(
    strict: Live, place: str, changes: dict[str, Any], param: str, words: str
) -> None:
    body = body_of(place)
    part_of(body, place).update(changes)
    path = PATHS[COMPLETIONS if place == COMPLETIONS else CHAT]
    response = web.post(strict.url + path, json=body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_field", param)
    assert words in error["message"]


def test_strict_fields_take_what_is_documented(strict: Live) -> None:
    for place, path in PATHS.items():
        names = [row.name for row in UNHEARD if row.place == place and row.name not in TYPED]
        response = web.post(strict.url + path, json=body_of(place) | dict.fromkeys(names, "x"))
        assert response.status_code == 200, response.text
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert web.post(strict.url + path, json=body).status_code == 200
        assert web.post(strict.url + path, json=body | {"x": 1}).status_code == 422


@pytest.fixture(scope="module")
def strict(tokenizer: Tokenizer) -> Any:
    settings = ServerSettings(has_strict_fields=True)
    with running(create_app(FakeEngine(tokenizer), make_model(tokenizer), settings)) as live:
        yield live


def test_tokens_are_told_of_fields_without_effect(live: Live) -> None:
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        response = web.post(live.url + path, json=body | {"colour": "red"})
        assert (response.status_code, response.headers[IGNORED_HEADER]) == (200, "colour")


def test_a_line_of_a_batch_tells_what_had_no_effect(live: Live) -> None:
    """The record has a name more than OpenAI's."""
    text = "".join(
        json.dumps({"custom_id": name, "method": "POST", "url": PATHS[CHAT], "body": body}) + "\n"
        for name, body in (
            ("plain", body_of(CHAT)),
            ("odd", body_of(CHAT) | {"colour": 1, "ä": 2, "service_tier": "flex"}),
            ("refused", body_of(CHAT) | {"colour": 1, "modalities": ["audio"]}),
        )
    )
    files = {"file": ("in.jsonl", text.encode())}
    file = web.post(live.url + "/v1/files", data={"purpose": "batch"}, files=files).json()
    batch = {"input_file_id": file["id"], "endpoint": PATHS[CHAT], "completion_window": "24h"}
    made = web.post(live.url + "/v1/batches", json=batch | {"colour": 1}).json()

    def now() -> Any:
        return web.get(f"{live.url}/v1/batches/{made['id']}").json()

    wait_until(lambda: now()["status"] == "completed")
    done = now()
    records = {}
    for name in ("output_file_id", "error_file_id"):
        lines = web.get(f"{live.url}/v1/files/{done[name]}/content").text
        records |= {each["custom_id"]: each for each in map(json.loads, lines.splitlines())}
    assert "ignored_fields" not in records["plain"]["response"]
    assert records["odd"]["response"]["ignored_fields"] == ["colour"]
    assert records["refused"]["response"]["body"]["error"]["param"] == "modalities"
