"""What a GGUF file of any architecture says of itself: keys, tokenizer, tensors, types.

Nothing here knows what a tensor means, so that files which no reader of ours loads are shown too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rorqual.ops.quant_types import READABLE
from rorqual.weights.gguf.file import GgufFile
from rorqual.weights.gguf.format import TensorInfo, Value
from rorqual.weights.gguf.tokenizer import MODEL, PRE, TEMPLATE, TOKENS
from rorqual.weights.progress import track

MAX_ITEMS = 8  # a longer array is shown by its length and first items
SHOWN_ITEMS = 3
MAX_CHARACTERS = 200
CHUNK_VALUES = 2_000_000  # decoded at once


def summary(file: GgufFile) -> dict[str, Any]:
    """Architecture, tokenizer, number of values, and the keys with long values cut; for JSON."""
    tokens = file.metadata.get(TOKENS)
    return {
        "architecture": file.architecture,
        "parameters": {"total": sum(tensor.num_values for tensor in file.tensors.values())},
        "tokenizer": {
            "model": _shown(file.metadata.get(MODEL)),
            "pre": _shown(file.metadata.get(PRE)),
            "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
            "has_chat_template": TEMPLATE in file.metadata,
        },
        "metadata": {key: _shown(value) for key, value in file.metadata.items()},
    }


def stored_types(file: GgufFile) -> dict[str, tuple[int, int, int]]:
    """type -> (tensors, values, bytes), in the order of the file."""
    counts: dict[str, tuple[int, int, int]] = {}
    for tensor in file.tensors.values():
        num, values, size = counts.get(tensor.kind.name, (0, 0, 0))
        counts[tensor.kind.name] = (num + 1, values + tensor.num_values, size + tensor.num_bytes)
    return counts


def faulty_values(file: GgufFile) -> tuple[list[str], list[str]]:
    """(what was found, types that cannot be decoded) after reading every value of the file."""
    faults, uncoded = [], set()
    for tensor in track(list(file.tensors.values()), "reading", file.num_bytes()):
        if tensor.kind.name not in READABLE:
            uncoded.add(tensor.kind.name)
        elif not _is_finite(file, tensor):
            faults.append(f"{tensor.name} has NaN or infinity")
    return faults, sorted(uncoded)


def _is_finite(file: GgufFile, tensor: TensorInfo) -> bool:
    return all(
        bool(torch.isfinite(file.read_rows(tensor.name, start, stop)).all())
        for start, stop in _row_ranges(tensor)
    )


def _row_ranges(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_VALUES // tensor.num_columns)
    for start in range(0, tensor.num_rows, step):
        yield start, min(start + step, tensor.num_rows)


def _shown(value: Value) -> Any:
    """A value as JSON has it, long ones cut."""
    if isinstance(value, (list, np.ndarray)):
        items = [_shown(item) for item in value[:MAX_ITEMS]]
        if isinstance(value, np.ndarray):
            items = [_shown(item.item()) for item in value[:MAX_ITEMS]]
        if len(value) <= MAX_ITEMS:
            return items
        return {"length": len(value), "first": items[:SHOWN_ITEMS]}
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        return f"{value[:MAX_CHARACTERS]}... ({len(value):,} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value
