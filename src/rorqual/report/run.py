"""The folder of a run as it is found: whole, in progress, empty or damaged."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rorqual.config import NOT_TOML
from rorqual.errors import RorqualError, UsageError, listing
from rorqual.files import read_text
from rorqual.log import short_count
from rorqual.parallel import Timeline
from rorqual.report.timeline_file import read_timeline
from rorqual.runs import RECIPE, STEP_FOLDER, TIMELINE
from rorqual.train.curves import SMOOTH_STEPS, column
from rorqual.train.history import History, Record, read_history
from rorqual.train.metrics import METRICS
from rorqual.train.report import duration

MOST_RECIPE_CHARACTERS = 200_000


@dataclass(frozen=True)
class Run:
    """What a page tells of. `recipe` has dotted keys; `notes` say what could not be read."""

    name: str
    folder: Path
    history: History
    recipe_text: str
    recipe: dict[str, Any]
    timeline: Timeline | None
    notes: list[str]

    @property
    def last(self) -> Record | None:
        return self.history.steps[-1] if self.history.steps else None


def open_run(folder: Path) -> Run:
    """UsageError for what is no run's folder."""
    if not folder.is_dir():
        what = "is a file; a run's folder is needed" if folder.exists() else "no such folder"
        raise UsageError(what, where=folder, fix="name a run's folder, such as runs/NAME")
    if not any((folder / name).is_file() for name in (METRICS, RECIPE)):
        raise UsageError(
            "is not the folder of a training run",
            where=folder,
            found=listing(sorted(path.name for path in folder.iterdir())) or "an empty folder",
            expected=f"{METRICS} or {RECIPE}, as `rorqual train` writes them",
            fix=_mend(folder),
        )
    notes: list[str] = []
    history = read_history(folder / METRICS)
    if history.num_damaged:
        are = "line is" if history.num_damaged == 1 else "lines are"
        notes.append(f"{history.num_damaged:,} {are} damaged in {METRICS} and left out")
    text, recipe = _recipe(folder / RECIPE, notes)
    timeline: Timeline | None = None
    try:
        timeline = read_timeline(folder / TIMELINE)
    except RorqualError as problem:
        notes.append(str(problem.with_(where=TIMELINE)).replace("\n", "; "))
    name = str(recipe.get("name", folder.resolve().name))
    return Run(name, folder, history, text, recipe, timeline, notes)


def _mend(folder: Path) -> str:
    """A checkpoint lies two folders below its run."""
    place = folder.resolve()
    if STEP_FOLDER.fullmatch(place.name) and (place.parents[1] / RECIPE).is_file():
        return f"name the run: {place.parents[1]}"
    return "name a run's folder, such as runs/NAME"


def _recipe(file: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not file.is_file():
        notes.append(f"there is no {RECIPE}")
        return "", {}
    try:
        text = read_text(file)[:MOST_RECIPE_CHARACTERS]
        return text, dict(_flat(tomllib.loads(text)))
    except RorqualError as problem:
        notes.append(f"{RECIPE} cannot be read: {problem.what}")
        return "", {}
    except NOT_TOML:
        notes.append(f"{RECIPE} is not whole TOML")
        return text, {}


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def figures(run: Run) -> dict[str, str]:
    """What one asks first, by name; without what the run does not say."""
    history, last = run.history, run.last
    if last is None:
        return {"steps": "none yet"}
    even = history.even_steps
    tokens = short_count(last["tokens"])
    total = run.recipe.get("training.total_tokens")
    if isinstance(total, int):
        tokens += f" of {short_count(max(total, last['tokens']))}"
    found = {"steps": f"{last['step']:,}", "tokens": tokens}
    losses = _finite(column(even[-SMOOTH_STEPS:], "main"))
    if losses:
        found["loss"] = f"{sum(losses) / len(losses):.4g}"
    if held_out := _finite(column(history.validations, "bits_per_byte")):
        found["held out"] = f"{held_out[-1]:.4g} bits a byte"
    if speeds := _finite(column(even, "tokens_per_second")):
        found["speed"] = f"{median(speeds):,.4g} tokens/s"
    if shares := _finite(column(even, "mfu")):
        found["MFU"] = f"{median(shares):.1%}"
    if peaks := _finite(column(history.steps, "memory_peak")):
        found["memory"] = f"{max(peaks) / 1e9:.3g} GB at most"
    if seconds := _step_seconds(even):
        found["time in steps"] = duration(seconds)
    return found


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _step_seconds(even: list[Record]) -> float:
    """The time that the tokens took, at the speeds of the evenly spread steps."""
    tokens, speeds = [0.0, *column(even, "tokens")], column(even, "tokens_per_second")
    pairs = pairwise(tokens)
    return sum(
        (now - before) / speed
        for (before, now), speed in zip(pairs, speeds, strict=True)
        if speed > 0 and now > before
    )
