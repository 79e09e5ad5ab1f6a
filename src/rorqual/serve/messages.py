"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API over the chat route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rorqual.serve.chat import chat_prompt, prepare_chat
from rorqual.serve.chat_builder import ChatBuilder, hand_on_notes, told_as
from rorqual.serve.errors import ApiError
from rorqual.serve.fair_pool import Caller
from rorqual.serve.messages_assembler import MessageHead, MessagesAssembler
from rorqual.serve.messages_errors import error_texts
from rorqual.serve.reply import AnswerResponse, Wire, named_event
from rorqual.serve.reply_text import new_id
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_messages import (
    AssistantTurn,
    Blocks,
    CountRequest,
    MessagesRequest,
    MessagesTool,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from rorqual.serve.service import NOBODY, Service
from rorqual.tokenizer.tool_calls import to_json

PING = named_event('{"type": "ping"}')
NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "thinking_token_budget": "thinking.budget_tokens",
    "tool_choice.function": "tool_choice.name",
    "tools.function.parameters": "tools.input_schema",
    "response_format.json_schema": "output_config.format",
    ".tool_call_id": ".tool_use_id",
}
SAME = (
    "seed min_p repetition_penalty frequency_penalty presence_penalty logit_bias stop_token_ids "
    "ignore_eos min_tokens skip_special_tokens allowed_token_ids include_stop_str_in_output"
).split()
"""Fields that the chat route has under the same name."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def answer_message(
    service: Service, body: MessagesRequest, caller: Caller = NOBODY
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    service.check_body(body)
    chat, names = _chat_of(body)
    with told_as(names):
        job = await prepare_chat(service, chat, caller)
    hand_on_notes(chat, body, names)
    head = MessageHead(
        id=new_id("msg_"),
        model=service.model.name,
        num_prompt_tokens=len(job.requests[0].prompt_ids),
        max_positions=service.model.max_positions,
        has_bound_calls=job.requests[0].params.grammar is not None and chat.tools is not None,
        has_thinking_text=body.thinking is None or body.thinking.display != "omitted",
    )
    assembler = MessagesAssembler(head, job.readers[0])
    wire = Wire(frame=named_event, keep_alive=PING, end=b"", fail=error_texts)
    return AnswerResponse(
        service,
        job.requests,
        assembler,
        is_stream=bool(body.stream),
        wire=wire,
        notes=body.notes,
    )


async def count_tokens(service: Service, body: CountRequest, caller: Caller = NOBODY) -> int:
    """How long the prompt is."""
    service.check_body(body)
    chat, names = _chat_of(body)
    with told_as(names):
        prompt_ids = await chat_prompt(service, chat, caller)
    hand_on_notes(chat, body, names)
    return len(prompt_ids)


def _chat_of(body: CountRequest) -> tuple[ChatRequest, dict[str, str]]:
    """The chat's form, and the names of this API for its fields."""
    builder = ChatBuilder()
    for text, place in _texts(body.system, "system"):
        builder.add("system", text, place)
    for index, turn in enumerate(body.messages):
        place = f"messages[{index}]"
        if isinstance(turn, UserTurn):
            _add_user(builder, turn.content, place)
        elif isinstance(turn, AssistantTurn):
            _add_assistant(builder, turn.content, place)
        else:
            for text, inner in _texts(turn.content, f"{place}.content"):
                builder.add("system", text, inner)
    builder.continue_last()
    names = NAMES | builder.places()
    for index in range(len(body.tools or [])):
        names[f"tools[{index}].function.parameters"] = f"tools[{index}].input_schema"
        names[f"tools[{index}].function"] = f"tools[{index}]"
    with told_as(names):
        return builder.request(_fields(body)), names


def _texts(content: str | Sequence[TextBlock] | None, place: str) -> Iterator[tuple[str, str]]:
    """Texts and their places."""
    if isinstance(content, str):
        yield content, place
    for index, block in enumerate([] if isinstance(content, str) else content or []):
        yield block.text, f"{place}[{index}]"


def _add_user(builder: ChatBuilder, content: Blocks, place: str) -> None:
    """Outputs of tools come before what the user says beside them, as the prompt has them."""
    if isinstance(content, str):
        builder.add_user_text(content, place)
        return
    texts: list[str] = []
    for index, block in enumerate(content):
        inner = f"{place}.content[{index}]"
        if isinstance(block, ToolResultBlock):
            output = "".join(text for text, _ in _texts(block.content, inner))
            builder.add_output(block.tool_use_id, output, inner)
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise _misplaced(inner, block.type, "user")
    if texts or not content:
        builder.add_user_text("".join(texts), place)


def _add_assistant(builder: ChatBuilder, content: Blocks, place: str) -> None:
    if isinstance(content, str):
        builder.add_said(content, place)
        return
    for index, block in enumerate(content):
        inner = f"{place}.content[{index}]"
        if isinstance(block, TextBlock):
            builder.add_said(block.text, inner)
        elif isinstance(block, ThinkingBlock):
            builder.add_thought(block.thinking, inner)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": to_json(block.input)}
            call = {"id": block.id, "type": "function", "function": function}
            builder.add_call(call, inner)
        elif not isinstance(block, RedactedThinkingBlock):
            raise _misplaced(inner, block.type, "assistant")


def _misplaced(place: str, kind: str, role: str) -> ApiError:
    message = f"{place}: a block of type {kind!r} cannot stand in a message of the {role}"
    return ApiError(400, message, code="invalid_messages", param=place)


def _fields(body: CountRequest) -> dict[str, Any]:
    choice, wanted = body.tool_choice, body.format_wanted()
    fields: dict[str, Any] = {"model": body.model}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if choice is not None and choice.type == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None and (body.tools or choice.type == "any"):
        fields["tool_choice"] = CHOICES[choice.type]
    if choice is not None and choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if wanted is not None:
        named = {"name": "output", "schema": wanted.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    if body.thinking is not None:
        fields["thinking"] = body.thinking.type != "disabled"
        if fields["thinking"]:
            fields["thinking_token_budget"] = body.thinking.budget_tokens
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k or None,
            "stop": body.stop_sequences or None,
            "stream": body.stream,
            **{name: getattr(body, name) for name in SAME},
        }
    return fields


def _tool(tool: MessagesTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}
