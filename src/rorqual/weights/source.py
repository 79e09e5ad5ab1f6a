"""What every kind of checkpoint looks like to its readers: tensors under Hugging Face's names.

A Hugging Face folder, the demo's rank shards and a GGUF file differ in names, in how a tensor is
cut, and in how values are coded; the audit, the model loader and the converter see none of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from rorqual.model import ModelConfig
from rorqual.weights.fp8 import BLOCK_PAIR


@dataclass(frozen=True)
class Entry:
    """A tensor as a header gives it. `dtype` is safetensors' name for it, such as "BF16"."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Quantisation:
    """What `quantization_config` says: the block of a scale, and whether scales are ue8m0."""

    block: tuple[int, int] = BLOCK_PAIR
    is_ue8m0: bool = False


class StoredBytes(NamedTuple):
    """Rows in the bytes of a file, (R, B) uint8; `kind` is F8_E4M3 or a type of GGUF. FP8 has
    float32 scales, one for a block of rows and columns.
    """

    kind: str
    codes_RB: Tensor
    scales_XY: Tensor | None = None
    block: tuple[int, int] = BLOCK_PAIR


class TensorSource(Protocol):
    """An opened checkpoint. `entries` maps Hugging Face names to what `read` gives.

    `faults` are collected while opening, so that the audit lists them with what it finds itself;
    `has_unreadable` says that some file is out of sight, so that tensors may only seem missing.
    `table` is Hugging Face's config.json as it stands, empty where there is none. `is_verbatim`:
    the entries' dtypes are the stored ones, not what a reader decodes them to.
    """

    path: Path
    config: ModelConfig
    quantisation: Quantisation | None
    entries: dict[str, Entry]
    faults: list[str]
    has_unreadable: bool
    table: dict[str, Any]
    is_huggingface: bool
    is_verbatim: bool

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension in memory of their own; any thread may."""
        ...

    def num_bytes(self) -> int:
        """Bytes of the tensors in the files."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(self, *exception: object) -> None: ...


def block_of(source: TensorSource) -> tuple[int, int]:
    """What one FP8 scale stands for, rows and columns."""
    return BLOCK_PAIR if source.quantisation is None else source.quantisation.block
