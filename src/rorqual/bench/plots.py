"""The report as one picture: decode and prefill by engine, each beside its limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rorqual.bench.report import Report, Row, rates_of
from rorqual.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("decode", "prefill")


def write_plot(report: Report, file: Path) -> None:
    """A bar a row, its median with the least and the most; a line where its limit was."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if rates_of(report, kind)] or ["machine"]
    figure = Figure(figsize=(1 + 6 * len(kinds), 5), layout="constrained")
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), index + 1)
        if kind == "machine":
            _machine(axes, report)
        else:
            _bars(axes, rates_of(report, kind), kind)
            if index == 0:
                figure.legend(loc="outside upper center", ncols=5)
    with atomic_write(file) as output:
        figure.savefig(output, format="png", dpi=120)


def _bars(axes: Axes, rows: dict[str, list[Row]], title: str) -> None:
    labels = list(dict.fromkeys(row.figure.label for own in rows.values() for row in own))
    width = 0.8 / len(rows)
    for index, (engine, own) in enumerate(rows.items()):
        places = [labels.index(row.figure.label) + index * width for row in own]
        spreads = [row.value for row in own]
        below = [spread.median - spread.min for spread in spreads]
        above = [spread.max - spread.median for spread in spreads]
        heights = [spread.median for spread in spreads]
        axes.bar(places, heights, width, yerr=(below, above), capsize=2, label=engine)
        for place, row in zip(places, own, strict=True):
            if row.limits:
                limit = sorted(row.limits)[len(row.limits) // 2]
                axes.hlines(limit, place - width / 2, place + width / 2, "k", linewidth=1)
    middle = 0.4 - width / 2
    axes.set_xticks([i + middle for i in range(len(labels))], [_short(label) for label in labels])
    axes.set_ylabel("tokens/s (line: the limit)")
    axes.set_title(title)


def _short(label: str) -> str:
    return label.removeprefix("decode, ").removeprefix("prefill of ").replace(" after ", "\nafter ")


def _machine(axes: Axes, report: Report) -> None:
    best = report.best_gemms()
    axes.bar(list(best), [flops / 1e9 for flops in best.values()])
    axes.set_ylabel("GFLOP/s")
    axes.set_title("products")
