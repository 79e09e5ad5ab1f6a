"""Products with bfloat16 weights on a processor without bfloat16 arithmetic: which way they take,
and what compiled kernels give.

Oracle: torch's own float32 products of the widened values. The kernels' sums are float32, so they
are held to float32's error and then to one rounding. That the other ways agree with the plain twins
is in test_kernels.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import compiled, widened
from rorqual.ops.attention import attention
from rorqual.ops.grouped_gemm import grouped_gemm_plain
from rorqual.ops.kernels import WIDENED, WIDENED_COMPILED
from rorqual.ops.widened import Widened, WidenedByRows

ROWS = [1, 2, 3, 5, 8, 9, 23, 24, 25, 70]
FLOAT32 = 1e-5  # relative: sums in other orders
BFLOAT16 = 2**-8

needs_compiler = pytest.mark.skipif(
    not compiled.can_compile(), reason="no C++ compiler for Inductor"
)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Counted:
    """Kernels that are not compiled; `rows` notes those of each call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Tensor) -> Tensor:
            assert x.is_contiguous()
            self.rows.append(x.numel() // others[0].shape[-1])
            return function(x, *others)

        return run


@pytest.mark.parametrize(
    ("num_rows", "pieces"),
    [
        (0, []), (1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [8]), (8, [8]), (9, [8, 1]),
        (11, [8, 4]), (16, [8, 8]), (24, [8, 8, 8]), (25, []),
    ],
)  # fmt: skip
def test_few_rows_go_by_eights(num_rows: int, pieces: list[int]) -> None:
    counted = Counted()
    ways = WidenedByRows(counted)
    x_MI, weight_OI = random(num_rows, 32), random(40, 32)
    expected_MO = x_MI.float() @ weight_OI.float().t()
    torch.testing.assert_close(
        ways.linear(x_MI, weight_OI).float(), expected_MO, rtol=BFLOAT16, atol=1e-5
    )
    assert counted.rows == pieces
    counted.rows.clear()
    found_MO = ways.linear_float32(x_MI, weight_OI)
    torch.testing.assert_close(found_MO, expected_MO, rtol=FLOAT32, atol=1e-5)
    assert counted.rows == pieces
    # Rows that lie across are copied first; leading dimensions stay.
    across = random(32, num_rows).t()[None]
    found = ways.linear(across, weight_OI)
    assert found.shape == (1, num_rows, 40)
    wide = (across.float() @ weight_OI.float().t())[0]
    torch.testing.assert_close(found[0].float(), wide, rtol=BFLOAT16, atol=1e-5)


@pytest.mark.parametrize("modes", [(True, False, True), (False, True, False)])
def test_the_tile_serves_in_inference_mode_and_outside(
    modes: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's step and a model called by hand take turns in one thread."""
    monkeypatch.setattr(widened, "_scratch", threading.local())
    with torch.inference_mode(False):
        x_MI, weight_OI = random(25, 32), random(40, 32)
        expected_MO = x_MI.float() @ weight_OI.float().t()
        for is_inference in modes:
            with torch.inference_mode() if is_inference else torch.no_grad():
                found_MO = WIDENED.linear_float32(x_MI, weight_OI)
            torch.testing.assert_close(found_MO, expected_MO, rtol=FLOAT32, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        ([1, 0, 0], 1), ([1, 2, 0], 4), ([0, 5, 0], 8), ([24, 9, 0], 64), ([24, 24, 16], 64),
        ([24, 24, 17], None), ([25, 0, 0], None), ([0, 0, 0], None),
    ],
)  # fmt: skip
def test_rows_of_few_for_each_expert_are_gathered(counts: list[int], size: int | None) -> None:
    counted = Counted()
    x_NI, weight_EOI, counts_E = random(sum(counts), 16), random(3, 8, 16), torch.tensor(counts)
    found = WidenedByRows(counted).grouped_gemm(x_NI, weight_EOI, counts_E)
    wanted = grouped_gemm_plain(x_NI.float(), weight_EOI.float(), counts_E)
    torch.testing.assert_close(found.float(), wanted, rtol=BFLOAT16, atol=1e-5)
    if size is not None:
        assert counted.rows == [size]
    elif sum(counts) == 65:
        assert counted.rows == [8] * 8 + [1]


@pytest.mark.parametrize(
    ("num_choices", "sizes"),
    [(1, [1, 2, 4, 8, 16, 32, 64]), (8, [8, 16, 32, 64]), (9, [16, 32, 64])],
)
def test_sizes_that_a_step_may_have_are_compiled_beforehand(
    num_choices: int, sizes: list[int]
) -> None:
    counted = Counted()
    WidenedByRows(counted).warm_up(random(3, 8, 16), num_choices)
    assert counted.rows == sizes


def test_one_kernel_norms_a_decoding_step_for_each_epsilon() -> None:
    counted = Counted()
    ways = WidenedByRows(counted)
    for num_rows in (0, 1, 8, 9):
        for eps in (1e-6, 1e-5):
            ways.rms_norm(random(num_rows, 32), random(32), eps)
    assert counted.rows == [1, 1, 8, 8]
    assert ways._norms.keys() == {1e-6, 1e-5}


def test_the_memory_of_a_tile_grows_and_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_scratch", threading.local())
    monkeypatch.setattr(widened, "TILE_ELEMENTS", 100)
    for shape, size in (((3, 4), 100), ((10, 10), 100), ((11, 10), 110), ((2, 5), 110)):
        weight = random(*shape)
        assert torch.equal(widened._wide_copy(weight), weight.float())
        assert widened._scratch.tile.numel() == size


def test_a_wide_weight_is_widened_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "TILE_ELEMENTS", 1000)
    monkeypatch.setattr(widened, "_scratch", threading.local())
    x_MI, weight_OI = random(40, 96), random(64, 96)
    y_MO = Widened().linear_float32(x_MI, weight_OI)
    assert widened._scratch.tile.numel() == 1000
    expected_MO = x_MI.float() @ weight_OI.float().t()
    torch.testing.assert_close(y_MO, expected_MO, rtol=FLOAT32, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 3])
