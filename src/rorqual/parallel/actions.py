"""What a rank of a pipeline does, one thing after the other: the words that orders are made of.

A model is cut into *stages*, a batch into *micro-batches*. A rank's *order* is the list of what it
runs; it says nothing of when: an action starts as soon as what it needs is there (`simulator.py`).
The spelling is that of `torch.distributed.pipelining`, so that its runtime can read an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A backward pass runs whole, or in two parts: the next rank waits only for the first."""

    FORWARD = "F"
    BACKWARD = "B"  # both gradients
    INPUT = "I"  # the gradient of the stage's input alone
    WEIGHT = "W"  # the gradients of its weights, after INPUT


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self,)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Overlapped:
    """A forward and a whole backward that run together, so that each hides what the other sends."""

    forward: Action
    backward: Action

    @property
    def parts(self) -> tuple[Action, ...]:
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Order = list[Action | Overlapped]


def stages_of(order: Sequence[Action | Overlapped]) -> list[int]:
    """The stages whose parameters a rank of this order holds."""
    return sorted({part.stage for action in order for part in action.parts})


def most_activations(order: Sequence[Action | Overlapped]) -> int:
    """How many activations a rank holds at once at most, one being those of a micro-batch in a
    stage.

    They are made by the forward pass and kept until the weights have their gradients. In an
    overlapped pair the new ones are there before the old ones are gone.
    """
    held = most = 0
    for action in order:
        held += sum(part.kind == Kind.FORWARD for part in action.parts)
        most = max(most, held)
        held -= sum(part.kind in (Kind.BACKWARD, Kind.WEIGHT) for part in action.parts)
    return most
