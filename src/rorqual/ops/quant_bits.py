"""Small numbers packed into bytes: what the block formats of GGUF have in common."""

# N blocks, H parts of a block, W bytes of a part, S small numbers in a byte

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NIBBLES = (0, 4)
PAIRS = (0, 2, 4, 6)
BITS = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack(packed_NHW: Tensor, shifts: Sequence[int]) -> Tensor:
    """(.., W) bytes -> (.., S, W): the number at each shift, as wide as the shifts' distance."""
    shift_S1 = torch.tensor(shifts, dtype=torch.uint8).unsqueeze(1)
    return (packed_NHW.unsqueeze(-2) >> shift_S1) & _mask(shifts)


def pack(codes_NHSW: Tensor, shifts: Sequence[int]) -> Tensor:
    """The inverse of `unpack`; bits beyond a number's width are left out."""
    packed = codes_NHSW[..., 0, :] & _mask(shifts)
    for index, shift in enumerate(shifts[1:], 1):
        packed = packed | ((codes_NHSW[..., index, :] & _mask(shifts)) << shift)
    return packed


def _mask(shifts: Sequence[int]) -> int:
    return (1 << (shifts[1] - shifts[0])) - 1


def half_of(raw: Tensor, start: int) -> Tensor:
    """The little-endian float16 at byte `start` of each block as float32: (N, B) -> (N, 1)."""
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of each row: (N, k) of any type -> (N, k * itemsize) uint8."""
    return values.contiguous().view(torch.uint8)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, and 0 of a block that holds only zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)
