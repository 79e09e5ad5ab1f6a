"""Block formats of GGUF: decoders bit for bit, encoders by their error.

Oracles: the `gguf` package, whose decoders cover every type and whose encoders cover the small
blocks; for the K-quants' encoders errors of ggml's own quantiser on the same seeded tensors
(`STORED`; how they were made stands there), and a straight loop for the searches.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from rorqual.errors import RorqualError
from rorqual.ops import k_quants, quantise
from rorqual.ops.codecs import CODECS
from rorqual.ops.quant_search import (
    FINE_GRID,
    GRID_4_BITS,
    fit_scale,
    fit_scale_and_min,
    fit_scales,
)
from rorqual.ops.quant_types import (
    CODED,
    FLOAT_TYPES,
    FOREIGN,
    K_QUANTS,
    QUANT_TYPES,
    READABLE,
    SMALL_BLOCKS,
)
from rorqual.ops.quantise import decode_blocks, encode_blocks

# Choice: times the error, weighted, of ggml's own encoder; measured at most 1.006 (docs/log.md).
BAR = 1.02


def oracle_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def reference_values(raw: Tensor, name: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return dequantize(raw.numpy(), oracle_type(name))


def sample(kind: str, rows: int = 64, columns: int = 1024) -> Tensor:
    """Seeded by numpy, whose streams stay the same from version to version."""
    random = np.random.Generator(np.random.PCG64(7))
    normal = random.standard_normal((rows, columns))
    tails = {
        "normal": normal,
        "heavy": normal / np.sqrt(random.chisquare(4, (rows, columns)) / 4),
        "shifted": normal + random.standard_normal((rows, 1)),
    }
    return torch.from_numpy((0.02 * tails[kind]).astype(np.float32))


def default_weights(x: Tensor, name: str) -> Tensor:
    """What the reference weighs squared errors with when it has no importance matrix."""
    groups = x.view(-1, 32 if name in ("Q4_K", "Q5_K") else 16)
    if name in ("Q4_K", "Q5_K"):
        weights = groups.abs() + groups.square().mean(1, keepdim=True).sqrt()
    else:
        weights = groups.abs() if name == "Q2_K" else groups.square()
    return weights.view(x.shape)


def weighted_error(x: Tensor, name: str) -> float:
    decoded = decode_blocks(encode_blocks(x, name), name)
    weights = default_weights(x, name).double()
    return float((weights * (decoded.double() - x.double()).square()).sum())


def test_the_table_of_types_is_ggmls() -> None:
    for kind in QUANT_TYPES.values():
        number = oracle_type(kind.name)
        assert kind.type_id == number.value
        assert gguf.GGML_QUANT_SIZES[number] == (kind.block_values, kind.block_bytes)


@pytest.mark.parametrize("name", READABLE)
def test_decodes_random_bytes_as_gguf_does(name: str) -> None:
    raw = torch.randint(0, 256, (33, 8 * QUANT_TYPES[name].block_bytes), dtype=torch.uint8)
    ours, theirs = decode_blocks(raw, name).numpy(), reference_values(raw, name)
    np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_types_are_decoded_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays that of a piece, and the pieces are the whole."""
    raw = torch.randint(0, 256, (16, 8 * QUANT_TYPES[name].block_bytes), dtype=torch.uint8)
    whole = reference_values(raw, name)
    most = []
    dequantise = gguf.dequantize

    def counted(blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        most.append(blocks.shape[0] * QUANT_TYPES[name].block_values)
        return dequantise(blocks, kind)

    monkeypatch.setattr(gguf, "dequantize", counted)
    monkeypatch.setattr(quantise, "DECODE_VALUES", 3000)
    out = torch.empty(16, 8 * QUANT_TYPES[name].block_values)
    decode_blocks(raw, name, out)
    np.testing.assert_array_equal(out.numpy(), whole.reshape(out.shape))
    assert max(most) <= 3000


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
def test_decodes_what_it_encoded_as_gguf_does(name: str, kind: str) -> None:
    raw = encode_blocks(sample(kind), name)
    ours, theirs = decode_blocks(raw, name).numpy(), reference_values(raw, name)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", [*FLOAT_TYPES, *SMALL_BLOCKS])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
def test_small_blocks_are_gguf_s_byte_for_byte(name: str, kind: str) -> None:
    x = sample(kind)
    x[0] = 0
    x[1, ::2] = 0.5
    theirs = quantize(x.numpy(), oracle_type(name))
    assert encode_blocks(x, name).numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", K_QUANTS)
def test_packing_is_the_inverse_of_unpacking(name: str) -> None:
    raw = torch.randint(0, 256, (500, QUANT_TYPES[name].block_bytes), dtype=torch.uint8)
    for start in CODECS[name].scales:
        raw[:, start + 1] &= 0xBF  # no NaN: its payload need not survive float32
    low = name.lower()
    parts = getattr(k_quants, f"unpack_{low}")(raw)
    assert torch.equal(getattr(k_quants, f"pack_{low}")(parts), raw)


# Weighted squared errors of ggml_quantize_chunk (llama.cpp as in llama-cpp-python 0.3.36, no
# importance) on `sample(kind)`; tests/weights/test_gguf_llama_cpp.py compares with it directly.
STORED: dict[tuple[str, str], float] = {
    ("Q2_K", "normal"): 3.06928e-02,
    ("Q2_K", "heavy"): 9.89020e-02,
    ("Q2_K", "shifted"): 4.26893e-02,
    ("Q3_K", "normal"): 2.11218e-04,
    ("Q3_K", "heavy"): 1.17411e-03,
    ("Q3_K", "shifted"): 6.28082e-04,
    ("Q4_K", "normal"): 4.69372e-03,
    ("Q4_K", "heavy"): 1.98947e-02,
    ("Q4_K", "shifted"): 6.31108e-03,
    ("Q5_K", "normal"): 1.22218e-03,
    ("Q5_K", "heavy"): 5.23818e-03,
    ("Q5_K", "shifted"): 1.63249e-03,
    ("Q6_K", "normal"): 2.43566e-06,
    ("Q6_K", "heavy"): 1.46513e-05,
    ("Q6_K", "shifted"): 8.85327e-06,
}


@pytest.mark.parametrize(("name", "kind"), sorted(STORED))
def test_errors_are_within_the_bar_of_ggmls(name: str, kind: str) -> None:
    assert weighted_error(sample(kind), name) <= BAR * STORED[name, kind]


@pytest.mark.parametrize("name", K_QUANTS)
def test_an_importance_moves_the_error_away_from_what_matters(name: str) -> None:
    x = sample("normal", rows=128)
    importance = torch.where(torch.arange(x.shape[1]) % 4 == 0, 100.0, 1.0)

    def error(weights: Tensor | None) -> float:
        decoded = decode_blocks(encode_blocks(x, name, weights), name)
        return float((decoded - x)[:, ::4].square().sum())

    assert error(importance) < 0.9 * error(None)


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *K_QUANTS])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_strange_blocks_stay_finite_and_near(name: str, is_weighted: bool) -> None:
    x = torch.zeros(8, 512)
    x[1] = 0.25
    x[2] = -0.25
    x[3, 17] = 1.0
    x[4, ::3] = -1e-20
    x[5] = torch.linspace(0.5, 1.0, 512)
    x[6] = torch.linspace(-1.0, -0.5, 512)
    x[7, :256] = 1e-3
    importance = torch.ones(512) if is_weighted else None
    decoded = decode_blocks(encode_blocks(x, name, importance), name)
    assert torch.isfinite(decoded).all()
    assert torch.equal(decoded[0], x[0])
    step = 2.0 ** -(int(name[1]) - 1)  # of the row's greatest value
    assert ((decoded - x).abs().amax(1) <= step * x.abs().amax(1) + 1e-12).all()


