"""A stack of matrices in the bytes of their file, packed and not. Oracle: the bytes put in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.model.stored import StoredStack
from rorqual.ops import native
from rorqual.ops.block_fp8 import dequantise_blocks, quantise_blocks
from rorqual.ops.kernels import DECODED, FP8, NATIVE, Kernels
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.ops.quantise import decode_blocks, encode_blocks

needs_native = pytest.mark.skipif(
    native.library() is None, reason="no C++ compiler built the kernels"
)
COLUMNS = 256
KERNELS = [DECODED, pytest.param(NATIVE, marks=needs_native)]


def blocks(kind: str, num: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(num * rows, COLUMNS, generator=generator)
    return encode_blocks(values, kind).unflatten(0, (num, rows))


def filled(kind: str, codes_EOB: Tensor, kernels: Kernels) -> StoredStack:
    num, rows, num_bytes = codes_EOB.shape
    stack = StoredStack(kind, (num, rows, COLUMNS), num_bytes, (128, 128), kernels)
    for index, codes_OB in enumerate(codes_EOB):
        stack.put(index, codes_OB)
    return stack


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K", "Q6_K"])
def test_what_was_put_comes_back_by_rows(kind: str, kernels: Kernels) -> None:
    """Whole, a range across tiles of 16 rows, single rows, a last tile that is not full."""
    codes_EOB = blocks(kind, 2, 37)
    stack = filled(kind, codes_EOB, kernels)
    assert stack.kernels is kernels
    assert (stack.packed_EP is not None) is (kernels is NATIVE)
    assert stack.codes_EOB.numel() == (0 if kernels is NATIVE else codes_EOB.numel())
    exact = [decode_blocks(codes_OB, kind) for codes_OB in codes_EOB]
    for index, dense in enumerate(exact):
        assert torch.equal(stack.dense(index), dense)
        for start, stop in ((0, 1), (15, 17), (16, 32), (20, 37), (36, 37), (5, 5)):
            assert torch.equal(stack.dense(index, start, stop), dense[start:stop])
    ids = torch.tensor([36, 0, 15, 16, 15])
    assert torch.equal(stack.rows(ids), exact[0][ids])
    assert stack.rows(ids[:0]).shape == (0, COLUMNS)


@needs_native
def test_kernels_that_pack_nothing_like_it_leave_it_as_it_is() -> None:
    """A kind that has no packed form, a width that is no whole block."""
    assert filled("Q5_0", blocks("Q5_0", 1, 4), NATIVE).kernels is DECODED
    narrow = StoredStack("BF16", (1, 4, 7), 14, (128, 128), NATIVE)
    assert narrow.kernels is DECODED
    assert narrow.codes_EOB.shape == (1, 4, 14)


@needs_native
def test_tiles_of_a_packed_matrix_are_those_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rorqual.model import stored

    monkeypatch.setattr(stored, "TILE_ELEMENTS", 40 * COLUMNS)  # of 32 rows: two tiles of 16
    codes = blocks("Q8_0", 2, 70)
    packed = list(filled("Q8_0", codes, NATIVE).tiles(1))
    assert [(rows.start, rows.stop) for rows, _ in packed] == [(0, 32), (32, 64), (64, 70)]
    assert torch.equal(torch.cat([tile for _, tile in packed]), decode_blocks(codes[1], "Q8_0"))


def test_fp8_is_put_with_its_scales() -> None:
    values = torch.randn(2, 40, 70, generator=torch.Generator().manual_seed(1))
    stack = StoredStack(FP8, (2, 40, 70), 70, (32, 32))
    for index in range(2):
        codes, scales = quantise_blocks(values[index], 32)
        stack.put(index, codes.view(torch.uint8), scales)
        assert torch.equal(stack.dense(index), dequantise_blocks(codes, scales, block=(32, 32)))


@needs_native
@pytest.mark.parametrize("kind", ["BF16", "Q4_K"])
def test_it_takes_the_bytes_of_its_file(kind: str) -> None:
    """At most 1.05 times as many, where rows are whole tiles the same."""
    for rows in (16, 1024, 1030):
        stack = filled(kind, blocks(kind, 1, rows), NATIVE)
        assert stack.packed_EP is not None
        stored = rows * QUANT_TYPES[kind].num_bytes(COLUMNS)
        assert stored <= stack.packed_EP.nbytes <= 1.05 * stored
        assert stack.packed_EP.nbytes == stored or rows % 16
