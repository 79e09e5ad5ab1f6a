"""Which of an answer's tokens are the text that a user sees: one piece may hold the end of the
reasoning, text, and the beginning of a call, each with tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rorqual.engine import TokenLogprob
from rorqual.serve.tokens_text import chat_logprob
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import (
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
)

CALL_MARKS = (TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN)


class TextLogprobs:
    """`note` takes a piece's tokens, `take` gives those of a text that came of them.

    Special tokens, as that which ended the answer, are no text. What only looked like a call is
    text: its tokens wait until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, *, has_tools: bool) -> None:
        self._tokenizer, self._has_tools = tokenizer, has_tools
        self._special = {number: name for name, number in tokenizer.special_ids.items()}
        self._text: list[dict[str, Any]] = []
        self._call: list[dict[str, Any]] | None = None
        """Since the mark of a call, or since its end."""
        self._is_after_call = self._has_called = self._has_thought = False
        self._num_before = 0
        """Of `_text`: before the last mark of a call."""

    @property
    def has_text(self) -> bool:
        return bool(self._text)

    def note(self, items: Sequence[TokenLogprob]) -> None:
        for item in items:
            name = self._special.get(item.token_id)
            if name is None:
                entry = chat_logprob(item, self._tokenizer).model_dump()
                (self._text if self._call is None else self._call).append(entry)
            elif name == THINK_END and not self._has_thought:
                self._text, self._call, self._num_before = [], None, 0
                self._has_thought = True
            elif self._has_tools:
                self._note_mark(name)

    def _note_mark(self, name: str) -> None:
        if name in CALL_MARKS and (self._call is None or self._is_after_call):
            between = self._call or []  # blanks between calls are no text
            self._text += between if "".join(entry["token"] for entry in between).strip() else []
            self._num_before = len(self._text)
            self._call, self._is_after_call = [], False
        elif name == TOOL_CALL_END and self._call is not None:
            self._call, self._is_after_call = [], True
        elif name == TOOL_CALLS_END:
            self._call, self._is_after_call = None, False

    def drop(self, *, is_reasoning: bool) -> None:
        """What came was the reasoning's, or what parts a call from the text before it."""
        if not is_reasoning:
            self._text, self._num_before = self._text[self._num_before :], 0
            self._has_called = True
        elif not self._has_thought:  # else the answer's tokens are here
            self._text, self._num_before = [], 0

    def take(self, text: str) -> list[dict[str, Any]]:
        is_after_call = self._is_after_call and self._has_called
        if self._call is not None and (is_after_call or any(mark in text for mark in CALL_MARKS)):
            self._text += self._call
            self._call, self._is_after_call, self._num_before = None, False, 0
        num = self._num_before or len(self._text)
        taken, self._text, self._num_before = self._text[:num], self._text[num:], 0
        return taken
