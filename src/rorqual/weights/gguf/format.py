"""The GGUF container: what its header says, checked before anything is believed.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian: `GGUF`, version u32, tensors u64,
keys u64; each key a string, a type u32 and a value; each tensor a name, u32 dimensions (the
innermost first), a type u32 and an offset u64 from the data, which begins at the next multiple of
`general.alignment`. A string is a u64 length and UTF-8.

A file may come from anywhere, so every size is held against what the file can hold before it is
used, and counts have limits (`MAX_*`) that keep parsing within a second: sizes that overflow,
offsets outside the file, tensors that overlap, repeated or path-like names are one CheckpointError.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.errors import CheckpointError
from rorqual.files import mend_of, stand_in
from rorqual.ops.quant_types import TYPE_OF_ID, QuantType

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

MAX_KEYS = 1 << 16
MAX_TENSORS = 200_000  # DeepSeek-V3 has 1,100; with every expert by itself 46,000
MAX_STRINGS = 2_000_000  # in arrays, over the whole file; DeepSeek-V3 has 256,000
MAX_ARRAY = 1 << 24
MAX_STRING_BYTES = 1 << 26  # over the whole file
MAX_NAME_BYTES = 255
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
_INT64 = 1 << 63

STRING, ARRAY, BOOL = 8, 9, 7
# type id -> numpy's name; scalars and the elements of arrays
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"} | {
    BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_SAFE_NAME = re.compile(r"[!-.0-\[\]-~]+")  # printable ASCII without space, / and \

Value = Any  # str, bool, int, float, list[str], or a numpy array of numbers


def single(metadata: Mapping[str, Value], key: str, default: Value = None) -> Value:
    """A key's value; None for an array, since a file may have one under any key and arrays do not
    compare as single values do.
    """
    value = metadata.get(key, default)
    return None if isinstance(value, list | np.ndarray) else value


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file. `shape` is torch's, outermost first; `offset` counts from the file's
    beginning.
    """

    name: str
    kind: QuantType
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    @property
    def num_rows(self) -> int:
        return self.num_values // self.shape[-1]

    @property
    def num_values(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def row_bytes(self) -> int:
        return self.kind.num_bytes(self.num_columns)


@dataclass(frozen=True)
class Header:
    """One file's keys and tensors. `num_bytes` is where its header ends, before the padding."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    num_bytes: int


def is_gguf(path: Path) -> bool:
    """By content: a file that begins with `GGUF`."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Keys and tensors of one file; CheckpointError names what cannot be true of it."""
    if (found := stand_in(path)) is not None:
        raise CheckpointError(found.what, where=path, fix=found.fix)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise _broken(path, f"a file of {size} bytes, less than the shortest header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data, path).parse()
    except FileNotFoundError:
        raise CheckpointError("no such file", where=path, fix="check the path") from None
    except OSError as problem:
        fix = mend_of(problem, path)
        raise CheckpointError(f"cannot be read: {problem}", where=path, fix=fix) from None


def _broken(path: Path, found: object, expected: object = None) -> CheckpointError:
    return CheckpointError(
        "is not a whole GGUF file",
        where=path,
        found=found,
        expected=expected,
        fix="download or copy the file again from its source",
    )


class _Parser:
    """Walks through the header once, from front to back."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.position = 0
        self.num_strings = 0
        self.num_string_bytes = 0

    def parse(self) -> Header:
        if self.take(4) != MAGIC:
            raise _broken(self.path, repr(bytes(self.data[:4])), f"{MAGIC!r} at its beginning")
        version = self.number("<u4")
        if version not in READABLE_VERSIONS:
            raise self.other_version(version)
        num_tensors, num_keys = self.number("<u8"), self.number("<u8")
        self.check_count(num_keys, 13, MAX_KEYS, "keys")
        self.check_count(num_tensors, 32, MAX_TENSORS, "tensors")
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self.name("key")
            if key in metadata:
                raise _broken(self.path, f"the key {key} twice")
            metadata[key] = self.value(self.number("<u4"), key)
        alignment = self.alignment(metadata)
        tensors = [self.tensor() for _ in range(num_tensors)]
        end = self.position
        placed = self.place(tensors, -(-end // alignment) * alignment, alignment)
        return Header(self.path, version, metadata, placed, alignment, end)

    def other_version(self, version: int) -> CheckpointError:
        found, fix = f"version {version}", "convert the model again with a current converter"
        if version & 0xFFFF == 0:
            found = f"version {version >> 24} in big-endian order"
            fix = "convert the model again for little-endian machines"
        return CheckpointError(
            "is a GGUF file of a version that is not supported",
            where=self.path,
            found=found,
            expected=f"version {' or '.join(map(str, READABLE_VERSIONS))}, little-endian",
            fix=fix,
        )

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            raise _broken(
                self.path,
                f"{num_bytes:,} bytes wanted at byte {self.position:,} of {self.size:,}",
                "a header that ends inside the file",
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def check_count(self, count: int, least_bytes: int, limit: int, what: str) -> None:
        if count > limit or count * least_bytes > self.size - self.position:
            raise _broken(
                self.path,
                f"{count:,} {what} in a file of {self.size:,} bytes",
                f"at most {limit:,}, and no more than fit into the file",
            )

    def text(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = int.from_bytes(self.take(8), "little")
        if length > limit:
            raise _broken(self.path, f"a {what} of {length:,} bytes", f"at most {limit:,}")
        self.num_string_bytes += length
        if self.num_string_bytes > MAX_STRING_BYTES:
            raise _broken(self.path, "too much text", f"at most {MAX_STRING_BYTES:,} bytes")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _broken(self.path, f"a {what} that is no UTF-8: {raw[:40]!r}") from None

    def texts(self, count: int, key: str) -> list[str]:
        """As `count` calls of `text`, without their cost: vocabularies have 100,000 of them."""
        data, size, position = self.data, self.size, self.position
        first, found = position, []
        for _ in range(count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            if position > size:
                raise _broken(self.path, f"a string of {key} ends at byte {position:,}")
            found.append(data[start:position])
        self.position = position
        self.num_string_bytes += position - first
        if self.num_string_bytes > MAX_STRING_BYTES:
            raise _broken(self.path, "too much text", f"at most {MAX_STRING_BYTES:,} bytes")
        try:
            return [raw.decode("utf-8") for raw in found]
        except UnicodeDecodeError:
            raise _broken(self.path, f"a string of {key} that is no UTF-8") from None

    def name(self, what: str) -> str:
        name = self.text(f"{what}'s name", MAX_NAME_BYTES)
        if not _SAFE_NAME.fullmatch(name) or name.startswith(".") or ".." in name:
            raise _broken(
                self.path,
                f"the {what} {name[:80]!r}",
                "names of printable ASCII that cannot be taken for a path",
            )
        return name

    def value(self, type_id: int, key: str) -> Value:
        if type_id == STRING:
            return self.text(f"value of {key}")
        if type_id == ARRAY:
            return self.array(key)
        if type_id not in NUMBERS:
            raise _broken(self.path, f"{key} of type {type_id}", "one of GGUF's 13 types")
        if type_id == BOOL:
            byte = self.take(1)[0]
            if byte > 1:
                raise _broken(self.path, f"{key} is a truth value of {byte}", "0 or 1")
            return byte == 1
        return self.number(NUMBERS[type_id])

    def array(self, key: str) -> Value:
        type_id, count = self.number("<u4"), self.number("<u8")
        if type_id == STRING:
            self.check_count(count, 8, MAX_STRINGS - self.num_strings, f"strings in {key}")
            self.num_strings += count
            return self.texts(count, key)
        if type_id not in NUMBERS:
            raise _broken(self.path, f"{key} is an array of type {type_id}", "numbers or strings")
        dtype = np.dtype("u1" if type_id == BOOL else NUMBERS[type_id])
        self.check_count(count, dtype.itemsize, MAX_ARRAY, f"numbers in {key}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        is_number = type(alignment) is int and 8 <= alignment <= MAX_ALIGNMENT
        if not is_number or alignment & (alignment - 1):
            raise _broken(
                self.path,
                f"{ALIGNMENT_KEY} {str(alignment)[:40]}",
                f"a power of two from 8 to {MAX_ALIGNMENT}",
            )
        return alignment

    def tensor(self) -> TensorInfo:
        """A tensor with its offset still counted from the data."""
        name = self.name("tensor")
        num_dimensions = self.number("<u4")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise _broken(self.path, f"{name} of {num_dimensions} dimensions", "1 to 4")
        sizes = struct.unpack(f"<{num_dimensions}Q", self.take(8 * num_dimensions))
        type_id, offset = self.number("<u4"), self.number("<u8")
        if type_id not in TYPE_OF_ID:
            raise CheckpointError(
                f"type not supported: tensor {name} has type number {type_id}",
                where=self.path,
                expected="a type that ggml had when this version of Rorqual was made",
                fix="take another quantisation of the model, or a newer Rorqual",
            )
        kind = TYPE_OF_ID[type_id]
        num_values = 1
        for size in sizes:
            num_values *= size
        if num_values == 0 or num_values * kind.block_bytes >= _INT64:
            raise _broken(self.path, f"{name} of shape {sizes}", "sizes that a file can hold")
        if not kind.fits(sizes[0]):
            raise _broken(
                self.path,
                f"{name} is {kind.name} with rows of {sizes[0]:,} values",
                f"a multiple of {kind.block_values}",
            )
        num_bytes = kind.num_bytes(num_values)
        return TensorInfo(name, kind, tuple(reversed(sizes)), self.path, offset, num_bytes)

    def place(self, tensors: list[TensorInfo], first: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name with offsets from the file's beginning, none outside, none twice."""
        placed: dict[str, TensorInfo] = {}
        end = 0
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset % alignment:
                raise _broken(
                    self.path,
                    f"{tensor.name} at offset {tensor.offset:,}",
                    f"a multiple of {alignment}",
                )
            if tensor.offset < end:
                raise _broken(self.path, f"{tensor.name} overlaps the tensor before it")
            end = tensor.offset + tensor.num_bytes
            if first + end > self.size:
                raise _broken(
                    self.path,
                    f"{tensor.name} ends at byte {first + end:,} of a file of {self.size:,}",
                    "tensors inside the file",
                )
        for tensor in tensors:
            if tensor.name in placed:
                raise _broken(self.path, f"the tensor {tensor.name} twice")
            placed[tensor.name] = TensorInfo(
                tensor.name,
                tensor.kind,
                tensor.shape,
                tensor.file,
                first + tensor.offset,
                tensor.num_bytes,
            )
        return placed
