"""What rounding explains. Oracles: the encoders themselves on values of many kinds, for which the
bound must hold, and single codes, scales and blocks changed, for which it must not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rorqual.ops.quant_bounds import floating_limits
from rorqual.ops.quant_types import K_QUANTS, QUANT_TYPES, SMALL_BLOCKS
from rorqual.ops.quantise import decode_blocks, encode_blocks, limits_of

TYPES = (*SMALL_BLOCKS, *K_QUANTS)
ROWS, COLUMNS = 6, 1024
JUST_BEYOND = 1.02  # of the bound
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _scaled_groups(x: Tensor) -> Tensor:
    scale = torch.exp(2 * torch.randn(ROWS, COLUMNS // 16, 1))
    return 0.02 * (x.view(ROWS, -1, 16) * scale).view(ROWS, COLUMNS)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: 0.02 * x,
    "heavy tails": lambda x: 0.02 * x / torch.distributions.Chi2(1.0).sample(x.shape).sqrt(),
    "outliers": lambda x: torch.where(torch.rand(x.shape) < 0.01, 50.0, 1.0) * x,
    "shifted": lambda x: 0.002 * x - 1,
    "positive": lambda x: x.abs(),
    "sparse": lambda x: x * (torch.rand(x.shape) < 0.05),
    "lognormal": lambda x: 1e-3 * torch.exp(2 * x) * torch.randn(x.shape).sign(),
    "groups of many sizes": _scaled_groups,
    "below float16's normal numbers": lambda x: 1e-6 * x,
    "constant": lambda x: torch.full_like(x, 0.3),
    "zeros": torch.zeros_like,
}
IMPORTANCES: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "mild": lambda: torch.rand(COLUMNS).square() + 0.05,
    "wild": lambda: torch.exp(4 * torch.randn(COLUMNS)),
    "mostly zero": lambda: (torch.rand(COLUMNS) < 0.02).float(),
}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", TYPES)
def test_what_the_encoder_writes_is_explained(name: str, importance: str) -> None:
    for seed, (kind, make) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        x, weight = make(torch.randn(ROWS, COLUMNS)), IMPORTANCES[importance]()
        raw = encode_blocks(x, name, weight)
        limits = limits_of(raw, name, has_importance=weight is not None)
        error = (decode_blocks(raw, name) - x).abs()
        assert bool((error <= limits.allowed(x)).all()), kind


@pytest.mark.parametrize("name", TYPES)
def test_half_a_step_is_the_bound(name: str) -> None:
    """A value that is stored with the next code is beyond it."""
    torch.manual_seed(0)
    x = 0.02 * torch.randn(ROWS, COLUMNS)
    raw = encode_blocks(x, name)
    limits, y = limits_of(raw, name), decode_blocks(raw, name)
    step = 2 * limits.error
    is_inside = (x >= limits.low) & (x <= limits.high) & (step > 0)
    assert float(is_inside.float().mean()) > 0.5
    for sign in (-1, 1):
        error = (y + sign * step - x).abs()
        is_far = is_inside & (error > JUST_BEYOND * 0.5 * step)
        assert float(is_far.float().mean()) > 0.3
        assert bool((error > limits.allowed(x))[is_far].all())


def _halves(name: str) -> int:
    return {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(name, 0)


@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_every_faulty_block_is_found(name: str, has_importance: bool) -> None:
    torch.manual_seed(1)
    kind = QUANT_TYPES[name]
    x = 0.02 * torch.randn(ROWS, COLUMNS)
    weight = torch.rand(COLUMNS).square() + 0.05 if has_importance else None
    good = encode_blocks(x, name, weight).view(-1, kind.block_bytes)
    at = slice(_halves(name), _halves(name) + 2)

    def num_faulty(bad: Tensor) -> int:
        raw = bad.view(ROWS, -1)
        limits = limits_of(raw, name, has_importance=has_importance)
        is_beyond = (decode_blocks(raw, name) - x).abs() > limits.allowed(x)
        return int(is_beyond.view(-1, kind.block_values).any(1).sum())

    for factor in (2.0, 0.5):
        bad = good.clone()
        scale = bad[:, at].contiguous().view(torch.float16) * factor
        bad[:, at] = scale.view(torch.uint8)
        assert num_faulty(bad) == len(good), factor
    assert num_faulty(torch.zeros_like(good)) == len(good)
    assert num_faulty(good.roll(1, 0)) == len(good)
    assert num_faulty(good) == 0


@pytest.mark.parametrize("has_importance", [False, True])
def test_q8_0_reaches_the_extremes_whatever_an_importance_says(has_importance: bool) -> None:
    """Codes that are the nearest ones to a scale of half the size: the large values are clipped."""
    x = 0.02 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    good = encode_blocks(x, "Q8_0").view(-1, QUANT_TYPES["Q8_0"].block_bytes)
    scale = good[:, :2].contiguous().view(torch.float16) / 2
    codes = (x.view(-1, 32) / scale.float()).round().clamp(-127, 127).to(torch.int8)
    clipped = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1).view(ROWS, -1)
    limits = limits_of(clipped, "Q8_0", has_importance=has_importance)
    is_beyond = (decode_blocks(clipped, "Q8_0") - x).abs() > limits.allowed(x)
    assert bool(is_beyond.view(-1, 32).any(1).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_point_is_off_by_half_its_distance(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.cat([torch.randn(999), 1e-6 * torch.randn(999), torch.tensor([0.0, 1.0])])
    stored = x.to(dtype)
    allowed = floating_limits(stored).allowed(x)
    assert bool(((stored.float() - x).abs() <= allowed).all())
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    farther = (stored.view(as_bits) + 1).view(dtype)  # the next number away from zero
    error, distance = (farther.float() - x).abs(), (farther.float() - stored.float()).abs()
    # The next power of two's lie twice as far apart. Float32 is not rounded: nothing is allowed.
    is_far = error > (0 if dtype == torch.float32 else JUST_BEYOND * distance)
    assert float(is_far.float().mean()) > 0.3
    assert bool((error > floating_limits(farther).allowed(x))[is_far].all())
