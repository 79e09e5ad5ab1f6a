"""What a step asks of the other ranks; on one rank, nothing."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """`num_replicas`: how many ranks take samples of their own, equally many each."""

    num_replicas: int

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks that take other samples."""
        ...

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all gradients, from that of those which this rank holds."""
        ...


class OneRank:
    num_replicas = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def norm(self, own: Tensor) -> Tensor:
        return own
