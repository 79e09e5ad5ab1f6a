"""Products with packed matrices by the C++ kernels: BF16 and GGUF's Q8_0, Q4_K and Q6_K.

Quantised kinds round activations to 8 bits with a scale for each 32, as llama.cpp does; BF16 rounds
them to bfloat16. Sums are float32. The plain twin is `ops.decoded`.
"""

# M rows, I inputs, O outputs, E matrices of a stack, B bytes of a row, P bytes of a packed matrix

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from rorqual.ops.native import KINDS, library
from rorqual.ops.quant_types import QUANT_TYPES

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ROWS_OF_TILE = 16


def can_pack(kind: str, num_columns: int) -> bool:
    """Whether matrices of that kind and width have a packed form here."""
    if kind not in KINDS or library() is None:
        return False
    return num_columns % max(2, QUANT_TYPES[kind].block_values) == 0


def pack(codes_EOB: Tensor, kind: str, num_columns: int) -> Tensor:
    """Bytes of rows, as files store them, uint8 (E, O, B) -> (E, P).

    Packed matrices take the bytes of their rows, filled up to whole tiles of 16.
    """
    loaded = _loaded()
    num, num_rows, _ = codes_EOB.shape
    size = loaded.rq_packed_bytes(KINDS[kind], num_rows, num_columns)
    packed_EP = torch.empty(num, size, dtype=torch.uint8)
    for codes_OB, packed_P in zip(codes_EOB.contiguous(), packed_EP, strict=True):
        _checked(
            loaded.rq_pack(
                KINDS[kind], codes_OB.data_ptr(), packed_P.data_ptr(), num_rows, num_columns
            )
        )
    return packed_EP


def unpack(packed_EP: Tensor, kind: str, num_rows: int, num_columns: int) -> Tensor:
    """The inverse of `pack`: (E, P) -> (E, O, B)."""
    num_bytes = QUANT_TYPES[kind].num_bytes(num_columns)
    codes_EOB = torch.empty(len(packed_EP), num_rows, num_bytes, dtype=torch.uint8)
    for packed_P, codes_OB in zip(packed_EP, codes_EOB, strict=True):
        _checked(
            _loaded().rq_unpack(
                KINDS[kind], packed_P.data_ptr(), codes_OB.data_ptr(), num_rows, num_columns
            )
        )
    return codes_EOB


def grouped(x_MI: Tensor, packed_EP: Tensor, kind: str, num_rows: int, counts_E: Tensor) -> Tensor:
    """(M, I) -> (M, O): the next counts_E[e] rows of x, times matrix e. In x's dtype, float32 or
    bfloat16; without gradients.
    """
    x_MI, counts_E = x_MI.contiguous(), counts_E.contiguous()
    assert len(counts_E) == len(packed_EP), "one count a matrix"
    assert counts_E.dtype is torch.int64, "counts are int64"
    assert int(counts_E.sum()) == len(x_MI), "counts are of all rows"
    y_MO = torch.empty(len(x_MI), num_rows, dtype=x_MI.dtype)
    counts = (c_int64 * len(counts_E)).from_address(counts_E.data_ptr())
    _checked(
        _loaded().rq_grouped(
            KINDS[kind], packed_EP.data_ptr(), len(packed_EP), num_rows, x_MI.shape[1],
            x_MI.data_ptr(), y_MO.data_ptr(), counts, _DTYPES[x_MI.dtype],
        )
    )  # fmt: skip
    return y_MO


def linear(x: Tensor, packed_EP: Tensor, kind: str, num_rows: int) -> Tensor:
    """x (..., I) times the first matrix -> (..., O); see `grouped`."""
    x_MI = x.reshape(-1, x.shape[-1])
    counts = torch.tensor([len(x_MI)])
    return grouped(x_MI, packed_EP[:1], kind, num_rows, counts).view(*x.shape[:-1], num_rows)


def set_threads(num_threads: int) -> None:
    """Threads of all products that follow."""
    _loaded().rq_set_threads(num_threads)


def _loaded():  # type: ignore[no-untyped-def]  # ctypes has no types of its own
    loaded = library()
    assert loaded is not None, "nothing is packed where the library is not"
    return loaded


def _checked(status: int) -> None:
    if status == 3:
        raise MemoryError("the C++ kernels got no memory for a product's activations")
    assert status == 0, f"the C++ kernels refuse a shape or kind: status {status}"
