"""The chat route's request and replies, in OpenAI's shape with DeepSeek's fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from rorqual.serve.field_row import CALLS, CHAT, FUNCTIONS, MESSAGES, PARTS, TOOLS
from rorqual.serve.schemas_common import (
    MAX_INT64,
    MAX_TOP_LOGPROBS,
    JsonObject,
    SamplingFields,
    Strict,
    UsageBody,
    mismatch,
)

MAX_TOOLS = 128
MAX_MESSAGES = 10_000
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""Kinds of content parts that are text; the others of the Responses API name theirs so."""


class TextPart(Strict):
    PLACE: ClassVar[str] = PARTS

    type: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "refusal":
            return {("text" if key == "refusal" else key): item for key, item in value.items()}
        if isinstance(kind, str) and kind not in TEXT_PARTS:
            raise ValueError(f"content parts of type {kind[:40]!r} are not supported, only 'text'")
        return value


def _content_tag(value: Any) -> str:
    return "text-parts" if isinstance(value, list) else "one-text"


Content = Annotated[
    Annotated[str, Tag("one-text")] | Annotated[list[TextPart], Tag("text-parts")],
    Discriminator(_content_tag),
]


class Message(Strict):
    PLACE: ClassVar[str] = MESSAGES

    name: str | None = Field(default=None, description="Accepted; the prompt has no place for it.")


class SystemMessage(Message):
    role: Literal["system", "developer"] = Field(
        description="`developer` is OpenAI's newer name of `system`."
    )
    content: Content

    @model_validator(mode="after")
    def _is_system(self) -> SystemMessage:
        self.role = "system"
        return self


class UserMessage(Message):
    role: Literal["user"]
    content: Content


class CalledFunction(Strict):
    name: str = Field(pattern=NAME)
    arguments: str = Field(description="JSON as the model wrote it.")


class ToolCall(Strict):
    PLACE: ClassVar[str] = CALLS

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Message):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    prefix: bool | None = Field(
        default=None, description="On the last message: the answer continues this one."
    )
    reasoning_content: str | None = Field(
        default=None,
        description="With `prefix` the reasoning to continue from; else left out of the prompt, "
        "as R1's template does with earlier turns.",
    )
    refusal: str | None = Field(default=None, description="The text where `content` is null.")

    @model_validator(mode="after")
    def _refusal_is_text(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            self.content = self.refusal
        return self


class ToolMessage(Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")
]


class FunctionSchema(Strict):
    PLACE: ClassVar[str] = FUNCTIONS

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: JsonObject | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = Field(
        default=None, description="Arguments must follow `parameters`: see docs/api.md."
    )


class Tool(Strict):
    PLACE: ClassVar[str] = TOOLS

    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(Strict):
    name: str = Field(pattern=NAME)


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str:
    return "tool-mode" if isinstance(value, str) else "named-tool"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("tool-mode")]
    | Annotated[NamedTool, Tag("named-tool")],
    Discriminator(_choice_tag),
]


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str | None = None
    description: str | None = Field(default=None, description="Accepted, without effect.")
    json_schema: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always enforced.")


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Strict):
    """Extension: the whole answer matches a regular expression."""

    type: Literal["regex"]
    regex: str = Field(min_length=1, max_length=10_000)


class ChoiceFormat(Strict):
    """Extension: the answer is one of these texts."""

    type: Literal["choice"]
    choices: list[str] = Field(min_length=1, max_length=1000)


class GrammarFormat(Strict):
    """Extension: a context-free grammar in Lark's notation."""

    type: Literal["grammar"]
    grammar: str = Field(min_length=1, max_length=100_000)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat,
    Discriminator("type"),
]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ThinkingObject(Strict):
    """DeepSeek's and Anthropic's way to ask for reasoning."""

    type: Literal["enabled", "disabled", "adaptive"]

    @property
    def is_on(self) -> bool:
        return self.type != "disabled"


class ReasoningObject(Strict):
    """OpenRouter's and SGLang's way."""

    enabled: bool | None = None
    effort: Effort | None = None


def _thinking_tag(value: Any) -> str:
    return "thinking-object" if isinstance(value, dict) else "is-thinking"


Thinking = Annotated[
    Annotated[bool, Tag("is-thinking")] | Annotated[ThinkingObject, Tag("thinking-object")],
    Discriminator(_thinking_tag),
]


class ChatRequest(SamplingFields):
    PLACE: ClassVar[str] = CHAT

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT64, description="OpenAI's newer name of max_tokens."
    )
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(
        default=None, description="Default: auto with tools, none without."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="`false`: the answer ends after its first call."
    )
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = Field(
        default=None, description="Reasoning first, where the chat template has a switch for it."
    )
    reasoning: ReasoningObject | None = Field(default=None, description="As `thinking`.")
    reasoning_effort: Effort | None = Field(
        default=None, description="As `thinking`: `none` and `minimal` are off."
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="As `thinking`: its `thinking` or `enable_thinking`."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("tools")
    @classmethod
    def _unique_names(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or []]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tools are named {name!r}")
        return tools

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        names = {tool.function.name for tool in self.tools or []}
        if isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                name = self.tool_choice.function.name
                raise mismatch("tool_choice", f"tool_choice names {name!r}, which is no tool")
        elif self.tool_choice == "required" and not names:
            raise mismatch("tool_choice", "tool_choice needs tools")
        if self.top_logprobs and not self.logprobs:
            raise mismatch("top_logprobs", "top_logprobs needs logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = "max_tokens and max_completion_tokens differ: give one of them"
            raise mismatch("max_completion_tokens", message)
        return self


class FunctionReply(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallReply(BaseModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionReply


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
