"""Ctrl-C between two steps and never in the middle of one, so that the engine stays whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """KeyboardInterrupt waits for the end of the block; a second Ctrl-C does not.

    Only where Ctrl-C would raise it: in the main thread, under Python's own handler.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    num_signals = 0

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, note)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if num_signals:
        raise KeyboardInterrupt
