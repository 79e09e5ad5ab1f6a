"""Other servers' names for an answer's form, its length and its continuation.

Oracle: the request that reaches the engine is that of this server's own field.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from real import make_engine, serve_engine

from patience import wait_until
from rorqual.engine import Request
from rorqual.serve.app import create_app
from rorqual.serve.gbnf import as_lark
from rorqual.serve.notes import IGNORED_HEADER
from rorqual.serve.schemas_forms import MAX_SCHEMA_CHARS
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    TEXT: {"prompt": ["hello", "well"]},
}
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
GBNF = 'root ::= "a" | "b" root'
LARK = "start: /a/ | /b/ start"


def form(kind: str, value: Any) -> dict[str, Any]:
    if kind == "json_schema":
        return {"type": kind, "json_schema": {"name": "x", "schema": value}}
    return {"type": kind} | ({"choices": value} if kind == "choice" else {kind: value})


SCHEMA, REGEX, CHOICE = form("json_schema", CITY), form("regex", "a+"), form("choice", ["a", "b"])
WIDE, WIDE_SCHEMA = {"type": "json_object", "whitespace": True}, SCHEMA | {"whitespace": True}
BNF, EBNF = form("grammar", as_lark(GBNF)), form("grammar", LARK)
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_json": CITY}, SCHEMA),
    ({"guided_json": json.dumps(CITY)}, SCHEMA),
    ({"guided_regex": "a+"}, REGEX),
    ({"guided_choice": ["a", "b"]}, CHOICE),
    ({"guided_grammar": GBNF}, BNF),
    ({"guided_grammar": LARK}, EBNF),
    ({"structured_outputs": {"json": CITY}}, SCHEMA),
    ({"structured_outputs": {"json": json.dumps(CITY)}}, SCHEMA),
    ({"structured_outputs": {"regex": "a+", "json": None}}, REGEX),
    ({"structured_outputs": {"choice": ["a", "b"]}}, CHOICE),
    ({"structured_outputs": {"choices": ["a", "b"]}}, CHOICE),
    ({"structured_outputs": {"grammar": GBNF}}, BNF),
    ({"structured_outputs": {"json_object": True}}, {"type": "json_object"}),
    ({"json_schema": CITY}, SCHEMA),
    ({"json_schema": json.dumps(CITY)}, SCHEMA),
    ({"json_schema": {}}, form("json_schema", {})),
    ({"json_schema": "{}".ljust(MAX_SCHEMA_CHARS)}, form("json_schema", {})),
    ({"regex": "a+"}, REGEX),
    ({"ebnf": GBNF}, BNF),
    ({"grammar": GBNF}, BNF),
    ({"response_format": {"type": "grammar", "grammar": GBNF}}, BNF),
    ({"response_format": {"type": "json_object", "schema": CITY}}, SCHEMA),
    ({"response_format": {"type": "json_schema", "schema": CITY}}, SCHEMA),
    ({"response_format": {"type": "text"}, "guided_json": CITY}, SCHEMA),
    # Twice the same is no contradiction.
    ({"response_format": SCHEMA, "guided_json": CITY, "json_schema": CITY}, SCHEMA),
    ({"response_format": form("grammar", GBNF), "grammar": GBNF}, BNF),
    ({"guided_regex": "a+", "regex": "a+", "structured_outputs": {"regex": "a+"}}, REGEX),
    # Nor does it matter which of them says that there may be white space.
    ({"response_format": WIDE, "structured_outputs": {"json_object": True}}, WIDE),
    ({"response_format": WIDE_SCHEMA, "json_schema": CITY}, WIDE_SCHEMA),
]
OFF: list[dict[str, Any]] = [
    {"structured_outputs": {}},
    {"structured_outputs": {"json_object": False, "disable_any_whitespace": True}},
    {"grammar": ""},
    {"response_format": {"type": "text"}},
    {"n_probs": 0},
    {"n_predict": -1},
    {"continue_final_message": False, "add_generation_prompt": True},
]


def post(live: Live, path: str, **fields: Any) -> httpx.Response:
    return web.post(live.url + path, json=BODIES[path] | fields)


def sent(live: Live, engine: FakeEngine, path: str, **fields: Any) -> list[Request]:
    """What reaches the engine."""
    num_before = len(engine.requests)
    response = post(live, path, **fields)
    assert response.status_code == 200, response.text
    assert IGNORED_HEADER not in response.headers
    return engine.requests[num_before:]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("way", "own"), WAYS, ids=lambda value: "-".join(value))
def test_every_way_to_ask_for_a_form(
    live: Live, engine: FakeEngine, path: str, way: dict[str, Any], own: dict[str, Any]
) -> None:
    for more in ({}, {"n": 2, "stream": True, "max_tokens": 9}):
        as_own = sent(live, engine, path, response_format=own, **more)
        assert sent(live, engine, path, **way, **more) == as_own
        grammar = as_own[0].params.grammar
        assert grammar is not None
        assert grammar.kind == own["type"]
        assert all(request.compiled is not None for request in as_own)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_asks_for_nothing(live: Live, engine: FakeEngine, path: str) -> None:
    plain = sent(live, engine, path)
    for off in OFF:
        if path == CHAT or "continue_final_message" not in off:
            assert sent(live, engine, path, **off) == plain


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": CITY, "regex": "a"}, "regex", "guided_json and regex ask"),
        ({"response_format": REGEX, "grammar": GBNF}, "grammar", "response_format and grammar"),
        ({"json_schema": {}, "guided_json": CITY}, "json_schema", "guided_json and json_schema"),
        (
            {"structured_outputs": {"json": CITY, "choice": ["a"]}},
            "structured_outputs.choice",
            "structured_outputs.json and structured_outputs.choice",
        ),
        ({"guided_json": "{city"}, "guided_json", "JSON"),
        ({"guided_json": "[1]"}, "guided_json", "must be a JSON object"),
        ({"json_schema": 5}, "json_schema", "must be a JSON object"),
        ({"guided_json": "{}".ljust(MAX_SCHEMA_CHARS + 1)}, "guided_json", "at most 262144"),
        ({"guided_json": "[" * 300_000}, "guided_json", "at most 262144"),
        ({"guided_json": '{"a":' * 99_999}, "guided_json", "at most 262144"),
        ({"guided_json": '{"a":' * 9_999}, "guided_json", "JSON"),
        ({"guided_json": '{"a":' * 99 + "1" + "}" * 99}, "guided_json", "nested"),
        ({"response_format": form("grammar", "root ::= x")}, "response_format", "needs a rule"),
        ({"structured_outputs": {"json": "x"}}, "structured_outputs.json", "JSON"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": "a"}, "guided_choice", "list"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"ebnf": "root ::= 'a'"}, "ebnf", "line 1"),
        ({"grammar": "root ::= x"}, "grammar", "needs a rule 'x'"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", ""),
        ({"max_tokens": 5, "n_predict": 9}, "n_predict", "max_tokens and n_predict differ"),
        ({"n": 2, "n_cmpl": 3}, "n_cmpl", "n and n_cmpl differ"),
        (
            {"repetition_penalty": 1, "repeat_penalty": 1.5},
            "repeat_penalty",
            "repetition_penalty and repeat_penalty",
        ),
        ({"n_predict": -2}, "n_predict", "or -1"),
        ({"n_cmpl": 129}, "n_cmpl", "128"),
        ({"n_probs": 21}, "n_probs", "20"),
        ({"repeat_penalty": 0}, "repeat_penalty", "greater"),
        ({"repeat_penalty": 0.001}, "repeat_penalty", "0.01"),
        ({"ignore_eos": True, "regex": "a"}, "ignore_eos", "grammar"),
        (
            {"include_stop_str_in_output": False, "no_stop_trim": True},
            "no_stop_trim",
            "include_stop_str_in_output and no_stop_trim differ",
        ),
    ],
)
def test_what_cannot_be_is_told_by_the_clients_names(
    live: Live, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    response = post(live, path, **fields)
    error = response.json()["error"]
    status = 400 if error["code"] == "invalid_grammar" else 422
    assert (response.status_code, error["param"]) == (status, param), error
    assert words in error["message"]


def test_faults_that_one_route_has(live: Live) -> None:
    for path, fields, param, words in (
        (CHAT, {"n_predict": 0}, "n_predict", "greater"),
        (CHAT, {"n_predict": 5, "max_completion_tokens": 6}, "max_completion_tokens", "n_predict"),
        (CHAT, {"logprobs": False, "n_probs": 2}, "n_probs", "logprobs and n_probs"),
        (CHAT, {"logprobs": True, "top_logprobs": 1, "n_probs": 2}, "n_probs", "top_logprobs"),
        (TEXT, {"logprobs": 1, "n_probs": 2}, "n_probs", "logprobs and n_probs differ"),
        (TEXT, {"n_cmpl": 100}, "n_cmpl", "200 answers"),
        (CHAT, {"continue_final_message": True}, "continue_final_message", "assistant"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt", "continue_final"),
    ):
        response = post(live, path, **fields)  # type: ignore[arg-type]
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (422, param), (fields, error)
        assert words in error["message"]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": CITY}}]


def test_forms_beside_tools(live: Live, engine: FakeEngine) -> None:
    own = sent(live, engine, CHAT, tools=TOOLS, response_format=SCHEMA)
    assert sent(live, engine, CHAT, tools=TOOLS, guided_json=CITY) == own
    error = post(live, CHAT, tools=TOOLS, guided_regex="a").json()["error"]
    assert error["param"] == "guided_regex"
    assert "tools" in error["message"]
    own = sent(live, engine, CHAT, tools=TOOLS, tool_choice="none", response_format=REGEX)
    assert sent(live, engine, CHAT, tools=TOOLS, tool_choice="none", regex="a+") == own


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_no_grammar_can_hold_is_named_where_the_client_has_it(live: Live, path: str) -> None:
    schema = CITY | {"minContains": 2}
    for field in ("guided_json", "json_schema"):
        response = post(live, path, **{field: schema})
        assert response.headers[IGNORED_HEADER] == f"{field}.minContains"
    response = post(live, path, structured_outputs={"json": schema})
    assert response.headers[IGNORED_HEADER] == "structured_outputs.json.minContains"
    strict = form("json_schema", schema)
    strict["json_schema"]["strict"] = True
    error = post(live, path, response_format=strict).json()["error"]
    assert error["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("path", "own", "other"),
    [
        (CHAT, {"max_tokens": 3}, {"n_predict": 3}),
        (TEXT, {"max_tokens": 0}, {"n_predict": 0}),
        (TEXT, {"max_tokens": 3}, {"n_predict": 3, "max_tokens": -1}),
        (CHAT, {"n": 3}, {"n_cmpl": 3}),
        (TEXT, {"n": 3, "seed": 4}, {"n_cmpl": 3, "seed": 4}),
        (CHAT, {"repetition_penalty": 1.5}, {"repeat_penalty": 1.5}),
        (TEXT, {"repetition_penalty": 1}, {"repeat_penalty": 1, "repetition_penalty": 1}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, {"n_probs": 2}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, {"n_probs": 2, "logprobs": True}),
        (TEXT, {"logprobs": 2}, {"n_probs": 2}),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_llama_cpps_names(
    live: Live,
    engine: FakeEngine,
    path: str,
    own: dict[str, Any],
    other: dict[str, Any],
    is_stream: bool,
) -> None:
    as_own = sent(live, engine, path, stream=is_stream, **own)
    assert sent(live, engine, path, stream=is_stream, **other) == as_own
    if not is_stream:
        replies = [post(live, path, **fields).json()["choices"] for fields in (own, other)]
        assert replies[0] == replies[1]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_ends_an_answer_may_be_part_of_it(live: Live, engine: FakeEngine, path: str) -> None:
    own = sent(live, engine, path, include_stop_str_in_output=True, stop="swims")
    assert own[0].params.include_stop_str_in_output
    assert sent(live, engine, path, no_stop_trim=True, stop="swims") == own
    plain = sent(live, engine, path, stop="swims")
    assert sent(live, engine, path, no_stop_trim=False, stop="swims") == plain


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_budget_of_reasoning(live: Live, engine: FakeEngine, path: str) -> None:
    for value, limit in ((0, 0), (7, 7), (-1, None), (None, None)):
        for request in sent(live, engine, path, thinking_token_budget=value, n=2):
            assert request.params.max_thinking_tokens == limit
    for value in (-2, 1.5, "7", True):
        error = post(live, path, thinking_token_budget=value).json()["error"]
        assert error["param"] == "thinking_token_budget"


SAID = {"role": "assistant", "content": "The whale", "reasoning_content": None}


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}, {"guided_regex": "a"}])
@pytest.mark.parametrize("thought", [None, "Hm"])
def test_the_last_message_is_continued(
    live: Live, engine: FakeEngine, more: dict[str, Any], thought: str | None
) -> None:
    last = SAID | {"reasoning_content": thought}
    messages = [*BODIES[CHAT]["messages"], last]
    fields = {name: value for name, value in more.items() if name != "add_generation_prompt"}
    prefix = [*BODIES[CHAT]["messages"], last | {"prefix": True}]
    own = sent(live, engine, CHAT, messages=prefix, **fields)
    asked = more | {"continue_final_message": True}
    assert sent(live, engine, CHAT, messages=messages, **asked) == own
    tokens = web.post(live.url + "/tokenize", json={"messages": messages, **asked}).json()
    assert tokens["tokens"] == list(own[0].prompt_ids)


def test_what_cannot_be_continued_is_refused(live: Live) -> None:
    user, calls = BODIES[CHAT]["messages"][0], {"name": "f", "arguments": "{}"}
    called = {"role": "assistant", "tool_calls": [{"id": "a", "function": calls}]}
    for messages in ([user], [SAID, user], [user, called]):
        response = post(live, CHAT, messages=messages, continue_final_message=True)
        assert response.json()["error"]["param"] == "continue_final_message"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for path in (CHAT, "/tokenize"):
        response = web.post(live.url + path, json={"messages": [user, SAID], **both})
        assert response.status_code == 422
        message = response.json()["error"]["message"]
        assert "continue_final_message" in message
        assert "add_generation_prompt" in message


def test_a_batchs_lines_have_these_fields_too(live: Live, engine: FakeEngine) -> None:
    fields = {"guided_json": CITY, "n_predict": 3, "n_cmpl": 2}
    own = {"response_format": SCHEMA, "max_tokens": 3, "n": 2}
    for path in (CHAT, TEXT):
        num_before = len(engine.requests)
        lines = [
            {"custom_id": name, "method": "POST", "url": path, "body": BODIES[path] | body}
            for name, body in (("a", fields), ("b", own), ("c", {"regex": "a", "n_probs": 21}))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        data = {"purpose": "batch"}
        file = web.post(live.url + "/v1/files", data=data, files={"file": ("in.jsonl", text)})
        batch = {"input_file_id": file.json()["id"], "endpoint": path}
        url = (
            live.url + "/v1/batches/" + web.post(live.url + "/v1/batches", json=batch).json()["id"]
        )
        wait_until(lambda url=url: web.get(url).json()["status"] == "completed")  # type: ignore[misc]
        params = [request.params for request in engine.requests[num_before:]]
        assert len(params) == (4 if path == CHAT else 8)
        assert set(params) == {params[0]}
        errors = web.get(f"{live.url}/v1/files/{web.get(url).json()['error_file_id']}/content")
        assert errors.json()["response"]["body"]["error"]["param"] == "n_probs"


@pytest.fixture(scope="module")
def real(tokenizer: Tokenizer) -> Any:
    pytest.importorskip("llguidance")
    with running(create_app(*serve_engine(make_engine(tokenizer)))) as live:
        yield live


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"guided_choice": ["whale", "sea"]}, {"whale", "sea"}),
        ({"regex": "^(whale|sea)$"}, {"whale", "sea"}),
        ({"grammar": 'root ::= "whale" | "sea"'}, {"whale", "sea"}),
        ({"guided_json": '{"enum": ["whale", 1]}'}, {'"whale"', "1"}),
    ],
)
def test_a_real_engine_writes_the_form(
    real: Live, path: str, fields: dict[str, Any], answers: set[str]
) -> None:
    fields = fields | {"temperature": 1, "n": 2, "max_tokens": 40}
    choices = post(real, path, **fields).json()["choices"]
    assert len(choices) == (2 if path == CHAT else 4)
    for choice in choices:
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) in answers
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_real_answers_stop_is_part_of_it(real: Live, path: str, is_stream: bool) -> None:
    fields: dict[str, Any] = {"regex": "[ab]{9}z[ab]{9}", "seed": 3, "stop": ["z", "q"]}
    fields |= {"prompt": "hello"} if path == TEXT else {}
    texts = []
    for keeps in (False, True):
        response = post(real, path, stream=is_stream, no_stop_trim=keeps, **fields)
        found = re.findall(r'"(?:text|content)": ?"([abz]*)"', response.text)
        texts.append("".join(found))
    assert texts[1] == texts[0] + "z"


def test_the_end_of_a_single_call_is_no_text(real: Live) -> None:
    """Also where what ends an answer is part of it: the token that ends the call does."""
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    replies = []
    for keeps in (False, True):
        reply = post(real, CHAT, include_stop_str_in_output=keeps, **fields).json()["choices"][0]
        assert reply["finish_reason"] == "tool_calls"
        (call,) = reply["message"].pop("tool_calls")
        replies.append((reply["message"], call["function"]))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_real_engine_writes_the_allowed_tokens_alone(
    real: Live, tokenizer: Tokenizer, path: str
) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "abc"]
    fields = {"temperature": 1, "max_tokens": 12, "n": 2, "logprobs": True if path == CHAT else 0}
    for end in ([], [tokenizer.eos_id]):
        choices = post(real, path, allowed_token_ids=ids + end, **fields).json()["choices"]
        for choice in choices:
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert set(text or "") <= set("abc")
            assert (choice["finish_reason"] == "length") or end
    # A grammar that leaves none of them goes before.
    choices = post(real, path, allowed_token_ids=ids, regex="z{3}").json()["choices"]
    for choice in choices:
        assert (choice["message"]["content"] if path == CHAT else choice["text"]) == "zzz"


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "required"}])
def test_reasoning_ends_at_its_budget(
    real: Live, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    """With calls that must come the smaller of the budget and their quarter counts."""
    messages = [*BODIES[CHAT]["messages"], SAID | {"prefix": True, "content": "<think>"}]
    silent = {str(tokenizer.special_ids["</think>"]): -100}
    counts = []
    for budget in (3, 60):
        fields = {"logit_bias": silent, "max_tokens": 100, "temperature": 1, "seed": 1}
        reply = post(
            real, CHAT, messages=messages, thinking_token_budget=budget, **fields, **more
        ).json()
        counts.append(reply["usage"]["completion_tokens_details"]["reasoning_tokens"])
    assert counts[0] <= 3 + 1  # the end of reasoning is one
    assert counts[1] <= (25 if more else 60) + 1
    assert counts[1] > counts[0]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_the_library_refuses_is_told_by_the_clients_name(real: Live, path: str) -> None:
    response = post(real, path, guided_regex="a(?=b)")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "guided_regex")
    assert error["code"] == "invalid_grammar"


BROKEN = ['root ::= "', "root ::= (a", 'root ::= "a" {999999999}', 'a ::= "x"', 'root ::= root "a"']


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "gbnf", [*BROKEN, "root ::= " + "a" * 32_768, "start: )", 'start: start "a"']
)
def test_every_broken_grammar_is_one_kind_of_error(real: Live, path: str, gbnf: str) -> None:
    """By whichever name, in one line, and without what the library calls its states."""
    fields: list[tuple[str, dict[str, Any]]] = [
        ("guided_grammar", {"guided_grammar": gbnf}),
        ("ebnf", {"ebnf": gbnf}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": gbnf}}),
        ("response_format", {"response_format": {"type": "grammar", "grammar": gbnf}}),
    ]
    for place, body in fields:
        response = post(real, path, **body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (
            400,
            "invalid_grammar",
            place,
        )
        assert "\n" not in error["message"]
        assert "NoExtension" not in error["message"]


def test_a_broken_regex_is_told_in_one_line(real: Live) -> None:
    for regex, words in (("(", "unclosed group"), ("[^\\s\\S]", "matches no text")):
        message = post(real, CHAT, guided_regex=regex).json()["error"]["message"]
        assert words in message
        assert "\n" not in message
        assert "NoExtension" not in message
