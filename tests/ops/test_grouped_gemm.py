"""Grouped GEMM against its plain twin, with empty groups, forward and backward; torch's opcheck."""

from __future__ import annotations

import pytest
import torch

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
