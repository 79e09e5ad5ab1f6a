"""A file of a stored model's parts as they lie in memory, to be mapped at the next start.

Magic, version, checksum and length of a JSON header, the header, then each tensor at a multiple of
4,096 bytes. Header, size and the first and last page of each tensor are checked whenever the file
is opened; the checksums of whole tensors, which would cost as much as to read them, by `broken`.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from rorqual.model.stored import StoredStack
from rorqual.ops.native.arena import HUGE_PAGE
from rorqual.weights.safetensors_file import WRITE_BYTES, as_bytes
from rorqual.weights.stored_parts import Parts

MAGIC, VERSION = b"RQPACKED", 2
OTHER_VERSION = "another version of rorqual packed it"
ALIGNMENT = 4096
EDGE_BYTES = 4096
MAX_HEADER_BYTES = 1 << 28
_START = struct.Struct("<8sIIQ")  # magic, version, checksum and length of the header
_NO_SUM = "0" * 8
_BUFFERS = {"codes": "codes_EOB", "packed": "packed_EP", "scales": "scales_EXY"}


class UnfitError(Exception):
    """The file is not what is wanted; the text says why."""


@dataclass(frozen=True)
class _Piece:
    """A tensor of a part: of a stack one of `_BUFFERS`, or a "float"."""

    name: str
    role: str
    tensor: Tensor

    def table(self) -> dict[str, Any]:
        shape = list(self.tensor.shape)
        sums = {"sum": _NO_SUM, "edges": _NO_SUM}
        return {"name": self.name, "role": self.role, "shape": shape, "offset": 0, **sums}


class _Pages:
    """Writes whole huge pages of a file from its start. A system that keeps them so maps them so,
    and decoding is a tenth faster (docs/log.md).
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held, self._place = file, bytearray(), 0
        file.seek(0)

    def write(self, data: bytes | memoryview) -> None:
        self._held += data
        self._place += len(data)
        while len(self._held) >= HUGE_PAGE:
            self._file.write(self._held[:HUGE_PAGE])
            del self._held[:HUGE_PAGE]

    def skip_to(self, offset: int) -> None:
        assert offset >= self._place, "pieces follow each other"
        while self._place < offset:
            self.write(bytes(min(offset - self._place, HUGE_PAGE)))

    def flush(self) -> None:
        self._file.write(self._held)


def num_bytes_of(parts: Parts) -> int:
    """Of the tensors, without what aligns them."""
    return sum(piece.tensor.nbytes for piece in _pieces(parts))


def write_parts(
    file: IO[bytes], parts: Parts, about: dict[str, Any], advance: Callable[[int], None]
) -> None:
    """`about` goes into the header beside the tables. `advance` is called with bytes done since."""
    pieces = list(_pieces(parts))
    stacks = {
        name: {"kind": stack.kind, "shape": stack.shape, "block": stack.block}
        for name, stack in parts.stacks.items()
    }
    tensors = [piece.table() for piece in pieces]
    header = {**about, "stacks": stacks, "tensors": tensors, "num_bytes": f"{0:020}"}
    # Offsets and sums have a fixed width, so that the header's length is known before them.
    for entry in tensors:
        entry["offset"] = f"{0:020}"
    offset = _aligned(_START.size + len(_encoded(header)))
    for piece, entry in zip(pieces, tensors, strict=True):
        entry["offset"] = f"{offset:020}"
        end = offset + piece.tensor.nbytes
        offset = _aligned(end)
    header["num_bytes"] = f"{end:020}"
    pages = _Pages(file)
    for piece, entry in zip(pieces, tensors, strict=True):
        data = as_bytes(piece.tensor.contiguous())
        pages.skip_to(int(entry["offset"]))
        whole = 0
        for start in range(0, len(data), WRITE_BYTES):
            chunk = data[start : start + WRITE_BYTES]
            pages.write(chunk)
            whole = zlib.crc32(chunk, whole)
            advance(len(chunk))
        entry["sum"], entry["edges"] = f"{whole:08x}", _edges(data)
    pages.flush()
    text = _encoded(header)
    file.seek(0)
    file.write(_START.pack(MAGIC, VERSION, zlib.crc32(text), len(text)) + text)


