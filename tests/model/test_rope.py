"""Rotary embedding. Oracle: the rotation in float64, by complex numbers, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.model import YarnScaling, preset
from rorqual.model.rope import RotaryAngles, inverse_frequencies, rotate

# Half the distance of two bfloat16 numbers (8 bits), by which the nearest may be off, and what
# float32 angles add (24 bits): at position 131,072 up to 2^-7 of a radian.
ROUNDED, FLOAT32_ANGLE = 2**-8, 2**-24


def exact(x: Tensor, positions: Tensor, angles: RotaryAngles) -> Tensor:
    """x's pairs as complex float64 numbers, turned; [all firsts, all seconds]."""
    turns = positions[:, None].double() * angles.inv_freq.double()
    factors = torch.polar(torch.full_like(turns, angles.magnitude), turns)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * factors
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("name", ["tiny", "671b"])
@pytest.mark.parametrize("start", [0, 4_000, 131_000])
def test_bfloat16_is_rounded_once(name: str, start: int) -> None:
    """A single rounding, and at long positions that of the float32 angle; not the three roundings
    of products in bfloat16, whose error is more than 1.3 times as large.
    """
    config = preset(name)
    angles, positions = RotaryAngles(config), torch.arange(start, start + 64)
    x = torch.randn(16, 64, config.qk_rope_head_dim).bfloat16()
    cos, sin = angles(positions)
    ours = rotate(x, cos, sin)
    assert ours.dtype == torch.bfloat16
    wanted = exact(x, positions, angles)
    length = x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat(1, 1, 2) * angles.magnitude
    limit = wanted.abs() * ROUNDED + length * (FLOAT32_ANGLE * (start + 64) + 1e-6)
    assert ((ours.double() - wanted).abs() <= limit).all()
    in_bfloat16 = rotate_in_bfloat16(x, cos.bfloat16(), sin.bfloat16())
    error, other = ((y.double() - wanted).norm() for y in (ours, in_bfloat16))
    assert error * 1.3 < other


def rotate_in_bfloat16(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers does it."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def test_float32_keeps_its_bits() -> None:
    config = preset("tiny")
    cos, sin = RotaryAngles(config)(torch.arange(64))
    x = torch.randn(4, 64, config.qk_rope_head_dim)
    assert torch.equal(rotate(x, cos, sin), rotate_in_bfloat16(x, cos, sin))


def test_yarns_ramp_may_end_behind_the_last_pair() -> None:
    """Oracle: §3.2 of YaRN by hand. Of R = 8 and theta 100, pair 8 ln(4096 / 2 pi b) / 2 ln 100 is
    2.6 for b = 32 and 5.6 for b = 1: the ramp goes from 2 to 6, and pair 3 is a quarter along it.
    """
    yarn = YarnScaling(factor=4, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
    config = preset("tiny").with_changes(qk_rope_head_dim=8, rope_theta=100.0, rope_scaling=yarn)
    alone = torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    kept = torch.tensor([1.0, 1.0, 1.0, 0.75 + 0.25 / 4])
    torch.testing.assert_close(inverse_frequencies(config), alone * kept)
