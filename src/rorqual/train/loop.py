"""The training loop: take a batch, make a step, write it down; now and then validate and save.

The whole state is the checkpoint's: weights, moments, router bias, random states and three
counters. Which batch comes next is a function of the sample counter alone, and learning rate, batch
size and loss weights are functions of the tokens seen, so a run continued from a checkpoint equals
one that was never interrupted, bit for bit (CPU, same number of threads).
"""

from __future__ import annotations

import os
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rorqual.data import Batch
from rorqual.errors import TrainingError, UsageError, listing
from rorqual.files import atomic_write
from rorqual.locks import FolderLock
from rorqual.ops.device import resolve_device, to_device
from rorqual.train import checkpoint as checkpoint_files
from rorqual.train.batches import Measurement, TrainingData
from rorqual.train.checkpoint import Progress
from rorqual.train.interrupt import Interrupt, deterministic, threads, threads_note
from rorqual.train.metrics import MetricsLog
from rorqual.train.optimizer import AdamW
from rorqual.train.plots import plots_note, write_plots
from rorqual.train.recipe import Recipe, toml_text
from rorqual.train.recompute import recompute_layers
from rorqual.train.report import Report
from rorqual.train.router_bias import max_violation
from rorqual.train.start import start_model
from rorqual.train.step import InTurn, Stepper, StepResult, StepValues

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_PLOTS = 30.0


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
) -> Summary:
    """Trains until the recipe's total tokens, or until SIGINT, SIGTERM or SIGHUP; then saves.

    With `resume` the latest checkpoint in `run_folder` is continued, if there is one; without it,
    a folder that holds checkpoints is an error. `allow_changes` continues it with another schedule
    or optimiser, and says what that moves. torch's threads and modes are as before afterwards.
    `is_locked` says that the caller holds `run_lock`; otherwise a second process in the folder is
    refused here (UsageError). `device` as in `resolve_device`.
    """
    place = resolve_device(device)
    with (
        nullcontext() if is_locked else run_lock(Path(run_folder)),
        threads(recipe.training.threads),
        deterministic(place),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _train(recipe, Path(run_folder), data, resume, allow_changes, place, is_quiet)


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
        run = _Run(recipe, run_folder, data, resumed, device, is_quiet)
        try:
            return run.until(interrupt)
        finally:
            run.metrics.close()


class _Run:
    """One run's state between steps."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: TrainingData,
        resumed: checkpoint_files.Resumed | None,
        device: torch.device,
        is_quiet: bool,
    ) -> None:
        self.recipe, self.folder, self.data, self.device = recipe, folder, data, device
        if resumed is not None:
            self.model, self.optimizer = resumed.model, resumed.optimizer
            self.progress = resumed.progress
        else:
            seed_all(recipe.seed)
            self.model = start_model(recipe, data.tokenizer).to(device)
            self.optimizer = AdamW(self.model, recipe.optimizer)
            self.progress = Progress()
        self.saved: Path | None = resumed.folder if resumed else None
        self.saved_step = self.progress.step if resumed else None
        self.changes = resumed.changes if resumed else []
        self.model.train()
        if recipe.training.activation_checkpointing:
            recompute_layers(self.model)
        self.batches = recipe.batches(data, self.model)
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            InTurn(self.model, recipe.root(self.model), use_compile=recipe.training.compile),
            micro_batch_size=recipe.training.micro_batch_size,
            precision=recipe.training.precision,
        )
        with atomic_write(folder / "recipe.toml", "w") as file:
            file.write(toml_text(recipe.table()))
        self.metrics = MetricsLog(folder / METRICS, self.progress.step)
        self.report = Report(recipe.training.total_tokens, self.progress.tokens, is_quiet)
        self.loads_LE: Tensor | None = None
        self.last_plot = time.monotonic()

    def until(self, interrupt: Interrupt) -> Summary:
        """Steps to the end or to an interrupt, with checkpoints and validations on the way."""
        total = self.recipe.training.total_tokens
        validation: Measurement | None = None
        last_save = time.monotonic()
        with self.report:
            self._announce()
            while self.progress.tokens < total and not interrupt.is_set:
                before = self.progress.tokens
                self._step()
                is_last = self.progress.tokens >= total
                if self._is_due(self.recipe.validation.every_tokens, before) or is_last:
                    validation = self._validate()
                minutes = self.recipe.checkpoint.every_minutes
                is_time = minutes is not None and time.monotonic() - last_save >= minutes * 60
                is_due = self._is_due(self.recipe.checkpoint.every_tokens, before)
                if is_last or is_due or is_time:
                    self._save()
                    last_save = time.monotonic()
            is_finished = self.progress.tokens >= total
            # Once is enough: to write it again would put the only whole checkpoint at risk.
            if self.saved_step != self.progress.step:
                self._save()
            return self._summary(is_finished, interrupt, validation)

    def _step(self) -> None:
        recipe, progress = self.recipe, self.progress
        started = time.monotonic()
        total, micro = recipe.training.total_tokens, recipe.training.micro_batch_size
        num_sequences = recipe.batch_ramp.at(progress.tokens, total, micro)
        batch = self.batches.batch(progress.samples, num_sequences, rank=0, world=1)
        self._check_form(batch)
        tokens = progress.tokens + num_sequences * recipe.training.sequence_length
        values = StepValues(
            lr=recipe.lr_schedule.at(tokens, total),
            mtp_weight=recipe.mtp.weight_at(progress.tokens, total),
            balance_alpha=recipe.balance.sequence_alpha,
            bias_update_speed=recipe.balance.speed_at(progress.tokens, total),
        )
        try:
            documents_BS = batch.documents_BS
            result = self.stepper.step(
                to_device(batch.tokens_BS, self.device),
                to_device(batch.mask_BS, self.device),
                values,
                None if documents_BS is None else to_device(documents_BS, self.device),
                {name: to_device(rows, self.device) for name, rows in batch.extras.items()},
            )
        except TrainingError as problem:
            mend = "change the recipe and begin anew: there is no checkpoint yet"
            if self.saved is not None:
                mend = f"the last checkpoint is {self.saved}; change the recipe, continue from it"
            raise TrainingError(
                f"step {progress.step + 1} failed after {progress.tokens} tokens: {problem}",
                fix=mend,
            ) from None
        seconds = time.monotonic() - started
        self.progress = Progress(
            step=progress.step + 1,
            tokens=tokens,
            samples=progress.samples + num_sequences,
            seconds=progress.seconds + seconds,
        )
        self._record(result, values, num_sequences, (tokens - progress.tokens) / seconds)

    def _record(
        self, result: StepResult, values: StepValues, num_sequences: int, speed: float
    ) -> None:
        loads_LE = result.loads_LE
        self.loads_LE = loads_LE if self.loads_LE is None else self.loads_LE + loads_LE
        max_vio_L = max_violation(loads_LE)
        has_layers = max_vio_L.numel() > 0
        self.metrics.write(
            "step",
            self.progress.step,
            tokens=self.progress.tokens,
            loss=result.loss,
            main=result.main,
            mtp=result.mtp,
            balance=result.balance,
            lr=values.lr,
            mtp_weight=values.mtp_weight,
            grad_norm=result.grad_norm,
            batch=num_sequences,
            targets=result.num_targets,
            tokens_per_second=round(speed, 1),
            max_vio_mean=float(max_vio_L.mean()) if has_layers else 0.0,
            max_vio_max=float(max_vio_L.max()) if has_layers else 0.0,
            **({"metrics": result.metrics} if result.metrics else {}),
        )
        self.report.step(
            self.progress.step, self.progress.tokens, result.main, speed, result.metrics
        )

    def _validate(self) -> Measurement | None:
        if self.data.held_out is None:
            return None
        found = self.data.held_out.measure(self.model)
        step, tokens = self.progress.step, self.progress.tokens
        self.metrics.write("validation", step, tokens=tokens, **found.record())
        self.report.line(f"step {step}: {found}")
        return found

    def _save(self) -> None:
        if self.loads_LE is not None:
            loads = self.loads_LE / self.loads_LE.float().mean(-1, keepdim=True).clamp(min=1e-20)
            rows = [[round(value, 3) for value in row] for row in loads.tolist()]
            self.metrics.write("load", self.progress.step, load=rows)
            self.loads_LE = None
        self.saved = checkpoint_files.save_checkpoint(
            self.folder,
            self.recipe,
            self.model,
            self.optimizer,
            self.progress,
            data=self.data,
        )
        self.saved_step = self.progress.step
        # Choice: plots take a second, so checkpoints in quick succession share one drawing.
        is_last = self.progress.tokens >= self.recipe.training.total_tokens
        if is_last or time.monotonic() - self.last_plot > SECONDS_BETWEEN_PLOTS:
            write_plots(self.folder / METRICS, self.folder / "plots")
            self.last_plot = time.monotonic()

    def _is_due(self, every_tokens: int | None, before: int) -> bool:
        """Whether the last step crossed a multiple of `every_tokens`."""
        return every_tokens is not None and before // every_tokens < (
            self.progress.tokens // every_tokens
        )

    def _check_form(self, batch: Batch) -> None:
        num_samples, width = batch.tokens_BS.shape
        wrong = [name for name, rows in batch.extras.items() if rows.shape[:1] != (num_samples,)]
        if wrong:
            raise TrainingError(
                "the loader's samples do not fit the recipe",
                found=f"{listing(wrong)} without a row for each sample",
                expected=f"Batch.extras of {num_samples} rows, as the tokens have",
            )
        expected = (
            self.recipe.training.sequence_length + 1 + self.model.config.num_nextn_predict_layers
        )
        if width != expected:
            raise TrainingError(
                "the loader's samples do not fit the recipe",
                found=f"{width} tokens a sample",
                expected=f"sequence_length + 1 + MTP depth = {expected}",
            )
        if self.recipe.is_isolated != (batch.documents_BS is not None):
            raise TrainingError(
                "the loader's samples do not fit the recipe",
                found="no numbers of documents" if self.recipe.is_isolated else "documents",
                expected="Batch.documents_BS where documents are isolated, and nowhere else",
                fix="make the loader with the recipe's isolation (rorqual.train.prepare does)",
            )

    def _announce(self) -> None:
        self.report.line(f"training on {self.device}")
        if self.saved is not None:
            self.report.line(f"continuing {self.saved} at {self.progress.tokens:,} tokens")
        for line in self.changes:
            self.report.line(line)
        total = self.recipe.training.total_tokens
        if self.progress.tokens >= total:
            self.report.line(f"nothing to train: training.total_tokens is {total:,}")
        notes = self.data.notes
        for line in (*notes, *threads_note(self.recipe.training.threads), *plots_note()):
            self.report.line(line)
        if self.data.learnt is not None:
            self.report.line(self.data.learnt)
        if self.recipe.training.compile:
            self.report.line("compiling the step: the first one takes a minute or two")

    def _summary(
        self, is_finished: bool, interrupt: Interrupt, validation: Measurement | None
    ) -> Summary:
        assert self.saved is not None, "a run ends with a checkpoint"
        if is_finished:
            self.report.line(f"finished: {self.saved}")
        else:
            self.report.line(
                f"stopped by {interrupt.name}: saved {self.saved}\n"
                "run the same command again to continue from there"
            )
        step, tokens = self.progress.step, self.progress.tokens
        return Summary(self.saved, step, tokens, is_finished, validation, interrupt.number)


def seed_all(seed: int) -> None:
    """Seeds torch, Python and NumPy (which takes 32 bits)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
