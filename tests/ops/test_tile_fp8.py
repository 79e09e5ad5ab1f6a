"""FP8 tiles and E5M6. Oracles: the formula value by value in float64, and tables of all numbers."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.errors import RorqualError
from rorqual.ops import e5m6
from rorqual.ops.tile_fp8 import (
    Quantised,
    quantise_columns,
    quantise_rows,
    quantise_weight,
)

TINY = 2.0**-126  # the smallest normal float32


def e4m3_table() -> list[float]:
    values = [m / 8 * 2**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return values[:-1]  # the last pattern is NaN


def e5m6_table() -> list[float]:
    values = [m / 64 * 2**-14 for m in range(64)]
    return values + [(1 + m / 64) * 2.0 ** (e - 15) for e in range(1, 31) for m in range(64)]


def nearest(value: float, table: list[float]) -> float:
    """Ties go to the number of even index, which is that with an even mantissa."""
    size = abs(value)
    best = min(range(len(table)), key=lambda i: (abs(size - table[i]), i % 2))
    return math.copysign(table[best], value)


def scale_of(values: list[float], largest: float, is_power: bool) -> float:
    amax = max(abs(value) for value in values)
    if amax == 0:
        return 1.0
    if is_power:
        return 2.0 ** max(-126, math.ceil(math.log2(amax / largest)))
    return max(TINY, float(torch.tensor(amax, dtype=torch.float32) / largest))


def by_formula(x: Tensor, places: list[tuple[slice, slice]], is_power: bool) -> Tensor:
    out = torch.zeros(x.shape)
    for place in places:
        values = x[place].flatten().tolist()
        scale = scale_of(values, 448.0, is_power)
        made = [
            nearest(float(torch.tensor(v, dtype=torch.float32) / scale), e4m3_table()) * scale
            for v in values
        ]
        out[place] = torch.tensor(made, dtype=torch.float64).view(x[place].shape).float()
    return out


def pieces(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def made_of(rows: int, columns: int, seed: int, power: int) -> Tensor:
    """Values of many sizes, with zeros, a zero tile, and subnormals of E4M3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(8 * torch.randn(rows, columns, generator=generator)) * 2.0**power
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    x[: min(rows, 2), :128] = 0.0
    return x


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 300))


@settings(max_examples=12, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([-100, -20, 0, 60]), st.booleans())
@example((3, 129), 0, 0, False)
@example((2, 128), 1, -118, True)
def test_rows_are_the_formula(
    shape: tuple[int, int], seed: int, power: int, is_power: bool
) -> None:
    x = made_of(*shape, seed, power)
    found = quantise_rows(x, use_ue8m0=is_power)
    places = [(slice(i, i + 1), part) for i in range(shape[0]) for part in pieces(shape[1], 128)]
    assert torch.equal(found.dequantise(), by_formula(x, places, is_power))
    assert found.scales.shape == (shape[0], math.ceil(shape[1] / 128))
    assert found.values.is_contiguous()
    assert found.values.shape == x.shape


@settings(max_examples=12, deadline=None)
@given(SHAPES, st.integers(0, 99), st.booleans())
def test_columns_are_the_formula(shape: tuple[int, int], seed: int, is_power: bool) -> None:
    x = made_of(*shape, seed, 0).T.contiguous()
    found = quantise_columns(x, use_ue8m0=is_power)
    places = [(part, slice(i, i + 1)) for i in range(shape[0]) for part in pieces(shape[1], 128)]
    assert torch.equal(found.dequantise(), by_formula(x, places, is_power))


