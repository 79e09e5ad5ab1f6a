"""Fused head and cross entropy. Oracle: the plain twin, F.cross_entropy on all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.ops import cross_entropy as ops

FLOAT32 = 1e-5  # relative: other orders of float32 sums


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(300, 16, generator=generator).requires_grad_()
    weight_VD = (scale * torch.randn(70, 16, generator=generator)).requires_grad_()
    targets_N = torch.randint(0, 70, (300,), generator=generator)
    return h_ND, weight_VD, targets_N, torch.rand(300, generator=generator) < 0.5


@pytest.mark.parametrize("scale", [1.0, 100.0])  # at 100 the softmax underflows to zero
@pytest.mark.parametrize("marked", ["all", "some", "none"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_equals_plain(
    monkeypatch: pytest.MonkeyPatch, scale: float, marked: str, block: int
) -> None:
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", block)
    results = []
    for function in (ops.linear_cross_entropy, ops.linear_cross_entropy_plain):
        h_ND, weight_VD, targets_N, some_N = inputs(scale)
        is_target_N = {"all": some_N | True, "some": some_N, "none": some_N & False}[marked]
        total = function(h_ND, weight_VD, targets_N, is_target_N)
        (total * 0.37).backward()
        results.append((total.detach(), h_ND.grad, weight_VD.grad))
    for found, expected in zip(*results, strict=True):
        assert expected is not None
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32 * size)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_the_form_for_gpus_equals_plain(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Unmarked rows run along and count zero, whatever they hold."""
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", block)
    h_ND, weight_VD, targets_N, is_target_N = inputs()
    expected = ops.linear_cross_entropy_plain(h_ND, weight_VD, targets_N, is_target_N)
    expected.backward()
    with torch.no_grad():
        h_ND[~is_target_N] *= 100
        total, grad_h, grad_weight = ops._all_rows(h_ND, weight_VD, targets_N, is_target_N)
    for found, wanted in ((total, expected), (grad_h, h_ND.grad)):
        torch.testing.assert_close(found, wanted, rtol=FLOAT32, atol=FLOAT32)
    assert weight_VD.grad is not None
    assert h_ND.grad is not None
    size = float(weight_VD.grad.abs().max())
    torch.testing.assert_close(grad_weight, weight_VD.grad, rtol=FLOAT32, atol=FLOAT32 * size)


def test_opcheck() -> None:
    torch.library.opcheck(ops._loss_and_gradients, inputs())


def test_token_losses_equal_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 1)
    h_ND, weight_VD, targets_N, is_target_N = inputs()
    losses_N = ops.token_losses(h_ND, weight_VD, targets_N)
    expected = ops.linear_cross_entropy_plain(h_ND, weight_VD, targets_N, is_target_N)
    torch.testing.assert_close(losses_N[is_target_N].sum(), expected.detach())
    assert ops.token_losses(h_ND[:0], weight_VD, targets_N[:0]).shape == (0,)


def test_bfloat16_is_near_float32() -> None:
    h_ND, weight_VD, targets_N, is_target_N = inputs()
    half = h_ND.bfloat16(), weight_VD.bfloat16()
    narrow = ops.linear_cross_entropy(*half, targets_N, is_target_N)
    wide = ops.linear_cross_entropy(h_ND, weight_VD, targets_N, is_target_N)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-2)


BFLOAT16 = 2e-2  # of the largest: gradients and each block's product are rounded to 8 bits


@pytest.mark.parametrize("block", [70 * 64, 1 << 20])
def test_bfloat16_gradients_are_summed_over_all_blocks(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Oracle: the plain twin in float32."""
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", block)
    h_ND, weight_VD, targets_N, is_target_N = inputs()
    half = h_ND.bfloat16(), weight_VD.bfloat16()
    ops.linear_cross_entropy(*half, targets_N, is_target_N).backward()
    exact = [x.detach().clone().requires_grad_() for x in (h_ND, weight_VD)]
    ops.linear_cross_entropy_plain(exact[0], exact[1], targets_N, is_target_N).backward()
    for narrow, wide in zip((h_ND, weight_VD), exact, strict=True):
        assert narrow.grad is not None
        assert wide.grad is not None
        atol = BFLOAT16 * float(wide.grad.abs().max())
        torch.testing.assert_close(narrow.grad, wide.grad, rtol=0, atol=atol)


def test_small_gradients_of_many_blocks_are_not_lost_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sum of 2,048 equal parts in bfloat16 would stop at 256 times a part."""
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 1)
    h_ND = torch.ones(2048, 2, dtype=torch.bfloat16)
    weight_VD = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    targets_N, is_target_N = torch.zeros(2048, dtype=torch.long), torch.ones(2048, dtype=torch.bool)
    ops.linear_cross_entropy(h_ND, weight_VD, targets_N, is_target_N).backward()
    expected = torch.tensor([-0.75, 0.25, 0.25, 0.25]) * 2048
    assert weight_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad.float(), expected[:, None].expand(4, 2))
