"""A GGUF model as one thing, in one file or in parts `NAME-00001-of-00003.gguf`.

Any architecture can be opened and listed here; what its tensors mean, `reader.py` knows.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, listing
from rorqual.files import BINARY, read_at
from rorqual.ops.quantise import decode_blocks
from rorqual.weights.gguf.format import Header, TensorInfo, Value, is_gguf, read_header, single

SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
ARCHITECTURE = "general.architecture"


@dataclass
class GgufFile:
    """Keys of the first file and tensors of all; values are read by their offset, by any thread."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    files: list[Path]
    _opened: dict[Path, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def architecture(self) -> str:
        name = self.metadata.get(ARCHITECTURE)
        return name if isinstance(name, str) else "unknown"

    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read_raw(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, its leading dimensions flattened: uint8 (rows, bytes)."""
        info = self.tensors[name]
        assert 0 <= start <= stop <= info.num_rows, f"{name} has no rows {start} to {stop}"
        raw = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8)
        buffer = raw.view(-1).numpy().data
        done, offset = 0, info.offset + start * info.row_bytes
        descriptor = self._open(info.file)
        while done < len(buffer):
            num = read_at(descriptor, buffer[done:], offset + done)
            if num == 0:
                raise CheckpointError(
                    f"tensor {name} cannot be read",
                    where=info.file,
                    found=f"the file ends at byte {offset + done:,}",
                    fix="copy the file again; it has become shorter since it was opened",
                )
            done += num
        return raw

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `read_raw`, decoded to float32 (rows, columns)."""
        return decode_blocks(self.read_raw(name, start, stop), self.tensors[name].kind.name)

    def read(self, name: str) -> Tensor:
        """A whole tensor in its shape, float32."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.num_rows).view(info.shape)

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(file, os.O_RDONLY | BINARY)
            return self._opened[file]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._opened.values():
                os.close(descriptor)
            self._opened.clear()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a file, any part of a split one, or a folder that holds just one model.

    CheckpointError for what is no GGUF file, contradicts itself, or lacks a part.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_model_of(path)
    header = read_header(path)
    count = header.metadata.get(SPLIT_COUNT, 1)
    if type(count) is not int or count <= 1:
        return GgufFile(path, header.metadata, header.tensors, [path])
    headers = _read_parts(path, header, count)
    tensors: dict[str, TensorInfo] = {}
    for part in headers:
        for name in part.tensors.keys() & tensors.keys():
            raise _mismatch(part.path, f"the tensor {name} of {tensors[name].file.name} again")
        tensors |= part.tensors
    expected = single(headers[0].metadata, SPLIT_TENSORS, len(tensors))
    if expected != len(tensors):
        raise _mismatch(path, f"{len(tensors)} tensors in all parts", f"{expected} tensors")
    first = headers[0]
    return GgufFile(first.path, first.metadata, tensors, [part.path for part in headers])


def gguf_files(folder: Path) -> list[Path]:
    """The first files of the GGUF models in a folder, by content."""
    found = []
    for file in sorted(folder.glob("*.gguf")):
        name = SPLIT_NAME.fullmatch(file.name)
        if (name is None or int(name["number"]) == 1) and file.is_file() and is_gguf(file):
            found.append(file)
    return found


def _only_model_of(folder: Path) -> Path:
    models = gguf_files(folder)
    if len(models) != 1:
        raise CheckpointError(
            "no GGUF file here" if not models else "holds several GGUF models",
            where=folder,
            found=listing([model.name for model in models]) or None,
            expected="one model, in one file or in its numbered parts",
            fix="name the file",
        )
    return models[0]


def _read_parts(path: Path, header: Header, count: int) -> list[Header]:
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise _mismatch(
            path, f"{SPLIT_COUNT} {count}", f"a name like MODEL-00001-of-{count:05}.gguf"
        )
    headers = []
    for number in range(1, count + 1):
        file = path.with_name(f"{name['prefix']}-{number:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise _mismatch(file, "no such file", f"all {count} parts beside each other")
        part = header if file == path else read_header(file)
        found = single(part.metadata, SPLIT_NO), single(part.metadata, SPLIT_COUNT)
        if found != (number - 1, count):
            raise _mismatch(file, f"part {found[0]} of {found[1]}", f"{number - 1} of {count}")
        headers.append(part)
    return headers


def _mismatch(path: Path, found: object, expected: object = None) -> CheckpointError:
    return CheckpointError(
        "the parts of a split GGUF model do not belong together",
        where=path,
        found=found,
        expected=expected,
        fix="copy all parts again from their source, and do not rename them",
    )
