"""Products with packed matrices by the C++ kernels: BF16 and GGUF's Q8_0, Q4_K and Q6_K.

Quantised kinds round activations to 8 bits with a scale for each 32, as llama.cpp does; BF16 rounds
them to bfloat16. Sums are float32. The plain twin, by which a backward pass differentiates, is
`ops.decoded`.
"""

# M rows, I inputs, O outputs, H heads, E matrices of a stack, B bytes of a row, P bytes of a packed
# matrix, T tiles, N ids of rows, D hidden size

from __future__ import annotations

from ctypes import CDLL, Array, c_int64
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.ops import decoded
from rorqual.ops.cross_entropy import loss_of_logits, losses_of_logits
from rorqual.ops.native import KINDS, library
from rorqual.ops.native.arena import ARENA
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.ops.twins import by_kernel

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_MEMORY = 3
TILE_ROWS = 16


class PackedStack(decoded.Stack, Protocol):
    """A stack of E matrices that also has them packed, uint8 (E, P)."""

    packed_EP: Tensor | None


def can_pack(kind: str, num_columns: int) -> bool:
    """Whether matrices of that kind and width have a packed form here."""
    if kind not in KINDS or library() is None:
        return False
    return num_columns % max(2, QUANT_TYPES[kind].block_values) == 0


def empty_packed(kind: str, shape: tuple[int, int, int]) -> Tensor:
    """Room for E packed matrices (O, I): uint8 (E, P)."""
    num, num_rows, num_columns = shape
    size = _loaded().rq_packed_bytes(KINDS[kind], num_rows, num_columns)
    return ARENA.empty(num, size)


def pack_into(packed_P: Tensor, codes_OB: Tensor, kind: str, num_columns: int) -> None:
    """Packs the rows of a matrix, in the bytes of their file."""
    rows, shape = codes_OB.contiguous(), (len(codes_OB), num_columns)
    _check(_loaded().rq_pack(KINDS[kind], rows.data_ptr(), packed_P.data_ptr(), *shape))


def pack(codes_EOB: Tensor, kind: str, num_columns: int) -> Tensor:
    """Bytes of rows, as files store them, uint8 (E, O, B) -> (E, P).

    Packed matrices take the bytes of their rows, filled up to whole tiles of 16.
    """
    num, num_rows, _ = codes_EOB.shape
    packed_EP = empty_packed(kind, (num, num_rows, num_columns))
    for codes_OB, packed_P in zip(codes_EOB, packed_EP, strict=True):
        pack_into(packed_P, codes_OB, kind, num_columns)
    return packed_EP


