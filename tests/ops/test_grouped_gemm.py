"""Grouped GEMM against its plain twin, with empty groups, forward and backward; torch's opcheck."""

from __future__ import annotations

import pytest
import torch

from rorqual.ops import grouped_gemm as ops
from rorqual.ops.grouped_gemm import grouped_gemm, grouped_gemm_plain


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [0, 0, 0, 12], [12, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loop(counts: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
    counts_E = torch.tensor(counts)
    plain = grouped_gemm_plain(x, weight, counts_E)
    fast = grouped_gemm(x, weight, counts_E)
    torch.testing.assert_close(fast, plain)
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    actual = torch.autograd.grad(fast, (x, weight), grad)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_operator_is_well_formed() -> None:
    x = torch.randn(7, 4, requires_grad=True)
    weight = torch.randn(3, 5, 4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.rorqual.grouped_gemm.default, (x, weight, torch.tensor([2, 0, 5]))
    )


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [0, 0, 0, 12], [0, 0, 0, 0]])
def test_the_form_for_gpus_equals_the_loop(
    monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> None:
    """torch's `grouped_mm`, which runs on the CPU too, is called with the right arguments."""
    x = torch.randn(sum(counts), 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(ops, "_has_kernel", lambda x, weight, has=has_kernel: has)
        y = grouped_gemm(x, weight, torch.tensor(counts))
        results.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for fast, loop in zip(*results, strict=True):
        torch.testing.assert_close(fast, loop)


def test_the_kernel_is_for_aligned_bfloat16_on_a_device() -> None:
    x = torch.zeros(4, 16, dtype=torch.bfloat16, device="meta")
    weight = torch.zeros(2, 8, 16, dtype=torch.bfloat16, device="meta")
    assert ops._has_kernel(x, weight)
    assert not ops._has_kernel(x.float(), weight.float())
    assert not ops._has_kernel(x, weight[:, :6])  # rows of 12 bytes
    assert not ops._has_kernel(torch.zeros(4, 16, dtype=torch.bfloat16), weight)
