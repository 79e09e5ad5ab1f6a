"""Grammars of tool calls. Oracle: texts in the tokenizer's own call format, right and wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from served import make_model

from rorqual.engine.grammar import GrammarCompiler
from rorqual.serve.chat_job import chat_params
from rorqual.serve.errors import ApiError
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.tool_grammar import MARKERS, chat_grammar
from rorqual.tokenizer import Tokenizer
from tool_call_texts import render_tool_calls

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def tools(*, strict: bool = False) -> list[dict[str, Any]]:
    weather = {"name": "weather", "parameters": CITY, "strict": strict}
    return [
        {"type": "function", "function": weather},
        {"type": "function", "function": {"name": "time"}},
    ]


def calls(*pairs: tuple[str, str]) -> str:
    return render_tool_calls([{"function": {"name": n, "arguments": a}} for n, a in pairs])


OSLO = calls(("weather", '{"city": "Oslo"}'))
BOTH = calls(("weather", '{"city": "Oslo"}'), ("time", "{}"))
WRONG = calls(("weather", '{"town": "Oslo"}'))
UNKNOWN = calls(("tide", "{}"))


def accepts(tokenizer: Tokenizer, text: str, *, is_thinking: bool = False, **fields: Any) -> bool:
    """Whether the request's grammar takes the text whole and may end there."""
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": tools(), **fields}
    )
    grammar = chat_grammar(body, tokenizer, is_thinking=is_thinking)
    assert grammar is not None
    matcher = GrammarCompiler(tokenizer).compile(grammar).matcher()
    ids = tokenizer.encode(text, allow_special=True)
    if matcher.num_possible(ids) != len(ids):
        return False
    for token_id in ids:
        matcher.put(token_id)
    return bool(matcher.allowed()[tokenizer.eos_id])


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        (OSLO, True),
        (BOTH, True),
        ("<think>\nHm.\n</think>" + OSLO, False),  # only where the prompt began it
        (WRONG, False),
        (UNKNOWN, False),
        ("Let me look." + OSLO, False),
        ("No.", False),
        ("", False),
    ],
)
def test_required_is_calls_and_nothing_else(tokenizer: Tokenizer, text: str, is_good: bool) -> None:
    assert accepts(tokenizer, text, tool_choice="required") == is_good


@pytest.mark.parametrize(("text", "is_good"), [(OSLO, True), (BOTH, False), (WRONG, False)])
def test_a_named_tool_is_called_once(tokenizer: Tokenizer, text: str, is_good: bool) -> None:
    assert accepts(tokenizer, text, tool_choice=NAMED) == is_good


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("It rains.\nA lot.", True),
        ("", True),
        ("Let me look." + OSLO, True),
        (BOTH, True),
        ("Let me look." + WRONG, False),
        ("<think>Hm.</think>It rains." + OSLO, True),
    ],
)
def test_a_strict_tool_binds_free_answers(tokenizer: Tokenizer, text: str, is_good: bool) -> None:
    assert accepts(tokenizer, text, tools=tools(strict=True)) == is_good


@pytest.mark.parametrize(
    ("text", "is_good"),
    [('{"city":"Oslo"}', True), (OSLO, True), ('{"town":1}', False), ("Text.", False)],
)
def test_a_schema_beside_tools(tokenizer: Tokenizer, text: str, is_good: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": CITY}}
    assert accepts(tokenizer, text, response_format=wanted) == is_good


def test_a_prompt_that_ended_in_thought(tokenizer: Tokenizer) -> None:
    """The engine begins with the grammar behind the `</think>`."""
    for fields in ({"tool_choice": "required"}, {"tools": tools(strict=True)}):
        assert accepts(tokenizer, OSLO, is_thinking=True, **fields)
        assert not accepts(tokenizer, "Hm.</think>" + OSLO, is_thinking=True, **fields)
        thought = "<think>Hm.</think>" + OSLO
        assert not accepts(tokenizer, thought, is_thinking=True, **fields)


def test_a_regex_beside_tools_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as caught:
        accepts(tokenizer, "", response_format={"type": "regex", "regex": "a"})
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(("text", "is_good"), [(OSLO, True), (BOTH, False), (WRONG, False)])
@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tools": tools(strict=True)}])
def test_without_parallel_calls_there_is_one(
    tokenizer: Tokenizer, text: str, is_good: bool, fields: dict[str, Any]
) -> None:
    assert accepts(tokenizer, text, parallel_tool_calls=False, **fields) == is_good


def grammar_of(tokenizer: Tokenizer, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return chat_grammar(ChatRequest.model_validate(body), tokenizer, is_thinking=False)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, None),
        ({"tools": tools()}, None),
        ({"tools": tools(), "tool_choice": "auto"}, None),
        ({"tools": tools(strict=True), "tool_choice": "none"}, None),
        ({"tools": tools(), "response_format": {"type": "text"}}, None),
        ({"tools": tools(strict=True)}, "grammar"),
        # Without calls a format is only itself, whatever the tools.
        (
            {
                "tools": tools(),
                "tool_choice": "none",
                "response_format": {"type": "regex", "regex": "a"},
            },
            "regex",
        ),
        ({"response_format": {"type": "choice", "choices": ["a"]}}, "choice"),
        ({"response_format": {"type": "grammar", "grammar": "start: /a/"}}, "grammar"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema"),
    ],
)
def test_when_an_answer_is_bound(tokenizer: Tokenizer, fields: Any, kind: str | None) -> None:
    grammar = grammar_of(tokenizer, **fields)
    assert (grammar and grammar.kind) == kind


