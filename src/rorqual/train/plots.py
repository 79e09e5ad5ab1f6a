"""The run's curves as PNG files: loss, learning rate, MaxVio, a stage's own figures, and a heat map
of the expert load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.files import atomic_write
from rorqual.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_STEPS = 50


def plots_note() -> Iterator[str]:
    """A line to read before the first step, where there will be no plots."""
    if not _has_matplotlib():
        yield "no plots: matplotlib is not installed (pip install 'rorqual[train]')"


def _has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def write_plots(metrics_file: Path, folder: Path) -> list[Path]:
    """Draws `metrics_file` into `folder`; returns the files written: none without any step, or
    without matplotlib.
    """
    if not _has_matplotlib():
        return []
    records = read_metrics(metrics_file)
    steps = [record for record in records if record["kind"] == "step"]
    checks = [record for record in records if record["kind"] == "validation"]
    loads = [record for record in records if record["kind"] == "load" and record["load"]]
    if not steps:
        return []
    files = [
        _curve(folder / "loss.png", "loss (nats a token)", lambda axes: _loss(axes, steps, checks)),
        _curve(folder / "learning_rate.png", "learning rate", lambda axes: _rate(axes, steps)),
        _curve(folder / "max_vio.png", "MaxVio", lambda axes: _max_vio(axes, steps)),
    ]
    for name in steps[-1].get("metrics", {}):
        file = folder / f"metric_{name}.png"
        files.append(_curve(file, name, partial(_metric, steps=steps, name=name)))
    if loads:
        files.append(_heat_map(folder / "expert_load.png", loads[-1]))
    return files


def _curve(file: Path, label: str, draw: Any) -> Path:
    figure, axes = _figure()
    draw(axes)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return _save(figure, file)


def _loss(axes: Axes, steps: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]]) -> None:
    tokens = [record["tokens"] for record in steps]
    main = [record["main"] for record in steps]
    axes.plot(tokens, main, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, _smooth(main), color="C0", label="next token")
    for depth in range(len(steps[0]["mtp"])):
        losses = [record["mtp"][depth] for record in steps]
        axes.plot(tokens, _smooth(losses), label=f"MTP depth {depth + 1}", color=f"C{depth + 1}")
    checks = [record for record in checks if "nats_per_token" in record]
    if checks:
        places = [record["tokens"] for record in checks]
        held_out = [record["nats_per_token"] for record in checks]
        axes.plot(places, held_out, "k.-", label="held out")
    axes.legend()


def _rate(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    axes.plot([record["tokens"] for record in steps], [record["lr"] for record in steps])


def _max_vio(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    tokens = [record["tokens"] for record in steps]
    for key, label in (("max_vio_max", "worst layer"), ("max_vio_mean", "mean of layers")):
        axes.plot(tokens, _smooth([record[key] for record in steps]), label=label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _metric(axes: Axes, steps: Sequence[dict[str, Any]], name: str) -> None:
    own = [record for record in steps if name in record.get("metrics", {})]
    values = [record["metrics"][name] for record in own]
    axes.plot([record["tokens"] for record in own], _smooth(values))


def _heat_map(file: Path, record: dict[str, Any]) -> Path:
    figure, axes = _figure()
    image = axes.imshow(record["load"], aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0)
    axes.set_xlabel("expert")
    axes.set_ylabel("sparse layer")
    axes.set_title(f"load over the layer's mean, up to step {record['step']}")
    figure.colorbar(image, ax=axes)
    return _save(figure, file)


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean of the last 50 steps."""
    smoothed, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - SMOOTH_STEPS] if index >= SMOOTH_STEPS else 0.0)
        smoothed.append(total / min(index + 1, SMOOTH_STEPS))
    return smoothed


def _figure() -> tuple[Figure, Axes]:
    # The object interface: no global state of pyplot, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, file: Path) -> Path:
    with atomic_write(file) as out:
        figure.savefig(out, format="png", dpi=100)
    return file
