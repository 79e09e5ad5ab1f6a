"""One tensor of a conversion: read by rows, brought into its new form, handed on by rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError
from rorqual.ops.block_fp8 import BLOCK, quantise_blocks
from rorqual.weights.convert.plan import Options, is_copied
from rorqual.weights.fp8 import E4M3
from rorqual.weights.planned import PlannedTensor
from rorqual.weights.safetensors_file import DTYPES
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

Put = Callable[[PlannedTensor, int, Tensor], None]  # (tensor, its first row, contiguous rows)


def encode(
    source: TensorSource,
    tensor: PlannedTensor,
    scale: PlannedTensor | None,
    options: Options,
    put: Put,
) -> None:
    """Writes a tensor, and its scale, through `put`."""
    stored, first_row = StoredRows(source, tensor.source), tensor.rows[0]
    if scale is None:
        dtype = DTYPES[tensor.dtype]
        for start, stop in stored.chunks(tensor.rows):
            is_same = stored.entry.dtype == tensor.dtype
            rows = stored.raw(start, stop) if is_same else stored.values(start, stop, dtype)
            put(tensor, start - first_row, _columns(rows, tensor))
        return
    use_ue8m0 = options.scale_format == "ue8m0"
    if is_copied(source, tensor.source, options) and not (use_ue8m0 and not _are_powers(stored)):
        for start, stop in stored.chunks(tensor.rows):
            put(tensor, start - first_row, _columns(stored.raw(start, stop), tensor))
        scales = source.read_rows(tensor.source.scale_name, *scale.rows)
        put(scale, 0, _columns(scales, scale).to(DTYPES[scale.dtype]))
        return
    for start, stop in stored.chunks(tensor.rows):
        values = _columns(stored.values(start, stop), tensor)
        try:
            quantised, scales = quantise_blocks(values, use_ue8m0=use_ue8m0)
        except RorqualError as problem:
            raise CheckpointError(
                f"{tensor.source.name} has values that are not finite, which FP8 cannot hold",
                where=source.path,
                found=problem.found,
                fix=problem.fix,
            ) from None
        put(tensor, start - first_row, quantised)
        put(scale, (start - first_row) // BLOCK, scales)


def _columns(rows: Tensor, tensor: PlannedTensor) -> Tensor:
    if tensor.region is None or tensor.region.columns is None:
        return rows
    first, last = tensor.region.columns
    if rows.dtype.itemsize == 1:  # torch does not copy float8 in every version
        return rows.view(torch.uint8)[:, first:last].contiguous().view(rows.dtype)
    return rows[:, first:last].contiguous()


def _are_powers(stored: StoredRows) -> bool:
    assert stored.scale is not None, f"{E4M3} comes with scales"
    return bool((torch.frexp(stored.scale).mantissa == 0.5).all())
