"""An answer's text with marks for its special tokens, as it comes (`marks.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rorqual.tokenizer.marks import MARKS
from rorqual.tokenizer.special import THINK_BEGIN, THINK_END

if TYPE_CHECKING:
    from rorqual.tokenizer.tokenizer import Tokenizer


class MarkedStream:
    """Puts the marks into an answer's text as it comes; the text may trail its tokens.

    Tokens that the text leaves out, as those that end it, are passed over. A tokenizer without
    tokens for `<think>` and `</think>` has them spelled, and marked so.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.special_ids
        self._names = {token_id: name for name, token_id in ids.items()}
        self._spelled = [name for name in (THINK_BEGIN, THINK_END) if name not in ids]
        self._decoder = tokenizer.stream()
        self._num_decoded = self._num_taken = 0
        self._places: deque[tuple[int, str]] = deque()  # where in the answer a token's name begins
        self._text = ""

    def put(self, text: str, token_ids: Sequence[int]) -> str:
        """The marked text that is certain after these tokens and this text."""
        for token_id in token_ids:
            self._num_decoded += len(self._decoder.put(token_id))
            if (name := self._names.get(token_id)) is not None:
                self._places.append((self._num_decoded - len(name), name))
        self._text += text
        parts = []
        while self._places:
            place, name = self._places[0]
            at = max(place - self._num_taken, 0)
            found = self._text[at : at + len(name)]
            if at >= len(self._text) or (found != name and name.startswith(found)):
                break  # not here, or not whole
            self._places.popleft()
            if found == name:
                parts += [self._plain(at, is_followed=True), MARKS.get(name, name)]
                self._take(len(name))
            else:  # the text leaves the token out
                self._num_taken += len(name)
        end = self._places[0][0] - self._num_taken if self._places else len(self._text)
        parts.append(self._plain(end, is_followed=end < len(self._text)))
        return "".join(parts)

    def finish(self) -> str:
        """The rest: a name that a stop string has cut is text."""
        return self._plain(len(self._text), is_followed=True)

    def _take(self, num_chars: int) -> str:
        text, self._text = self._text[:num_chars], self._text[num_chars:]
        self._num_taken += len(text)
        return text

    def _plain(self, num_chars: int, *, is_followed: bool) -> str:
        """The next characters, with the spelled names marked; an end that may become one waits,
        unless a token follows it.
        """
        text = self._text[:num_chars]
        if not is_followed:
            text = text[: len(text) - self._overlap(text)]
        self._take(len(text))
        for name in self._spelled:
            text = text.replace(name, MARKS[name])
        return text

    def _overlap(self, text: str) -> int:
        """How many of the last characters may begin a spelled name."""
        begun = [
            n for name in self._spelled for n in range(1, len(name)) if text.endswith(name[:n])
        ]
        return max(begun, default=0)
