"""From fields to parameters. Oracle: the rules of the API, by hand."""

from __future__ import annotations

from rorqual.engine import MAX_SEED, SamplingParams
from rorqual.serve.sampling import choices, sampling_params
from rorqual.serve.schemas_completions import CompletionRequest


def test_choices_differ_in_their_seeds_also_beyond_the_largest() -> None:
    params = SamplingParams(seed=MAX_SEED - 1)
    assert [choice.seed for choice in choices(params, 4)] == [MAX_SEED - 1, MAX_SEED, 0, 1]
    assert choices(SamplingParams(), 2) == [SamplingParams()] * 2


def test_a_negative_seed_is_a_seed() -> None:
    body = CompletionRequest(prompt="a", seed=-1)
    assert sampling_params(body, SamplingParams(), max_tokens=None).seed == MAX_SEED


def test_what_is_not_said_is_the_models_advice() -> None:
    advice = SamplingParams(temperature=0.3, top_p=0.8, max_tokens=77)
    body = CompletionRequest(prompt="a", top_p=0.5, stop="x")
    params = sampling_params(body, advice, max_tokens=None)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 77)
    assert params.stop == ("x",)
    assert sampling_params(body, advice, max_tokens=5).max_tokens == 5
