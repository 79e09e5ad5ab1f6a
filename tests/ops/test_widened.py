"""Products with bfloat16 weights on a processor without bfloat16 arithmetic.

Oracle: torch's own float32 products of the widened values, held to float32's error and then to one
rounding. That all operations agree with the plain twins is in test_kernels.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rorqual.ops import widened
from rorqual.ops.attention import attention

FLOAT32 = 1e-5  # relative: sums in other orders
BFLOAT16 = 2**-8


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


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
                found_MO = widened.linear_float32(x_MI, weight_OI)
            torch.testing.assert_close(found_MO, expected_MO, rtol=FLOAT32, atol=1e-5)


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
    y_MO = widened.linear_float32(x_MI, weight_OI)
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


def test_float32_rows_are_not_rounded_on_the_way() -> None:
    x_MI, weight_OI = torch.randn(3, 64), random(8, 64)
    y_MO = widened.linear_float32(x_MI, weight_OI)
    assert y_MO.dtype is torch.float32
    torch.testing.assert_close(y_MO, x_MI @ weight_OI.float().t(), rtol=FLOAT32, atol=1e-5)
