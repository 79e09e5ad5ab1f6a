"""Held-out loss in bits per byte: independent of the tokenizer, so comparable with gzip's.

bits per byte = sum of nats / ln 2 / bytes. Choice: targets that stand for no byte of the text
(special tokens) count on neither side; with masks, neither do targets outside them.
"""

# B sequences, T inputs, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer
from rorqual.train.batches import Batches
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


@dataclass(frozen=True)
class HeldOutText:
    """The first samples of held-out text; `bytes_V` as `bytes_of_ids` has it."""

    batches: Batches
    bytes_V: Tensor
    num_samples: int
    batch_size: int
    num_inputs: int

    def measure(self, model: DeepseekV3) -> Validation:
        return validate(
            model,
            self.batches,
            self.bytes_V,
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            num_inputs=self.num_inputs,
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
) -> Validation:
    """The main model's loss on samples 0 .. num_samples - 1, in the model's current weights.

    Where the batches number their documents, packed documents do not see each other.
    """
    device = model.device
    nats, num_tokens, num_bytes = 0.0, 0, 0
    with evaluating(model):
        for start in range(0, num_samples, batch_size):
            batch = held_out.batch(start, min(batch_size, num_samples - start), rank=0, world=1)
            inputs_BT = batch.tokens_BS[:, :num_inputs]
            targets_BT = batch.tokens_BS[:, 1 : num_inputs + 1]
            documents_BS = batch.documents_BS
            documents_BT: Tensor | None = None
            if documents_BS is not None:
                documents_BT = documents_BS[:, :num_inputs].to(device)
            lengths_BT = bytes_V[targets_BT]
            counts_BT = target_mask(batch.mask_BS, 0, num_inputs, documents_BS) & (lengths_BT > 0)
            inputs_BT = inputs_BT.to(device)
            h_BTD = model.hidden(inputs_BT, model.model.step(inputs_BT, documents_BT))
            losses_N = model.token_losses(h_BTD.flatten(0, 1), targets_BT.flatten().to(device))
            nats += float(losses_N.cpu().double()[counts_BT.flatten()].sum())
            num_tokens += int(counts_BT.sum())
            num_bytes += int(lengths_BT[counts_BT].sum())
    return Validation(nats, num_tokens, num_bytes)


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
