"""Requests and replies of `/v1/responses`. What it shares with the chat route is checked there."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from rorqual.serve.field_row import (
    INPUT_TOKENS,
    RESPONSE_ITEMS,
    RESPONSE_PARTS,
    RESPONSE_REASONING,
    RESPONSE_TEXT,
    RESPONSE_TOOLS,
    RESPONSES,
)
from rorqual.serve.schemas_batches import Metadata
from rorqual.serve.schemas_common import Body, JsonObject, Strict
from rorqual.serve.schemas_forms import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    RegexFormat,
    TextFormat,
)

MAX_ITEMS = 10_000
LOGPROBS = "message.output_text.logprobs"
NOT_RUN = "this server runs no tools itself, only functions of the client's"


class InputText(Strict):
    PLACE: ClassVar[str] = RESPONSE_PARTS

    type: Literal["input_text", "output_text"]
    text: str


class InputRefusal(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _kind_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _known_part(value: Any) -> Any:
    if (kind := _kind_of(value)) not in ("input_text", "output_text", "refusal"):
        text = f"content parts of type {str(kind)[:40]!r} are not supported, only input_text"
        raise ValueError(f"{text} and output_text")
    return value


Part = Annotated[
    Annotated[InputText, Tag("text-part")] | Annotated[InputRefusal, Tag("refusal-part")],
    Discriminator(lambda value: "refusal-part" if _kind_of(value) == "refusal" else "text-part"),
    BeforeValidator(_known_part),
]
Parts = Annotated[
    Annotated[str, Tag("one-text")]
    | Annotated[list[Part], Field(fail_fast=True), Tag("text-parts")],
    Discriminator(lambda value: "one-text" if isinstance(value, str) else "text-parts"),
]


class Item(Strict):
    PLACE: ClassVar[str] = RESPONSE_ITEMS

    id: str | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts


class CustomCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str


class CustomOutputItem(Item):
    type: Literal["custom_tool_call_output"]
    call_id: str
    output: Parts


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None


class ItemReference(Strict):
    type: Literal["item_reference"] | None = None
    id: str


def _item_kind(value: Any) -> str:
    kind = _kind_of(value)
    if kind is None:
        is_message = "role" in value if isinstance(value, dict) else hasattr(value, "role")
        return "message" if is_message else "item_reference"
    return str(kind)


ITEMS = (
    "message function_call function_call_output custom_tool_call custom_tool_call_output reasoning "
    "item_reference"
).split()


def _known_item(value: Any) -> Any:
    if (kind := _item_kind(value)) not in ITEMS:
        raise ValueError(f"items of type {kind[:40]!r} are not supported, only {', '.join(ITEMS)}")
    return value


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message-item")]
    | Annotated[FunctionCallItem, Tag("function_call-item")]
    | Annotated[FunctionOutputItem, Tag("function_call_output-item")]
    | Annotated[CustomCallItem, Tag("custom_tool_call-item")]
    | Annotated[CustomOutputItem, Tag("custom_tool_call_output-item")]
    | Annotated[ReasoningItem, Tag("reasoning-item")]
    | Annotated[ItemReference, Tag("item_reference-item")],
    Discriminator(lambda value: f"{_item_kind(value)}-item"),
    BeforeValidator(_known_item),
]
Input = Annotated[
    Annotated[str, Tag("one-text")]
    | Annotated[list[AnyItem], Field(max_length=MAX_ITEMS), Tag("several-items")],
    Discriminator(lambda value: "one-text" if isinstance(value, str) else "several-items"),
]


class ResponseTool(Strict):
    PLACE: ClassVar[str] = RESPONSE_TOOLS

    type: Literal["function", "custom"]
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = Field(
        default=None, description="Arguments must follow `parameters`; left out: they need not."
    )
    format: JsonObject | None = Field(default=None, description="Of a custom tool's input.")


def _own_tool(value: Any) -> Any:
    if (kind := _kind_of(value)) not in ("function", "custom"):
        raise ValueError(f"tools of type {str(kind)[:40]!r} are not supported: {NOT_RUN}")
    return value


class NamedToolChoice(Strict):
    type: Literal["function", "custom"]
    name: str


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedToolChoice, BeforeValidator(_own_tool)]], Field(fail_fast=True)
    ]


def _choice_tag(value: Any) -> str:
    if isinstance(value, str):
        return "tool-mode"
    return "allowed-tools" if _kind_of(value) == "allowed_tools" else "named-tool"


def _own_choice(value: Any) -> Any:
    kind = _kind_of(value)
    if isinstance(value, dict) and kind not in ("function", "custom", "allowed_tools"):
        raise ValueError(f"tool_choice of type {str(kind)[:40]!r} is not supported: {NOT_RUN}")
    return value


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("tool-mode")]
    | Annotated[NamedToolChoice, Tag("named-tool")]
    | Annotated[AllowedToolsChoice, Tag("allowed-tools")],
    Discriminator(_choice_tag),
    BeforeValidator(_own_choice),
]


class JsonSchemaText(Strict):
    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: JsonObject = Field(alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always enforced.")


AnswerFormat = Annotated[
    Annotated[TextFormat, Tag("text-format")]
    | Annotated[JsonObjectFormat, Tag("json_object-format")]
    | Annotated[JsonSchemaText, Tag("json_schema-format")]
    | Annotated[RegexFormat, Tag("regex-format")]
    | Annotated[ChoiceFormat, Tag("choice-format")]
    | Annotated[GrammarFormat, Tag("grammar-format")],
    Discriminator(lambda value: f"{_kind_of(value)}-format"),
]


class TextSettings(Strict):
    PLACE: ClassVar[str] = RESPONSE_TEXT

    format: AnswerFormat | None = None


class ReasoningSettings(Strict):
    PLACE: ClassVar[str] = RESPONSE_REASONING

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class InputRequest(Body):
    """`POST /v1/responses/input_tokens`: what makes the prompt."""

    PLACE: ClassVar[str] = INPUT_TOKENS

    input: Input | None = None
    instructions: str | None = Field(
        default=None, description="A system message before all others, for this response alone."
    )
    previous_response_id: str | None = None
    tools: (
        Annotated[list[Annotated[ResponseTool, BeforeValidator(_own_tool)]], Field(fail_fast=True)]
        | None
    ) = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="`auto`: the oldest turns make room where the context is full."
    )


class ResponseRequest(InputRequest):
    """`POST /v1/responses`."""

    PLACE: ClassVar[str] = RESPONSES

    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    store: bool | None = Field(default=None, description="Default: true.")
    metadata: Metadata | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    # Extensions, as the chat route has them and as it checks them.
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    skip_special_tokens: Any = None
    allowed_token_ids: Any = None
    include_stop_str_in_output: Any = None
    thinking_token_budget: Any = None

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


class ResponseUsage(BaseModel):
    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ResponseReply(BaseModel):
    """A response, whole or as far as it came; the fields of the request are told again."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int = Field(ge=0)