@pytest.mark.parametrize(
    ("wanted", "text", "is_good"),
    [
        ({"type": "json_object"}, '{"town":1,"a":2}', True),
        ({"type": "json_object"}, '{"town": 1}', False),
        ({"type": "json_object"}, '{"town":1, "a":2}', False),
        ({"type": "json_object"}, "[1]", False),
        ({"type": "json_object"}, BOTH, True),
        ({"type": "json_schema", "json_schema": {"schema": None}}, '{"town":1}', True),
        ({"type": "json_schema", "json_schema": {"schema": None}}, "1", False),
    ],
)
def test_any_object_beside_tools(
    tokenizer: Tokenizer, wanted: Any, text: str, is_good: bool
) -> None:
    assert accepts(tokenizer, text, response_format=wanted) == is_good


def test_calls_need_every_token_of_their_format(tokenizer: Tokenizer) -> None:
    for marker in MARKERS:
        ids = {name: i for name, i in tokenizer.special_ids.items() if name != marker}
        poor: Any = SimpleNamespace(special_ids=ids)
        assert grammar_of(poor, tools=tools()) is None
        with pytest.raises(ApiError) as caught:
            grammar_of(poor, tools=tools(), tool_choice="required")
        assert (caught.value.status, caught.value.param) == (422, "tool_choice")


@pytest.mark.parametrize(("missing", "has_think"), [("", True), ("<think>", False)])
def test_reasoning_comes_first_only_where_there_are_tokens_for_it(
    tokenizer: Tokenizer, missing: str, has_think: bool
) -> None:
    ids = {name: i for name, i in tokenizer.special_ids.items() if name != missing}
    known: Any = SimpleNamespace(special_ids=ids)
    text = grammar_of(known, tools=tools(strict=True)).text
    assert text.startswith("start: (<think>" if has_think else "start: body")
    # A call that must come is not put off.
    assert grammar_of(known, tools=tools(), tool_choice="required").text.startswith("start: body")


@pytest.mark.parametrize(
    ("num_prompt", "fields", "limit"),
    [
        (10, {"max_tokens": 40}, 10),
        (60, {"max_tokens": 41}, 10),  # 40 places are left
        (60, {}, 10),
        (10, {"max_tokens": 40, "thinking_token_budget": 7}, 7),
        (10, {"max_tokens": 40, "thinking_token_budget": 11}, 10),
        (10, {"max_tokens": 40, "thinking_token_budget": 0}, 0),
        (10, {"max_tokens": 40, "tool_choice": "auto"}, None),
        (10, {"max_tokens": 40, "tool_choice": "auto", "thinking_token_budget": 30}, 30),
        (10, {"max_tokens": 40, "tool_choice": NAMED}, 10),
    ],
)
def test_a_call_that_must_come_is_left_room(
    tokenizer: Tokenizer, num_prompt: int, fields: dict[str, Any], limit: int | None
) -> None:
    """Of what the answer has, and what the context leaves, a quarter may be thought."""
    model = make_model(tokenizer, max_positions=100)
    body = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": tools()}
        | {"tool_choice": "required"}
        | fields
    )
    prompt_ids = [5] * num_prompt
    params = chat_params(body, model, prompt_ids, is_thinking=True)
    assert params.max_thinking_tokens == limit
    params = chat_params(body, model, prompt_ids, is_thinking=False)
    assert params.max_thinking_tokens == fields.get("thinking_token_budget")
