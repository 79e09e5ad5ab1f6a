"""From a request's fields to SamplingParams: omitted ones take the model's own advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rorqual.engine import MAX_SEED, Grammar, SamplingParams
from rorqual.errors import RorqualError
from rorqual.serve.errors import ApiError, describe
from rorqual.serve.schemas_common import SamplingFields

FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def sampling_params(
    body: SamplingFields,
    defaults: SamplingParams,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    vocab_size: int | None = None,
) -> SamplingParams:
    """The params of the first choice; ApiError 422 for a combination without meaning, and for ids
    beyond `vocab_size`, if that is given.
    """
    values = {name: getattr(body, name) for name in FIELDS if getattr(body, name) is not None}
    if body.top_k is not None:  # 0 and -1 switch it off, whatever the model's advice
        values["top_k"] = body.top_k if body.top_k > 0 else None
    if max_tokens is not None:  # else the model's advice, or SamplingParams' 4096
        values["max_tokens"] = max_tokens
    if body.seed is not None:
        values["seed"] = body.seed % (MAX_SEED + 1)  # any 64 bits, signed or not
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias:
        values["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
        _check_ids("logit_bias", list(values["logit_bias"]), vocab_size)
    if body.stop_token_ids:
        _check_ids("stop_token_ids", body.stop_token_ids, vocab_size)
        values["stop_token_ids"] = (*defaults.stop_token_ids, *body.stop_token_ids)
    if body.allowed_token_ids is not None:
        _check_ids("allowed_token_ids", body.allowed_token_ids, vocab_size)
        values["allowed_token_ids"] = tuple(body.allowed_token_ids)
    if body.ignore_eos is not None:
        values["ignore_eos"] = body.ignore_eos
    if body.min_tokens is not None:
        values["min_tokens"] = body.min_tokens
    if body.thinking_token_budget is not None:
        values["max_thinking_tokens"] = body.thinking_token_budget
    values["include_stop_str_in_output"] = bool(body.include_stop_str_in_output)
    values["skip_special_tokens"] = body.skip_special_tokens is not False
    values |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "grammar": grammar}
    try:
        return replace(defaults, **values)
    except RorqualError as problem:
        message, name = describe(problem), problem.what.partition(" ")[0]
        param = body.written(name) if name in SamplingFields.model_fields else None
        raise ApiError(422, message, code="invalid_value", param=param) from None


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int | None) -> None:
    unknown = [] if vocab_size is None else [i for i in token_ids if i >= vocab_size]
    if unknown:
        message = f"{name}: there is no token {unknown[0]}, only 0 to {(vocab_size or 0) - 1}"
        raise ApiError(422, message, code="invalid_value", param=name)


def choices(params: SamplingParams, n: int) -> list[SamplingParams]:
    """`n` params with the seeds seed, seed + 1, ...: each its own random numbers."""
    if params.seed is None:
        return [params] * n
    seeds = [(params.seed + offset) % (MAX_SEED + 1) for offset in range(n)]
    return [replace(params, seed=seed) for seed in seeds]
