"""The loss and the step: closed forms, accumulation against one batch, compiled against eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_run import LENGTH, VOCAB, SyntheticBatches
from torch import Tensor

from rorqual.errors import TrainingError
from rorqual.model import DeepseekV3
from rorqual.model.balance import sequence_balance_loss, sequence_loads
from rorqual.train.loss import (
    TrainingModel,
    balance_seen,
    coefficients,
    target_counts,
)
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.recompute import recompute_layers
from rorqual.train.step import InTurn, Stepper, StepResult, StepValues

FLOAT32 = 1e-5  # relative: other orders of float32 sums
ALPHA = 1e-2
MakeModel = Callable[..., DeepseekV3]


def values(lr: float = 1e-3, speed: float = 0.0) -> StepValues:
    return StepValues(lr=lr, mtp_weight=0.3, balance_alpha=ALPHA, bias_update_speed=speed)


def batch_with_mask(num_samples: int = 8) -> tuple[Tensor, Tensor]:
    tokens_BS = SyntheticBatches().batch(0, num_samples).tokens_BS
    generator = torch.Generator().manual_seed(0)
    return tokens_BS, torch.rand(tokens_BS.shape, generator=generator) < 0.6


def step(model: DeepseekV3, micro_batch_size: int, **options: Any) -> StepResult:
    stepper = Stepper(
        model, AdamW(model, OptimizerSettings()), micro_batch_size=micro_batch_size, **options
    )
    return stepper.step(*batch_with_mask(), values())


def test_loss_is_the_sum_of_its_parts_written_out(make_model: MakeModel) -> None:
    """Oracle: the report's formulas on full logits, with F.cross_entropy and loops."""
    model = make_model(num_nextn_predict_layers=2)
    tokens_BS = SyntheticBatches(num_depths=2).batch(0, 4).tokens_BS
    mask_BS = torch.rand(tokens_BS.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    by = coefficients(target_counts(mask_BS, 2), 4, mtp_weight=0.3, balance_alpha=ALPHA)
    parts = TrainingModel(model)(tokens_BS=tokens_BS, mask_BS=mask_BS, by=by)
    parts.total.backward()
    seen = balance_seen(model)

    routing: list[Any] = []
    for router in model.routers():
        router.register_forward_hook(lambda *call: routing.append(call[-1]))
    hidden = model.hidden(tokens_BS[:, :LENGTH])
    losses = []
    for depth in range(3):
        if depth:
            next_tokens = tokens_BS[:, depth : LENGTH + depth]
            hidden = model.mtp_hidden(depth, hidden, next_tokens)
        wanted = slice(depth + 1, LENGTH + depth + 1)
        targets = tokens_BS[:, wanted].masked_fill(~mask_BS[:, wanted], -100)
        losses.append(F.cross_entropy(model.head(hidden).flatten(0, 1), targets.flatten()))
    balance = 0.0
    num_experts, num_choices = 8, 2
    for layer in routing:
        for scores_TE, experts_TK in zip(
            layer.scores_TE.split(LENGTH), layer.experts_TK.split(LENGTH), strict=True
        ):
            for expert in range(num_experts):
                count = (experts_TK == expert).sum().item()
                f = num_experts / (num_choices * LENGTH) * count
                p = (scores_TE[:, expert] / scores_TE.sum(1)).mean().item()
                balance += ALPHA * f * p / 4
    expected = losses[0] + 0.3 / 2 * (losses[1] + losses[2])
    torch.testing.assert_close(parts.total, expected, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(parts.cross_entropy_C, torch.stack(losses).detach())
    assert (seen.loss * by.balance).item() == pytest.approx(balance, rel=FLOAT32)
    assert seen.loads_LE.sum(1).tolist() == [4 * LENGTH * num_choices] * len(routing)


def test_balance_loss_of_a_balanced_sequence_is_one() -> None:
    experts_TK = torch.arange(8).repeat(2)[:, None]
    counts_BE = sequence_loads(experts_TK, 2, 8)
    assert counts_BE.tolist() == [[1] * 8] * 2
    assert sequence_balance_loss(torch.full((16, 8), 0.5), counts_BE).item() == pytest.approx(2.0)


def test_accumulation_equals_one_large_batch(make_model: MakeModel) -> None:
    large, small = make_model(), make_model()
    one, many = step(large, 8), step(small, 2)
    assert many.loss == pytest.approx(one.loss, rel=FLOAT32)
    assert many.mtp == pytest.approx(one.mtp, rel=FLOAT32)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=FLOAT32)
    assert torch.equal(many.loads_LE, one.loads_LE)
    for name, parameter in large.named_parameters():
        expected, found = parameter.grad, small.get_parameter(name).grad
        assert expected is not None
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32 * scale)


def test_activation_checkpointing_counts_the_load_once(make_model: MakeModel) -> None:
    plain, recomputed = make_model(), make_model()
    recompute_layers(recomputed)
    one, other = step(plain, 4), step(recomputed, 4)
    assert torch.equal(one.loads_LE, other.loads_LE)
    assert one.loss == other.loss
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, recomputed.get_parameter(name))


