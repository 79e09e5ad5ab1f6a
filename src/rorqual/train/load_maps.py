"""How a run used its experts: maps of their load, and of MaxVio by layer, over time."""

# L sparse layers, E experts

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rorqual.log import short_count
from rorqual.train.curves import number_in, shown_name
from rorqual.train.history import History, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# As small as it is in a file of vectors, without shades between its cells.
EXACT: dict[str, Any] = {"interpolation": "none", "aspect": "auto"}
OVER_MEAN: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0}
MOST_NAMED_ROWS = 16


@dataclass(frozen=True)
class LoadMap:
    """How the experts of each sparse layer were used between two lines of kind `load`."""

    step: int
    layers: list[str]
    load_LE: list[list[float]]

    @property
    def max_vio(self) -> list[float]:
        """(highest - mean) / mean of each layer."""
        return [
            max(row) * len(row) / total - 1 if (total := sum(row)) > 0 else math.nan
            for row in self.load_LE
        ]


def load_maps(run: History) -> list[LoadMap]:
    """Those that are whole and of one shape, the last one's."""
    found = [each for record in run.loads if (each := _load_map(record)) is not None]
    return [each for each in found if _shape(each) == _shape(found[-1])]


def _shape(each: LoadMap) -> tuple[int, int]:
    return len(each.load_LE), len(each.load_LE[0])


def _load_map(record: Record) -> LoadMap | None:
    rows = record.get("load")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        return None
    if not rows[0] or len({len(row) for row in rows}) > 1:
        return None
    load_LE = [[number_in({"value": value}, ("value",)) for value in row] for row in rows]
    names = record.get("layers")
    if not isinstance(names, list) or len(names) != len(rows):
        names = range(len(rows))
    return LoadMap(int(record["step"]), [shown_name(name)[:12] for name in names], load_LE)


def draw_load(axes: Axes, load: LoadMap, title: str | None = None) -> Any:
    """A row a sparse layer, a column an expert; what a colour bar may explain."""
    image = axes.imshow(load.load_LE, **OVER_MEAN, **EXACT)
    axes.set_xlabel("expert")
    _count_whole(axes.xaxis)
    axes.set_ylabel("sparse layer")
    _name_rows(axes, load.layers)
    axes.set_title(title or f"load over the layer's mean, up to step {load.step}", fontsize=10)
    return image


def _count_whole(axis: Any) -> None:
    """There is no half expert."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    places = range(0, len(names), -(-len(names) // MOST_NAMED_ROWS))
    axes.set_yticks(list(places), [names[place] for place in places], parse_math=False)


def draw_max_vio_by_layer(axes: Axes, loads: Sequence[LoadMap]) -> Any:
    """A row a sparse layer, a column a line of kind `load`."""
    rows = list(map(list, zip(*(load.max_vio for load in loads), strict=True)))
    image = axes.imshow(rows, cmap="viridis", vmin=0.0, **EXACT)
    axes.set_ylabel("sparse layer")
    _name_rows(axes, loads[0].layers)
    _name_times(axes, loads)
    return image


def draw_experts_over_time(axes: Axes, loads: Sequence[LoadMap], layer: int) -> Any:
    """Of one sparse layer, given by its row: a row an expert, a column a line of kind `load`."""
    rows = list(map(list, zip(*(load.load_LE[layer] for load in loads), strict=True)))
    image = axes.imshow(rows, **OVER_MEAN, **EXACT)
    _count_whole(axes.yaxis)
    axes.set_title(f"layer {loads[-1].layers[layer]}", fontsize=10, parse_math=False)
    _name_times(axes, loads)
    return image


def _name_times(axes: Axes, loads: Sequence[LoadMap]) -> None:
    places = sorted({0, len(loads) // 2, len(loads) - 1})
    axes.set_xticks(places, [f"step {short_count(loads[place].step)}" for place in places])
