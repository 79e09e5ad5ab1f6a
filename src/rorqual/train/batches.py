"""What the loop needs to know of what is learnt from, and of the work before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rorqual.data import Advance, Batch, Inputs, silent
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer


class Batches(Protocol):
    """What the loop needs of a loader: samples by counter, so that it has no state of its own."""

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        """Samples counter .. counter + num_samples - 1 of this rank's share."""
        ...


class Measurement(Protocol):
    """How good a model is on what it has not seen; as text it is a line of the report."""

    def record(self) -> dict[str, float | int]:
        """The figures of a line of kind `validation` in metrics.jsonl."""
        ...


class HeldOutPart(NamedTuple):
    """Some samples on the host: inputs, their targets and which of these count, and the documents
    that isolate the inputs.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    is_target_BT: Tensor
    documents_BT: Tensor | None


class TokenLosses(Protocol):
    """The loss of every target of some parts, (B T,) float32 each, in a model's current weights. It
    takes up to `num_together` parts of one size.
    """

    num_together: int

    def __call__(self, parts: Sequence[HeldOutPart]) -> list[Tensor]: ...


class HeldOut(Protocol):
    """What a stage keeps back to measure its model on; in a pipeline, by `losses` of it."""

    def measure(self, model: DeepseekV3, losses: TokenLosses | None = None) -> Measurement: ...


@dataclass(frozen=True)
class TrainingData:
    """Batches to learn from, the tokenizer, what is held out.

    `digest` names the data in checkpoints: a resume on other data is an error. None: unchecked.
    `inputs` says what it was made of, so that the error names what changed. `learnt` says what an
    epoch learns where that is not all; `notes` are lines to read before the first step.
    """

    train: Batches
    tokenizer: Tokenizer | None = None
    held_out: HeldOut | None = None
    digest: str | None = None
    inputs: Inputs | None = None
    learnt: str | None = None
    notes: tuple[str, ...] = ()


class Preparation(Protocol):
    """What a stage does before its first step, looked at or done. It prints nothing: `advance` is
    told what is worked on.
    """

    def check(self) -> None:
        """Raises what the run would, of all that can be known without reading much."""
        ...

    def inputs(self) -> Inputs | None:
        """What the run would be made of, to compare it with what it was begun with."""
        ...

    def find(self, advance: Advance = silent) -> TrainingData | None:
        """The data if nothing is left to do; otherwise None, and what is there was read to see
        that it can be done. Writes nothing.
        """
        ...

    def make(self, advance: Advance = silent) -> TrainingData:
        """Does what is left to do, and opens the data; never downloads."""
        ...

    def rows(self, data: TrainingData | None) -> list[tuple[str, str]]:
        """Lines of the plan: what is learnt from, with the data as far as `find` has it."""
        ...

    def task(self) -> str:
        """A line on what is left to do."""
        ...
