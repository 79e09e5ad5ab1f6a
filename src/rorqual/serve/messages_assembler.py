"""An answer in Anthropic's shape: blocks of thinking, text and tool use, streamed or whole.

A call's input is an object there, and its clients read what has come of it as JSON, so arguments
that no grammar holds to JSON wait until the call has ended: what is none, as that which the
answer's end cuts off, comes as `{"INVALID_JSON": "..."}`, the form in which Anthropic's clients may
send it back. Arguments that a grammar holds to JSON are streamed as they are, cut off or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from rorqual.engine import Piece
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.parse_stream import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallCut,
    ToolCallStart,
)

INVALID = "INVALID_JSON"


@dataclass(frozen=True, kw_only=True)
class MessageHead:
    """What an answer's assembler is told beforehand."""

    id: str
    model: str
    num_prompt_tokens: int
    max_positions: int
    has_bound_calls: bool
    """A grammar holds every call's arguments to JSON."""
    has_thinking_text: bool = True


class MessagesAssembler:
    """The `Assembler` of `/v1/messages`."""

    def __init__(self, head: MessageHead, reader: AnswerReader) -> None:
        self._head, self._reader = head, reader
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._arguments: list[str] = []
        self._has_begun = False
        self._stop: str | None = None
        self._is_context_full = False

    def put(self, index: int, piece: Piece) -> list[str]:
        events = self._reader.put(piece)
        texts = [] if self._has_begun else [self._start()]
        self._has_begun = True
        for event in events:
            texts += self._take(event)
        if piece.finish_reason is not None:
            assert piece.usage is not None, "the last piece carries the usage"
            num_tokens = piece.usage.num_prompt_tokens + piece.usage.num_output_tokens
            self._is_context_full = num_tokens >= self._head.max_positions
            self._stop = piece.stop
            texts += self._close()
        return texts

    def last(self) -> list[str]:
        end = _end(self._stop_reason(), self._stop)
        return [_text("message_delta", delta=end, usage=self._usage()), _text("message_stop")]

    def whole(self) -> str:
        end = _end(self._stop_reason(), self._stop)
        body = self._message() | end | {"usage": self._usage()}
        return json.dumps(body, ensure_ascii=False)

    def _start(self) -> str:
        usage = {
            "input_tokens": self._head.num_prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        return _text("message_start", message=self._message() | _end() | {"usage": usage})

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": self._blocks,
        }

    def _take(self, event: Event) -> Iterator[str]:
        if isinstance(event, Reasoning):
            yield from self._go_on(
                "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            )
            if self._head.has_thinking_text:
                yield self._delta("thinking_delta", "thinking", event.text)
        elif isinstance(event, Content):
            yield from self._go_on("text", {"type": "text", "text": ""})
            yield self._delta("text_delta", "text", event.text)
        elif isinstance(event, ToolCallStart):
            yield from self._close()
            call = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            yield from self._go_on("tool_use", call)
            self._arguments = []
        elif isinstance(event, ToolCallArguments):
            self._arguments.append(event.text)
            if self._head.has_bound_calls:
                yield self._json_delta(event.text)
        elif self._open is not None and self._open["type"] == "tool_use":  # it ends, or is cut
            yield from self._end_call()
        else:  # a call that was cut before its name is text
            assert isinstance(event, ToolCallCut), f"unknown event {event}"
            yield from self._take(Content(event.text))

    def _go_on(self, kind: str, block: dict[str, Any]) -> Iterator[str]:
        """Goes on with the open block, or begins this one if that is of another kind."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self._close()
        yield _text("content_block_start", index=len(self._blocks), content_block=block)
        self._open = block
        self._blocks.append(block)

    def _close(self) -> Iterator[str]:
        if self._open is None:
            return
        if self._open["type"] == "thinking":
            text = self._open["thinking"]
            # Choice: nothing is checked when it comes back, but clients drop blocks without one.
            signature = hashlib.sha256(text.encode()).hexdigest()
            yield self._delta("signature_delta", "signature", signature)
        yield _text("content_block_stop", index=len(self._blocks) - 1)
        self._open = None

    def _end_call(self) -> Iterator[str]:
        assert self._open is not None, "a call is open"
        arguments = "".join(self._arguments)
        value = _object(arguments)
        if value is None and arguments:
            value = {INVALID: arguments}
            arguments = json.dumps(value, ensure_ascii=False)
        if arguments and not self._head.has_bound_calls:
            yield self._json_delta(arguments)
        self._open["input"] = value or {}
        yield from self._close()

    def _delta(self, kind: str, name: str, text: str) -> str:
        assert self._open is not None, "a block is open"
        self._open[name] += text
        return self._block_delta({"type": kind, name: text})

    def _json_delta(self, text: str) -> str:
        return self._block_delta({"type": "input_json_delta", "partial_json": text})

    def _block_delta(self, delta: dict[str, Any]) -> str:
        return _text("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _stop_reason(self) -> str:
        if self._stop is not None:
            return "stop_sequence"
        reason = self._reader.finish_reason
        if reason == "length" and self._is_context_full:
            return "model_context_window_exceeded"
        return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]

    def _usage(self) -> dict[str, Any]:
        usage = self._reader.usage
        assert usage is not None, "the answer has ended"
        num_cached = min(usage.num_cached_tokens, usage.num_prompt_tokens)
        return {
            "input_tokens": usage.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"thinking_tokens": self._reader.num_reasoning_tokens},
        }


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _end(reason: str | None = None, stop: str | None = None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None}


def _text(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields}, ensure_ascii=False)
