"""The bar that tells how far a preparation is: other rooms are handed it and print nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rorqual.data import Advance


@contextmanager
def shown_progress() -> Iterator[Advance]:
    """Yields advance(title, done, total, detail); the bar is there from its first call on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rorqual.log import console

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console(),
        transient=True,
        disable=not console().is_terminal,
    )
    task = bar.add_task("starting", total=None, detail="")

    def advance(title: str, done: int, total: int | None, detail: str) -> None:
        bar.update(task, description=title, completed=done, total=total, detail=detail)
        bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
