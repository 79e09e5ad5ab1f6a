"""The shortest text with which an answer can still fit its grammar.

llguidance says which tokens may come next, not how far the end is. So its states are searched by
single bytes, cheapest first; where one byte alone may follow (names of properties, most of a
schema's punctuation) it tells them all at once. Two rules keep the search small, and the result
exact for JSON: what may be closed is closed, and of the names that may come only those are tried
that some object requires. What was read so far says where in the JSON a state stands, so that two
ways to the same place are one. The search gives up after `MAX_STATES`.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_STATES = 600
"""Looked at in one search: 0.13 ms each with V3's vocabulary, a tenth with the bundled model's."""
MAX_MADE = 1000
"""Copied and moved on in one search: a state of a regular expression leads to dozens, each of which
may take 0.05 ms. JSON's ends took 229 at most, those of other grammars in the tests 712.
"""
MAX_MADE_OF_ANSWER = 20_000
"""In all searches of one answer, for thirty others may ask the same. The tests' took 5,000."""
NUM_WIDE = 64
"""Bytes that may follow where a text is free: ASCII alone has 95 that can be seen."""
QUOTE, BACKSLASH, COMMA, COLON, BRACE = b'"\\,:{'
OPENERS, CLOSERS = frozenset(b"{["), frozenset(b"}]")
SPECIAL = re.compile(rb"\xff\[([0-9]+)\]")
SPECIAL_OR_TEXT = re.compile(rb"([^\xff]+)|" + SPECIAL.pattern)
SPACE = frozenset(b" \t\n\r")
STAND_INS = b'"a0A- .:/@'
"""Tried in this order for all bytes where a text is free."""


