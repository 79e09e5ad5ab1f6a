"""An answer's text, as it comes, taken apart: reasoning, content and tool calls.

The events do not depend on how the text is cut into pieces. Over a whole text they say what
`tokenizer.parse_tool_calls` says, so a reply is the same streamed or not: text that may yet become
a marker waits until it is one or is not, and a call's arguments go out as they come. What only
looked like a call is content again, unchanged.

`<think>` at the start (or before it, in the prompt) opens the reasoning, `</think>` ends it. The
newlines around these two belong to the format and are dropped.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rorqual.tokenizer.special import (
    EOS,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
)
from rorqual.tokenizer.tool_calls import CallHeader, read_call_header


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
    """`put` takes any piece of text, `finish` ends it; both return the events that are certain.

    Without `has_tools` calls stay in the content. `is_thinking` says that the prompt ended inside
    `<think>`. With `is_single` the answer ends with its first call: what follows is dropped.
    """

    def __init__(
        self,
        *,
        has_tools: bool = False,
        is_single: bool = False,
        is_thinking: bool = False,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._has_tools, self._is_single, self._make_id = has_tools, is_single, make_id
        self._text = ""  # what has come and is in no event yet
        self._is_last = False
        self._num_calls = 0
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
        self._text = self._text.removesuffix(EOS)
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
        if rest.startswith(THINK_BEGIN):
            self._text = rest.removeprefix(THINK_BEGIN)
            self._step = self._reasoning_start
        elif self._is_last or not THINK_BEGIN.startswith(rest):
            self._step = self._content
        yield from ()

    def _reasoning_start(self) -> Iterator[Event]:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._step = self._reasoning
        yield from ()

    def _reasoning(self) -> Iterator[Event]:
        before, mark, after = self._text.partition(THINK_END)
        if mark:
            text, self._text, self._step = before.rstrip("\n"), after, self._content_start
        else:
            text = self._without_overlap(THINK_END, EOS).rstrip("\n")
            self._text = "" if self._is_last else self._text[len(text) :]
        if text:
            yield Reasoning(text)

    def _content_start(self) -> Iterator[Event]:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._step = self._content
        yield from ()

    def _content(self) -> Iterator[Event]:
        if not self._has_tools:
            self._step = self._last_content
            return
        start = 0
        while (at := self._text.find(TOOL_CALLS_BEGIN, start)) >= 0:
            after = self._text[at + len(TOOL_CALLS_BEGIN) :].lstrip()
            is_open = TOOL_CALL_BEGIN.startswith(after[: len(TOOL_CALL_BEGIN)])
            if after.startswith(TOOL_CALL_BEGIN):
                yield from self._take_content(at)
                self._step = self._first_header
                return
            if is_open and not self._is_last:
                yield from self._take_content(at)
                return
            start = at + 1
        yield from self._take_content(len(self._without_overlap(TOOL_CALLS_BEGIN, EOS)))

    def _first_header(self) -> Iterator[Event]:
        yield from self._read_header(len(TOOL_CALLS_BEGIN))

    def _next_header(self) -> Iterator[Event]:
        yield from self._read_header(0)

    def _read_header(self, start: int) -> Iterator[Event]:
        header = read_call_header(self._text[start:])
        if isinstance(header, CallHeader):
            self._header = header
            self._call = [self._text[: start + header.num_chars]]
            self._text = self._text[start + header.num_chars :]
            self._step = self._arguments
            yield ToolCallStart(self._num_calls, self._make_id(), header.name)
        elif header == "none" or self._is_last:
            # With a call before it, the end marker may follow; else all is content.
            self._step = self._after_calls if start == 0 else self._last_content

    def _arguments(self) -> Iterator[Event]:
        assert self._header is not None, "no call is open"
        before, mark, after = self._text.partition(self._header.end)
        text = before if mark else self._without_overlap(self._header.end, EOS)
        if self._is_last and not mark:
            yield ToolCallCut(self._num_calls, "".join([*self._call, self._text]))
            self._text, self._step = "", self._last_content
            return
        if text:
            yield ToolCallArguments(self._num_calls, text)
        self._call.append(text)
        self._text = after if mark else self._text[len(text) :]
        if mark:
            yield ToolCallEnd(self._num_calls)
            self._num_calls += 1
            self._step = self._over if self._is_single else self._next_header

    def _over(self) -> Iterator[Event]:
        self._text = ""
        yield from ()

    def _after_calls(self) -> Iterator[Event]:
        rest = self._text.lstrip()
        if rest.startswith(TOOL_CALLS_END):
            self._text = rest.removeprefix(TOOL_CALLS_END)
        elif TOOL_CALLS_END.startswith(rest) and not self._is_last:
            return
        self._step = self._last_content
        yield from ()

    def _last_content(self) -> Iterator[Event]:
        yield from self._take_content(len(self._without_overlap(EOS)))

    def _take_content(self, num_chars: int) -> Iterator[Event]:
        text, self._text = self._text[:num_chars], self._text[num_chars:]
        if text:
            yield Content(text)

    def _without_overlap(self, *markers: str) -> str:
        """The text without an end that may be the beginning of a marker, or a whole EOS."""
        if self._is_last:
            return self._text
        num_held = 0
        for marker in markers:
            longest = len(marker) if marker == EOS else len(marker) - 1
            ends = (n for n in range(longest, 0, -1) if self._text.endswith(marker[:n]))
            num_held = max(num_held, next(ends, 0))
        return self._text[: len(self._text) - num_held]
