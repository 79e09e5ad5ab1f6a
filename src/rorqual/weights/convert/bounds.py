"""How far a converted tensor's values may be from their source: what rounding to its type explains.

Floating point: as far as the nearest number of the type. FP8: as far as the nearest one with the
scale that is stored, which reaches the block's greatest value and is less than twice as coarse as
that needs, as powers of two are. GGUF's blocks: `ops/quant_bounds`.
"""

# R rows of C values, P x Q blocks of FP8

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rorqual.ops.block_fp8 import E4M3_MAX, num_blocks
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.names import StoredTensor
from rorqual.weights.safetensors_file import DTYPES
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

Allowed = Callable[[int, int, Tensor, Tensor], Tensor]
"""(first row, row after the last, source's values, stored values) -> (R, C) allowed errors."""

FLOAT32_ROUNDING = 2.0**-22  # of the division by a scale and the multiplication with it
SMALLEST_AMAX = E4M3_MAX * 2.0**-124  # a scale for less would not be a normal float32


def type_of(source: TensorSource, tensor: StoredTensor) -> str:
    """The name of a tensor's stored type; two where its halves differ."""
    if isinstance(source, GgufSource):
        return "+".join(source.kinds(tensor.name))
    return source.entries[tensor.name].dtype


def bound_of(stored: StoredRows, *, has_importance: bool = False) -> Allowed:
    """What the rows of a converted tensor are held to. Ranges begin and end between FP8 blocks."""
    source, name = stored.source, stored.tensor.name
    if stored.is_fp8:
        return lambda start, stop, before, after: _fp8(stored, start, stop, before, after)
    if isinstance(source, GgufSource) and source.kinds(name) != [stored.entry.dtype]:
        return lambda start, stop, before, after: source.allowed_errors(
            name, start, stop, before, has_importance=has_importance
        )
    dtype = DTYPES[stored.entry.dtype]
    return lambda start, stop, before, after: _nearest(before, dtype)


def _nearest(before: Tensor, dtype: torch.dtype) -> Tensor:
    return (before.to(dtype).float() - before).abs()


def _fp8(stored: StoredRows, start: int, stop: int, before: Tensor, after: Tensor) -> Tensor:
    assert stored.scale is not None, "FP8 comes with scales"
    assert stored.source.quantisation is not None, "and says how large their blocks are"
    height, width = stored.source.quantisation.block
    scale_PQ = stored.scale[start // height : num_blocks(stop, height)]
    scale = _spread(scale_PQ, before.shape, (height, width))
    codes = (before / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    error = (codes.float() * scale - before).abs()
    is_reached = before.abs() <= E4M3_MAX * scale * (1 + FLOAT32_ROUNDING)
    allowed = torch.where(is_reached, error + FLOAT32_ROUNDING * error, 0.0)
    amax_PQ = _block_amax(before.nan_to_num(), (height, width))
    is_coarse_PQ = (scale_PQ >= 2 * amax_PQ / E4M3_MAX) & (amax_PQ > SMALLEST_AMAX)
    # Blocks that are carried over keep the scale that they came with.
    is_coarse_PQ &= _block_amax((after != before).float(), (height, width)) > 0
    return allowed.masked_fill(_spread(is_coarse_PQ, before.shape, (height, width)), 0.0)


def _spread(values_PQ: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    wide = values_PQ.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def _block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    rows = [part.abs().amax(0) for part in values.split(block[0])]
    columns = [part.amax(1) for part in torch.stack(rows).split(block[1], dim=1)]
    return torch.stack(columns, 1)