def read_header(file: IO[bytes]) -> dict[str, Any]:
    """Of a file opened at its start; UnfitError for one that is not whole or of another version."""
    start = file.read(_START.size)
    if len(start) < _START.size:
        raise UnfitError("it is cut off")
    magic, version, checksum, length = _START.unpack(start)
    if magic != MAGIC:
        raise UnfitError("it is no file of packed weights")
    if version != VERSION:
        raise UnfitError(OTHER_VERSION)
    text = file.read(min(length, MAX_HEADER_BYTES))
    size = os.fstat(file.fileno()).st_size
    if len(text) != length or zlib.crc32(text) != checksum:
        raise UnfitError("its header is damaged")
    with unfit_where_odd():
        header: dict[str, Any] = json.loads(text)
        header["num_bytes"] = int(header["num_bytes"])
        _ = [header[key] for key in ("stacks", "tensors")]
    if size != header["num_bytes"]:
        raise UnfitError(f"it has {size:,} bytes instead of {header['num_bytes']:,}")
    return header


def read_parts(file: IO[bytes], header: dict[str, Any]) -> Parts:
    """Mapped, not read; UnfitError where a tensor's first or last page is damaged."""
    with unfit_where_odd():
        return _parts(_mapped(file), header)


@contextmanager
def unfit_where_odd() -> Iterator[None]:
    """A header with a right checksum may still be another program's, or anybody's."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as problem:
        raise UnfitError(f"its header is not as rorqual writes it: {problem}") from None


def _parts(mapped: mmap.mmap, header: dict[str, Any]) -> Parts:
    found: dict[tuple[str, str], Tensor] = {}
    for entry in header["tensors"]:
        tensor = _tensor(mapped, entry)
        if _edges(as_bytes(tensor)) != entry["edges"]:
            raise UnfitError(f"{entry['name']} is damaged")
        found[entry["name"], entry["role"]] = tensor
    parts = Parts()
    for name, about in header["stacks"].items():
        buffers = {b: found.get((name, role)) for role, b in _BUFFERS.items()}
        shape, block = tuple(about["shape"]), tuple(about["block"])
        parts.stacks[name] = StoredStack.holding(about["kind"], shape, block, buffers)
    for (name, role), tensor in found.items():
        if role == "float":
            parts.floats[name] = tensor.clone()  # few, and a map would be read-only
    return parts


def broken(file: IO[bytes], header: dict[str, Any], advance: Callable[[int], None]) -> list[str]:
    """Names of tensors whose bytes are not those that were written."""
    mapped = _mapped(file)
    damaged = []
    for entry in header["tensors"]:
        data, whole = as_bytes(_tensor(mapped, entry)), 0
        for start in range(0, len(data), WRITE_BYTES):
            chunk = data[start : start + WRITE_BYTES]
            whole = zlib.crc32(chunk, whole)
            advance(len(chunk))
        if f"{whole:08x}" != entry["sum"]:
            damaged.append(entry["name"])
    return list(dict.fromkeys(damaged))


def _pieces(parts: Parts) -> Iterator[_Piece]:
    for name, stack in parts.stacks.items():
        for role, buffer in _BUFFERS.items():
            tensor = getattr(stack, buffer)
            if tensor is not None and tensor.numel():
                yield _Piece(name, role, tensor)
    for name, values in parts.floats.items():
        yield _Piece(name, "float", values)


def _mapped(file: IO[bytes]) -> mmap.mmap:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _tensor(mapped: mmap.mmap, entry: dict[str, Any]) -> Tensor:
    dtype = torch.uint8 if entry["role"] in ("codes", "packed") else torch.float32
    shape = torch.Size(entry["shape"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        values = torch.frombuffer(
            mapped, dtype=dtype, offset=int(entry["offset"]), count=shape.numel()
        )
    return values.view(shape)


def _edges(data: memoryview) -> str:
    return f"{zlib.crc32(data[-EDGE_BYTES:], zlib.crc32(data[:EDGE_BYTES])):08x}"


def _encoded(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
