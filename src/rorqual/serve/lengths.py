"""How long a conversation's prompt is at least, told without rendering or tokenising it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rorqual.tokenizer.special import THINK_END

SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
SPACES += "".join(map(chr, range(0x2000, 0x200B)))


def num_chars(value: Any) -> int:
    """Of all texts in lists and objects, names included."""
    total = 0
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            values += value.keys()
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    return total


def num_certain_chars(messages: Sequence[dict[str, Any]]) -> int:
    """Characters that the prompt has whatever the template is: it may leave out white space, and
    what an assistant thought.
    """
    return sum(map(_num_certain, messages))


def _num_certain(message: dict[str, Any]) -> int:
    content = message["content"] or ""
    if message["role"] == "assistant":
        content = content.rpartition(THINK_END)[2]
    return len(content) - sum(content.count(space) for space in SPACES)
