"""What learns: the model, its moments, the step that moves them, and how far they came.

Which batch comes next is a function of the sample counter alone, and learning rate, batch size and
loss weights are functions of the tokens seen: `Progress` is all that a step has to know.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.data import Batch
from rorqual.errors import TrainingError, listing
from rorqual.model.flops import training_flops_per_token
from rorqual.ops.ceilings import Peak
from rorqual.ops.device import to_device
from rorqual.parallel import TimedPipeline
from rorqual.train.accumulation import accumulation
from rorqual.train.batches import HeldOut, Measurement, TrainingData
from rorqual.train.checkpoint import Progress, Standing
from rorqual.train.ema import Ema
from rorqual.train.in_pipeline import InPipeline, LossesInPipeline
from rorqual.train.meters import Laps, Meters
from rorqual.train.optimizer import AdamW
from rorqual.train.pieces import Piece, piece_of_whole
from rorqual.train.ranks import Ranks, local
from rorqual.train.recipe import Recipe
from rorqual.train.recompute import recompute
from rorqual.train.restore import has_average, restore_counters, restore_tensors
from rorqual.train.spikes import Skipped, Usual
from rorqual.train.start import saved_model, start_model
from rorqual.train.step import Stepper, StepResult, StepValues
from rorqual.weights.parameters_source import EMA


@dataclass(frozen=True)
class StepMade:
    """A step: what it found, at which rate and weights, on how many sequences, how fast."""

    result: StepResult
    values: StepValues
    num_sequences: int
    tokens_per_second: float
    bytes_sent: tuple[int, int] = (0, 0)
    """By all ranks, for tokens on their way to experts: within nodes and between them."""
    timeline: TimedPipeline | None = None
    """Of the one step that the recipe wants it of."""


class Learner:
    """A fresh one, or one as a checkpoint has it.

    `taken` are the samples, as (first, stop), of the last steps. `notes` are lines to read before
    the next one.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        device: torch.device,
        found: Standing | None,
        skipped: Skipped,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.device, self.skipped, self.ranks = recipe, device, skipped, ranks
        self.progress = found.progress if found is not None else Progress()
        if found is not None:
            self.model = saved_model(recipe, found.folder, ranks).to(device)
        else:
            seed_all(recipe.seed)
            self.model = start_model(recipe, data.tokenizer, ranks).to(device)
        self.model.train()
        recompute(self.model, recipe.training.activation_checkpointing)
        self.batches = recipe.batches(data, self.model)
        self.laps = laps = Laps(device)
        self.accumulate, self.spread = accumulation(recipe, self.model, ranks, laps)
        self.optimizer = AdamW(self.model, recipe.optimizer)
        self.optimizer.copies = self.accumulate.copies
        self.notes: list[str] = []
        self.ema: Ema | None = None
        if recipe.ema.decay is not None:
            self.ema = Ema(self.optimizer, recipe.ema.decay)
        self.usual = Usual(recipe.spikes, found.state.get("usual") if found else None)
        self.taken = deque[tuple[int, int]](maxlen=recipe.spikes.skip)
        if found is not None:
            self._restore(found)
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            self.accumulate,
            micro_batch_size=recipe.training.micro_batch_size,
            precision=recipe.training.precision,
            laps=laps,
            ranks=ranks,
        )

    def _restore(self, found: Standing) -> None:
        """All but the weights."""
        pieces = dict(self._moments())
        if self.ema is not None:
            if has_average(found.folder):
                pieces |= self._average()
            else:
                self.notes.append("the average of the parameters (ema.decay) begins here")
        restore_tensors(found.folder, pieces)
        self.optimizer.num_steps = restore_counters(found)

    @property
    def is_finished(self) -> bool:
        return self.progress.tokens >= self.recipe.training.total_tokens

    def meters(self, peak: Peak | None) -> Meters:
        config, length = self.model.config, self.recipe.training.sequence_length
        flops = training_flops_per_token(config, length)
        sparse = tuple(filter(config.is_moe_layer, range(config.num_layers_with_mtp)))
        return Meters(self.laps, self.device, flops, peak, self.ranks.world, sparse)

    def pieces(self) -> dict[str, Piece]:
        """All tensors of its state by name, as they lie on this rank."""
        stored = self.model.state_dict().keys()
        buffers = ((name, b) for name, b in self.model.named_buffers() if name in stored)
        pieces = {name: self._piece(name, value) for name, value in self.optimizer.named.items()}
        pieces |= {name: piece_of_whole(buffer) for name, buffer in buffers}
        pieces |= self._moments()
        if self.ema is not None:
            self.ema.wait()
            pieces |= self._average()
        return pieces

    def _piece(self, name: str, value: Tensor) -> Piece:
        """Of a parameter, or of what is as large."""
        own = local(value).detach()
        start, total = self.spread.place(name, own)
        return Piece(own, (total, *own.shape[1:]), (start, *[0] * (own.dim() - 1)))

    def _moments(self) -> Iterator[tuple[str, Piece]]:
        for key, value in self.optimizer.state_tensors().items():
            yield key, self._piece(key.partition(".")[2], value)

    def _average(self) -> Iterator[tuple[str, Piece]]:
        assert self.ema is not None, "only where one is kept"
        for name, value in self.ema.values.items():
            yield f"{EMA}{name}", self._piece(name, value)

    def measure(self, held_out: HeldOut) -> Measurement:
        """All ranks at once."""
        with self.spread.measuring():
            if isinstance(self.accumulate, InPipeline):
                return held_out.measure(self.model, LossesInPipeline(self.accumulate))
            return held_out.measure(self.model)

    def step(self) -> StepMade:
        """The next batch and what it moves; TrainingError where it moved nothing."""
        recipe, progress = self.recipe, self.progress
        started = time.monotonic()
        total, micro = recipe.training.total_tokens, recipe.training.micro_batch_size
        num_sequences = recipe.batch_ramp.at(progress.tokens, total, micro)
        first = self.skipped.after(progress.samples, num_sequences)
        self.taken.append((first, first + num_sequences))
        batch = self.batches.batch(
            first, num_sequences, self.ranks.replica, self.ranks.num_replicas
        )
        self._check_form(batch)
        self.laps.lap("data")
        tokens = progress.tokens + num_sequences * recipe.training.sequence_length
        values = StepValues(
            lr=recipe.lr_schedule.at(tokens, total),
            mtp_weight=recipe.mtp.weight_at(progress.tokens, total),
            balance_alpha=recipe.balance.sequence_alpha,
            bias_update_speed=recipe.balance.speed_at(progress.tokens, total),
        )
        self._begin_timeline()
        result = self._move(batch, values)
        if self.ema is not None:
            self.ema.follow()
        seconds = time.monotonic() - started
        self.progress = Progress(
            step=progress.step + 1,
            tokens=tokens,
            samples=first + num_sequences,
            seconds=progress.seconds + seconds,
        )
        speed = (tokens - progress.tokens) / seconds
        return StepMade(
            result, values, num_sequences, speed, self._bytes_sent(), self._end_timeline()
        )

    def _begin_timeline(self) -> None:
        if isinstance(self.accumulate, InPipeline):
            wanted = self.recipe.parallel.timeline_step
            if self.progress.step + 1 == wanted:
                self.accumulate.begin_timeline()

    def _end_timeline(self) -> TimedPipeline | None:
        if isinstance(self.accumulate, InPipeline) and self.accumulate.times.is_on:
            return self.accumulate.timeline()
        return None

    def _bytes_sent(self) -> tuple[int, int]:
        if self.ranks.world == 1:
            return 0, 0
        own = torch.tensor(self.spread.bytes_sent(), device=self.device)
        if isinstance(self.accumulate, InPipeline):
            own = self.accumulate.over_stages(own)
        within, between = self.ranks.sum(own).tolist()
        return within, between

    def _move(self, batch: Batch, values: StepValues) -> StepResult:
        documents_BS = batch.documents_BS
        return self.stepper.step(
            to_device(batch.tokens_BS, self.device),
            to_device(batch.mask_BS, self.device),
            values,
            None if documents_BS is None else to_device(documents_BS, self.device),
            {name: to_device(rows, self.device) for name, rows in batch.extras.items()},
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


def seed_all(seed: int) -> None:
    """Seeds torch, Python and NumPy (which takes 32 bits)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
