"""A progress bar for long reads and writes; silent for small ones and where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rorqual.log import console

T = TypeVar("T")

WORTH_SHOWING_BYTES = 1_000_000_000


def track(items: Sequence[T], label: str, num_bytes: int) -> Iterator[T]:
    """Yields the items, with a bar on standard error from a gigabyte on."""
    if num_bytes < WORTH_SHOWING_BYTES or not console().is_terminal:
        yield from items
        return
    from rich.progress import track as rich_track

    description = f"{label} {num_bytes / 1e9:,.1f} GB"
    yield from rich_track(items, description, console=console(), transient=True)


@contextmanager
def byte_progress(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes on standard error: yields what to call with the bytes done since."""
    if not console().is_terminal:
        yield lambda done: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(label, total=num_bytes)
        yield lambda done: bar.advance(task, done)
