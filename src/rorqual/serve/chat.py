"""`POST /v1/chat/completions`, also without `/v1` and under `/beta` as DeepSeek has it."""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.engine import Request
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.chat_job import (
    chat_assembler,
    chat_params,
    chat_reader,
    chat_text,
    grammar_field,
)
from rorqual.serve.fair_pool import Caller
from rorqual.serve.lengths import num_certain_chars
from rorqual.serve.prompts import chat_messages
from rorqual.serve.reply import AnswerResponse, collect
from rorqual.serve.sampling import choices
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.service import NOBODY, Service
from rorqual.tokenizer.thinking import is_thinking


@dataclass(frozen=True)
class ChatJob:
    """A checked chat: requests for the engine, and for each a reader of its pieces."""

    requests: list[Request]
    readers: list[AnswerReader]


async def chat_prompt(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> list[int]:
    """The prompt of a conversation. ApiError if it cannot be written or does not fit."""
    service.check_body(body)
    service.model.check_length(num_certain_chars(chat_messages(body)), "messages")
    prompt_ids = await written_prompt(service, body, caller)
    service.model.check_prompt(prompt_ids, "messages")
    return prompt_ids


async def written_prompt(
    service: Service,
    body: ChatRequest,
    caller: Caller = NOBODY,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """As `chat_prompt`, of any length: to be counted."""
    service.check_body(body)
    tokenizer = service.model.tokenizer
    text = chat_text(body, tokenizer)
    return await service.aside(
        lambda: text.encode(tokenizer, add_generation_prompt=add_generation_prompt),
        "messages",
        caller,
        text.num_chars,
    )


async def prepare_chat(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> ChatJob:
    """ApiError for whatever is wrong with the request."""
    prompt_ids = await chat_prompt(service, body, caller)
    tokenizer = service.model.tokenizer
    begins_thinking = is_thinking(prompt_ids, tokenizer)
    params = chat_params(body, service.model, prompt_ids, is_thinking=begins_thinking)
    service.log_ignored(body.notes)
    compiled = await service.compile(params.grammar, caller, grammar_field(body))
    requests = [
        Request(prompt_ids, each, caller.owner, caller.is_background, compiled)
        for each in choices(params, body.n or 1)
    ]
    readers = [chat_reader(body, tokenizer, is_thinking=begins_thinking) for _ in requests]
    return ChatJob(requests, readers)


async def answer_chat(
    service: Service, body: ChatRequest, caller: Caller = NOBODY
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    job = await prepare_chat(service, body, caller)
    num_prompt_tokens = len(job.requests[0].prompt_ids)
    assembler = chat_assembler(body, service.model, job.readers, num_prompt_tokens)
    return AnswerResponse(
        service, job.requests, assembler, is_stream=bool(body.stream), notes=body.notes
    )


async def collect_chat(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> str:
    """The reply's JSON, for batches."""
    job = await prepare_chat(service, body, caller)
    return await collect(service, job.requests, chat_assembler(body, service.model, job.readers))
