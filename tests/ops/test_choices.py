"""Which way a product, a search or a scale takes, and where the ways part. Oracles: plain formulas;
kernels are replaced by the functions that they compile.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import attention, compiled, grouped_gemm, linear, quant_search
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.quant_types import K_QUANTS, QUANT_TYPES, SMALL_BLOCKS
from rorqual.ops.quantise import encode_blocks

FLOAT32 = 1e-5  # relative: sums in other orders
BFLOAT16 = 2**-8


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.fixture
def rows_of_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a processor without bfloat16 arithmetic that has a compiler: rows of each call."""
    rows: list[int] = []

    def counted(function: Any) -> Any:
        def run(x: Tensor, *others: Tensor) -> Tensor:
            assert x.is_contiguous()
            rows.append(x.numel() // others[0].shape[-1])
            return function(x, *others)

        return run

    for module in (linear, grouped_gemm):
        monkeypatch.setattr(module, "can_compile", lambda: True)
    monkeypatch.setattr(linear, "_has_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "_rows", counted(linear._sum_rows))
    monkeypatch.setattr(linear, "_rows_float32", counted(linear._sum_rows_float32))
    monkeypatch.setattr(linear, "_expert_rows", counted(linear._sum_expert_rows))
    return rows


@pytest.mark.parametrize(
    ("num_rows", "pieces"),
    [
        (1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [8]), (8, [8]), (9, [8, 1]), (11, [8, 4]),
        (16, [8, 8]), (24, [8, 8, 8]), (25, []),
    ],
)  # fmt: skip
@torch.no_grad()
def test_few_rows_go_by_eights(
    num_rows: int, pieces: list[int], rows_of_kernels: list[int]
) -> None:
    x_MI, weight_OI = random(num_rows, 32), random(40, 32)
    expected_MO = x_MI.float() @ weight_OI.float().t()
    torch.testing.assert_close(
        linear.linear(x_MI, weight_OI).float(), expected_MO, rtol=BFLOAT16, atol=1e-5
    )
    assert rows_of_kernels == pieces
    rows_of_kernels.clear()
    found_MO = linear.linear_float32(x_MI, weight_OI)
    torch.testing.assert_close(found_MO, expected_MO, rtol=FLOAT32, atol=1e-5)
    assert rows_of_kernels == pieces
    # Rows that lie across are copied first; leading dimensions stay.
    across = random(32, num_rows).t()[None]
    found = linear.linear(across, weight_OI)
    assert found.shape == (1, num_rows, 40)
    wide = (across.float() @ weight_OI.float().t())[0]
    torch.testing.assert_close(found[0].float(), wide, rtol=BFLOAT16, atol=1e-5)


@pytest.mark.parametrize("modes", [(True, False, True), (False, True, False)])
def test_the_tile_serves_in_inference_mode_and_outside(
    modes: tuple[bool, ...], rows_of_kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's step and a model called by hand take turns in one thread."""
    monkeypatch.setattr(linear, "_scratch", threading.local())
    x_MI, weight_OI = random(25, 32), random(40, 32)
    expected_MO = x_MI.float() @ weight_OI.float().t()
    for is_inference in modes:
        with torch.inference_mode() if is_inference else torch.no_grad():
            found_MO = linear.linear_float32(x_MI, weight_OI)
        torch.testing.assert_close(found_MO, expected_MO, rtol=FLOAT32, atol=1e-5)
    assert not rows_of_kernels


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        ([1, 0, 0], 1), ([1, 2, 0], 4), ([0, 5, 0], 8), ([24, 9, 0], 64), ([24, 24, 16], 64),
        ([24, 24, 17], None), ([25, 0, 0], None), ([0, 0, 0], None),
    ],
)  # fmt: skip
@torch.no_grad()
def test_rows_of_few_for_each_expert_are_gathered(
    counts: list[int], size: int | None, rows_of_kernels: list[int]
) -> None:
    x_NI, weight_EOI, counts_E = random(sum(counts), 16), random(3, 8, 16), torch.tensor(counts)
    found = grouped_gemm.grouped_gemm(x_NI, weight_EOI, counts_E)
    wanted = grouped_gemm.grouped_gemm_plain(x_NI.float(), weight_EOI.float(), counts_E)
    torch.testing.assert_close(found.float(), wanted, rtol=BFLOAT16, atol=1e-5)
    if size is not None:
        assert rows_of_kernels == [size]
    elif sum(counts) == 65:
        assert rows_of_kernels == [8] * 8 + [1]


@pytest.mark.parametrize(
    ("num_choices", "sizes"),
    [(1, [1, 2, 4, 8, 16, 32, 64]), (8, [8, 16, 32, 64]), (9, [16, 32, 64])],
)
@torch.no_grad()
def test_sizes_that_a_step_may_have_are_compiled_beforehand(
    num_choices: int, sizes: list[int], rows_of_kernels: list[int]
) -> None:
    grouped_gemm.warm_up(random(3, 8, 16), num_choices)
    assert rows_of_kernels == sizes
    grouped_gemm.warm_up(random(3, 8, 16).float(), num_choices)
    assert rows_of_kernels == sizes


def test_the_memory_of_a_tile_grows_and_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_scratch", type(linear._scratch)())
    monkeypatch.setattr(linear, "TILE_ELEMENTS", 100)
    for shape, size in (((3, 4), 100), ((10, 10), 100), ((11, 10), 110), ((2, 5), 110)):
        weight = random(*shape)
        assert torch.equal(linear._wide_copy(weight), weight.float())
        assert linear._scratch.tile.numel() == size


@torch.no_grad()
def test_a_kernel_is_for_one_form_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated code asserts nothing: shape, stride, dtype and threads must all be the key."""
    built: list[tuple[Any, ...]] = []

    def build(self: Any, tensors: tuple[Tensor, ...]) -> Any:
        built.append(tuple(tensors))
        return lambda inputs: [inputs[0] * 2]

    monkeypatch.setattr(compiled.Compiled, "_build", build)
    double = compiled.Compiled(lambda x: x * 2)
    square = torch.arange(4.0).view(2, 2)
    for number, x in enumerate((square, square.t(), square.double(), square[:1], square[None]), 1):
        for _ in range(2):
            assert torch.equal(double(x), x * 2)
        assert len(built) == number
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        double(square)
    finally:
        torch.set_num_threads(threads)
    assert len(built) == 6
    double(square)
    double(square, square)
    assert len(built) == 7


def test_few_scores_of_one_key_stay_plain_products() -> None:
    """B * H * T * S scores: at the limit still, beyond it and with more keys not."""

    def is_small(num_queries: int, num_keys: int, key_heads: int = 1) -> bool:
        q = torch.empty(2, 8, num_queries, 4, device="meta")
        return attention._is_small(q, torch.empty(2, key_heads, num_keys, 4, device="meta"))

    assert attention.EXPLICIT_SCORES == 1 << 26
    assert is_small(1, 1 << 22)
    assert not is_small(1, (1 << 22) + 1)
    assert not is_small(2, 1 << 22)
    assert not is_small(1, 1, key_heads=8)


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [1, 3])
def test_bfloat16_is_attended_in_float32_where_the_processor_has_none(
    key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, at the end; the scale is the given one."""
    monkeypatch.setattr(linear, "_has_bfloat16", lambda: False)
    q, k, v = random(2, 3, 5, 8), random(2, key_heads, 9, 8), random(2, key_heads, 9, 4)
    found = attention.attention(q, k, v, None, 0.7)
    assert found.dtype is torch.bfloat16
    wide = attention.attention(q.float(), k.float(), v.float(), None, 0.7)
    torch.testing.assert_close(found.float(), wide, rtol=BFLOAT16, atol=0)


def test_kernels_search_only_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    size = quant_search.KERNEL_VALUES
    monkeypatch.setattr(quant_search, "can_compile", lambda: True)
    for num, is_enough in ((size // 2 - 32, False), (size // 2, True), (size, True)):
        x = torch.zeros(32, num // 32)
        assert quant_search._is_enough(x) is is_enough
        assert quant_search._filled(x).shape == ((32, size // 32) if is_enough else x.shape)
    assert not quant_search._is_enough(torch.zeros(32, size // 32 + 1))
    monkeypatch.setattr(quant_search, "can_compile", lambda: False)
    assert not quant_search._is_enough(torch.zeros(32, size // 32))


@pytest.mark.parametrize("name", [name for name in (*SMALL_BLOCKS, *K_QUANTS) if name != "Q8_0"])
def test_columns_that_count_for_nothing_count_a_little(name: str) -> None:
    """A ten-thousandth of the mean, so that a group of such columns keeps its values; an
    importance of zeros is none at all.
    """
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.zeros(512)
    importance[::3] = 2.0
    raised = importance.clamp_min(1e-4 * float(importance.mean()))
    found = encode_blocks(x, name, importance)
    assert torch.equal(found, encode_blocks(x, name, raised))
    zeros = encode_blocks(x, name, torch.zeros(512))
    assert torch.equal(zeros, encode_blocks(x, name, torch.ones(512)))


def test_bits_of_a_value() -> None:
    assert QUANT_TYPES["Q4_K"].bits_per_value == 4.5
    assert QUANT_TYPES["F32"].bits_per_value == 32
    assert QUANT_TYPES["Q8_0"].bits_per_value == 8.5


@pytest.mark.parametrize("exponent", [-10, 0, 3])
def test_a_power_of_two_that_is_just_enough_is_taken(exponent: int) -> None:
    """amax = 448 * 2^k has the scale 2^k; the next number above has the next power."""
    power = torch.tensor(2.0**exponent)
    for amax, scale in (
        (448 * power, power),
        (torch.nextafter(448 * power, power.new_tensor(torch.inf)), 2 * power),
        (torch.nextafter(448 * power, power.new_tensor(0.0)), power),
        (torch.tensor(0.0), torch.tensor(1.0)),
    ):
        weight = torch.zeros(2, 3)
        weight[1, 2] = -amax
        quantised, found = quantise_blocks(weight, use_ue8m0=True)
        assert found.tolist() == [[scale]]
        assert bool(quantised.float().isfinite().all())


def test_blocks_of_another_size_have_scales_of_their_own() -> None:
    """Oracle: every block quantised alone."""
    weight = torch.randn(5, 7) * torch.logspace(-2, 2, 7)
    quantised, scale = quantise_blocks(weight, 2)
    assert scale.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            alone, (own,) = quantise_blocks(weight[rows, columns].contiguous(), 2)
            assert own == scale[i, j]
            assert torch.equal(quantised[rows, columns].float(), alone.float())
    back = dequantise_blocks(quantised, scale, block=(2, 2))
    error = (back - weight).abs()
    step = F.pad(weight.abs(), (0, 1, 0, 1)).unfold(0, 2, 2).unfold(1, 2, 2).amax((2, 3)) / 16
    assert bool((error <= step.repeat_interleave(2, 0).repeat_interleave(2, 1)[:5, :7]).all())


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_scales_beside_the_nearest_one_lose_nothing(steps: int) -> None:
    """Blocks whose greatest value is 448 times a scale that float32's division misses by one."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-126, 127, (128, 128), generator=generator).to(torch.int8)
    codes = codes.view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    codes[0, 0] = 0x7E  # 448
    values = codes.view(torch.float8_e4m3fn).float()
    num_checked = 0
    for scale in torch.rand(200, generator=generator):
        block = values * scale
        found = (block.abs().max() / 448).view(torch.int32) - scale.view(torch.int32)
        if int(found) != steps:
            continue
        back = dequantise_blocks(*quantise_blocks(block))
        assert torch.equal(back, block)
        num_checked += 1
    assert num_checked > 5
