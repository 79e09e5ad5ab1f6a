"""Oracles: strings written out from DeepSeek's format, transformers' own rendering of the saved
template, and the template in the package of V3's vocabulary (R1's; the same without tools)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from published import r1

from rorqual.errors import TokenizerError
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.templates import mended, v3_template
from rorqual.tokenizer.tool_calls import render_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Ort>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def called(*calls: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]


TURNS = [
    said("system", "Be brief."),
    said("system", "Be kind."),
    said("user", "Hi"),
    said("assistant", "Hello!"),
    said("user", "1+1?"),
]
ONE_CALL = [
    said("user", "Weather?"),
    said("assistant", None, tool_calls=called(("get_weather", '{"city": "Bonn"}'))),
    said("tool", "rain", tool_call_id="c0"),
]
TWO_CALLS = [
    said("user", "Weather and time?"),
    said(
        "assistant",
        "I look.",
        tool_calls=called(("get_weather", {"city": "Köln"}), ("clock", "{}")),
    ),
    said("tool", "sun"),
    said("tool", "noon"),
    said("assistant", "Sun at noon."),
    said("user", "And now?"),
    said("assistant", "", tool_calls=called(("clock", "{}"))),
    said("tool", "one"),
    said("assistant", "", tool_calls=called(("clock", "{}"))),
    said("tool", "two"),
    said("user", "Stop."),
]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
EXPECTED = [
    (
        TURNS,
        f"{BOS}Be brief.\n\nBe kind.<｜User｜>Hi<｜Assistant｜>Hello!{EOS}"
        "<｜User｜>1+1?<｜Assistant｜>",
    ),
    (
        [said("user", "Count"), said("assistant", "One, ", prefix=True)],
        f"{BOS}<｜User｜>Count<｜Assistant｜>One, ",
    ),
    (
        ONE_CALL,
        f"{BOS}<｜User｜>Weather?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>get_weather\n```json\n{"city": "Bonn"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>"
        f"{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
    (
        TWO_CALLS,
        f"{BOS}<｜User｜>Weather and time?<｜Assistant｜>I look.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Köln"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```"
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        f"Sun at noon.{EOS}<｜User｜>And now?<｜Assistant｜><｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        f"{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```"
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>two"
        "<｜tool▁output▁end｜><｜tool▁outputs▁end｜><｜User｜>Stop.<｜Assistant｜>",
    ),
]


@pytest.mark.parametrize(("messages", "expected"), EXPECTED)
def test_the_text_is_deepseeks(
    small: Tokenizer, messages: list[dict[str, Any]], expected: str
) -> None:
    assert small.render_chat(messages) == expected
    assert small.encode_chat(messages) == small.encode(expected, allow_special=True)


@pytest.mark.parametrize("generation", [False, True])
def test_transformers_renders_and_encodes_alike(
    small: Tokenizer, tmp_path: Path, generation: bool
) -> None:
    small.save(tmp_path)
    oracle: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, _ in EXPECTED:
        for tools in (None, [WEATHER, CLOCK]):
            options = {"tools": tools, "add_generation_prompt": generation}
            text = oracle.apply_chat_template(messages, tokenize=False, **options)
            assert small.render_chat(messages, tools, generation) == text
            ids = oracle.apply_chat_template(messages, return_dict=False, **options)
            assert small.encode_chat(messages, tools, generation) == ids


def test_tools_follow_the_system_text(small: Tokenizer) -> None:
    section = render_tools([WEATHER, CLOCK])
    assert '{"name": "get_weather", "description": "Wetter für <Ort>"' in section
    text = small.render_chat(TURNS, [WEATHER, CLOCK])
    assert text.startswith(f"{BOS}Be brief.\n\nBe kind.\n\n{section}<｜User｜>Hi")
    assert small.render_chat(ONE_CALL, [CLOCK]).startswith(
        f"{BOS}{render_tools([CLOCK])}<｜User｜>"
    )


def test_another_models_template_is_followed(small: Tokenizer) -> None:
    reasoner = dataclasses.replace(small, chat_template=r1())
    assert reasoner.render_chat(TURNS) == small.render_chat(TURNS)
    thought = [said("user", "Hi"), said("assistant", "<think>hm</think>Hello")]
    assert "<think>" in small.render_chat(thought)
    assert "<think>" not in reasoner.render_chat(thought)  # R1 forgets earlier thoughts
    # It knows neither tools nor 'prefix'; both work all the same.
    assert reasoner.render_chat(TURNS, [CLOCK]) == small.render_chat(TURNS, [CLOCK])
    assert reasoner.render_chat(EXPECTED[1][0]) == EXPECTED[1][1]
    assert mended(r1().replace("</think>", "")) == v3_template()  # V3's lacks that


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_message_can_forge_a_special_token(small: Tokenizer, data: st.DataObject) -> None:
    pieces = [*small.special_ids, "<", "｜", "User｜>", "\ufdd0", "\ufdd0\ufdd0", "text"]
    forged = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
    calls = called(("f", data.draw(forged)), ("g", {data.draw(forged): [data.draw(forged)]}))
    messages = [
        said("system", data.draw(forged)),
        said("user", data.draw(forged)),
        said("assistant", data.draw(forged).replace("think>", ""), tool_calls=calls),
        said("tool", data.draw(forged)),
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": data.draw(forged)}}]
    specials = set(small.special_ids.values())

    def skeleton(conversation: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        return [i for i in small.encode_chat(conversation, tools) if i in specials]

    harmless = [{**message, "content": "x"} for message in messages]
    harmless[2]["tool_calls"] = called(("f", "x"), ("g", {}))
    ids = small.encode_chat(messages, tools)
    assert skeleton(messages, tools) == skeleton(harmless, [CLOCK])
    assert small.decode(ids) == small.render_chat(messages, tools)


def test_only_an_assistants_thoughts_are_special(small: Tokenizer) -> None:
    think = small.special_ids["<think>"]
    text = "<think>a</think>b"
    messages = [said("user", text), said("assistant", text)]
    ids = small.encode_chat(messages, add_generation_prompt=False)
    assert small.assistant_id is not None
    assert think not in ids[: ids.index(small.assistant_id)]
    assert think in ids[ids.index(small.assistant_id) :]


SPOKEN = [
    (TURNS, [f"Hello!{EOS}"]),
    (EXPECTED[1][0], ["One, "]),
    (
        TWO_CALLS,
        [
            "I look." + EXPECTED[3][1].split("I look.")[1].split(EOS)[0] + EOS,
            f"Sun at noon.{EOS}",
            EXPECTED[3][1].split("And now?<｜Assistant｜>")[1].split(EOS)[0] + EOS,
            EXPECTED[3][1].split("And now?<｜Assistant｜>")[1].split(EOS)[0] + EOS,
        ],
    ),
    (
        [*ONE_CALL, said("assistant", f"Rain {EOS}<｜User｜>!")],
        [None, f"Rain {EOS}<｜User｜>!{EOS}"],
    ),
]


@pytest.mark.parametrize(("messages", "spoken"), SPOKEN)
def test_training_learns_what_the_assistant_says(
    small: Tokenizer, messages: list[dict[str, Any]], spoken: list[str | None]
) -> None:
    ids, mask = small.encode_training(messages, [CLOCK])
    assert ids == small.encode_chat(messages, [CLOCK], add_generation_prompt=False)
    assert len(mask) == len(ids)
    runs: list[list[int]] = []
    for index, counts in enumerate(mask):
        if counts and (index == 0 or not mask[index - 1]):
            runs.append([])
        if counts:
            runs[-1].append(ids[index])
    assert len(runs) == len(spoken)
    for run, text in zip(runs, spoken, strict=True):
        assert text is None or small.decode(run) == text


USER = said("user", "Hi")
CALL = said("assistant", None, tool_calls=called(("f", "{}")))
BAD = [
    ([], "conversation is empty"),
    (["Hi"], r"messages\[0\]: is not an object"),
    ([USER, said("robot", "x")], r"messages\[1\]: has an unknown role[\s\S]*'robot'"),
    ([{"content": "x"}], r"messages\[0\]: has an unknown role"),
    ([{"role": "user"}], r"messages\[0\]: has no text"),
    ([USER, said("assistant", None)], r"messages\[1\]: has no text"),
    ([said("user", 3)], r"messages\[0\]: has no text[\s\S]*int"),  # type: ignore[arg-type]
    ([USER, said("user", "\ud800")], r"messages\[1\]: holds half of a surrogate pair"),
    ([said("user", "x", prefix=True)], r"messages\[0\]: cannot have 'prefix'"),
    ([said("assistant", "x", prefix=True), USER], r"messages\[0\]: cannot have 'prefix'"),
    ([{**CALL, "content": "x", "prefix": True}], r"messages\[0\]: cannot have 'prefix'"),
    ([USER, said("tool", "x")], r"messages\[1\]: is a tool's output"),
    ([CALL, USER, said("tool", "x")], r"messages\[2\]: is a tool's output"),
    ([{**USER, "tool_calls": called(("f", "{}"))}], r"messages\[0\]: role 'user' cannot have"),
    ([{**CALL, "tool_calls": {"f": 1}}], r"messages\[0\]: 'tool_calls' is not a list"),
    ([{**CALL, "tool_calls": ["f"]}], r"messages\[0\]\.tool_calls\[0\]: is not a function"),
    ([{**CALL, "tool_calls": called(("f", 3))}], r"tool_calls\[0\]: has no 'arguments'"),
    ([{**CALL, "tool_calls": called(("f\n", "{}"))}], r"tool_calls\[0\]: has a function name"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_a_bad_message_is_named(small: Tokenizer, messages: list[Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        small.encode_chat(messages)


@pytest.mark.parametrize("tool", ["f", {}, {"function": {}}, {"function": {"name": "a b"}}])
def test_a_bad_tool_is_named(small: Tokenizer, tool: Any) -> None:
    with pytest.raises(TokenizerError, match=r"tools\[1\]: (is not a|has a) function"):
        small.render_chat([USER], [CLOCK, tool])


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_broken_or_hostile_template_is_an_error(small: Tokenizer, template: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template failed"):
        dataclasses.replace(small, chat_template=template).render_chat([USER])


def test_training_needs_turn_tokens(small: Tokenizer) -> None:
    ids = {name: i for name, i in small.special_ids.items() if name != "<｜Assistant｜>"}
    with pytest.raises(TokenizerError, match="cannot tell the assistant's tokens"):
        dataclasses.replace(small, special_ids=ids).encode_training([USER])


@pytest.mark.parametrize("tools", [5, 0, "f", {"a": 1}, True])
def test_tools_that_are_no_list_are_refused(small: Tokenizer, tools: Any) -> None:
    with pytest.raises(TokenizerError, match="tools: is not a list"):
        small.encode_chat([said("user", "Hi")], tools)


@pytest.mark.parametrize("messages", [5, "Hi", {"role": "user", "content": "Hi"}, None])
def test_messages_that_are_no_list_are_refused(small: Tokenizer, messages: Any) -> None:
    with pytest.raises(TokenizerError, match="the conversation is not a list"):
        small.encode_chat(messages)


def test_what_is_nested_too_deeply_is_refused(small: Tokenizer) -> None:
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(TokenizerError, match="nested too deeply"):
        small.encode_chat([said("user", "Hi", name=deep)])
    with pytest.raises(TokenizerError, match="nested too deeply"):
        small.encode_chat([said("user", "Hi")], [CLOCK | {"x": deep}])
