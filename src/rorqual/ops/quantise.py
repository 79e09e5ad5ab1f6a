"""Values to the blocks of a GGUF type and back, whole tensors in pieces of bounded memory."""

# R rows of C values, B bytes a row

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import RorqualError, listing
from rorqual.ops.codecs import CODECS
from rorqual.ops.native import BAD_VALUE, library
from rorqual.ops.quant_bits import as_bytes, mean_square, square_root
from rorqual.ops.quant_bounds import OF_THE_RANGE, Limits
from rorqual.ops.quant_types import (
    CODED,
    FLOAT_TYPES,
    QUANT_TYPES,
    READABLE,
    SMALL_BLOCKS,
    QuantType,
)

PIECE_VALUES = 1 << 18  # encoded at once
DECODE_VALUES = 1 << 20
LEAST_IMPORTANCE = 1e-4  # of the mean of all columns
LARGEST = 2.0**28  # beyond what any block's float16 scale reaches
FLUSHED = 8.0  # a range that an importance has narrowed falls below float16 earlier

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def coded_type(name: str) -> QuantType:
    """The type of that name; RorqualError if values cannot be encoded or decoded with it."""
    if name not in CODED:
        raise RorqualError(f"no coder for tensors of type {name}", expected=listing(CODED))
    return QUANT_TYPES[name]


def readable_type(name: str) -> QuantType:
    """The type of that name; RorqualError if values cannot be decoded from it."""
    if name not in READABLE:
        raise RorqualError(
            f"type not supported: no decoder for tensors of type {name}", expected=listing(READABLE)
        )
    return QUANT_TYPES[name]


def _decode_foreign(blocks: Tensor, type_name: str) -> Tensor:
    """Choice: llama.cpp's own Python package decodes what we never write and only read."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(all="ignore"):  # NaN and infinity are the caller's to find
        return torch.from_numpy(gguf.dequantize(blocks.numpy(), kind))


def decode_blocks(raw: Tensor, type_name: str, out: Tensor | None = None) -> Tensor:
    """Bytes (R, B) uint8 -> values (R, C) float32, or copied into `out` of that many values."""
    kind = readable_type(type_name)
    num_rows, num_bytes = raw.shape
    num_columns = num_bytes // kind.block_bytes * kind.block_values
    assert num_bytes == kind.num_bytes(num_columns), f"{num_bytes} bytes are no {type_name} row"
    values = torch.empty(num_rows, num_columns) if out is None else out
    assert values.numel() == num_rows * num_columns, "out is of another size"
    assert values.is_contiguous(), "out must be contiguous"
    if type_name in FLOAT_TYPES:
        floats = raw.contiguous().view(FLOAT_DTYPES[type_name])
        values.view(num_rows, num_columns).copy_(floats)
        return values
    blocks = raw.contiguous().view(-1, kind.block_bytes)
    places = values.view(-1, kind.block_values)
    step = DECODE_VALUES // kind.block_values
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        codec = CODECS.get(type_name)
        places[start : start + step] = (
            codec.decode(piece) if codec is not None else _decode_foreign(piece, type_name)
        )
    return values


def encode_blocks(values: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """Values (R, C) floating -> bytes (R, B) uint8.

    `importance` (C,) >= 0 weighs the columns' squared errors, as llama.cpp's importance matrix
    does: the mean square of what the column is multiplied with. RorqualError for values that are
    not finite or that the type's float16 scales cannot reach.
    """
    kind = coded_type(type_name)
    num_rows, num_columns = values.shape
    assert kind.fits(num_columns), f"rows of {num_columns} are no whole blocks of {type_name}"
    if type_name in FLOAT_TYPES:
        floats = values.detach().to(FLOAT_DTYPES[type_name])
        if not _are_finite(floats):
            raise _refusal(values, type_name)
        return as_bytes(floats)
    evened = None if importance is None else _evened(importance)
    encode = _by_twin if library() is None else _by_library
    encoded = torch.empty(num_rows, kind.num_bytes(num_columns), dtype=torch.uint8)
    step = max(1, PIECE_VALUES // num_columns)
    for start in range(0, num_rows, step):
        rows = values[start : start + step].detach().float().contiguous()
        encode(rows, kind, evened, encoded[start : start + step])
    return encoded


def _by_library(
    rows: Tensor, kind: QuantType, importance_C: Tensor | None, encoded: Tensor
) -> None:
    """The same bytes as the twin's, by the C++ kernels."""
    loaded = library()
    assert loaded is not None, "who calls this has looked"
    pointer = None if importance_C is None else importance_C.data_ptr()
    shape = rows.shape
    status = loaded.rq_encode(kind.type_id, rows.data_ptr(), encoded.data_ptr(), *shape, pointer)
    if status == BAD_VALUE:
        raise _refusal(rows, kind.name)
    assert status == 0, f"the C++ kernels refuse rows of {shape[1]} for {kind.name}: {status}"


