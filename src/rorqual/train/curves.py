"""A run's curves and maps, drawn on the axes of matplotlib: for PNG files and for the page of
`rorqual report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from rorqual.log import short_count
from rorqual.train.history import History, Record, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_STEPS = 50
WIDE = 30.0  # the ratio of highest and lowest from which on an axis is logarithmic
SENT = (("bytes_within_nodes", "within nodes"), ("bytes_between_nodes", "between nodes"))
MOST_LETTERS = 80
PALE: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8}


@dataclass(frozen=True)
class Curve:
    """One picture: its name in files, its title, the label of its upright axis."""

    name: str
    title: str
    label: str
    draw: Callable[[Axes], None]

    def on(self, axes: Axes) -> None:
        """Draws it over the tokens seen."""
        self.draw(axes)
        axes.set_xlabel("tokens seen")
        axes.set_ylabel(self.label, parse_math=False)
        axes.grid(alpha=0.2)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(round(value)))


def new_figure(width: float, height: float) -> Figure:
    """In inches. The object interface: no global state of pyplot, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def column(records: Sequence[Record], *keys: str | int) -> list[float]:
    """A field of each record, also one inside of another; NaN where it is not there."""
    return [number_in(record, keys) for record in records]


def number_in(record: Record, keys: tuple[str | int, ...]) -> float:
    value: Any = record
    for key in keys:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return math.nan
    if not is_number(value):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return math.nan


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean of the last 50, of a short run of the last twentieth; of those that are
    numbers.
    """
    window = min(SMOOTH_STEPS, max(1, len(values) // 20))
    smoothed, total, count = [], 0.0, 0
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, count = total + value, count + 1
        old = values[index - window] if index >= window else math.nan
        if math.isfinite(old):
            total, count = total - old, count - 1
        smoothed.append(total / count if count else math.nan)
    return smoothed


def names_in(records: Sequence[Record], key: str) -> list[str]:
    """The names in a field that is a table, in the order in which they appear."""
    tables = (record.get(key) for record in records)
    return list(
        dict.fromkeys(name for table in tables if isinstance(table, dict) for name in table)
    )


def shown_name(name: object) -> str:
    """A name that a file gives, such that a font can draw it."""
    letters = (letter if letter.isprintable() else "?" for letter in str(name)[:MOST_LETTERS])
    return "".join(letters)


def has(records: Sequence[Record], key: str) -> bool:
    return any(math.isfinite(value) for value in column(records, key))


def curves(run: History) -> Iterator[Curve]:
    """Those for which the run has figures."""
    if run.steps:
        yield Curve("loss", "Loss", "loss (nats a token)", partial(_loss, run=run))
    if has(run.validations, "bits_per_byte"):
        draw = partial(_dots, run=run, key="bits_per_byte")
        yield Curve("bits_per_byte", "Held out", "bits a byte", draw)
    for curve in _step_curves():
        if has(run.steps, curve.key):
            yield curve.of(run)
    if names_in(run.even_steps, "seconds"):
        yield Curve("seconds", "Time by phase", "share of a step", partial(_phases, run=run))
    if any(has(run.steps, key) for key, _ in SENT):
        yield Curve("traffic", "Sent between ranks", "GB a step", partial(_traffic, run=run))
    if has(run.steps, "max_vio_max"):
        yield Curve("max_vio", "Balance of the experts", "MaxVio", partial(_max_vio, run=run))
    for name in names_in(run.steps, "metrics"):  # a stage's own figures
        shown = shown_name(name)
        yield Curve(f"metric_{name}", shown, shown, partial(_metric, run=run, name=name))


@dataclass(frozen=True)
class _StepCurve:
    """A figure that each step has: its key, the curve's names, and how it is drawn."""

    key: str
    name: str
    title: str
    label: str
    is_noisy: bool = True
    scale: float = 1.0

    def of(self, run: History) -> Curve:
        return Curve(self.name, self.title, self.label, partial(self._draw, run=run))

    def _draw(self, axes: Axes, run: History, label: str | None = None) -> None:
        tokens = column(run.steps, "tokens")
        values = [self.scale * value for value in column(run.steps, self.key)]
        if not self.is_noisy:
            axes.plot(tokens, values, label=label)
        else:
            (pale,) = axes.plot(tokens, values, **PALE)
            even = [self.scale * value for value in column(run.even_steps, self.key)]
            colour = pale.get_color()
            axes.plot(column(run.even_steps, "tokens"), smooth(even), color=colour, label=label)
        _choose_scale(axes, values)


