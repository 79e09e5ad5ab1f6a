"""Ctrl-C and SIGTERM as a wish to stop after this step, and torch in its deterministic mode."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context in which SIGINT and SIGTERM only set `is_set`; a second SIGINT raises as usual."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    @property
    def is_set(self) -> bool:
        return self.name is not None

    def __enter__(self) -> Interrupt:
        # Signals can be handled in the main thread alone; elsewhere they stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On the CPU, kernels that give the same bits each time at any number of threads.

    Without it the gradients of an index are added up by atomics as soon as there are two threads.
    Choice: GPUs are left alone, where this costs speed and needs an environment variable.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # it would cost a pass over each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        memory.fill_uninitialized_memory = fills
