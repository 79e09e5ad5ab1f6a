"""One answer's pieces taken apart, for every route that shows reasoning and calls by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from rorqual.engine import Piece, Usage
from rorqual.serve.parse_stream import Event, StreamParser, ToolCallEnd, ToolCallStart
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.marked_stream import MarkedStream
from rorqual.tokenizer.marks import CALL_OVER
from rorqual.tokenizer.special import TOOL_CALL_END
from rorqual.tokenizer.thinking import ReasoningCounter


class AnswerReader:
    """`put` gives the events of a piece; what the answer came to stands in the attributes.

    `has_tools`, `is_thinking`, `is_single` and `shows_marks` are StreamParser's. `tool_names` maps
    names as the prompt has them to those that the client knows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        has_tools: bool,
        is_thinking: bool,
        is_single: bool = False,
        shows_marks: bool = False,
        tool_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._tokenizer, self._is_single, self._tool_names = tokenizer, is_single, tool_names
        self.has_tools = has_tools
        self._parser = StreamParser(
            has_tools=has_tools,
            is_single=is_single,
            is_thinking=is_thinking,
            shows_marks=shows_marks,
        )
        self._marked = MarkedStream(tokenizer)
        self._counter = ReasoningCounter(tokenizer, is_inside=is_thinking)
        self._num_complete_calls = 0
        self.finish_reason: Literal["stop", "length", "tool_calls"] = "stop"
        self.usage: Usage | None = None
        """With the last piece."""

    @property
    def num_reasoning_tokens(self) -> int:
        return self._counter.num_tokens

    def put(self, piece: Piece) -> list[Event]:
        """What is certain now; with the last piece all of the rest."""
        for token_id in piece.token_ids:
            self._counter.put(token_id)
        text = self._marked.put(piece.text, piece.token_ids)
        if piece.finish_reason is not None:
            text += self._marked.finish()
        events = self._parser.put(text)
        if self._is_stopped_by_call(piece) and self._parser.is_in_call:
            events = [*events, *self._parser.put(CALL_OVER)]
        if piece.finish_reason is not None:
            events = [*events, *self._parser.finish()]
        self._num_complete_calls += sum(isinstance(event, ToolCallEnd) for event in events)
        if piece.finish_reason is not None:
            assert piece.usage is not None, "the last piece carries the usage"
            self.usage = piece.usage
            is_whole = piece.finish_reason == "stop" or self._is_single
            is_call = is_whole and self._num_complete_calls > 0
            self.finish_reason = "tool_calls" if is_call else piece.finish_reason
        return [self._renamed(event) for event in events]

    def _renamed(self, event: Event) -> Event:
        if not isinstance(event, ToolCallStart):
            return event
        return replace(event, name=self._tool_names.get(event.name, event.name))

    def _is_stopped_by_call(self, piece: Piece) -> bool:
        """Whether the token that ends a call ended the answer: it is then not in the text."""
        call_end_id = self._tokenizer.special_ids.get(TOOL_CALL_END)
        is_end = self._is_single and piece.token_ids[-1:] == (call_end_id,)
        return is_end and piece.finish_reason == "stop"
