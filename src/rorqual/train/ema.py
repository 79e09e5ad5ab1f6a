"""EMA of the parameters in CPU memory, updated while the next step computes (§3.2.3).

ema_0 = theta_0, ema_t = decay * ema_{t-1} + (1 - decay) * theta_t after step t. A thread reads the
parameters themselves: until the next update nobody changes them, so only an update waits, and only
where the thread is a whole step behind. Each rank averages what it holds. Choice: buffers, the
router's bias among them, are not averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from pydantic import Field
from torch import Tensor

from rorqual.config import settings
from rorqual.train.optimizer import AdamW
from rorqual.train.ranks import local


@settings
class EmaSettings:
    """An average of the parameters over the last steps, kept beside them."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """How much of the average stays in a step: 0.999 looks about 1,000 steps back. `rorqual convert
    RUN OUT --to float32 --ema` writes it as a model. Left out: none is kept."""


class Ema:
    """`follow()` after each step; `values` by the parameters' names, once `wait()` has returned."""

    def __init__(self, optimizer: AdamW, decay: float) -> None:
        self.decay = decay
        self.places: Mapping[str, Tensor] = {
            name: local(parameter).detach() for name, parameter in optimizer.named.items()
        }
        self.values = {
            name: place.to("cpu", torch.float32, copy=True) for name, place in self.places.items()
        }
        self.thread = ThreadPoolExecutor(1, "ema")
        self.update: Future[None] | None = None
        optimizer.register_step_pre_hook(lambda *_: self.wait())

    def follow(self) -> None:
        """Begins to take in the parameters as they now are."""
        self.wait()
        self.update = self.thread.submit(self._take_in)

    def wait(self) -> None:
        if self.update is not None:
            self.update.result()
            self.update = None

    @torch.no_grad()
    def _take_in(self) -> None:
        for name, place in self.places.items():
            self.values[name].lerp_(place.to("cpu", torch.float32), 1 - self.decay)
