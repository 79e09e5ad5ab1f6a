"""Special tokens in a model's answer, told from the same characters spelled in ordinary tokens.

An answer may quote `<｜tool▁call▁end｜>` in a string; only the token itself ends a call. So readers
of answers get a text in which each of these tokens is one mark: half of a surrogate pair, which no
decoded text holds.
"""

from __future__ import annotations

from rorqual.tokenizer.special import (
    EOS,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)

THINK, THINK_OVER, CALLS, CALLS_OVER, CALL, CALL_OVER, SEP, OVER = map(chr, range(0xD800, 0xD808))
MARKS = {
    THINK_BEGIN: THINK,
    THINK_END: THINK_OVER,
    TOOL_CALLS_BEGIN: CALLS,
    TOOL_CALLS_END: CALLS_OVER,
    TOOL_CALL_BEGIN: CALL,
    TOOL_CALL_END: CALL_OVER,
    TOOL_SEP: SEP,
    EOS: OVER,
}
STRUCTURE = CALLS + CALLS_OVER + CALL + CALL_OVER
"""The marks that order calls: each ends the call before it."""

_NAMES = str.maketrans({mark: name for name, mark in MARKS.items()})


def unmarked(text: str) -> str:
    """The text as a person reads it, tokens by their names."""
    return text.translate(_NAMES)
