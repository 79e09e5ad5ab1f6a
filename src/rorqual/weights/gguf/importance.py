"""Importance matrices: for each column of a tensor the mean square of what it is multiplied with.

`llama-imatrix` measures them on text; the encoders weigh squared errors with them. Sources:
llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp. A file is GGUF since July 2025,
with the tensors `NAME.in_sum2` (matrices, columns) and `NAME.counts` (matrices, 1), and before that
a list of entries: name, number of calls, values multiplied by that number.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, UsageError, listing
from rorqual.weights.gguf.file import read_gguf
from rorqual.weights.gguf.format import is_gguf
from rorqual.weights.planned import PlannedTensor

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_ENTRIES = 1_000_000
MAX_NAME_BYTES = 1024


def read_importance(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Names of GGUF tensors to float32 weights, (matrices * columns,), for `fit_importance`.

    A matrix that no token reached, an expert that was never chosen, has ones. CheckpointError for
    a file of another kind, or with numbers that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such file", where=path, fix="check the path of --imatrix")
    found = _read_gguf(path) if is_gguf(path) else _read_entries(path)
    for name, weights in found.items():
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise _broken(path, f"{name} has weights that are negative or not finite")
    return found


def fit_importance(
    importance: Mapping[str, Tensor], tensors: Sequence[PlannedTensor], path: Path
) -> dict[str, Tensor]:
    """The weights of those tensors, (columns,) or (matrices, columns) as each has them.

    UsageError for weights of another size, or if the file knows none of the tensors.
    """
    fitted = {}
    for tensor in tensors:
        if tensor.name not in importance:
            continue
        weights = importance[tensor.name]
        shape = (*tensor.shape[:-2], tensor.shape[-1])
        if weights.numel() != torch.Size(shape).numel():
            raise _mismatch(tensor, weights.numel(), path)
        fitted[tensor.name] = weights.view(shape)
    if not fitted:
        raise UsageError(
            "the importance matrix knows none of this model's tensors",
            where=path,
            found=listing(sorted(importance)[:3]),
            expected=listing([tensor.name for tensor in tensors if len(tensor.shape) > 1][:3]),
            fix="measure it on this model, with llama.cpp's llama-imatrix",
        )
    return fitted


def check_importance(importance: Mapping[str, Tensor], tensors: Sequence[PlannedTensor]) -> None:
    """UsageError unless each is (columns,) or (matrices, columns) of the tensor of its name."""
    for tensor in tensors:
        weights = importance.get(tensor.name)
        if weights is None:
            continue
        allowed = [tensor.shape[-1:], (*tensor.shape[:-2], tensor.shape[-1])]
        if tuple(weights.shape) not in allowed:
            raise _mismatch(tensor, list(weights.shape), None)


def _mismatch(tensor: PlannedTensor, found: object, path: Path | None) -> UsageError:
    matrices = torch.Size(tensor.shape[:-2]).numel()
    return UsageError(
        f"the importance of {tensor.name} does not fit the tensor",
        where=path,
        found=f"{found} weights",
        expected=f"{matrices} x {tensor.shape[-1]}",
        fix="measure it on this very model",
    )


def _read_gguf(path: Path) -> dict[str, Tensor]:
    found = {}
    with read_gguf(path) as file:
        names = {n.removesuffix(s) for n in file.tensors for s in (SUMS, COUNTS) if n.endswith(s)}
        if not names:
            raise _broken(path, f"{len(file.tensors)} tensors, none of them {SUMS[1:]}")
        for name in sorted(names):
            if {name + SUMS, name + COUNTS} - set(file.tensors):
                raise _broken(path, f"{name} without its {SUMS[1:]} or its {COUNTS[1:]}")
            infos = file.tensors[name + SUMS], file.tensors[name + COUNTS]
            if any(info.kind.name != "F32" for info in infos):
                raise _broken(path, f"{name} is not F32")
            counts = file.read(name + COUNTS).flatten()
            sums = file.read(name + SUMS).flatten()
            if sums.numel() % counts.numel():
                raise _broken(path, f"{name} has {sums.numel()} sums and {counts.numel()} counts")
            sums = sums.view(counts.numel(), -1)
            means = sums / counts.clamp(min=1).unsqueeze(1)
            found[name] = means.masked_fill(counts.unsqueeze(1) <= 0, 1.0).flatten()
    return found


def _read_entries(path: Path) -> dict[str, Tensor]:
    """The form before July 2025, `imatrix.dat`; what follows the entries is not needed."""
    data = path.read_bytes()
    position = 0

    def take(num_bytes: int) -> bytes:
        nonlocal position
        if not 0 <= num_bytes <= len(data) - position:
            raise _broken(path, f"{num_bytes:,} bytes wanted at {position:,} of {len(data):,}")
        position += num_bytes
        return data[position - num_bytes : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    num_entries = number()
    if not 0 < num_entries <= MAX_ENTRIES:
        raise _broken(path, f"{num_entries:,} entries")
    found = {}
    for _ in range(num_entries):
        length = number()
        if not 0 < length <= MAX_NAME_BYTES:
            raise _broken(path, f"a name of {length:,} bytes")
        name = take(length).decode("utf-8", errors="replace")
        num_calls, num_values = number(), number()
        if num_values < 1:
            raise _broken(path, f"{name} has {num_values:,} values")
        values = torch.frombuffer(bytearray(take(4 * num_values)), dtype=torch.float32)
        found[name] = values / num_calls if num_calls > 0 else torch.ones(num_values)
    return found


def _broken(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "is no importance matrix",
        where=path,
        found=found,
        expected="a file of llama.cpp's llama-imatrix, GGUF or imatrix.dat",
        fix="measure it again, or copy it again from its source",
    )
