"""Block FP8. Oracle: a plain loop over blocks, and E4M3 written out from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.errors import RorqualError
from rorqual.ops import block_fp8
from rorqual.ops.block_fp8 import (
    dequantise_blocks,
    dequantise_into,
    num_blocks,
    quantise_blocks,
)

E4M3_STEP = 2**-4  # half a unit in the last of 3 mantissa bits, relative to the value
SHAPES = [(128, 128), (576, 192), (1, 1), (129, 127), (300, 513), (64, 8)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def e4m3_values() -> Tensor:
    """All 127 magnitudes by definition: 4 exponent bits of bias 7, 3 mantissa bits, no infinity."""
    values = [m / 8 * 2**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor(values[:-1])  # the last pattern is NaN


def dequantise_plain(weight: Tensor, scale: Tensor) -> Tensor:
    """The twin: one value after the other."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    values = weight.float()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = values[i, j] * scale[i // 128, j // 128].float()
    return out


def quantise_plain(weight: Tensor) -> Tensor:
    """Block by block, to the nearest value of the table: the scaled error can be no smaller."""
    table = e4m3_values()
    out = torch.empty_like(weight)
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            block = weight[i : i + 128, j : j + 128]
            scale = block.abs().max() / 448
            distance = (block.abs()[..., None] / scale - table).abs()
            out[i : i + 128, j : j + 128] = block.sign() * table[distance.argmin(-1)] * scale
    return out


def random_weight(*shape: int) -> Tensor:
    """Blocks of very different size, so that a scale in the wrong place shows."""
    rows = torch.logspace(-3, 2, shape[-2])[:, None]
    return torch.randn(shape) * rows


