"""One tensor of a conversion: read by rows, brought into its new form, handed on by rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError
from rorqual.ops.block_fp8 import BLOCK, quantise_blocks
from rorqual.weights.convert.plan import E4M3, Options, Output, is_copied
from rorqual.weights.safetensors_file import DTYPES
from rorqual.weights.shards.names import Part
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

Put = Callable[[str, int, Tensor], None]  # (tensor's name, its first row, contiguous rows)


def encode(
    source: TensorSource, output: Output, scale: Output | None, options: Options, put: Put
) -> None:
    """Writes a tensor's part, and its scale's, through `put`."""
    stored = StoredRows(source, output.tensor)
    if scale is None:
        dtype = DTYPES[output.dtype]
        for start, stop in stored.chunks(output.part.rows):
            is_same = stored.entry.dtype == output.dtype
            rows = stored.raw(start, stop) if is_same else stored.values(start, stop, dtype)
            put(output.name, start - output.part.rows[0], _columns(rows, output.part))
        return
    use_ue8m0 = options.scale_format == "ue8m0"
    if is_copied(source, output.tensor, options) and not (use_ue8m0 and not _are_powers(stored)):
        for start, stop in stored.chunks(output.part.rows):
            rows = stored.raw(start, stop)
            put(output.name, start - output.part.rows[0], _columns(rows, output.part))
        scales = source.read_rows(output.tensor.scale_name, *scale.part.rows)
        put(scale.name, 0, _columns(scales, scale.part).to(DTYPES[scale.dtype]))
        return
    for start, stop in stored.chunks(output.part.rows):
        values = _columns(stored.values(start, stop), output.part)
        first = start - output.part.rows[0]
        try:
            quantised, scales = quantise_blocks(values, use_ue8m0=use_ue8m0)
        except RorqualError as problem:
            raise CheckpointError(
                f"{output.tensor.name} has values that are not finite, which FP8 cannot hold",
                where=source.path,
                found=problem.found,
                fix="convert to bf16 to look at it, or go back to a checkpoint before the fault",
            ) from None
        put(output.name, first, quantised)
        put(scale.name, first // BLOCK, scales)


def _columns(rows: Tensor, part: Part) -> Tensor:
    if part.columns is None:
        return rows
    first, last = part.columns
    if rows.dtype.itemsize == 1:  # torch does not copy float8 in every version
        return rows.view(torch.uint8)[:, first:last].contiguous().view(rows.dtype)
    return rows[:, first:last].contiguous()


def _are_powers(stored: StoredRows) -> bool:
    assert stored.scale is not None, f"{E4M3} comes with scales"
    return bool((torch.frexp(stored.scale).mantissa == 0.5).all())
