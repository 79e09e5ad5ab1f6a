"""The run's curves as PNG files, and a heat map of the expert load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.files import atomic_write
from rorqual.train.curves import curves, new_figure
from rorqual.train.history import read_history
from rorqual.train.load_maps import LoadMap, draw_load, load_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("loss", "learning_rate", "max_vio")
"""Of a run's curves those that have a file, beside a stage's own figures."""


def plots_note() -> Iterator[str]:
    """A line to read before the first step, where there will be no plots."""
    if not has_matplotlib():
        yield "no plots: matplotlib is not installed (pip install 'rorqual[train]')"


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def write_plots(metrics_file: Path, folder: Path) -> list[Path]:
    """Draws `metrics_file` into `folder`; returns the files written: none without any step, or
    without matplotlib.
    """
    if not has_matplotlib():
        return []
    run = read_history(metrics_file)
    if not run.steps:
        return []
    files = [
        _write(folder / f"{curve.name}.png", curve.on)
        for curve in curves(run)
        if curve.name in FILES or curve.name.startswith("metric_")
    ]
    if maps := load_maps(run):
        files.append(_write(folder / "expert_load.png", lambda axes: _last_load(axes, maps[-1])))
    return files


def _last_load(axes: Axes, load: LoadMap) -> None:
    axes.figure.colorbar(draw_load(axes, load), ax=axes)


def _write(file: Path, draw: Callable[[Axes], None]) -> Path:
    figure = new_figure(8, 4.5)
    draw(figure.subplots())
    with atomic_write(file) as out:
        figure.savefig(out, format="png", dpi=100)
    return file
