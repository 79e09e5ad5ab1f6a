"""A chat made ready for the engine: its prompt, how it is sampled, who reads its pieces.

There is no event loop here and no web server: the routes run aside what takes long, and a file of
requests (`offline.py`) has the same steps without them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rorqual.engine import SamplingParams
from rorqual.serve.answer_reader import AnswerReader
from rorqual.serve.chat_assembler import ChatAssembler, ReplyHead
from rorqual.serve.lengths import num_chars
from rorqual.serve.prompts import chat_messages, chat_tools
from rorqual.serve.reply_text import new_id
from rorqual.serve.sampling import sampling_params
from rorqual.serve.schema_keywords import enforceable_body
from rorqual.serve.schemas_chat import ChatRequest
from rorqual.serve.settings import ServedModel
from rorqual.serve.thinking_wish import thinking_switch
from rorqual.serve.tool_grammar import chat_grammar, is_call_forced
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import TOOL_CALL_END

THINKING_SHARE = 4
"""Of its tokens an answer that must be a call reasons with a quarter at most, so that it comes."""


@dataclass(frozen=True)
class ChatText:
    """What the template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool | None

    @property
    def num_chars(self) -> int:
        return num_chars([self.messages, self.tools])

    def encode(self, tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> list[int]:
        """The prompt. TokenizerError for what the template cannot write."""
        return tokenizer.encode_chat(
            self.messages, self.tools, add_generation_prompt, self.thinking
        )


def chat_text(body: ChatRequest, tokenizer: Tokenizer) -> ChatText:
    """ApiError for messages that do not fit together."""
    thinking = thinking_switch(body, tokenizer, body.notes)
    return ChatText(chat_messages(body), chat_tools(body), thinking)


def chat_params(
    body: ChatRequest, model: ServedModel, prompt_ids: Sequence[int], *, is_thinking: bool
) -> SamplingParams:
    """ApiError 422 for a combination without meaning. `is_thinking`: the prompt ends so."""
    tokenizer = model.tokenizer
    params = sampling_params(
        body,
        model.defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=tokenizer.vocab_size,
        grammar=chat_grammar(enforceable_body(body), tokenizer, is_thinking=is_thinking),
    )
    if is_thinking and is_call_forced(body):
        num_left = min(params.max_tokens, model.max_positions - len(prompt_ids))
        share, asked = num_left // THINKING_SHARE, params.max_thinking_tokens
        share = share if asked is None else min(share, asked)
        params = replace(params, max_thinking_tokens=share)
    call_end_id = tokenizer.special_ids.get(TOOL_CALL_END)
    if _is_single(body) and call_end_id is not None:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, call_end_id))
    return params


def chat_reader(body: ChatRequest, tokenizer: Tokenizer, *, is_thinking: bool) -> AnswerReader:
    """Of one answer to the chat."""
    return AnswerReader(
        tokenizer,
        has_tools=chat_tools(body) is not None,
        is_thinking=is_thinking,
        is_single=_is_single(body),
        shows_marks=body.skip_special_tokens is False,
        tool_names=body.tool_names,
    )


def chat_assembler(
    body: ChatRequest,
    model: ServedModel,
    readers: Sequence[AnswerReader],
    num_prompt_tokens: int = 0,
) -> ChatAssembler:
    """`num_prompt_tokens` is for a stream that tells usage as it goes."""
    options = body.stream_options
    has_usage = bool(options and options.include_usage)
    head = ReplyHead(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=model.name,
        has_usage=has_usage,
        has_running_usage=has_usage and bool(options and options.continuous_usage_stats),
        num_prompt_tokens=num_prompt_tokens,
    )
    return ChatAssembler(
        head,
        model.tokenizer,
        readers,
        has_logprobs=bool(body.logprobs),
        custom_names=body.custom_names,
    )


def grammar_field(body: ChatRequest) -> str:
    """The field that is at fault if the grammar is."""
    has_format = body.response_format is not None and body.response_format.type != "text"
    return body.written("response_format") if has_format else "tools"


def _is_single(body: ChatRequest) -> bool:
    """Whether the answer ends after its first call."""
    return chat_tools(body) is not None and body.parallel_tool_calls is False
