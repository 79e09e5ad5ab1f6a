"""`POST /v1/completions`, `/completions` and `/beta/completions`: text in, text out, and FIM."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine import Piece, Request, TokenLogprob, Usage
from rorqual.serve.chat_assembler import ReplyHead
from rorqual.serve.fair_pool import Caller
from rorqual.serve.prompts import check_ids, fim_prompt
from rorqual.serve.reply import AnswerResponse, collect
from rorqual.serve.sampling import choices, sampling_params
from rorqual.serve.schemas_completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from rorqual.serve.service import NOBODY, Service, new_id
from rorqual.serve.tokens_text import CompletionTokens, join
from rorqual.serve.usage import usage_body
from rorqual.tokenizer import Tokenizer

NAMES_SPECIAL = "the prompt has names of special tokens as plain text; parse_special reads them"


@dataclass(frozen=True)
class Prompt:
    """One prompt: what the engine gets, and what `echo` shows of it."""

    ids: list[int]
    text: str
    num_hidden: int
    """Ids at the beginning that the client did not send: the begin-of-sentence token."""


class _Choice:
    def __init__(self, prompt: Prompt, tokens: CompletionTokens | None) -> None:
        self.prompt, self.tokens = prompt, tokens
        self.has_begun = False
        self.text: list[str] = []
        self.logprobs: list[CompletionLogprobs] = []
        self.finish_reason: Any = None


class CompletionAssembler:
    """The `Assembler` of the completion route."""

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        body: CompletionRequest,
    ) -> None:
        self._head, self._n = head, body.n or 1
        self._has_echo, self._is_scoring = bool(body.echo), body.max_tokens == 0
        num_top = body.logprobs
        self._choices = [
            _Choice(prompt, None if num_top is None else CompletionTokens(tokenizer, num_top))
            for prompt in prompts
            for _ in range(self._n)
        ]
        self._usages: dict[int, Usage] = {}

    def put(self, index: int, piece: Piece) -> list[str]:
        choice = self._choices[index]
        texts: list[str] = []
        parts: list[CompletionLogprobs] = []
        if not choice.has_begun and self._has_echo:
            texts.append(choice.prompt.text)
            parts += _echoed(choice, piece)
        if not self._is_scoring:
            texts.append(piece.text)
            if choice.tokens is not None:
                items: Sequence[TokenLogprob | None] = piece.logprobs
                parts.append(choice.tokens.put(piece.token_ids, items))
        choice.has_begun = True
        text, logprobs = "".join(texts), join(parts) if parts else None
        choice.text.append(text)
        choice.logprobs += parts
        if piece.finish_reason is not None:
            choice.finish_reason = "length" if self._is_scoring else piece.finish_reason
            assert piece.usage is not None, "the last piece carries the usage"
            self._usages[index] = piece.usage
        if not (text or logprobs or choice.finish_reason):
            return []
        reason = choice.finish_reason
        shown = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        body: dict[str, Any] = {"choices": [shown.model_dump()]}
        return [self._chunk(body | ({"usage": None} if self._head.has_usage else {}))]

    def last(self) -> list[str]:
        usage = self._usage().model_dump() if self._head.has_usage else None
        return [self._chunk({"choices": [], "usage": usage})] if usage else []

    def whole(self) -> str:
        choices = [
            CompletionChoice(
                index=index,
                text="".join(choice.text),
                logprobs=join(choice.logprobs) if choice.logprobs else None,
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        reply = CompletionReply(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=self._usage(),
        )
        return reply.model_dump_json()

    def _usage(self) -> Any:
        usage = usage_body(self._usages, self._n)
        if self._is_scoring:  # the one token that was sampled is not shown
            usage.completion_tokens = 0
            usage.total_tokens = usage.prompt_tokens
        return usage

    def _chunk(self, body: dict[str, Any]) -> str:
        head = {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
        }
        return json.dumps(head | body, ensure_ascii=False)


def _echoed(choice: _Choice, piece: Piece) -> list[CompletionLogprobs]:
    """The prompt's own log-probabilities, without those of tokens the client did not send."""
    if choice.tokens is None:
        return []
    assert piece.prompt_logprobs is not None, "asked for with echo and logprobs"
    hidden = choice.prompt.num_hidden
    return [choice.tokens.put(choice.prompt.ids[hidden:], piece.prompt_logprobs[hidden:])]


async def prepare_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> tuple[list[Request], CompletionAssembler]:
    """ApiError for whatever is wrong with the request."""
    service.check_body(body)
    tokenizer = service.model.tokenizer
    texts = [text for text in _raw_prompts(body) if isinstance(text, str)]
    for text in texts:
        service.check_length(len(text), "prompt")
    service.check_length(len(body.suffix or ""), "suffix")
    prompts = await service.aside(
        lambda: _prompts(body, tokenizer), "prompt", caller, sum(map(len, texts))
    )
    for prompt in prompts:
        service.check_prompt(prompt.ids, "prompt")
    params = sampling_params(
        body,
        service.model.defaults,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
        vocab_size=tokenizer.vocab_size,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    head = ReplyHead(
        id=new_id("cmpl-"),
        created=int(time.time()),
        model=service.model.name,
        has_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    each = choices(params, body.n or 1)
    requests = [
        Request(prompt.ids, param, caller.owner, caller.is_background)
        for prompt in prompts
        for param in each
    ]
    return requests, CompletionAssembler(head, tokenizer, prompts, body)


async def answer_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> AnswerResponse:
    """The response of the route, streamed or not."""
    requests, assembler = await prepare_completion(service, body, caller)
    return AnswerResponse(
        service, requests, assembler, is_stream=bool(body.stream), notes=body.notes
    )


async def collect_completion(
    service: Service, body: CompletionRequest, caller: Caller = NOBODY
) -> str:
    """The reply's JSON, for batches."""
    requests, assembler = await prepare_completion(service, body, caller)
    return await collect(service, requests, assembler)


def _prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    return [_prompt(each, body, tokenizer) for each in _raw_prompts(body)]


def _raw_prompts(body: CompletionRequest) -> list[Any]:
    raw: Any = body.prompt
    is_one = isinstance(raw, str) or isinstance(raw[0], int)
    return [raw] if is_one else raw


def _prompt(raw: str | list[int], body: CompletionRequest, tokenizer: Tokenizer) -> Prompt:
    if not isinstance(raw, str):
        check_ids(raw, tokenizer)
        ids, text = raw, tokenizer.decode(raw) if body.echo else ""
    else:
        reads_special = bool(body.parse_special)
        ids = tokenizer.encode_raw(raw, bos=False, reads_special=reads_special)
        # What a keyboard's bars were read as is shown as it was read.
        text = tokenizer.decode(ids) if reads_special else raw
        if not reads_special and tokenizer.names_special(raw):
            body.notes.say(NAMES_SPECIAL)
    if body.suffix is not None:
        return Prompt(fim_prompt(ids, tokenizer.encode(body.suffix), tokenizer), text, 0)
    has_bos = ids[:1] == [tokenizer.bos_id] or body.add_special_tokens is False
    if isinstance(raw, str) and not has_bos:
        return Prompt([tokenizer.bos_id, *ids], text, 1)
    return Prompt(ids, text, 0)
