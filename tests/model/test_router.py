"""The router's three choices, each against a loop written from the report's sentences (§2.1.2)."""

from __future__ import annotations

import torch
from shapes import CONFIGS

from rorqual.model.router import Router
from small import SMALL


def router(name: str) -> Router:
    made = Router(CONFIGS[name])
    with torch.no_grad():
        made.weight.normal_(0, 0.5)
        if CONFIGS[name].has_correction_bias:
            made.e_score_correction_bias.normal_(0, 0.3)
    return made


def chosen_by_hand(scores: list[float], bias: list[float], config) -> set[int]:
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    best_two = [sum(sorted((biased[e] for e in g), reverse=True)[:2]) for g in groups]
    kept = sorted(range(config.n_group), key=lambda g: -best_two[g])[: config.topk_group]
    pool = [e for g in kept for e in groups[g]]
    return set(sorted(pool, key=lambda e: -biased[e])[: config.num_experts_per_tok])


@torch.no_grad()
def test_choice_and_weights_follow_the_report() -> None:
    made = router("half_of_groups")
    routing = made(torch.randn(50, SMALL.hidden_size))
    for t in range(50):
        scores = routing.scores_TE[t].tolist()
        expected = chosen_by_hand(scores, made.e_score_correction_bias.tolist(), made.config)
        assert set(routing.experts_TK[t].tolist()) == expected
        total = sum(scores[e] for e in expected)
        for e, weight in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            assert abs(float(weight) - 2.5 * scores[e] / total) < 1e-6


@torch.no_grad()
def test_a_masked_group_never_wins_when_every_biased_score_is_negative() -> None:
    made = router("groups")
    made.e_score_correction_bias.fill_(-10.0)
    made.e_score_correction_bias[:2] = -9.0  # the first group is the best
    experts = made(torch.randn(20, SMALL.hidden_size)).experts_TK
    groups = experts // 2
    assert all(len(set(row)) <= 2 and 0 in row for row in groups.tolist())


@torch.no_grad()
def test_underflowed_scores_stay_finite() -> None:
    made = router("base")
    made.weight.fill_(-1e4)
    routing = made(torch.ones(3, SMALL.hidden_size))
    assert float(routing.scores_TE.max()) == 0.0
    assert torch.isfinite(routing.weights_TK).all()


def test_bias_gets_no_gradient_but_scores_do() -> None:
    made = router("base")
    made(torch.randn(5, SMALL.hidden_size)).weights_TK.sum().backward()
    assert made.weight.grad is not None
    assert not made.e_score_correction_bias.requires_grad


@torch.no_grad()
def test_scores_are_float32_in_bf16() -> None:
    made = router("base")
    routing = made(torch.randn(5, SMALL.hidden_size).bfloat16())
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32


@torch.no_grad()
def test_greedy_choice_knows_no_groups() -> None:
    """As in V2's modelling code, whatever the groups of the configuration."""
    made = Router(CONFIGS["v2_greedy"].with_changes(n_group=4, topk_group=1))
    made.weight.normal_(0, 0.5)
    routing = made(torch.randn(50, SMALL.hidden_size))
    for scores, experts in zip(
        routing.scores_TE.tolist(), routing.experts_TK.tolist(), strict=True
    ):
        best = sorted(range(len(scores)), key=lambda e: -scores[e])
        assert experts == best[: len(experts)]
