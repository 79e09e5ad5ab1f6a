"""Reasoning and grammars through the whole server, with the real engine.

Oracle: what was asked for. A random model writes anything, so an answer in the wanted form was made
by its grammar; a bias ends the reasoning where a prompt opened one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import web
from live import Live, running
from real import make_engine, serve_engine

from rorqual.serve.app import create_app
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END

CHOICES = ["yes", "no"]
CUT = [
    {"role": "user", "content": "Is the sea deep?"},
    {"role": "assistant", "content": f"{THINK_BEGIN}The sea is"},  # cut by its max_tokens
    {"role": "user", "content": "Well?"},
]
PLAIN = [{"role": "user", "content": "Well?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"],
    "additionalProperties": False}}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"],
          "additionalProperties": False}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "choice": {"response_format": {"type": "choice", "choices": CHOICES}},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    },
    "tool": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
}


@pytest.fixture(scope="module", params=["v3", "r1"])
def server(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[tuple[Live, bool]]:
    """A live server, and whether its template opens the reasoning, as R1's does."""
    is_open = request.param == "r1"
    if is_open:
        end = "{% if add_generation_prompt %}" + THINK_BEGIN + "\n{% endif %}"
        tokenizer = replace(tokenizer, chat_template=tokenizer.chat_template + end)
    with running(create_app(*serve_engine(make_engine(tokenizer, speculate=1)))) as live:
        yield live, is_open


def answer_of(live: Live, *, is_stream: bool, **body: Any) -> tuple[str, str, str, int]:
    """(reasoning, content, arguments of the calls, reasoning tokens)."""
    body = {"model": "sei", "temperature": 1, "seed": 4, "max_tokens": 120, **body}
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    reply = web.post(live.url + "/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    if is_stream:
        lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(line) for line in lines]
        messages = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        usage = chunks[-1]["usage"]
    else:
        messages, usage = [reply.json()["choices"][0]["message"]], reply.json()["usage"]
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return (
        "".join(message.get("reasoning_content") or "" for message in messages),
        "".join(message.get("content") or "" for message in messages),
        "".join(call["function"].get("arguments", "") for call in calls),
        usage["completion_tokens_details"]["reasoning_tokens"],
    )


def check_form(form: str, content: str, arguments: str) -> None:
    if form == "choice":
        assert content in CHOICES
    else:
        said = json.loads(arguments if form == "tool" else content)
        assert set(said) == {"hot"}
        assert isinstance(said["hot"], bool)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("messages", [PLAIN, CUT], ids=["plain", "after a cut"])
def test_a_grammar_holds_whatever_an_earlier_turn_was(
    server: tuple[Live, bool], tokenizer: Tokenizer, messages: Any, form: str, is_stream: bool
) -> None:
    live, is_open = server
    bias = {str(tokenizer.special_ids[THINK_END]): 100} if is_open else {}
    if not is_open:  # a forced call may come after reasoning of the model's own
        bias = {str(tokenizer.special_ids[THINK_BEGIN]): -100}
    reasoning, content, arguments, num_reasoning = answer_of(
        live, is_stream=is_stream, messages=messages, logit_bias=bias, **FORMS[form]
    )
    check_form(form, content, arguments)
    assert reasoning == ""
    assert num_reasoning == 0


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("messages", [PLAIN, CUT], ids=["plain", "after a cut"])
def test_a_prefix_of_reasoning_is_gone_on_with(
    server: tuple[Live, bool], tokenizer: Tokenizer, messages: Any, is_stream: bool
) -> None:
    live, _ = server
    turn = {"role": "assistant", "content": "", "prefix": True, "reasoning_content": "Hm"}
    banned = {str(tokenizer.eos_id): -100, str(tokenizer.special_ids[THINK_END]): -100}
    body: Any = {"messages": [*messages, turn], "max_tokens": 9, **FORMS["choice"]}
    inside = answer_of(live, is_stream=is_stream, logit_bias=banned, **body)
    assert inside[0]
    assert inside[1] in CHOICES  # just as many tokens are left as it takes, banned or not
    assert 0 < inside[3] < 9
    ended = {str(tokenizer.special_ids[THINK_END]): 100}
    reasoning, content, _, num_reasoning = answer_of(
        live, is_stream=is_stream, logit_bias=ended, **body
    )
    assert (reasoning, num_reasoning) == ("", 0)
    assert content in CHOICES


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_prefix_of_text_after_a_cut_turn_is_no_reasoning(
    server: tuple[Live, bool], is_stream: bool
) -> None:
    live, _ = server
    turn = {"role": "assistant", "content": "I say: ", "prefix": True}
    reasoning, content, _, num_reasoning = answer_of(
        live, is_stream=is_stream, messages=[*CUT, turn], **FORMS["choice"]
    )
    assert content in CHOICES
    assert (reasoning, num_reasoning) == ("", 0)
