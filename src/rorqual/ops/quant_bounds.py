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

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.k_quants import (
    Parts,
    unpack_q2_k,
    unpack_q3_k,
    unpack_q4_k,
    unpack_q5_k,
    unpack_q6_k,
)
from rorqual.ops.quant_bits import half_of
from rorqual.ops.quant_search import TINY
from rorqual.ops.quant_types import QUANT_TYPES

HALF_ROUNDING = 2.0**-11  # of float16, relative
HALF_SMALLEST = 2.0**-25  # half of its smallest number: what a subnormal loses, or a zero was
GIVEN_UP = {"Q2_K": 4.0, "Q4_K": 1.0, "Q5_K": 1.0}  # of a group's width, beyond either end
FLUSHED = 8.0  # a range that an importance has narrowed falls below float16 earlier
SEARCHED_REACH = 0.9 + 0.1  # levels that the signed search adds at most, and the float32 rounding
# float32's own roundings of an encoder and a decoder: a few units in the last of 24 bits, of codes
# up to 128 and of the values.
OF_A_STEP, OF_THE_RANGE = 2.0**-15, 2.0**-21


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


def limits_of(raw: Tensor, type_name: str, *, has_importance: bool = False) -> Limits:
    """Of bytes (R, B) uint8 of a block type, as `encode_blocks` may have written them."""
    kind = QUANT_TYPES[type_name]
    blocks = raw.contiguous().view(-1, kind.block_bytes)
    if type_name in _SIGNED:
        found = _signed(half_of(blocks, 0), *_SIGNED[type_name])
    elif type_name in _ABOVE_MIN:
        found = _above_min(half_of(blocks, 0), half_of(blocks, 2), _ABOVE_MIN[type_name])
    elif type_name in _K_SIGNED:
        unpack, half = _K_SIGNED[type_name]
        found = _k_signed(unpack(blocks), half)
    else:
        unpack, top, scale_top = _K_ABOVE_MIN[type_name]
        found = _k_above_min(unpack(blocks), top, scale_top, GIVEN_UP[type_name])
    error, low, high, least, most, scale = found
    if has_importance and type_name != "Q8_0":
        least = torch.where(scale == 0, low - FLUSHED * (low - least), -torch.inf)
        most = torch.where(scale == 0, high + FLUSHED * (most - high), torch.inf)
    error = error + OF_THE_RANGE * (low.abs() + high.abs())
    num_groups = max(low.shape[1], 1)
    size = kind.block_values // num_groups
    spread = (
        values.expand(-1, num_groups).repeat_interleave(size, dim=1).view(len(raw), -1)
        for values in (error, low, high, least, most)
    )
    return Limits(*spread)


def floating_limits(values: Tensor) -> Limits:
    """Of (R, C) stored in floating point: half of the distance to the next number."""
    wide, kind = values.float(), torch.finfo(values.dtype)
    distance = kind.eps * torch.exp2(torch.frexp(wide).exponent.float() - 1)
    error = 0.5 * distance.clamp_min(kind.smallest_normal * kind.eps)
    if values.dtype == torch.float32:
        error.zero_()
    reach = torch.full_like(wide, torch.inf)
    return Limits(error, -reach, reach, -reach, reach)


# Each of these gives (N, G) or (N, 1): error, low, high, least, most, and the block's scale.


def _signed(d: Tensor, lowest: int, highest: int) -> tuple[Tensor, ...]:
    rounding = -lowest * _half_error(d)
    ends = lowest * d, highest * d
    reach = -lowest * d.abs() + rounding + OF_A_STEP * d.abs()
    error = (0.5 + OF_A_STEP) * d.abs() + rounding
    return error, torch.minimum(*ends), torch.maximum(*ends), -reach, reach, d


def _above_min(d: Tensor, low: Tensor, top: int) -> tuple[Tensor, ...]:
    rounding = top * _half_error(d) + _half_error(low)
    high = low + top * d
    error = (0.5 + OF_A_STEP) * d + rounding
    return error, low, high, low - error, high + error, d


def _k_signed(parts: Parts, half: int) -> tuple[Tensor, ...]:
    step = parts.d * parts.scale.float()
    ends = -half * step, (half - 1) * step
    # The scale is rounded to a multiple of d; the largest positive one loses a whole d.
    most_step = step.abs() + parts.d.abs() + 128 * _half_error(parts.d)
    reach = 2 * (half + SEARCHED_REACH) * most_step + TINY
    error = (0.5 + OF_A_STEP) * step.abs()
    return error, torch.minimum(*ends), torch.maximum(*ends), -reach, reach, parts.d


def _k_above_min(parts: Parts, top: int, scale_top: int, given_up: float) -> tuple[Tensor, ...]:
    assert parts.min is not None, "these types have minima"
    assert parts.dmin is not None, "minima have a scale"
    step, low = parts.d * parts.scale.float(), -parts.dmin * parts.min.float()
    high = low + top * step
    width = top * (step + parts.d + scale_top * _half_error(parts.d))
    beyond = given_up * width + parts.dmin + scale_top * _half_error(parts.dmin)
    error = (0.5 + OF_A_STEP) * step
    return error, low, high, low - beyond, high + beyond, parts.d


def _half_error(number: Tensor) -> Tensor:
    """How far a float16 may be from what it was rounded from."""
    return (HALF_ROUNDING * number.abs()).clamp_min(HALF_SMALLEST)


_SIGNED = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q5_0": (-16, 15)}
_ABOVE_MIN = {"Q4_1": 15, "Q5_1": 31}
_K_SIGNED = {"Q3_K": (unpack_q3_k, 4), "Q6_K": (unpack_q6_k, 32)}
_K_ABOVE_MIN = {
    "Q2_K": (unpack_q2_k, 3, 15),
    "Q4_K": (unpack_q4_k, 15, 63),
    "Q5_K": (unpack_q5_k, 31, 63),
}
