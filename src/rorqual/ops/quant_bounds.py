"""What rounding to a block of a GGUF type explains: what a conversion is verified by.

Given the scales that are stored, an encoder chooses for each value the nearest one that the block
can hold. So inside the block's range a value is off by half a step at most, and outside by its
distance from the range's end. Where the codes were chosen before the scale became float16 (the
blocks of 32), its rounding comes on top. None of this depends on an importance.

How far a range may end before its values do depends on the search for the scales:

    Q8_0, Q4_0, Q5_0, Q4_1, Q5_1   reaches the extremes, Q4_0 and Q5_0 all but the last step of one
    Q3_K, Q6_K   a fitted scale is a weighted mean of x / code, and each of those at least half of
                 the tried scale, which reaches the extreme with half + 0.9 steps at most
    Q4_K, Q5_K   the fit's weighted squared error is no larger than that of the range that reaches
                 both ends; with w = |x| + rms no value is then off by more than 4 of its steps,
                 a quarter of the width
    Q2_K         chooses by absolute errors weighted with |x|: zeros count for nothing

For the types with minima `GIVEN_UP` is a generous sum of that. An importance may give up any value
whose column weighs little: then only a block whose scale is zero is held to its limits.
"""

# N blocks or super-blocks, G groups of a block, R rows of C values

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.k_quants import Parts
from rorqual.ops.quant_bits import half_of
from rorqual.ops.quant_search import TINY

HALF_ROUNDING = 2.0**-11  # of float16, relative
HALF_SMALLEST = 2.0**-25  # half of its smallest number: what a subnormal loses, or a zero was
SEARCHED_REACH = 0.9 + 0.1  # levels that the signed search adds at most, and the float32 rounding
# float32's own roundings of an encoder and a decoder: a few units in the last of 24 bits, of codes
# up to 128 and of the values.
OF_A_STEP, OF_THE_RANGE = 2.0**-15, 2.0**-21


Bounds = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Limits:
    """What the values of blocks may be, all (R, C) float32.

    A stored value differs from its source by at most `error` if that lies in `low` .. `high`, and
    else by the distance from there; a source beyond `least` .. `most` cannot have been given this
    block.
    """

    error: Tensor
    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor

    def allowed(self, source: Tensor) -> Tensor:
        """(R, C): how far a stored value may be from its source; NaN where that is NaN."""
        outside = torch.maximum(self.low - source, source - self.high).clamp_min(0)
        is_possible = (source >= self.least) & (source <= self.most)
        return torch.where(is_possible, torch.maximum(self.error, outside), self.error)


def floating_limits(values: Tensor) -> Limits:
    """Of (R, C) stored in floating point: half of the distance to the next number."""
    wide, kind = values.float(), torch.finfo(values.dtype)
    distance = kind.eps * torch.exp2(torch.frexp(wide).exponent.float() - 1)
    error = 0.5 * distance.clamp_min(kind.smallest_normal * kind.eps)
    if values.dtype == torch.float32:
        error.zero_()
    reach = torch.full_like(wide, torch.inf)
    return Limits(error, -reach, reach, -reach, reach)


# Each of these makes a type's bounds: (N, B) uint8 -> error, low, high, least, most, and the
# block's scale, all (N, G) or (N, 1).


def signed(lowest: int, highest: int) -> Bounds:
    """Of codes around zero with a scale d."""

    def bounds(blocks: Tensor) -> tuple[Tensor, ...]:
        d = half_of(blocks, 0)
        rounding = -lowest * _half_error(d)
        ends = lowest * d, highest * d
        reach = -lowest * d.abs() + rounding + OF_A_STEP * d.abs()
        error = (0.5 + OF_A_STEP) * d.abs() + rounding
        return error, torch.minimum(*ends), torch.maximum(*ends), -reach, reach, d

    return bounds


def above_min(top: int) -> Bounds:
    """Of codes 0 .. top above a minimum."""

    def bounds(blocks: Tensor) -> tuple[Tensor, ...]:
        d, low = half_of(blocks, 0), half_of(blocks, 2)
        rounding = top * _half_error(d) + _half_error(low)
        high = low + top * d
        error = (0.5 + OF_A_STEP) * d + rounding
        return error, low, high, low - error, high + error, d

    return bounds


def k_signed(unpack: Callable[[Tensor], Parts], half: int) -> Bounds:
    """Of codes -half .. half - 1 with a scale for each group."""

    def bounds(blocks: Tensor) -> tuple[Tensor, ...]:
        parts = unpack(blocks)
        step = parts.d * parts.scale.float()
        ends = -half * step, (half - 1) * step
        # The scale is rounded to a multiple of d; the largest positive one loses a whole d.
        most_step = step.abs() + parts.d.abs() + 128 * _half_error(parts.d)
        reach = 2 * (half + SEARCHED_REACH) * most_step + TINY
        error = (0.5 + OF_A_STEP) * step.abs()
        return error, torch.minimum(*ends), torch.maximum(*ends), -reach, reach, parts.d

    return bounds


def k_above_min(
    unpack: Callable[[Tensor], Parts], top: int, scale_top: int, given_up: float
) -> Bounds:
    """Of codes 0 .. top above each group's minimum, with group scales 0 .. scale_top.

    `given_up`: how far beyond either end a search may leave values, in widths of the group.
    """

    def bounds(blocks: Tensor) -> tuple[Tensor, ...]:
        parts = unpack(blocks)
        assert parts.min is not None, "these types have minima"
        assert parts.dmin is not None, "minima have a scale"
        step, low = parts.d * parts.scale.float(), -parts.dmin * parts.min.float()
        high = low + top * step
        width = top * (step + parts.d + scale_top * _half_error(parts.d))
        beyond = given_up * width + parts.dmin + scale_top * _half_error(parts.dmin)
        error = (0.5 + OF_A_STEP) * step
        return error, low, high, low - beyond, high + beyond, parts.d

    return bounds


def _half_error(number: Tensor) -> Tensor:
    """How far a float16 may be from what it was rounded from."""
    return (HALF_ROUNDING * number.abs()).clamp_min(HALF_SMALLEST)
