"""Attention in blocks against torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rorqual.ops.attention import CAUSAL_BLOCK, QUERY_BLOCK, attention, fused_attention

LENGTHS = (1, 5, CAUSAL_BLOCK, CAUSAL_BLOCK + 1, 3 * CAUSAL_BLOCK - 7)


def random_inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values narrower than keys, as in MLA."""
    shapes = ((1, 2, length, 8), (1, 2, length, 8), (1, 2, length, 4))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("length", LENGTHS)
def test_causal_blocks_equal_torch_with_gradients(length: int) -> None:
    q, k, v = random_inputs(length)
    ours = attention(q, k, v, None, 0.3)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(ours)
    for mine, its in zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(theirs, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [7, QUERY_BLOCK + 77])
def test_masked_blocks_equal_torch(length: int) -> None:
    q, k, v = random_inputs(length)
    visible = (torch.rand(1, 1, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)
    ours = attention(q, k, v, visible, 0.3)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 6, CAUSAL_BLOCK + 3])
@pytest.mark.parametrize("num_key_heads", [1, 2])
def test_the_last_queries_of_a_longer_text(num_queries: int, num_key_heads: int) -> None:
    """They equal the last rows of the whole; one key for all heads equals the key repeated."""
    length = CAUSAL_BLOCK + 40
    q, k, v = random_inputs(length)
    k, v = k[:, :num_key_heads], v[:, :num_key_heads]
    ours = attention(q[:, :, -num_queries:], k, v, None, 0.3)
    k, v = k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(ours, theirs[:, :, -num_queries:], rtol=1e-4, atol=1e-5)


# Against explicit products: float32 sums in another order; bfloat16 rounds each result to 2^-9.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_key_heads", [1, 3])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(9, 9), (4, 9), (2, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_form_for_gpus_equals_the_products(
    dtype: torch.dtype, num_key_heads: int, num_queries: int, num_keys: int, is_masked: bool
) -> None:
    """Masks, scale, values narrower than keys, one key for all heads, and the gradients."""
    q = torch.randn(2, 3, num_queries, 24, dtype=dtype, requires_grad=True)
    k = torch.randn(2, num_key_heads, num_keys, 24, dtype=dtype, requires_grad=True)
    v = torch.randn(2, num_key_heads, num_keys, 16, dtype=dtype, requires_grad=True)
    visible = None
    if is_masked:
        visible = torch.rand(2, 1, num_queries, num_keys) < 0.5
        visible[..., 0] = True
    ours = fused_attention(q, k, v, visible, 0.3)
    expected = attention(q, k, v, visible, 0.3)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(ours)
    for mine, its in zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, its, rtol=5 * tolerance, atol=5 * tolerance)
