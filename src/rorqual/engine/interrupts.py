"""Ctrl-C and SIGTERM between two steps and never in the middle of one: the engine stays whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def noted(number: signal.Signals, again: Handler) -> Iterator[Callable[[], bool]]:
    """A signal only sets what is yielded to True; `again` handles those that follow the first.

    The main thread alone may do that.
    """
    num_signals = 0

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            again(signal_number, frame)

    before = signal.getsignal(number)
    try:
        signal.signal(number, note)
        yield lambda: num_signals > 0
    finally:
        signal.signal(number, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block; a second one of a kind does not.

    Only in the main thread, and only where Python handles them: such a handler may raise.
    """
    with _held(signal.SIGTERM), _held(signal.SIGINT):
        yield


@contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    handler = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    with noted(number, again=handler) as has_come:
        yield
    if has_come():
        signal.raise_signal(number)
