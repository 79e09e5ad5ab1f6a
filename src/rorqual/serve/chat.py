"""`POST /v1/chat/completions`, also without `/v1` and under `/beta` as DeepSeek has it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from rorqual.engine import Request
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.chat_assembler import ChatAssembler, ReplyHead
from rorqual.serve.fair_pool import Caller
from rorqual.serve.lengths import num_certain_chars, num_chars
from rorqual.serve.prompts import chat_messages, chat_tools
from rorqual.serve.reply import AnswerResponse, collect
from rorqual.serve.sampling import choices, sampling_params
from rorqual.serve.schema_keywords import enforceable_body
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.service import NOBODY, Service, new_id
from rorqual.serve.thinking_wish import thinking_switch
from rorqual.serve.tool_grammar import chat_grammar, is_call_forced
from rorqual.tokenizer.special import TOOL_CALL_END
from rorqual.tokenizer.thinking import is_thinking

THINKING_SHARE = 4
"""Of its tokens an answer that must be a call reasons with a quarter at most, so that it comes."""


@dataclass(frozen=True)
class ChatJob:
    """A checked chat: requests for the engine, and for each a reader of its pieces."""

    requests: list[Request]
    readers: list[AnswerReader]


async def chat_prompt(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> list[int]:
    """The prompt of a conversation. ApiError if it cannot be written or does not fit."""
    service.check_body(body)
    service.check_length(num_certain_chars(chat_messages(body)), "messages")
    prompt_ids = await written_prompt(service, body, caller)
    service.check_prompt(prompt_ids, "messages")
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
    messages, tools = chat_messages(body), chat_tools(body)
    thinking = thinking_switch(body, tokenizer, body.notes)
    return await service.aside(
        lambda: tokenizer.encode_chat(messages, tools, add_generation_prompt, thinking),
        "messages",
        caller,
        num_chars([messages, tools]),
    )


async def prepare_chat(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> ChatJob:
    """ApiError for whatever is wrong with the request."""
    prompt_ids = await chat_prompt(service, body, caller)
    tokenizer = service.model.tokenizer
    begins_thinking = is_thinking(prompt_ids, tokenizer)
    params = sampling_params(
        body,
        service.model.defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=tokenizer.vocab_size,
        grammar=chat_grammar(enforceable_body(body), tokenizer, is_thinking=begins_thinking),
    )
    service.log_ignored(body.notes)
    if begins_thinking and is_call_forced(body):
        num_left = min(params.max_tokens, service.model.max_positions - len(prompt_ids))
        params = replace(params, max_thinking_tokens=num_left // THINKING_SHARE)
    has_tools = chat_tools(body) is not None
    is_single = has_tools and body.parallel_tool_calls is False
    if is_single and (call_end_id := tokenizer.special_ids.get(TOOL_CALL_END)) is not None:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, call_end_id))
    compiled = await service.compile(params.grammar, caller, _grammar_field(body))
    requests = [
        Request(prompt_ids, each, caller.owner, caller.is_background, compiled)
        for each in choices(params, body.n or 1)
    ]
    readers = [
        AnswerReader(
            tokenizer,
            has_tools=has_tools,
            is_thinking=begins_thinking,
            is_single=is_single,
            tool_names=body.tool_names,
        )
        for _ in requests
    ]
    return ChatJob(requests, readers)


async def answer_chat(
    service: Service, body: ChatRequest, caller: Caller = NOBODY
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    job = await prepare_chat(service, body, caller)
    assembler = _assembler(service, body, job)
    return AnswerResponse(
        service, job.requests, assembler, is_stream=bool(body.stream), notes=body.notes
    )


async def collect_chat(service: Service, body: ChatRequest, caller: Caller = NOBODY) -> str:
    """The reply's JSON, for batches."""
    job = await prepare_chat(service, body, caller)
    return await collect(service, job.requests, _assembler(service, body, job))


def _assembler(service: Service, body: ChatRequest, job: ChatJob) -> ChatAssembler:
    head = ReplyHead(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=service.model.name,
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    tokenizer = service.model.tokenizer
    return ChatAssembler(
        head,
        tokenizer,
        job.readers,
        has_logprobs=bool(body.logprobs),
        custom_names=body.custom_names,
    )


def _grammar_field(body: ChatRequest) -> str:
    """The field that is at fault if the grammar is."""
    has_format = body.response_format is not None and body.response_format.type != "text"
    return "response_format" if has_format else "tools"
