"""FP8 in blocks: E4M3 values with one float32 scale for each 128x128 block of a weight (§3.3.2).

The released format: `weight` in float8_e4m3fn and `weight_scale_inv` (ceil(O/128), ceil(I/128));
a value is weight * scale_inv. V3.1 has scales that are powers of two ("ue8m0"), kept as
float8_e8m0fnu or as float32.

Quantising what was dequantised into float32 gives the same values again, bit for bit. The scale is
amax/448, but float32 rounds: fl(fl(448 s) / 448) is s or its neighbour, and never moves a second
time, so we take that fixed point. A block that came from elsewhere may sit on the neighbour, or on
a power of two: such scales are tried, and one is taken where it loses nothing.
"""

# O outputs, I inputs, E experts, P = ceil(O/128), Q = ceil(I/128), b = 128 rows or columns

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import RorqualError

BLOCK = 128
E4M3_MAX = 448.0
TILE_ELEMENTS = 1 << 17  # a float32 tile of 512 kB stays in a core's second cache


def num_blocks(size: int, block: int = BLOCK) -> int:
    """How many blocks cover `size` rows or columns, the last one perhaps in part."""
    return -(-size // block)


def quantise_blocks(
    weight: Tensor, block: int = BLOCK, *, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """weight (O, I) or (E, O, I) floating -> (float8_e4m3fn same shape, float32 (.., P, Q)).

    The largest value of a block becomes 448, the others lose at most a sixteenth of themselves or
    half of scale/512; an all-zero block gets scale 1. With `use_ue8m0` the scale is the least power
    of two that is not below amax/448, as in V3.1. RorqualError for NaN or infinity.
    """
    blocks = _split(weight.detach().float(), block)
    amax = blocks.abs().amax(dim=(-3, -1))
    if not bool(torch.isfinite(amax).all()):
        raise RorqualError(
            "a weight has values that are not finite, which FP8 cannot hold",
            found="NaN or infinity",
            fix="write bfloat16 to look at it, or go back to a checkpoint before the fault",
        )
    scale = _power_of_two_scale(amax) if use_ue8m0 else _lossless_scale(blocks, amax)
    values = _to_e4m3(blocks, scale)
    num_rows, num_columns = weight.shape[-2:]
    joined = values.flatten(-2).flatten(-3, -2)  # (.., P*b, Q*b)
    return joined[..., :num_rows, :num_columns].contiguous(), scale


def dequantise_blocks(
    weight: Tensor,
    scale_inv: Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> Tensor:
    """The values weight * scale_inv as `dtype`, computed in float32. Shapes as `quantise_blocks`.

    `scale_inv` is float32, or float8_e8m0fnu as in V3.1.
    """
    num_rows, num_columns = weight.shape[-2:]
    shape = num_blocks(num_rows, block[0]), num_blocks(num_columns, block[1])
    expected = (*weight.shape[:-2], *shape)
    assert tuple(scale_inv.shape) == expected, f"scales {tuple(scale_inv.shape)}, not {expected}"
    scale = scale_inv.float().repeat_interleave(block[1], dim=-1)[..., :num_columns]
    rows = [
        part.float() * scale[..., i : i + 1, :]
        for i, part in enumerate(weight.split(block[0], dim=-2))
    ]
    return torch.cat(rows, dim=-2).to(dtype)


def dequantise_into(
    out: Tensor, weight: Tensor, scale_inv: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)
) -> Tensor:
    """The fast twin of `dequantise_blocks` for a matrix on the CPU: fills and returns `out` (O, I).

    E4M3 has three bits of mantissa and four of exponent; moved to where float32 has them, they mean
    the same number, subnormals included, times 2^-120. So a shift and a mask take the place of
    torch's conversion, which is slow, and the scale makes up for the exponent.
    """
    num_rows, num_columns = weight.shape
    bits = weight.view(torch.int8)
    scale = scale_inv.float()
    # 480, which the bits of NaN would give, must not come out, nor a scale * 2^120 that overflows.
    has_nan = bool((weight.view(torch.uint8) & 0x7F).amax() == 0x7F)
    if has_nan or not bool((scale < 128).all()):
        return out.copy_(dequantise_blocks(weight, scale_inv, out.dtype, block))
    scale = (scale * 2.0**120).repeat_interleave(block[1], dim=-1)[:, :num_columns]
    height = min(block[0], max(1, TILE_ELEMENTS // num_columns))
    buffer = torch.empty((height, num_columns), dtype=torch.int32)
    for block_start in range(0, num_rows, block[0]):
        block_stop = min(block_start + block[0], num_rows)
        row = scale[block_start // block[0]]
        for start in range(block_start, block_stop, height):
            stop = min(start + height, block_stop)
            tile = buffer[: stop - start].copy_(bits[start:stop])  # the sign fills the upper bits
            tile.bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_NUMBER)
            out[start:stop] = tile.view(torch.float32).mul_(row)
    return out


_SIGN_AND_NUMBER = 0x87F00000 - (1 << 32)  # as a signed 32-bit integer


def _split(x: Tensor, block: int) -> Tensor:
    """(.., O, I) -> (.., P, b, Q, b), padded with zeros."""
    num_rows, num_columns = x.shape[-2:]
    padded = F.pad(x, (0, -num_columns % block, 0, -num_rows % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))


def _to_e4m3(blocks: Tensor, scale: Tensor) -> Tensor:
    # torch 2.11 turns what exceeds 448 into NaN where 2.13 saturates: clamp before the cast.
    scaled = (blocks / scale[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn)


def _lossless_scale(blocks: Tensor, amax: Tensor) -> Tensor:
    """(.., P, Q): a scale that reproduces the block exactly where one of ours does, else amax/448.

    One row of each block is tried first, so that ordinary weights cost next to nothing here.
    """
    smallest = torch.finfo(torch.float32).tiny
    nearest = (amax / E4M3_MAX).clamp_min(smallest)
    stable = (nearest * E4M3_MAX / E4M3_MAX).clamp_min(smallest)
    power_of_two = torch.exp2(torch.ceil(torch.log2(nearest)))
    candidates = [
        stable,
        nearest,
        torch.nextafter(stable, torch.zeros_like(stable)),
        torch.nextafter(stable, torch.full_like(stable, torch.inf)),
        power_of_two,
    ]
    scale, is_open = stable, amax > 0
    for candidate in candidates:
        fits = is_open & _is_exact(blocks[..., :1, :, :], candidate)
        if bool(fits.any()):
            fits &= _is_exact(blocks, candidate)
            scale = torch.where(fits, candidate, scale)
            is_open &= ~fits
        if not bool(is_open.any()):
            break
    return torch.where(amax > 0, scale, 1.0)


def _power_of_two_scale(amax: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # mantissa in [0.5, 1)
    exponent = (exponent - (mantissa == 0.5).int()).clamp_min(-126)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), exponent), 1.0)


def _is_exact(blocks: Tensor, scale: Tensor) -> Tensor:
    """(.., P, Q) boolean: the block is the same after quantising with `scale` and back."""
    back = _to_e4m3(blocks, scale).float() * scale[..., :, None, :, None]
    return (back == blocks).all(dim=-1).all(dim=-2)
