"""What learns: the model, its moments, the step that moves them, and how far they came.

Which batch comes next is a function of the sample counter alone, and learning rate, batch size and
loss weights are functions of the tokens seen: `Progress` is all that a step has to know.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rorqual.data import Batch
from rorqual.errors import TrainingError, listing
from rorqual.model.flops import training_flops_per_token
from rorqual.ops.ceilings import Peak
from rorqual.ops.device import to_device
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import Progress, Resumed
from rorqual.train.meters import Laps, Meters
from rorqual.train.optimizer import AdamW
from rorqual.train.ranks import OneRank, Ranks
from rorqual.train.recipe import Recipe
from rorqual.train.recompute import recompute
from rorqual.train.start import start_model
from rorqual.train.step import InTurn, Stepper, StepResult, StepValues


@dataclass(frozen=True)
class StepMade:
    """A step: what it found, at which rate and weights, on how many sequences, how fast."""

    result: StepResult
    values: StepValues
    num_sequences: int
    tokens_per_second: float
    bytes_sent: tuple[int, int] = (0, 0)
    """By all ranks, for tokens on their way to experts: within nodes and between them."""


class Learner:
    """A fresh one, or one that a checkpoint gave back."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        resumed: Resumed | None,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.device, self.ranks = recipe, device, ranks or OneRank()
        if resumed is not None:
            self.model, self.progress = resumed.model, resumed.progress
        else:
            seed_all(recipe.seed)
            self.model, self.progress = start_model(recipe, data.tokenizer).to(device), Progress()
        self.model.train()
        recompute(self.model, recipe.training.activation_checkpointing)
        self.batches = recipe.batches(data, self.model)
        self.laps = laps = Laps(device)
        root = recipe.root(self.model)
        self.spread = self.ranks.spread(self.model, root)
        if resumed is not None and self.ranks.world == 1:
            self.optimizer = resumed.optimizer
        else:
            self.optimizer = AdamW(self.model, recipe.optimizer)
            if resumed is not None:
                self.optimizer.take(resumed.optimizer, self.spread.own)
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            InTurn(
                self.model,
                root,
                use_compile=recipe.training.compile,
                laps=laps,
                spread=self.spread,
            ),
            micro_batch_size=recipe.training.micro_batch_size,
            precision=recipe.training.precision,
            laps=laps,
            ranks=self.ranks,
        )

    @property
    def is_finished(self) -> bool:
        return self.progress.tokens >= self.recipe.training.total_tokens

    def meters(self, peak: Peak | None) -> Meters:
        config, length = self.model.config, self.recipe.training.sequence_length
        flops = training_flops_per_token(config, length)
        sparse = tuple(filter(config.is_moe_layer, range(config.num_layers_with_mtp)))
        return Meters(self.laps, self.device, flops, peak, self.ranks.world, sparse)

    def step(self, saved: Path | None) -> StepMade:
        """The next batch and what it moves; TrainingError, which names the checkpoint `saved`."""
        recipe, progress = self.recipe, self.progress
        started = time.monotonic()
        total, micro = recipe.training.total_tokens, recipe.training.micro_batch_size
        num_sequences = recipe.batch_ramp.at(progress.tokens, total, micro)
        batch = self.batches.batch(
            progress.samples, num_sequences, self.ranks.replica, self.ranks.num_replicas
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
        try:
            result = self._move(batch, values)
        except TrainingError as problem:
            mend = "change the recipe and begin anew: there is no checkpoint yet"
            if saved is not None:
                mend = f"the last checkpoint is {saved}; change the recipe, continue from it"
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
        speed = (tokens - progress.tokens) / seconds
        return StepMade(result, values, num_sequences, speed, self._bytes_sent())

    def _bytes_sent(self) -> tuple[int, int]:
        if self.ranks.world == 1:
            return 0, 0
        own = torch.tensor(self.spread.bytes_sent(), device=self.device)
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
