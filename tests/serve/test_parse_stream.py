"""Oracle: `read_marked_calls` over the whole text; any cutting of a text gives the same events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.serve.parse_stream import (
    Content,
    Event,
    Reasoning,
    StreamParser,
    ToolCallArguments,
    ToolCallCut,
    ToolCallEnd,
    ToolCallStart,
    new_call_id,
)
from rorqual.tokenizer.marks import CALL_OVER, OVER, THINK, THINK_OVER, unmarked
from rorqual.tokenizer.special import (
    EOS,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)
from rorqual.tokenizer.tool_calls import read_marked_calls
from tool_call_texts import marked, render_tool_calls

V3_CALL = f'{TOOL_CALL_BEGIN}function{TOOL_SEP}get\n```json\n{{"a": "`"}}\n```{TOOL_CALL_END}'
V31_CALL = f'{TOOL_CALL_BEGIN}put{TOOL_SEP}{{"b": 2}}{TOOL_CALL_END}'
# Markers, whole calls, what surrounds them and near misses of all: random sequences of these meet
# every turn that a parser can take.
PIECES = [
    TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP, EOS,
    TOOL_CALLS_BEGIN + V3_CALL, TOOL_CALLS_BEGIN + V31_CALL, V3_CALL, V31_CALL,
    "function", f"function{TOOL_SEP}", "name", "\n```json\n", "\n```", "```", "{", "}", "{}",
    "\n", " ", "text", "<", "`", "json", "``` json", "```js", "\n ", THINK_END, "é", "\u2028",
]  # fmt: skip
# Each marker as its token, or spelled: then it is text.
texts = st.lists(st.sampled_from([*map(marked, PIECES), *PIECES[:8]]), max_size=14).map("".join)
cuts = st.randoms(use_true_random=False)


@dataclass
class ParsedAnswer:
    """A whole answer; `tool_calls` in the shape of an API message's."""

    reasoning: str | None = None
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """The answer that the events of one parser describe; a call that was cut off is content."""
    answer = ParsedAnswer()
    for event in events:
        match event:
            case Reasoning(text):
                answer.reasoning = (answer.reasoning or "") + text
            case Content(text):
                answer.content += text
            case ToolCallStart(_, call_id, name):
                function = {"name": name, "arguments": ""}
                answer.tool_calls.append({"id": call_id, "type": "function", "function": function})
            case ToolCallArguments(_, text):
                answer.tool_calls[-1]["function"]["arguments"] += text
            case ToolCallCut(_, text):
                answer.tool_calls.pop()
                answer.content += text
            case ToolCallEnd():
                pass
    return answer


