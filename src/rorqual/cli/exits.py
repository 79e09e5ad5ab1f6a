"""How the command ends, and the flag that shows why."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_BAD_INPUT = 2
EXIT_SIGNAL = 128  # plus the number of the signal that ended it, as a shell reports it
EXIT_HUNG_UP = EXIT_SIGNAL + 1  # SIGHUP
EXIT_INTERRUPTED = EXIT_SIGNAL + 2  # SIGINT
EXIT_BROKEN_PIPE = EXIT_SIGNAL + 13  # SIGPIPE
EXIT_TERMINATED = EXIT_SIGNAL + 15  # SIGTERM
INTERRUPTED = "\nrorqual: interrupted"
DEBUG_FLAG = "--debug"  # may stand anywhere before a `--`


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what is left can be told."""

    def end(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
