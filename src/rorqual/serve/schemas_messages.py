"""Requests of Anthropic's `/v1/messages`. What it shares with the chat route is checked there."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from rorqual.serve.field_row import (
    CLAUDE,
    CLAUDE_BLOCKS,
    CLAUDE_OUTPUT,
    CLAUDE_TOOLS,
    COUNT_TOKENS,
)
from rorqual.serve.schemas_common import (
    MAX_INT64,
    Body,
    JsonObject,
    Strict,
    mismatch,
)

MAX_MESSAGES = 10_000
NOT_BLOCKS = "only text, thinking, tool_use and tool_result are supported"


class Block(Strict):
    PLACE: ClassVar[str] = CLAUDE_BLOCKS


class TextBlock(Block):
    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject


def _text_tag(value: Any) -> str:
    return "one-text" if isinstance(value, str) else "text-blocks"


def _only_text(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"blocks of type {kind[:40]!r} are not supported here, only 'text'")
    return value


Text = Annotated[
    Annotated[str, Tag("one-text")]
    | Annotated[
        list[Annotated[TextBlock, BeforeValidator(_only_text)]],
        Field(fail_fast=True),
        Tag("text-blocks"),
    ],
    Discriminator(_text_tag),
]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Text | None = None


def _block_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{kind}-block"


def _known_block(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    known = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
    if kind not in known:
        raise ValueError(f"blocks of type {str(kind)[:40]!r} are not supported; {NOT_BLOCKS}")
    return value


AnyBlock = Annotated[
    Annotated[TextBlock, Tag("text-block")]
    | Annotated[ThinkingBlock, Tag("thinking-block")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking-block")]
    | Annotated[ToolUseBlock, Tag("tool_use-block")]
    | Annotated[ToolResultBlock, Tag("tool_result-block")],
    Discriminator(_block_tag),
    BeforeValidator(_known_block),
]


def _content_tag(value: Any) -> str:
    return "one-text" if isinstance(value, str) else "several-blocks"


Blocks = Annotated[
    Annotated[str, Tag("one-text")]
    | Annotated[list[AnyBlock], Field(fail_fast=True), Tag("several-blocks")],
    Discriminator(_content_tag),
]


class SystemTurn(Strict):
    role: Literal["system"]
    content: Text


class UserTurn(Strict):
    role: Literal["user"]
    content: Blocks


class AssistantTurn(Strict):
    role: Literal["assistant"]
    content: Blocks


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn, Discriminator("role")]


class MessagesTool(Strict):
    PLACE: ClassVar[str] = CLAUDE_TOOLS

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: JsonObject
    strict: bool | None = Field(default=None, description="Calls must follow `input_schema`.")


def _own_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise ValueError(
            f"tools of type {str(kind)[:40]!r} are not supported: this server runs none itself; "
            "give a tool of your own with input_schema"
        )
    return value


class MessagesToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_a_name(self) -> MessagesToolChoice:
        if self.type == "tool" and self.name is None:
            raise mismatch("tool_choice.name", "tool_choice of type 'tool' needs the tool's name")
        return self


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1, le=MAX_INT64)
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`omitted`: blocks of thinking come without their text."
    )


class OutputFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonObject = Field(alias="schema")


class OutputConfig(Strict):
    PLACE: ClassVar[str] = CLAUDE_OUTPUT

    format: OutputFormat | None = None


class CountRequest(Body):
    """`POST /v1/messages/count_tokens`: what makes the prompt."""

    PLACE: ClassVar[str] = COUNT_TOKENS

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | None = None
    tools: (
        Annotated[list[Annotated[MessagesTool, BeforeValidator(_own_tool)]], Field(fail_fast=True)]
        | None
    ) = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        default=None, description="The older place of `output_config.format`."
    )

    def format_wanted(self) -> OutputFormat | None:
        config = self.output_config
        return config.format if config is not None and config.format else self.output_format


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    PLACE: ClassVar[str] = CLAUDE

    max_tokens: int = Field(ge=1, le=MAX_INT64)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    # Extensions, as the chat route has them and as it checks them.
    seed: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    stop_token_ids: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    skip_special_tokens: Any = None
    allowed_token_ids: Any = None
    include_stop_str_in_output: Any = None


class CountReply(BaseModel):
    input_tokens: int = Field(ge=0)


class MessagesUsage(BaseModel):
    input_tokens: int = Field(ge=0, description="Those that did not come from the cache.")
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class MessagesReply(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesErrorDetail(BaseModel):
    type: str
    message: str


class MessagesErrorBody(BaseModel):
    type: Literal["error"] = "error"
    error: MessagesErrorDetail
    request_id: str
