"""An answer in the shape of `/v1/responses`: items of reasoning, text and calls, streamed or whole.

Each item's events come in OpenAI's order: it is added, its part is added, deltas, done, part done,
item done. What a stream told is what its last event and the stored response say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rorqual.engine import Piece
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.errors import ApiError
from rorqual.serve.parse_stream import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallCut,
    ToolCallEnd,
    ToolCallStart,
)
from rorqual.serve.text_logprobs import TextLogprobs
from rorqual.serve.tool_shapes import input_of
from rorqual.tokenizer import Tokenizer

Json = dict[str, Any]
PARTS: dict[str, Json] = {
    "message": {"type": "output_text", "text": "", "annotations": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}
TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
}
FAILURES = {429: "rate_limit_exceeded"}


def item_id(kind: str, response_id: str, number: int, *, is_input: bool = False) -> str:
    """An item's id tells in which response it is, and where: so a reference finds it."""
    _, _, name = response_id.partition("_")
    return f"{ID_PREFIXES.get(kind, 'item')}_{name}_{'i' if is_input else ''}{number}"


class ResponsesAssembler:
    """The `Assembler` of `/v1/responses`. `base` is the response before it has begun."""

    def __init__(
        self,
        base: Json,
        reader: AnswerReader,
        tokenizer: Tokenizer,
        *,
        is_stream: bool,
        has_logprobs: bool,
        custom_names: Collection[str] = (),
    ) -> None:
        self._base, self._reader = base, reader
        self._is_stream, self._has_logprobs = is_stream, has_logprobs
        self._custom_names = custom_names
        self._items: list[Json] = []
        self._is_open = False
        self._sequence = self._completed_at = 0
        self._logprobs = TextLogprobs(tokenizer, has_tools=reader.has_tools)

    def put(self, index: int, piece: Piece) -> list[str]:
        texts = [] if self._sequence else self._begin()
        events = self._reader.put(piece)
        if self._has_logprobs:
            self._logprobs.note(piece.logprobs)
        for event in events:
            texts += self._take(event)
        if piece.finish_reason is not None:
            if self._logprobs.has_text and self._is_open_as("message"):
                texts += self._add_text("")
            self._completed_at = int(time.time())
            is_whole = self._reader.finish_reason != "length"
            texts += self._close("completed" if is_whole else "incomplete")
        return texts

    def last(self) -> list[str]:
        response = self.response()
        return [self._event(f"response.{response['status']}", response=response)]

    def whole(self) -> str:
        return json.dumps(self.response(), ensure_ascii=False)

    def response(self) -> Json:
        """The response when the answer has ended."""
        is_whole = self._reader.finish_reason != "length"
        return self._base | {
            "status": "completed" if is_whole else "incomplete",
            "completed_at": self._completed_at if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": self._items,
            "usage": self._usage(),
        }

    def failed(self, error: ApiError) -> Iterable[str]:
        """What is said when it fails on the way: an event, or the whole reply."""
        code = FAILURES.get(error.status, "server_error")
        failure = {"code": code, "message": error.message}
        end = {"status": "failed", "error": failure, "output": self._items}
        if not self._is_stream:
            return [json.dumps(self._base | end, ensure_ascii=False)]
        begin = [] if self._sequence else self._begin()
        return [*begin, self._event("response.failed", response=self._base | end)]

    def _begin(self) -> list[str]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._base) for kind in kinds]

    def _take(self, event: Event) -> Iterator[str]:
        if isinstance(event, Content):
            yield from self._open_text("message")
            yield from self._add_text(event.text)
            return
        if isinstance(event, Reasoning | ToolCallStart):
            self._logprobs.drop(is_reasoning=isinstance(event, Reasoning))
        if isinstance(event, Reasoning):
            yield from self._open_text("reasoning")
            yield from self._add_text(event.text)
        elif isinstance(event, ToolCallStart):
            is_custom = event.name in self._custom_names
            kind = "custom_tool_call" if is_custom else "function_call"
            call = {"call_id": event.id, "name": event.name}
            yield from self._open(kind, call | {"input" if is_custom else "arguments": ""})
        elif isinstance(event, ToolCallArguments):
            if self._is_open_as("custom_tool_call"):  # its text is known when all has come
                self._items[-1]["input"] += event.text
                return
            self._items[-1]["arguments"] += event.text
            yield self._part_event("response.function_call_arguments.delta", delta=event.text)
        elif isinstance(event, ToolCallEnd):
            yield from self._close("completed")
        elif self._is_open_as("function_call") or self._is_open_as("custom_tool_call"):
            yield from self._close("incomplete")
        else:  # a call that was cut before its name is text
            assert isinstance(event, ToolCallCut), f"unknown event {event}"
            yield from self._take(Content(event.text))

    def _is_open_as(self, kind: str) -> bool:
        return self._is_open and self._items[-1]["type"] == kind

    def _open_text(self, kind: str) -> Iterator[str]:
        """Goes on with the open item, or begins one if that is of another kind."""
        if self._is_open_as(kind):
            return
        body: Json = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._open(kind, body | {"content": []})
        part: Json = PARTS[kind] | ({"logprobs": []} if kind == "message" else {})
        yield self._part_event("response.content_part.added", content_index=0, part=part)
        self._items[-1]["content"].append(part)

    def _open(self, kind: str, body: Json) -> Iterator[str]:
        yield from self._close("completed")
        number = len(self._items)
        head = {"id": item_id(kind, self._base["id"], number), "type": kind}
        item = head | body | {"status": "in_progress"}
        yield self._event("response.output_item.added", output_index=number, item=item)
        self._items.append(item)
        self._is_open = True

    def _add_text(self, text: str) -> Iterator[str]:
        item = self._items[-1]
        part = item["content"][0]
        part["text"] += text
        fields: Json = {"content_index": 0, "delta": text}
        if item["type"] == "message":
            fields["logprobs"] = self._logprobs.take(text)
            part["logprobs"] += fields["logprobs"]
        yield self._part_event(f"{TEXT_EVENTS[item['type']]}.delta", **fields)

    def _close(self, status: str) -> Iterator[str]:
        if not self._is_open:
            return
        item = self._items[-1]
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._part_event("response.function_call_arguments.done", **done)
        elif item["type"] == "custom_tool_call":
            text = item["input"] = input_of(item["input"])
            yield self._part_event("response.custom_tool_call_input.delta", delta=text)
            yield self._part_event("response.custom_tool_call_input.done", input=text)
        else:
            part = item["content"][0]
            fields = {"content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                fields["logprobs"] = part["logprobs"]
            yield self._part_event(f"{TEXT_EVENTS[item['type']]}.done", **fields)
            yield self._part_event("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        self._is_open = False
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _part_event(self, kind: str, **fields: Any) -> str:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        body = {"type": kind, **fields, "sequence_number": self._sequence}
        self._sequence += 1
        return json.dumps(body, ensure_ascii=False)

    def _usage(self) -> Json:
        usage = self._reader.usage
        assert usage is not None, "the answer has ended"
        num_cached = min(usage.num_cached_tokens, usage.num_prompt_tokens)
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        }
