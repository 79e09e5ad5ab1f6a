"""A store whose clock a test moves, and another beside it on the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rorqual.serve.settings import ServerSettings
from rorqual.serve.store import Store

HOUR, DAY = 3600, 24 * 3600


class Clock:
    """Seconds since 1970, as a test has it."""

    def __init__(self, seconds: float = 1_800_000_000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@contextmanager
def opened(folder: Path | None, clock: Clock | None = None, **settings: Any) -> Iterator[Store]:
    """A server's store while the block runs."""
    store = Store(ServerSettings(state_dir=folder, **settings), clock or Clock())
    try:
        yield store
    finally:
        store.close()
