"""Tool calls, and their texts as a model with V3's template writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rorqual.tokenizer.marks import MARKS
from rorqual.tokenizer.special import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)


def call(name: str, arguments: str) -> dict[str, Any]:
    """A call in OpenAI's shape, without an id."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def render_tool_calls(calls: Sequence[dict[str, Any]]) -> str:
    """The calls of one assistant message; arguments that are text go in unchanged."""
    rendered = []
    for each in calls:
        name, arguments = each["function"]["name"], each["function"]["arguments"]
        is_text = isinstance(arguments, str)
        text = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        rendered.append(
            f"{TOOL_CALL_BEGIN}function{TOOL_SEP}{name}\n```json\n{text}\n```{TOOL_CALL_END}"
        )
    return TOOL_CALLS_BEGIN + "\n".join(rendered) + TOOL_CALLS_END


def marked(text: str) -> str:
    """A mark for every token's name: as if each were its token."""
    for name, mark in MARKS.items():
        text = text.replace(name, mark)
    return text
