"""Tools as clients may write them, made to what the prompt format has: functions with plain names.

A custom tool takes free text: to the model it is a function with the one argument `input`. A name
of any characters gets a safe writing for the prompt; replies show it as the client wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

MAX_NAME_CHARACTERS = 256
INPUT = "input"


def custom_as_function(value: Any) -> Any:
    """`{"type": "custom", "custom": {...}}` with a `function` in it; others as they are.

    ValueError for a format that cannot be enforced. OpenAI: `regex` is enforced like `strict`.
    """
    if not isinstance(value, dict) or value.get("type") != "custom":
        return value
    rest = {key: item for key, item in value.items() if key != "custom"}
    custom = value.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get("name"), str):
        raise ValueError("a custom tool needs custom.name, a text")
    text: dict[str, Any] = {"type": "string"}
    is_strict = False
    kind = custom.get("format") or {"type": "text"}
    if kind != {"type": "text"}:
        text["pattern"], is_strict = f"^(?:{_regex(kind)})$", True
    function = {
        "name": custom["name"],
        "description": custom.get("description"),
        "parameters": {
            "type": "object",
            "properties": {INPUT: text},
            "required": [INPUT],
            "additionalProperties": False,
        },
        "strict": is_strict or None,
    }
    extras = set(custom) - {"name", "description", "format"}
    return rest | {"function": function | {key: custom[key] for key in extras}}


def _regex(kind: Any) -> str:
    grammar = kind.get("grammar") if isinstance(kind, dict) else None
    if not isinstance(grammar, dict) or grammar.get("syntax") != "regex":
        raise ValueError("custom.format is supported as text and as a grammar of syntax 'regex'")
    definition = grammar.get("definition")
    if not isinstance(definition, str):
        raise ValueError("custom.format.grammar.definition is no text")
    return definition


def custom_call_as_function(value: Any) -> Any:
    """A custom tool's call of an earlier turn, with `function` in it; others as they are."""
    if not isinstance(value, dict) or value.get("type") != "custom":
        return value
    custom = value.get("custom")
    if not isinstance(custom, dict) or not isinstance(custom.get(INPUT), str):
        raise ValueError("a custom tool's call needs custom.name and custom.input, texts")
    arguments = json.dumps({INPUT: custom[INPUT]}, ensure_ascii=False)
    rest = {key: item for key, item in value.items() if key != "custom"}
    return rest | {"function": {"name": custom.get("name"), "arguments": arguments}}


def custom_choice_as_function(value: Any) -> Any:
    """`{"type": "custom", "custom": {"name": ...}}` of `tool_choice` the same way."""
    if not isinstance(value, dict) or value.get("type") != "custom":
        return value
    rest = {key: item for key, item in value.items() if key != "custom"}
    return rest | {"function": value.get("custom")}


def input_of(arguments: str) -> str:
    """What a custom tool is given; what the model wrote, where that is no `{"input": text}`."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(INPUT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> its writing in the prompt: letters, digits, `_`, `.`, `-`; no two are the same."""
    each = list(dict.fromkeys(names))
    writings = {name: name for name in each if re.fullmatch(r"[A-Za-z0-9_.-]+", name)}
    taken = set(writings)
    numbers: dict[str, int] = {}  # the last of each writing: thousands of names may have the same
    for name in each:
        if name in writings:
            continue
        first = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        first = first if first.strip("_") else "tool"
        number, writing = numbers.get(first, 1), first
        while writing in taken:
            number += 1
            writing = f"{first}_{number}"
        writings[name], numbers[first] = writing, number
        taken.add(writing)
    return writings
