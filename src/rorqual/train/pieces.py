"""What a rank holds of a run's state, by name, and where in the whole tensor it lies.

A piece is a box of a whole tensor: all of it on one rank, a share where FSDP or expert parallelism
cut it. Ranks that hold the same box hold the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`local` is the box that begins at `start` of a tensor of this `whole` shape."""

    local: Tensor
    whole: tuple[int, ...]
    start: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Where it lies, as an index of the whole tensor."""
        sizes = self.local.shape
        return tuple(slice(at, at + n) for at, n in zip(self.start, sizes, strict=True))

    def with_(self, local: Tensor) -> Piece:
        """Other values in the same place."""
        assert local.shape == self.local.shape, "a piece's values have its shape"
        return Piece(local, self.whole, self.start)

    def copied(self) -> Piece:
        """On the CPU, in memory of its own."""
        return self.with_(self.local.to("cpu", copy=True, memory_format=torch.contiguous_format))


def piece_of_whole(value: Tensor) -> Piece:
    """Of a tensor that is whole on this rank."""
    return Piece(value.detach(), tuple(value.shape), (0,) * value.dim())
