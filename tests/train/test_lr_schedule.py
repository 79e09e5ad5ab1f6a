"""Learning rate, batch ramp and loss weights. Oracle: the figures of §4.2, in closed form."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from rorqual.train.lr_schedule import (
    BalanceSettings,
    BatchRamp,
    LrSchedule,
    MtpSettings,
    in_tokens,
)

TOTAL = 14_800_000_000_000
TRILLION, BILLION = 10**12, 10**9
# 2K steps at 3072 sequences of 4K tokens.
V3 = LrSchedule(
    warmup=2000 * 3072 * 4096,
    constant_until=10 * TRILLION,
    cosine_until=14_300 * BILLION,
    low_until=14_633 * BILLION,
)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),
        (9_999 * BILLION, 2.2e-4),
        (12_150 * BILLION, (2.2e-4 + 2.2e-5) / 2),
        (11_075 * BILLION, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (14_300 * BILLION, 2.2e-5),
        (14_632 * BILLION, 2.2e-5),
        (14_633 * BILLION, 7.3e-6),
        (TOTAL, 7.3e-6),
    ],
)
def test_learning_rate_of_the_report(tokens: int, rate: float) -> None:
    assert V3.at(tokens, TOTAL) == pytest.approx(rate, rel=1e-12)


def test_shares_give_the_same_phases_at_any_size() -> None:
    for total in (14_800, 14_800_000, TOTAL):
        ends = LrSchedule().phase_ends(total)
        assert ends[1:] == tuple(round(x / 14_800 * total) for x in (10_000, 14_300, 14_633))


def test_phases_of_no_length_are_skipped() -> None:
    """SFT's schedule (§5.1): cosine from the first step on, 5e-6 to 1e-6."""
    sft = LrSchedule(
        peak=5e-6, low=1e-6, final=1e-6, warmup=0, constant_until=0, cosine_until=1.0, low_until=1.0
    )
    assert sft.at(0, 1000) == 5e-6
    assert sft.at(500, 1000) == pytest.approx(3e-6)
    assert sft.at(1000, 1000) == 1e-6


def test_batch_ramp_of_the_report() -> None:
    ramp = BatchRamp(start=3072, end=15360, over=469 * BILLION)
    assert ramp.at(0, TOTAL, 1) == 3072
    assert ramp.at(469 * BILLION // 2, TOTAL, 1) == (3072 + 15360) // 2
    assert ramp.at(469 * BILLION, TOTAL, 1) == 15360
    assert ramp.at(TOTAL, TOTAL, 1) == 15360
    sizes = [ramp.at(i * BILLION, TOTAL, 256) for i in range(470)]
    assert all(size % 256 == 0 for size in sizes)
    assert sizes == sorted(sizes)


def test_gamma_and_lambda_of_the_report() -> None:
    balance, mtp = BalanceSettings(), MtpSettings()
    assert balance.speed_at(14_299 * BILLION, TOTAL) == 0.001
    assert balance.speed_at(14_301 * BILLION, TOTAL) == 0.0
    assert mtp.weight_at(9_999 * BILLION, TOTAL) == 0.3
    assert mtp.weight_at(10_001 * BILLION, TOTAL) == 0.1


def test_amounts_are_shares_or_tokens() -> None:
    assert in_tokens(0.25, 1000) == 250
    assert in_tokens(1.0, 1000) == 1000
    assert in_tokens(1, 1000) == 1
    assert in_tokens(10e12, 1000) == 10**13


def test_phases_begin_just_where_the_recipe_says() -> None:
    """Closed form at each edge: the token before it, it, and the one behind it."""
    schedule = LrSchedule(
        peak=1.0, low=0.5, final=0.25, warmup=100, constant_until=200, cosine_until=300,
        low_until=400,
    )  # fmt: skip
    assert [schedule.at(t, 1000) for t in (0, 1, 99, 100, 101)] == [0.0, 0.01, 0.99, 1.0, 1.0]
    assert [schedule.at(t, 1000) for t in (199, 200)] == [1.0, 1.0]
    assert schedule.at(201, 1000) == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 100)))
    assert schedule.at(299, 1000) == pytest.approx(0.5 + 0.25 * (1 - math.cos(math.pi / 100)))
    assert [schedule.at(t, 1000) for t in (300, 399)] == [0.5, 0.5]
    assert [schedule.at(t, 1000) for t in (400, 401, 1000, 1024)] == [0.25] * 4


def test_gamma_and_lambda_change_with_the_first_step_that_begins_at_the_edge() -> None:
    balance, mtp = BalanceSettings(bias_until=100), MtpSettings(weight_until=100)
    assert [balance.speed_at(t, 1000) for t in (0, 99, 100, 101)] == [0.001, 0.001, 0.0, 0.0]
    assert [mtp.weight_at(t, 1000) for t in (0, 99, 100, 101)] == [0.3, 0.3, 0.1, 0.1]
    assert BalanceSettings(bias_until=1.0).speed_at(999, 1000) == 0.001
    assert BalanceSettings(bias_until=0.0).speed_at(0, 1000) == 0.0
    assert MtpSettings(weight_until=0.0).weight_at(0, 1000) == 0.1


def test_batch_ramp_at_its_edges() -> None:
    ramp = BatchRamp(start=4, end=8, over=100)
    assert [ramp.at(t, 1000, 1) for t in (0, 24, 25, 99, 100, 101)] == [4, 4, 5, 7, 8, 8]
    assert [ramp.at(t, 1000, 4) for t in (0, 99, 100)] == [4, 4, 8]
    assert BatchRamp(start=4, end=8, over=0).at(0, 1000, 2) == 8
    with pytest.raises(ValidationError, match="end 4 is less than start 8"):
        BatchRamp(start=8, end=4)