def parse(parser: StreamParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.put(piece)]
    return events + parser.finish()


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring texts of one kind joined: how a text is cut may differ, nothing else."""
    joined: list[Event] = []
    for kind, group in groupby(events, key=lambda e: (type(e), getattr(e, "index", None))):
        same = list(group)
        if kind[0] in (Reasoning, Content):
            joined.append(kind[0]("".join(event.text for event in same)))  # type: ignore[union-attr]
        elif kind[0] is ToolCallArguments:
            text = "".join(event.text for event in same)  # type: ignore[union-attr]
            joined.append(ToolCallArguments(kind[1], text))
        else:
            joined += same
    return joined


def cut(text: str, random: Any) -> list[str]:
    pieces = []
    while text:
        size = random.choice([1, 1, 2, 3, 7, 30])
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def parser(**kwargs: Any) -> StreamParser:
    return StreamParser(
        **{"has_tools": True, "shows_marks": True, "make_id": lambda: "id"} | kwargs
    )


@settings(max_examples=400, deadline=None)
@given(
    text=texts,
    random=cuts,
    prefix=st.sampled_from(["", marked(TOOL_CALLS_BEGIN + V31_CALL), "Hm. "]),
)
def test_any_cutting_gives_what_the_whole_text_gives(text: str, random: Any, prefix: str) -> None:
    text = prefix + text
    events = parse(parser(), cut(text, random))
    assert merged(events) == merged(parse(parser(), [text]))
    assert all(event.text for event in events if isinstance(event, Reasoning | Content))
    content, calls = read_marked_calls(text)
    answer = collect(events)
    assert answer.reasoning is None
    assert answer.content == unmarked(content)
    assert answer.tool_calls == [{"id": "id", **call} for call in calls]
    if calls:  # with one call allowed, the first is the same and nothing follows it
        single = collect(parse(parser(is_single=True), cut(text, random)))
        assert single.tool_calls == answer.tool_calls[:1]
        assert answer.content.startswith(single.content)


thoughts = [*map(marked, PIECES), *PIECES[:8], "\n\n"]


@settings(max_examples=200, deadline=None)
@given(
    thought=st.lists(st.sampled_from(thoughts), max_size=6).map("".join),
    rest=texts,
    random=cuts,
    is_open=st.booleans(),
    is_closed=st.booleans(),
)
def test_reasoning_is_cut_off_first(
    thought: str, rest: str, random: Any, is_open: bool, is_closed: bool
) -> None:
    thought = thought.replace(THINK_OVER, "")
    text = ("" if is_open else f"\n{THINK}\n") + thought
    text += f"\n{THINK_OVER}\n\n{rest}" if is_closed else ""
    events = parse(parser(is_thinking=is_open), cut(text, random))
    assert merged(events) == merged(parse(parser(is_thinking=is_open), [text]))
    answer = collect(events)
    expected = thought if is_closed else thought.removesuffix(OVER)
    assert (answer.reasoning or "") == unmarked(expected).strip("\n")
    content, calls = read_marked_calls(rest.lstrip("\n")) if is_closed else ("", [])
    assert answer.content == unmarked(content)
    assert len(answer.tool_calls) == len(calls)


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "id", "type": "function", "function": function}


def test_arguments_come_as_they_are_written() -> None:
    """Each character as soon as it cannot be part of the end any more."""
    stream = parser()
    head = f"Look.{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}function{TOOL_SEP}f"
    assert stream.put(marked(head)) == [Content("Look.")]
    assert stream.put("\n```json\n") == []  # a second fence may follow
    assert stream.put("{") == [ToolCallStart(0, "id", "f"), ToolCallArguments(0, "{")]
    for char in '"a":"':
        assert stream.put(char) == [ToolCallArguments(0, char)]
    for char in " ```\n":
        assert stream.put(char) == []
    assert stream.put('"') == [ToolCallArguments(0, ' ```\n"')]
    assert stream.put("}") == [ToolCallArguments(0, "}")]
    assert stream.put("\n```") == []
    assert stream.put(CALL_OVER) == [ToolCallEnd(0)]
    assert stream.put(marked(V31_CALL)) == [
        ToolCallStart(1, "id", "put"),
        ToolCallArguments(1, '{"b": 2}'),
        ToolCallEnd(1),
    ]
    assert stream.put(marked(f"\n{TOOL_CALLS_END}{EOS}")) == []
    assert stream.finish() == []


def test_rendered_calls_come_back() -> None:
    calls = [{"function": {"name": n, "arguments": '{\n  "x": [1]\n}'}} for n in ("f", "g")]
    text = marked("Hm." + render_tool_calls(calls) + EOS)
    answer = collect(parse(parser(), list(text)))
    assert answer.content == "Hm."
    assert answer.tool_calls == [call(n, '{\n  "x": [1]\n}') for n in ("f", "g")]


def test_a_marker_that_is_spelled_is_text() -> None:
    """Also where it would end a call, if it were the token."""
    quoted = (
        f'{{"a": "{TOOL_CALL_END}\\n```{TOOL_CALLS_END}"}}\n```{TOOL_CALL_END}{TOOL_CALL_BEGIN}'
    )
    text = marked(f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}function{TOOL_SEP}f\n```json\n")
    text += quoted + "\n```" + marked(TOOL_CALL_END + V31_CALL + TOOL_CALLS_END)
    for pieces in (list(text), [text]):
        answer = collect(parse(parser(), pieces))
        assert answer.tool_calls == [call("f", quoted), call("put", '{"b": 2}')]
        assert answer.content == ""
    spelled = TOOL_CALLS_BEGIN + V3_CALL + TOOL_CALLS_END
    assert collect(parse(parser(), list(spelled))) == ParsedAnswer(content=spelled)
    thought = f"{THINK}a{THINK_END}b{THINK_OVER}c"
    assert collect(parse(parser(), list(thought))) == ParsedAnswer(f"a{THINK_END}b", "c")


@pytest.mark.parametrize("one", [V3_CALL, V31_CALL])
def test_a_call_cut_off_is_told_whole(one: str) -> None:
    """At every place where an answer may stop, nothing of it is lost."""
    before = marked("a" + TOOL_CALLS_BEGIN + V3_CALL + "\n")
    one = marked(one)
    for size in range(len(one)):
        events = parse(parser(), [before + one[:size]])
        answer = collect(events)
        assert answer.tool_calls == [call("get", '{"a": "`"}')]
        assert answer.content == "a\n" + unmarked(one[:size])
        has_begun = any(isinstance(e, ToolCallStart) and e.index == 1 for e in events)
        assert has_begun == any(isinstance(event, ToolCallCut) for event in events)


@settings(max_examples=200, deadline=None)
@given(text=texts, random=cuts, prefix=st.sampled_from(["", marked(TOOL_CALLS_BEGIN)]))
def test_the_beginning_of_a_call_that_never_came_is_left_out(
    text: str, random: Any, prefix: str
) -> None:
    """Oracle: the same text with it; and nothing else is left out."""
    text = prefix + text
    answer = collect(parse(parser(shows_marks=False), cut(text, random)))
    shown = collect(parse(parser(), [text]))
    assert answer.tool_calls == shown.tool_calls
    assert shown.content.startswith(answer.content)
    left_out = shown.content[len(answer.content) :].strip()
    assert left_out == "" or left_out.startswith((TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN))


@pytest.mark.parametrize("one", [V3_CALL, V31_CALL])
def test_no_mark_shows_wherever_a_call_is_cut(one: str) -> None:
    whole = marked("a" + TOOL_CALLS_BEGIN + one)
    for size in range(1, len(whole)):
        events = parse(parser(shows_marks=False), [whole[:size]])
        assert [event for event in events if isinstance(event, Content)] == [Content("a")]


def test_without_tools_calls_are_text() -> None:
    text = TOOL_CALLS_BEGIN + V3_CALL + TOOL_CALLS_END
    answer = collect(parse(parser(has_tools=False), list(marked(text + EOS))))
    assert answer == ParsedAnswer(content=text)


def test_content_does_not_wait_without_need() -> None:
    stream = parser()
    for piece in ("2 ", "< ", "3, `x`", " <｜", "x", "<"):
        assert stream.put(piece) == [Content(piece)]
    assert stream.put(" " + marked(TOOL_CALLS_BEGIN)) == [Content(" ")]
    assert stream.put("\n") == []
    assert stream.put("x") == [Content(TOOL_CALLS_BEGIN), Content("\nx")]
    assert stream.finish() == []


def test_each_call_has_its_own_id() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(call_id.startswith("call_") for call_id in ids)
