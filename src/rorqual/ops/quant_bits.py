"""Small numbers packed into bytes, scales and sums: what GGUF's block formats have in common."""

# N blocks, H parts of a block, W bytes of a part, S small numbers in a byte; n values of a group,
# G groups; R rows of C values

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NIBBLES = (0, 4)
PAIRS = (0, 2, 4, 6)
BITS = (0, 1, 2, 3, 4, 5, 6, 7)
SMALLEST = 2.0**-126  # float32's smallest number whose inverse it holds


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
    """1 / scale, and 0 where the scale is zero or so small that float32 has no inverse."""
    return torch.where(scale.abs() < SMALLEST, 0.0, 1 / scale)


def square_root(x: Tensor) -> Tensor:
    """Rounded correctly, as C's is: torch's float32 is off by one unit for a fifth of all numbers
    where MKL computes it.
    """
    return x.double().sqrt_().float()


def sum_rows(x_nG: Tensor) -> Tensor:
    """(n, G) -> (G,): sixteen rows, one after the other, and then those sums, as the C++ encoders
    add. How torch itself groups its additions depends on the size.
    """
    sums = []
    for rows in x_nG.split(16):
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        sums.append(total)
    for later in sums[1:]:
        sums[0] += later
    return sums[0]


def mean_square(x_RC: Tensor) -> Tensor:
    """(R, 1): of each row, added up by columns of sixteen."""
    squares = x_RC.square().view(len(x_RC), -1, 16).transpose(0, 1)
    sums_R16 = sum_rows(squares.flatten(1)).view(-1, 16)
    return sum_rows(sums_R16.t()).unsqueeze(1) / x_RC.shape[1]
