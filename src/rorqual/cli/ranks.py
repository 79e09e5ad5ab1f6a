"""`rorqual train` as one of torchrun's processes: the first one prepares and speaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import typer

from rorqual.cli.exits import EXIT_BAD_INPUT
from rorqual.errors import RorqualError

if TYPE_CHECKING:
    import torch

    from rorqual.parallel.launch import Launch
    from rorqual.parallel.settings import ParallelSettings
    from rorqual.train.ranks import Ranks

T = TypeVar("T")
SECONDS_FOR_THE_FIRST = 10.0


@contextmanager
def joined_ranks(
    options: ParallelSettings, device: torch.device, launch: Launch
) -> Iterator[Ranks]:
    """This process among all."""
    from rorqual.train.ranks import OneRank

    if launch.world == 1:
        yield OneRank()
        return
    from rorqual.parallel.ranks import joined

    with joined(options, device, launch) as ranks:
        yield ranks


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """Each process of a machine has a GPU of its own."""
    import torch

    if device.type != "cuda" or launch.world == 1:
        return device
    return torch.device("cuda", launch.local_rank)


@contextmanager
def first_speaks(launch: Launch) -> Iterator[None]:
    """What is wrong on all ranks is told by the first, at whose end torchrun ends the others; what
    is wrong on another alone it tells itself, after a while.
    """
    try:
        yield
    except RorqualError:
        if launch.rank:
            time.sleep(SECONDS_FOR_THE_FIRST)
        raise


def made_by_first(ranks: Ranks, make: Callable[[], T], take: Callable[[], T]) -> T:
    """What the first rank makes, and the others take when it is there. They end with it."""
    with ranks.waiting(lambda: "the preparation"):
        if not ranks.is_first:
            if ranks.agree(0, is_patient=True):
                raise typer.Exit(EXIT_BAD_INPUT)
            return take()
        try:
            made = make()
        except BaseException:
            ranks.agree(1, is_patient=True)
            raise
        ranks.agree(0, is_patient=True)
        return made
