"""Rotary position embedding with YaRN's frequencies (report §4.3; arXiv 2104.09864, 2309.00071).

Checkpoints hold each rotary pair in neighbouring rows (0,1), (2,3), ...; we rotate those pairs and
return the result as [all firsts, all seconds]. Scores do not see the order as long as queries and
keys share it.
"""

# B batch, T tokens, R rotary width

from __future__ import annotations

import math

import torch
from torch import Tensor

from rorqual.model.config import ModelConfig, YarnScaling
from rorqual.model.kept import KeepsBuffers

TABLE_POSITIONS = 256
"""Of a table's angles at once, always: torch's cosine of a place depends on how many there are."""


class RotaryAngles(KeepsBuffers):
    """positions_BT int64 -> (cos_BTR/2, sin_BTR/2) float32, YaRN's magnitude included."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.magnitude = config.rope_scaling.rope_magnitude if config.rope_scaling else 1.0
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def reset_buffers(self) -> None:
        """Computes the frequencies again, after a model was built on the meta device."""
        self.inv_freq = inverse_frequencies(self.config)

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions_BT[..., None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude == 1:
            return cos, sin
        return cos * self.magnitude, sin * self.magnitude


class AngleTable:
    """The angles of all positions from 0 on, as many as were asked for: the same to the last bit
    however many those are.
    """

    def __init__(self, rotary: RotaryAngles) -> None:
        self._rotary = rotary
        empty_0R = torch.empty(0, rotary.config.qk_rope_head_dim // 2)
        self._tables = empty_0R, empty_0R
        self.num_known = 0

    def up_to(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32, each (at least `num_positions`, R/2)."""
        if num_positions > self.num_known:
            starts = range(self.num_known, max(num_positions, 2 * self.num_known), TABLE_POSITIONS)
            parts = [self._tables, *map(self._made, starts)]
            cos, sin = zip(*parts, strict=True)
            self._tables = torch.cat(cos), torch.cat(sin)
            self.num_known = len(self._tables[0])
        return self._tables

    def _made(self, start: int) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(torch.arange(start, start + TABLE_POSITIONS))
        return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (0,1), (2,3), ... of the last dim; cos and sin broadcast to x[..., ::2].

    Choice: in float32 whatever x's dtype, and rounded once at the end, as in DeepSeek's demo; the
    result is then x's dtype nearest to the exact one. transformers rounds cosines, sines and
    products to bfloat16, which makes the error 1.6 times as large (docs/log.md).
    """
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(R/2,) float32: theta^(-2i/R), with YaRN's interpolation where the config asks for it."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    extrapolated = 1.0 / theta**exponents
    yarn = config.rope_scaling
    if yarn is None:
        return extrapolated
    interpolated = 1.0 / (yarn.factor * theta**exponents)
    keep = 1.0 - _ramp(dim, theta, yarn)
    return interpolated * (1.0 - keep) + extrapolated * keep


def _ramp(dim: int, theta: float, yarn: YarnScaling) -> Tensor:
    """0 for pairs that turn fast and are left alone, 1 for interpolated ones, linear between."""

    def pair_of(num_rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / (high - low)).clamp(0, 1)