class Letters:
    """A tokenizer's tokens of one byte, and its special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = tokenizer.byte_ids
        self.special_ids = sorted({*tokenizer.special_ids.values()} - {tokenizer.eos_id})

    def forced_ids(self, forced: bytes) -> list[int]:
        """One token a byte; special tokens stand there by number. Empty without such tokens."""
        token_ids: list[int] = []
        for text, number in SPECIAL_OR_TEXT.findall(forced):
            token_ids += [int(number)] if number else [self.ids.get(byte, -1) for byte in text]
        return [] if -1 in token_ids else token_ids

    def place_after(self, place: Place, token_id: int) -> Place:
        """What follows a special token is another text."""
        if token_id in self.special_ids:
            return Place()
        return place.after(self.tokenizer.token_bytes[token_id])

    def tokens_of(self, steps: Sequence[int]) -> list[int]:
        """The same text in as few tokens as the tokenizer makes of it."""
        special, token_bytes = set(self.special_ids), self.tokenizer.token_bytes
        token_ids: list[int] = []
        run: list[int] = []
        for step in [*steps, None]:
            if step is not None and step not in special:
                run.append(step)
                continue
            text = b"".join(token_bytes[i] for i in run)
            token_ids += self.tokens_of_text(text)
            token_ids += [] if step is None else [step]
            run = []
        return token_ids

    def tokens_of_text(self, text: bytes) -> list[int]:
        try:
            return self.tokenizer.encode(text.decode())
        except UnicodeDecodeError:  # the rest of a character
            return [self.ids[byte] for byte in text]


@dataclass(frozen=True)
class Place:
    """Where in a JSON text a byte stands, as far as it was read.

    `open` has for each bracket its byte, how many commas it has seen, and the name whose value is
    here (None: a name comes). `word` is the end of what stands here: empty before a value or name.
    """

    open: tuple[tuple[int, int, bytes | None], ...] = ()
    is_text: bool = False
    is_escaped: bool = False
    word: bytes = b""

    @property
    def is_name(self) -> bool:
        """Whether a text here names a value."""
        return bool(self.open) and self.open[-1][0] == BRACE and self.open[-1][2] is None

    @property
    def has_value(self) -> bool:
        """Whether a text or bracket has just been closed here."""
        return not self.is_text and self.word[-1:] in (b'"', b"}", b"]")

    def after(self, text: bytes) -> Place:
        place = self
        for byte in text:
            place = place._next(byte)
        return place

    def _next(self, byte: int) -> Place:
        if self.is_text:
            if byte == QUOTE and not self.is_escaped:
                return Place(self.open, False, False, self.word + b'"')
            begins_escape = byte == BACKSLASH and not self.is_escaped
            return Place(self.open, True, begins_escape, (self.word + bytes([byte]))[-64:])
        if byte == QUOTE:
            return Place(self.open, True)
        if byte in OPENERS:
            return Place((*self.open, (byte, 0, None)))
        if byte in CLOSERS:
            return Place(self.open[:-1], word=bytes([byte]))
        if self.open and byte in (COMMA, COLON):
            kind, num_commas, _ = self.open[-1]
            is_comma = byte == COMMA
            last = (kind, num_commas + is_comma, None if is_comma else self.word)
            return Place((*self.open[:-1], last))
        return Place(self.open, word=self.word + bytes([byte]))  # a number, true, false, null


@dataclass(frozen=True)
class _State:
    matcher: LLMatcher
    steps: tuple[int, ...]
    place: Place


@dataclass
class Effort:
    """What the searches of one answer may still cost."""

    num_left: int = MAX_MADE_OF_ANSWER


def required_names(schemas: Sequence[Any]) -> frozenset[bytes]:
    """The names that some object of these JSON schemas requires, as JSON writes them."""
    found: set[str] = set()
    values = list(schemas)
    while values:
        value = values.pop()
        if isinstance(value, dict):
            names = value.get("required")
            found |= {n for n in names if isinstance(n, str)} if isinstance(names, list) else set()
            values += value.values()
        elif isinstance(value, list):
            values += value
    return frozenset(json.dumps(name, ensure_ascii=False)[1:-1].encode() for name in found)


def shortest_end(
    matcher: LLMatcher,
    letters: Letters,
    place: Place,
    names: Collection[bytes] = (),
    effort: Effort | None = None,
) -> list[int] | None:
    """Token ids with which the text may end, without end-of-sentence; None if none was found.

    `place` is that of the text so far; `names` are those that some object requires. The matcher
    stays where it is. `effort` is the answer's, and this search takes of it.
    """
    effort = effort or Effort()
    least_left = max(0, effort.num_left - MAX_MADE)
    order = count()
    heap = [(0, next(order), _State(matcher.deep_copy(), (), place))]
    seen: set[object] = set()
    num_states = 0
    while heap and num_states < MAX_STATES and effort.num_left > least_left:
        cost, _, state = heapq.heappop(heap)
        if state.matcher.is_accepting():
            return _checked(matcher, letters, state.steps)
        key = _key(state, cost)
        if key in seen:
            continue
        seen.add(key)
        num_states += 1
        for after in _steps(state, letters, names):
            heapq.heappush(heap, (len(after.steps), next(order), after))
            effort.num_left -= 1
    return None


def can_end_with(matcher: LLMatcher, token_ids: Sequence[int]) -> bool:
    """Whether these tokens, and then the end, may follow. The matcher stays where it is."""
    trial = matcher.deep_copy()
    return trial.try_consume_tokens(list(token_ids)) == len(token_ids) and trial.is_accepting()


def _checked(matcher: LLMatcher, letters: Letters, steps: Sequence[int]) -> list[int]:
    token_ids = letters.tokens_of(steps)
    return token_ids if can_end_with(matcher, token_ids) else list(steps)


def _steps(state: _State, letters: Letters, names: Collection[bytes]) -> Iterator[_State]:
    forced = state.matcher.compute_ff_bytes()
    if forced:
        yield from _after(state, letters, letters.forced_ids(forced))
        return
    place, end = state.place, _end_of_value(state, letters)
    if end is not None:
        yield from _after(state, letters, [end])
        return
    special, allowed = _allowed(state.matcher, letters)
    if len(allowed) > NUM_WIDE:  # a text that may hold nearly anything
        # Whoever may say anything may also stop.
        allowed = [] if special else [byte for byte in STAND_INS if byte in allowed][:1]
    elif place.is_text and place.is_name and names:
        known = [name[len(place.word)] for name in names if _begins(name, place.word)]
        allowed = [byte for byte in allowed if byte in known] or allowed
    elif not place.is_text:
        allowed = [byte for byte in allowed if byte not in SPACE] or allowed
    for token_id in (*special, *(letters.ids[byte] for byte in allowed)):
        yield from _after(state, letters, [token_id])


def _begins(name: bytes, word: bytes) -> bool:
    return len(name) > len(word) and name.startswith(word)


def _end_of_value(state: _State, letters: Letters) -> int | None:
    """The token that closes what is open, if it may come: nothing else could be shorter."""
    place = state.place
    if place.is_text:
        ends = b"" if place.is_name else b'"'
    elif not place.open:
        return None
    else:
        ends = b"}]," if place.word else b"}]"
    for byte in ends:
        token_id = letters.ids.get(byte)
        if token_id is not None and state.matcher.validate_tokens([token_id]):
            return token_id
    return None


def _after(state: _State, letters: Letters, token_ids: list[int]) -> Iterator[_State]:
    matcher = state.matcher.deep_copy()
    if token_ids and matcher.consume_tokens(token_ids):
        place = state.place
        for token_id in token_ids:
            place = letters.place_after(place, token_id)
        yield _State(matcher, (*state.steps, *token_ids), place)


def _allowed(matcher: LLMatcher, letters: Letters) -> tuple[list[int], list[int]]:
    """(special ids, bytes) that may come next."""
    bits = matcher.compute_bitmask()
    special = [i for i in letters.special_ids if bits[i >> 3] >> (i & 7) & 1]
    return special, [byte for byte, i in letters.ids.items() if bits[i >> 3] >> (i & 7) & 1]


def _key(state: _State, cost: int) -> object:
    """Equal for two ways to what goes on alike."""
    place, forced = state.place, state.matcher.compute_ff_bytes()
    if place.open and (place.has_value or not (place.word or place.is_text)):
        return place.open, place.word[-1:], forced
    if place.is_text and place.is_name:
        return place, forced
    # What a text or number holds counts only by its length, and by what may follow.
    return cost, place.open, place.is_text, forced, state.matcher.compute_bitmask()
