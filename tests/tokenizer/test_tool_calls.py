"""Oracle: what was rendered or written out comes back; what was mangled stays in the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tokenizer import parse_tool_calls
from rorqual.tokenizer.special import EOS, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALLS_END
from rorqual.tokenizer.tool_calls import render_tool_calls

json_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from([TOOL_CALL_END, TOOL_CALLS_END, "\n```", f"\n```{TOOL_CALL_END}", EOS]),
)
arguments = st.builds(
    lambda value, indent: json.dumps(value, ensure_ascii=False, indent=indent),
    st.dictionaries(json_text, json_text | st.integers() | st.lists(json_text, max_size=2)),
    st.sampled_from([None, 2]),
)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
calls = st.builds(
    lambda name, text: {"type": "function", "function": {"name": name, "arguments": text}},
    names,
    arguments,
)


def call(name: str, text: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": text}}


@settings(max_examples=100, deadline=None)
@given(content=st.text(max_size=10), made=st.lists(calls, min_size=1, max_size=3))
def test_calls_come_back_whole(content: str, made: list[dict[str, Any]]) -> None:
    text = content + render_tool_calls(made)
    assert parse_tool_calls(text) == (content, made)
    assert parse_tool_calls(text + EOS) == (content, made)


def test_arguments_given_as_an_object_come_back_as_json() -> None:
    _, parsed = parse_tool_calls(render_tool_calls([call("f", {"ü": [1]})]))  # type: ignore[arg-type]
    assert parsed == [call("f", '{"ü": [1]}')]


def test_an_empty_fence_is_empty_arguments_and_not_none() -> None:
    made = [{"type": "function", "function": {"name": "look", "arguments": ""}}]
    assert parse_tool_calls(render_tool_calls(made)) == ("", made)


def test_text_without_calls_is_content() -> None:
    assert parse_tool_calls("Hello." + EOS) == ("Hello.", [])
    assert parse_tool_calls("") == ("", [])


def test_the_form_of_v3_1_is_read() -> None:
    text = (
        'Look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert parse_tool_calls(text) == ("Look.", [call("f", '{"a": 1}'), call("g", "{}")])


WHOLE = render_tool_calls([call("f", '{"a": 1}')])
BROKEN = [
    "a<｜tool▁calls▁begin｜>",
    "a<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
    "a" + WHOLE[: WHOLE.index("```<")],
    "a" + WHOLE.replace("\n```json\n", " "),
    "a" + WHOLE.replace("<｜tool▁sep｜>", ""),
    "a" + WHOLE.replace(TOOL_CALL_BEGIN, ""),
    "a" + WHOLE.replace("f\n", " \n"),
]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_whole_call_stays_in_the_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


def test_a_call_cut_off_loses_no_earlier_one() -> None:
    cut = "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{"
    text = "a" + WHOLE.removesuffix(TOOL_CALLS_END) + cut
    assert parse_tool_calls(text) == ("a" + cut, [call("f", '{"a": 1}')])
    unclosed = WHOLE.removesuffix(TOOL_CALLS_END)
    assert parse_tool_calls(unclosed) == ("", [call("f", '{"a": 1}')])
