"""An engine may be told which kernels its model has. Oracle: answers with those that it chooses."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import guessing

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UsageError
from rorqual.model.served import Served
from rorqual.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_plain_kernels_give_the_same_tokens(tokenizer: Tokenizer) -> None:
    prompts = [[5, 9, 2, 7], [*range(3, 60)]]
    answers = []
    for kernels in ("auto", "plain"):
        engine = Engine(guessing(1), tokenizer, kernels=kernels, speculate=1)
        answers.append([output.token_ids for output in engine.generate(prompts, GREEDY)])
    assert answers[0] == answers[1]
    parts = [part for part in engine.model.modules() if isinstance(part, Served)]
    assert {part.kernels.name for part in parts} == {"plain"}


@pytest.mark.parametrize("kernels", ["widened", "fastest"])
def test_kernels_that_cannot_serve_are_refused(kernels: str, tokenizer: Tokenizer) -> None:
    """float32 weights are never widened."""
    with pytest.raises(UsageError, match=kernels):
        Engine(guessing(1), tokenizer, kernels=kernels)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"max_model_len": 1}, "max_model_len"),
        ({"kv_cache_dtype": "int3"}, "int3"),
        ({"cache_memory": 1}, "cache"),
        ({"kernels": "widened"}, "serve no part"),
    ],
)
def test_an_engine_that_is_refused_leaves_the_model_its_kernels(
    others: dict[str, Any], words: str, tokenizer: Tokenizer
) -> None:
    model = guessing(1)
    with pytest.raises(UsageError, match=words):
        Engine(model, tokenizer, **{"kernels": "plain", **others})
    parts = [part for part in model.modules() if isinstance(part, Served)]
    assert {part.kernels.name for part in parts} == {"torch"}
