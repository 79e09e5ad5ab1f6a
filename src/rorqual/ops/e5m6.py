"""E5M6, a number in 12 bits: what is kept of the input of the Linear after attention (report
§3.5.2; §3.3.3), with one power-of-two scale for 128 neighbours.

Sign, 5 bits of exponent (bias 15), 6 of mantissa: half precision without its last four bits, so
subnormals go on down to 2^-20. Choice, since the report does not say: the highest exponent means
infinity and NaN, as in half precision, and the largest number is 65024.
"""

# N rows, K columns, Q = ceil(K/128)

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.tile_fp8 import TILE, scales_of_powers

E5M6_MAX = 65024.0
SMALLEST_EXPONENT, MANTISSA_BITS = -14, 6


class Packed12(NamedTuple):
    """`bytes_NB` uint8, 3 for 2 values; `scales_NQ` float32, powers of two; `columns` is K."""

    bytes_NB: Tensor
    scales_NQ: Tensor
    columns: int

    def dequantise(self) -> Tensor:
        """(N, K) float32."""
        values = decode(unpack(self.bytes_NB)).unflatten(1, (-1, TILE))
        return (values * self.scales_NQ[:, :, None]).flatten(1)[:, : self.columns]


def quantise(x_NK: Tensor) -> Packed12:
    """To the nearest E5M6, ties to even, of x over its tile's scale: the least power of two that
    keeps the tile's largest value. RorqualError as in `tile_fp8.quantise_rows`.
    """
    columns = x_NK.shape[1]
    tiles_NQB = F.pad(x_NK.detach().float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scales_NQ = scales_of_powers(tiles_NQB.abs().amax(-1), E5M6_MAX)
    codes = encode(tiles_NQB / scales_NQ[:, :, None])
    return Packed12(pack(codes.flatten(1)), scales_NQ, columns)


def encode(x: Tensor) -> Tensor:
    """float32 of at most 65024 -> codes of 12 bits in int16."""
    exponent = (torch.frexp(x).exponent - 1).clamp_min(SMALLEST_EXPONENT)
    step = torch.ldexp(torch.ones_like(x), exponent - MANTISSA_BITS)
    rounded = torch.round(x / step) * step  # torch rounds halves to even
    half = rounded.clamp(-E5M6_MAX, E5M6_MAX).to(torch.float16)  # exact
    return (half.view(torch.int16) >> 4) & 0xFFF


def decode(codes: Tensor) -> Tensor:
    """Codes of 12 bits in int16 -> float32."""
    return (codes << 4).view(torch.float16).float()


def pack(codes_NK: Tensor) -> Tensor:
    """Pairs of 12 bits -> 3 bytes, the first value's low bits first; K is even."""
    first, second = codes_NK.int().unflatten(1, (-1, 2)).unbind(2)
    both = first | (second << 12)
    parts = [(both >> shift) & 0xFF for shift in (0, 8, 16)]
    return torch.stack(parts, dim=2).flatten(1).to(torch.uint8)


def unpack(bytes_NB: Tensor) -> Tensor:
    """3 bytes -> two codes of 12 bits in int16."""
    low, middle, high = bytes_NB.int().unflatten(1, (-1, 3)).unbind(2)
    both = low | (middle << 8) | (high << 16)
    return torch.stack([both & 0xFFF, both >> 12], dim=2).flatten(1).to(torch.int16)