@pytest.mark.parametrize("name", CODED)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = sample("normal", rows=2)
        x[1, 300] = wrong
        with pytest.raises(RorqualError, match="not finite"):
            encode_blocks(x, name)


@pytest.mark.parametrize("name", [name for name in CODED if name != "F32"])
def test_values_beyond_a_type_s_reach_are_refused(name: str) -> None:
    """The mend is a type that holds them."""
    x = torch.full((1, 256), 3.4e38 if name == "BF16" else 1e9)
    x[0, ::2] *= -1
    with pytest.raises(RorqualError, match="too large") as caught:
        encode_blocks(x, name)
    wider = str(caught.value.fix).rsplit(" ", 1)[-1]
    assert bool(decode_blocks(encode_blocks(x, wider), wider).isfinite().all())


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *K_QUANTS])
@pytest.mark.parametrize("size", [1e10, 1e19, 1e38])
def test_an_importance_gives_up_no_impossible_values(name: str, size: float) -> None:
    """Sums that overflow had no scale but zero, and the block became zeros."""
    x = size * sample("normal", rows=2).clamp(-3, 3)
    with pytest.raises(RorqualError, match="too large"):
        encode_blocks(x, name, torch.rand(1024))


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *K_QUANTS])
def test_an_importance_counts_by_its_ratios(name: str) -> None:
    x, importance = sample("heavy", rows=8), torch.rand(1024) + 0.1
    found = encode_blocks(x, name, importance)
    for power in (-100, -3, 1, 120):
        assert torch.equal(encode_blocks(x, name, importance * 2.0**power), found), power


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *K_QUANTS])
def test_pieces_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, importance = sample("heavy"), torch.rand(1024) + 0.1
    whole = encode_blocks(x, name), encode_blocks(x, name, importance)
    values = decode_blocks(whole[0], name)
    monkeypatch.setattr(quantise, "PIECE_VALUES", 3000)
    monkeypatch.setattr(quantise, "DECODE_VALUES", 3000)
    for weights, before in ((None, whole[0]), (importance, whole[1])):
        assert torch.equal(encode_blocks(x, name, weights), before)
    assert torch.equal(decode_blocks(whole[0], name), values)
    out = torch.empty(2, 32, 1024)
    decode_blocks(whole[0], name, out)
    assert torch.equal(out.view(64, 1024), values)


