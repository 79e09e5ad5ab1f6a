"""Learning rate, batch size and loss weights as functions of the tokens seen (report §4.2).

A point of time in a recipe is an `Amount`: a whole number of tokens, or a share of the run's total
tokens as a fraction from 0.0 to 1.0 (so `1.0` is the end and `1` is one token). Whole numbers above
one may be written as floats: `10e12`.
"""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from rorqual.config import settings

Amount = int | float


def in_tokens(amount: Amount, total_tokens: int) -> int:
    """An Amount as a number of tokens."""
    if isinstance(amount, float) and 0.0 <= amount <= 1.0:
        return round(amount * total_tokens)
    return int(amount)


def check_amount(key: str, amount: Amount) -> None:
    """ValueError naming `key` unless `amount` is a share or a whole number of tokens."""
    if amount < 0 or not math.isfinite(amount) or (amount > 1 and amount != int(amount)):
        raise ValueError(
            f"{key} {amount} is neither a share of all tokens (0.0 to 1.0) nor a whole number"
        )


@settings
class LrSchedule:
    """The five phases: linear to `peak` until `warmup`, constant until `constant_until`, cosine to
    `low` until `cosine_until`, constant until `low_until`, then `final`.
    """

    peak: float = Field(default=2.2e-4, gt=0)
    """The highest rate; small models take higher ones than the report's 671B: 2e-3 for `tiny`."""
    low: float = Field(default=2.2e-5, ge=0)
    """The rate after the cosine; at most `peak`."""
    final: float = Field(default=7.3e-6, ge=0)
    """The rate of the last phase; at most `low`."""
    warmup: Amount = 0.002
    """Where the linear rise from 0 to `peak` ends."""
    constant_until: Amount = 10 / 14.8
    """Where the constant rate ends and the cosine begins."""
    cosine_until: Amount = 14.3 / 14.8
    """Where the cosine has come down to `low`."""
    low_until: Amount = 14.633 / 14.8
    """Where the low rate ends and `final` begins."""

    @model_validator(mode="after")
    def _check(self) -> LrSchedule:
        for key in ("warmup", "constant_until", "cosine_until", "low_until"):
            check_amount(key, getattr(self, key))
        if not self.final <= self.low <= self.peak:
            raise ValueError(f"peak {self.peak} >= low {self.low} >= final {self.final} is not so")
        return self

    def phase_ends(self, total_tokens: int) -> tuple[int, int, int, int]:
        """The ends of the first four phases in tokens."""
        ends = (self.warmup, self.constant_until, self.cosine_until, self.low_until)
        first, second, third, fourth = (in_tokens(end, total_tokens) for end in ends)
        return first, second, third, fourth

    def at(self, tokens: int, total_tokens: int) -> float:
        """The learning rate of the step that ends at `tokens`.

        Choice: a step has the rate of its end, so that the first one is not lost at rate zero.
        """
        warmup, constant_until, cosine_until, low_until = self.phase_ends(total_tokens)
        if tokens < warmup:
            return self.peak * tokens / warmup
        if tokens < constant_until:
            return self.peak
        if tokens < cosine_until:
            share = (tokens - constant_until) / (cosine_until - constant_until)
            return self.low + (self.peak - self.low) * (1 + math.cos(math.pi * share)) / 2
        return self.low if tokens < low_until else self.final


@settings
class BatchRamp:
    """Sequences a step: from `start` to `end`, linear in tokens over the first `over` (§4.2)."""

    start: int = Field(gt=0)
    """Sequences a step at the beginning; a multiple of `training.micro_batch_size`."""
    end: int = Field(gt=0)
    """Sequences a step at the end of the ramp; at least `start`, and a multiple as well."""
    over: Amount = 469e9 / 14.8e12
    """Where the ramp ends."""
    multiple_of: int | None = Field(default=None, gt=0)
    """Each batch on the way is a multiple of it; left out: of `training.micro_batch_size`. Ranks
    that take samples divide it."""

    @model_validator(mode="after")
    def _check(self) -> BatchRamp:
        check_amount("over", self.over)
        if self.end < self.start:
            raise ValueError(f"end {self.end} is less than start {self.start}: the batch grows")
        for key in ("start", "end"):
            if getattr(self, key) % (self.multiple_of or 1):
                raise ValueError(
                    f"{key} {getattr(self, key)} is not a multiple of multiple_of "
                    f"{self.multiple_of}"
                )
        return self

    def at(self, tokens: int, total_tokens: int, micro_batch_size: int) -> int:
        """The batch after `tokens`, rounded down to a multiple."""
        unit = self.multiple_of or micro_batch_size
        over = in_tokens(self.over, total_tokens)
        share = min(tokens / over, 1.0) if over else 1.0
        size = self.start + (self.end - self.start) * share
        return max(int(size) // unit, 1) * unit


@settings
class BalanceSettings:
    """Auxiliary-loss-free balance and its complement (§2.1.2): gamma, until when, alpha."""

    bias_update_speed: float = Field(default=0.001, ge=0)
    """How far a step moves each router's bias towards experts that have too few tokens (gamma)."""
    bias_until: Amount = 14.3 / 14.8
    """Where the biases stop moving."""
    sequence_alpha: float = Field(default=1e-4, ge=0)
    """Weight of the small loss for balance inside a sequence (alpha)."""

    @model_validator(mode="after")
    def _check(self) -> BalanceSettings:
        check_amount("bias_until", self.bias_until)
        return self

    def speed_at(self, tokens: int, total_tokens: int) -> float:
        is_moving = tokens < in_tokens(self.bias_until, total_tokens)
        return self.bias_update_speed if is_moving else 0.0


@settings
class MtpSettings:
    """The multi-token prediction loss's weight lambda (§4.2): `weight`, then `weight_after`."""

    weight: float = Field(default=0.3, ge=0)
    """Weight of the MTP loss (lambda) at first."""
    weight_until: Amount = 10 / 14.8
    """Where `weight` ends and `weight_after` begins."""
    weight_after: float = Field(default=0.1, ge=0)
    """Its weight from there on."""

    @model_validator(mode="after")
    def _check(self) -> MtpSettings:
        check_amount("weight_until", self.weight_until)
        return self

    def weight_at(self, tokens: int, total_tokens: int) -> float:
        is_early = tokens < in_tokens(self.weight_until, total_tokens)
        return self.weight if is_early else self.weight_after
