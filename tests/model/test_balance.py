"""The balance loss where it arises. Oracle: autograd of the formula, on the gate's own scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rorqual.model import DeepseekV3
from rorqual.model.balance import BalanceTerm, sequence_balance_loss, sequence_loads
from rorqual.model.moe import MoE
from rorqual.train.loss import TrainingModel, balance_seen, coefficients, target_counts
from rorqual.train.recompute import recompute_layers
from small import SMALL, lively, random_tokens

ALPHA = 10.0
NUM_CHOICES = SMALL.num_experts_per_tok


def sparse(model: DeepseekV3) -> MoE:
    return model.sparse_layers()[0]


def with_balance(model: DeepseekV3, alpha: float = ALPHA) -> Any:
    """A function that runs one micro-batch of four samples and gives its loss."""
    ids = random_tokens(model.config, 4, 16 + 1 + model.config.num_nextn_predict_layers)
    mask = torch.ones_like(ids, dtype=torch.bool)
    num_depths = model.config.num_nextn_predict_layers
    by = coefficients(target_counts(mask, num_depths), 4, mtp_weight=0.3, balance_alpha=alpha)
    root = TrainingModel(model)
    return lambda: root(tokens_BS=ids, mask_BS=mask, by=by).total


def gradients(model: DeepseekV3) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_padding", [False, True])
def test_its_gradient_is_that_of_the_formula(has_padding: bool) -> None:
    layer = sparse(lively(SMALL)).train()
    x = torch.randn(3, 8, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    exists = torch.ones(3, 8, dtype=torch.bool)
    exists[1, 5:] = not has_padding
    term = BalanceTerm(torch.tensor(0.7), exists if has_padding else None)
    out = torch.randn(3, 8, SMALL.hidden_size, requires_grad=True)
    layer.balance(out, layer.gate(x.flatten(0, 1)), term).sum().backward()
    found = layer.gate.weight.grad
    layer.gate.weight.grad = None
    scores, chosen = layer.gate(x.flatten(0, 1)).scores_TE, layer.gate(x.flatten(0, 1)).experts_TK
    total = torch.zeros(())
    loads = torch.zeros(SMALL.n_routed_experts, dtype=torch.int64)
    for b in range(3):
        rows = [b * 8 + t for t in range(8) if exists[b, t]]
        shares = scores[rows] / scores[rows].sum(-1, keepdim=True)
        counts = torch.bincount(chosen[rows].flatten(), minlength=SMALL.n_routed_experts)
        f = counts * SMALL.n_routed_experts / (NUM_CHOICES * len(rows))
        total = total + (f * shares.mean(0)).sum()
        loads += counts
    (0.7 * total).backward()
    torch.testing.assert_close(found, layer.gate.weight.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(out.grad, torch.ones_like(out)), "the output is handed on as it is"
    torch.testing.assert_close(layer.balance.loss, total.detach())
    assert torch.equal(layer.balance.loads_E, loads)


def test_nothing_is_counted_without_gradients_or_without_a_term() -> None:
    model = lively(SMALL).train()
    with torch.no_grad():
        with_balance(model)()
    model(random_tokens(SMALL, 2, 9)).sum().backward()
    assert not balance_seen(model).loads_LE.any()


def test_frozen_layers_are_counted_too() -> None:
    """Below all that learns there is no backward pass."""
    counted = []
    for is_frozen in (False, True):
        model = lively(SMALL).train()
        last = f"model.layers.{SMALL.num_layers_with_mtp - 1}."
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen or name.startswith(last))
        with_balance(model)().backward()
        counted.append(balance_seen(model))
    assert torch.equal(counted[0].loads_LE, counted[1].loads_LE)
    torch.testing.assert_close(counted[0].loss, counted[1].loss)


def test_no_factor_on_the_loss_reaches_it() -> None:
    """What the docstring of TrainingModel warns of."""
    found = []
    for factor in (1.0, 0.0):
        model = lively(SMALL).train()
        (factor * with_balance(model)()).backward()
        found.append(gradients(model)[f"model.layers.{first_sparse()}.mlp.gate.weight"])
    assert float(found[1].norm()) > 0


def first_sparse() -> int:
    return SMALL.first_k_dense_replace


def as_it_is(model: DeepseekV3) -> DeepseekV3:
    return model


def recomputed(model: DeepseekV3) -> DeepseekV3:
    recompute_layers(model)
    recompute_layers(model)  # again: nothing more happens
    return model


def copied(model: DeepseekV3) -> DeepseekV3:
    return copy.deepcopy(recomputed(model))


def stored(model: DeepseekV3) -> DeepseekV3:
    """By its checkpoint: a recomputed layer's names are those of the layer."""
    again = recomputed(lively(SMALL).train())
    again.load_state_dict(recomputed(model).state_dict())
    return again


def traced(model: DeepseekV3) -> DeepseekV3:
    for layer in recomputed(model).model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize(
    "change", [recomputed, copied, stored, pytest.param(traced, marks=pytest.mark.slow)]
)
def test_recomputed_layers_count_once_and_give_the_same_gradients(
    change: Callable[[DeepseekV3], DeepseekV3],
) -> None:
    expected, found = [], []
    for how, kept in ((as_it_is, expected), (change, found)):
        model = how(lively(SMALL).train())
        with_balance(model)().backward()
        kept += [balance_seen(model), gradients(model)]
    assert torch.equal(found[0].loads_LE, expected[0].loads_LE)
    torch.testing.assert_close(found[0].loss, expected[0].loss)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_layers_memory_goes_with_its_model() -> None:
    import gc
    import weakref

    model = recomputed(lively(SMALL))
    seen = weakref.ref(model.get_parameter("model.norm.weight"))
    layer = weakref.ref(next(iter(model.model.layers.values())))
    gc.disable()
    try:
        del model
        assert seen() is None
        assert layer() is None
    finally:
        gc.enable()


def test_loads_and_loss_of_one_sequence_by_hand() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 2]])
    counts = sequence_loads(experts_TK, 1, 4)
    assert counts.tolist() == [[2, 1, 1, 0]]
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    # f = 4 / (2 * 2) * counts; P = means of (.4, .25), (.3, .25), (.2, .25), (.1, .25)
    expected = 2 * 0.325 + 0.275 + 0.225
    assert sequence_balance_loss(scores, counts).item() == pytest.approx(expected)
