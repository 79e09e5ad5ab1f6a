"""A chat's pieces become chunks or a whole reply: the same parser feeds both.

So streamed and unstreamed answers carry the same content, reasoning and tool calls, however the
text was cut. A call that the answer's end cuts off stays as far as it came, with finish_reason
`length` or `stop`, never `tool_calls`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rorqual.engine import Piece, TokenLogprob, Usage
from rorqual.serve.parse_stream import (
    Content,
    Event,
    Reasoning,
    StreamParser,
    ToolCallArguments,
    ToolCallCut,
    ToolCallEnd,
    ToolCallStart,
)
from rorqual.serve.schemas_chat import (
    ChatChoice,
    ChatReply,
    ChoiceLogprobs,
    FunctionReply,
    ReplyMessage,
    TokenLogprobReply,
    ToolCallReply,
)
from rorqual.serve.tokens_text import chat_logprob
from rorqual.serve.usage import usage_body
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALL_END
from rorqual.tokenizer.thinking import ReasoningCounter


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What every chunk of a reply repeats."""

    id: str
    created: int
    model: str
    has_usage: bool = False
    """stream_options.include_usage."""


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class _Choice:
    """One answer as it grows."""

    def __init__(self, parser: StreamParser, reasoning_counter: ReasoningCounter) -> None:
        self.parser, self.reasoning_counter = parser, reasoning_counter
        self.has_begun = False
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.logprobs: list[TokenLogprobReply] = []
        self.num_complete_calls = 0
        self.finish_reason: Literal["stop", "length", "tool_calls"] = "stop"

    def take(self, event: Event) -> dict[str, Any] | None:
        """Remembers an event; the delta that tells a stream of it."""
        if isinstance(event, Reasoning):
            self.reasoning.append(event.text)
            return {"reasoning_content": event.text}
        if isinstance(event, ToolCallStart):
            self.calls[event.index] = _Call(event.id, event.name)
            function = {"name": event.name, "arguments": ""}
            return _call_delta(event.index, id=event.id, type="function", function=function)
        if isinstance(event, ToolCallArguments):
            self.calls[event.index].arguments.append(event.text)
            return _call_delta(event.index, function={"arguments": event.text})
        if isinstance(event, ToolCallEnd):
            self.num_complete_calls += 1
            return None
        if isinstance(event, ToolCallCut) and event.index in self.calls:
            return None
        assert isinstance(event, Content | ToolCallCut), f"unknown event {event}"
        self.content.append(event.text)
        return {"content": event.text}

    def message(self) -> ReplyMessage:
        calls = [
            ToolCallReply(
                index=index,
                id=call.id,
                type="function",
                function=FunctionReply(name=call.name, arguments="".join(call.arguments)),
            )
            for index, call in sorted(self.calls.items())
        ]
        content = "".join(self.content)
        return ReplyMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(self.reasoning) if self.reasoning else None,
            tool_calls=calls or None,
        )


class ChatAssembler:
    """The `Assembler` of the chat route. `is_single`: an answer ends with its first call."""

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        num_choices: int,
        *,
        has_tools: bool,
        is_thinking: bool,
        has_logprobs: bool,
        is_single: bool = False,
    ) -> None:
        self._head, self._tokenizer, self._has_logprobs = head, tokenizer, has_logprobs
        self._is_single = is_single
        self._choices = [
            _Choice(
                StreamParser(has_tools=has_tools, is_single=is_single, is_thinking=is_thinking),
                ReasoningCounter(tokenizer, is_inside=is_thinking),
            )
            for _ in range(num_choices)
        ]
        self._usages: dict[int, Usage] = {}

    def put(self, index: int, piece: Piece) -> list[str]:
        choice = self._choices[index]
        for token_id in piece.token_ids:
            choice.reasoning_counter.put(token_id)
        events = choice.parser.put(piece.text)
        if self._is_stopped_by_call(piece) and choice.parser.is_in_call:
            events = [*events, *choice.parser.put(TOOL_CALL_END)]
        if piece.finish_reason is not None:
            events = [*events, *choice.parser.finish()]
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
            is_whole = piece.finish_reason == "stop" or self._is_single
            is_call = is_whole and choice.num_complete_calls > 0
            choice.finish_reason = "tool_calls" if is_call else piece.finish_reason
            assert piece.usage is not None, "the last piece carries the usage"
            self._usages[index] = piece.usage
            chunks.append(self._chunk(index, {}, finish_reason=choice.finish_reason))
        return chunks

    def last(self) -> list[str]:
        if not self._head.has_usage:
            return []
        return [self._text({"choices": [], "usage": self._usage().model_dump()})]

    def whole(self) -> str:
        choices = [
            ChatChoice(
                index=index,
                message=choice.message(),
                logprobs=ChoiceLogprobs(content=choice.logprobs) if self._has_logprobs else None,
                finish_reason=choice.finish_reason,
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
        return json.dumps(body, ensure_ascii=False)

    def _is_stopped_by_call(self, piece: Piece) -> bool:
        """Whether the token that ends a call ended the answer: it is then not in the text."""
        call_end_id = self._tokenizer.special_ids.get(TOOL_CALL_END)
        is_end = self._is_single and piece.token_ids[-1:] == (call_end_id,)
        return is_end and piece.finish_reason == "stop"

    def _usage(self) -> Any:
        num_reasoning = sum(choice.reasoning_counter.num_tokens for choice in self._choices)
        return usage_body(self._usages, len(self._choices), num_reasoning)

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
        if self._head.has_usage:
            body["usage"] = None
        return self._text(body)

    def _text(self, body: dict[str, Any]) -> str:
        head = {
            "id": self._head.id,
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
        }
        return json.dumps(head | body, ensure_ascii=False)

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
