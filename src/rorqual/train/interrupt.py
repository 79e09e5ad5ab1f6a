"""Signals as a wish to stop after this step, and torch's settings for a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from rorqual.ops.device import num_processors

# SIGHUP: the terminal was closed, or the connection to it was lost. Windows has none.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))
STDERR = 2
ECHO_SECONDS = 5.0
NOTE = b"\nfinishing this step, then saving (Ctrl-C again stops at once, without saving)\n"


class Interrupt:
    """A context in which these signals only set `is_set` and `number`, the first one's.

    A SIGINT after that raises KeyboardInterrupt: who presses Ctrl-C again will not wait. One that
    is ignored stays so: `nohup` means that a closed terminal shall not stop the run. torchrun
    passes on the Ctrl-C that the terminal has sent to its processes already: to one of many, one
    that follows at once is the same.
    """

    def __init__(self, *, is_one_of_many: bool = False, is_quiet: bool = False) -> None:
        self.is_one_of_many, self.is_quiet = is_one_of_many, is_quiet
        self.came = 0.0
        self.number: int | None = None
        self.before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    @property
    def is_set(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number is not None else "nothing"

    def __enter__(self) -> Interrupt:
        # Signals can be handled in the main thread alone; elsewhere they stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
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
        if not self.is_set:
            self.number, self.came = number, time.monotonic()
            # A handler may interrupt a print, so the words go straight to the file descriptor; a
            # closed one must not end the run.
            with suppress(OSError):
                os.write(STDERR, b"" if self.is_quiet else NOTE)
        elif number == signal.SIGINT and not self._is_echo():
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        return self.is_one_of_many and time.monotonic() - self.came < ECHO_SECONDS


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with `count` threads, and with those it had before afterwards; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_note(count: int | None) -> Iterator[str]:
    """A line to read before the first step, where more threads are asked for than can run."""
    if count is not None and count > (processors := num_processors()):
        yield f"training.threads = {count} on {processors} processors: fewer would be faster"


@contextmanager
def deterministic(device: torch.device, is_asked: bool | None = None) -> Iterator[None]:
    """Kernels that give the same bits each time, at any number of threads, where it is asked for;
    None: on the CPU.

    Without it the gradients of an index are added up by atomics as soon as there are two threads.
    Choice: GPUs are left alone unless asked, since this costs speed there.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    is_on = device.type == "cpu" if is_asked is None else is_asked
    torch.use_deterministic_algorithms(is_on)
    if is_on:
        memory.fill_uninitialized_memory = False  # it would cost a pass over each new tensor
        if device.type == "cuda":  # read as cuBLAS begins
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        memory.fill_uninitialized_memory = fills
