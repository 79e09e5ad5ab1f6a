"""FP8 in tiles, quantised as training meets them: activations and gradients (report §3.3.2).

A value is E4M3 times the float32 scale of its tile: amax/448 of 128 neighbours. *Rows* have tiles
of 1x128, along what a product sums over in the forward and input-gradient products; *columns* have
tiles of 128x1, along the tokens, over which a weight's gradient is summed. Weights have blocks of
128x128 with scales of the same formula (checkpoints' own, which must reproduce what they were read
from, are `block_fp8`'s).
"""

# N rows (tokens), K columns, P = ceil(N/128), Q = ceil(K/128), G groups of rows (experts)

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import RorqualError
from rorqual.ops.block_fp8 import BLOCK, E4M3_MAX

TILE = BLOCK
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Quantised(NamedTuple):
    """`values` (N, K) float8_e4m3fn, and `scales` float32, one for each tile of `tile` rows and
    columns: (ceil(N / tile[0]), ceil(K / tile[1])), or (P_of_all_groups, K) where rows come in
    groups, of which each begins a tile.
    """

    values: Tensor
    scales: Tensor
    tile: tuple[int, int]

    def dequantise(self, counts_G: Tensor | None = None) -> Tensor:
        """values * scale as float32, (N, K). `counts_G`: the rows of each group, if it had some."""
        rows, columns = self.values.shape
        scales = self.scales
        if self.tile[1] > 1:
            scales = scales.repeat_interleave(self.tile[1], dim=1)[:, :columns]
        if self.tile[0] > 1:
            scales = scales[_tile_of_row(rows, counts_G, scales.device)]
        return self.values.float() * scales


def quantise_rows(x_NK: Tensor, *, use_ue8m0: bool = False) -> Quantised:
    """Tiles of 1x128 along the last dimension.

    An all-zero tile gets scale 1. With `use_ue8m0` a scale is the least power of two that is not
    below amax/448. RorqualError for NaN or infinity on the CPU; on other devices, where looking
    would make the host wait, the tile's scale is not finite, and so is all that is computed of it.
    """
    _rows, columns = x_NK.shape
    tiles_NQB = F.pad(x_NK.detach().float(), (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scales_NQ = scales_of(tiles_NQB.abs().amax(-1), use_ue8m0)
    values = _to_e4m3(tiles_NQB, scales_NQ[:, :, None]).flatten(1)[:, :columns]
    return Quantised(values.contiguous(), scales_NQ, (1, TILE))


def quantise_columns(
    x_NK: Tensor, counts_G: Tensor | None = None, *, use_ue8m0: bool = False
) -> Quantised:
    """Tiles of 128x1 along the rows, as `quantise_rows`.

    `counts_G` (int64, their sum is N) are the rows of each group, which follow each other; a group
    begins a tile of its own.
    """
    rows, columns = x_NK.shape
    wide = x_NK.detach().float()
    tile_N = _tile_of_row(rows, counts_G, x_NK.device)
    num_tiles = int(tile_N[-1]) + 1 if rows else 0
    amax = wide.new_zeros(num_tiles, columns)
    amax.scatter_reduce_(0, tile_N[:, None].expand_as(wide), wide.abs(), "amax")
    scales = scales_of(amax, use_ue8m0)
    return Quantised(_to_e4m3(wide, scales[tile_N]), scales, (TILE, 1))


def quantise_weight(weight_OI: Tensor, *, use_ue8m0: bool = False) -> Quantised:
    """Blocks of 128x128, as `quantise_rows`."""
    rows, columns = weight_OI.shape
    padded = F.pad(weight_OI.detach().float(), (0, -columns % TILE, 0, -rows % TILE))
    blocks_PAQB = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    scales_PQ = scales_of(blocks_PAQB.abs().amax((1, 3)), use_ue8m0)
    values = _to_e4m3(blocks_PAQB, scales_PQ[:, None, :, None]).flatten(2).flatten(0, 1)
    return Quantised(values[:rows, :columns].contiguous(), scales_PQ, (TILE, TILE))


def scales_of(amax: Tensor, use_ue8m0: bool) -> Tensor:
    """amax/448, at least the smallest normal float32 number; 1 where all is zero."""
    if use_ue8m0:
        return scales_of_powers(amax, E4M3_MAX)
    scales = (_finite(amax) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    return torch.where(amax == 0, 1.0, scales)


def scales_of_powers(amax: Tensor, largest: float) -> Tensor:
    """The least power of two, from 2^-126 on, that is not below amax/largest; 1 for zero."""
    mantissa, exponent = torch.frexp(_finite(amax) / largest)  # mantissa in [0.5, 1)
    exponent = (exponent - (mantissa == 0.5).int()).clamp_min(-126)
    scales = torch.ldexp(torch.ones_like(amax), exponent)
    return torch.where(amax == 0, 1.0, torch.where(torch.isfinite(amax), scales, amax))


def _finite(amax: Tensor) -> Tensor:
    if amax.is_cpu and not bool(torch.isfinite(amax).all()):
        raise RorqualError(
            "values that FP8 cannot hold met a product in FP8",
            found="NaN or infinity",
            expected="finite activations and gradients",
            fix="lower lr_schedule.peak, lengthen lr_schedule.warmup, or train without [fp8]",
        )
    return amax


def _to_e4m3(x: Tensor, scales: Tensor) -> Tensor:
    # torch 2.11 turns what exceeds 448 into NaN where 2.13 saturates: clamp before the cast.
    return (x / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _tile_of_row(rows: int, counts_G: Tensor | None, device: torch.device) -> Tensor:
    """(N,) int64: which tile of 128 rows each row is in."""
    places_N = torch.arange(rows, device=device)
    if counts_G is None:
        return places_N // TILE
    tiles_G = (counts_G + TILE - 1) // TILE
    group_N = torch.repeat_interleave(counts_G, output_size=rows)
    row_starts_G, tile_starts_G = counts_G.cumsum(0) - counts_G, tiles_G.cumsum(0) - tiles_G
    return tile_starts_G[group_N] + (places_N - row_starts_G[group_N]) // TILE
