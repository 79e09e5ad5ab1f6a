"""Reads a conversion back and holds it against its source, value by value.

Values are compared as float32, FP8 and GGUF's types decoded; none may be farther from its source
than rounding to its type explains (`bounds.py`). The table has a row for each type of tensor,
which is its name without layer and expert numbers; its error is ||a - b|| / ||b|| over them all.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.bundled import checkpoint_path
from rorqual.errors import CheckpointError
from rorqual.weights.audit import audit
from rorqual.weights.convert.bounds import bound_of, type_of
from rorqual.weights.convert.files import Advance, one_thread_each
from rorqual.weights.names import StoredTensor
from rorqual.weights.open import open_source
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

_NUMBERS = re.compile(r"^model\.(layers\.\d+\.)?|(?<=experts)\.\d+")


@dataclass(frozen=True)
class Fault:
    """A tensor with values that rounding does not explain, and the worst of them."""

    tensor: str
    num_values: int
    first_row: int
    error: float
    bound: float
    to: str

    def __str__(self) -> str:
        values = f"{self.num_values:,} value{'s' if self.num_values > 1 else ''}"
        return (
            f"{self.tensor}: {values} from row {self.first_row} on cannot be explained by rounding "
            f"to {self.to}: off by {self.error:.3g}, where {self.bound:.3g} is the bound"
        )


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
    faults: list[Fault] = field(default_factory=list)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def is_within_bound(self) -> bool:
        return not self.faults

    def add(self, other: Comparison) -> None:
        self.num_tensors += other.num_tensors
        self.num_elements += other.num_elements
        self.num_unequal += other.num_unequal
        self.max_error = max(self.max_error, other.max_error)
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.faults += other.faults

    def as_row(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "from": self.from_dtype,
            "to": self.to_dtype,
            "tensors": self.num_tensors,
            "elements": self.num_elements,
            "unequal": self.num_unequal,
            "relative_error": _as_json(self.relative_error),
            "max_error": _as_json(self.max_error),
            "is_within_bound": self.is_within_bound,
            "faults": [
                {name: _as_json(value) for name, value in asdict(fault).items()}
                for fault in self.faults
            ],
        }


def _as_json(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    source: str | os.PathLike[str],
    destination: Path,
    *,
    workers: int,
    progress: Callable[[str, int], Any],
    has_importance: bool = False,
    is_ema: bool = False,
) -> list[Comparison]:
    """Compares every tensor that both hold. CheckpointError if the result cannot be read back.

    `has_importance`: an importance matrix decided which values are stored well. `is_ema`: what was
    converted is the average that a run keeps.
    """
    opened = open_source(checkpoint_path(source), is_ema=is_ema)
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
            tasks = [
                pool.submit(_compare, ours, theirs, tensor, advance, has_importance)
                for tensor in shared
            ]
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
    ours: TensorSource,
    theirs: TensorSource,
    tensor: StoredTensor,
    advance: Advance,
    has_importance: bool,
) -> Comparison:
    from_rows, to_rows = StoredRows(ours, tensor), StoredRows(theirs, tensor)
    result = Comparison(
        _NUMBERS.sub("", tensor.name).removesuffix(".weight"),
        type_of(ours, tensor),
        type_of(theirs, tensor),
        num_tensors=1,
        num_elements=torch.Size(tensor.shape).numel(),
    )
    bound = bound_of(to_rows, has_importance=has_importance)
    found = None
    for start, stop in to_rows.chunks():
        before, after = from_rows.values(start, stop), to_rows.values(start, stop)
        is_other = (before != after) & ~(before.isnan() & after.isnan())
        result.squared_norm += float(before.nan_to_num().double().square().sum())
        num_unequal = int(is_other.sum())
        result.num_unequal += num_unequal
        if num_unequal:
            error = (after - before).abs().masked_fill(~is_other, 0.0)
            result.max_error = max(result.max_error, float(_without_nan(error).max()))
            result.squared_error += float(_without_nan(error).double().square().sum())
            allowed = bound(start, stop, before, after).masked_fill(~is_other, 0.0)
            found = _with_fault(found, tensor.name, start, error, allowed, result.to_dtype)
        advance(4 * before.numel())
    if found is not None:
        result.faults.append(found)
    return result


def _with_fault(
    found: Fault | None, name: str, start: int, error: Tensor, allowed: Tensor, to: str
) -> Fault | None:
    """What was found before, with the values of some more rows."""
    is_beyond = ~(error <= allowed)  # NaN too
    if not bool(is_beyond.any()):
        return found
    places = is_beyond.nonzero()
    error = _without_nan(error)
    excess = (error - allowed).nan_to_num(nan=torch.inf).masked_fill(~is_beyond, -torch.inf)
    worst = int(excess.argmax())
    here = Fault(
        name,
        len(places),
        start + int(places[0, 0]),
        float(error.flatten()[worst]),
        float(allowed.flatten()[worst]),
        to,
    )
    if found is None:
        return here
    is_worse = here.error - here.bound > found.error - found.bound
    return replace(
        here if is_worse else found,
        num_values=found.num_values + here.num_values,
        first_row=found.first_row,
    )


def _without_nan(error: Tensor) -> Tensor:
    """NaN in the place of a number, or the other way round, is infinitely far."""
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)
