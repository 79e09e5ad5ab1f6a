"""The repetition penalty on every way through the engine.

Oracle: transformers' RepetitionPenaltyLogitsProcessor over prompt and answer, between the whole
text through the model and the likeliest token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling_steps import adjusted
from small_models import ALWAYS, greedy_loop, guessing
from transformers import RepetitionPenaltyLogitsProcessor

from rorqual.engine import Engine, Request, SamplingParams
from rorqual.engine.sampling_state import SamplingState
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

PENALTIES = [0.8, 1.0, 1.1, 1.5, 3.0]
NUM_TOKENS = 14
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def guesser() -> DeepseekV3:
    return guessing(2)


@pytest.fixture(scope="module")
def shared() -> list[list[int]]:
    """Five prompts with one beginning of two blocks and more."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 250, (60,), generator=generator).tolist()
    return [[*ids[:40], *ids[41 : 42 + 3 * n]] for n in range(5)]


@torch.no_grad()
def penalised_loop(
    model: DeepseekV3, tokenizer: Tokenizer, prompt: list[int], penalty: float
) -> list[int]:
    ids, processor = list(prompt), RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(NUM_TOKENS):
        logits_1V = model(torch.tensor([ids]))[:, -1, : tokenizer.vocab_size].float()
        ids.append(int(processor(torch.tensor([ids]), logits_1V).argmax()))  # type: ignore[arg-type]
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_logits_are_transformers(tokenizer: Tokenizer, penalty: float) -> None:
    """Bit for bit, zeros and tokens that are there several times among them."""
    generator = torch.Generator().manual_seed(1)
    logits_V = torch.randn(tokenizer.vocab_size, generator=generator)
    logits_V[[5, 6, 7]] = 0
    prompt, answer = [5, 9, 9, 40, 41], [6, 42, 42, 40, 17]
    state = SamplingState(replace(GREEDY, repetition_penalty=penalty), prompt, tokenizer)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for count in range(len(answer) + 1):
        seen = torch.tensor([[*prompt, *answer[:count]]])
        wanted_1V = processor(seen, logits_V[None].clone())  # type: ignore[arg-type]
        assert torch.equal(adjusted(state, logits_V), wanted_1V[0])
        if count < len(answer):
            state.commit([answer[count]])


WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_batch": 1, "use_prefix_cache": False},
    "together": {},
    "drafts": {"speculate": 2, "draft_policy": ALWAYS},
    "chunks": {"max_step_tokens": 7, "use_prefix_cache": False},
    "drafts and chunks": {"speculate": 2, "draft_policy": ALWAYS, "max_step_tokens": 7},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_transformers_penalty(
    guesser: DeepseekV3, tokenizer: Tokenizer, shared: list[list[int]], way: str
) -> None:
    """Different penalties side by side; the second time every prompt's beginning is cached."""
    wanted = [
        penalised_loop(guesser, tokenizer, prompt, penalty)
        for prompt, penalty in zip(shared, PENALTIES, strict=True)
    ]
    plain = [greedy_loop(guesser, tokenizer, prompt, NUM_TOKENS) for prompt in shared]
    differs = [penalised != text for penalised, text in zip(wanted, plain, strict=True)]
    assert differs == [penalty != 1 for penalty in PENALTIES], "the penalties would not be seen"
    engine = Engine(guesser, tokenizer, **WAYS[way])
    for _ in range(2):
        requests = [
            Request(prompt, replace(GREEDY, repetition_penalty=penalty))
            for prompt, penalty in zip(shared, PENALTIES, strict=True)
        ]
        assert [output.token_ids for output in engine.generate_each(requests)] == wanted
    stats = engine.stats()
    assert (stats.num_prefix_hit_tokens > 0) == WAYS[way].get("use_prefix_cache", True)
    assert (sum(stats.accepted) > 0) == ("speculate" in WAYS[way])
