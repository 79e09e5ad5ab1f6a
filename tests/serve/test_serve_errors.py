"""Every refusal: its status, its body, and the name of the field at fault."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest
import web
from fake_engine import FakeEngine
from live import Live
from openai import OpenAI
from served import CONTEXT

pytestmark = pytest.mark.concurrency

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def post(live: Live, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    return web.post(live.url + path, json=body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"parallel_tool_calls": "no way"}, "parallel_tool_calls", "boolean"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"stop": [str(number) for number in range(17)]}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "outside -100..100"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"tools": [TOOL] * 2}, "tools", "two tools are named 'weather'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice", "'required'"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "no tool",
        ),
        ({"user": 5}, "user", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "regex"}}, "response_format.regex", "missing"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "differ"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "'tool'"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0]",
            "'image_url' are not supported",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ],
)
def test_a_wrong_field_is_named(live: Live, fields: Any, param: str, words: str) -> None:
    response = post(live, {"messages": HELLO} | fields)
    error = error_of(response)
    assert response.status_code == 422, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "no call"),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "b", "content": "x"},
            ],
            "no call",
        ),
        ([{"role": "assistant", "content": "x", "prefix": True}, *HELLO], "prefix"),
        ([{"role": "assistant", "content": None}], "no text"),
    ],
)
def test_a_conversation_that_cannot_be_written(live: Live, messages: Any, words: str) -> None:
    response = post(live, {"messages": messages})
    error = error_of(response)
    assert response.status_code == 400, error
    assert words in error["message"]
    assert str(error["param"]).startswith("messages")


def test_half_a_surrogate_pair_is_refused(live: Live) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]})
    response = web.post(
        live.url + "/v1/chat/completions",
        content=text,
        headers={"content-type": "application/json"},
    )
    assert response.status_code in (400, 422)
    assert error_of(response)["param"].startswith("messages[0]")


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"{", "application/json", "property name"),
        (b'{"a": 1} x', "application/json", "Extra data"),
        (b'{"a": "\xff"}', "application/json", "not UTF-8 (byte 7)"),
        (b"[" * 100_000, "application/json", "nested too deeply"),
        (b'{"a": ' * 100_000, "application/json", "nested too deeply"),
        (b"1" * 5000, "application/json", "too many digits"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "application/json", "too many digits"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'"hello"', "application/json", "must be a JSON object"),
        (b"", "application/json", "is empty"),
        (b'{"messages": []}', "text/plain", "content-type: application/json"),
        (b'{"messages": []}', "", "content-type: application/json"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(
    live: Live, content: bytes, kind: str, words: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    response = web.post(live.url + "/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert words in error_of(response)["message"]


def test_deep_nesting_is_refused(live: Live) -> None:
    for depth in (65, 400, 900):
        parameters: Any = {}
        for _ in range(depth):
            parameters = {"properties": parameters}
        tool = {"type": "function", "function": {"name": "deep", "parameters": parameters}}
        response = post(live, {"messages": HELLO, "tools": [tool]})
        assert response.status_code in (400, 422)
        assert post(live, {"messages": [parameters]}, "/tokenize").status_code in (400, 422)


def test_nan_is_no_temperature(live: Live) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        text = json.dumps({"messages": HELLO, "temperature": 0}).replace(": 0", f": {number}")
        headers = {"content-type": "application/json"}
        url = live.url + "/v1/chat/completions"
        assert web.post(url, content=text, headers=headers).status_code == 422


@pytest.mark.parametrize(
    ("value", "inner"),
    [
        ("[1, NaN]", "[1]"), ('{"b": {"c": -Infinity}}', ".b.c"), ('[[], {"b": 1e999}]', "[1].b"),
        ("1" * 400 + ".5", ""), ('"\\ud800"', ""), ('["\\ud83d\\ude00", "\\ude00"]', "[1]"),
        ('{"\\udfff": 1}', ".\udfff"), ('{"b": ["x\\uD83Dx"]}', ".b[0]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/responses", '"input": "hello", "metadata": {"a": ?}'),
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "a"}], "a": ?'),
        ("/v1/completions", '"prompt": "hello", "metadata": {"a": ?}'),
        ("/v1/messages/count_tokens", '"messages": [{"role": "user", "content": "a"}], "a": ?'),
        ("/tokenize", '"prompt": "hello", "a": ?'),
    ],
)
def test_what_no_reply_could_repeat_is_refused(
    live: Live, route: str, body: str, value: str, inner: str
) -> None:
    """RFC 8259 has neither numbers without end nor, in UTF-8, half a surrogate pair."""
    headers = {"content-type": "application/json"}
    content = "{" + body.replace("?", value) + "}"
    response = web.post(live.url + route, content=content, headers=headers)
    error = response.json()["error"]
    assert response.status_code == (400 if "messages/" in route else 422), error
    place = ("metadata.a" if "metadata" in body else "a") + inner
    assert error["message"].startswith(place + ": ")
    assert error.get("param", place) == place


@pytest.mark.parametrize("num_digits", [1, 2, 9, 10, 99, 199, 200, 209, 210, 211, 299, 300, 308])
@pytest.mark.parametrize("exponent", ["e{}", ".5E+{}", ".0e00{}"])
def test_every_number_without_end_is_refused(live: Live, num_digits: int, exponent: str) -> None:
    """With the least exponent that makes one of so many digits."""
    number = "2" * num_digits + exponent.format(309 - num_digits)
    assert math.isinf(float(number))
    headers = {"content-type": "application/json"}
    content = f'{{"prompt": "hello", "a": [-{number}]}}'
    response = web.post(live.url + "/tokenize", content=content, headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (422, "a[0]")


def test_a_pair_of_surrogates_is_a_letter(live: Live) -> None:
    content = r'{"prompt": "\ud83d\udc33\ud83D\uDC33 NaN Infinity 1e999"}'
    headers = {"content-type": "application/json"}
    assert web.post(live.url + "/tokenize", content=content, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "messages": HELLO}, "messages"),
        ({"prompt": "x", "echo": True, "suffix": "y"}, "suffix"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
    ],
)
def test_a_wrong_completion_is_named(live: Live, body: Any, param: str) -> None:
    response = post(live, body, "/v1/completions")
    assert response.status_code == 422, response.text
    assert error_of(response)["param"] == param


def test_a_prompt_that_cannot_be_answered_is_400(live: Live) -> None:
    long = post(live, {"prompt": [5] * CONTEXT}, "/v1/completions")
    assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")
    assert error_of(long)["param"] == "prompt"
    unknown = post(live, {"prompt": [10**6]}, "/v1/completions")
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "prompt")


def test_unknown_models_and_routes_are_404(live: Live) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = {"model": "gpt-4", "messages": HELLO, "prompt": "x"}
        del body["prompt" if "chat" in path else "messages"]
        response = post(live, body, path)
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        assert error_of(response)["param"] == "model"
    for path in ("/v1/models/gpt-4", "/v1/images", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert error_of(web.get(live.url + path))["type"] == "not_found_error"
    assert web.get(live.url + "/v1/completions").status_code == 405


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="temperature") as caught:
        client.chat.completions.create(model="sei", messages=HELLO, temperature=9)  # type: ignore[arg-type]
    assert caught.value.param == "temperature"


def test_a_bug_is_a_500_without_details(live: Live, client: OpenAI, engine: FakeEngine) -> None:
    engine.problem = ZeroDivisionError("a secret")
    try:
        response = post(live, {"messages": HELLO})
        streamed = post(live, {"messages": HELLO, "stream": True})
    finally:
        engine.problem = None
    for got in (response, streamed):
        assert got.status_code == 500
        assert error_of(got)["code"] == "internal_error"
        assert "secret" not in got.text
    assert post(live, {"messages": HELLO}).status_code == 200
