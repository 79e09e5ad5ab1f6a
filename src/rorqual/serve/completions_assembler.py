"""A completion's pieces become chunks or a whole reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rorqual.engine import Piece, TokenLogprob, Usage
from rorqual.serve.chat_assembler import ReplyHead
from rorqual.serve.prompts import Prompt
from rorqual.serve.schemas_completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
)
from rorqual.serve.tokens_text import CompletionTokens, join
from rorqual.serve.usage import usage_body
from rorqual.tokenizer import Tokenizer

CHUNK = "text_completion"


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
        self._num_output_tokens = 0

    def put(self, index: int, piece: Piece) -> list[str]:
        choice = self._choices[index]
        self._num_output_tokens += 0 if self._is_scoring else len(piece.token_ids)
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
        return [self._head.chunk(CHUNK, body | self._head.usage_so_far(self._num_output_tokens))]

    def last(self) -> list[str]:
        usage = self._usage().model_dump() if self._head.has_usage else None
        return [self._head.chunk(CHUNK, {"choices": [], "usage": usage})] if usage else []

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


def _echoed(choice: _Choice, piece: Piece) -> list[CompletionLogprobs]:
    """The prompt's own log-probabilities, without those of tokens the client did not send."""
    if choice.tokens is None:
        return []
    assert piece.prompt_logprobs is not None, "asked for with echo and logprobs"
    hidden = choice.prompt.num_hidden
    return [choice.tokens.put(choice.prompt.ids[hidden:], piece.prompt_logprobs[hidden:])]
