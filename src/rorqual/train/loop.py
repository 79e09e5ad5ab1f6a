"""The training loop: take a batch, make a step, write it down; now and then validate and save.

The whole state is the checkpoint's: weights, moments, router bias, random states and three
counters. Which batch comes next is a function of the sample counter alone, and learning rate, batch
size and loss weights are functions of the tokens seen, so a run continued from a checkpoint equals
one that was never interrupted, bit for bit (CPU, same number of threads).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.errors import UsageError
from rorqual.files import atomic_write
from rorqual.locks import FolderLock
from rorqual.ops.ceilings import Peak
from rorqual.ops.device import resolve_device
from rorqual.train import checkpoint as checkpoint_files
from rorqual.train.batches import Measurement, TrainingData
from rorqual.train.interrupt import Interrupt, deterministic, threads, threads_note
from rorqual.train.learner import Learner
from rorqual.train.plots import plots_note
from rorqual.train.recipe import Recipe, toml_text
from rorqual.train.recorder import Recorder


@dataclass(frozen=True)
class Summary:
    """How a run ended. `is_finished` is False if a signal stopped it before its last token;
    `signal` is the number of the one that came, if any.
    """

    checkpoint: Path
    step: int
    tokens: int
    is_finished: bool
    validation: Measurement | None
    signal: int | None = None


def train(
    recipe: Recipe,
    run_folder: str | os.PathLike[str],
    data: TrainingData,
    *,
    resume: bool = True,
    allow_changes: bool = False,
    device: str | torch.device = "auto",
    is_quiet: bool = False,
    is_locked: bool = False,
    peak: Callable[[], Peak | None] | None = None,
) -> Summary:
    """Trains until the recipe's total tokens, or until SIGINT, SIGTERM or SIGHUP; then saves.

    With `resume` the latest checkpoint in `run_folder` is continued, if there is one; without it,
    a folder that holds checkpoints is an error. `allow_changes` continues it with another schedule
    or optimiser, and says what that moves. torch's threads and modes are as before afterwards.
    `is_locked` says that the caller holds `run_lock`; otherwise a second process in the folder is
    refused here (UsageError). `device` as in `resolve_device`. `peak` is asked, with
    the run's threads, for what MFU is a share of; without it there is none.
    """
    place = resolve_device(device)
    with (
        nullcontext() if is_locked else run_lock(Path(run_folder)),
        threads(recipe.training.threads),
        deterministic(place),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        most = None if peak is None else peak()
        return _train(recipe, Path(run_folder), data, resume, allow_changes, place, is_quiet, most)


def run_lock(run_folder: Path) -> FolderLock:
    """Keeps a run folder to one process, from before its data is prepared to its last write."""
    return FolderLock(
        run_folder,
        "another process trains in this run folder",
        fix="choose another folder with --run",
    )


def _train(
    recipe: Recipe,
    run_folder: Path,
    data: TrainingData,
    resume: bool,
    allow_changes: bool,
    device: torch.device,
    is_quiet: bool,
    peak: Peak | None,
) -> Summary:
    found = checkpoint_files.latest_checkpoint(run_folder)
    if found is not None and not resume:
        raise UsageError(
            "already holds a training run", where=run_folder, fix="choose another run folder"
        )
    checkpoint_files.remove_leftovers(run_folder)
    with Interrupt() as interrupt:
        resumed: checkpoint_files.Resumed | None = None
        if found is not None:
            resumed = checkpoint_files.load_checkpoint(
                found,
                recipe,
                device=device,
                data=data,
                allow_changes=allow_changes,
            )
        learner = Learner(recipe, data, resumed, device)
        with atomic_write(run_folder / "recipe.toml", "w") as file:
            file.write(toml_text(recipe.table()))
        recorder = Recorder(recipe, run_folder, learner.progress, learner.meters(peak), is_quiet)
        with recorder:
            run = _Run(recipe, run_folder, data, learner, recorder, resumed)
            return run.until(interrupt)


class _Run:
    """One run between its steps: when to validate, to save and to end."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: TrainingData,
        learner: Learner,
        recorder: Recorder,
        resumed: checkpoint_files.Resumed | None,
    ) -> None:
        self.recipe, self.folder, self.data = recipe, folder, data
        self.learner, self.recorder = learner, recorder
        self.saved = resumed.folder if resumed else None
        self.saved_step = resumed.progress.step if resumed else None
        self.changes = resumed.changes if resumed else []

    def until(self, interrupt: Interrupt) -> Summary:
        """Steps to the end or to an interrupt, with checkpoints and validations on the way."""
        learner = self.learner
        validation: Measurement | None = None
        last_save = time.monotonic()
        self._announce()
        while not learner.is_finished and not interrupt.is_set:
            before = learner.progress.tokens
            made = learner.step(self.saved)
            self.recorder.step(learner.progress, made)
            is_last = learner.is_finished
            if self._is_due(self.recipe.validation.every_tokens, before) or is_last:
                validation = self._validate()
            minutes = self.recipe.checkpoint.every_minutes
            is_time = minutes is not None and time.monotonic() - last_save >= minutes * 60
            is_due = self._is_due(self.recipe.checkpoint.every_tokens, before)
            if is_last or is_due or is_time:
                self._save()
                last_save = time.monotonic()
        # Once is enough: to write it again would put the only whole checkpoint at risk.
        if self.saved_step != learner.progress.step:
            self._save()
        return self._summary(interrupt, validation)

    def _validate(self) -> Measurement | None:
        if self.data.held_out is None:
            return None
        found = self.data.held_out.measure(self.learner.model)
        self.recorder.validation(self.learner.progress, found)
        return found

    def _save(self) -> None:
        learner = self.learner
        self.recorder.load(learner.progress)
        self.saved = checkpoint_files.save_checkpoint(
            self.folder,
            self.recipe,
            learner.model,
            learner.optimizer,
            learner.progress,
            data=self.data,
        )
        self.saved_step = learner.progress.step
        self.recorder.plots(learner.is_finished)

    def _is_due(self, every_tokens: int | None, before: int) -> bool:
        """Whether the last step crossed a multiple of `every_tokens`."""
        return every_tokens is not None and before // every_tokens < (
            self.learner.progress.tokens // every_tokens
        )

    def _announce(self) -> None:
        lines = [f"training on {self.learner.device}"]
        tokens, total = self.learner.progress.tokens, self.recipe.training.total_tokens
        if self.saved is not None:
            lines.append(f"continuing {self.saved} at {tokens:,} tokens")
        lines += self.changes
        if self.learner.is_finished:
            lines.append(f"nothing to train: training.total_tokens is {total:,}")
        lines += [*self.data.notes, *threads_note(self.recipe.training.threads), *plots_note()]
        if self.data.learnt is not None:
            lines.append(self.data.learnt)
        if self.recipe.training.compile:
            lines.append("compiling the step: the first one takes a minute or two")
        self.recorder.say(lines)

    def _summary(self, interrupt: Interrupt, validation: Measurement | None) -> Summary:
        assert self.saved is not None, "a run ends with a checkpoint"
        progress, is_finished = self.learner.progress, self.learner.is_finished
        if is_finished:
            self.recorder.say([f"finished: {self.saved}"])
        else:
            self.recorder.say(
                [
                    f"stopped by {interrupt.name}: saved {self.saved}\n"
                    "run the same command again to continue from there"
                ]
            )
        return Summary(
            self.saved, progress.step, progress.tokens, is_finished, validation, interrupt.number
        )
