"""The folder of a training run as others meet it: which of its checkpoints is the latest."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.errors import CheckpointError
from rorqual.files import read_json
from rorqual.log import logger

CHECKPOINTS, RECIPE, CONFIG = "checkpoints", "recipe.toml", "config.json"
TRAINER, STATE = "trainer", "state.json"
TIMELINE = "timeline.json"  # of a step in a pipeline
STEP_FOLDER = re.compile(r"step-(\d+)")


def step_folders(run_folder: Path) -> list[Path]:
    """The checkpoints of a run that have their name, oldest first; a killed save has none."""
    found = [
        (int(match[1]), folder)
        for folder in (run_folder / CHECKPOINTS).glob("step-*")
        if (match := STEP_FOLDER.fullmatch(folder.name)) and folder.is_dir()
    ]
    return [folder for _, folder in sorted(found)]


def checkpoint_in(path: Path) -> Path:
    """The latest checkpoint of a run folder, said in a line; any other path as it is.

    CheckpointError for a run that has saved none.
    """
    if (path / CONFIG).is_file() or not (path / CHECKPOINTS).is_dir():
        return path
    found = step_folders(path)
    if not found and not (path / RECIPE).is_file():
        return path  # a folder of another kind
    if not found:
        raise CheckpointError(
            "this run has saved no checkpoint yet",
            where=path,
            expected=f"{CHECKPOINTS}/step-N in it",
            fix="let `rorqual train` go on until it saves (Ctrl-C saves at once)",
        )
    _tell(path, found[-1])
    return found[-1]


@cache
def _tell(run_folder: Path, checkpoint: Path) -> None:
    """Once, though a command may ask for the path more often."""
    logger(__name__).info(
        "%s is a run; its latest checkpoint is %s", run_folder, checkpoint.relative_to(run_folder)
    )


def trained_as(checkpoint: Path) -> dict[str, Any] | None:
    """Stage, step and tokens of a checkpoint that a run saved; None of any other.

    CheckpointError where the trainer's state does not say them.
    """
    where = checkpoint / TRAINER / STATE
    if not where.is_file():
        return None
    state = read_json(where, CheckpointError)
    try:
        progress = state["progress"]
        return {
            "stage": str(state["recipe"]["stage"]),
            "step": int(progress["step"]),
            "tokens": int(progress["tokens"]),
        }
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(
            "does not say how far the run came",
            where=where,
            expected="recipe.stage, progress.step and progress.tokens",
            fix="use another checkpoint of the run",
        ) from None


def mend_of_checkpoint(path: Path, otherwise: str) -> str:
    """What helps against a damaged checkpoint: a run has others of its own; else `otherwise`."""
    if path.is_symlink():
        path = path.resolve()
    if STEP_FOLDER.fullmatch(path.name) is None or path.parent.name != CHECKPOINTS:
        return otherwise
    others = [other for other in step_folders(path.parent.parent) if other != path]
    if not others:
        return f"it is the run's only one: remove {path} and train again, or put a copy there"
    return (
        f"use another checkpoint of the run, such as {others[-1]}; "
        f"or remove {path}, and `rorqual train` goes on from there"
    )
