"""The values of a stored tensor, FP8 dequantised: whole, or by rows in bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.ops.block_fp8 import dequantise_blocks, dequantise_into, num_blocks
from rorqual.weights.folder import RESTORE
from rorqual.weights.fp8 import BLOCK_PAIR, E4M3
from rorqual.weights.names import StoredTensor
from rorqual.weights.source import TensorSource, block_of

CHUNK_ELEMENTS = 2_000_000  # read, converted and written at once: a few megabytes a worker


def read_values(
    source: TensorSource, tensor: StoredTensor, device: torch.device | None = None
) -> Tensor:
    """A tensor as stored, or dequantised to float32 if it is FP8; in memory of its own."""
    values = _read(source, tensor.name)
    if values.dtype != torch.float8_e4m3fn:
        return values
    scale = read_scale(source, tensor)
    assert source.quantisation is not None, "the audit lets no FP8 pass without its configuration"
    if device is None or device.type == "cpu":
        return dequantise_into(torch.empty(values.shape), values, scale, source.quantisation.block)
    block = source.quantisation.block
    return dequantise_blocks(values.to(device), scale.to(device), block=block)


def read_scale(source: TensorSource, tensor: StoredTensor) -> Tensor:
    """The float32 scales of an FP8 tensor; CheckpointError if any is negative or not finite."""
    scale = _read(source, tensor.scale_name).float()
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise CheckpointError(
            f"{tensor.scale_name} has scales that are negative or not finite",
            where=source.path / source.entries[tensor.scale_name].file,
            fix=RESTORE,
        )
    return scale


def _read(source: TensorSource, name: str) -> Tensor:
    """Not by a map of the file, whose pages would count beside what is made of them."""
    return source.read_rows(name, 0, source.entries[name].shape[0])


class StoredRows:
    """Rows of one tensor: as stored, or as floating-point values. Any thread may have its own."""

    def __init__(self, source: TensorSource, tensor: StoredTensor) -> None:
        self.source, self.tensor = source, tensor
        self.entry = source.entries[tensor.name]
        self.is_fp8 = self.entry.dtype == E4M3
        self.scale = read_scale(source, tensor) if self.is_fp8 else None
        self._block = block_of(source)

    def chunks(self, rows: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Ranges of rows that fit into a chunk, cut between blocks of an FP8 scale."""
        first, last = rows or (0, self.entry.shape[0])
        block = math.lcm(self._block[0], BLOCK_PAIR[0]) if len(self.entry.shape) > 1 else 1
        width = math.prod(self.entry.shape[1:])
        step = block * max(1, CHUNK_ELEMENTS // (width * block))
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def raw(self, start: int, stop: int) -> Tensor:
        return self.source.read_rows(self.tensor.name, start, stop)

    def values(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [start, stop) in `dtype`."""
        if self.scale is None:
            return self.raw(start, stop).to(dtype)
        height = self._block[0]
        first = start - start % height
        stored = self.raw(first, stop)
        scale = self.scale[first // height : num_blocks(stop, height)]
        out = torch.empty(stored.shape, dtype=dtype)
        return dequantise_into(out, stored, scale, self._block)[start - first :]
