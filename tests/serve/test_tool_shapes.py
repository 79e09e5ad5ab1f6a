"""Custom tools, allowed tools, and names of any characters. Oracle: a scripted model's calls, which
know functions and plain names only, and OpenAI's shapes read by its client.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, running
from openai import OpenAI
from served import make_model

from patience import HANG_SECONDS
from rorqual.serve.app import create_app
from rorqual.serve.tool_shapes import input_of, safe_names
from rorqual.tokenizer import Tokenizer
from tool_call_texts import call, render_tool_calls

pytestmark = pytest.mark.concurrency


SCRIPT = {
    "run it": render_tool_calls([call("shell", '{"input": "ls \\"a\\"\\n-l"}')]),
    "both kinds": render_tool_calls([call("shell", '{"input": "x"}'), call("look_up", '{"q": 1}')]),
    "odd input": render_tool_calls([call("shell", '{"command": 1}')]),
    "cut off": render_tool_calls([call("shell", '{"input": "never')]).split("never")[0],
    "strange": render_tool_calls([call("look_up", "{}"), call("look_up_2", "{}"), call("x", "{}")]),
}
SHELL: dict[str, Any] = {"type": "custom", "custom": {"name": "shell", "description": "Runs."}}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look up"}}
LOOK_TOO: dict[str, Any] = {"type": "function", "function": {"name": "look/up"}}


@pytest.fixture(scope="module")
def shaped(tokenizer: Tokenizer) -> Any:
    engine = FakeEngine(tokenizer, SCRIPT, step_tokens=3)
    with running(create_app(engine, make_model(tokenizer))) as live:
        yield live, engine


@pytest.fixture(scope="module")
def asking(shaped: tuple[Live, FakeEngine]) -> OpenAI:
    url = shaped[0].url + "/v1"
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=HANG_SECONDS)


def ask(client: OpenAI, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="sei", messages=messages, **fields)


def calls_of(client: OpenAI, text: str, *, is_stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """Type, name and text of each call, the same way of a stream."""
    if not is_stream:
        calls = ask(client, text, **fields).choices[0].message.tool_calls
        return [shown(each.model_dump()) for each in calls]
    whole: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, text, stream=True, **fields):
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                given = delta.model_dump(exclude_none=True)
                known = whole.setdefault(given["index"], {"type": given.get("type")})
                part = known.setdefault(known["type"], {})
                for key, value in given[known["type"]].items():
                    part[key] = part.get(key, "") + value
    return [shown(each) for _, each in sorted(whole.items())]


def shown(each: dict[str, Any]) -> dict[str, Any]:
    return {"type": each["type"], **each[each["type"]]}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_custom_tool_is_given_text(asking: OpenAI, is_stream: bool) -> None:
    tools = [SHELL, LOOK]
    expected = {"type": "custom", "name": "shell", "input": 'ls "a"\n-l'}
    assert calls_of(asking, "run it", is_stream=is_stream, tools=tools) == [expected]
    both = calls_of(asking, "both kinds", is_stream=is_stream, tools=tools)
    assert both == [
        {"type": "custom", "name": "shell", "input": "x"},
        {"type": "function", "name": "look up", "arguments": '{"q": 1}'},
    ]
    odd = calls_of(asking, "odd input", is_stream=is_stream, tools=tools)
    assert odd == [{"type": "custom", "name": "shell", "input": '{"command": 1}'}]
    cut = calls_of(asking, "cut off", is_stream=is_stream, tools=tools)
    assert [each["name"] for each in cut] == ["shell"]


def test_a_custom_call_may_be_the_history(shaped: tuple[Live, FakeEngine]) -> None:
    live, engine = shaped
    prompts = []
    custom = {"id": "a", "type": "custom", "custom": {"name": "shell", "input": "ls é"}}
    function = call("shell", '{"input": "ls é"}') | {"id": "a"}
    for each in (custom, function):
        messages: list[Any] = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [each]},
            {"role": "tool", "tool_call_id": "a", "content": "done"},
        ]
        body = {"messages": messages, "tools": [SHELL]}
        assert web.post(live.url + "/v1/chat/completions", json=body).status_code == 200
        prompts.append(engine.requests[-1].prompt_ids)
    assert prompts[0] == prompts[1]
    assert '{"name": "shell", "description": "Runs."' in engine.tokenizer.decode(prompts[0])


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_names_come_back_as_they_were(asking: OpenAI, is_stream: bool, n: int) -> None:
    tools = [LOOK, LOOK_TOO]
    calls = calls_of(asking, "strange", is_stream=is_stream, tools=tools, n=n)
    names = [each["name"] for each in calls[:3]]
    # An answer's stream with n = 2 puts the same call together twice.
    expected = ["look up", "look/up", "x"]
    assert names == ([name * 2 for name in expected] if is_stream and n == 2 else expected)


def test_a_name_of_the_history_and_of_the_choice_is_written_alike(
    shaped: tuple[Live, FakeEngine],
) -> None:
    live, engine = shaped
    body = {
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    call("look/up", "{}") | {"id": "a"},
                    call("天気", "{}") | {"id": "b"},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "1"},
            {"role": "tool", "tool_call_id": "b", "content": "2"},
        ],
        "tools": [LOOK, LOOK_TOO],
        "tool_choice": {"type": "function", "function": {"name": "look/up"}},
    }
    response = web.post(live.url + "/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text = engine.tokenizer.decode(engine.requests[-1].prompt_ids)
    assert "sep｜>look_up_2\n" in text
    assert "sep｜>tool\n" in text
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert "look_up_2" in grammar.text
    assert "look_up\\n" not in grammar.text


@pytest.mark.parametrize(
    ("names", "writings"),
    [
        (["a", "b.c-d_9"], ["a", "b.c-d_9"]),
        (["a b", "a_b", "a/b"], ["a_b_2", "a_b", "a_b_3"]),
        (["天気", "気"], ["tool", "tool_2"]),
        (["a b", "a b"], ["a_b", "a_b"]),
        (["x<｜tool▁sep｜>\n{"], ["x__tool_sep____"]),
    ],
)
def test_safe_names(names: list[str], writings: list[str]) -> None:
    found = safe_names(names)
    assert [found[name] for name in names] == writings
    assert len(set(found.values())) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a"}', "a"),
        ('{"input": ""}', ""),
        ('{"input": 5}', '{"input": 5}'),
        ("{", "{"),
        ("[" * 9999, "[" * 9999),
    ],
)
def test_what_a_custom_tool_is_given(arguments: str, text: str) -> None:
    assert input_of(arguments) == text


def test_only_allowed_tools_are_shown(shaped: tuple[Live, FakeEngine]) -> None:
    live, engine = shaped
    for mode in ("auto", "required"):
        tools = [{"type": "custom", "custom": {"name": "shell"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        prompts = []
        for fields in (
            {
                "tools": [LOOK, SHELL],
                "tool_choice": choice,
            },
            {"tools": [SHELL], "tool_choice": mode},
        ):
            body = {"messages": [{"role": "user", "content": "hi"}]} | fields
            assert web.post(live.url + "/v1/chat/completions", json=body).status_code == 200
            prompts.append(engine.requests[-1])
        assert prompts[0] == prompts[1]
        assert (prompts[0].params.grammar is None) == (mode == "auto")


def test_a_regex_of_a_custom_tool_is_enforced(shaped: tuple[Live, FakeEngine]) -> None:
    live, engine = shaped
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a|bc"}}
    tool = {"type": "custom", "custom": {"name": "shell", "format": form}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    assert web.post(live.url + "/v1/chat/completions", json=body).status_code == 200
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert json.dumps("^(?:a|bc)$") in grammar.text


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0]", "custom.name"),
        (
            {
                "tools": [
                    {
                        "type": "custom",
                        "custom": {
                            "name": "a",
                            "format": {
                                "type": "grammar",
                                "grammar": {"syntax": "lark", "definition": "x"},
                            },
                        },
                    }
                ]
            },
            "tools[0]",
            "custom.format",
        ),
        ({"tools": [SHELL, SHELL]}, "tools", "two tools are named 'shell'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'custom'"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", ""),
        (
            {
                "tools": [LOOK],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "x"}}],
                    },
                },
            },
            "tool_choice",
            "'x', which is no tool",
        ),
        (
            {
                "tools": [LOOK],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": []},
                },
            },
            "tool_choice",
            "needs tools",
        ),
        (
            {"tools": [LOOK], "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
            "tool_choice",
            "no tool",
        ),
        (
            {"tools": [LOOK], "tool_choice": {"type": "custom"}},
            "tool_choice.function",
            "",
        ),
    ],
)
def test_shapes_that_cannot_be(
    shaped: tuple[Live, FakeEngine], fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    response = web.post(shaped[0].url + "/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (422, param), error
    assert words in error["message"]
