"""Engine.update: new weights between steps. Oracle: an engine that was made with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ALWAYS, CONFIG

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer
from small import lively

PROMPTS = [list(range(3, 40)), [7, 9, 11], list(range(3, 30))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)


def model(seed: int) -> DeepseekV3:
    return lively(CONFIG, seed)


DRAFTING = {"speculate": 1, "draft_policy": ALWAYS}  # rounding depends on how many are drafted


@pytest.mark.parametrize("settings", [{}, DRAFTING, {"is_batch_invariant": True}])
def test_answers_are_those_of_the_new_weights(tokenizer: Tokenizer, settings: Any) -> None:
    """The prefix cache knows the same prompts from before."""
    engine = Engine(model(1), tokenizer, **settings)
    before = engine.generate(PROMPTS, GREEDY)
    assert engine.update(model(2).state_dict()) == engine.weights_version == 1
    found = engine.generate(PROMPTS, GREEDY)
    expected = Engine(model(2), tokenizer, **settings).generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert [output.logprobs for output in found] == [output.logprobs for output in expected]
    assert [output.token_ids for output in found] != [output.token_ids for output in before]
    assert {output.weights_versions for output in before} == {(0, 0)}
    assert {output.weights_versions for output in found} == {(1, 1)}
    assert found[0].usage.num_cached_tokens == expected[0].usage.num_cached_tokens
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize("settings", [{}, {"speculate": 1}])
def test_what_runs_goes_on_with_the_new_weights(tokenizer: Tokenizer, settings: Any) -> None:
    """Its past is computed again: the rest is what the new model adds to the old beginning."""
    engine = Engine(model(1), tokenizer, **settings)
    answers = [engine.add(Request(prompt, GREEDY)) for prompt in PROMPTS]
    while min(len(answer.token_ids) for answer in answers) < 4:
        engine.step()
    begun = [list(answer.token_ids) for answer in answers]
    engine.update(model(2).state_dict())
    while engine.has_work:
        engine.step()
    fresh = Engine(model(2), tokenizer)
    for prompt, answer, first in zip(PROMPTS, answers, begun, strict=True):
        output = answer.output()
        assert output.token_ids[: len(first)] == first
        assert output.weights_versions == (0, 1)
        rest = SamplingParams(temperature=0.0, max_tokens=12 - len(first), ignore_eos=True)
        (expected,) = fresh.generate([[*prompt, *first]], rest)
        assert output.token_ids[len(first) :] == expected.token_ids
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_part_of_the_weights(tokenizer: Tokenizer) -> None:
    first, second = model(1), model(2)
    engine = Engine(model(1), tokenizer)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    engine.update({name: second.state_dict()[name].double()})
    first.load_state_dict({**first.state_dict(), name: second.state_dict()[name]})
    expected = Engine(first, tokenizer).generate(PROMPTS, GREEDY)
    found = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]


def test_what_is_not_the_models_changes_nothing(tokenizer: Tokenizer) -> None:
    engine = Engine(model(1), tokenizer)
    before = engine.generate(PROMPTS, GREEDY)
    wrong = {
        "model.norm.weight": torch.zeros(CONFIG.hidden_size),
        "lm_head.weight": torch.zeros(3, 4),
        "model.nowhere": torch.zeros(1),
    }
    with pytest.raises(UsageError) as problem:
        engine.update(wrong)
    assert "lm_head.weight is [3, 4] and not" in str(problem.value.found)
    assert "model.nowhere is not in the model" in str(problem.value.found)
    assert engine.weights_version == 0
    again = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in again] == [output.token_ids for output in before]
