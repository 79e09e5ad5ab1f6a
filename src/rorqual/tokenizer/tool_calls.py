"""Tools in V3's prompt format: their definitions, the model's calls and the way back from text.

V3's own template never shows the model the definitions, so every engine made up a prompt for them.
Ours (`TOOLS_HEADING`, after the system text and a blank line) names the call format with V3's tool
tokens, then gives each function as one line of JSON:

    ## Tools

    You can call the functions below. To call one, reply in this format, with valid JSON:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {"argument": "value"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

    Functions:
    {"name": "get_weather", "description": "...", "parameters": {...}}

A call is `function<｜tool▁sep｜>NAME`, a newline and the arguments in a ```json fence; several
calls stand one a line. V3.1's form, `NAME<｜tool▁sep｜>{arguments}` without a fence, is read too,
never written. So are calls whose fences are not quite these: a call ends at its end token, or where
the next begins, and a fence that is missing, doubled or has blanks about it costs no call.
`chat_template.jinja` writes the same text; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from rorqual.tokenizer.marks import (
    CALL,
    CALL_OVER,
    CALLS,
    CALLS_OVER,
    MARKS,
    OVER,
    SEP,
    STRUCTURE,
    unmarked,
)
from rorqual.tokenizer.special import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)

TOOLS_HEADING = (
    "## Tools\n\n"
    "You can call the functions below. To call one, reply in this format, with valid JSON:\n"
    f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}function{TOOL_SEP}NAME\n"
    '```json\n{"argument": "value"}\n```'
    f"{TOOL_CALL_END}{TOOL_CALLS_END}\n\n"
    "Functions:"
)

_FUNCTION = "function"
_MAX_NAME = 256
_FENCE = "\n```json\n"
_FENCE_END = "\n```"
_TAG = r"```[^\S\n]*\w*[^\S\n]*"
# A fence with its line, or without the line's end; perhaps twice.
_OPENING = re.compile(rf"\s*(?:(?:{_TAG}\n|```[^\S\n]*(?:json)?[^\S\n]*)(?:\s*(?=```))?)*", re.I)
_OPENING_SO_FAR = re.compile(rf"{_OPENING.pattern}\s*(?:{_TAG}|`{{0,2}})", re.I)
_CLOSING = re.compile(r"[\s`]*+")  # from the end: from every place it takes the square of a run
_NAME = re.compile(r"[^\n{`]*")
_STRUCTURE = re.compile(f"([{STRUCTURE}])")
_NAMES = re.compile("|".join(map(re.escape, MARKS)))


def to_json(value: object) -> str:
    """One line of JSON as templates write it: keys in their order, no escapes for non-ASCII."""
    return json.dumps(value, ensure_ascii=False)


def render_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The tool section of the prompt for definitions in OpenAI's shape."""
    return "\n".join([TOOLS_HEADING, *(to_json(tool["function"]) for tool in tools)])


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Splits a whole answer into its content and its calls, in the shape of message `tool_calls`.

    `text` keeps its special tokens visible. `arguments` is the model's text without its fence, not
    checked to be JSON. What is no complete call (cut off, malformed) stays in the content, so
    nothing is lost; an end-of-sentence at the end is dropped.

    Choice: a marker inside a JSON string of the arguments is taken for text. `read_marked_calls`
    is told which markers are tokens and needs no such guess.
    """
    content, calls = read_marked_calls(_marked(text))
    return unmarked(content), calls


def read_marked_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """As `parse_tool_calls`, of a text with marks; so is the content.

    A call reaches from its first mark to the next that orders calls, whatever stands before that.
    """
    before, *pieces = _STRUCTURE.split(text.removesuffix(OVER))
    content, held = [before], ""  # what is dropped if a call follows
    calls: list[dict[str, Any]] = []
    marks, texts = pieces[::2], pieces[1::2]
    is_open = ends_call = False
    for mark, piece, next_mark in zip_longest(marks, texts, marks[1:], fillvalue=""):
        whole, just_called, ends_call = mark + piece, ends_call, False
        if mark == CALLS and next_mark == CALL and not piece.strip():
            is_open, held = True, held + whole
            continue
        header = read_call_header(piece, is_whole=True) if mark == CALL and is_open else "none"
        if isinstance(header, CallHeader) and next_mark:
            arguments = piece[header.num_chars :]
            arguments = arguments[: len(arguments) - num_closing(arguments, header)]
            function = {"name": header.name, "arguments": unmarked(arguments)}
            calls.append({"type": "function", "function": function})
            held, ends_call = "", True
            continue
        if mark == CALL_OVER and just_called:
            whole = piece
            if not piece.strip():
                held = piece
                continue
        elif mark == CALLS_OVER:
            whole, held = (piece, "") if is_open and calls else (whole, held)
            is_open = False
        content += [held, whole]
        held = ""
    return "".join([*content, held]), calls


@dataclass(frozen=True)
class CallHeader:
    """The beginning of a call, `num_chars` long after its mark; its arguments follow.

    `is_exact`: with the very fence of V3's format, so that white space in the arguments counts.
    """

    name: str
    num_chars: int
    is_exact: bool


def read_call_header(text: str, *, is_whole: bool) -> CallHeader | Literal["open", "none"]:
    """What `text`, which follows a call's mark, begins with; `is_whole`: it reaches to the next.

    "open": more text decides. "none": no call, whatever comes. White space and fences before the
    arguments belong to the header.
    """
    head, sep, body = text.partition(SEP)
    name, start = head.strip(), 0
    if "\n" in head or len(head) > _MAX_NAME:
        return "none"
    if not sep:
        return "none" if is_whole else "open"
    if name == _FUNCTION and not body.lstrip().startswith("{"):  # V3's form
        found = _NAME.match(body)
        assert found is not None, "the pattern matches every text"
        name, start = found[0].strip(), found.end()
        if not is_whole and (not body.strip() or start == len(body) <= _MAX_NAME):
            return "open"
    if not name or start > _MAX_NAME:
        return "none"
    opening = _OPENING.match(body, start)
    assert opening is not None, "the pattern matches every text"
    if not is_whole and _OPENING_SO_FAR.fullmatch(body, start):
        return "open"
    is_exact = opening[0] == _FENCE
    rest = body[opening.end() :]
    rest = rest if is_exact else rest.lstrip()
    return CallHeader(name, len(text) - len(rest), is_exact)


def num_closing(arguments: str, header: CallHeader) -> int:
    """How many characters at the end of a call are its closing fence and the white space there."""
    found = _CLOSING.match(arguments[::-1])
    assert found is not None, "the pattern matches every text"
    closing = found[0][::-1]
    is_exact = header.is_exact and closing.count("```") == 1 and closing.endswith(_FENCE_END)
    return len(_FENCE_END) if is_exact else len(closing)


def _marked(text: str) -> str:
    """Marks for the names of tokens, but for those inside a JSON string of a call's arguments."""
    parts, place = [], 0
    in_arguments = in_string = False
    for found in _NAMES.finditer(text):
        between = text[place : found.start()]
        parts.append(between)
        place = found.end()
        if in_arguments:
            in_string = _is_in_string(between, in_string)
        mark = found[0] if in_string else MARKS[found[0]]
        parts.append(mark)
        if mark == SEP:
            in_arguments = True
        elif mark in STRUCTURE:
            in_arguments = False
    return "".join([*parts, text[place:]])


def _is_in_string(text: str, is_inside: bool) -> bool:
    """Whether a JSON string is open after `text`; no string goes on over the end of a line."""
    for found in re.finditer(r'\\.|["\n]', text):
        if found[0] == '"':
            is_inside = not is_inside
        elif found[0] == "\n":
            is_inside = False
    return is_inside
