"""A console for people (stderr, so that standard output stays data), one for tables, a logger.

What they print may come out of a model or a file of strangers: none of it is read as markup, and
nothing in it steers a terminal.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleDimensions
    from rich.text import Text

# Control characters, ends of lines that are none for most programs, and those that turn the
# direction of all that follows (Unicode's bidirectional algorithm, UAX 9, but for plain marks).
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
NO_LIMIT_COLUMNS = 100_000  # of what no terminal shows


def printable(text: str) -> str:
    """What steers a terminal made visible, such as \\x1b or \\u202e; tabs and new lines stay."""
    return CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


@cache
def console() -> Console:
    """The console of progress bars, tables for people and error messages: standard error."""
    return _console(is_error=True)


def output_console() -> Console:
    """The console of tables that a command prints: standard output, as it is now."""
    return _console()


def _console(*, is_error: bool = False) -> Console:
    from rich.console import Console, ConsoleDimensions

    class PlainConsole(Console):
        @property  # type: ignore[misc]  # nobody sets it
        def size(self) -> ConsoleDimensions:
            """Of a file or a pipe: as wide as what is printed."""
            width, height = super().size
            return ConsoleDimensions(width if self.file.isatty() else NO_LIMIT_COLUMNS, height)

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

        def on_broken_pipe(self) -> None:
            """Rich would end the process with 1; the command line has a code of its own."""
            raise BrokenPipeError

    return PlainConsole(stderr=is_error, markup=False, emoji=False)


class PrintableFormatter(logging.Formatter):
    """For a handler that writes to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def short_count(count: int) -> str:
    """`950`, `1.5K`, `15.63M`, `14.8T`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return str(count)


def logger(name: str) -> logging.Logger:
    """A logger under `rorqual`; the command line attaches the handler."""
    return logging.getLogger(name if name.startswith("rorqual") else f"rorqual.{name}")
