"""The chat route's replies, in OpenAI's shape with DeepSeek's fields."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from rorqual.serve.schemas_common import UsageBody


class FunctionReply(BaseModel):
    name: str | None = None
    arguments: str | None = None


class CustomReply(BaseModel):
    name: str
    input: str


class ToolCallReply(BaseModel):
    """`function` or `custom`, as its type says."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionReply | None = None
    custom: CustomReply | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobReply(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprobReply]


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(BaseModel):
    """A whole answer; `reasoning_content` and `tool_calls` are there if the model wrote any."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
