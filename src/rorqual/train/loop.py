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
from rorqual.train.put_together import whole_model, whole_moments
from rorqual.train.ranks import OneRank, Ranks
from rorqual.train.recipe import Recipe, toml_text
from rorqual.train.recorder import NoRecorder, Recorder


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
    ranks: Ranks | None = None,
    peak: Callable[[], Peak | None] | None = None,
) -> Summary:
    """Trains until the recipe's total tokens, or until SIGINT, SIGTERM or SIGHUP; then saves.

    With `resume` the latest checkpoint in `run_folder` is continued, if there is one; without it,
    a folder that holds checkpoints is an error. `allow_changes` continues it with another schedule
    or optimiser, and says what that moves. torch's threads and modes are as before afterwards.
    A second process in the folder is refused (UsageError), unless `ranks` say who shares it: then
    the caller's first rank holds `run_lock`. `device` as in `resolve_device`. `peak` is asked, with
    the run's threads, for what MFU is a share of; without it there is none.
    """
    on = resolve_device(device)
    with (
        run_lock(Path(run_folder)) if ranks is None else nullcontext(),
        threads(recipe.training.threads),
        deterministic(on),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        ranks = ranks or OneRank()
        most = peak() if peak is not None and ranks.is_first else None
        place = _Place(device=on, ranks=ranks, peak=most, is_quiet=is_quiet)
        return _train(recipe, Path(run_folder), data, resume, allow_changes, place)


def run_lock(run_folder: Path) -> FolderLock:
    """Keeps a run folder to one process, from before its data is prepared to its last write."""
    return FolderLock(
        run_folder,
        "another process trains in this run folder",
        fix="choose another folder with --run",
    )


@dataclass(frozen=True)
class _Place:
    """Where a run happens, and how it is seen there."""

    device: torch.device
    ranks: Ranks
    peak: Peak | None
    is_quiet: bool


def _train(
    recipe: Recipe,
    run_folder: Path,
    data: TrainingData,
    resume: bool,
    allow_changes: bool,
    place: _Place,
) -> Summary:
    device, ranks = place.device, place.ranks
    found = checkpoint_files.latest_checkpoint(run_folder)
    if found is not None and not resume:
        raise UsageError(
            "already holds a training run", where=run_folder, fix="choose another run folder"
        )
    if ranks.is_first:
        checkpoint_files.remove_leftovers(run_folder)
    with Interrupt(is_one_of_many=ranks.world > 1, is_quiet=not ranks.is_first) as interrupt:
        resumed: checkpoint_files.Resumed | None = None
        if found is not None:
            resumed = checkpoint_files.load_checkpoint(
                found,
                recipe,
                device=device,
                data=data,
                allow_changes=allow_changes,
            )
        learner = Learner(recipe, data, resumed, device, ranks)
        recorder: Recorder | NoRecorder = NoRecorder()
        if ranks.is_first:
            with atomic_write(run_folder / "recipe.toml", "w") as file:
                file.write(toml_text(recipe.table()))
            meters = learner.meters(place.peak)
            recorder = Recorder(recipe, run_folder, learner.progress, meters, place.is_quiet)
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
        recorder: Recorder | NoRecorder,
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
        with learner.ranks.waiting(lambda: f"step {learner.progress.step + 1}"):
            validation = self._steps(interrupt)
            # Once is enough: to write it again would put the only whole checkpoint at risk.
            if self.saved_step != learner.progress.step:
                self._save()
            self._is_stopped(interrupt)  # so that all ranks end alike
        return self._summary(interrupt, validation)

    def _steps(self, interrupt: Interrupt) -> Measurement | None:
        """The last validation, if there was one."""
        learner = self.learner
        validation: Measurement | None = None
        last_save = time.monotonic()
        self._announce()
        while not learner.is_finished and not self._is_stopped(interrupt):
            before = learner.progress.tokens
            made = learner.step(self.saved)
            self.recorder.step(learner.progress, made)
            is_last = learner.is_finished
            if self._is_due(self.recipe.validation.every_tokens, before) or is_last:
                validation = self._validate()
            minutes = self.recipe.checkpoint.every_minutes
            is_time = minutes is not None and time.monotonic() - last_save >= minutes * 60
            is_due = self._is_due(self.recipe.checkpoint.every_tokens, before)
            # Clocks differ: the ranks save together.
            if is_last or is_due or learner.ranks.agree(is_time):
                self._save()
                last_save = time.monotonic()
        return validation

    def _validate(self) -> Measurement | None:
        if self.data.held_out is None:
            return None
        with self.learner.spread.measuring():
            found = self.data.held_out.measure(self.learner.model)
        self.recorder.validation(self.learner.progress, found)
        return found

    def _save(self) -> None:
        learner = self.learner
        self.recorder.load(learner.progress)
        ranks, spread = learner.ranks, learner.spread
        model = whole_model(learner.model, spread, is_first=ranks.is_first)
        moments = whole_moments(learner.optimizer, spread, is_first=ranks.is_first)
        if model is not None and moments is not None:
            checkpoint_files.save_checkpoint(
                self.folder, self.recipe, model, moments, learner.progress, data=self.data
            )
        ranks.agree(0, is_patient=True)  # none goes on before it is there
        self.saved = checkpoint_files.checkpoint_folder(self.folder, learner.progress)
        self.saved_step = learner.progress.step
        self.recorder.plots(learner.is_finished)

    def _is_stopped(self, interrupt: Interrupt) -> bool:
        """Whether a signal came, to whichever rank."""
        number = self.learner.ranks.agree(interrupt.number or 0)
        if number and not interrupt.is_set:
            interrupt.number = number
        return number > 0

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
