"""Whether a text stands inside its `<think>`: the one definition, by token ids.

Grammars, the parsing of replies and their usage all ask here. In a prompt the last turn alone
decides: a `<think>` of an earlier turn that was cut before its `</think>` does not count. An answer
may open its reasoning at its beginning, or go on with what the prompt opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rorqual.tokenizer.special import (
    EOT,
    THINK_BEGIN,
    THINK_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
)

if TYPE_CHECKING:
    from rorqual.tokenizer.tokenizer import Tokenizer


def is_thinking(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the prompt ends inside `<think>`, so that the answer begins with reasoning."""
    begin = tokenizer.special_ids.get(THINK_BEGIN)
    end = tokenizer.special_ids.get(THINK_END)
    if begin is None or end is None:
        return False
    names = (EOT, TOOL_OUTPUTS_BEGIN, TOOL_OUTPUTS_END)
    turns = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.user_id, tokenizer.assistant_id}
    turns |= {tokenizer.special_ids.get(name) for name in names}
    for token_id in reversed(prompt_ids):
        if token_id == begin:
            return True
        if token_id == end or token_id in turns:
            return False
    return False


class ReasoningCounter:
    """Counts the tokens of an answer between `<think>` and `</think>`, however they are cut into
    pieces. `is_inside`: the prompt ended inside `<think>`.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_inside: bool) -> None:
        self._tokenizer, self._is_inside = tokenizer, is_inside
        self._can_open = not is_inside
        self._marks = tuple(tokenizer.special_ids.get(name) for name in (THINK_BEGIN, THINK_END))
        self.num_tokens = 0

    def put(self, token_id: int) -> None:
        begin, end = self._marks
        if self._is_inside:
            self._is_inside = token_id != end
            self.num_tokens += self._is_inside and token_id != self._tokenizer.eos_id
        elif self._can_open:
            self._is_inside = token_id == begin
            # White space may come before `<think>`; nothing else may.
            text = self._tokenizer.bytes_of(token_id).decode("utf-8", errors="replace")
            self._can_open = not self._is_inside and not text.strip()
