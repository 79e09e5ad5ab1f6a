"""A console for people (stderr, so that standard output stays data), one for tables, a logger."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """The console of progress bars, tables for people and error messages: standard error."""
    return _console(is_error=True)


def output_console(width: int | None = None) -> Console:
    """The console of tables that a command prints: standard output, as it is now."""
    return _console(width=width)


def _console(*, is_error: bool = False, width: int | None = None) -> Console:
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the process with 1; the command line has a code of its own."""
            raise BrokenPipeError

    return PlainConsole(stderr=is_error, width=width)


def short_count(count: int) -> str:
    """`950`, `1.5K`, `15.63M`, `14.8T`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)


def logger(name: str) -> logging.Logger:
    """A logger under `rorqual`; the command line attaches the handler."""
    return logging.getLogger(name if name.startswith("rorqual") else f"rorqual.{name}")
