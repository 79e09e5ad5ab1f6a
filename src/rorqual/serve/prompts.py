"""From request bodies to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rorqual.errors import TokenizerError
from rorqual.serve.errors import ApiError, validation_error
from rorqual.serve.schemas_chat import (
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
)
from rorqual.serve.schemas_completions import CompletionRequest, TokenizeRequest
from rorqual.tokenizer import Tokenizer

NAMES_NOTE = "the prompt has names of special tokens as plain text; parse_special reads them"


@dataclass(frozen=True)
class Prompt:
    """One prompt: what the engine gets, and what `echo` shows of it."""

    ids: list[int]
    text: str
    num_hidden: int
    """Ids at the beginning that the client did not send: the begin-of-sentence token."""


def chat_messages(body: ChatRequest) -> list[dict[str, Any]]:
    """Messages as the tokenizer's templates take them.

    V3's format has no call ids: outputs stand in the order of the calls. ApiError 400 for an
    output whose call is not the last assistant message's.
    """
    return [_message(message) for message in _order_outputs(body.messages)]


def chat_tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """Definitions to show the model; none if it must not call any."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [_definition(tool) for tool in body.tools]


def tokenized_chat(body: TokenizeRequest) -> ChatRequest | None:
    """The chat whose prompt is asked for, with all its fields; None of a text. ApiError 422."""
    if body.messages is None:
        return None
    own = set(TokenizeRequest.model_fields) - set(ChatRequest.model_fields)
    fields = {k: v for k, v in body.model_dump(exclude_unset=True).items() if k not in own}
    if not fields.get("continue_final_message"):
        fields.pop("add_generation_prompt", None)  # without an answer the prompt may end anywhere
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as problem:
        raise validation_error(problem.errors(), list(ChatRequest.model_fields)) from None


def completion_prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """TokenizerError, or ApiError 400, for what cannot be a prompt."""
    suffix = tokenizer.encode(body.suffix) if body.suffix else None
    return [_prompt(each, suffix, body, tokenizer) for each in raw_prompts(body)]


def raw_prompts(body: CompletionRequest) -> list[Any]:
    """Texts, or lists of ids."""
    raw: Any = body.prompt
    is_one = isinstance(raw, str) or isinstance(raw[0], int)
    return [raw] if is_one else raw


def fim_prompt(prefix: Sequence[int], suffix: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """`<fim_begin>prefix<fim_hole>suffix<fim_end>` after BOS: the answer is the middle."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        message = "this model's tokenizer has no fill-in-the-middle tokens"
        raise ApiError(400, message, code="unsupported", param="suffix")
    return [tokenizer.bos_id, begin, *prefix, hole, *suffix, end]


def check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """TokenizerError for an id beyond the vocabulary."""
    if wrong := [token_id for token_id in ids if token_id >= tokenizer.vocab_size]:
        raise TokenizerError(
            "no such token id", found=wrong[0], expected=f"0 to {tokenizer.vocab_size - 1}"
        )


def _prompt(
    raw: str | list[int],
    suffix: Sequence[int] | None,
    body: CompletionRequest,
    tokenizer: Tokenizer,
) -> Prompt:
    if not isinstance(raw, str):
        check_ids(raw, tokenizer)
        ids, text = raw, tokenizer.decode(raw) if body.echo else ""
    else:
        reads_special = bool(body.parse_special)
        ids = tokenizer.encode_raw(raw, bos=False, reads_special=reads_special)
        # What a keyboard's bars were read as is shown as it was read.
        text = tokenizer.decode(ids) if reads_special else raw
        if not reads_special and tokenizer.names_special(raw):
            body.notes.say(NAMES_NOTE)
    if suffix is not None:
        return Prompt(fim_prompt(ids, suffix, tokenizer), text, 0)
    has_bos = ids[:1] == [tokenizer.bos_id] or body.add_special_tokens is False
    if isinstance(raw, str) and not has_bos:
        return Prompt([tokenizer.bos_id, *ids], text, 1)
    return Prompt(ids, text, 0)


def _order_outputs(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Outputs change places among themselves; system messages between them stay where they are."""
    ordered = list(messages)
    calls: list[str] = []
    outputs: dict[int, ToolMessage] = {}
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            _check_output(message, index, calls, outputs.values())
            outputs[index] = message
        elif not isinstance(message, SystemMessage):
            _put_in_call_order(ordered, outputs, calls)
            outputs = {}
            made = message.tool_calls if isinstance(message, AssistantMessage) else None
            calls = [call.id for call in made or []]
    _put_in_call_order(ordered, outputs, calls)
    return ordered


def _put_in_call_order(
    ordered: list[ChatMessage], outputs: dict[int, ToolMessage], calls: Sequence[str]
) -> None:
    by_id = {output.tool_call_id: output for output in outputs.values()}
    sorted_ids = [call_id for call_id in dict.fromkeys(calls) if call_id in by_id]
    for place, call_id in zip(outputs, sorted_ids, strict=True):
        ordered[place] = by_id[call_id]


def _check_output(
    message: ToolMessage, index: int, calls: Sequence[str], outputs: Iterable[ToolMessage]
) -> None:
    place = f"messages[{index}].tool_call_id"
    if message.tool_call_id not in calls:
        text = f"{place}: no call of the assistant message before it has this id"
        raise ApiError(400, text, code="invalid_messages", param=place)
    if any(output.tool_call_id == message.tool_call_id for output in outputs):
        text = f"{place}: this call has its output already"
        raise ApiError(400, text, code="invalid_messages", param=place)


def _message(message: ChatMessage) -> dict[str, Any]:
    """As the templates know it; what reasoning the prompt shows is theirs to say."""
    rendered: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        rendered["tool_call_id"] = message.tool_call_id
    if not isinstance(message, AssistantMessage):
        return rendered
    if message.reasoning_content is not None:
        rendered["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        rendered["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.prefix:
        rendered["prefix"] = True
        rendered["content"] = rendered["content"] or ""
    return rendered


def _text(content: str | list[TextPart] | None) -> str | None:
    """Choice: text parts follow each other directly; nothing is added that nobody wrote."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _definition(tool: Tool) -> dict[str, Any]:
    """As the client wrote it, but without `strict`, which is not meant for the model."""
    function = tool.function.model_dump(
        exclude_none=True, include={"name", "description", "parameters"}
    )
    return {"type": "function", "function": function}
