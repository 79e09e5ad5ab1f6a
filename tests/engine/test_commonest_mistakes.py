"""What a first try with the Python API gets wrong is told in its terms. Oracle: what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rorqual
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def engine(model: DeepseekV3, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, max_batch=2)


@pytest.mark.parametrize(
    ("prompts", "fix"),
    [
        ("hello", "encode texts first"),
        (["hello"], "encode texts first"),
        ([["hello"]], "encode texts first"),
        (5, "encode texts first"),
        ([1, 2], "put it into a list"),
        (torch.tensor([1, 2]), "put it into a list"),
        (np.array([1, 2]), "put it into a list"),
        ([torch.tensor([1, 2])], "ids.tolist()"),
        ([np.array([1, 2])], "ids.tolist()"),
        (torch.tensor([[1, 2]]), "ids.tolist()"),
        ([[1.0, 2.0]], "must be whole numbers"),
        ([[True]], "must be whole numbers"),
        ([None], "make it a list"),
    ],
    ids=str,
)
def test_prompts_that_are_no_lists_of_ids(engine: Engine, prompts: Any, fix: str) -> None:
    with pytest.raises(UsageError) as problem:
        engine.generate(prompts, GREEDY)
    assert fix in str(problem.value.fix)
    assert not engine.has_work


def test_a_stream_checks_its_prompt_too(engine: Engine) -> None:
    with pytest.raises(UsageError, match="encode texts first"):
        engine.stream("hello", GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [[GREEDY], None, {"temperature": 0}], ids=str)
def test_settings_that_are_none(engine: Engine, params: Any) -> None:
    for ask in (engine.generate, engine.stream):
        with pytest.raises(UsageError, match="one SamplingParams, for all prompts"):
            ask([[3]] if ask == engine.generate else [3], params)  # type: ignore[operator]
    assert not engine.has_work


def test_prompts_may_come_from_a_generator(engine: Engine) -> None:
    prompts = [[3, 4], [5]]
    assert engine.generate((ids for ids in prompts), GREEDY) == engine.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert len(engine.generate([np.array([3, 4]).tolist(), (5,)], GREEDY)) == 2


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([1, 2]),
        torch.tensor(1),
        torch.tensor([[1.0]]),
        torch.tensor([[-1]]),
        torch.tensor([[10**6]]),
        [[1, 2]],
        "hello",
    ],
    ids=str,
)
def test_a_model_is_given_a_batch_of_ids(model: DeepseekV3, tokens: Any) -> None:
    with pytest.raises(UsageError, match="the tokens are no batch of token ids"):
        model(tokens)
    assert model(torch.tensor([[1, 2]], dtype=torch.int32)).shape == (1, 2, model.config.vocab_size)


def test_the_error_that_all_of_them_are_is_public() -> None:
    assert issubclass(UsageError, rorqual.RorqualError)
    assert "RorqualError" in rorqual.__all__
