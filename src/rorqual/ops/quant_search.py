"""The search for the scale of a group: round with many scales, fit each by least squares, keep the
best.

Source: ggml's make_qx_quants, make_qkx2_quants, make_qkx3_quants and make_qp_quants
(ggml-quants.c), vectorised over groups: elements of a group lie along the first dimension, so that
every sum is a sum of rows. The error of a fitted candidate follows from the same sums as the fit,
so that the values are gone through once a candidate: by a kernel, where there is enough to do.
"""

# n elements of a group, G groups

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.compiled import Compiled, can_compile

# Kernels are compiled for this many values. At least half as many are padded to it; for fewer,
# compiling would take longer than the work.
KERNEL_VALUES = 1 << 18
TINY = 1e-15  # a group whose values are all smaller is taken for zero (GROUP_MAX_EPS)


def _steps(first: int, last: int, size: float) -> tuple[float, ...]:
    return tuple(step * size for step in range(first, last + 1))


# What is added to the number of levels when a scale is tried. Choice: the reference's ranges in
# wider steps (its own are 0.1, with an importance 0.05), for half of the work and 0.5 % more error.
GRID_2_BITS = _steps(-3, 7, 0.15)
GRID_4_BITS = _steps(-5, 5, 0.2)
GRID_5_BITS = _steps(-3, 7, 0.15)
FINE_GRID = _steps(-9, 9, 0.1)
SIGNED_GRID = _steps(-6, 6, 0.15)
SCALES_GRID = _steps(-4, 4, 0.1)
MAX_ROUNDS = 5


