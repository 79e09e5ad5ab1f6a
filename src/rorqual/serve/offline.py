"""Requests without a server: what the chat and the completion route read, for an engine in this
process.

The same schemas, templates, grammars and replies; no event loop, and neither FastAPI nor uvicorn is
needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from rorqual.engine import Output, Piece, Request
from rorqual.engine.grammar import GrammarCompiler
from rorqual.errors import TokenizerError
from rorqual.serve.chat_assembler import ChatAssembler
from rorqual.serve.chat_job import chat_assembler, chat_params, chat_reader, chat_text
from rorqual.serve.completion_job import check_lengths, completion_assembler, completion_params
from rorqual.serve.completions_assembler import CompletionAssembler
from rorqual.serve.errors import validation_error
from rorqual.serve.json_values import check_repeatable
from rorqual.serve.lengths import num_certain_chars
from rorqual.serve.prompts import chat_messages, completion_prompts
from rorqual.serve.sampling import choices
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.settings import ServedModel
from rorqual.tokenizer.thinking import is_thinking

RequestBody = ChatRequest | CompletionRequest
SCHEMAS: Mapping[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass(frozen=True)
class OfflineJob:
    """A checked request: what the engine gets for it, and how the outputs become its reply."""

    body: RequestBody
    requests: list[Request]
    assembler: ChatAssembler | CompletionAssembler

    def reply(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The route's unstreamed reply; `outputs` are those of the requests. To be called once."""
        for index, output in enumerate(outputs):
            self.assembler.put(index, _whole(output))
        reply: dict[str, Any] = json.loads(self.assembler.whole())
        return reply


def read_body(route: str, fields: object) -> RequestBody:
    """ApiError as the route answers it."""
    check_repeatable(fields)
    schema = SCHEMAS[route]
    try:
        return schema.model_validate(fields)
    except ValidationError as problem:
        raise validation_error(problem.errors(), list(schema.model_fields)) from None


def offline_job(
    body: RequestBody, model: ServedModel, grammars: GrammarCompiler, system: str | None = None
) -> OfflineJob:
    """ApiError, or a lower room's RorqualError, for what cannot be answered.

    `system` is a system message before all others of a chat.
    """
    if isinstance(body, ChatRequest):
        return _chat_job(body, model, grammars, system)
    check_lengths(body, model)
    prompts = completion_prompts(body, model.tokenizer)
    for prompt in prompts:
        model.check_prompt(prompt.ids, "prompt")
    params = completion_params(body, model)
    compiled = None if params.grammar is None else grammars.compile(params.grammar)
    requests = [
        Request(prompt.ids, each, compiled=compiled)
        for prompt in prompts
        for each in choices(params, body.n or 1)
    ]
    return OfflineJob(body, requests, completion_assembler(body, model, prompts))


def _chat_job(
    body: ChatRequest, model: ServedModel, grammars: GrammarCompiler, system: str | None
) -> OfflineJob:
    tokenizer = model.tokenizer
    model.check_length(num_certain_chars(chat_messages(body)), "messages")
    prompt_ids = _prompt_ids(body, model, system)
    model.check_prompt(prompt_ids, "messages")
    begins_thinking = is_thinking(prompt_ids, tokenizer)
    params = chat_params(body, model, prompt_ids, is_thinking=begins_thinking)
    compiled = None if params.grammar is None else grammars.compile(params.grammar)
    requests = [
        Request(prompt_ids, each, compiled=compiled) for each in choices(params, body.n or 1)
    ]
    readers = [chat_reader(body, tokenizer, is_thinking=begins_thinking) for _ in requests]
    return OfflineJob(body, requests, chat_assembler(body, model, readers))


def _prompt_ids(body: ChatRequest, model: ServedModel, system: str | None) -> list[int]:
    text = chat_text(body, model.tokenizer)
    if system is None:
        return text.encode(model.tokenizer)
    text = replace(text, messages=[{"role": "system", "content": system}, *text.messages])
    try:
        return text.encode(model.tokenizer)
    except TokenizerError as problem:  # its places count the system message, which is not theirs
        place = _MESSAGE.sub(lambda found: f"messages[{int(found[1]) - 1}]", str(problem.where))
        raise problem.with_(where=None if problem.where is None else place) from None


def _whole(output: Output) -> Piece:
    """An answer in one piece."""
    return Piece(
        output.text,
        tuple(output.token_ids),
        output.logprobs,
        output.finish_reason,
        output.usage,
        output.prompt_logprobs,
    )
