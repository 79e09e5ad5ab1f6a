"""An answer that must fit a grammar ends before its tokens do, if there is any way.

While tokens are left in plenty nothing happens. Near the end each token is looked at before it is
taken: one after which even the shortest end would come too late is refused, and another is drawn.
When just as many tokens are left as the shortest end takes, only these may come.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rorqual.engine.grammar import GrammarMatcher
from rorqual.engine.shortest import QUOTE, Effort, Letters, Place, can_end_with, shortest_end
from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

NEAR_TOKENS = 256
"""With no more left, every token is looked at."""
STEPS_OF_SLACK = 16
"""Farther away it is enough to look when a sixteenth of the slack is used up: no token is likely to
make an end sixteen tokens longer, time and again.
"""
LITTLE_SLACK = 8
"""With less, a path that is not known to be the shortest is looked for anew."""
MAX_REFUSED = 4
"""Tokens that are refused in one place before the shortest end is taken."""


class Closing:
    """Belongs to one answer, beside its matcher.

    A path is the ids that finish the text; the token that ends the answer comes behind it, or is in
    it, where a call ends an answer.
    """

    def __init__(
        self,
        matcher: GrammarMatcher,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        max_tokens: int,
        names: Collection[bytes] = (),
    ) -> None:
        self._matcher, self._letters, self._names = matcher, Letters(tokenizer), names
        self._eos_id, self._end_ids = tokenizer.eos_id, frozenset(end_ids)
        self._place, self._effort = Place(), Effort()
        self._path: list[int] | None = None
        self._is_known = self._is_shortest = False
        self._next_look = self.num_left = max_tokens
        self._candidate: tuple[int, list[int], bool] | None = None
        self.refused: list[int] = []

    def fork(self) -> Closing:
        """Another in the same place, beside the same matcher. Searches of both count against one
        limit of effort.
        """
        other = copy.copy(self)
        other.refused = list(self.refused)
        return other

    def only(self) -> int | None:
        """The one token that may come now, if there is no choice left."""
        slack = self._slack()
        if slack is None or self._path is None:
            return None
        is_last = slack == 0 or len(self.refused) >= MAX_REFUSED
        return [*self._path, self._eos_id][0] if is_last else None

    def must_begin(self) -> bool:
        """Whether a token more before the grammar's first would leave too few for it."""
        return self._slack() in (0, 1)  # one for the token that ends what comes before

    def admits(self, token_id: int) -> bool:
        """Whether an end can still be reached after this token; else it is `refused` from now."""
        if self._slack() is None or self._path is None or token_id in self._end_ids:
            return True
        place = self._letters.place_after(self._place, token_id)
        state = self._matcher.state.deep_copy()
        if state.consume_token(token_id):
            for path, is_shortest in self._paths_after(token_id, self._path, state, place):
                if path is not None and self._length(path) < self.num_left:
                    self._candidate = (token_id, path, is_shortest)
                    return True
        self.refused.append(token_id)
        return False

    def put(self, token_id: int) -> None:
        """Follows the matcher, which has taken the token."""
        self._place = self._letters.place_after(self._place, token_id)
        self._is_known = False
        if self._candidate is not None and self._candidate[0] == token_id:
            _, self._path, self._is_shortest = self._candidate
            self._is_known = True
        self.count()

    def count(self) -> None:
        """A token of the answer was taken, perhaps one before the grammar's first."""
        self.num_left -= 1
        self.refused.clear()
        self._candidate = None

    def _slack(self) -> int | None:
        """Tokens left beyond the shortest end; None if no end is near or none can be reached."""
        if self.num_left > self._next_look:
            return None
        slack = -1
        if self._is_known and self._path is not None:
            slack = self.num_left - self._length(self._path)
        if not self._is_known or (slack < LITTLE_SLACK and not self._is_shortest):
            self._path = self._search(self._matcher.state, self._place)
            self._is_known = self._is_shortest = True
            slack = -1 if self._path is None else self.num_left - self._length(self._path)
        if slack < 0:
            self._next_look = self.num_left // 2  # a search in vain is a long one
            return None
        if self.num_left > NEAR_TOKENS:
            self._next_look = self.num_left - slack // STEPS_OF_SLACK
        return slack

    def _paths_after(
        self, token_id: int, path: list[int], state: LLMatcher, place: Place
    ) -> Iterator[tuple[list[int] | None, bool]]:
        """Paths from where the token leads, and whether they are the shortest. Cheap ones first."""
        if path[:1] == [token_id]:
            yield path[1:], self._is_shortest
            return
        bytes_of = self._letters.tokenizer.token_bytes
        if path and bytes_of[path[0]].startswith(bytes_of[token_id]):  # a part of its first token
            rest = bytes_of[path[0]][len(bytes_of[token_id]) :]
            part = [*self._letters.tokens_of_text(rest), *path[1:]]
            if can_end_with(state, part):
                yield part, self._is_shortest
        if can_end_with(state, path):  # in the middle of a text, mostly
            yield path, False
        quoted = [self._letters.ids.get(QUOTE, token_id), *path]
        if can_end_with(state, quoted):  # a text was begun
            yield quoted, False
        yield self._search(state, place), True

    def _search(self, state: LLMatcher, place: Place) -> list[int] | None:
        return shortest_end(state, self._letters, place, self._names, self._effort)

    def _length(self, path: Sequence[int]) -> int:
        """With the token that ends the answer."""
        ends = (at for at, token_id in enumerate(path) if token_id in self._end_ids)
        return 1 + next(ends, len(path))