def fit_scale_and_min(
    x_nG: Tensor,
    weight_nG: Tensor,
    top: int,
    grid: Sequence[float],
    *,
    use_absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(scale_G, depth_G), both >= 0, for x ~ scale * code - depth with codes 0 .. `top`.

    Minimises the weighted squared error, or chooses by the weighted absolute error.
    """
    begin, improve = _steps_with_min(top, use_absolute, _is_enough(x_nG))
    x, weight = _filled(x_nG), _filled(weight_nG)
    fixed, found = begin(x, weight).split(3)
    for offset in grid:
        found = improve(x, weight, fixed, found, torch.tensor(offset))
    _, scale_G, low_G = found[:, : x_nG.shape[1]].unbind()
    return scale_G, -low_G.clamp(max=0)


@cache
def _steps_with_min(
    top: int, use_absolute: bool, has_kernels: bool
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`_begin_with_min` and `_improve_with_min` for `top` levels, perhaps as kernels."""
    begin = partial(_begin_with_min, top, use_absolute)
    improve = partial(_improve_with_min, top, use_absolute)
    return (Compiled(begin), Compiled(improve)) if has_kernels else (begin, improve)


# Codes and values are taken from their middle: the candidates' errors differ in the sixth digit of
# the sums, which float32 keeps only where little cancels.


def _begin_with_min(top: int, use_absolute: bool, x_nG: Tensor, weight_nG: Tensor) -> Tensor:
    """(6, G): the values' weighted mean, the weights' sum, the greatest value; then the quality,
    scale and minimum of the first candidate, which reaches both extremes and is not fitted.
    """
    middle = (top + 1) // 2
    low_G, high_G = x_nG.amin(0).clamp(max=0), x_nG.amax(0)
    sum_w = weight_nG.sum(0)
    mean_G = (weight_nG * x_nG).sum(0) / torch.where(sum_w > 0, sum_w, 1.0)
    codes = _codes_with_min(x_nG, low_G, high_G, top, top)
    scale_G = (high_G - low_G) / top
    at_middle = low_G + scale_G * middle
    if use_absolute:
        quality = -_absolute_error(x_nG, weight_nG, codes, scale_G, at_middle)
    else:
        product = weight_nG * codes
        sum_l, sum_ll = product.sum(0), (product * codes).sum(0)
        sum_xl = (product * (x_nG - mean_G)).sum(0)
        shift = at_middle - mean_G
        quality = scale_G * (2 * (sum_xl - shift * sum_l) - scale_G * sum_ll)
        quality = quality - shift * shift * sum_w
    return torch.stack([mean_G, sum_w, high_G, quality, scale_G, low_G])


def _improve_with_min(
    top: int,
    use_absolute: bool,
    x_nG: Tensor,
    weight_nG: Tensor,
    fixed_3G: Tensor,
    found_3G: Tensor,
    offset: Tensor,
) -> Tensor:
    """`found_3G`, or where it is better the candidate with top + `offset` levels, fitted.

    Levels are counted from the best minimum so far, as the reference does: it pays.
    """
    middle = (top + 1) // 2
    mean_G, sum_w, high_G = fixed_3G.unbind()
    best_G, scale_G, low_G = found_3G.unbind()
    codes = _codes_with_min(x_nG, low_G, high_G, top + offset, top)
    product = weight_nG * codes
    sum_l, sum_ll = product.sum(0), (product * codes).sum(0)
    sum_xl = (product * (x_nG - mean_G)).sum(0)
    safe_w = torch.where(sum_w > 0, sum_w, 1.0)
    variance = sum_ll - sum_l * sum_l / safe_w
    is_usable = variance > 0
    scale = sum_xl / torch.where(is_usable, variance, 1.0)
    at_middle = mean_G - scale * sum_l / safe_w
    quality = scale * sum_xl  # what the fit takes off the sum of w (x - mean)^2
    # A minimum above zero cannot be stored: the line goes through zero then.
    is_above = at_middle > scale * middle
    whole_ll = sum_ll + middle * (2 * sum_l + middle * sum_w)
    whole_xl = sum_xl + mean_G * (sum_l + middle * sum_w)
    through_zero = whole_xl / torch.where(whole_ll > 0, whole_ll, 1.0)
    quality = torch.where(is_above, through_zero * whole_xl - mean_G * mean_G * sum_w, quality)
    scale = torch.where(is_above, through_zero, scale)
    at_middle = torch.where(is_above, scale * middle, at_middle)
    if use_absolute:
        quality = -_absolute_error(x_nG, weight_nG, codes, scale, at_middle)
    # A line that falls, or none at all where float32 lost it, has no codes that could store it.
    is_better = is_usable & (scale > 0) & (quality > best_G)
    candidate = (quality, scale, at_middle - scale * middle)
    return torch.stack(
        [
            torch.where(is_better, new, old)
            for new, old in zip(candidate, (best_G, scale_G, low_G), strict=True)
        ]
    )


def _codes_with_min(
    x_nG: Tensor, low_G: Tensor, high_G: Tensor, levels: Tensor | int, top: int
) -> Tensor:
    """Codes less the middle."""
    middle = (top + 1) // 2
    width = high_G - low_G
    factor = torch.where(width > 0, levels / torch.where(width > 0, width, 1.0), 0.0)
    return (x_nG * factor - (low_G * factor + middle)).round().clamp(-middle, top - middle)


def _absolute_error(
    x_nG: Tensor, weight_nG: Tensor, codes: Tensor, scale_G: Tensor, at_middle: Tensor
) -> Tensor:
    return ((codes * scale_G + at_middle - x_nG).abs() * weight_nG).sum(0)


def fit_scale(
    x_nG: Tensor, weight_nG: Tensor, half: int, grid: Sequence[float] = SIGNED_GRID
) -> Tensor:
    """scale_G, of either sign, for x ~ scale * code with codes -half .. half - 1.

    The value farthest from zero may become -half, which is one farther than the other side goes.
    """
    begin, improve = _steps_signed(half, _is_enough(x_nG))
    x, weight = _filled(x_nG), _filled(weight_nG)
    inverse_G, found = begin(x), x.new_zeros(2, x.shape[1])
    for offset in grid:
        found = improve(x, weight, inverse_G, found, torch.tensor(offset))
    return found[1, : x_nG.shape[1]]


@cache
def _steps_signed(
    half: int, has_kernels: bool
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    improve = partial(_improve_signed, half)
    return (Compiled(_begin_signed), Compiled(improve)) if has_kernels else (_begin_signed, improve)


def _begin_signed(x_nG: Tensor) -> Tensor:
    """What makes the value farthest from zero -1; 0 for a group of zeros."""
    low_G, high_G = x_nG.amin(0), x_nG.amax(0)
    extreme_G = torch.where(high_G >= -low_G, high_G, low_G)
    is_zero = extreme_G.abs() < TINY
    return torch.where(is_zero, 0.0, -1 / torch.where(is_zero, 1.0, extreme_G))


def _improve_signed(
    half: int, x_nG: Tensor, weight_nG: Tensor, inverse_G: Tensor, found_2G: Tensor, offset: Tensor
) -> Tensor:
    """The quality and scale of `found_2G`, or where it is better of the candidate, fitted."""
    best_G, scale_G = found_2G.unbind()
    codes = (x_nG * ((half + offset) * inverse_G)).round().clamp(-half, half - 1)
    product = weight_nG * codes
    sum_xl, sum_ll = (product * x_nG).sum(0), (product * codes).sum(0)
    scale = torch.where(sum_ll > 0, sum_xl / torch.where(sum_ll > 0, sum_ll, 1.0), 0.0)
    quality = scale * sum_xl
    is_better = quality > best_G
    return torch.stack(
        [torch.where(is_better, quality, best_G), torch.where(is_better, scale, scale_G)]
    )


def _is_enough(x_nG: Tensor) -> bool:
    """Whether kernels pay: for whole pieces of a tensor (`quantise.PIECE_VALUES`)."""
    # Choice: asked here and not given by `ops.kernels`, for an encoder serves no model: codecs take
    # blocks alone, and either way finds the same scales but for rounding.
    is_size = KERNEL_VALUES // 2 <= x_nG.numel() <= KERNEL_VALUES
    return is_size and can_compile()


def _filled(x_nG: Tensor) -> Tensor:
    """With groups of zeros to a kernel's size, if one is used; contiguous."""
    if not _is_enough(x_nG):
        return x_nG
    num_groups = KERNEL_VALUES // x_nG.shape[0]
    return F.pad(x_nG, (0, num_groups - x_nG.shape[1])).contiguous()


def fit_scales(x_nG: Tensor, weight_nG: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale_G, codes_nG) for x >= 0 and codes 0 .. top: a super-block's scales or mins.

    The best of nine scales, then each code is moved alone while that lowers the error.
    """
    high_G = x_nG.amax(0)
    inverse_G = torch.where(high_G < TINY, 0.0, 1 / high_G)
    best_G = torch.full_like(high_G, torch.inf)
    codes_nG = torch.zeros_like(x_nG)
    for offset in sorted(SCALES_GRID, key=abs):  # the first that is best stays
        factor_G = (top + offset) * inverse_G
        codes = (x_nG * factor_G).round_().clamp_(max=top)
        back_G = torch.where(factor_G > 0, 1 / factor_G, 0.0)
        error_G = (weight_nG * (x_nG - back_G * codes).square_()).sum(0)
        is_better = error_G < best_G
        best_G = torch.where(is_better, error_G, best_G)
        codes_nG = torch.where(is_better, codes, codes_nG)
    sum_xl = (weight_nG * x_nG * codes_nG).sum(0)
    sum_ll = (weight_nG * codes_nG * codes_nG).sum(0)
    for _ in range(MAX_ROUNDS):
        has_changed = torch.zeros_like(high_G, dtype=torch.bool)
        for x, weight, code in zip(x_nG, weight_nG, codes_nG, strict=True):
            rest_xl = sum_xl - weight * x * code
            rest_ll = sum_ll - weight * code * code
            is_usable = (rest_xl > 0) & (rest_ll > 0)
            new = (x * rest_ll / torch.where(is_usable, rest_xl, 1.0)).round_().clamp_(0, top)
            new_xl = rest_xl + weight * x * new
            new_ll = rest_ll + weight * new * new
            is_better = is_usable & (new != code)
            is_better &= new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
            sum_xl = torch.where(is_better, new_xl, sum_xl)
            sum_ll = torch.where(is_better, new_ll, sum_ll)
            code.copy_(torch.where(is_better, new, code))
            has_changed |= is_better
        if not bool(has_changed.any()):
            break
    return torch.where(sum_ll > 0, sum_xl / sum_ll, 0.0), codes_nG
