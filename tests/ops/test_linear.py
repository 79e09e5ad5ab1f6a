"""Products with bfloat16 weights on a processor without bfloat16 arithmetic.

Oracle: torch's own float32 products of the widened values. The kernels' sums are float32, so they
are held to float32's error and then to one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import compiled, linear
from rorqual.ops.grouped_gemm import grouped_gemm, grouped_gemm_plain

ROWS = [1, 2, 3, 5, 8, 9, 23, 24, 25, 70]

needs_compiler = pytest.mark.skipif(
    not compiled.can_compile(), reason="no C++ compiler for Inductor"
)


@pytest.fixture(autouse=True)
def _old_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor without bfloat16 arithmetic, whatever this one has; no gradients."""
    monkeypatch.setattr(linear, "_has_bfloat16", lambda: False)
    with torch.inference_mode():
        yield


@pytest.fixture(params=[True, False], ids=["kernels", "no compiler"])
def _kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not compiled.can_compile():
        pytest.skip("no C++ compiler for Inductor")
    if not request.param:
        monkeypatch.setattr(linear, "can_compile", lambda: False)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("num_rows", ROWS)
def test_rows_agree_with_float32(num_rows: int) -> None:
    x_MI, weight_OI = random(num_rows, 96), random(40, 96)
    expected_MO = F.linear(x_MI.float(), weight_OI.float())
    torch.testing.assert_close(linear.logits(x_MI, weight_OI), expected_MO, rtol=1e-5, atol=1e-5)
    y_MO = linear.linear(x_MI, weight_OI)
    assert y_MO.dtype is torch.bfloat16
    torch.testing.assert_close(y_MO.float(), expected_MO, rtol=2**-8, atol=1e-5)


def test_float32_rows_are_not_rounded_on_the_way() -> None:
    x_MI, weight_OI = torch.randn(3, 64), random(8, 64)
    y_MO = linear.linear_float32(x_MI, weight_OI)
    assert y_MO.dtype is torch.float32
    torch.testing.assert_close(y_MO, x_MI @ weight_OI.float().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("num_rows", [1, 3, 8, 25])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_heads_agree_with_float32(num_rows: int, is_transposed: bool) -> None:
    x_MHI = random(num_rows, 4, 32)
    weight_HOI = random(4, 32, 48).transpose(1, 2) if is_transposed else random(4, 48, 32)
    expected_MHO = torch.einsum("mhi,hoi->mho", x_MHI.float(), weight_HOI.float())
    y_MHO = linear.head_linear(x_MHI, weight_HOI)
    torch.testing.assert_close(y_MHO.float(), expected_MHO, rtol=2**-8, atol=1e-5)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("counts", [[1, 0, 2, 0], [24, 24, 16, 0], [0, 0, 0, 64], [30, 40, 0, 5]])
def test_experts_agree_with_float32(counts: list[int]) -> None:
    x_NI, weight_EOI = random(sum(counts), 32), random(4, 24, 32)
    counts_E = torch.tensor(counts)
    expected_NO = grouped_gemm_plain(x_NI.float(), weight_EOI.float(), counts_E)
    y_NO = grouped_gemm(x_NI, weight_EOI, counts_E)
    torch.testing.assert_close(y_NO.float(), expected_NO, rtol=2**-8, atol=1e-5)


@needs_compiler
def test_a_row_of_a_kernel_does_not_depend_on_its_company() -> None:
    x_MI, weight_OI = random(8, 256), random(33, 256)
    alone = torch.cat([linear.logits(x_MI[i : i + 1], weight_OI) for i in range(8)])
    torch.testing.assert_close(linear.logits(x_MI, weight_OI), alone, rtol=1e-6, atol=1e-6)


def test_a_wide_weight_is_widened_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", 1000)
    monkeypatch.setattr(linear, "_scratch", type(linear._scratch)())
    x_MI, weight_OI = random(40, 96), random(64, 96)
    y_MO = linear.logits(x_MI, weight_OI)
    assert linear._scratch.tile.numel() == 1000
    expected_MO = x_MI.float() @ weight_OI.float().t()
    torch.testing.assert_close(y_MO, expected_MO, rtol=1e-5, atol=1e-5)


def test_gradients_and_float32_take_torch_s_own_way() -> None:
    weight = random(4, 8)
    assert linear.widens(weight)
    assert not linear.widens(weight.float())
    with torch.inference_mode(False), torch.enable_grad():
        assert not linear.widens(weight)


def test_no_compiler_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    compiled.can_compile.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="rorqual.ops"):
            assert not compiled.can_compile()
        assert "install g++" in caplog.text
    finally:
        compiled.can_compile.cache_clear()
