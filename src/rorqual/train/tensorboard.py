"""The metrics once more, for TensorBoard: event files in the run folder's `tensorboard`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError

FOLDER = "tensorboard"
NAMES = ("layers",)
"""Fields of which the numbers are names."""


def require_tensorboard() -> None:
    """ConfigError where it is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "metrics.tensorboard = true needs TensorBoard, which is not installed",
            fix="pip install 'rorqual[tensorboard]', or set it to false: metrics.jsonl is "
            "written always",
        )


class TensorBoardLog:
    """Each number of a record as a scalar named `kind/field`; of a list or a table one for each
    entry. Steps after `last_step` that an earlier process wrote are hidden.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, number in _numbers(kind, values):
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key in NAMES:
                continue
            yield from _numbers(f"{name}/{key}", each)
    elif isinstance(value, list) and not any(isinstance(each, list) for each in value):
        for number, each in enumerate(value, 1):
            yield from _numbers(f"{name}/{number}", each)
