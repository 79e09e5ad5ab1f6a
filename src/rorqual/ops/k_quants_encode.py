"""Encoders of the K-quants: a scale (and minimum) for each group, those quantised for the
super-block, then every value rounded with what a decoder will see.

Source: quantize_row_q*_K_ref (no importance) and quantize_row_q*_K_impl of ggml-quants.c. What
differs: Q3_K tries the scales of a grid without an importance too, where the reference moves single
codes from one start, and weighs with sigma^2 + x^2, not x^2 (both errors, weighted and plain, come
out lower than its own); and a value is multiplied by the inverse of its scale, not divided.
"""

# N super-blocks of 256 values, n values of a group, G = N * 256 / n groups

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops.k_quants import (
    SUPER_BLOCK,
    Parts,
    pack_q2_k,
    pack_q3_k,
    pack_q4_k,
    pack_q5_k,
    pack_q6_k,
)
from rorqual.ops.quant_bits import inverse_of, mean_square, square_root, sum_rows
from rorqual.ops.quant_search import (
    FINE_GRID,
    GRID_2_BITS,
    GRID_4_BITS,
    GRID_5_BITS,
    TINY,
    fit_scale,
    fit_scale_and_min,
    fit_scales,
)


def encode_q2_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(N, 256) float32 -> (N, 84) bytes; `importance` (N, 256) weighs each value's column."""
    x_nG = _groups(x, 16)
    if importance is None:
        scale, depth = fit_scale_and_min(x_nG, x_nG.abs(), 3, GRID_2_BITS, use_absolute=True)
        return pack_q2_k(_with_mins(x_nG, scale, depth, 3, 15))
    weight_nG = _groups(_weights(x, importance, 1.0), 16)
    scale, depth = fit_scale_and_min(x_nG, weight_nG, 3, FINE_GRID)
    return pack_q2_k(_with_mins(x_nG, scale, depth, 3, 15, sum_rows(weight_nG)))


def encode_q4_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(N, 256) float32 -> (N, 144) bytes."""
    return pack_q4_k(_four_or_five_bits(x, importance, 15, GRID_4_BITS))


def encode_q5_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(N, 256) float32 -> (N, 176) bytes."""
    return pack_q5_k(_four_or_five_bits(x, importance, 31, GRID_5_BITS))


def encode_q3_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(N, 256) float32 -> (N, 110) bytes."""
    x_nG = _groups(x, 16)
    if importance is None:
        squares = x_nG.square()
        scale = fit_scale(x_nG, squares + sum_rows(squares) / 16, 4).view(-1, 16)
        codes, d = _scales_around_zero(scale, 32)
    else:
        weight_nG = _groups(_weights(x, importance, 2.0), 16)
        scale = fit_scale(x_nG, weight_nG, 4).view(-1, 16)
        sums = sum_rows(weight_nG).view(-1, 16)
        d = fit_scale(scale.t().contiguous(), sums.t().contiguous(), 32).unsqueeze(1)
        codes = (scale * inverse_of(d)).round_().clamp_(-32, 31)
    return pack_q3_k(_signed(x_nG, codes, d, 4))


def encode_q6_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(N, 256) float32 -> (N, 210) bytes."""
    x_nG = _groups(x, 16)
    weight_nG = x_nG.square() if importance is None else _groups(importance, 16)
    scale = fit_scale(x_nG, weight_nG, 32).view(-1, 16)
    return pack_q6_k(_signed(x_nG, *_scales_around_zero(scale, 128), 32))


def _four_or_five_bits(
    x: Tensor, importance: Tensor | None, top: int, grid: tuple[float, ...]
) -> Parts:
    x_nG = _groups(x, 32)
    if importance is None:
        weight_nG = x_nG.abs() + square_root(sum_rows(x_nG.square()) / 32)
        scale, depth = fit_scale_and_min(x_nG, weight_nG, top, grid)
        return _with_mins(x_nG, scale, depth, top, 63)
    weight_nG = _groups(_weights(x, importance, 2.0), 32)
    scale, depth = fit_scale_and_min(x_nG, weight_nG, top, FINE_GRID)
    return _with_mins(x_nG, scale, depth, top, 63, sum_rows(weight_nG))


def _with_mins(
    x_nG: Tensor,
    scale_G: Tensor,
    depth_G: Tensor,
    top: int,
    scale_top: int,
    weight_G: Tensor | None = None,
) -> Parts:
    """Quantises scales and mins by their greatest, or by a search if groups have weights."""
    num_groups = SUPER_BLOCK // x_nG.shape[0]
    (scale, d), (low, dmin) = (
        _quantise_scales(values.view(-1, num_groups), scale_top, weight_G)
        for values in (scale_G, depth_G)
    )
    step_G = (d * scale).flatten()
    codes = (x_nG + (dmin * low).flatten()).mul_(inverse_of(step_G)).round_().clamp_(0, top)
    as_byte = torch.uint8
    return Parts(_super_blocks(codes), scale.to(as_byte), d, low.to(as_byte), dmin)


def _quantise_scales(values: Tensor, top: int, weight_G: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N, groups) in 0 .. top, and their scale (N, 1), rounded to float16."""
    if weight_G is None:
        high = values.amax(1, keepdim=True)
        codes = (values * (top * inverse_of(high))).round_().clamp_(max=top)
        return codes, (high / top).half().float()
    weights = weight_G.view(values.shape)
    scale, codes = fit_scales(values.t().contiguous(), weights.t().contiguous(), top)
    return codes.t(), scale.half().float().unsqueeze(1)


def _signed(x_nG: Tensor, scale: Tensor, d: Tensor, half: int) -> Parts:
    d = d.half().float()
    step_G = (d * scale).flatten()
    codes = (x_nG * inverse_of(step_G)).round_().clamp_(-half, half - 1).add_(half)
    return Parts(_super_blocks(codes), scale.to(torch.int8), d)


def _weights(x: Tensor, importance: Tensor, factor: float) -> Tensor:
    """Importance times sqrt(sigma^2 + x^2): a large value's error counts for more."""
    return importance * square_root(factor * mean_square(x) + x.square())


def _scales_around_zero(scale: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Codes (N, groups), and their scale (N, 1): the one farthest from zero gets the code -half."""
    extreme = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    is_zero = extreme.abs() < TINY
    factor = torch.where(is_zero, 0.0, -half / extreme)
    codes = (scale * factor).round_().clamp_(-half, half - 1)
    return codes, torch.where(is_zero, 0.0, 1 / factor)


def _groups(x: Tensor, size: int) -> Tensor:
    """(N, 256) -> (n, G), so that sums over a group are sums of rows."""
    return x.reshape(-1, size).t().contiguous()


def _super_blocks(codes_nG: Tensor) -> Tensor:
    return codes_nG.to(torch.uint8).t().reshape(-1, SUPER_BLOCK)