def test_attention_is_rounded_once(key_heads: int) -> None:
    """At the end; the scale is the given one."""
    q, k, v = random(2, 3, 5, 8), random(2, key_heads, 9, 8), random(2, key_heads, 9, 4)
    found = widened.attention(q, k, v, None, 0.7)
    assert found.dtype is torch.bfloat16
    wide = attention(q.float(), k.float(), v.float(), None, 0.7)
    torch.testing.assert_close(found.float(), wide, rtol=BFLOAT16, atol=0)


@pytest.mark.parametrize("ways", [Widened(), WidenedByRows(lambda function: function)])
def test_float32_rows_are_not_rounded_on_the_way(ways: Widened) -> None:
    x_MI, weight_OI = torch.randn(3, 64), random(8, 64)
    y_MO = ways.linear_float32(x_MI, weight_OI)
    assert y_MO.dtype is torch.float32
    torch.testing.assert_close(y_MO, x_MI @ weight_OI.float().t(), rtol=FLOAT32, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("num_rows", ROWS)
def test_compiled_rows_agree_with_float32(num_rows: int) -> None:
    x_MI, weight_OI = random(num_rows, 96), random(40, 96)
    expected_MO = F.linear(x_MI.float(), weight_OI.float())
    y_MO = WIDENED_COMPILED.logits(x_MI, weight_OI)
    torch.testing.assert_close(y_MO, expected_MO, rtol=FLOAT32, atol=1e-5)
    y_MO = WIDENED_COMPILED.linear(x_MI, weight_OI)
    assert y_MO.dtype is torch.bfloat16
    torch.testing.assert_close(y_MO.float(), expected_MO, rtol=BFLOAT16, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("num_rows", [1, 3, 8, 25])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_compiled_heads_agree_with_float32(num_rows: int, is_transposed: bool) -> None:
    x_MHI = random(num_rows, 4, 32)
    weight_HOI = random(4, 32, 48).transpose(1, 2) if is_transposed else random(4, 48, 32)
    expected_MHO = torch.einsum("mhi,hoi->mho", x_MHI.float(), weight_HOI.float())
    y_MHO = WIDENED_COMPILED.head_linear(x_MHI, weight_HOI)
    torch.testing.assert_close(y_MHO.float(), expected_MHO, rtol=BFLOAT16, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("counts", [[1, 0, 2, 0], [24, 24, 16, 0], [0, 0, 0, 64], [30, 40, 0, 5]])
def test_compiled_experts_agree_with_float32(counts: list[int]) -> None:
    x_NI, weight_EOI = random(sum(counts), 32), random(4, 24, 32)
    counts_E = torch.tensor(counts)
    expected_NO = grouped_gemm_plain(x_NI.float(), weight_EOI.float(), counts_E)
    y_NO = WIDENED_COMPILED.grouped_gemm(x_NI, weight_EOI, counts_E)
    torch.testing.assert_close(y_NO.float(), expected_NO, rtol=BFLOAT16, atol=1e-5)


@needs_compiler
def test_a_row_of_a_kernel_does_not_depend_on_its_company() -> None:
    x_MI, weight_OI = random(8, 256), random(33, 256)
    logits = WIDENED_COMPILED.logits
    alone = torch.cat([logits(x_MI[i : i + 1], weight_OI) for i in range(8)])
    torch.testing.assert_close(logits(x_MI, weight_OI), alone, rtol=1e-6, atol=1e-6)
