"""The router bias: it moves by signs, drives MaxVio down on skewed data, and stays float32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rorqual.model import DeepseekV3
from rorqual.train.router_bias import max_violation, update_bias

MakeModel = Callable[..., DeepseekV3]


def test_max_violation_closed_form() -> None:
    loads_LE = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2]])
    assert max_violation(loads_LE).tolist() == [0.0, 3.0, 0.5]


def test_update_moves_by_sign_and_leaves_mean_loads(make_model: MakeModel) -> None:
    routers = make_model().routers()[:1]
    update_bias(routers, torch.tensor([[5, 3, 4, 4, 4, 4, 4, 4]]), 0.25)
    assert routers[0].e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]
    update_bias(routers, torch.tensor([[9, 0, 0, 0, 0, 0, 0, 0]]), 0.0)
    assert routers[0].e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert routers[0].e_score_correction_bias.dtype == torch.float32


def test_a_router_without_bias_is_left_alone(make_model: MakeModel) -> None:
    model = make_model(scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
    update_bias(model.routers(), torch.ones(2, 8, dtype=torch.int64), 0.1)
    assert not hasattr(model.routers()[0], "e_score_correction_bias")


def test_bias_drives_max_violation_down_on_skewed_data(make_model: MakeModel) -> None:
    """Tokens lie near one direction, so that without a bias the same experts win every time."""
    router = make_model(n_group=1, topk_group=1).routers()[0]
    generator = torch.Generator().manual_seed(0)
    direction_D = torch.randn(32, generator=generator)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.3, generator=generator)
    history = []
    for _ in range(300):
        x_TD = direction_D + 0.7 * torch.randn(512, 32, generator=generator)
        experts_TK = router(x_TD).experts_TK
        loads_LE = torch.bincount(experts_TK.flatten(), minlength=8)[None]
        history.append(max_violation(loads_LE).item())
        update_bias([router], loads_LE, 0.01)
    assert history[0] > 1.5
    assert sum(history[-20:]) / 20 < 0.25
