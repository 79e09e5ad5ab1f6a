"""The checkpoints of a run: which there are, which is good, how far each of them came.

One rank writes a Hugging Face folder in float32, and `trainer/` with the rest of the state; several
ranks write all of it as shards in `trainer/` (`shards.py`). `checkpoints/step-N/` takes its name
only when it is whole, so a killed save leaves nothing but a hidden temporary that no scan looks at
and the next run's start removes. `saver.py` writes them, `restore.py` reads them back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.bundled import checkpoint_path
from rorqual.config import fill, settings
from rorqual.data import Inputs
from rorqual.errors import TrainingError, listing
from rorqual.files import read_json
from rorqual.runs import CONFIG, STATE, TRAINER, mend_of_checkpoint, step_folders
from rorqual.train.changes import check_changes
from rorqual.train.checksums import damage
from rorqual.train.recipe import Recipe

MOMENTS = "moments.safetensors"
LATEST = "latest"
DAMAGED = "damaged-"
Damage = Callable[[Path], list[str]]


@settings
class Progress:
    """Where a run stands: steps made, inputs seen, samples taken from the loader, time spent."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Standing:
    """Where a run stands by a checkpoint's state; `changes` are lines on what another recipe
    moves.
    """

    folder: Path
    progress: Progress
    changes: list[str]
    state: dict[str, Any]


def checkpoints(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; temporaries of a killed save are not."""
    return [folder for folder in step_folders(run_folder) if _has_state(folder)]


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint; None where there is none.

    TrainingError if it lacks the trainer's state: a run that passed it over would replace it.
    """
    found = step_folders(run_folder)
    if not found or _has_state(found[-1]):
        return found[-1] if found else None
    whole = checkpoints(run_folder)
    earlier = f"or remove it to continue from {whole[-1]}; " if whole else ""
    raise TrainingError(
        "a checkpoint without the trainer's state, so the run cannot go on from it",
        where=found[-1],
        expected=f"{TRAINER}/{STATE} and {TRAINER}/{MOMENTS} in it",
        fix=f"put {TRAINER}/ back; {earlier}or begin another run (--run) from its weights, with "
        f'init_from = "{found[-1]}"; or start over with --fresh, which keeps it aside',
    )


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, and the newer ones that are damaged, with what is wrong."""

    folder: Path | None
    damaged: dict[Path, list[str]]


def good_checkpoint(run_folder: Path, look: Damage = damage) -> Found:
    """The newest checkpoint whose files are what was written; None if the run has none at all.

    TrainingError where there are checkpoints, and none is good. `look` tells what is wrong with a
    folder.
    """
    damaged: dict[Path, list[str]] = {}
    latest = latest_checkpoint(run_folder)
    for folder in reversed(checkpoints(run_folder) if latest is not None else []):
        if not (faults := look(folder)):
            return Found(folder, damaged)
        damaged[folder] = faults
    if damaged:
        (folder, faults), *_ = damaged.items()
        earlier = " and no earlier one is whole" if len(damaged) > 1 else ""
        raise TrainingError(
            f"this checkpoint is damaged{earlier}",
            where=folder,
            found=listing(faults),
            expected="the files that were written",
            fix="put a copy of them back; or start over with --fresh, which keeps the run aside",
        )
    return Found(None, {})


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint so that no run takes it for one."""
    number, aside = 1, folder.with_name(f"{DAMAGED}{folder.name}")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}.{number}")
    folder.rename(aside)
    return aside


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """A checkpoint folder from its own path, a run's `checkpoints/latest`, or a run folder.

    The text `tiny` is the bundled model.
    """
    path = checkpoint_path(path)
    if path.is_file():
        raise TrainingError(
            "a run begins from a checkpoint folder, this is a file",
            where=path,
            fix=f"rorqual convert {path} FOLDER --to bf16, then name FOLDER",
        )
    if not (path / CONFIG).is_file():
        otherwise = "train the stage before this one first, or correct init_from"
        raise TrainingError(
            "there is no checkpoint here",
            where=path,
            found=f"no {CONFIG}" if path.is_dir() else None,
            expected="a checkpoint folder, or the folder of a run that saved one",
            fix=mend_of_checkpoint(path, otherwise),
        )
    return path


def standing(
    folder: Path,
    recipe: Recipe,
    *,
    inputs: Inputs | None = None,
    digest: str | None = None,
    allow_changes: bool = False,
) -> Standing:
    """How far a checkpoint came, and what continuing it with `recipe` on these data changes.

    TrainingError for another recipe's (with `allow_changes` some keys may differ: `changes.py`) or
    other data's.
    """
    where = folder / TRAINER / STATE
    state = read_json(where, TrainingError)
    for key in ("progress", "optimizer_steps", "recipe", "random"):
        if key not in state:
            raise TrainingError(f"has no {key!r}", where=where, fix="remove this checkpoint")
    progress = fill(Progress, state["progress"], where)
    changes = check_changes(
        state["recipe"], recipe, progress.tokens, where=folder, is_asked=allow_changes
    )
    _check_data(state, inputs, digest, folder)
    return Standing(folder, progress, changes, state)


def remove_leftovers(run_folder: Path) -> None:
    """Deletes the hidden temporaries that a killed save left among the checkpoints."""
    for leftover in (run_folder / "checkpoints").glob(".step-*"):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _has_state(folder: Path) -> bool:
    return (folder / TRAINER / STATE).is_file()


def _check_data(
    state: dict[str, Any], inputs: Inputs | None, digest: str | None, folder: Path
) -> None:
    """Names what changed; without a name it is what made the tokens, this program."""
    stored = state.get("data")
    changed: list[str] = []
    if inputs is not None and stored is not None:
        changed = inputs.changes_since(fill(Inputs, stored, folder / TRAINER / STATE))
    is_other = digest is not None and state.get("data_digest") not in (None, digest)
    if changed or is_other:
        raise TrainingError(
            "this run was made with other data",
            where=folder,
            found=listing(changed) or f"tokens of digest {str(digest)[:12]}",
            expected="what it was begun with"
            if changed
            else f"tokens of digest {str(state['data_digest'])[:12]}",
            fix="restore that to continue; or start a new run on what is there now, with another "
            "--run (or --fresh)",
        )
