"""A training step by the C++ kernels. Oracle: the same step by the layers as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_run import LENGTH, VOCAB
from torch import Tensor

from rorqual.model import DeepseekV3
from rorqual.ops import native
from rorqual.train.loss import TrainingModel, balance_seen, coefficients, target_counts
from rorqual.train.precision import compute_in
from rorqual.train.recompute import recompute_layers

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
FLOAT32, BFLOAT16 = 1e-5, 5e-2  # of a tensor's largest value; the latter: its norm
MakeModel = Callable[..., DeepseekV3]


def batch(num_depths: int, is_isolated: bool, share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 4, LENGTH + 1 + num_depths
    given = {
        "tokens_BS": torch.randint(0, VOCAB, shape, generator=generator),
        "mask_BS": torch.rand(shape, generator=generator) < share,
    }
    if is_isolated:
        documents_BS = (torch.rand(shape, generator=generator) < 0.2).long().cumsum(1) + 1
        documents_BS[:, -3:] = 0
        given["documents_BS"] = documents_BS
    return given


def gradients(
    model: DeepseekV3, given: dict[str, Tensor], root: Any = None, micro: int = 2
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All gradients after two micro-batches; the loss, the balance loss and the loads."""
    num_depths = model.config.num_nextn_predict_layers
    counts_C = target_counts(given["mask_BS"], num_depths, given.get("documents_BS"))
    by = coefficients(counts_C, 4, mtp_weight=0.3, balance_alpha=1e-2)
    root = TrainingModel(model) if root is None else root
    total = torch.zeros(())
    for start in range(0, 4, micro):
        parts = root(**{name: x[start : start + micro] for name, x in given.items()}, by=by)
        parts.total.backward()
        total += parts.total.detach()
    seen = balance_seen(model)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, [total, seen.loss, seen.loads_LE.float()]


def assert_equal(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    for name, expected in other[0].items():
        size = float(expected.abs().max())
        torch.testing.assert_close(
            one[0][name],
            expected,
            rtol=0,
            atol=FLOAT32 * max(size, 1e-6),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for found, wanted in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=FLOAT32, atol=FLOAT32)


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no MTP": {"num_nextn_predict_layers": 0},
    "two depths": {"num_nextn_predict_layers": 2},
    "not tied": {"tie_word_embeddings": False},
    "queries whole": {"q_lora_rank": None},
    "queries in a latent": {"q_lora_rank": 12},
    "no shared expert": {"n_shared_experts": 0},
    "all dense": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0},
    "softmax": {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "an expert without rows": {"n_routed_experts": 32, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("is_isolated", [False, True])
def test_equals_the_layers_as_they_are(
    make_model: MakeModel, changes: dict[str, Any], is_isolated: bool
) -> None:
    model, plain = make_model(**changes), make_model(**changes)
    given = batch(model.config.num_nextn_predict_layers, is_isolated, 0.6)
    found = gradients(model, given)
    expected = gradients(plain, given, TrainingModel(plain, is_fused=False))
    assert_equal(found, expected)


@pytest.mark.parametrize("is_isolated", [False, True])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_recomputed_layers_give_the_same_bits(
    make_model: MakeModel, is_isolated: bool, is_narrow: bool
) -> None:
    model, recomputed = make_model(), make_model()
    recompute_layers(recomputed)
    for each in (model, recomputed):
        compute_in(each, "bfloat16" if is_narrow else "float32")
    given = batch(1, is_isolated, 0.6)
    (one, seen), (other, seen_again) = gradients(model, given), gradients(recomputed, given)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert all(map(torch.equal, seen, seen_again))


@pytest.mark.parametrize("is_isolated", [False, True])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_one_graph_equals_eager(make_model: MakeModel, is_isolated: bool, is_narrow: bool) -> None:
    model, traced = make_model(), make_model()
    for each in (model, traced):
        compute_in(each, "bfloat16" if is_narrow else "float32")
    given = batch(1, is_isolated, 0.6)
    root = torch.compile(TrainingModel(traced), backend="aot_eager", fullgraph=True)
    found, expected = gradients(traced, given, root), gradients(model, given)
    assert torch.equal(found[1][2], expected[1][2])
    for name, gradient in expected[0].items():
        error = float((found[0][name] - gradient).norm() / gradient.norm().clamp(min=1e-9))
        assert error < (BFLOAT16 if is_narrow else FLOAT32), name


@pytest.mark.parametrize("num_depths", [0, 1, 2])
def test_bfloat16_is_as_near_as_that_of_the_layers(make_model: MakeModel, num_depths: int) -> None:
    """To the gradients in float32: at most half as far again as the layers as they are."""
    models = [make_model(num_nextn_predict_layers=num_depths) for _ in range(3)]
    given = batch(num_depths, False, 0.6)
    exact, _ = gradients(models[0], given)
    for model in models[1:]:
        compute_in(model, "bfloat16")
    ours, _ = gradients(models[1], given)
    theirs, _ = gradients(models[2], given, TrainingModel(models[2], is_fused=False))

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(
            exact
        )

    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert error(ours) < max(1.5 * error(theirs), 0.02)


def test_micro_batches_without_targets_teach_nothing_but_balance(make_model: MakeModel) -> None:
    model, plain = make_model(), make_model()
    given = batch(1, False, 0.6)
    given["mask_BS"][:2] = False
    found = gradients(model, given)
    assert_equal(found, gradients(plain, given, TrainingModel(plain, is_fused=False)))


@pytest.mark.parametrize(
    "frozen", ["embed_tokens", "experts", "layers.0", "norm", "gate.", "kv_b_proj", "lm_head"]
)
def test_frozen_parts(make_model: MakeModel, frozen: str) -> None:
    changes = {"tie_word_embeddings": False}
    model, plain = make_model(**changes), make_model(**changes)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen not in name)
    given = batch(1, True, 0.6)
    found = gradients(model, given)
    assert not any(frozen in name for name in found[0])
    assert_equal(found, gradients(plain, given, TrainingModel(plain, is_fused=False)))


def test_threads_change_no_bit(make_model: MakeModel) -> None:
    given = batch(1, True, 0.6)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(gradients(make_model(), given)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-6, atol=0)
