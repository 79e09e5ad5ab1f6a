"""What a step costs: seconds by phase, its share of the peak, memory.

Times are read where the step already is: two readings of a clock a phase on the CPU, an event a
phase on a GPU, which nobody waits for.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from rorqual.ops.ceilings import Peak
from rorqual.ops.memory import memory_bytes

SECONDS_BETWEEN_READS = 1.0


class Laps:
    """Seconds by phase since they were last read. A lap gives its phase what has passed since the
    lap before, so that all time is some phase's.

    On a GPU a lap is a mark among its work. What is marked and not yet done is read a step later.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, Any]] = deque()
        self._last: Any = self._event() if self._gpu else time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        if self._gpu:
            self._marks.append((phase, self._event()))
            self._take_done()
            return
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """The seconds of each phase, and begins anew."""
        self._take_done()
        found, self._seconds = self._seconds, {}
        return found

    def _take_done(self) -> None:
        while self._marks and self._marks[0][1].query():
            phase, mark = self._marks.popleft()
            seconds = self._last.elapsed_time(mark) / 1000
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
            self._last = mark

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event


class Memory:
    """Bytes now and at most, read once a second at most: on a GPU those that torch has given out,
    else the process's.
    """

    def __init__(self) -> None:
        self._read_at = -math.inf
        self._found: tuple[int | None, int | None] = (None, None)

    def read(self, device: torch.device) -> tuple[int | None, int | None]:
        now = time.perf_counter()
        if now - self._read_at >= SECONDS_BETWEEN_READS:
            self._read_at = now
            if device.type == "cuda":
                given = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
                self._found = given
            else:
                self._found = memory_bytes()
        return self._found


@dataclass(frozen=True)
class Meters:
    """The figures of a step that are measured: `laps` is told of phases, `record` reads all.

    `flops_per_token` are those of forward and backward pass; without a peak there is no MFU.
    `sparse_layers` are the layers of which a step counts the load, by id.
    """

    laps: Laps
    device: torch.device
    flops_per_token: float
    peak: Peak | None = None
    num_ranks: int = 1
    sparse_layers: tuple[int, ...] = ()
    memory: Memory = field(default_factory=Memory)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: what is needed of the peak of all ranks, recomputation not
        counted.
        """
        if self.peak is None:
            return None
        return self.flops_per_token * tokens_per_second / (self.peak.flops * self.num_ranks)

    def record(self, tokens_per_second: float) -> dict[str, Any]:
        """Fields of a step's line; what is not known is left out."""
        mfu = self.mfu(tokens_per_second)
        now, most = self.memory.read(self.device)
        found = {
            "mfu": None if mfu is None else round(mfu, 5),
            "memory": now,
            "memory_peak": most,
            "seconds": {phase: round(s, 6) for phase, s in self.laps.read().items()},
        }
        return {name: value for name, value in found.items() if value is not None}
