"""Oracle: what was rendered or written out comes back; what was mangled stays in the text."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tokenizer import parse_tool_calls
from rorqual.tokenizer.special import (
    EOS,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)
from rorqual.tokenizer.tool_calls import read_marked_calls
from tool_call_texts import call, marked, render_tool_calls

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
    "a" + WHOLE.replace("<｜tool▁sep｜>", ""),
    "a" + WHOLE.replace(TOOL_CALL_BEGIN, ""),
    "a" + WHOLE.replace("f\n", " \n"),
    "a" + WHOLE.replace("function", "\n"),
    "a" + WHOLE.replace("f\n", "f" * 300 + "\n"),
]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_whole_call_stays_in_the_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


@pytest.mark.parametrize("text", BROKEN[3:])
def test_what_is_no_call_costs_no_other(text: str) -> None:
    """The next call is read, and what is none is content, its markers included."""
    if TOOL_CALL_BEGIN in text:
        text = text.removesuffix(TOOL_CALLS_END)
        expected = (text, [call("g", "{}")])
        more = WHOLE.replace("f\n", "g\n").replace('{"a": 1}', "{}").removeprefix(TOOL_CALLS_BEGIN)
        assert parse_tool_calls(text + more) == expected


def test_a_call_cut_off_loses_no_earlier_one() -> None:
    cut = "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{"
    text = "a" + WHOLE.removesuffix(TOOL_CALLS_END) + cut
    assert parse_tool_calls(text) == ("a" + cut, [call("f", '{"a": 1}')])
    unclosed = WHOLE.removesuffix(TOOL_CALLS_END)
    assert parse_tool_calls(unclosed) == ("", [call("f", '{"a": 1}')])


OPENINGS = [
    "\n```json\n", "\n``` json\n", " \n```json \n", "\n```JSON\n", "\n```\n", "\n```python\n",
    "\n```json",
    "```json\n", "\n", " ", "", "\n\n```json\n\n", "\n```json\n```json\n", "\n```json\n  ```\n",
]  # fmt: skip
CLOSINGS = [
    "\n```", "```", "\n``` ", "\n```\n", " \n```\n", " ```", "", "\n", "\n``", "\n```\n```",
    "\n``````",
]  # fmt: skip
TEXTS = ["{}", '{"a": "```", "b": "`"}', '{\n  "a": [1, 2]\n}', "{cut", '{"a": "open', "[1]"]


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_near_miss_of_a_fence_costs_nothing(opening: str) -> None:
    """Whatever stands about the arguments, the next call is whole, and they are what is inside."""
    following = [render_tool_calls([call("g", "{}")]), V31]
    cases = product(CLOSINGS, [TOOL_CALL_END, ""], [f"function{TOOL_SEP}f", f"f{TOOL_SEP}"], TEXTS)
    for closing, end, head, text in cases:
        if head.startswith("function") and not opening.endswith("\n") and text[0] != "{":
            continue  # a name goes on to the end of its line
        first = TOOL_CALL_BEGIN + head + opening + text + closing + end
        for more in following:
            whole = TOOL_CALLS_BEGIN + first + more.removeprefix(TOOL_CALLS_BEGIN)
            made = [call("f", text), call("g", "{}")]
            assert read_marked_calls(marked(whole)) == ("", made), whole


V31 = f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}g{TOOL_SEP}{{}}{TOOL_CALL_END}{TOOL_CALLS_END}"


def test_a_call_without_arguments_is_one() -> None:
    text = WHOLE.replace('\n```json\n{"a": 1}\n```', "")
    assert parse_tool_calls(text) == ("", [call("f", "")])


def test_white_space_counts_between_the_fences_of_the_format() -> None:
    for text in (" {} ", "\n{}", "{}\n", "{} \n\t", "a` ``"):
        assert parse_tool_calls(render_tool_calls([call("f", text)])) == ("", [call("f", text)])


def test_a_quoted_end_is_told_by_its_string() -> None:
    """Of a text alone; where a string is left open, the end of its line ends it."""
    for quoted in (
        f'{{"a": "{TOOL_CALL_END}"}}',
        f'{{"a\\"{TOOL_CALLS_END}": "```{TOOL_CALL_BEGIN}"}}',
    ):
        for form in (WHOLE, V31.replace("g<", "f<")):
            text = form.replace('{"a": 1}', quoted).replace("{}", quoted)
            assert parse_tool_calls(text) == ("", [call("f", quoted)])
    text = WHOLE.replace("1}", '"open').removesuffix(TOOL_CALLS_END)
    text += V31.removeprefix(TOOL_CALLS_BEGIN)
    assert parse_tool_calls(text) == ("", [call("f", '{"a": "open'), call("g", "{}")])
