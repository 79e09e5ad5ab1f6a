"""Oracle: closed forms of the filtered distributions, a full sort, and chi-square of the draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sampling_steps import drawn, plain_drawn, probabilities
from torch import Tensor

from rorqual.engine.params import SamplingParams
from rorqual.engine.sampler import (
    BLOCK_PLACES,
    TILE_PLACES,
    check_finite,
    likeliest,
    random_source,
)
from rorqual.errors import CheckpointError

NUM_DRAWS = 10_000
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}  # table: quantile 0.999 by freedom
EXACT = 1e-6  # float32 rounding of a handful of sums

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])  # sorted: ids 1 3 4 0 2
LOGITS = PROBS.log()

CASES: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
    ({"top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({"top_p": 0.39}, [0, 0.4, 0, 0, 0]),
    ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),  # the token that crosses stays
    ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({"top_p": 1e-9}, [0, 0.4, 0, 0, 0]),
    ({"min_p": 0.3}, [0, 0.4, 0, 0.25, 0.2]),
    ({"min_p": 1.0}, [0, 0.4, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0]),  # 0.65 of the 0.85 that top_k left
    ({"top_k": 4, "min_p": 0.6}, [0, 0.4, 0, 0.25, 0]),
    ({"temperature": 2.0}, PROBS.sqrt().tolist()),
    ({"temperature": 1e-9}, [0, 1, 0, 0, 0]),
]


def hot(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0} | settings)


@pytest.mark.parametrize(("settings", "weights"), CASES)
def test_the_distribution_is_the_closed_form(
    settings: dict[str, Any], weights: list[float]
) -> None:
    expected = torch.tensor(weights) / sum(weights)
    ours = probabilities(LOGITS, hot(**settings))
    torch.testing.assert_close(ours, expected, atol=EXACT, rtol=EXACT)


def by_sorting(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The filters, written over a stable sort of the whole vocabulary."""
    probs_V, ids_V = logits_V.double().softmax(-1).sort(descending=True, stable=True)
    if params.top_k is not None:
        probs_V[params.top_k :] = 0
    if params.top_p is not None:
        before_V = F.pad(probs_V.cumsum(-1)[:-1], (1, 0))
        probs_V[before_V >= params.top_p * probs_V.sum()] = 0
    if params.min_p is not None:
        probs_V[probs_V < params.min_p * probs_V[0]] = 0
    return torch.zeros_like(probs_V).scatter(0, ids_V, probs_V / probs_V.sum()).float()


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])  # flat: top_p needs more than its first look
@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_k": 700},
        {"top_k": 2000, "top_p": 0.95},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.1},
    ],
)
def test_filters_equal_a_full_sort(scale: float, settings: dict[str, Any]) -> None:
    num_ids = 5120
    # Exact in bf16, as many models' logits are: plenty of ties at the edges.
    logits_V = (scale * torch.randn(num_ids)).bfloat16().float()
    params = hot(**settings)
    ours, sorted_ = probabilities(logits_V, params), by_sorting(logits_V, params)
    num_differing = int(((ours > 0) != (sorted_ > 0)).sum())
    # Sums in another precision may put one token on the other side of the edge.
    assert num_differing <= (1 if "top_p" in settings else 0)
    torch.testing.assert_close(ours, sorted_, atol=2 / num_ids, rtol=1e-3)


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("num_ids", [1, 5, 256, 1000])
def test_the_likeliest_is_the_lowest_of_equals(
    num_ids: int, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways; of rows in wider ones, of which some hold equal values and some infinities."""
    wide = torch.randint(0, 3, (9, num_ids + 24), generator=torch.Generator().manual_seed(0))
    logits_NV = wide.float()[:, :num_ids]
    logits_NV[3] = -torch.inf
    logits_NV[4] = 0.0
    expected = [row.index(max(row)) for row in logits_NV.tolist()]
    monkeypatch.setattr(Tensor, "is_cpu", is_cpu)
    assert likeliest(logits_NV).tolist() == expected


def test_of_equal_tokens_the_lower_ids_stay() -> None:
    assert probabilities(torch.zeros(8), hot(top_k=3)).nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(torch.zeros(8), hot(top_p=0.4)).nonzero().flatten().tolist() == [*range(4)]
    assert drawn(torch.zeros(1, 8), [SamplingParams(temperature=0)], [0.9]) == [0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    params = hot(seed=0, **settings)
    source = random_source(params)
    uniforms = torch.rand(NUM_DRAWS, dtype=torch.float64, generator=source).tolist()
    ids = drawn(LOGITS.expand(NUM_DRAWS, -1), [params] * NUM_DRAWS, uniforms)
    assert ids[:200] == [plain_drawn(LOGITS, params, uniform) for uniform in uniforms[:200]]
    counts = torch.bincount(torch.tensor(ids), minlength=5)
    expected = probabilities(LOGITS, params) * NUM_DRAWS
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < CHI_SQUARE_999[int(possible.sum()) - 1]


def test_no_random_number_picks_an_impossible_token() -> None:
    logits = torch.tensor([-1000.0, 0.0, 0.0, -1000.0])
    edges = [0.0, 0.5, 0.75, 1 - 2**-53]
    assert drawn(logits.expand(4, -1), [hot()] * 4, edges) == [1, 2, 2, 2]


def test_each_row_has_its_own_temperature() -> None:
    """Also the rows beyond those that are drawn at once."""
    num_rows, num_ids = 2 * 16 + 3, TILE_PLACES["cpu"] // 16
    logits = 3 * torch.randn(num_rows, num_ids)
    temperatures = torch.linspace(0.2, 4, num_rows).tolist()
    uniforms = torch.rand(num_rows, dtype=torch.float64).tolist()
    rows = zip(logits, temperatures, uniforms, strict=True)
    expected = [plain_drawn(row, hot(temperature=t), uniform) for row, t, uniform in rows]
    params = [hot(temperature=t) for t in temperatures]
    assert drawn(logits, params, uniforms) == expected
    assert drawn(logits, params[::-1], uniforms) != expected


def test_a_seed_fixes_the_random_numbers() -> None:
    def numbers(seed: int | None) -> list[float]:
        return torch.rand(20, generator=random_source(hot(seed=seed))).tolist()

    assert numbers(7) == numbers(7)
    assert numbers(7) != numbers(8)
    assert numbers(None) != numbers(None)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(CheckpointError, match="not finite"):
            check_finite(torch.tensor([[0.0, bad]]), bad)
    check_finite(torch.full((2, 8), 3e38), float("inf"))  # large is not infinite, though the sum is


def test_blocks_change_nothing() -> None:
    """Over several blocks of places, the drawn id is the inverse of the cumulative sum."""
    logits = 3 * torch.randn(4, 5 * BLOCK_PLACES + 7)
    logits[:, BLOCK_PLACES : 2 * BLOCK_PLACES] = -1e9  # a whole block of weight 0
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for uniform in torch.rand(200, dtype=torch.float64).tolist():
        ids = drawn(logits, [hot()] * 4, [uniform] * 4)
        expected = (cumulative <= uniform).sum(-1).tolist()
        for row, token_id, likely_id in zip(cumulative, ids, expected, strict=True):
            is_edge = (row - uniform).abs().min() < EXACT  # float32 weights may fall on either side
            assert token_id == likely_id or is_edge
