"""Every limit of the request schemas, on both sides. Oracle: docs/api.md and OpenAI's ranges."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rorqual.serve.schemas_batches import BatchLine
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_completions import CompletionRequest, TokenizeRequest

HELLO = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"messages": HELLO}
TEXT: dict[str, Any] = {"prompt": "hello"}
LINE: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {},
}


def is_taken(schema: type[BaseModel], body: dict[str, Any]) -> bool:
    try:
        schema.model_validate(body)
    except ValidationError:
        return False
    return True


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def nested(depth: int) -> dict[str, Any]:
    """An object with so many inside each other, lists among them."""
    value: Any = {}
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else {"a": [], "b": value}
    return value


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 2], [-0.01, 2.01]),
        ("top_p", [0.001, 1], [0, 1.001]),
        ("min_p", [0, 1], [-0.01, 1.01]),
        ("top_k", [-1, 0, 1, 2**63 - 1], [-2, 2**63]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01]),
        ("repetition_penalty", [0.01, 100], [0, 100.1]),
        ("max_tokens", [-1, 1, 2**63 - 1], [-2, 2**63]),
        ("n", [1, 128], [0, 129]),
        ("seed", [-(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64]),
        ("stop", ["a", ["a"] * 16, ["a" * 1024], []], ["", ["a"] * 17, ["a" * 1025], [""]]),
        (
            "logit_bias",
            [{"0": -100, "999999999": 100}, {str(i): 0 for i in range(1024)}, {}],
            [
                {"1": -100.5},
                {"1": 100.5},
                {"1234567890": 0},
                {"-1": 0},
                {"²": 0},
                {"": 0},
                {"1": 0, "x": 1},
                {str(i): 0 for i in range(1025)},
            ],
        ),
    ],
)
def test_what_sampling_takes_and_refuses(field: str, good: list[Any], bad: list[Any]) -> None:
    for schema, body in ((ChatRequest, CHAT), (CompletionRequest, TEXT)):
        for value in [*good, None]:
            assert is_taken(schema, {**body, field: value}), (schema, value)
        for value in bad:
            assert not is_taken(schema, {**body, field: value}), (schema, value)


@pytest.mark.parametrize(
    ("fields", "is_good"),
    [
        ({"max_tokens": 0}, False),
        ({"max_completion_tokens": 1}, True),
        ({"max_completion_tokens": 0}, False),
        ({"max_tokens": 5, "max_completion_tokens": 5}, True),
        ({"max_tokens": 5, "max_completion_tokens": 6}, False),
        ({"logprobs": True, "top_logprobs": 20}, True),
        ({"logprobs": True, "top_logprobs": 21}, False),
        ({"logprobs": True, "top_logprobs": -1}, False),
        ({"logprobs": False, "top_logprobs": 0}, True),
        ({"stream": True, "stream_options": {}}, True),
        ({"logprobs": False, "top_logprobs": 1}, False),
        ({"stream": False, "stream_options": {}}, True),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, True),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, True),
        ({"tools": [tool(f"t{n}") for n in range(128)]}, True),
        ({"tools": [tool(f"t{n}") for n in range(129)]}, False),
        ({"tools": [tool("a"), tool("b"), tool("a")]}, False),
        ({"tools": [tool("a" * 256)]}, True),
        ({"tools": [tool("a" * 257)]}, False),
        ({"tools": [tool("Az_09.-")]}, True),
        ({"tools": [tool("a b"), tool("天気")]}, True),
        ({"tools": [tool("")]}, False),
        ({"tools": [], "tool_choice": "auto"}, True),
        ({"tool_choice": "auto"}, True),
        ({"tool_choice": "none"}, True),
        ({"tools": [tool("a")], "tool_choice": "auto"}, True),
        ({"tools": [tool("a"), tool("b")], "tool_choice": tool("b")}, True),
        ({"tools": [tool("a"), tool("b")], "tool_choice": tool("c")}, False),
        ({"messages": HELLO * 10_000}, True),
        ({"messages": HELLO * 10_001}, False),
        ({"response_format": {"type": "regex", "regex": "a" * 10_000}}, True),
        ({"response_format": {"type": "regex", "regex": "a" * 10_001}}, False),
        ({"response_format": {"type": "regex", "regex": ""}}, False),
        ({"response_format": {"type": "choice", "choices": ["a"] * 1000}}, True),
        ({"response_format": {"type": "choice", "choices": ["a"] * 1001}}, False),
        ({"response_format": {"type": "choice", "choices": []}}, False),
        ({"response_format": {"type": "grammar", "grammar": "a" * 100_000}}, True),
        ({"response_format": {"type": "grammar", "grammar": "a" * 100_001}}, False),
        ({"response_format": {"type": "grammar", "grammar": ""}}, False),
    ],
)
def test_what_a_chat_takes_and_refuses(fields: dict[str, Any], is_good: bool) -> None:
    assert is_taken(ChatRequest, CHAT | fields) == is_good


@pytest.mark.parametrize(
    ("fields", "is_good"),
    [
        ({"max_tokens": 0}, True),
        ({"logprobs": 0}, True),
        ({"logprobs": 20}, True),
        ({"logprobs": 21}, False),
        ({"logprobs": -1}, False),
        ({"prompt": "", "suffix": ""}, True),
        ({"echo": True, "suffix": ""}, True),
        ({"echo": True, "suffix": "x"}, False),
        ({"echo": False, "suffix": "x"}, True),
        ({"stream_options": {}}, True),
        ({"prompt": ["a"] * 128}, True),
        ({"prompt": ["a"] * 129}, False),
        ({"prompt": ["a"] * 64, "n": 2}, True),
        ({"prompt": ["a"] * 65, "n": 2}, False),
        ({"prompt": [[1]] * 64, "n": 2}, True),
        ({"prompt": [[1]] * 65, "n": 2}, False),
        ({"prompt": [[1]] * 129}, False),
        ({"prompt": [1] * 1000, "n": 128}, True),  # one prompt of many ids
        ({"prompt": [0]}, True),
        ({"prompt": [2**63 - 1]}, True),
        ({"prompt": [2**63]}, False),
        ({"prompt": [1, -1]}, False),
        ({"prompt": [[1], []]}, False),
    ],
)
def test_what_a_completion_takes_and_refuses(fields: dict[str, Any], is_good: bool) -> None:
    assert is_taken(CompletionRequest, TEXT | fields) == is_good


@pytest.mark.parametrize("depth", [1, 2, 63, 64, 65, 66, 200])
def test_objects_are_nested_so_deep_and_no_deeper(depth: int) -> None:
    schema = {"type": "function", "function": {"name": "a", "parameters": nested(depth)}}
    assert is_taken(ChatRequest, CHAT | {"tools": [schema]}) == (depth <= 64)
    assert is_taken(TokenizeRequest, {"messages": [nested(depth)]}) == (depth <= 64)


@pytest.mark.parametrize(
    ("body", "is_good"),
    [
        ({"prompt": ""}, True),
        ({"messages": HELLO}, True),
        ({"messages": []}, False),
        ({}, False),
        ({"prompt": "", "messages": HELLO}, False),
        ({"prompt": "a", "tools": []}, False),
        ({"messages": HELLO, "tools": []}, True),
    ],
)
def test_tokens_are_asked_of_one_source(body: dict[str, Any], is_good: bool) -> None:
    assert is_taken(TokenizeRequest, body) == is_good


@pytest.mark.parametrize(
    ("changes", "is_good"),
    [
        ({"custom_id": "a" * 512}, True),
        ({"custom_id": "a" * 513}, False),
        ({"custom_id": ""}, False),
        ({"method": "PUT"}, False),
        ({"url": "/v1/models"}, False),
        ({"body": []}, True),  # what is wrong with it is the answer of its line
        ({"extra": 1}, False),
    ],
)
def test_what_a_line_of_a_batch_is(changes: dict[str, Any], is_good: bool) -> None:
    assert is_taken(BatchLine, LINE | changes) == is_good
