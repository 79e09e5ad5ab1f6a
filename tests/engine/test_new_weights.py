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
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    zeros = {name: torch.zeros_like(engine.model.state_dict()[name]) for name in (norm, embedding)}
    for nothing, fault in (
        (zeros | {norm: zeros[norm].to("meta")}, "model.norm.weight is on the device meta"),
        (zeros | {norm: zeros[norm].to_sparse()}, "model.norm.weight is sparse"),
        (zeros | {7: zeros[norm]}, "7 is no name"),
        (list(zeros.items()), "list"),
        (None, "NoneType"),
    ):
        with pytest.raises(UsageError) as problem:
            engine.update(nothing)  # type: ignore[arg-type]
        assert fault in str(problem.value.found)
    assert engine.weights_version == 0
    again = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in again] == [output.token_ids for output in before]


def test_one_matrix_under_two_names_takes_one_value(tokenizer: Tokenizer) -> None:
    """A tied embedding and head: the second name must not win over the first in silence."""
    tied = lively(CONFIG.with_changes(tie_word_embeddings=True), 1)
    engine = Engine(tied, tokenizer)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    values = torch.ones_like(tied.state_dict()[head])
    assert engine.update({head: values, embedding: values}) == 1
    with pytest.raises(UsageError) as problem:
        engine.update({head: values, embedding: 2 * values})
    assert "lm_head.weight and model.embed_tokens.weight are one matrix" in str(problem.value.found)
    assert torch.equal(tied.state_dict()[head], values)