def test_bf16_weights_are_taken_as_they_are() -> None:
    x = sample("normal").bfloat16()
    assert torch.equal(encode_blocks(x, "BF16").view(torch.bfloat16), x)
    assert torch.equal(encode_blocks(x, "Q4_K"), encode_blocks(x.float(), "Q4_K"))


def test_a_type_without_a_coder_is_named() -> None:
    with pytest.raises(RorqualError, match="IQ2_XXS"):
        encode_blocks(torch.zeros(1, 256), "IQ2_XXS")
    with pytest.raises(RorqualError, match=r"type not supported.*Q8_K"):
        decode_blocks(torch.zeros(1, 292, dtype=torch.uint8), "Q8_K")


def search_by_loop(x: np.ndarray, w: np.ndarray, top: int, grid: tuple[float, ...]) -> float:
    """The least weighted squared error that make_qkx2_quants' candidates reach, in float64."""
    low = min(x.min(), 0.0)
    best = np.inf
    for offset in grid:
        codes = np.clip(np.round((x - low) * (top + offset) / (x.max() - low)), 0, top)
        matrix = np.stack([codes, np.ones_like(codes)], 1) * np.sqrt(w)[:, None]
        (scale, intercept), *_ = np.linalg.lstsq(matrix, x * np.sqrt(w), rcond=None)
        if intercept > 0:
            scale, intercept = (w * x * codes).sum() / (w * codes * codes).sum(), 0.0
        best = min(best, (w * (scale * codes + intercept - x) ** 2).sum())
    return float(best)


@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize(("top", "grid"), [(15, GRID_4_BITS), (31, GRID_4_BITS), (3, FINE_GRID)])
def test_the_search_finds_the_least_error_of_its_grid(
    kind: str, top: int, grid: tuple[float, ...]
) -> None:
    x = sample(kind).view(-1, 32)[:100].double().numpy()
    w = np.abs(x) + np.sqrt((x**2).mean(1, keepdims=True))
    as_float = [torch.from_numpy(a.T.copy()).float() for a in (x, w)]
    scale, depth = (
        found.double().numpy()[:, None] for found in fit_scale_and_min(*as_float, top, grid)
    )
    codes = np.clip(np.round((x + depth) / scale), 0, top)
    found = (w * (scale * codes - depth - x) ** 2).sum(1)
    least = [search_by_loop(a, b, top, grid) for a, b in zip(x, w, strict=True)]
    # Rounding once more with the fitted scale can only help; float32 sums cost next to nothing.
    assert found.sum() <= 1.001 * np.sum(least)


def test_the_signed_search_beats_the_plain_scale() -> None:
    x = sample("heavy").view(-1, 16).t().contiguous()
    weights = x.square()
    scale = fit_scale(x, weights, 4)
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]

    def error(scale: Tensor) -> Tensor:
        codes = (x / scale).round().clamp(-4, 3)
        return (weights * (scale * codes - x).square()).sum(0)

    assert error(scale).sum() < 0.8 * error(extreme / -4).sum()


def test_scales_are_moved_until_no_single_move_helps() -> None:
    x = torch.rand(8, 50) + 0.01
    weights = torch.rand(8, 50) + 0.1
    scale, codes = fit_scales(x, weights, 15)
    assert codes.min() >= 0
    assert codes.max() <= 15

    def error(codes: Tensor) -> Tensor:
        fitted = (weights * x * codes).sum(0) / (weights * codes * codes).sum(0)
        return (weights * (x - fitted * codes).square()).sum(0)

    least = error(codes)
    torch.testing.assert_close((weights * (x - scale * codes).square()).sum(0), least)
    for row in range(8):
        for step in (-1, 1):
            moved = codes.clone()
            moved[row] = (moved[row] + step).clamp(0, 15)
            assert (error(moved) >= least - 1e-6).float().mean() > 0.9  # five rounds, then enough
