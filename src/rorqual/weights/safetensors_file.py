"""safetensors by the byte: places of tensors, rows read at their offset, files written in pieces.

The library maps a whole file, so that every page it touches counts as ours, and writes a file from
tensors that are all in memory; a conversion in bounded memory needs neither. Format: 8 bytes of
little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data. The
order of the data is the library's (wide types first, then by name), so that what we write piece by
piece is the file that it would have written.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual import files
from rorqual.errors import CheckpointError
from rorqual.runs import mend_of_checkpoint
from rorqual.weights.fp8 import E4M3, E8M0
from rorqual.weights.planned import Layout, PlannedTensor

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    E4M3: torch.float8_e4m3fn,
    E8M0: torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = ("F32", "BF16", "F16", E8M0, E4M3)  # the library's order of the data
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4} | {
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "F8_E5M2": 1,
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
# What is handed to the system at once. Linux 6.18 makes larger folios of larger pieces; a virtual
# machine waits for its host to provide them: writing 2 GB took 8 s by 4 MB and 0.6 s by 256 kB.
WRITE_BYTES = 1 << 18
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file; `offset` counts from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def lay_out(tensors: Iterable[PlannedTensor]) -> Layout:
    """A file of these tensors, with the metadata `format: pt`."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor in sorted(tensors, key=lambda t: (_ORDER.index(t.dtype), t.name.encode())):
        start, end = end, end + tensor.num_bytes
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        starts[tensor.name], table[tensor.name] = start, entry
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = _LENGTH.size + len(text)
    offsets = {name: first + start for name, start in starts.items()}
    return Layout(_LENGTH.pack(len(text)) + text, offsets, first + end)


def looks_like_safetensors(path: Path) -> bool:
    """By content: a header length that fits into the file, and the `{` of a JSON object."""
    with path.open("rb") as file:
        start = file.read(_LENGTH.size + 1)
    if len(start) <= _LENGTH.size or start[-1:] != b"{":
        return False
    (length,) = _LENGTH.unpack(start[:-1])
    return 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - _LENGTH.size)


def read_places(path: Path) -> dict[str, Place]:
    """The header of a file; CheckpointError where sizes, types or offsets contradict each other."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else num_bytes
        if length > min(MAX_HEADER_BYTES, num_bytes - _LENGTH.size):
            raise _broken(path, f"a header of {length:,} bytes in a file of {num_bytes:,}")
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_without_repeats)
        table.pop("__metadata__", None)
        first = _LENGTH.size + length
        places = {name: _place(entry, first, num_bytes) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise _broken(path, f"{type(problem).__name__}: {problem}"[:200]) from None
    return places


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name come twice; two readers may then see two different files."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name comes twice in the header")
    return table


def _place(entry: Any, first: int, num_bytes: int) -> Place:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"sizes {numbers[:10]}")
    if dtype not in _ITEM_BYTES or end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{dtype} {shape[:10]} in {end - start} bytes")
    if first + end > num_bytes:
        raise ValueError(f"data up to byte {first + end:,} of a file of {num_bytes:,}")
    return Place(dtype, tuple(shape), first + start, end - start)


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "is not a whole safetensors file",
        where=path,
        found=found,
        fix=mend_of_checkpoint(
            path.parent, "download or copy the file again from the checkpoint's source"
        ),
    )


class RowFiles:
    """Reads rows of tensors by their offset; any thread may, and files open once."""

    def __init__(self) -> None:
        self._opened: dict[Path, tuple[int, dict[str, Place]]] = {}
        self._lock = threading.Lock()

    def places(self, path: Path) -> dict[str, Place]:
        return self._open(path)[1]

    def rows(self, path: Path, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, in memory of their own."""
        descriptor, places = self._open(path)
        place = places[name]
        dtype = DTYPES[place.dtype]
        tensor = torch.empty((stop - start, *place.shape[1:]), dtype=dtype)
        row_bytes = math.prod(place.shape[1:]) * dtype.itemsize
        read_into(descriptor, as_bytes(tensor), place.offset + start * row_bytes, path)
        return tensor

    def _open(self, path: Path) -> tuple[int, dict[str, Place]]:
        with self._lock:
            if path not in self._opened:
                places = read_places(path)
                self._opened[path] = (os.open(path, os.O_RDONLY | files.BINARY), places)
            return self._opened[path]

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._opened.values():
                os.close(descriptor)
            self._opened.clear()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous(), "only contiguous memory can be read or written in one go"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills the buffer from `offset` on; CheckpointError if the file ends before."""
    done = 0
    while done < len(buffer):
        num = files.read_at(descriptor, buffer[done:], offset + done)
        if num == 0:
            raise _broken(path, f"the file ends at byte {offset + done:,}")
        done += num


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of the data at `offset`."""
    done = 0
    while done < len(data):
        done += files.write_at(descriptor, data[done : done + WRITE_BYTES], offset + done)
