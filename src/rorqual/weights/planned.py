"""What a file will hold, tensor by tensor: for a conversion, a GGUF file, a count of bytes.

Each container has its own header and order; it lays planned tensors out as a `Layout`.
"""

# H heads, N width of a head without rotary part, V of its value, R latent

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.weights.fp8 import BLOCK_PAIR, E4M3, E8M0, FORMATS, Format, dtype_in
from rorqual.weights.names import StoredTensor, written_tensors

Role = Literal["whole", "stack", "k_b", "v_b", "scale"]


@dataclass(frozen=True)
class Region:
    """Ranges of rows and columns of a tensor (None: all columns, or no such)."""

    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written; `shape` is torch's, outermost first, `dtype` its container's name.

    role says what its `sources`, checkpoint tensors, are to it. "whole": it is the one source, or a
    region of it. "stack": it has a source an expert. "k_b" (H, R, N) and "v_b" (H, V, R): halves of
    the one source, kv_b_proj (H * (N + V), R). "scale": it has the FP8 scales of the one source,
    which is before it in the file's plan, or a region of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...] = ()
    role: Role = "whole"
    region: Region | None = None

    @property
    def source(self) -> StoredTensor:
        """The one source."""
        (source,) = self.sources
        return source

    @property
    def rows(self) -> tuple[int, int]:
        """Of the one source, or of its scales."""
        return (0, self.shape[0]) if self.region is None else self.region.rows

    @property
    def num_bytes(self) -> int:
        if self.dtype in (E4M3, E8M0):
            return math.prod(self.shape)
        if not self.shape:
            return QUANT_TYPES[self.dtype].num_bytes(1)
        return math.prod(self.shape[:-1]) * QUANT_TYPES[self.dtype].num_bytes(self.shape[-1])


@dataclass(frozen=True)
class Layout:
    """A file before its data: its header, where each tensor begins in it, the whole file's size."""

    header: bytes
    offsets: Mapping[str, int]
    num_bytes: int


def planned_tensors(
    config: ModelConfig, format: Format, *, repeat_mtp_embedding: bool = True
) -> list[PlannedTensor]:
    """A checkpoint that we write in safetensors, FP8 scales included; see `written_tensors`."""
    if format not in FORMATS:
        raise UsageError(f"no such format {format!r}", expected=", ".join(FORMATS))
    planned = []
    for tensor in written_tensors(config, repeat_mtp_embedding=repeat_mtp_embedding):
        dtype = dtype_in(format, tensor.kind)
        planned.append(PlannedTensor(tensor.name, dtype, tensor.shape, (tensor,)))
        if dtype == E4M3:
            planned.append(planned_scale(tensor))
    return planned


def planned_scale(
    tensor: StoredTensor, dtype: str = "F32", block: tuple[int, int] = BLOCK_PAIR
) -> PlannedTensor:
    """The scales of a whole tensor in FP8."""
    shape = tensor.scale_shape(block)
    return PlannedTensor(tensor.scale_name, dtype, shape, (tensor,), "scale")


def cut_files(tensors: Sequence[PlannedTensor], max_file_bytes: float) -> list[list[PlannedTensor]]:
    """Lists of at most `max_file_bytes`, in order; a scale stays with its weight.

    A tensor larger than the limit is a file by itself.
    """
    files: list[list[PlannedTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        size = tensor.num_bytes
        if files[-1] and tensor.role != "scale" and num_bytes + size > max_file_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(tensor)
        num_bytes += size
    return files
