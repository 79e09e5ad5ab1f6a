"""What a run asks of its ranks; on one rank, nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from rorqual.model import DeepseekV3, ModelConfig
from rorqual.parallel.stages import RankStages


class Spread(Protocol):
    """What this rank holds of a model, and how the rest comes to it."""

    def micro_batch(self, is_last: bool) -> None:
        """Called before each pass of a step, of which one is the last."""
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Within it the model can be called by parts, on all ranks at once."""
        ...

    def place(self, name: str, own: Tensor) -> tuple[int, int]:
        """Of a parameter, or of what is as large, the first of this rank's rows, and how many the
        whole has.
        """
        ...

    def bytes_sent(self) -> tuple[int, int]:
        """What tokens' ways to experts cost this rank since the last call: bytes within nodes and
        between them.
        """
        ...


class Ranks(Protocol):
    """`rank` of `world`. `num_replicas` ranks take samples of their own, equally many each; this
    one is `replica` of these.
    """

    rank: int
    world: int
    replica: int
    num_replicas: int

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prepares, writes and speaks."""
        ...

    def stages(self, config: ModelConfig, num_inputs: int) -> RankStages | None:
        """Those of this rank, of a model that samples of so many inputs go through; None where
        there is no pipeline.
        """
        ...

    def spread(self, model: DeepseekV3, roots: Sequence[nn.Module]) -> Spread:
        """Leaves of what stages left of a model what is this rank's; `roots` run it."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks that take other samples."""
        ...

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all gradients, from that of those which this rank holds."""
        ...

    def agree(self, number: int, *, is_patient: bool = False) -> int:
        """The largest number that any rank has; all must ask. A patient one waits for hours, as
        for data that the first rank makes.
        """
        ...

    def waiting(self, what: Callable[[], str]) -> AbstractContextManager[None]:
        """Within it a rank that does not answer is an error that says who waited, and at what."""
        ...


class Whole:
    """A model that one rank holds alone."""

    def micro_batch(self, is_last: bool) -> None:
        pass

    @contextmanager
    def measuring(self) -> Iterator[None]:
        yield

    def place(self, name: str, own: Tensor) -> tuple[int, int]:
        return 0, len(own)

    def bytes_sent(self) -> tuple[int, int]:
        return 0, 0


class OneRank:
    rank, world, replica, num_replicas = 0, 1, 0, 1
    is_first = True

    def stages(self, config: ModelConfig, num_inputs: int) -> RankStages | None:
        return None

    def spread(self, model: DeepseekV3, roots: Sequence[nn.Module]) -> Spread:
        return Whole()

    def sum(self, values: Tensor) -> Tensor:
        return values

    def norm(self, own: Tensor) -> Tensor:
        return own

    def agree(self, number: int, *, is_patient: bool = False) -> int:
        return number

    @contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[None]:
        yield


def local(tensor: Tensor) -> Tensor:
    """Of a tensor that ranks share, what this one holds."""
    shared: Any = tensor
    held: Tensor = shared.to_local() if hasattr(shared, "to_local") else tensor
    return held
