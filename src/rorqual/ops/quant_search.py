"""The search for the scale of a group: round with many scales, fit each by least squares, keep the
best.

Source: ggml's make_qx_quants, make_qkx2_quants, make_qkx3_quants and make_qp_quants
(ggml-quants.c), vectorised over groups: elements of a group lie along the first dimension, so that
every sum is a sum of rows. The error of a fitted candidate follows from the same sums as the fit,
so that the values are gone through once a candidate. `native/encode_search.inl` is the same in C++,
rounding by rounding: whoever changes one changes both.
"""

# n elements of a group, G groups

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.ops.quant_bits import sum_rows

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
    search = _AboveMin(x_nG, weight_nG, top, use_absolute)
    for offset in grid:
        search.improve(top + offset)
    return search.scale_G, -search.low_G.clamp(max=0)


class _AboveMin:
    """The best line so far: its quality, its scale and its minimum.

    The first candidate reaches both extremes and is not fitted.
    """

    # Codes and values are taken from their middle: the candidates' errors differ in the sixth digit
    # of the sums, which float32 keeps only where little cancels.

    def __init__(self, x_nG: Tensor, weight_nG: Tensor, top: int, use_absolute: bool) -> None:
        self.x_nG, self.weight_nG, self.top = x_nG, weight_nG, top
        self.use_absolute = use_absolute
        self.middle = (top + 1) // 2
        self.low_G, self.high_G = x_nG.amin(0).clamp(max=0), x_nG.amax(0)
        self.sum_w = sum_rows(weight_nG)
        self.safe_w = torch.where(self.sum_w > 0, self.sum_w, 1.0)
        self.mean_G = sum_rows(weight_nG * x_nG) / self.safe_w
        codes, sum_l, sum_ll, sum_xl = self._codes_and_sums(top)
        self.scale_G = (self.high_G - self.low_G) / top
        at_middle = self.low_G + self.scale_G * self.middle
        if use_absolute:
            self.best_G = -self._absolute_error(codes, self.scale_G, at_middle)
        else:
            shift = at_middle - self.mean_G
            quality = self.scale_G * (2 * (sum_xl - shift * sum_l) - self.scale_G * sum_ll)
            self.best_G = quality - shift * shift * self.sum_w

    def improve(self, levels: float) -> None:
        """Takes the candidate with so many levels, fitted, where it is better.

        Levels are counted from the best minimum so far, as the reference does: it pays.
        """
        middle, mean_G, sum_w = self.middle, self.mean_G, self.sum_w
        codes, sum_l, sum_ll, sum_xl = self._codes_and_sums(levels)
        variance = sum_ll - sum_l * sum_l / self.safe_w
        is_usable = variance > 0
        scale = sum_xl / torch.where(is_usable, variance, 1.0)
        at_middle = mean_G - scale * sum_l / self.safe_w
        quality = scale * sum_xl  # what the fit takes off the sum of w (x - mean)^2
        # A minimum above zero cannot be stored: the line goes through zero then.
        is_above = at_middle > scale * middle
        whole_ll = sum_ll + middle * (2 * sum_l + middle * sum_w)
        whole_xl = sum_xl + mean_G * (sum_l + middle * sum_w)
        through_zero = whole_xl / torch.where(whole_ll > 0, whole_ll, 1.0)
        quality = torch.where(is_above, through_zero * whole_xl - mean_G * mean_G * sum_w, quality)
        scale = torch.where(is_above, through_zero, scale)
        at_middle = torch.where(is_above, scale * middle, at_middle)
        if self.use_absolute:
            quality = -self._absolute_error(codes, scale, at_middle)
        # A line that falls, or none at all where float32 lost it, has no codes to store it.
        is_better = is_usable & (scale > 0) & (quality > self.best_G)
        self.best_G = torch.where(is_better, quality, self.best_G)
        self.scale_G = torch.where(is_better, scale, self.scale_G)
        self.low_G = torch.where(is_better, at_middle - scale * middle, self.low_G)

    def _codes_and_sums(self, levels: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes less the middle; sums of weights times code, its square, and it times x - mean."""
        width = self.high_G - self.low_G
        per_width = torch.tensor(float(levels)) / torch.where(width > 0, width, 1.0)
        factor = torch.where(width > 0, per_width, 0.0)
        codes = (self.x_nG * factor - (self.low_G * factor + self.middle)).round()
        codes = codes.clamp(-self.middle, self.top - self.middle)
        product = self.weight_nG * codes
        sum_ll, sum_xl = sum_rows(product * codes), sum_rows(product * (self.x_nG - self.mean_G))
        return codes, sum_rows(product), sum_ll, sum_xl

    def _absolute_error(self, codes: Tensor, scale_G: Tensor, at_middle: Tensor) -> Tensor:
        error = (codes * scale_G + at_middle - self.x_nG).abs()
        return sum_rows(error * self.weight_nG)


def fit_scale(
    x_nG: Tensor, weight_nG: Tensor, half: int, grid: Sequence[float] = SIGNED_GRID
) -> Tensor:
    """scale_G, of either sign, for x ~ scale * code with codes -half .. half - 1.

    The value farthest from zero may become -half, which is one farther than the other side goes.
    """
    low_G, high_G = x_nG.amin(0), x_nG.amax(0)
    extreme_G = torch.where(high_G >= -low_G, high_G, low_G)
    is_zero = extreme_G.abs() < TINY
    inverse_G = torch.where(is_zero, 0.0, -1 / torch.where(is_zero, 1.0, extreme_G))
    best_G = scale_G = torch.zeros_like(inverse_G)
    for offset in grid:
        codes = (x_nG * ((half + offset) * inverse_G)).round().clamp(-half, half - 1)
        product = weight_nG * codes
        sum_xl, sum_ll = sum_rows(product * x_nG), sum_rows(product * codes)
        scale = torch.where(sum_ll > 0, sum_xl / torch.where(sum_ll > 0, sum_ll, 1.0), 0.0)
        quality = scale * sum_xl
        is_better = quality > best_G
        best_G = torch.where(is_better, quality, best_G)
        scale_G = torch.where(is_better, scale, scale_G)
    return scale_G


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
        error_G = sum_rows(weight_nG * (x_nG - back_G * codes).square_())
        is_better = error_G < best_G
        best_G = torch.where(is_better, error_G, best_G)
        codes_nG = torch.where(is_better, codes, codes_nG)
    sum_xl = sum_rows(weight_nG * x_nG * codes_nG)
    sum_ll = sum_rows(weight_nG * codes_nG * codes_nG)
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