def _by_twin(rows: Tensor, kind: QuantType, importance_C: Tensor | None, encoded: Tensor) -> None:
    if not _are_finite(rows) or float(rows.abs().max()) > LARGEST:
        raise _refusal(rows, kind.name)
    weight = None if importance_C is None else _weight(rows, importance_C, kind.name)
    blocks = rows.view(-1, kind.block_values) + 0.0  # no -0: its sign would be a scale's
    found = CODECS[kind.name].encode(blocks, weight)
    for start in CODECS[kind.name].scales:
        if not _are_finite(found[:, start : start + 2].contiguous().view(torch.float16)):
            raise _refusal(rows, kind.name)
    encoded.copy_(found.view(len(rows), -1))


def limits_of(raw: Tensor, type_name: str, *, has_importance: bool = False) -> Limits:
    """Of bytes (R, B) uint8 of a block type, as `encode_blocks` may have written them."""
    codec = CODECS[type_name]
    blocks = raw.contiguous().view(-1, codec.kind.block_bytes)
    error, low, high, least, most, scale = codec.bounds(blocks)
    if has_importance and type_name != "Q8_0":
        least = torch.where(scale == 0, low - FLUSHED * (low - least), -torch.inf)
        most = torch.where(scale == 0, high + FLUSHED * (most - high), torch.inf)
    error = error + OF_THE_RANGE * (low.abs() + high.abs())
    num_groups = max(low.shape[1], 1)
    size = codec.kind.block_values // num_groups
    spread = (
        values.expand(-1, num_groups).repeat_interleave(size, dim=1).view(len(raw), -1)
        for values in (error, low, high, least, most)
    )
    return Limits(*spread)


def _evened(importance_C: Tensor) -> Tensor:
    """float32 with a mean of about one, so that no sum overflows, by a power of two, which changes
    no code; and not far below it: a group of which no column counts would have no scale at all, and
    lose its values.
    """
    mean = float(importance_C.double().mean())
    if mean == 0:
        return torch.ones_like(importance_C, dtype=torch.float32)
    unit = 2.0 ** math.frexp(mean)[1]
    near_one = (importance_C.double() / unit).float()
    return near_one.clamp_min(LEAST_IMPORTANCE * mean / unit).contiguous()


def _weight(rows: Tensor, importance_C: Tensor, type_name: str) -> Tensor:
    """What an encoder takes: the column's importance, for small blocks times sqrt(sigma^2 + x^2)
    of the row, as K-quants do for themselves."""
    weight = importance_C.expand_as(rows)
    if type_name in SMALL_BLOCKS:
        weight = weight * square_root(mean_square(rows) + rows.square())
    return weight.reshape(-1, QUANT_TYPES[type_name].block_values)


def _are_finite(values: Tensor) -> bool:
    # NaN and infinity do not get lost in a sum, and one sum is a sixth of the work.
    is_sum_finite = bool(values.sum(dtype=torch.float32).isfinite())
    return is_sum_finite or bool(torch.isfinite(values).all())


def _refusal(values: Tensor, type_name: str) -> RorqualError:
    """Why a type cannot hold these."""
    if not _are_finite(values):
        return RorqualError(
            f"a weight has values that are not finite, which {type_name} must not hold",
            found="NaN or infinity",
            fix="go back to a checkpoint before the fault",
        )
    if type_name == "BF16":
        why, fix = "whose largest number is 3.39e38", "write this checkpoint as F32"
    else:
        why, fix = "whose numbers or scales are float16", "write this checkpoint as BF16"
    return RorqualError(
        f"a weight has values too large for {type_name}, {why}",
        found=float(values.abs().max()),
        fix=fix,
    )
