"""Writes the GGUF container: the header with every offset first, then the tensors one by one.

A file grows under a hidden name beside its own, takes its name when it is whole, and can be
continued after a crash: a journal says how many tensors had reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rorqual.files import fsync_path, write_json
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.weights.gguf.format import (
    ALIGNMENT_KEY,
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    NUMBERS,
    STRING,
    VERSION,
    Value,
)
from rorqual.weights.planned import Layout, PlannedTensor
from rorqual.weights.safetensors_file import WRITE_BYTES

_UINT16, _UINT32, _INT32, _FLOAT32, _UINT64, _INT64 = 2, 4, 5, 6, 10, 11
JOURNAL_BYTES = 1 << 28  # what at most is written again after a crash


@dataclass(frozen=True)
class Short:
    """A value that is stored as uint16, as the keys of split files are."""

    value: int


def header_of(
    metadata: Mapping[str, Value | Short],
    tensors: Sequence[PlannedTensor],
    alignment: int = DEFAULT_ALIGNMENT,
) -> Layout:
    """A file of these keys and tensors; the header is padded to where the data begins.

    Python's int becomes uint32 (or int32, uint64 where it must), float becomes float32.
    """
    keys = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT:
        keys[ALIGNMENT_KEY] = alignment
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += [_text(key), _typed(value, key)]
    end, starts = 0, {}
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        parts += [_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", QUANT_TYPES[tensor.dtype].type_id, end))
        starts[tensor.name] = end
        end += -(-tensor.num_bytes // alignment) * alignment
    header = b"".join(parts)
    header += b"\0" * (-len(header) % alignment)
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Layout(header, offsets, len(header) + end)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any, key: str) -> bytes:
    if isinstance(value, Short):
        return struct.pack("<IH", _UINT16, value.value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        kind = _UINT32 if 0 <= value < 1 << 32 else _UINT64 if value >= 0 else _INT32
        if kind == _INT32 and value < -(1 << 31):
            kind = _INT64
        return struct.pack("<I", kind) + np.array([value], NUMBERS[kind]).tobytes()
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, np.ndarray):
        kind = next(k for k, name in NUMBERS.items() if np.dtype(name) == value.dtype)
        return struct.pack("<IIQ", ARRAY, kind, value.size) + value.tobytes()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        texts = b"".join(_text(item) for item in value)
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    raise TypeError(f"{key}: GGUF has no type for {type(value).__name__}")


class GgufWriter:
    """Writes a file's tensors in the planned order; `remaining` are those still to come.

        with GgufWriter(path, metadata, tensors) as writer:
            for tensor in writer.remaining:
                writer.write(tensor, pieces)

    Leaving the block with every tensor written gives the file its name, or with `is_hidden` leaves
    that to `publish` and `forget`. With a `fingerprint` an interrupted file is kept and continued
    by the next writer of the same header and fingerprint, which should change whenever the source's
    values may have; without one it is removed. OSError where the disk takes no more.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value | Short],
        tensors: Sequence[PlannedTensor],
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        fingerprint: str | None = None,
        is_hidden: bool = False,
    ) -> None:
        self.path = path
        self.is_hidden = is_hidden
        self.tensors = list(tensors)
        self.layout = header_of(metadata, tensors, alignment)
        self.alignment = alignment
        self.partial = path.with_name(f".{path.name}.partial")
        self.journal = path.with_name(f".{path.name}.partial.json")
        identity = hashlib.sha256(self.layout.header + (fingerprint or "").encode()).hexdigest()
        self.identity = None if fingerprint is None else identity
        self.num_done = 0
        self._num_unsynced = 0

    def __enter__(self) -> GgufWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.num_done = self._num_done_before()
        # Without a buffer: nothing is left to be written after an error.
        self._file = open(self.partial, "r+b" if self.num_done else "wb", buffering=0)
        try:
            if self.num_done == 0:
                self._write(self.layout.header)
            self._file.truncate(self._end_of(self.num_done))
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            self.partial.unlink(missing_ok=True)
            raise
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        is_whole = kind is None and not self.remaining
        try:
            if is_whole:
                self.sync()
            elif self.identity is not None:
                with suppress(OSError):  # on a full disk the journal stays as it was
                    self.sync()
        finally:
            self._file.close()
        if is_whole and not self.is_hidden:
            self.publish()
            self.forget()
        if not is_whole and self.identity is None:
            self.partial.unlink(missing_ok=True)
        assert is_whole or kind is not None, f"{len(self.remaining)} tensors were not written"

    def publish(self) -> None:
        """The whole file takes its name."""
        os.replace(self.partial, self.path)
        fsync_path(self.path.parent)

    def forget(self) -> None:
        """Removes the journal: the last trace of the work."""
        self.journal.unlink(missing_ok=True)

    @property
    def is_published(self) -> bool:
        """This very file took its name, and the work ended before `forget`."""
        is_there = self.path.exists() and not self.partial.exists()
        return is_there and self._noted() == len(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return self.layout.num_bytes

    @property
    def num_bytes_left(self) -> int:
        """What is still to be written, a file that can be continued considered."""
        if self._num_done_before() == 0:
            return self.num_bytes
        return self.num_bytes - min(self.num_bytes, self.partial.stat().st_size)

    @property
    def remaining(self) -> list[PlannedTensor]:
        return self.tensors[self.num_done :]

    def write(self, tensor: PlannedTensor, pieces: Iterable[Tensor]) -> None:
        """Appends the next tensor from uint8 pieces that together are just its bytes."""
        assert tensor == self.tensors[self.num_done], f"{tensor.name} is not the next tensor"
        num_bytes = 0
        for piece in pieces:
            data = piece.reshape(-1).numpy()
            num_bytes += data.nbytes
            assert num_bytes <= tensor.num_bytes, f"{tensor.name} has more bytes than planned"
            self._write(data.data)
        assert num_bytes == tensor.num_bytes, f"{tensor.name} has fewer bytes than planned"
        self._write(b"\0" * (-num_bytes % self.alignment))
        self.num_done += 1
        self._num_unsynced += num_bytes
        if self.identity is not None and self._num_unsynced >= JOURNAL_BYTES:
            self.sync()

    def sync(self) -> None:
        """Brings what is written to the disk and notes it in the journal, if there is one."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self.identity is not None:
            write_json(self.journal, {"identity": self.identity, "num_done": self.num_done})
        self._num_unsynced = 0

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest[:WRITE_BYTES]) or 0 :]

    def _end_of(self, num_done: int) -> int:
        if num_done == len(self.tensors):
            return self.layout.num_bytes
        return self.layout.offsets[self.tensors[num_done].name]

    def _num_done_before(self) -> int:
        """Tensors that the journal of an interrupted writer of the same file vouches for."""
        num_done = self._noted()
        try:
            size = self.partial.stat().st_size
        except OSError:
            return 0
        is_possible = 0 < num_done <= len(self.tensors) and size >= self._end_of(num_done)
        return num_done if is_possible else 0

    def _noted(self) -> int:
        """What the journal says, if it is this file's."""
        if self.identity is None:
            return 0
        try:
            note = json.loads(self.journal.read_text(encoding="utf-8"))
            return int(note["num_done"]) if note["identity"] == self.identity else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