def _step_curves() -> tuple[_StepCurve, ...]:
    return (
        _StepCurve("lr", "learning_rate", "Learning rate", "learning rate", is_noisy=False),
        _StepCurve("batch", "batch", "Batch", "sequences a step", is_noisy=False),
        _StepCurve("grad_norm", "grad_norm", "Gradient norm", "norm before clipping"),
        _StepCurve("tokens_per_second", "speed", "Speed", "tokens/s"),
        _StepCurve("mfu", "mfu", "Model FLOPs utilisation", "% of the peak", scale=100),
        _StepCurve("memory", "memory", "Memory", "GB", is_noisy=False, scale=1e-9),
    )


def _choose_scale(axes: Axes, values: Sequence[float]) -> None:
    """From zero; logarithmic where the figures are far apart."""
    found = [value for value in values if math.isfinite(value)]
    if found and min(found) > 0 and max(found) > WIDE * median(found):
        axes.set_yscale("log")
    elif found and min(found) >= 0 < max(found):
        axes.set_ylim(0, 1.08 * max(found))


def _loss(axes: Axes, run: History) -> None:
    tokens, even = column(run.steps, "tokens"), column(run.even_steps, "tokens")
    axes.plot(tokens, column(run.steps, "main"), color="C0", **PALE)
    axes.plot(even, smooth(column(run.even_steps, "main")), color="C0", label="next token")
    mtp = run.steps[0].get("mtp")
    for depth in range(len(mtp) if isinstance(mtp, list) else 0):
        losses = smooth(column(run.even_steps, "mtp", depth))
        axes.plot(even, losses, label=f"MTP depth {depth + 1}", color=f"C{depth + 1}")
    if has(run.validations, "nats_per_token"):
        _dots(axes, run, "nats_per_token", label="held out")
    axes.legend()


def _dots(axes: Axes, run: History, key: str, label: str | None = None) -> None:
    from matplotlib import rcParams

    tokens, values = column(run.validations, "tokens"), column(run.validations, key)
    axes.plot(tokens, values, ".-", color=rcParams["text.color"], label=label)


def _max_vio(axes: Axes, run: History) -> None:
    tokens = column(run.even_steps, "tokens")
    for key, label in (("max_vio_max", "worst layer"), ("max_vio_mean", "mean of layers")):
        axes.plot(tokens, smooth(column(run.even_steps, key)), label=label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _metric(axes: Axes, run: History, name: str) -> None:
    values = column(run.even_steps, "metrics", name)
    axes.plot(column(run.even_steps, "tokens"), smooth(values))


def _traffic(axes: Axes, run: History) -> None:
    for key, label in SENT:
        sent = [value / 1e9 for value in column(run.even_steps, key)]
        axes.plot(column(run.even_steps, "tokens"), sent, label=label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _phases(axes: Axes, run: History) -> None:
    """Each phase's share, smoothed: a save is a phase of few steps, and of all time nonetheless."""
    steps = [step for step in run.even_steps if isinstance(step.get("seconds"), dict)]
    names = names_in(steps, "seconds")
    rows = [
        smooth([0.0 if math.isnan(s) else max(s, 0.0) for s in column(steps, "seconds", name)])
        for name in names
    ]
    sums = [sum(values) or 1.0 for values in zip(*rows, strict=True)]
    shares = [[value / total for value, total in zip(row, sums, strict=True)] for row in rows]
    axes.stackplot(column(steps, "tokens"), shares, labels=map(shown_name, names), alpha=0.85)
    axes.set_ylim(0, 1)
    _legend(axes, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def compared(runs: dict[str, History]) -> Iterator[Curve]:
    """Several runs' figures, each figure in one picture."""
    told = {name: run for name, run in runs.items() if run.steps}
    for curve in (_StepCurve("main", "loss", "Loss of the next token", "nats"), *_step_curves()):
        own = {name: run for name, run in told.items() if has(run.steps, curve.key)}
        if own:
            draw = partial(_together, runs=own, curve=curve)
            yield Curve(curve.name, curve.title, curve.label, draw)
    own = {name: run for name, run in runs.items() if has(run.validations, "bits_per_byte")}
    if own:
        yield Curve("bits_per_byte", "Held out", "bits a byte", partial(_dots_together, runs=own))


def _together(axes: Axes, runs: dict[str, History], curve: _StepCurve) -> None:
    for name, run in runs.items():
        curve._draw(axes, run, label=shown_name(name))
    _legend(axes)


def _dots_together(axes: Axes, runs: dict[str, History]) -> None:
    for name, run in runs.items():
        tokens = column(run.validations, "tokens")
        axes.plot(tokens, column(run.validations, "bits_per_byte"), ".-", label=shown_name(name))
    _legend(axes)


def _legend(axes: Axes, **how: Any) -> None:
    """Names that a file gives are no formulas."""
    for text in axes.legend(**how).get_texts():
        text.set_parse_math(False)
