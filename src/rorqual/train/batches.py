"""What the loop needs to know of the data: samples by counter, and what they were made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rorqual.data import Batch, Inputs, PackingCounts
from rorqual.tokenizer import Tokenizer


class Batches(Protocol):
    """What the loop needs of a loader: samples by counter, so that it has no state of its own."""

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        """Samples counter .. counter + num_samples - 1 of this rank's share."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """Batches to learn from, batches held out (and how many samples those are), the tokenizer.

    `digest` names the data in checkpoints: a resume on other data is an error. None: unchecked.
    `inputs` says what it was made of, so that the error names what changed. `packing` says what an
    epoch learns of documents that are packed whole; `notes` are lines to read before the first
    step.
    """

    train: Batches
    tokenizer: Tokenizer | None = None
    held_out: Batches | None = None
    num_held_out_samples: int = 0
    digest: str | None = None
    inputs: Inputs | None = None
    packing: PackingCounts | None = None
    notes: tuple[str, ...] = ()
