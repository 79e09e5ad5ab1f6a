"""A chat's pieces become chunks or a whole reply: the same parser feeds both.

So streamed and unstreamed answers carry the same content, reasoning and tool calls, however the
text was cut. A call that the answer's end cuts off stays as far as it came, with finish_reason
`length` or `stop`, never `tool_calls`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Piece, TokenLogprob
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.parse_stream import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallCut,
    ToolCallEnd,
    ToolCallStart,
)
from rorqual.serve.schemas_common import UsageBody
from rorqual.serve.schemas_replies import (
    ChatChoice,
    ChatReply,
    ChoiceLogprobs,
    CustomReply,
    FunctionReply,
    ReplyMessage,
    TokenLogprobReply,
    ToolCallReply,
)
from rorqual.serve.tokens_text import chat_logprob
from rorqual.serve.tool_shapes import input_of
from rorqual.serve.usage import usage_body
from rorqual.tokenizer import Tokenizer

CHUNK = "chat.completion.chunk"


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What every chunk of a reply repeats."""

    id: str
    created: int
    model: str
    has_usage: bool = False
    """stream_options.include_usage."""
    has_running_usage: bool = False
    """stream_options.continuous_usage_stats."""
    num_prompt_tokens: int = 0
    """Of all prompts of the request."""

    def usage_so_far(self, num_output_tokens: int) -> dict[str, Any]:
        """What a chunk says of usage beside its choices."""
        if not self.has_running_usage:
            return {"usage": None} if self.has_usage else {}
        total = self.num_prompt_tokens + num_output_tokens
        numbers = self.num_prompt_tokens, num_output_tokens, total
        names = "prompt_tokens", "completion_tokens", "total_tokens"
        return {"usage": dict(zip(names, numbers, strict=True))}

    def chunk(self, kind: str, body: dict[str, Any]) -> str:
        """A chunk's JSON; `kind` is its member `object`."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return json.dumps(head | body, ensure_ascii=False)


@dataclass
class _Call:
    id: str
    name: str
    is_custom: bool
    arguments: list[str] = field(default_factory=list)

    def reply(self, index: int) -> ToolCallReply:
        text = "".join(self.arguments)
        if self.is_custom:
            custom = CustomReply(name=self.name, input=input_of(text))
            return ToolCallReply(index=index, id=self.id, type="custom", custom=custom)
        function = FunctionReply(name=self.name, arguments=text)
        return ToolCallReply(index=index, id=self.id, type="function", function=function)


class _Choice:
    """One answer as it grows."""

    def __init__(self, reader: AnswerReader, custom_names: Collection[str]) -> None:
        self.reader, self._custom_names = reader, custom_names
        self.has_begun = False
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.logprobs: list[TokenLogprobReply] = []

    def take(self, event: Event) -> dict[str, Any] | None:
        """Remembers an event; the delta that tells a stream of it."""
        if isinstance(event, Reasoning):
            self.reasoning.append(event.text)
            return {"reasoning_content": event.text}
        if isinstance(event, ToolCallStart):
            is_custom = event.name in self._custom_names
            self.calls[event.index] = _Call(event.id, event.name, is_custom)
            if is_custom:
                custom = {"name": event.name, "input": ""}
                return _call_delta(event.index, id=event.id, type="custom", custom=custom)
            function = {"name": event.name, "arguments": ""}
            return _call_delta(event.index, id=event.id, type="function", function=function)
        if isinstance(event, ToolCallArguments):
            call = self.calls[event.index]
            call.arguments.append(event.text)
            if call.is_custom:  # its text is known when all of its JSON has come
                return None
            return _call_delta(event.index, function={"arguments": event.text})
        if isinstance(event, ToolCallEnd | ToolCallCut) and event.index in self.calls:
            custom_reply = self.calls[event.index].reply(event.index).custom
            if custom_reply is None:
                return None
            return _call_delta(event.index, custom={"input": custom_reply.input})
        assert isinstance(event, Content | ToolCallCut), f"unknown event {event}"
        self.content.append(event.text)
        return {"content": event.text}

    def message(self) -> ReplyMessage:
        calls = [call.reply(index) for index, call in sorted(self.calls.items())]
        content = "".join(self.content)
        return ReplyMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(self.reasoning) if self.reasoning else None,
            tool_calls=calls or None,
        )


class ChatAssembler:
    """The `Assembler` of the chat route: one reader a choice."""

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        readers: Sequence[AnswerReader],
        *,
        has_logprobs: bool,
        custom_names: Collection[str] = (),
    ) -> None:
        self._head, self._tokenizer, self._has_logprobs = head, tokenizer, has_logprobs
        self._choices = [_Choice(reader, custom_names) for reader in readers]
        self._num_output_tokens = 0

    def put(self, index: int, piece: Piece) -> list[str]:
        choice = self._choices[index]
        self._num_output_tokens += len(piece.token_ids)
        events = choice.reader.put(piece)
        deltas = [delta for event in events if (delta := choice.take(event)) is not None]
        logprobs = self._logprobs(piece)
        choice.logprobs += logprobs
        if not choice.has_begun:
            choice.has_begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        elif logprobs and not deltas:
            deltas.append({"content": ""})
        chunks = [
            self._chunk(index, delta, logprobs=logprobs if number == len(deltas) - 1 else None)
            for number, delta in enumerate(deltas)
        ]
        if piece.finish_reason is not None:
            chunks.append(self._chunk(index, {}, finish_reason=choice.reader.finish_reason))
        return chunks

    def last(self) -> list[str]:
        if not self._head.has_usage:
            return []
        return [self._head.chunk(CHUNK, {"choices": [], "usage": self._usage().model_dump()})]

    def whole(self) -> str:
        choices = [
            ChatChoice(
                index=index,
                message=choice.message(),
                logprobs=ChoiceLogprobs(content=choice.logprobs) if self._has_logprobs else None,
                finish_reason=choice.reader.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        reply = ChatReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=self._usage(),
        )
        body = reply.model_dump()
        for choice in body["choices"]:
            for name in ("reasoning_content", "tool_calls"):
                if choice["message"][name] is None:
                    del choice["message"][name]
            for call in choice["message"].get("tool_calls", ()):
                del call["function" if call["type"] == "custom" else "custom"]
        return json.dumps(body, ensure_ascii=False)

    def _usage(self) -> UsageBody:
        readers = [choice.reader for choice in self._choices]
        usages = {i: reader.usage for i, reader in enumerate(readers) if reader.usage is not None}
        num_reasoning = sum(reader.num_reasoning_tokens for reader in readers)
        return usage_body(usages, len(readers), num_reasoning)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: Sequence[TokenLogprobReply] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        entries = {"content": [item.model_dump() for item in logprobs]} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": entries}
        body: dict[str, Any] = {"choices": [{**choice, "finish_reason": finish_reason}]}
        return self._head.chunk(CHUNK, body | self._head.usage_so_far(self._num_output_tokens))

    def _logprobs(self, piece: Piece) -> list[TokenLogprobReply]:
        """Of what the user sees: the token that ended the answer is not part of it."""
        if not self._has_logprobs:
            return []
        items: Sequence[TokenLogprob] = piece.logprobs
        if piece.finish_reason == "stop" and piece.token_ids[-1:] == (self._tokenizer.eos_id,):
            items = items[:-1]
        return [chat_logprob(item, self._tokenizer) for item in items]


def _call_delta(index: int, **fields: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **fields}]}
