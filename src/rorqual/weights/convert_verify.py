"""Reads a conversion back and holds it against its source: the error of each type of tensor.

A type is a tensor's name without layer and expert numbers. Values are compared as float32, FP8
dequantised; the error of a type is ||a - b|| / ||b|| over all its tensors.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rorqual.bundled import checkpoint_path
from rorqual.errors import CheckpointError
from rorqual.weights.audit import audit
from rorqual.weights.convert_files import Advance, one_thread_each
from rorqual.weights.names import StoredTensor
from rorqual.weights.open import open_source
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

_NUMBERS = re.compile(r"^model\.(layers\.\d+\.)?|(?<=experts)\.\d+")
# Relative errors that rounding to a dtype cannot exceed: half of the last bit of the mantissa. E4M3
# has three bits; its subnormals lose more, but they weigh nothing in the norm of a block.
BOUNDS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "F8_E4M3": 2.0**-4}


@dataclass
class Comparison:
    """One type of tensor, from one dtype to another."""

    type: str
    from_dtype: str
    to_dtype: str
    num_tensors: int = 0
    num_elements: int = 0
    num_unequal: int = 0
    max_error: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def is_within_bound(self) -> bool:
        """What is as wide as before must be the same; else no worse than rounding."""
        if self.from_dtype == self.to_dtype:
            return self.num_unequal == 0
        bound = BOUNDS.get(self.to_dtype)
        return not math.isnan(self.relative_error) and (
            bound is None or self.relative_error <= bound
        )

    def add(self, other: Comparison) -> None:
        self.num_tensors += other.num_tensors
        self.num_elements += other.num_elements
        self.num_unequal += other.num_unequal
        self.max_error = max(self.max_error, other.max_error)
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm

    def as_row(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "from": self.from_dtype,
            "to": self.to_dtype,
            "tensors": self.num_tensors,
            "elements": self.num_elements,
            "unequal": self.num_unequal,
            "relative_error": self.relative_error,
            "max_error": self.max_error,
            "is_within_bound": self.is_within_bound,
        }


def verify(
    source: str | os.PathLike[str],
    destination: Path,
    *,
    workers: int,
    progress: Callable[[str, int], Any],
) -> list[Comparison]:
    """Compares every tensor that both hold. CheckpointError if the result cannot be read back."""
    opened = open_source(checkpoint_path(source))
    with opened as ours, open_source(destination) as theirs, one_thread_each():
        report = audit(theirs)
        report.raise_faults(destination)
        shared = [tensor for tensor in report.tensors if tensor.name in ours.entries]
        if not shared:
            raise CheckpointError("nothing to compare: no tensor in common", where=destination)
        num_bytes = sum(4 * torch.Size(tensor.shape).numel() for tensor in shared)
        found: dict[tuple[str, str, str], Comparison] = {}
        with (
            progress("verifying", num_bytes) as advance,
            ThreadPoolExecutor(workers, "verify") as pool,
        ):
            tasks = [pool.submit(_compare, ours, theirs, tensor, advance) for tensor in shared]
            try:
                for task in tasks:
                    one = task.result()
                    key = (one.type, one.from_dtype, one.to_dtype)
                    if key in found:
                        found[key].add(one)
                    else:
                        found[key] = one
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return list(found.values())


def _compare(
    ours: TensorSource, theirs: TensorSource, tensor: StoredTensor, advance: Advance
) -> Comparison:
    from_rows, to_rows = StoredRows(ours, tensor), StoredRows(theirs, tensor)
    result = Comparison(
        _NUMBERS.sub("", tensor.name).removesuffix(".weight"),
        from_rows.entry.dtype,
        to_rows.entry.dtype,
        num_tensors=1,
        num_elements=torch.Size(tensor.shape).numel(),
    )
    for start, stop in from_rows.chunks():
        before, after = from_rows.values(start, stop), to_rows.values(start, stop)
        is_other = (before != after) & ~(before.isnan() & after.isnan())
        num_unequal = int(is_other.sum())
        norm = float(before.nan_to_num().double().square().sum())
        if num_unequal:
            difference = (after - before).masked_fill(~is_other, 0.0)
            result.max_error = max(result.max_error, float(difference.abs().max()))
            result.squared_error += float(difference.double().square().sum())
        result.num_unequal += num_unequal
        result.squared_norm += norm
        advance(4 * before.numel())
    return result