def unpack(packed_P: Tensor, kind: str, num_columns: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of one packed matrix: (P,) -> (rows, B)."""
    first = start // TILE_ROWS
    tiles_TP = _tiles(packed_P, kind, num_columns)[first : -(-stop // TILE_ROWS)]
    codes = _unpack_tiles(tiles_TP, kind, stop - first * TILE_ROWS, num_columns)
    return codes[start - first * TILE_ROWS :]


def _tiles(packed_P: Tensor, kind: str, num_columns: int) -> Tensor:
    return packed_P.view(-1, TILE_ROWS * QUANT_TYPES[kind].num_bytes(num_columns))


def _unpack_tiles(tiles_TP: Tensor, kind: str, num_rows: int, num_columns: int) -> Tensor:
    codes_OB = torch.empty(num_rows, QUANT_TYPES[kind].num_bytes(num_columns), dtype=torch.uint8)
    if num_rows:
        rows, tiles = codes_OB.data_ptr(), tiles_TP.data_ptr()
        _check(_loaded().rq_unpack(KINDS[kind], tiles, rows, num_rows, num_columns))
    return codes_OB


def decode(packed_P: Tensor, kind: str, num_rows: int, num_columns: int) -> Tensor:
    """The values of one packed matrix, float32: (P,) -> (O, I)."""
    values_OI = torch.empty(num_rows, num_columns)
    tiles, shape = packed_P.data_ptr(), (num_rows, num_columns)
    _check(_loaded().rq_decode(KINDS[kind], tiles, values_OI.data_ptr(), *shape))
    return values_OI


def decode_rows(packed_P: Tensor, kind: str, shape: tuple[int, int], ids_N: Tensor) -> Tensor:
    """Some rows of a packed matrix of that shape, float32 (N, I); ids are int64."""
    ids_N = ids_N.contiguous()
    assert ids_N.dtype is torch.int64, "ids are int64"
    rows_NI = torch.empty(len(ids_N), shape[1])
    matrix = KINDS[kind], packed_P.data_ptr(), *shape
    status = _loaded().rq_decode_rows(*matrix, ids_N.data_ptr(), len(ids_N), rows_NI.data_ptr())
    _check(status)
    return rows_NI


def multiply(x_MI: Tensor, packed_EP: Tensor, kind: str, num_rows: int, counts_E: Tensor) -> Tensor:
    """(M, I) -> (M, O): the next counts_E[e] rows of x, times matrix e. In x's dtype, float32 or
    bfloat16; without gradients. As many threads as torch has.
    """
    counts_E = counts_E.contiguous()
    assert len(counts_E) == len(packed_EP), "one count a matrix"
    assert counts_E.dtype is torch.int64, "counts are int64"
    assert int(counts_E.sum()) == len(x_MI), "counts are of all rows"
    counts = (c_int64 * len(counts_E)).from_address(counts_E.data_ptr())
    return _product(x_MI, packed_EP, kind, num_rows, counts)


def _product(
    x_MI: Tensor, packed_EP: Tensor, kind: str, num_rows: int, counts: Array[c_int64]
) -> Tensor:
    """With as many of the matrices as there are counts."""
    x_MI, loaded = x_MI.contiguous(), _loaded()
    assert x_MI.dtype in _DTYPES, f"x is float32 or bfloat16, not {x_MI.dtype}"
    whole_tiles = -(-num_rows // TILE_ROWS) * TILE_ROWS
    fits = packed_EP.shape[1] == whole_tiles * QUANT_TYPES[kind].num_bytes(x_MI.shape[1])
    assert fits, f"x has {x_MI.shape[1]} columns, and a packed matrix {packed_EP.shape[1]} bytes"
    y_MO = torch.empty(len(x_MI), num_rows, dtype=x_MI.dtype)
    loaded.rq_set_threads(torch.get_num_threads())
    _check(
        loaded.rq_grouped(
            KINDS[kind], packed_EP.data_ptr(), len(counts), num_rows, x_MI.shape[1],
            x_MI.data_ptr(), y_MO.data_ptr(), counts, _DTYPES[x_MI.dtype],
        )
    )  # fmt: skip
    return y_MO


def linear(x: Tensor, stack: PackedStack) -> Tensor:
    """x (..., I) times the first matrix -> (..., O), in x's dtype."""
    packed_EP = stack.packed_EP
    if packed_EP is None:
        return decoded.linear(x, stack)

    def kernel(x: Tensor) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = _product(x_MI, packed_EP, stack.kind, stack.shape[1], (c_int64 * 1)(len(x_MI)))
        return y_MO.view(*x.shape[:-1], -1)

    return by_kernel(kernel, lambda x: decoded.linear(x, stack), x)


def linear_float32(x: Tensor, stack: PackedStack) -> Tensor:
    return linear(x.float(), stack)


def head_linear(x_MHI: Tensor, stack: PackedStack) -> Tensor:
    """Each head's rows times that head's matrix: (M, H, I) -> (M, H, O) in x's dtype."""
    num, heads = x_MHI.shape[:2]
    by_head = x_MHI.transpose(0, 1).flatten(0, 1)
    y = grouped_gemm(by_head, stack, torch.full((heads,), num))
    return y.view(heads, num, -1).transpose(0, 1)


def grouped_gemm(x_MI: Tensor, stack: PackedStack, counts_E: Tensor) -> Tensor:
    """As `ops.grouped_gemm.grouped_gemm`. The first matrices, where there are fewer counts."""
    packed_EP = stack.packed_EP
    if packed_EP is None:
        return decoded.grouped_gemm(x_MI, stack, counts_E)
    num_rows = stack.shape[1]

    def kernel(x: Tensor) -> Tensor:
        return multiply(x, packed_EP[: len(counts_E)], stack.kind, num_rows, counts_E)

    def twin(x: Tensor) -> Tensor:
        return decoded.grouped_gemm(x, stack, counts_E)

    return by_kernel(kernel, twin, x_MI)


def linear_cross_entropy(
    h_MD: Tensor, stack: PackedStack, targets_M: Tensor, is_target_M: Tensor
) -> Tensor:
    """As `ops.cross_entropy.linear_cross_entropy`."""
    return loss_of_logits(linear_float32(h_MD, stack), targets_M, is_target_M)


@torch.no_grad()
def token_losses(h_MD: Tensor, stack: PackedStack, targets_M: Tensor) -> Tensor:
    """As `ops.cross_entropy.token_losses`."""
    return losses_of_logits(linear_float32(h_MD, stack), targets_M)


def _loaded() -> CDLL | Any:
    loaded = library()
    assert loaded is not None, "nothing is packed where the library is not"
    return loaded


def _check(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("the C++ kernels got no memory for a product's activations")
    assert status == 0, f"the C++ kernels refuse a shape or kind: status {status}"
