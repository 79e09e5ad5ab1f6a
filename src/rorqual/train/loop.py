"""The training loop: take a batch, make a step, write it down; now and then validate and save.

The whole state is the checkpoint's: weights, moments, router bias, random states and three
counters. Which batch comes next is a function of the sample counter alone, and learning rate, batch
size and loss weights are functions of the tokens seen, so a run continued from a checkpoint equals
one that was never interrupted, bit for bit (CPU, same number of threads and ranks). What a jump of
the loss makes it leave out is written down beside the checkpoints (`spikes.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from rorqual.errors import TrainingError, UsageError
from rorqual.files import atomic_write
from rorqual.locks import FolderLock
from rorqual.ops.ceilings import Peak
from rorqual.ops.device import resolve_device
from rorqual.train.batches import Measurement, TrainingData
from rorqual.train.begin import Begun, begin
from rorqual.train.checkpoint import latest_checkpoint, remove_leftovers
from rorqual.train.interrupt import Interrupt, deterministic, threads, threads_note
from rorqual.train.plots import plots_note
from rorqual.train.ranks import OneRank, Ranks
from rorqual.train.recipe import Recipe, toml_text
from rorqual.train.recorder import NoRecorder, Recorder
from rorqual.train.saver import Saver
from rorqual.train.spikes import Skip, Skipped
from rorqual.train.step import NotFinite


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
        deterministic(on, recipe.training.deterministic),
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
    ranks = place.ranks
    if not resume and latest_checkpoint(run_folder) is not None:
        raise UsageError(
            "already holds a training run", where=run_folder, fix="choose another run folder"
        )
    if ranks.is_first:
        remove_leftovers(run_folder)
    with Interrupt(is_one_of_many=ranks.world > 1, is_quiet=not ranks.is_first) as interrupt:
        run = _Run(recipe, run_folder, data, place, allow_changes)
        recorder: Recorder | NoRecorder = NoRecorder()
        if ranks.is_first:
            with atomic_write(run_folder / "recipe.toml", "w") as file:
                file.write(toml_text(recipe.table()))
            meters = run.learner.meters(place.peak)
            progress = run.learner.progress
            recorder = Recorder(recipe, run_folder, progress, meters, place.is_quiet)
        with recorder, run.saver:
            return run.until(interrupt, recorder)


class Jump(NamedTuple):
    """A step that is not to be kept, and why."""

    step: int
    problem: TrainingError

    def __str__(self) -> str:
        what, found = self.problem.what, self.problem.found
        return what if found is None else f"{what}: {found}"


class _Run:
    """One run between its steps: when to validate, to save, to go back and to end."""

    recorder: Recorder | NoRecorder

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: TrainingData,
        place: _Place,
        allow_changes: bool,
    ) -> None:
        self.recipe, self.folder, self.data = recipe, folder, data
        self.place, self.ranks = place, place.ranks
        self.skipped = Skipped(folder, is_writer=self.ranks.is_first)
        begun = self._begin(allow_changes)
        self.learner, self.lines = begun.learner, begun.lines
        self.saver = Saver(recipe, folder, data, self.ranks, begun)
        self.number = begun.learner.progress.step + 1  # of the step in work

    def _begin(self, allow_changes: bool = False) -> Begun:
        return begin(
            self.recipe,
            self.folder,
            self.data,
            self.place.device,
            self.skipped,
            self.ranks,
            allow_changes=allow_changes,
        )

    def until(self, interrupt: Interrupt, recorder: Recorder | NoRecorder) -> Summary:
        """Steps to the end or to an interrupt, with checkpoints and validations on the way."""
        self.recorder = recorder
        with self.ranks.waiting(lambda: f"step {self.number}"):
            validation = self._steps(interrupt)
            # Once is enough: to write it again would put the only whole checkpoint at risk.
            if self.saver.folder is None or self.saver.progress != self.learner.progress:
                self._save()
            self.saver.wait()
            self._is_stopped(interrupt)  # so that all ranks end alike
        return self._summary(interrupt, validation)

    def _steps(self, interrupt: Interrupt) -> Measurement | None:
        """The last validation, if there was one."""
        validation: Measurement | None = None
        last_save = time.monotonic()
        self._announce()
        while not self.learner.is_finished and not self._is_stopped(interrupt):
            before = self.learner.progress.tokens
            if (jump := self._step()) is not None:
                self._go_back(jump)
                continue
            is_last = self.learner.is_finished
            if self._is_due(self.recipe.validation.every_tokens, before) or is_last:
                validation = self._validate()
            minutes = self.recipe.checkpoint.every_minutes
            is_time = minutes is not None and time.monotonic() - last_save >= minutes * 60
            is_due = self._is_due(self.recipe.checkpoint.every_tokens, before)
            # Clocks differ: the ranks save together.
            if is_last or is_due or self.ranks.agree(is_time):
                self._save()
                last_save = time.monotonic()
        return validation

    def _step(self) -> Jump | None:
        """A jump, where the step that was made is not to be kept."""
        self.number = self.learner.progress.step + 1
        try:
            made = self.learner.step()
        except NotFinite as problem:
            # Without its frames, which would keep the whole model in memory.
            return Jump(self.number, problem.with_traceback(None))
        if (why := self.learner.usual.look(made.result)) is not None:
            return Jump(self.number, TrainingError(why))
        self.recorder.step(self.learner.progress, made)
        return None

    def _go_back(self, jump: Jump) -> None:
        """To the last checkpoint, and leaves out the samples of the last batches from now on."""
        self.saver.wait()
        limit, step_kept = self.recipe.spikes.rollbacks, self.saver.progress.step
        if not limit:
            tokens = self.learner.progress.tokens
            raise self._failed(f"step {jump.step} failed after {tokens} tokens: {jump.problem}")
        if self.skipped.num_rollbacks_to(step_kept) >= limit:
            raise self._failed(
                f"step {jump.step} failed once more, after {limit} rollbacks to step {step_kept}: "
                f"{jump.problem}"
            )
        taken = list(self.learner.taken)
        del self.learner  # before another takes its memory
        begun = self._begin()
        self.learner, kept = begun.learner, begun.learner.progress
        self.saver.folder, self.saver.progress = begun.folder, kept
        skip = Skip(
            first=max(taken[0][0], kept.samples),
            stop=taken[-1][1],
            rolled_back_to=kept.step,
            step=jump.step,
            why=str(jump),
        )
        self.skipped.add(skip)
        self.recorder.rollback(kept, skip, self.learner.meters(self.place.peak))
        self.recorder.say(
            [
                f"step {jump.step}: {skip.why}; going back to step {kept.step} and leaving out "
                f"samples {skip.first:,} to {skip.stop - 1:,}",
                *begun.lines,
            ]
        )

    def _failed(self, what: str) -> TrainingError:
        mend = "change the recipe and begin anew: there is no checkpoint yet"
        if self.saver.folder is not None:
            mend = (
                f"the last checkpoint is {self.saver.folder}; change the recipe, continue from it"
            )
        return TrainingError(what, fix=mend)

    def _validate(self) -> Measurement | None:
        if self.data.held_out is None:
            return None
        found = self.learner.measure(self.data.held_out)
        self.recorder.validation(self.learner.progress, found)
        return found

    def _save(self) -> None:
        self.recorder.load(self.learner.progress)
        self.saver.save(self.learner)
        self.recorder.plots(self.learner.is_finished)

    def _is_stopped(self, interrupt: Interrupt) -> bool:
        """Whether a signal came, to whichever rank."""
        number = self.ranks.agree(interrupt.number or 0)
        if number and not interrupt.is_set:
            interrupt.number = number
        return number > 0

    def _is_due(self, every_tokens: int | None, before: int) -> bool:
        """Whether the last step crossed a multiple of `every_tokens`."""
        return every_tokens is not None and before // every_tokens < (
            self.learner.progress.tokens // every_tokens
        )

    def _announce(self) -> None:
        progress, total = self.learner.progress, self.recipe.training.total_tokens
        lines = [f"training on {self.place.device}", *self.lines]
        if self.learner.is_finished:
            lines.append(f"nothing to train: training.total_tokens is {total:,}")
        elif self.saver.folder is not None:
            self.recorder.resume(progress)
        lines += [*self.data.notes, *threads_note(self.recipe.training.threads), *plots_note()]
        if self.data.learnt is not None:
            lines.append(self.data.learnt)
        if self.recipe.training.compile:
            lines.append("compiling the step: the first one takes a minute or two")
        self.recorder.say(lines)

    def _summary(self, interrupt: Interrupt, validation: Measurement | None) -> Summary:
        saved = self.saver.folder
        assert saved is not None, "a run ends with a checkpoint"
        progress, is_finished = self.learner.progress, self.learner.is_finished
        if is_finished:
            self.recorder.say([f"finished: {saved}"])
        else:
            self.recorder.say(
                [
                    f"stopped by {interrupt.name}: saved {saved}\n"
                    "run the same command again to continue from there"
                ]
            )
        step, tokens = progress.step, progress.tokens
        return Summary(saved, step, tokens, is_finished, validation, interrupt.number)
