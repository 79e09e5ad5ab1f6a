"""`/v1/responses`: OpenAI's newer API over the chat route, with a store of its conversations."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from rorqual.serve.chat import ChatJob, chat_prompt, prepare_chat
from rorqual.serve.chat_builder import ChatBuilder, hand_on_notes, told_as
from rorqual.serve.errors import ApiError
from rorqual.serve.fair_pool import Caller
from rorqual.serve.reply import AnswerResponse, Wire, collect, named_event
from rorqual.serve.response_input import Record, add_items, earlier_items, given_items
from rorqual.serve.responses_assembler import ResponsesAssembler
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_common import Strict
from rorqual.serve.schemas_responses import (
    AllowedToolsChoice,
    InputRequest,
    ItemList,
    JsonSchemaText,
    NamedToolChoice,
    ResponseRequest,
    ResponseTool,
)
from rorqual.serve.service import NOBODY, Service
from rorqual.serve.store import ResponseStore, StoredResponse, ordered_id

NAMES = {
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tools.function": "tools",
    ".tool_call_id": ".call_id",
}
SAME = (
    "temperature top_p top_logprobs stream top_k min_p repetition_penalty frequency_penalty "
    "presence_penalty logit_bias seed stop stop_token_ids ignore_eos min_tokens "
    "skip_special_tokens allowed_token_ids include_stop_str_in_output thinking_token_budget"
).split()
"""Fields that the chat route has under the same name."""

TOLD: dict[str, Callable[[Any], bool]] = {
    "max_tool_calls": lambda value: type(value) is int,
    "prompt_cache_key": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
    "user": lambda value: isinstance(value, str),
    "summary": lambda value: value in ("auto", "concise", "detailed"),
    "verbosity": lambda value: value in ("low", "medium", "high"),
}
"""Fields without effect that a response tells again, with values that OpenAI's types have."""


@dataclass(frozen=True)
class _Prepared:
    """A checked request; `keep` stores its whole response, if it is to be stored."""

    job: ChatJob
    assembler: ResponsesAssembler
    keep: Callable[[], Awaitable[None]]


async def answer_response(
    service: Service,
    store: ResponseStore,
    owner: str,
    body: ResponseRequest,
    caller: Caller = NOBODY,
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    prepared = await _prepare(service, store, owner, body, caller)
    fail = prepared.assembler.failed
    return AnswerResponse(
        service,
        prepared.job.requests,
        prepared.assembler,
        is_stream=bool(body.stream),
        wire=Wire(frame=named_event, end=b"", fail=fail, before_end=prepared.keep),
        notes=body.notes,
    )


async def collect_response(
    service: Service,
    body: ResponseRequest,
    caller: Caller,
    *,
    store: ResponseStore,
    owner: str,
    persist: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]],
) -> str:
    """The reply's JSON, for batches; `persist` stores it as soon as the disk allows."""
    prepared = await _prepare(service, store, owner, body, caller)
    text = await collect(service, prepared.job.requests, prepared.assembler)
    await persist(prepared.keep)
    return text


async def _prepare(
    service: Service, store: ResponseStore, owner: str, body: ResponseRequest, caller: Caller
) -> _Prepared:
    service.check_body(body)
    response_id = ordered_id("resp_")
    items = await given_items(body.input, response_id, store, owner)
    chat, names = await _chat_of(service, store, owner, body, items, caller)
    with told_as(names):
        job = await prepare_chat(service, chat, caller)
    hand_on_notes(chat, body, names)
    assembler = ResponsesAssembler(
        _base(service, body, response_id, job),
        job.readers[0],
        service.model.tokenizer,
        is_stream=bool(body.stream),
        has_logprobs=body.has_logprobs,
        custom_names=chat.custom_names,
    )

    async def keep() -> None:
        if body.store is not False:
            record = Record(assembler.response(), items)
            row = StoredResponse(
                id=response_id,
                owner=owner,
                body=record.text(),
                previous_id=body.previous_response_id,
            )
            await store.put(row)

    return _Prepared(job, assembler, keep)


async def count_input(
    service: Service,
    store: ResponseStore,
    owner: str,
    body: InputRequest,
    caller: Caller = NOBODY,
) -> int:
    """How long the prompt of such a request is."""
    service.check_body(body)
    items = await given_items(body.input, ordered_id("resp_"), store, owner)
    chat, names = await _chat_of(service, store, owner, body, items, caller)
    with told_as(names):
        prompt_ids = await chat_prompt(service, chat, caller)
    hand_on_notes(chat, body, names)
    return len(prompt_ids)


async def recall(
    service: Service,
    store: ResponseStore,
    owner: str,
    response_id: str,
    caller: Caller,
    write: Callable[[Record], str],
) -> str:
    """What `write` makes of a stored response, in a thread; paced as bodies of the client are."""
    stored = await store.get(response_id, owner)
    await service.pacer.turn(caller.owner, stored.body.encode())
    return await service.aside(
        lambda: write(Record.read(stored)), "response_id", caller, len(stored.body)
    )


def whole_response(record: Record) -> str:
    return json.dumps(record.response, ensure_ascii=False, separators=(",", ":"))