def test_the_step_is_one_graph_and_equals_eager(make_model: MakeModel) -> None:
    """fullgraph: not one break, with the grouped GEMM and the cross entropy as opaque operators."""
    eager, traced = make_model(), make_model()
    run = InTurn(traced)
    run.loss = torch.compile(TrainingModel(traced), backend="aot_eager", fullgraph=True)
    stepper = Stepper(traced, AdamW(traced, OptimizerSettings()), run, micro_batch_size=4)
    one, other = step(eager, 4), stepper.step(*batch_with_mask(), values())
    assert other.loss == pytest.approx(one.loss, rel=FLOAT32)
    assert torch.equal(other.loads_LE, one.loads_LE)


@pytest.mark.slow  # a minute of C++ compilation
def test_compiled_equals_eager(make_model: MakeModel) -> None:
    eager, compiled = make_model(), make_model()
    one, other = step(eager, 4), step(compiled, 4, accumulate=InTurn(compiled, use_compile=True))
    assert other.loss == pytest.approx(one.loss, rel=FLOAT32)
    assert other.main == pytest.approx(one.main, rel=FLOAT32)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert torch.equal(other.loads_LE, one.loads_LE)


def test_overfits_one_batch(make_model: MakeModel) -> None:
    model = make_model()
    stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=8)
    batch = SyntheticBatches().batch(0, 8)
    losses = [stepper.step(batch.tokens_BS, batch.mask_BS, values(1e-2)) for _ in range(60)]
    assert losses[0].main == pytest.approx(math.log(VOCAB), rel=0.1)
    assert losses[-1].main < 0.05
    assert losses[-1].mtp[0] < 0.1


def test_masked_targets_teach_nothing(make_model: MakeModel) -> None:
    model = make_model()
    tokens_BS, _ = batch_with_mask(4)
    mask_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    by = coefficients(target_counts(mask_BS, 1), 4, mtp_weight=0.3, balance_alpha=0.0)
    parts = TrainingModel(model)(tokens_BS=tokens_BS, mask_BS=mask_BS, by=by)
    parts.total.backward()
    assert parts.total.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), (
        "a gradient came from targets outside the mask"
    )


def test_infinite_loss_moves_nothing(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("inf")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=8)
    with pytest.raises(TrainingError, match="not finite; the weights were not moved"):
        stepper.step(*batch_with_mask(), values(speed=0.1))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bfloat16_products_are_near_float32(make_model: MakeModel) -> None:
    plain, narrow = make_model(), make_model()
    one = step(plain, 8)
    stepper = Stepper(
        narrow, AdamW(narrow, OptimizerSettings()), micro_batch_size=8, precision="bfloat16"
    )
    other = stepper.step(*batch_with_mask(), values())
    assert other.loss == pytest.approx(one.loss, rel=1e-2)  # eight bits of mantissa
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    assert all(r.e_score_correction_bias.dtype == torch.float32 for r in narrow.routers())


class TwoReplicas:
    """This rank's numbers stand for the other's too, who has the same samples."""

    num_replicas = 2

    def sum(self, values: Tensor) -> Tensor:
        return values * 2

    def norm(self, own: Tensor) -> Tensor:
        return own * 2


def test_a_step_asks_the_other_ranks_for_what_is_common(make_model: MakeModel) -> None:
    """Oracle: one rank that takes all samples, both ranks' in turn."""
    halves, whole = make_model(), make_model()
    tokens_BS, mask_BS = batch_with_mask(4)
    stepper = Stepper(
        halves, AdamW(halves, OptimizerSettings()), micro_batch_size=4, ranks=TwoReplicas()
    )
    found = stepper.step(tokens_BS, mask_BS, values(speed=0.01))
    twice = torch.cat([tokens_BS, tokens_BS]), torch.cat([mask_BS, mask_BS])
    stepper = Stepper(whole, AdamW(whole, OptimizerSettings()), micro_batch_size=4)
    expected = stepper.step(*twice, values(speed=0.01))
    for name in ("loss", "main", "balance", "grad_norm", "num_targets"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=FLOAT32), name
    assert found.mtp == pytest.approx(expected.mtp, rel=FLOAT32)
    assert torch.equal(found.loads_LE, expected.loads_LE)
    for one, other in zip(halves.routers(), whole.routers(), strict=True):
        assert torch.equal(one.e_score_correction_bias, other.e_score_correction_bias)


def test_what_a_failed_step_counted_is_forgotten(make_model: MakeModel) -> None:
    model, whole = make_model(), make_model()
    stepper = Stepper(model, AdamW(model, OptimizerSettings()), micro_batch_size=8)

    def fail(*_: object) -> None:
        raise MemoryError

    hook = model.get_parameter("model.embed_tokens.weight").register_hook(fail)
    with pytest.raises(MemoryError):
        stepper.step(*batch_with_mask(), values())
    hook.remove()
    assert torch.equal(stepper.step(*batch_with_mask(), values()).loads_LE, step(whole, 8).loads_LE)
