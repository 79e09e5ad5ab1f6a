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
never written.
`chat_template.jinja` writes the same text; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.tokenizer.special import (
    EOS,
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
_FENCE = "\n```json\n"
_FENCE_END = f"\n```{TOOL_CALL_END}"
# A name stands on one line and has something in it; `{` begins V3.1's arguments.
_NAME = r"[^\S\n]*[^\s<{][^\n<{]*"
# Choice: the fence must close right before the end token. Valid JSON holds no raw newline inside a
# string, so no argument, not even one that quotes these tokens, can end its own call early.
_CALL = re.compile(
    rf"\s*{TOOL_CALL_BEGIN}(?:"
    rf"{_FUNCTION}{TOOL_SEP}(?P<name>{_NAME}){_FENCE}(?P<arguments>.*?)\n```"
    rf"|(?P<name31>{_NAME}){TOOL_SEP}\s*(?P<arguments31>\{{(?:(?!{TOOL_CALL_END}).)*)"
    rf"){TOOL_CALL_END}",
    re.DOTALL,
)
_CALLS_START = re.compile(rf"{TOOL_CALLS_BEGIN}(?=\s*{TOOL_CALL_BEGIN})")


def to_json(value: object) -> str:
    """One line of JSON as templates write it: keys in their order, no escapes for non-ASCII."""
    return json.dumps(value, ensure_ascii=False)


def render_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The tool section of the prompt for definitions in OpenAI's shape."""
    return "\n".join([TOOLS_HEADING, *(to_json(tool["function"]) for tool in tools)])


def render_tool_calls(calls: Sequence[dict[str, Any]]) -> str:
    """The calls of one assistant message; arguments that are text go in unchanged."""
    rendered = []
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else to_json(arguments)
        rendered.append(
            f"{TOOL_CALL_BEGIN}function{TOOL_SEP}{name}\n```json\n{text}\n```{TOOL_CALL_END}"
        )
    return TOOL_CALLS_BEGIN + "\n".join(rendered) + TOOL_CALLS_END


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Splits a whole answer into its content and its calls, in the shape of message `tool_calls`.

    `text` keeps its special tokens visible. `arguments` is the model's text, not checked to be
    JSON. What is no complete call (cut off, malformed) stays in the content, so nothing is lost; an
    end-of-sentence at the end is dropped.
    """
    text = text.removesuffix(EOS)
    start = _CALLS_START.search(text)
    if start is None:
        return text, []
    calls = []
    end = start.end()
    while match := _CALL.match(text, end):
        name = match["name"] or match["name31"]
        arguments = match["arguments"] if match["name"] else match["arguments31"]
        function = {"name": name.strip(), "arguments": arguments}
        calls.append({"type": "function", "function": function})
        end = match.end()
    if not calls:
        return text, []
    rest = re.sub(rf"^\s*{TOOL_CALLS_END}", "", text[end:])
    return text[: start.start()] + rest, calls


@dataclass(frozen=True)
class CallHeader:
    """The beginning of a call, `num_chars` long; its arguments follow, up to the text `end`."""

    name: str
    num_chars: int
    end: str


def read_call_header(text: str) -> CallHeader | Literal["open", "none"]:
    """For a reader of a stream: what `text`, which comes where a call may begin, is so far.

    "open": more text decides. "none": no call, whatever comes. The forms are `parse_tool_calls`'s.
    """
    rest = text.lstrip()
    if not rest.startswith(TOOL_CALL_BEGIN):
        return "open" if TOOL_CALL_BEGIN.startswith(rest) else "none"
    name, sep, after = rest.removeprefix(TOOL_CALL_BEGIN).partition(TOOL_SEP)
    if not sep:
        return _open_name(name, TOOL_SEP)
    if not re.fullmatch(_NAME, name):
        return "none"
    arguments = after.lstrip()
    if arguments.startswith("{"):  # V3.1's form
        return CallHeader(name.strip(), len(text) - len(arguments), TOOL_CALL_END)
    if name != _FUNCTION or not arguments:
        return "none" if arguments else "open"
    name, fence, after = after.partition(_FENCE)
    if not fence:
        return _open_name(name, _FENCE)
    if not re.fullmatch(_NAME, name):
        return "none"
    return CallHeader(name.strip(), len(text) - len(after), _FENCE_END)


def _open_name(text: str, end: str) -> Literal["open", "none"]:
    """Whether `text` may become a name with `end` behind it."""
    cut = text.find(end[0])
    name, rest = (text, "") if cut < 0 else (text[:cut], text[cut:])
    # One letter more makes a name of what is only spaces so far.
    is_name = re.fullmatch(_NAME, name if rest else name + "x")
    return "open" if is_name and end.startswith(rest) else "none"