@pytest.mark.parametrize("counts", [[130, 0, 1, 128, 41], [0, 0, 300], [256, 44, 0]])
def test_a_group_of_rows_begins_a_tile(counts: list[int]) -> None:
    x = made_of(sum(counts), 3, 5, 0)
    found = quantise_columns(x, torch.tensor(counts))
    ends = list(accumulate(counts))
    parts = [
        slice(end - count + part.start, end - count + part.stop)
        for end, count in zip(ends, counts, strict=True)
        for part in pieces(count, 128)
    ]
    places = [(part, slice(i, i + 1)) for part in parts for i in range(3)]
    assert torch.equal(found.dequantise(torch.tensor(counts)), by_formula(x, places, False))
    alone = [quantise_columns(part) for part in x.split(counts) if len(part)]
    assert torch.equal(found.scales, torch.cat([part.scales for part in alone]))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (3, 200)])
@pytest.mark.parametrize("is_power", [False, True])
def test_weights_are_the_formula(shape: tuple[int, int], is_power: bool) -> None:
    x = made_of(*shape, 3, 0)
    found = quantise_weight(x, use_ue8m0=is_power)
    places = [(a, b) for a in pieces(shape[0], 128) for b in pieces(shape[1], 128)]
    assert torch.equal(found.dequantise(), by_formula(x, places, is_power))


def test_the_largest_value_keeps_its_size() -> None:
    x = torch.zeros(1, 128)
    x[0, 5] = -3.0
    found = quantise_rows(x)
    assert found.values[0, 5].float() == -448
    assert found.scales.item() == pytest.approx(3 / 448)
    assert quantise_rows(x, use_ue8m0=True).scales.item() == 2.0**-7  # 3/448 = 0.0067


def test_an_exact_power_of_two_is_its_own_scale() -> None:
    x = torch.full((1, 128), 448.0 * 2.0**-9)
    assert quantise_rows(x, use_ue8m0=True).scales.item() == 2.0**-9
    above = torch.nextafter(x, torch.full_like(x, 1e9))
    assert quantise_rows(above, use_ue8m0=True).scales.item() == 2.0**-8


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantise", [quantise_rows, quantise_columns, quantise_weight])
def test_what_is_not_finite_is_refused(fault: float, quantise: object) -> None:
    x = torch.zeros(4, 130)
    x[3, 129] = fault
    with pytest.raises(RorqualError, match="FP8"):
        quantise(x)  # type: ignore[operator]


def test_no_rows_are_no_tiles() -> None:
    for found in (quantise_rows(torch.zeros(0, 5)), quantise_columns(torch.zeros(0, 5))):
        assert isinstance(found, Quantised)
        assert found.dequantise().shape == (0, 5)


def test_all_codes_of_e5m6_come_back() -> None:
    table = torch.tensor(e5m6_table())
    both = torch.cat([table, -table])
    codes = e5m6.encode(both)
    assert torch.equal(e5m6.decode(codes), both)
    assert len(set(codes.tolist())) == len(both)  # minus zero has one, too
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 1 << 12


@settings(max_examples=60, deadline=None)
@given(st.floats(-65024, 65024, width=32))
@example(2.0**-21)
@example(3 * 2.0**-21)
@example(65024.0)
def test_e5m6_takes_the_nearest(value: float) -> None:
    found = e5m6.decode(e5m6.encode(torch.tensor([value], dtype=torch.float32)))
    assert float(found) == nearest(value, e5m6_table())


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (2, 257)])
def test_e5m6_is_twelve_bits_with_a_scale(shape: tuple[int, int]) -> None:
    x = made_of(*shape, 7, 30)
    found = e5m6.quantise(x)
    tiles = math.ceil(shape[1] / 128)
    assert found.bytes_NB.shape == (shape[0], tiles * 192)
    assert found.bytes_NB.dtype == torch.uint8
    back = found.dequantise()
    assert back.shape == x.shape
    for i in range(shape[0]):
        for part in pieces(shape[1], 128):
            scale = scale_of(x[i, part].tolist(), 65024.0, is_power=True)
            expected = [nearest(v / scale, e5m6_table()) * scale for v in x[i, part].tolist()]
            assert back[i, part].tolist() == expected


def test_e5m6_refuses_what_is_not_finite() -> None:
    with pytest.raises(RorqualError, match="FP8"):
        e5m6.quantise(torch.full((1, 2), math.inf))
