"""The chat route's request, in OpenAI's shape with the fields of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from rorqual.serve.field_row import CALLS, CHAT, FUNCTIONS, MESSAGES, PARTS, TOOLS
from rorqual.serve.schemas_common import (
    MAX_INT64,
    MAX_TOP_LOGPROBS,
    JsonObject,
    Strict,
    mismatch,
)
from rorqual.serve.schemas_forms import FormFields
from rorqual.serve.tool_shapes import (
    MAX_NAME_CHARACTERS,
    custom_as_function,
    custom_call_as_function,
    custom_choice_as_function,
    safe_names,
)

MAX_TOOLS = 128
MAX_MESSAGES = 10_000

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
    Annotated[str, Tag("one-text")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("text-parts")],
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


ToolName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]


class CalledFunction(Strict):
    name: ToolName
    arguments: str = Field(description="JSON as the model wrote it.")


class ToolCall(Strict):
    PLACE: ClassVar[str] = CALLS

    id: str
    type: Literal["function", "custom"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, value: Any) -> Any:
        return custom_call_as_function(value)


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

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = Field(
        default=None, description="Arguments must follow `parameters`: see docs/api.md."
    )


class Tool(Strict):
    PLACE: ClassVar[str] = TOOLS

    type: Literal["function", "custom"] = Field(
        description="To the model a custom tool is a function with one argument, `input`."
    )
    function: FunctionSchema

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, value: Any) -> Any:
        return custom_as_function(value)


class NamedFunction(Strict):
    name: ToolName


class NamedTool(Strict):
    type: Literal["function", "custom"]
    function: NamedFunction

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, value: Any) -> Any:
        return custom_choice_as_function(value)


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(max_length=MAX_TOOLS)


class AllowedToolChoice(Strict):
    """Only these tools, of which the model may, or must, call some."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(value: Any) -> str:
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return "allowed-tools"
    return "tool-mode" if isinstance(value, str) else "named-tool"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("tool-mode")]
    | Annotated[NamedTool, Tag("named-tool")]
    | Annotated[AllowedToolChoice, Tag("allowed-tools")],
    Discriminator(_choice_tag),
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


def _known_thinking(value: Any) -> Any:
    if not isinstance(value, bool | dict | ThinkingObject):
        raise ValueError("must be true, false, or an object with a `type`")
    return value


def _thinking_tag(value: Any) -> str:
    return "thinking-object" if isinstance(value, dict) else "is-thinking"


Thinking = Annotated[
    Annotated[bool, Tag("is-thinking")] | Annotated[ThinkingObject, Tag("thinking-object")],
    Discriminator(_thinking_tag),
    BeforeValidator(_known_thinking),
]


class ChatRequest(FormFields):
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
    continue_final_message: bool | None = Field(
        default=None, description="As `prefix` of the last message."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="`false` only with continue_final_message."
    )
    _names: dict[str, str] = PrivateAttr(default_factory=dict)

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
        if isinstance(self.tool_choice, AllowedToolChoice):
            self._keep_allowed(self.tool_choice.allowed_tools)
            names = {tool.function.name for tool in self.tools or []}
        if isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                name = self.tool_choice.function.name
                raise mismatch("tool_choice", f"tool_choice names {name!r}, which is no tool")
        elif self.tool_choice == "required" and not names:
            raise mismatch("tool_choice", "tool_choice needs tools")
        if self.n_probs:
            self.read_as("n_probs", "logprobs", True)
            self.read_as("n_probs", "top_logprobs", self.n_probs)
        if self.top_logprobs and not self.logprobs:
            raise mismatch("top_logprobs", "top_logprobs needs logprobs: true")
        self.read_as("max_completion_tokens", "max_tokens", self.max_completion_tokens)
        self._continue_last()
        self._write_names_safely()
        return self

    def _continue_last(self) -> None:
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                message = "add_generation_prompt: false needs continue_final_message: true"
                raise mismatch("add_generation_prompt", message, "unsupported")
            return
        if self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt are both true: give one"
            raise mismatch("continue_final_message", message)
        last = self.messages[-1]
        if not isinstance(last, AssistantMessage) or last.tool_calls:
            message = "continue_final_message needs a last message of the assistant's without calls"
            raise mismatch("continue_final_message", message)
        last.prefix = True

    def _keep_allowed(self, allowed: AllowedTools) -> None:
        """The model is shown no other tools, so that `tool_choice` is a mode again."""
        names = [tool.function.name for tool in allowed.tools]
        tools = {tool.function.name: tool for tool in self.tools or []}
        if unknown := [name for name in names if name not in tools]:
            message = f"tool_choice allows {unknown[0]!r}, which is no tool"
            raise mismatch("tool_choice", message)
        self.tools = [tool for name, tool in tools.items() if name in names]
        self.tool_choice = allowed.mode

    def _write_names_safely(self) -> None:
        functions: list[FunctionSchema | CalledFunction | NamedFunction]
        functions = [tool.function for tool in self.tools or []]
        for message in self.messages:
            if isinstance(message, AssistantMessage):
                functions += [call.function for call in message.tool_calls or []]
        if isinstance(self.tool_choice, NamedTool):
            functions.append(self.tool_choice.function)
        writings = safe_names(function.name for function in functions)
        for function in functions:
            function.name = writings[function.name]
        self._names = {writing: name for name, writing in writings.items() if name != writing}

    @property
    def tool_names(self) -> Mapping[str, str]:
        """Writings in the prompt -> what the client calls these tools, where that differs."""
        return self._names

    @property
    def custom_names(self) -> frozenset[str]:
        """The tools that take free text, as the client calls them."""
        customs = [tool.function.name for tool in self.tools or [] if tool.type == "custom"]
        return frozenset(self._names.get(name, name) for name in customs)