@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_is_the_nearest_value(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    quantised, scale = quantise_blocks(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    ours, plain = dequantise_blocks(quantised, scale), quantise_plain(weight)
    # Ties and a scale one float32 step away may differ: the errors may not.
    torch.testing.assert_close((ours - weight).abs(), (plain - weight).abs(), rtol=1e-4, atol=1e-9)
    # Relative to the value where E4M3 is normal, to its smallest step below.
    floor = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    bound = (weight.abs() * E4M3_STEP * 1.001).maximum(floor * 2**-10 * 1.001)
    assert bool(((ours - weight).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_equals_plain(shape: tuple[int, int]) -> None:
    quantised, scale = quantise_blocks(random_weight(*shape))
    assert torch.equal(dequantise_blocks(quantised, scale), dequantise_plain(quantised, scale))


def test_table_is_the_dtype() -> None:
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(bits.float(), e4m3_values())


def test_experts_are_quantised_each_by_itself() -> None:
    weight = random_weight(3, 200, 130)
    quantised, scale = quantise_blocks(weight)
    assert scale.shape == (3, 2, 2)
    for e in range(3):
        one, one_scale = quantise_blocks(weight[e])
        assert same_bits(quantised[e], one)
        assert torch.equal(scale[e], one_scale)
    back = dequantise_blocks(quantised, scale)
    assert torch.equal(back[1], dequantise_blocks(quantised[1], scale[1]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponent=st.floats(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_quantising_again_gives_the_same_bytes(
    rows: int, columns: int, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0**exponent
    quantised, scale = quantise_blocks(weight)
    again, again_scale = quantise_blocks(dequantise_blocks(quantised, scale))
    assert same_bits(quantised, again)
    assert same_bits(scale, again_scale)


@pytest.mark.parametrize("kind", ["amax/448", "power of two"])
def test_blocks_of_other_quantisers_keep_their_values(kind: str) -> None:
    """What DeepSeek's own scripts stored (scale amax/448 as rounded, or ue8m0) loses nothing."""
    weight = torch.randn(1024, 1024).unflatten(0, (8, 128)).unflatten(2, (8, 128))
    scale = weight.abs().amax(dim=(1, 3)) / 448
    if kind == "power of two":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    stored = (weight / scale[:, None, :, None]).clamp(-448, 448)
    stored = stored.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    values = dequantise_blocks(stored, scale)
    again = dequantise_blocks(*quantise_blocks(values))
    assert torch.equal(values, again)


def test_power_of_two_scales_in_either_dtype() -> None:
    quantised = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-20, 20, (2, 3)).float())
    stored = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(dequantise_blocks(quantised, stored), dequantise_blocks(quantised, scale))
    assert torch.equal(dequantise_blocks(quantised, stored), dequantise_plain(quantised, scale))


def test_zero_and_tiny_blocks_stay_finite() -> None:
    weight = torch.zeros(256, 256)
    weight[128:, 128:] = 1e-42  # below the smallest normal float32
    quantised, scale = quantise_blocks(weight)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert scale[0, 0] == 1
    assert bool(torch.isfinite(dequantise_blocks(quantised, scale)).all())


@pytest.mark.parametrize("exponent", [-140, -126, -118, -117, -116])
def test_a_power_of_two_scale_is_a_normal_number(exponent: int) -> None:
    """Below 448 * 2^-126 the least normal scale serves; a processor may flush smaller ones to 0."""
    weight = torch.full((128, 128), 2.0**exponent, dtype=torch.float32)
    _, scale = quantise_blocks(weight, use_ue8m0=True)
    assert scale.item() == max(2.0**-126, 2.0 ** (exponent - 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_an_error(bad: float) -> None:
    weight = torch.zeros(130, 130)
    weight[129, 129] = bad
    with pytest.raises(RorqualError, match="not finite"):
        quantise_blocks(weight)


def test_bfloat16_in_and_out() -> None:
    weight = random_weight(130, 70).bfloat16()
    quantised, scale = quantise_blocks(weight)
    assert same_bits(quantised, quantise_blocks(weight.float())[0])
    out = dequantise_blocks(quantised, scale, torch.bfloat16)
    assert torch.equal(out, dequantise_blocks(quantised, scale).bfloat16())


def test_other_block_sizes_are_read() -> None:
    quantised = torch.randn(10, 12).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 3)
    out = dequantise_blocks(quantised, scale, block=(2, 4))
    expected = quantised.float() * scale.repeat_interleave(2, 0).repeat_interleave(4, 1)
    assert torch.equal(out, expected)


def test_num_blocks() -> None:
    assert [num_blocks(size) for size in (1, 128, 129, 576)] == [1, 1, 2, 5]


@pytest.mark.parametrize("largest_scale", [1e-3, 1e4])  # 1e4: beyond what the bits' way can take
@pytest.mark.parametrize("block", [(128, 128), (48, 100)])
@pytest.mark.parametrize("shape", [(256, 128), (300, 203), (1, 1)])
def test_the_fast_twin_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    block: tuple[int, int],
    largest_scale: float,
) -> None:
    """Every E4M3 number, over several blocks both ways, in tiles lower than a block."""
    monkeypatch.setattr(block_fp8, "TILE_ELEMENTS", 7 * shape[1])
    numbers = [bits for bits in range(256) if bits & 0x7F != 0x7F]
    codes = torch.tensor(numbers, dtype=torch.uint8)[torch.randint(len(numbers), shape)]
    scale = torch.rand(num_blocks(shape[0], block[0]), num_blocks(shape[1], block[1]))
    scale = scale.add_(0.1).mul_(largest_scale)
    for first in (0x80, 0x7F, 0xFF):  # -0 and both NaN
        codes[0, 0], has_nan = first, first != 0x80
        weight = codes.view(torch.float8_e4m3fn)
        for dtype in (torch.float32, torch.bfloat16):
            expected = dequantise_blocks(weight, scale, dtype, block)
            found = dequantise_into(torch.empty(shape, dtype=dtype), weight, scale, block)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert bool(found[0, 0].isnan()) == has_nan
