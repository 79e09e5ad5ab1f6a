"""Checkpoints: a Hugging Face folder in float32, and `trainer/` with the rest of the state.

`checkpoints/step-N/` takes its name only when it is whole, so a killed save leaves nothing but a
hidden temporary that no scan looks at and the next save's start removes. Nothing is pickled: the
moments are safetensors, all else is JSON.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual import weights
from rorqual.bundled import checkpoint_path
from rorqual.config import fill, settings
from rorqual.data import Inputs
from rorqual.errors import TrainingError, listing
from rorqual.files import atomic_directory, read_json, write_json
from rorqual.model import DeepseekV3
from rorqual.runs import CONFIG, STATE, TRAINER, mend_of_checkpoint, step_folders
from rorqual.train.batches import TrainingData
from rorqual.train.changes import check_changes
from rorqual.train.optimizer import AdamW
from rorqual.train.put_together import Moments
from rorqual.train.recipe import Recipe

MOMENTS = "moments.safetensors"
LATEST = "latest"


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


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint gives back; `changes` as in `Standing`."""

    folder: Path
    model: DeepseekV3
    optimizer: AdamW
    progress: Progress
    changes: list[str]


def checkpoints(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; temporaries of a killed save are not."""
    return [folder for folder in step_folders(run_folder) if _has_state(folder)]


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None where there is none.

    TrainingError if the latest lacks the trainer's state: a run that passed it over would replace
    it.
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


def checkpoint_folder(run_folder: Path, progress: Progress) -> Path:
    """Where a checkpoint of so many steps lies."""
    return run_folder / "checkpoints" / f"step-{progress.step}"


def save_checkpoint(
    run_folder: Path,
    recipe: Recipe,
    model: DeepseekV3,
    optimizer: AdamW | Moments,
    progress: Progress,
    *,
    data: TrainingData | None = None,
) -> Path:
    """Writes `checkpoints/step-N` whole, then removes all but the recipe's last N."""
    folder = checkpoint_folder(run_folder, progress)
    tokenizer = data.tokenizer if data is not None else None
    state = {
        "progress": asdict(progress),
        "optimizer_steps": optimizer.num_steps,
        "recipe": recipe.table(),
        "data_digest": data.digest if data is not None else None,
        "data": asdict(data.inputs) if data is not None and data.inputs is not None else None,
        "random": random_states(),
    }
    with atomic_directory(folder, replace=True) as temporary:
        weights.save(model, temporary, "float32", tokenizer=tokenizer)
        (temporary / TRAINER).mkdir()
        save_file(dict(optimizer.state_tensors()), temporary / TRAINER / MOMENTS)
        write_json(temporary / TRAINER / STATE, state)
    _point_latest(folder)
    for old in checkpoints(run_folder)[: -recipe.checkpoint.keep_last]:
        _remove(old)
    return folder


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


def load_checkpoint(
    folder: Path,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    data: TrainingData | None = None,
    allow_changes: bool = False,
) -> Resumed:
    """Weights, moments, counters; sets the random states. Errors as in `standing`."""
    where = folder / TRAINER / STATE
    inputs, digest = (data.inputs, data.digest) if data is not None else (None, None)
    found = standing(folder, recipe, inputs=inputs, digest=digest, allow_changes=allow_changes)
    state = found.state
    model = weights.load(folder, "float32", device)
    optimizer = AdamW(model, recipe.optimizer)
    _load_moments(optimizer, folder / TRAINER / MOMENTS)
    try:
        optimizer.num_steps = int(state["optimizer_steps"])
        set_random_states(state["random"])
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as problem:
        raise TrainingError(
            f"the counter of steps or a random state is none: {problem}",
            where=where,
            fix="remove this checkpoint and resume",
        ) from None
    return Resumed(folder, model, optimizer, found.progress, found.changes)


def remove_leftovers(run_folder: Path) -> None:
    """Deletes the hidden temporaries that a killed save left among the checkpoints."""
    for leftover in (run_folder / "checkpoints").glob(".step-*"):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def random_states() -> dict[str, Any]:
    """The states of torch's (and each GPU's), Python's and NumPy's generators as JSON."""
    name, keys, *rest = np.random.get_state()
    # A run on the CPU beside a GPU leaves that alone.
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in gpus],
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Puts the generators where `random_states` found them."""
    torch.set_rng_state(_tensor(states["torch"]))
    if torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_tensor(state) for state in states["cuda"]])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))


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


def _load_moments(optimizer: AdamW, file: Path) -> None:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as problem:
        raise TrainingError(
            f"cannot be read: {problem}", where=file, fix="remove this checkpoint and resume"
        ) from None
    places = optimizer.state_tensors()
    faults = [
        name
        for name in sorted(places.keys() | stored.keys())
        if name not in places
        or name not in stored
        or places[name].shape != stored[name].shape
        or places[name].dtype != stored[name].dtype
    ]
    if faults:
        raise TrainingError(
            f"moments are missing, unexpected or of another form: {listing(faults)}", where=file
        )
    for name, place in places.items():
        place.copy_(stored[name])


def _point_latest(folder: Path) -> None:
    """Makes `checkpoints/latest` a link to the newest, so that other commands can name it."""
    temporary = folder.with_name(f".step-{LATEST}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    os.replace(temporary, folder.with_name(LATEST))


def _remove(folder: Path) -> None:
    # Renamed first: a removal cut short must not leave a checkpoint that looks whole.
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
