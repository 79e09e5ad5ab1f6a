"""Reads a checkpoint back, whoever wrote it: one rank or several, into as many as there are now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rorqual.errors import TrainingError, listing
from rorqual.runs import STATE, TRAINER
from rorqual.train.checkpoint import MOMENTS, Standing
from rorqual.train.pieces import Piece
from rorqual.train.random_states import set_random_states
from rorqual.weights.parameters_source import EMA, EMA_FILE, is_cut, read_boxes, shards_of

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def restore_tensors(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fills pieces of moments and of the average; TrainingError names what does not fit."""
    if is_cut(folder):
        from rorqual.train.shards import read_shards

        read_shards(folder, pieces)
        return
    averages = {name: piece for name, piece in pieces.items() if name.startswith(EMA)}
    moments = {name: piece for name, piece in pieces.items() if name not in averages}
    _fill(folder / TRAINER / MOMENTS, moments)
    if averages:
        _fill(folder / TRAINER / EMA_FILE, averages)


def has_average(folder: Path) -> bool:
    """Whether the checkpoint holds the average of the parameters."""
    if is_cut(folder):
        return any(name.startswith(EMA) for name in read_boxes(shards_of(folder)))
    return (folder / TRAINER / EMA_FILE).is_file()


def restore_counters(found: Standing) -> int:
    """Sets the random states; how many updates the optimizer made. TrainingError if they are
    none.
    """
    state: dict[str, Any] = found.state
    try:
        set_random_states(state["random"])
        return int(state["optimizer_steps"])
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as problem:
        raise TrainingError(
            f"the counter of steps or a random state is none: {problem}",
            where=found.folder / TRAINER / STATE,
            fix="remove this checkpoint and resume",
        ) from None


@torch.no_grad()
def _fill(file: Path, pieces: Mapping[str, Piece]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            faults = [
                name
                for name in sorted(pieces.keys() | stored.keys())
                if name not in pieces
                or name not in stored
                or tuple(stored[name].get_shape()) != pieces[name].whole
                or DTYPES.get(str(stored[name].get_dtype())) != pieces[name].local.dtype
            ]
            if faults:
                raise TrainingError(
                    f"tensors are missing, unexpected or of another form: {listing(faults)}",
                    where=file,
                )
            for name, piece in pieces.items():
                piece.local.copy_(stored[name][piece.box])
    except (OSError, SafetensorError) as problem:
        raise TrainingError(
            f"cannot be read: {problem}", where=file, fix="remove this checkpoint and resume"
        ) from None
