"""What goes into the engine and what comes out: a request, the pieces of its answer, the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

from rorqual.engine.grammar import CompiledGrammar
from rorqual.engine.logprobs import TokenLogprob
from rorqual.engine.params import SamplingParams, check_params
from rorqual.errors import UsageError

ENCODE = "encode texts first: tokenizer.encode(text), or tokenizer.encode_chat(messages)"
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """Token ids to continue, and how. Owners share the engine alike; what is in the background
    gives way to all that is not. `compiled` is the params' grammar, if it was compiled beforehand.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    owner: str = ""
    is_background: bool = False
    compiled: CompiledGrammar | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_params(self.params)


@dataclass(frozen=True)
class Usage:
    """What an answer took. Of the prompt's tokens `num_cached_tokens` were in the prefix cache.

    `drafted[k]` counts how often a token was drafted k + 1 places ahead, `accepted[k]` how often it
    was right.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step gave one answer. `text` may be empty: it trails the tokens.

    `usage` comes with the last piece, as does `stop`, the stop string that ended the answer, if one
    did; `prompt_logprobs`, one a prompt token and None for the first, with the first piece if they
    were asked for. `weights_version`: which of `Engine.update`'s drew these tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop: str | None = None
    weights_version: int = 0


@dataclass(frozen=True)
class Output:
    """One answer. `token_ids` are all that were sampled, an end-of-sentence included; `text` ends
    before it, and before a stop string. Equal outputs may have taken different work.
    `weights_versions`: with which of `Engine.update`'s the first and the last token were drawn.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage = field(compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    weights_versions: tuple[int, int] = (0, 0)

    @property
    def num_prompt_tokens(self) -> int:
        return self.usage.num_prompt_tokens


def listed(prompts: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """The prompts, which may come from a generator; UsageError for a single one."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise UsageError(
            "the prompts are no list of prompts",
            found=type(prompts).__name__,
            expected="a list of prompts, each a list of token ids",
            fix=f"{ENCODE}; one prompt alone is a list of one: [ids]",
        )
    return list(prompts)


def _check_ids(prompt_ids: object) -> None:
    if isinstance(prompt_ids, str | bytes):
        fix = ENCODE
    elif isinstance(prompt_ids, Integral) or getattr(prompt_ids, "ndim", None) == 0:
        fix = (
            "a list of ids is one prompt: put it into a list, [ids], or [ids.tolist()] of a tensor"
        )
    elif not isinstance(prompt_ids, Sequence):
        fix = "make it a list: list(ids), or ids.tolist() of a tensor or an array"
    elif all(
        issubclass(kind, Integral) and kind is not bool for kind in set(map(type, prompt_ids))
    ):
        return
    else:
        fix = f"its elements must be whole numbers; if they are texts, {ENCODE}"
    raise UsageError(
        "a prompt is no list of token ids",
        found=f"{prompt_ids!r:.80}, of type {type(prompt_ids).__name__}",
        expected="a list of whole numbers",
        fix=fix,
    )


def check_prompt(prompt_ids: Sequence[int], vocab_size: int, max_positions: int) -> None:
    """UsageError for what is no list of ids, is empty, too long, or has an unknown id."""
    _check_ids(prompt_ids)
    if not prompt_ids:
        raise UsageError("the prompt is empty", expected="at least one token")
    if len(prompt_ids) >= max_positions:
        raise UsageError(
            "the prompt does not fit the model's context",
            found=f"{len(prompt_ids)} tokens",
            expected=f"at most {max_positions - 1}, which leaves one for the answer",
            fix="shorten the prompt, or use a model with a longer context or a larger cache",
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise UsageError(
            "the prompt has a token id that the model does not know",
            found=f"ids {min(prompt_ids)} to {max(prompt_ids)}",
            expected=f"0 to {vocab_size - 1}",
            fix="encode the prompt with the tokenizer of this model",
        )
