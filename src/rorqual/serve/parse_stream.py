"""An answer's text, as it comes, taken apart: reasoning, content and tool calls.

The text has marks for special tokens (`tokenizer/marks.py`), so that a token's name which the model
only spells is text. The events do not depend on how the text is cut into pieces. Over a whole text
they say what `tokenizer.tool_calls.read_marked_calls` says, so a reply is the same streamed or not:
a call's arguments go out as they come, but for what may be its closing fence. What only looked like
a call is content again, unchanged; the beginning of one that the answer's end cuts off before its
arguments is left out, unless special tokens are to be shown.

`<think>` at the start (or before it, in the prompt) opens the reasoning, `</think>` ends it. The
newlines around these two belong to the format and are dropped.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rorqual.tokenizer.marks import (
    CALL,
    CALL_OVER,
    CALLS,
    CALLS_OVER,
    OVER,
    STRUCTURE,
    THINK,
    THINK_OVER,
    unmarked,
)
from rorqual.tokenizer.tool_calls import CallHeader, num_closing, read_call_header

_STRUCTURE = re.compile(f"[{STRUCTURE}]")
# What a call may yet end with, beside its mark; read from the end.
_HELD = re.compile(rf"{OVER}?[\s`]*+")


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next characters of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is whole."""

    index: int


@dataclass(frozen=True)
class ToolCallCut:
    """The answer ended inside the call; `text` is all of it, markers included."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd | ToolCallCut


def new_call_id() -> str:
    """A call's id, in the shape that clients know."""
    return f"call_{secrets.token_hex(12)}"


class StreamParser:
    """`put` takes any piece of marked text, `finish` ends it; both return what is certain.

    Without `has_tools` calls stay in the content. `is_thinking` says that the prompt ended inside
    `<think>`. With `is_single` the answer ends with its first call: what follows is dropped. With
    `shows_marks` the beginning of a call that never came is content.
    """

    def __init__(
        self,
        *,
        has_tools: bool = False,
        is_single: bool = False,
        is_thinking: bool = False,
        shows_marks: bool = False,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._has_tools, self._is_single, self._make_id = has_tools, is_single, make_id
        self._shows_marks = shows_marks
        self._text = ""  # what has come and is in no event yet
        self._is_last = False
        self._num_calls = 0
        self._in_calls = self._is_after_call = False
        self._header: CallHeader | None = None
        self._call: list[str] = []  # the call that is open, as far as it has been read
        self._step = self._reasoning_start if is_thinking else self._start

    @property
    def is_in_call(self) -> bool:
        """Whether a call is open, so that its end may come."""
        return self._step == self._arguments

    def put(self, text: str) -> list[Event]:
        self._text += text
        return list(self._run())

    def finish(self) -> list[Event]:
        """The end of the text: what waited is decided now."""
        self._is_last = True
        self._text = self._text.removesuffix(OVER)
        return list(self._run())

    def _run(self) -> Iterator[Event]:
        """Steps until one wants more text. A step reads from `_text` and names the next step."""
        while True:
            step = self._step
            yield from step()
            if self._step == step:
                return

    # Steps, in the order in which an answer goes through them.

    def _start(self) -> Iterator[Event]:
        rest = self._text.lstrip()
        if rest.startswith(THINK):
            self._text = rest.removeprefix(THINK)
            self._step = self._reasoning_start
        elif self._is_last or rest:
            self._step = self._content
        yield from ()

    def _reasoning_start(self) -> Iterator[Event]:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._step = self._reasoning
        yield from ()

    def _reasoning(self) -> Iterator[Event]:
        before, mark, after = self._text.partition(THINK_OVER)
        text = before.removesuffix(OVER) if not mark and not self._is_last else before
        text = text.rstrip("\n")
        if mark:
            self._text, self._step = after, self._content_start
        else:
            self._text = "" if self._is_last else self._text[len(text) :]
        if text:
            yield Reasoning(unmarked(text))

    def _content_start(self) -> Iterator[Event]:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._step = self._content
        yield from ()

    def _content(self) -> Iterator[Event]:
        """Text up to a call, whose header begins `_arguments`. What orders calls is no content."""
        while self._has_tools and (found := _STRUCTURE.search(self._text)):
            mark, place = found[0], found.start()
            if not self._is_after_call or self._text[:place].strip():
                yield from self._take_content(place)
                self._is_after_call, place = False, 0
            if mark == CALLS:
                after = len(self._text) - len(self._text[place + 1 :].lstrip())
                if after == len(self._text) and self._is_held_back():
                    return
                if self._text[after : after + 1] == CALL:
                    self._in_calls, mark, place = True, CALL, after
            if mark == CALL and self._in_calls:
                header = self._read_header(place + 1)
                if isinstance(header, CallHeader):
                    yield ToolCallStart(self._num_calls, self._make_id(), header.name)
                if isinstance(header, CallHeader) or (header == "open" and self._is_held_back()):
                    return
            if mark == CALLS_OVER and self._in_calls:
                self._in_calls = False
                if self._num_calls > 0:
                    self._text, self._is_after_call = self._text[place + 1 :], False
                    continue
            yield from self._take_content(place + 1)
            self._is_after_call = False
        if self._is_last or not self._is_after_call or self._text.strip():
            self._is_after_call = False
            is_held = self._text.endswith(OVER) and not self._is_last
            yield from self._take_content(len(self._text) - is_held)

    def _read_header(self, start: int) -> CallHeader | Literal["open", "none"]:
        """The header behind a call's mark; with it the arguments begin."""
        end = _STRUCTURE.search(self._text, start)
        text = self._text[start : end.start() if end else None]
        header = read_call_header(text, is_whole=end is not None)
        if isinstance(header, CallHeader):
            start += header.num_chars
            self._header, self._step = header, self._arguments
            self._call, self._text = [self._text[:start]], self._text[start:]
        return header

    def _arguments(self) -> Iterator[Event]:
        assert self._header is not None, "no call is open"
        if end := _STRUCTURE.search(self._text):
            text, mark = self._text[: end.start()], end[0]
            text = text[: len(text) - num_closing(text, self._header)]
            if text:
                yield ToolCallArguments(self._num_calls, unmarked(text))
            yield ToolCallEnd(self._num_calls)
            self._num_calls += 1
            self._text = self._text[end.start() + (mark == CALL_OVER) :]
            self._is_after_call = True
            self._step = self._over if self._is_single else self._content
        elif self._is_last:
            yield ToolCallCut(self._num_calls, unmarked("".join([*self._call, self._text])))
            self._text, self._step = "", self._content
        else:
            held = _HELD.match(self._text[::-1])
            assert held is not None, "the pattern matches every text"
            num_sure = len(self._text) - held.end()
            text, self._text = self._text[:num_sure], self._text[num_sure:]
            self._call.append(text)
            if text:
                yield ToolCallArguments(self._num_calls, unmarked(text))

    def _is_held_back(self) -> bool:
        """Whether the beginning of a call, all that is left of the text, is no content yet or, at
        the end, ever: then it is dropped.
        """
        if self._is_last and not self._shows_marks:
            self._text = ""
        return not self._is_last or not self._shows_marks

    def _over(self) -> Iterator[Event]:
        self._text = ""
        yield from ()

    def _take_content(self, num_chars: int) -> Iterator[Event]:
        text, self._text = self._text[:num_chars], self._text[num_chars:]
        if text:
            yield Content(unmarked(text))
