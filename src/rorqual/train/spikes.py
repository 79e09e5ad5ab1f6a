"""Jumps of the loss or of the gradient's norm: how they are told, and which samples are left out.

What is usual are the median and the spread of the last steps, both robust: a jump that was let
through moves them little. The spread is the median of absolute deviations times 1.4826, which is
the standard deviation of a normal distribution. The report saw no such jump (§1); PaLM, which did,
went back about 100 steps and left out the batches around it (arXiv 2204.02311 §5.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from rorqual.config import fill, settings
from rorqual.errors import TrainingError
from rorqual.files import read_json, write_json
from rorqual.train.step import StepResult

SKIPPED = "skipped.json"
NORMAL = 1.4826
# Choice: a spread below this share of the median counts as so much, so that a loss which hardly
# moves may still rise by a tenth.
LEAST_SPREAD = 0.01


@settings
class SpikeSettings:
    """Jumps of loss or gradient: the run goes back to its last checkpoint and leaves the batch
    out."""

    rollbacks: int = Field(default=3, ge=0)
    """How often the run may go back to the same checkpoint. 0: jumps are not looked for, and a step
    that is not finite ends the run."""
    window: int = Field(default=64, ge=8)
    """Steps that say what is usual, by median and median absolute deviation. Jumps are looked for
    once half of them are made."""
    loss_deviations: float | None = Field(default=10.0, gt=0)
    """A cross entropy of the next token (`main`) so many deviations above the median is a jump;
    left out: not looked at."""
    norm_deviations: float | None = Field(default=100.0, gt=0)
    """The same of the gradient's norm, which varies more."""
    skip: int = Field(default=1, ge=1)
    """Batches that are left out: that of the jump, and those before it since the checkpoint."""


class Usual:
    """The last steps' losses and gradient norms."""

    def __init__(self, options: SpikeSettings, state: dict[str, Any] | None = None) -> None:
        self.options = options
        state = state or {}
        self.losses = deque[float](state.get("losses", ()), options.window)
        self.norms = deque[float](state.get("norms", ()), options.window)

    def state(self) -> dict[str, list[float]]:
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def look(self, result: StepResult) -> str | None:
        """Takes the step in, or says why it is a jump."""
        if not self.options.rollbacks:
            return None
        looks = (
            ("loss", result.main, self.losses, self.options.loss_deviations),
            ("gradient norm", result.grad_norm, self.norms, self.options.norm_deviations),
        )
        for name, value, window, limit in looks:
            if limit is not None and len(window) * 2 >= self.options.window:
                middle, spread = usual_of(window)
                if value > middle + limit * spread:
                    return f"{name} {value:.4g}, where {middle:.4g} +- {spread:.2g} is usual"
        self.losses.append(result.main)
        self.norms.append(result.grad_norm)
        return None


def usual_of(values: Iterable[float]) -> tuple[float, float]:
    """Median and spread."""
    values = list(values)
    middle = median(values)
    spread = NORMAL * median(abs(value - middle) for value in values)
    return middle, max(spread, LEAST_SPREAD * abs(middle), math.ulp(1.0))


@settings
class Skip:
    """Samples [first, stop) that the run leaves out, since it went back to the checkpoint of
    step `rolled_back_to` from step `step`."""

    first: int
    stop: int
    rolled_back_to: int
    step: int
    why: str


class Skipped:
    """All that a run leaves out, in `skipped.json` of its folder: what is in it is never learnt,
    whichever checkpoint the run goes on from. All ranks read it and one writes it.
    """

    def __init__(self, folder: Path, *, is_writer: bool = True) -> None:
        self.file, self.is_writer = folder / SKIPPED, is_writer
        self.skips: list[Skip] = []
        if self.file.exists():
            found = read_json(self.file, TrainingError).get("skipped")
            if not isinstance(found, list):
                raise TrainingError(
                    "is no list of what the run leaves out",
                    where=self.file,
                    expected='{"skipped": [...]}',
                    fix="put the file back, or remove it: then all samples are learnt",
                )
            self.skips = [fill(Skip, row, self.file) for row in found]

    def after(self, samples: int, num_samples: int) -> int:
        """Where the next batch begins: at `samples`, or behind what is left out there."""
        for skip in sorted(self.skips, key=lambda skip: skip.first):
            if samples < skip.stop and skip.first < samples + num_samples:
                samples = skip.stop
        return samples

    def num_rollbacks_to(self, step: int) -> int:
        return sum(skip.rolled_back_to == step for skip in self.skips)

    def add(self, skip: Skip) -> None:
        self.skips.append(skip)
        if self.is_writer:
            write_json(self.file, {"skipped": [asdict(skip) for skip in self.skips]})
