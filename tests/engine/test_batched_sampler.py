"""Many rows sampled at once, each by its own settings.

Oracles: one row at a time in plain words (`sampling_steps.py`), and transformers' processors for
what the filters and penalties leave.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sampling_steps import (
    adjusted,
    plain_adjusted,
    plain_drawn,
    plain_kept,
    probabilities,
    verified,
)
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.params import SamplingParams
from rorqual.engine.sampler import BLOCK_PLACES, choose
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Scores, verify
from rorqual.errors import CheckpointError

NUM_COMBINATIONS = 200
NUM_IDS = 20_011  # in 79 blocks, of which the first look takes 32
VOCABULARY: Any = SimpleNamespace(vocab_size=NUM_IDS, eos_id=NUM_IDS - 1, special_ids={})
EDGE = 1e-6
"""Sums in another order may put a token beside an edge on its other side."""


def some(guess: random.Random, *values: Any) -> Any:
    return guess.choice([None, *values])


def any_settings(guess: random.Random) -> dict[str, Any]:
    ids = [guess.randrange(NUM_IDS) for _ in range(40)]
    settings = {
        "temperature": guess.choice([0.0, 0.3, 1.0, 1.7]),
        "top_p": some(guess, 0.05, 0.5, 0.95, 0.9999, 1.0),
        "top_k": some(guess, 1, 3, 40, 700, NUM_IDS, 10 * NUM_IDS),
        "min_p": some(guess, 0.0, 1e-3, 0.2, 1.0),
        "repetition_penalty": guess.choice([1.0, 0.7, 1.3]),
        "frequency_penalty": guess.choice([0.0, -0.4, 0.9]),
        "presence_penalty": guess.choice([0.0, 1.5]),
        "logit_bias": some(guess, {ids[0]: 4.0, ids[1]: -100, 7: -3.5}, dict.fromkeys(ids, -100)),
        "allowed_token_ids": some(guess, tuple(ids), (ids[0], ids[0])),
        "min_tokens": guess.choice([0, 3, 6]),
        "stop_token_ids": tuple(ids[2:4]),
        "seed": guess.randrange(1000),
        "ignore_eos": True,
    }
    return settings


def any_logits(guess: random.Random, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(guess.randrange(10_000))
    scales_N1 = torch.tensor([guess.choice([0.02, 1.0, 4.0]) for _ in range(num_rows)])[:, None]
    return scales_N1 * torch.randn(num_rows, NUM_IDS, generator=generator)


def is_near_an_edge(logits_V: Tensor, params: SamplingParams, uniform: float) -> bool:
    """Whether the random number, or a filter, falls between two tokens within rounding."""
    weights_V = plain_kept(logits_V, params)
    sums_V = weights_V.cumsum(-1) / weights_V.sum()
    is_near = bool((sums_V - uniform).abs().min() < EDGE)
    if params.top_p is not None and params.top_p < 1:
        wide = plain_kept(
            logits_V, SamplingParams(temperature=params.temperature, top_k=params.top_k)
        )
        best_V = wide.sort(descending=True).values.cumsum(-1) / wide.sum()
        is_near |= bool((best_V - params.top_p).abs().min() < EDGE)
    return is_near


def test_rows_of_all_kinds_are_what_each_is_alone_in_plain_words() -> None:
    """200 combinations of settings, with drafts, in one call; by hand; and one row a call."""
    guess = random.Random(0)
    prompts = [[guess.randrange(NUM_IDS) for _ in range(30)] for _ in range(NUM_COMBINATIONS)]
    answers = [[guess.choice(prompt) for _ in range(4)] for prompt in prompts]
    params = [SamplingParams(**any_settings(guess)) for _ in prompts]
    logits_NV = any_logits(guess, NUM_COMBINATIONS)

    def state_of(index: int) -> SamplingState:
        state = SamplingState(params[index], prompts[index], VOCABULARY)
        state.commit(answers[index])
        return state

    states = list(map(state_of, range(len(prompts))))
    together = verify(Scores(logits_NV), [[]] * NUM_COMBINATIONS, states)
    num_near = 0
    for index, result in enumerate(together):
        row_V, state = logits_NV[index], state_of(index)
        assert verify(Scores(row_V[None]), [[]], [state]) == [result]
        wanted_V = plain_adjusted(row_V, params[index], prompts[index], answers[index])
        assert torch.equal(adjusted(state, row_V), wanted_V)
        uniform = state.uniform() if params[index].temperature else 0.0
        if result.token_ids != (plain_drawn(wanted_V, params[index], uniform),):
            assert is_near_an_edge(wanted_V, params[index], uniform), params[index]
            num_near += 1
    assert num_near <= 3, "so many edges there cannot be"


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_are_sampled_as_if_they_had_come(num_drafts: int) -> None:
    """Right drafts are accepted: the tokens are those of one step each, with every penalty."""
    guess = random.Random(num_drafts)
    kinds = [any_settings(guess) | {"allowed_token_ids": None} for _ in range(24)]
    prompts = [[guess.randrange(NUM_IDS) for _ in range(9)] for _ in kinds]
    logits = [any_logits(guess, 1 + num_drafts) for _ in kinds]

    def states() -> list[SamplingState]:
        pairs = zip(kinds, prompts, strict=True)
        return [SamplingState(SamplingParams(**kind), p, VOCABULARY) for kind, p in pairs]

    wanted: list[list[int]] = [[] for _ in kinds]
    single = states()
    for offset in range(1 + num_drafts):
        rows_NV = torch.stack([rows[offset] for rows in logits])
        for ids, result in zip(wanted, verified(rows_NV, [[]] * len(kinds), single), strict=True):
            ids += result.token_ids
    results = verify(Scores(torch.cat(logits)), [ids[:-1] for ids in wanted], states())
    for kind, ids, result in zip(kinds, wanted, results, strict=True):
        ends = [at for at, token_id in enumerate(ids) if token_id in kind["stop_token_ids"]]
        stop = 1 + min(ends, default=num_drafts)
        assert result.token_ids == tuple(ids[:stop])
        assert result.num_accepted == min(stop, num_drafts)


def test_verify_moves_no_state() -> None:
    """What it gave may be thrown away, and asked for again."""
    guess = random.Random(5)
    params = [SamplingParams(**any_settings(guess)) for _ in range(20)]
    states = [SamplingState(settings, [5, 6], VOCABULARY) for settings in params]
    logits_NV = any_logits(guess, 40)
    first = verify(Scores(logits_NV), [[9]] * 20, states)
    assert verify(Scores(logits_NV), [[9]] * 20, states) == first


@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 40},
        {"top_k": 9000},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"top_k": 1000, "top_p": 0.4},
        {"top_k": 1000, "top_p": 0.4, "min_p": 0.5},
        {"temperature": 0.5, "top_k": 300, "top_p": 0.9},
    ],
)
def test_the_distributions_are_transformers(scale: float, settings: dict[str, Any]) -> None:
    """One filter on what the one before left: top_p counts within the `top_k` likeliest."""
    import transformers

    logits_1V = scale * torch.randn(1, NUM_IDS, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(**{"temperature": 1.0, **settings})
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        warpers.append(transformers.MinPLogitsWarper(params.min_p))
    left_1V: Any = logits_1V.double()
    for warper in warpers:
        left_1V = warper(torch.zeros(1, 1, dtype=torch.long), left_1V)
    wanted_V = left_1V[0].softmax(-1).float()
    ours_V = probabilities(logits_1V[0], params)
    num_differing = int(((ours_V > 0) != (wanted_V > 0)).sum())
    assert num_differing <= 1, "one token may lie on the edge"
    torch.testing.assert_close(ours_V, wanted_V, atol=2e-4, rtol=1e-3)


def test_equals_at_the_edge_of_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks with the same best weight: of equals the lower ids stay, wherever they lie."""
    num_ids = 80 * BLOCK_PLACES
    logits_V = torch.full((num_ids,), -3.0)
    logits_V[::BLOCK_PLACES] = 1.0  # one in each block
    logits_V[-1] = 2.0
    for settings in ({"top_k": 30}, {"top_k": 30, "top_p": 0.999}, {"top_k": 81}, {"top_k": 90}):
        params = SamplingParams(temperature=1.0, **settings)
        kept = probabilities(logits_V, params).nonzero().flatten().tolist()
        assert kept == plain_kept(logits_V, params).nonzero().flatten().tolist()
    monkeypatch.setattr(sampler, "LOOKS", (sampler._last_look,))
    assert probabilities(logits_V, params).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.5, 0.95, 0.999999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_buckets_find_what_a_sort_finds(
    monkeypatch: pytest.MonkeyPatch, scale: float, top_p: float, min_p: float
) -> None:
    """With plenty of equals: logits as bfloat16 has them."""
    logits_V = scale * torch.randn(NUM_IDS, generator=torch.Generator().manual_seed(3))
    logits_V = logits_V.bfloat16().float()
    params = SamplingParams(temperature=1.0, top_p=top_p, min_p=min_p, top_k=NUM_IDS)
    found = []
    for look in (sampler._look_in_buckets, sampler._last_look):
        monkeypatch.setattr(sampler, "LOOKS", (look,))
        found.append(probabilities(logits_V, params))
    assert int(((found[0] > 0) != (found[1] > 0)).sum()) <= (top_p == 0.999999)
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"top_p": 0.5},
        {"top_k": 9000, "top_p": 0.5},
        {"top_k": 3, "min_p": 0.1},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5, "allowed_token_ids": (3, 4), "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("share", [1, NUM_IDS // 2, NUM_IDS])
def test_logits_that_are_no_numbers_are_this_error_with_every_setting(
    bad: float, settings: dict[str, Any], share: int
) -> None:
    params = SamplingParams(**{"temperature": 1.0, **settings})
    logits_NV = torch.zeros(2, NUM_IDS)
    logits_NV[1, :share] = bad
    states = [SamplingState(params, [5], VOCABULARY) for _ in range(2)]
    with pytest.raises(CheckpointError, match="not finite"):
        verify(Scores(logits_NV), [[], []], states)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = random.Random(8)
    logits_NV = any_logits(guess, 30)
    params = [SamplingParams(**any_settings(guess)) for _ in range(30)]
    states = [SamplingState(settings, [5, 6], VOCABULARY) for settings in params]
    rows = [state.row() for state in states]
    wanted = choose(logits_NV, range(30), rows).tolist()
    assert choose(logits_NV, range(30), rows, is_row_by_row=True).tolist() == wanted
    monkeypatch.setattr(sampler, "TILE_PLACES", {"cpu": 100 * NUM_IDS})
    assert choose(logits_NV, range(30), rows).tolist() == wanted
    backwards = choose(logits_NV, range(29, -1, -1), rows[::-1]).tolist()
    assert backwards[::-1] == wanted
