"""A pipeline's timeline to look at: text for a terminal, a PNG file for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.files import atomic_write
from rorqual.parallel.actions import Kind
from rorqual.parallel.simulator import Interval, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward, input",
    Kind.WEIGHT: "backward, weights",
}
# For a rank's first and its second stage.
COLOURS = {
    Kind.FORWARD: ("#f2b134", "#f8dc9c"),
    Kind.BACKWARD: ("#4f8f6d", "#a5cfb7"),
    Kind.INPUT: ("#3f7fbf", "#a6c8ea"),
    Kind.WEIGHT: ("#8a63a8", "#cdb7dd"),
}
LEGEND = (
    "2F0: forward of micro-batch 0 in stage 2; B: backward, I: its part for the input, W: for the "
    "weights; |: goes on; +: overlapped"
)
MAX_NUMBERED = 1500  # with more passes the numbers cannot be read
MOST_INCHES = 40.0


def as_text(timeline: Timeline) -> str:
    """Time goes down: a line for each moment at which something begins, a column for each rank.
    `LEGEND` says how it is spelt.
    """
    starts = sorted({_moment(each.start) for own in timeline.ranks for each in own})
    times = ["time", *(f"{start:g}" for start in starts), f"{timeline.end:g}"]
    cells = [
        [f"rank {rank}", *_column(own, starts), "" if rank else "end"]
        for rank, own in enumerate(timeline.ranks)
    ]
    widths = [max(map(len, column)) for column in (times, *cells)]
    lines = zip(times, *cells, strict=True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index == 0 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _column(own: tuple[Interval, ...], starts: list[float]) -> list[str]:
    by_start = {_moment(each.start): each for each in own}
    column, running_until = [], 0.0
    for start in starts:
        if start in by_start:
            running_until = by_start[start].end
            column.append("+".join(str(part) for part in by_start[start].action.parts))
        else:
            column.append("|" if start < _moment(running_until) else "")
    return column


def _moment(time: float) -> float:
    """Sums of the same durations in another order are the same moment."""
    return round(time, 9)


def draw_timeline(timeline: Timeline, title: str) -> Figure:
    """A row a rank. Colours tell the kinds of passes, a lighter one a rank's second stage; the
    number is the micro-batch's. What overlaps shares a frame, the forward above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_ranks = len(timeline.ranks)
    num_passes = max(len(own) for own in timeline.ranks)
    width = min(MOST_INCHES, max(8.0, 0.22 * num_passes))
    figure = Figure(figsize=(width, 1.3 + 0.42 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    is_numbered = sum(map(len, timeline.ranks)) <= MAX_NUMBERED
    for rank, own in enumerate(timeline.ranks):
        first = min((part.stage for each in own for part in each.action.parts), default=0)
        for interval in own:
            _draw(axes, interval, rank, first, is_numbered)
    axes.set_xlim(0, timeline.end)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.set_xlabel("time (lighter: a rank's other stage; framed: overlapped)")
    axes.set_title(title, fontsize=10)
    kinds = {p.kind for own in timeline.ranks for each in own for p in each.action.parts}
    handles = [Patch(color=COLOURS[kind][0], label=NAMES[kind]) for kind in NAMES if kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def write_png(timeline: Timeline, file: Path, title: str) -> None:
    """`draw_timeline` as a file."""
    with atomic_write(file) as output:
        draw_timeline(timeline, title).savefig(output, format="png", dpi=100)


def _draw(axes: Axes, interval: Interval, rank: int, first: int, is_numbered: bool) -> None:
    from matplotlib import rcParams
    from matplotlib.patches import Rectangle

    parts = interval.action.parts
    top, length = rank - 0.42, interval.end - interval.start
    height = 0.84 / len(parts)
    for index, part in enumerate(parts):
        place = (interval.start, top + index * height)
        colour = COLOURS[part.kind][part.stage != first]
        axes.add_patch(
            Rectangle(place, length, height, facecolor=colour, edgecolor="white", lw=0.5)
        )
        if is_numbered:
            is_dark = part.stage == first and part.kind != Kind.FORWARD
            x, y, text = place[0] + length / 2, place[1] + height / 2, str(part.micro_batch)
            ink = "white" if is_dark else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=ink, clip_on=True)
    if len(parts) > 1:
        place = (interval.start, top)
        axes.add_patch(
            Rectangle(place, length, 0.84, fill=False, edgecolor=rcParams["text.color"], lw=1.2)
        )
