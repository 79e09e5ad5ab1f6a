"""`metrics.jsonl`: one JSON object a line, each with its `kind` and `step`. docs/runs.md has every
kind and field.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from rorqual.config import settings
from rorqual.errors import TrainingError
from rorqual.files import NOT_JSON, atomic_write
from rorqual.train.tensorboard import TensorBoardLog

METRICS = "metrics.jsonl"
LOADS_A_RUN = 100


@settings
class MetricsSettings:
    """What is written of a run beside the figures of each step."""

    load_every_tokens: int | None = Field(default=None, gt=0)
    """How often the load of each expert is written; left out: a hundred times a run. It is written
    at each save, too."""
    tensorboard: bool = False
    """Also write event files for TensorBoard, into the run folder's `tensorboard`; needs
    `pip install 'rorqual[tensorboard]'`."""

    def load_every(self, total_tokens: int) -> int:
        return self.load_every_tokens or max(1, total_tokens // LOADS_A_RUN)


class MetricsLog:
    """Appends records to a file; on opening, lines of steps after `last_step` are cut off.

    So a resumed run's file reads as that of a run that was never interrupted. A last line that a
    kill left half-written goes the same way. What `tensorboard` is given too is not read back.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        last_step: int,
        tensorboard: TensorBoardLog | None = None,
    ) -> None:
        self.path, self.tensorboard = Path(path), tensorboard
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _truncate(self.path, last_step)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a line and hands it to the operating system."""
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            self.tensorboard.write(kind, step, values)

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole records of a file, in order; TrainingError for a broken line before the last."""
    path = Path(path)
    lines = _text(path).splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            assert isinstance(record["step"], int)
        except (*NOT_JSON, KeyError, TypeError, AssertionError):
            if number == len(lines):
                break
            raise TrainingError(
                "is not a line of metrics",
                where=f"{path}, line {number}",
                fix="remove the line, or the file: training does not need it",
            ) from None
        if line.endswith("\n"):
            records.append(record)
    return records


def _text(path: Path) -> str:
    """What is no UTF-8, as a disk that lost its power leaves it, is a broken line."""
    return path.read_text(encoding="utf-8", errors="replace")


def _truncate(path: Path, last_step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text != _text(path):
        with atomic_write(path, "w") as file:
            file.write(text)
