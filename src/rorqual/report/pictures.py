"""Pictures of a page: SVG inside of it, in the colours of the reader's light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from rorqual.parallel import Timeline
from rorqual.parallel.timeline import draw_timeline
from rorqual.train.curves import Curve, new_figure
from rorqual.train.load_maps import (
    LoadMap,
    draw_experts_over_time,
    draw_load,
    draw_max_vio_by_layer,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour that nothing else has stands for the text's, which the page chooses.
INK = "#010203"
SERIES = ("#2f8fb8", "#d9822b", "#4f9d69", "#b0609c", "#8f7bd1", "#b0892c", "#d0605e", "#6f8a99")
WIDTH, HEIGHT, WIDE = 6.4, 3.5, 12.0
PIXELS = (80, 110)
"""An inch of a wide picture is so many of the page's at least and at most."""
MOST_MAPS, MOST_LAYERS, COLUMNS = 4, 12, 3


def curve_picture(curve: Curve) -> str:
    with _style(curve.name):
        figure = new_figure(WIDTH, HEIGHT)
        curve.on(figure.subplots())
        return _svg(figure, curve.title)


def loads_picture(loads: Sequence[LoadMap]) -> str:
    """Layers x experts at a few moments of the run, the last one among them."""
    chosen = _spread(loads, MOST_MAPS)
    num_columns = 2 if len(chosen) > 1 else 1
    num_rows = -(-len(chosen) // num_columns)
    height = num_rows * min(4.0, 1.3 + 0.16 * len(loads[-1].layers))
    with _style("loads"):
        figure = new_figure(WIDE, max(height, 2.2))
        panels = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in panels.flat[len(chosen) :]:
            axes.set_axis_off()
        for axes, load in zip(panels.flat, chosen, strict=False):
            image = draw_load(axes, load, f"up to step {load.step:,}")
        figure.colorbar(image, ax=panels, label="load over the layer's mean")
        return _svg(figure, "Load of each expert in each layer, over the run", is_wide=True)


def max_vio_picture(loads: Sequence[LoadMap]) -> str:
    """Layers x time."""
    with _style("max_vio_by_layer"):
        figure = new_figure(WIDE, min(5.0, 1.6 + 0.16 * len(loads[-1].layers)))
        axes = figure.subplots()
        figure.colorbar(draw_max_vio_by_layer(axes, loads), ax=axes, label="MaxVio")
        return _svg(figure, "MaxVio of each layer, over the run", is_wide=True)


def experts_picture(loads: Sequence[LoadMap]) -> str:
    """Experts x time, of each layer or of some."""
    layers = _spread(range(len(loads[-1].layers)), MOST_LAYERS)
    num_rows = -(-len(layers) // COLUMNS)
    with _style("experts"):
        figure = new_figure(WIDE, 0.5 + 1.9 * num_rows)
        panels = figure.subplots(num_rows, COLUMNS, squeeze=False, sharex=True)
        for axes in panels.flat[len(layers) :]:
            axes.set_axis_off()
        for axes, layer in zip(panels.flat, layers, strict=False):
            image = draw_experts_over_time(axes, loads, layer)
        for axes in panels[:, 0]:
            axes.set_ylabel("expert")
        figure.colorbar(image, ax=panels, label="load over the layer's mean")
        return _svg(figure, "Load of each expert over time, by layer", is_wide=True)


def timeline_picture(timeline: Timeline) -> str:
    with _style("timeline"):
        return _svg(draw_timeline(timeline, ""), "What each rank ran when", is_wide=True)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly, the first and the last one among them."""
    count = min(len(items), most)
    if count == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


@contextmanager
def _style(name: str) -> Iterator[None]:
    """matplotlib's settings for a picture; `name` keeps the ids of one apart from another's."""
    import matplotlib
    from cycler import cycler

    names = "text.color axes.edgecolor axes.labelcolor grid.color xtick.color ytick.color"
    inked = names.split()
    bare = ("axes.facecolor", "figure.facecolor", "savefig.facecolor", "legend.facecolor")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        **dict.fromkeys(bare, "none"),
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": ascii(name),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that a browser has, figures beyond all axes
        yield


def _svg(figure: Figure, label: str, *, is_wide: bool = False) -> str:
    """An element of a page: without a size, ids of groups and data on its origin. A wide one gets
    no smaller than what can be read.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()  # `savefig` would draw twice
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="image\w*"', "", re.sub(r'<g id="[^"]*"', "<g", text))
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    if is_wide:
        least, most = (round(pixels * figure.get_figwidth()) for pixels in PIXELS)
        head += f' style="min-width: {least}px; max-width: {most}px"'
    text = f'{head} role="img" aria-label="{escape(label)}">{rest}'
    return text.replace(INK, "currentColor")
