"""A completion made ready for the engine, as `chat_job.py` does it with a chat."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rorqual.engine import SamplingParams
from rorqual.serve.chat_assembler import ReplyHead
from rorqual.serve.completions_assembler import CompletionAssembler
from rorqual.serve.prompts import Prompt, raw_prompts
from rorqual.serve.reply_text import new_id
from rorqual.serve.sampling import sampling_params
from rorqual.serve.schema_keywords import enforceable_form
from rorqual.serve.schemas_completions import CompletionRequest
from rorqual.serve.settings import ServedModel
from rorqual.serve.tool_grammar import form_grammar


def check_lengths(body: CompletionRequest, model: ServedModel) -> int:
    """The number of characters to tokenise; ApiError 400 for a text that cannot fit."""
    texts = [text for text in raw_prompts(body) if isinstance(text, str)]
    for text in texts:
        model.check_length(len(text), "prompt")
    suffix = body.suffix or ""
    model.check_length(len(suffix), "suffix")
    return sum(map(len, [*texts, suffix]))


def completion_params(body: CompletionRequest, model: ServedModel) -> SamplingParams:
    """ApiError 422 for a combination without meaning."""
    return sampling_params(
        body,
        model.defaults,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
        vocab_size=model.tokenizer.vocab_size,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=form_grammar(enforceable_form(body)),
    )


def completion_assembler(
    body: CompletionRequest, model: ServedModel, prompts: Sequence[Prompt]
) -> CompletionAssembler:
    options = body.stream_options
    has_usage = bool(options and options.include_usage)
    head = ReplyHead(
        id=new_id("cmpl-"),
        created=int(time.time()),
        model=model.name,
        has_usage=has_usage,
        has_running_usage=has_usage and bool(options and options.continuous_usage_stats),
        num_prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
    )
    return CompletionAssembler(head, model.tokenizer, prompts, body)