def input_items(
    record: Record, *, limit: int, after: str | None, order: Literal["asc", "desc"]
) -> str:
    """The items that the response's own request gave: an ItemList."""
    items = record.input
    if order == "desc":
        items = items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            message = f"after: there is no item {after[:100]!r} in this response"
            raise ApiError(404, message, code="item_not_found", param="after")
        items = items[ids.index(after) + 1 :]
    shown = items[:limit]
    page = ItemList(
        data=shown,
        first_id=shown[0]["id"] if shown else None,
        last_id=shown[-1]["id"] if shown else None,
        has_more=len(items) > limit,
    )
    return page.model_dump_json()


async def _chat_of(
    service: Service,
    store: ResponseStore,
    owner: str,
    body: InputRequest,
    items: list[dict[str, Any]],
    caller: Caller,
) -> tuple[ChatRequest, dict[str, str]]:
    """The chat's form, and the names of this API for its fields."""
    earlier = await earlier_items(body.previous_response_id, store, owner)
    builder = ChatBuilder()
    if body.instructions is not None:
        builder.add("system", body.instructions, "instructions")
    add_items(builder, earlier, "previous_response_id")
    add_items(builder, items)
    if not builder.messages:
        what = "missing field 'input'" if body.input is None else "input: it has no items"
        raise ApiError(422, what, code="invalid_value", param="input")
    fields = _fields(body)
    if body.truncation == "auto":
        with told_as(NAMES):
            builder = await _with_room(service, builder, fields, caller)
    names = NAMES | builder.places()
    for index in range(len(body.tools or [])):
        names[f"tools[{index}].function"] = f"tools[{index}]"
    with told_as(names):
        return builder.request(fields), names


async def _with_room(
    service: Service, builder: ChatBuilder, fields: dict[str, Any], caller: Caller
) -> ChatBuilder:
    """Without the oldest turns, as few as make the rest fit; if nothing does, as it is.

    Choice: what is asked for as the longest answer is to fit too, up to a quarter of the context.
    """
    num_positions = service.model.max_positions
    longest = fields.get("max_completion_tokens") or service.model.defaults.max_tokens
    room = min(longest, num_positions // 4)

    async def fits(cut: int) -> bool:
        try:
            chat = builder.from_turn(cut).request(fields)
            return len(await chat_prompt(service, chat, caller)) + room <= num_positions
        except ApiError as problem:
            if problem.code != "context_length_exceeded":
                raise
            return False

    cuts = builder.turn_starts()
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if await fits(cuts[middle]):
            high = middle
        else:
            low = middle + 1
    return builder.from_turn(cuts[low]) if low < len(cuts) else builder


def _fields(body: InputRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": body.model, "parallel_tool_calls": body.parallel_tool_calls}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        fields["tool_choice"] = _named(choice)
    elif isinstance(choice, AllowedToolsChoice):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
    else:
        fields["tool_choice"] = choice
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, JsonSchemaText):
        named = {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    elif wanted is not None:
        fields["response_format"] = wanted.model_dump()
    fields["reasoning_effort"] = body.reasoning.effort if body.reasoning else None
    if isinstance(body, ResponseRequest):
        fields |= {name: getattr(body, name) for name in SAME}
        fields["max_completion_tokens"] = body.max_output_tokens
        fields["logprobs"] = body.has_logprobs or None
    return fields


def _tool(tool: ResponseTool) -> dict[str, Any]:
    if tool.type == "function":
        names = {"name", "description", "parameters", "strict"}
        return {"type": "function", "function": tool.model_dump(include=names)}
    kind = tool.format or {"type": "text"}
    if kind.get("type") == "grammar":
        inner = {name: value for name, value in kind.items() if name != "type"}
        kind = {"type": "grammar", "grammar": inner}
    custom = {"name": tool.name, "description": tool.description, "format": kind}
    return {"type": "custom", "custom": custom}


def _named(choice: NamedToolChoice) -> dict[str, Any]:
    return {"type": choice.type, choice.type: {"name": choice.name}}


def _base(
    service: Service, body: ResponseRequest, response_id: str, job: ChatJob
) -> dict[str, Any]:
    """The response before it has begun, with what the request asked for."""
    params = job.requests[0].params
    text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {}
    choice = body.tool_choice
    shown = choice if choice is None or isinstance(choice, str) else choice.model_dump()
    if text and _told(body.text, "verbosity") is None:
        text.pop("verbosity", None)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": _told(body, "max_tool_calls"),
        "metadata": body.metadata or {},
        "model": service.model.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": _told(body, "prompt_cache_key"),
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": _told(body.reasoning, "summary"),
        },
        "safety_identifier": _told(body, "safety_identifier"),
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": shown or "auto",
        "tools": [_shown_tool(tool) for tool in body.tools or []],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": _told(body, "user"),
    }


def _told(owner: Strict | None, name: str) -> Any:
    value = (owner.model_extra or {}).get(name) if owner is not None else None
    return value if TOLD[name](value) else None


def _shown_tool(tool: ResponseTool) -> dict[str, Any]:
    own = {"parameters", "strict"} if tool.type == "function" else {"format"}
    return tool.model_dump(include={"type", "name", "description", *own})
