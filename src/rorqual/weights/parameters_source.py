"""Tensors that lie under our parameters' names, whole or cut in boxes: what a run of several ranks
saves, and the average of the parameters (EMA) that a run keeps.

Files are safetensors. Where a tensor is cut, the header says where its box begins: the metadata
`DCP_SHARDING_INFO` is a JSON object name -> {"saved_offsets": [...]}, as
torch.distributed.checkpoint's HuggingFaceStorageWriter has it. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.files import read_json
from rorqual.model import ModelConfig
from rorqual.runs import TRAINER, mend_of_checkpoint
from rorqual.weights.folder import CONFIG, INDEX, SINGLE, config_of
from rorqual.weights.names import StoredTensor, written_tensors
from rorqual.weights.safetensors_file import DTYPES, RowFiles
from rorqual.weights.source import Entry, Quantisation

SHARDS = "shards"
EMA_FILE, EMA = "ema.safetensors", "ema."
OFFSETS, START = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Box:
    """A part of a parameter in a file: it begins at `start` and has this shape."""

    file: Path
    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


def is_cut(path: Path) -> bool:
    """Whether a folder is the checkpoint of several ranks, each of which wrote its share."""
    is_whole = (path / SINGLE).exists() or (path / INDEX).exists()
    return not is_whole and (path / TRAINER / SHARDS).is_dir()


def open_cut(path: Path) -> ParametersSource:
    """The weights in the shards of a checkpoint of several ranks."""
    return ParametersSource(path, shards_of(path))


def open_ema(path: Path) -> ParametersSource:
    """The average of the parameters in a checkpoint of a run; CheckpointError without one."""
    whole = path / TRAINER / EMA_FILE
    files = shards_of(path)
    if whole.is_file():
        files = [whole, *sorted(path.glob("*.safetensors"))]  # which have the router's bias
    source = ParametersSource(path, files, EMA)
    if not any(name.startswith(EMA) for name in source.boxes):
        raise CheckpointError(
            "has no average of its parameters",
            where=path,
            expected=f"the checkpoint of a run whose recipe has [ema] decay ({TRAINER}/{EMA_FILE})",
            fix="leave --ema out; or train on with --set ema.decay=0.999",
        )
    return source


def shards_of(path: Path) -> list[Path]:
    """The files in which the ranks wrote their shares."""
    return sorted((path / TRAINER / SHARDS).glob("*.safetensors"))


class ParametersSource:
    """A `TensorSource` under Hugging Face's names. Any thread may read.

    With the prefix of the average, what is not averaged (the router's bias) is the weights' own.
    """

    quantisation: Quantisation | None = None
    has_unreadable = False
    is_huggingface = True
    is_verbatim = True

    def __init__(self, path: Path, files: list[Path], prefix: str = "") -> None:
        self.path = path
        self.table: dict[str, Any] = read_json(path / CONFIG, CheckpointError)
        self.config: ModelConfig = config_of(self.table, path / CONFIG)
        self.faults: list[str] = []
        self.boxes = read_boxes(files)
        self.entries: dict[str, Entry] = {}
        self._tensors: dict[str, tuple[StoredTensor, str]] = {}
        self._files = RowFiles()
        for tensor in written_tensors(self.config):
            names = (f"{prefix}{tensor.parameter}", tensor.parameter)
            name = next((name for name in names if name in self.boxes), None)
            if name is not None:
                self._tensors[tensor.name] = (tensor, name)
                box = self.boxes[name][0]
                file = box.file.relative_to(path).as_posix()
                self.entries[tensor.name] = Entry(tensor.name, file, tensor.shape, box.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor, parameter = self._tensors[name]
        boxes = self.boxes[parameter]
        whole = whole_shape(boxes)
        region = _region(tensor, whole, start, stop)
        return read_region(self._files, boxes, region).reshape(stop - start, *tensor.shape[1:])

    def num_bytes(self) -> int:
        return sum(
            math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in self.entries.values()
        )

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> ParametersSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_boxes(files: list[Path]) -> dict[str, list[Box]]:
    """By name, from the headers; CheckpointError for a file that is none."""
    found: dict[str, list[Box]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                starts = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    start = tuple(starts[name][START]) if name in starts else (0,) * len(shape)
                    box = Box(file, name, start, shape, str(part.get_dtype()))
                    found.setdefault(name, []).append(box)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as problem:
            raise CheckpointError(
                f"cannot be read: {problem}",
                where=file,
                fix=mend_of_checkpoint(file.parent.parent.parent, "restore the file"),
            ) from None
    for name, boxes in found.items():
        _check_cover(name, boxes)
    return found


def whole_shape(boxes: list[Box]) -> tuple[int, ...]:
    """Of the tensor that they are parts of."""
    ends = ([at + n for at, n in zip(box.start, box.shape, strict=True)] for box in boxes)
    return tuple(map(max, zip(*ends, strict=True)))


def read_region(files: RowFiles, boxes: list[Box], region: tuple[slice, ...]) -> Tensor:
    """A region of the tensor, put together from its boxes."""
    values = torch.empty([s.stop - s.start for s in region], dtype=DTYPES[boxes[0].dtype])
    for box in boxes:
        shared = [
            slice(max(at, s.start), min(at + n, s.stop))
            for at, n, s in zip(box.start, box.shape, region, strict=True)
        ]
        if any(s.start >= s.stop for s in shared):
            continue
        inside, place = (
            [slice(s.start - at, s.stop - at) for s, at in zip(shared, starts, strict=True)]
            for starts in (box.start, [s.start for s in region])
        )
        rows = files.rows(box.file, box.name, inside[0].start, inside[0].stop)
        values[tuple(place)] = rows[(slice(None), *inside[1:])]
    return values


def _region(
    tensor: StoredTensor, whole: tuple[int, ...], start: int, stop: int
) -> tuple[slice, ...]:
    """Rows [start, stop) of a file's tensor as a region of the parameter."""
    region, is_first = [], True
    for axis, size in enumerate(whole):
        index = tensor.index[axis] if axis < len(tensor.index) else slice(0, size)
        if isinstance(index, int):
            region.append(slice(index, index + 1))
        elif is_first:
            region.append(slice(index.start + start, index.start + stop))
            is_first = False
        else:
            region.append(slice(index.start, index.stop))
    return tuple(region)


def _check_cover(name: str, boxes: list[Box]) -> None:
    whole = whole_shape(boxes)
    if sum(math.prod(box.shape) for box in boxes) != math.prod(whole):
        raise CheckpointError(
            f"{name} is not whole in the shards",
            where=boxes[0].file.parent,
            found=f"{len(boxes)} parts of {whole}",
            fix=mend_of_checkpoint(boxes[0].file.parent.parent.parent, "restore the files"),
        )
