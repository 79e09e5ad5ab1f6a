"""What the ranks of a real pipeline ran when."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from rorqual.parallel.actions import Action, Overlapped
from rorqual.parallel.simulator import Interval, Timeline

T = TypeVar("T")


@dataclass
class PassTimes:
    """Intervals in seconds of this process's clock, from the start of each pass, when its input was
    there, to its end; nothing while it is off. What is recorded within another is left to that.
    """

    is_on: bool = False
    start: float = 0.0
    intervals: list[Interval] = field(default_factory=list)

    def begin(self, group: ProcessGroup) -> None:
        """On all ranks at once, which agree on time 0: their clocks need not."""
        self.intervals.clear()
        dist.barrier(group)
        self.start, self.is_on = _now(), True

    def end(self, group: ProcessGroup) -> Timeline:
        """Of all ranks, and told to each; nothing is recorded any more."""
        self.is_on = False
        told: list[tuple[Interval, ...]] = [()] * group.size()
        dist.all_gather_object(told, tuple(self.intervals), group=group)
        return Timeline(tuple(told))

    def measure(self, action: Action | Overlapped, run: Callable[[], T]) -> T:
        if not self.is_on:
            return run()
        self.is_on = False
        start = _now()
        try:
            return run()
        finally:
            self.is_on = True
            end = _now()
            self.intervals.append(Interval(action, start - self.start, end - self.start))


def _now() -> float:
    """When a GPU has done what it was given so far."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
