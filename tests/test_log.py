"""What people read on a terminal, in a file, over a pipe. Oracle: the text that was given."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest
from rich.table import Table

from rorqual.log import PrintableFormatter, output_console, printable


class Terminal(io.StringIO):
    """Standard output of a terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def printed(draw: Callable[[], None], output: io.StringIO) -> list[str]:
    with redirect_stdout(output):
        draw()
    return [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in output.getvalue().splitlines()]


@pytest.mark.parametrize("number", [0x00, 0x1B, 0x7F, 0x9B, 0x2028, 0x202A, 0x202E, 0x2066, 0x2069])
def test_what_steers_a_terminal_is_shown(number: int) -> None:
    """U+202E turns the rest of a line round, so that a text reads as what it is not."""
    code = f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    assert printable(f"a{chr(number)}b") == f"a{code}b"


@pytest.mark.parametrize("text", ["a\tb\n", "שלום\u200f, עולם", "👩\u200d💻", "日本語", "\u00ad"])
def test_writing_is_left_as_it_is(text: str) -> None:
    """Marks of direction and joiners belong to words and turn nothing but their neighbours."""
    assert printable(text) == text


def test_a_log_line_steers_nothing() -> None:
    record = logging.LogRecord("rorqual", 20, "", 0, "unknown key %s", ("\x1b[2J",), None)
    assert PrintableFormatter("%(message)s").format(record) == "unknown key \\x1b[2J"


def table() -> None:
    rows = Table("path", "figure", box=None, pad_edge=False)
    rows.add_row("/models/" + 30 * "long/" + "model", "580,123.4")
    output_console().print(rows)


def test_a_table_that_is_piped_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell that started it says of its own width."""
    for columns in (None, "40"):
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
            monkeypatch.setenv("LINES", "10")
        _, row = printed(table, io.StringIO())
        assert row.split() == ["/models/" + 30 * "long/" + "model", "580,123.4"]


def test_a_table_on_a_terminal_keeps_to_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, printed(table, Terminal()))) <= 40


@pytest.mark.parametrize("name", ["/a/[v2]/b", "/a/[/]/b", "a:bug:b", "[bold]a[/bold]"])
def test_a_name_is_no_markup(name: str) -> None:
    def draw() -> None:
        rows = Table("name", box=None, pad_edge=False)
        rows.add_row(name)
        output_console().print(rows)
        output_console().print(f"it is {name}")

    assert printed(draw, io.StringIO())[1:] == [name, f"it is {name}"]


def test_a_name_in_a_table_steers_nothing() -> None:
    def draw() -> None:
        rows = Table("name", box=None)
        rows.add_row("a\x1b[2J\u202eb")
        output_console().print(rows)

    assert "a\\x1b[2J\\u202eb" in printed(draw, io.StringIO())[1]
