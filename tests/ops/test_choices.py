"""Which way a search or a scale takes, and where the ways part. Oracles: plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rorqual.ops import attention
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.quant_types import K_QUANTS, SMALL_BLOCKS
from rorqual.ops.quantise import encode_blocks


def test_few_scores_of_one_key_stay_plain_products() -> None:
    """B * H * T * S scores: at the limit still, beyond it and with more keys not."""

    def is_small(num_queries: int, num_keys: int, key_heads: int = 1) -> bool:
        q = torch.empty(2, 8, num_queries, 4, device="meta")
        return attention._is_small(q, torch.empty(2, key_heads, num_keys, 4, device="meta"))

    assert attention.EXPLICIT_SCORES == 1 << 26
    assert is_small(1, 1 << 22)
    assert not is_small(1, (1 << 22) + 1)
    assert not is_small(2, 1 << 22)
    assert not is_small(1, 1, key_heads=8)


@pytest.mark.parametrize("name", [name for name in (*SMALL_BLOCKS, *K_QUANTS) if name != "Q8_0"])
def test_columns_that_count_for_nothing_count_a_little(name: str) -> None:
    """A ten-thousandth of the mean, so that a group of such columns keeps its values; an
    importance of zeros is none at all.
    """
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.zeros(512)
    importance[::3] = 2.0
    raised = importance.clamp_min(1e-4 * float(importance.mean()))
    found = encode_blocks(x, name, importance)
    assert torch.equal(found, encode_blocks(x, name, raised))
    zeros = encode_blocks(x, name, torch.zeros(512))
    assert torch.equal(zeros, encode_blocks(x, name, torch.ones(512)))


@pytest.mark.parametrize("exponent", [-10, 0, 3])
def test_a_power_of_two_that_is_just_enough_is_taken(exponent: int) -> None:
    """amax = 448 * 2^k has the scale 2^k; the next number above has the next power."""
    power = torch.tensor(2.0**exponent)
    for amax, scale in (
        (448 * power, power),
        (torch.nextafter(448 * power, power.new_tensor(torch.inf)), 2 * power),
        (torch.nextafter(448 * power, power.new_tensor(0.0)), power),
        (torch.tensor(0.0), torch.tensor(1.0)),
    ):
        weight = torch.zeros(2, 3)
        weight[1, 2] = -amax
        quantised, found = quantise_blocks(weight, use_ue8m0=True)
        assert found.tolist() == [[scale]]
        assert bool(quantised.float().isfinite().all())


def test_blocks_of_another_size_have_scales_of_their_own() -> None:
    """Oracle: every block quantised alone."""
    weight = torch.randn(5, 7) * torch.logspace(-2, 2, 7)
    quantised, scale = quantise_blocks(weight, 2)
    assert scale.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            alone, (own,) = quantise_blocks(weight[rows, columns].contiguous(), 2)
            assert own == scale[i, j]
            assert torch.equal(quantised[rows, columns].float(), alone.float())
    back = dequantise_blocks(quantised, scale, block=(2, 2))
    error = (back - weight).abs()
    step = F.pad(weight.abs(), (0, 1, 0, 1)).unfold(0, 2, 2).unfold(1, 2, 2).amax((2, 3)) / 16
    assert bool((error <= step.repeat_interleave(2, 0).repeat_interleave(2, 1)[:5, :7]).all())


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_scales_beside_the_nearest_one_lose_nothing(steps: int) -> None:
    """Blocks whose greatest value is 448 times a scale that float32's division misses by one."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-126, 127, (128, 128), generator=generator).to(torch.int8)
    codes = codes.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    codes[0, 0] = 0x7E  # 448
    values = codes.view(torch.float8_e4m3fn).float()
    num_checked = 0
    for scale in torch.rand(200, generator=generator):
        block = values * scale
        found = (block.abs().max() / 448).view(torch.int32) - scale.view(torch.int32)
        if int(found) != steps:
            continue
        back = dequantise_blocks(*quantise_blocks(block))
        assert torch.equal(back, block)
        num_checked += 1
    assert num_checked > 5
