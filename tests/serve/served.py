"""What the server's tests serve: a name, a context, and questions with their scripted answers."""

from __future__ import annotations

from typing import Any

from rorqual.engine import SamplingParams
from rorqual.serve.settings import ServedModel
from rorqual.tokenizer import Tokenizer
from tool_call_texts import render_tool_calls

TEXTS = ["The whale swims in the sea; the sea is deep. One, two, three whales sing."] * 4
CONTEXT = 2000
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TIME = {"type": "function", "function": {"name": "time", "arguments": "{}"}}
LONG = {
    "type": "function",
    "function": {
        "name": "weather",
        "arguments": '{"city": "Oslo", "days": [1, 22], "sea": "\u00f1"}',
    },
}
BAD = {"type": "function", "function": {"name": "weather", "arguments": "{city: Oslo}"}}
SHELL = {"type": "function", "function": {"name": "shell", "arguments": '{"input": "ls -l"}'}}
SCRIPT = {
    "call two": render_tool_calls([WEATHER, TIME]),
    "say and call": "Let me look." + render_tool_calls([WEATHER]),
    "think first": "<think>The sea is deep.</think>It is deep.",
    "wide characters": "Whales: 鯨 🐋 ñ.",
    "count up": " ".join(str(number) for number in range(200)),
    "line ends": "one\u2028two\u0085three",
    "long call": render_tool_calls([LONG]),
    "bad call": render_tool_calls([BAD]),
    "list call": render_tool_calls([BAD | {"function": {"name": "weather", "arguments": "[1]"}}]),
    "custom call": render_tool_calls([SHELL]),
    "whole json": '{"depth": 11}',
}


def make_model(tokenizer: Tokenizer, **changes: Any) -> ServedModel:
    values: dict[str, Any] = {
        "name": "sei",
        "aliases": ("minke",),
        "max_positions": CONTEXT,
    } | changes
    return ServedModel(tokenizer=tokenizer, defaults=SamplingParams(temperature=0.25), **values)
