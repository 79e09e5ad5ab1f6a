"""Writes checkpoints: one rank at once, several in a thread while the next steps are made.

Of several ranks a step waits for the copy of its state alone, and for the save before, if that is
not done. A checkpoint takes its name, and `latest` points to it, when every rank has written.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

from rorqual import weights
from rorqual.errors import TrainingError
from rorqual.files import atomic_directory, fsync_path, replace_directory, write_json
from rorqual.runs import CHECKPOINTS, STATE, TRAINER
from rorqual.train.batches import TrainingData
from rorqual.train.begin import Begun
from rorqual.train.checkpoint import LATEST, MOMENTS, checkpoints
from rorqual.train.checksums import write_checksums
from rorqual.train.learner import Learner
from rorqual.train.random_states import random_states
from rorqual.train.ranks import Ranks
from rorqual.train.recipe import Recipe
from rorqual.weights.model_writer import write_settings
from rorqual.weights.parameters_source import EMA, EMA_FILE

PATIENCE = timedelta(minutes=30)  # for the slowest disk of all ranks


class Saver:
    """`save` a learner's state; `wait` until it is on the disk.

    `folder` is the last whole one, and `progress` where the run stood then; a run that has saved
    none goes back to its beginning. A context that ends its thread.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        data: TrainingData,
        ranks: Ranks,
        begun: Begun,
    ) -> None:
        self.recipe, self.run_folder, self.data = recipe, run_folder, data
        self.folder, self.progress = begun.folder, begun.learner.progress
        self.thread: ThreadPoolExecutor | None = None
        self.group: ProcessGroup | None = None
        self.pending: Future[Path] | None = None
        if ranks.world > 1:
            # Of their own: the collectives of the steps go on meanwhile.
            self.thread = ThreadPoolExecutor(1, "checkpoint")
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.thread is None:
            return
        if isinstance(error, Exception):
            with suppress(TrainingError):  # what ends the run is said, and not what follows of it
                self.wait()
        self.thread.shutdown(wait=error is None)

    def save(self, learner: Learner) -> None:
        """Saves it as it now is. TrainingError where the save before failed."""
        self.wait()
        self.progress = learner.progress
        folder = self.run_folder / CHECKPOINTS / f"step-{learner.progress.step}"
        state = self._state(learner)
        if self.thread is None:
            self._write_whole(folder, learner, state)
            self.folder = folder
            return
        pieces = {name: piece.copied() for name, piece in learner.pieces().items()}
        self.pending = self.thread.submit(self._write_shards, folder, learner, pieces, state)

    def wait(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            self.folder = pending.result()
        except TrainingError as problem:
            raise TrainingError(
                f"a checkpoint could not be written: {problem.what}",
                where=self.run_folder / CHECKPOINTS,
                fix="mend that and start again: the run goes on from the checkpoint before",
            ) from None

    def _state(self, learner: Learner) -> dict[str, Any]:
        data = self.data
        return {
            "progress": asdict(learner.progress),
            "optimizer_steps": learner.optimizer.num_steps,
            "recipe": self.recipe.table(),
            "data_digest": data.digest,
            "data": asdict(data.inputs) if data.inputs is not None else None,
            "usual": learner.usual.state(),
            "random": random_states(),
        }

    def _write_whole(self, folder: Path, learner: Learner, state: dict[str, Any]) -> None:
        with atomic_directory(folder, replace=True) as temporary:
            weights.save(learner.model, temporary, "float32", tokenizer=self.data.tokenizer)
            trainer = temporary / TRAINER
            trainer.mkdir()
            save_file(learner.optimizer.state_tensors(), trainer / MOMENTS)
            if learner.ema is not None:
                learner.ema.wait()
                values = {f"{EMA}{name}": value for name, value in learner.ema.values.items()}
                save_file(values, trainer / EMA_FILE)
            write_json(trainer / STATE, state)
            write_checksums(temporary)
        self._point_to(folder)

    def _write_shards(
        self, folder: Path, learner: Learner, pieces: dict[str, Any], state: dict[str, Any]
    ) -> Path:
        from rorqual.train.shards import write_shards

        temporary = folder.with_name(f".{folder.name}.ranks")

        def finish(known: dict[str, dict[str, Any]]) -> None:
            write_settings(learner.model, temporary, "float32", self.data.tokenizer, {})
            write_json(temporary / TRAINER / STATE, state)
            write_checksums(temporary, known)
            replace_directory(temporary, folder)
            self._point_to(folder)

        write_shards(temporary, pieces, finish, self.group)
        return folder

    def _point_to(self, folder: Path) -> None:
        """Makes `latest` a link to the newest, so that other commands can name it, and removes all
        but the recipe's last N.
        """
        link = folder.with_name(f".step-{LATEST}")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name, target_is_directory=True)
        os.replace(link, folder.with_name(LATEST))
        fsync_path(folder.parent)
        for old in checkpoints(self.run_folder)[: -self.recipe.checkpoint.keep_last]:
            # Renamed first: a removal cut short must not leave a checkpoint that looks whole.
            hidden = old.with_name(f".{old.name}.old")
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
