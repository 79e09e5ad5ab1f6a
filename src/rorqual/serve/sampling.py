"""From a request's fields to SamplingParams: omitted ones take the model's own advice."""

from __future__ import annotations

from dataclasses import replace

from rorqual.engine import MAX_SEED, Grammar, SamplingParams
from rorqual.errors import RorqualError
from rorqual.serve.errors import ApiError
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
) -> SamplingParams:
    """The params of the first choice; ApiError 422 for a combination without meaning."""
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
    values |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "grammar": grammar}
    try:
        return replace(defaults, **values)
    except RorqualError as problem:
        raise ApiError(422, str(problem).replace("\n", "; "), code="invalid_value") from None


def choices(params: SamplingParams, n: int) -> list[SamplingParams]:
    """`n` params with the seeds seed, seed + 1, ...: each its own random numbers."""
    if params.seed is None:
        return [params] * n
    seeds = [(params.seed + offset) % (MAX_SEED + 1) for offset in range(n)]
    return [replace(params, seed=seed) for seed in seeds]
