"""Held-out loss in bits per byte: independent of the tokenizer, so comparable with gzip's.

bits per byte = sum of nats / ln 2 / bytes. Choice: targets that stand for no byte of the text
(special tokens) count on neither side; with masks, neither do targets outside them.
"""

# B sequences, T inputs, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from rorqual.data import Batch
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer
from rorqual.train.batches import Batches, HeldOutPart, TokenLosses
from rorqual.train.loss import target_mask


@dataclass(frozen=True)
class Validation:
    """Sums over the held-out targets, and the two ratios of them."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.num_tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    def record(self) -> dict[str, float | int]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats_per_token,
            "num_bytes": self.num_bytes,
        }

    def __str__(self) -> str:
        return f"held out {self.bits_per_byte:.4f} bits a byte"


class LossesInTurn:
    """`TokenLosses` of a model that is here whole."""

    num_together = 1

    def __init__(self, model: DeepseekV3) -> None:
        self.model = model

    def __call__(self, parts: Sequence[HeldOutPart]) -> list[Tensor]:
        return [self._losses(part) for part in parts]

    def _losses(self, part: HeldOutPart) -> Tensor:
        model = self.model
        inputs_BT, targets_BT = part.inputs_BT.to(model.device), part.targets_BT.to(model.device)
        documents_BT = part.documents_BT
        if documents_BT is not None:
            documents_BT = documents_BT.to(model.device)
        h_BTD = model.hidden(inputs_BT, model.model.step(inputs_BT, documents_BT))
        return model.token_losses(h_BTD.flatten(0, 1), targets_BT.flatten())


@dataclass(frozen=True)
class HeldOutText:
    """The first samples of held-out text; `bytes_V` as `bytes_of_ids` has it."""

    batches: Batches
    bytes_V: Tensor
    num_samples: int
    batch_size: int
    num_inputs: int

    def measure(self, model: DeepseekV3, losses: TokenLosses | None = None) -> Validation:
        return validate(
            model,
            self.batches,
            self.bytes_V,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            num_inputs=self.num_inputs,
            losses=losses,
        )


def bytes_of_ids(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(V,) int64: how many bytes of text each id stands for; 0 for special and unused ids."""
    lengths = [len(tokenizer.bytes_of_text(i)) for i in range(tokenizer.vocab_size)]
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)))


@torch.no_grad()
def validate(
    model: DeepseekV3,
    held_out: Batches,
    bytes_V: Tensor,
    *,
    num_samples: int,
    batch_size: int,
    num_inputs: int,
    losses: TokenLosses | None = None,
) -> Validation:
    """The main model's loss on samples 0 .. num_samples - 1, in the model's current weights;
    `losses` are `LossesInTurn(model)` if left out.

    Where the batches number their documents, packed documents do not see each other.
    """
    losses = losses or LossesInTurn(model)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    starts = range(0, num_samples, batch_size)
    sizes = [(start, min(batch_size, num_samples - start)) for start in starts]
    with evaluating(model):
        for group in _groups(sizes, losses.num_together):
            batches = [held_out.batch(*place, rank=0, world=1) for place in group]
            parts = [_part(batch, num_inputs) for batch in batches]
            for part, losses_N in zip(parts, losses(parts), strict=True):
                lengths_BT = bytes_V[part.targets_BT]
                counts_BT = part.is_target_BT & (lengths_BT > 0)
                nats += float(losses_N.cpu().double()[counts_BT.flatten()].sum())
                num_tokens += int(counts_BT.sum())
                num_bytes += int(lengths_BT[counts_BT].sum())
    return Validation(nats, num_tokens, num_bytes)


def _groups(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring (start, size) of equal size, `most` together."""
    for _, equal in groupby(sizes, key=lambda each: each[1]):
        each = list(equal)
        yield from (each[i : i + most] for i in range(0, len(each), most))


def _part(batch: Batch, num_inputs: int) -> HeldOutPart:
    tokens_BS, documents_BS = batch.tokens_BS, batch.documents_BS
    return HeldOutPart(
        tokens_BS[:, :num_inputs],
        tokens_BS[:, 1 : num_inputs + 1],
        target_mask(batch.mask_BS, 0, num_inputs, documents_BS),
        None if documents_BS is None else documents_BS[:, :num_inputs],
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back, after an error too."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
