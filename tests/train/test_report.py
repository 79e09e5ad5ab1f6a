"""The time left. Oracle: arithmetic on a clock that the test sets."""

from __future__ import annotations

import errno
import io

import pytest
from rich.console import Console

from rorqual.train import report as report_module
from rorqual.train.report import Report, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (0.4, "00:00:00"),
        (59.6, "00:01:00"),
        (3_661, "01:01:01"),
        (86_399, "23:59:59"),
        (86_400, "1d 00:00:00"),
        (10 * 86_400 + 3_723, "10d 01:02:03"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def left(
    monkeypatch: pytest.MonkeyPatch, total: int, first: int, tokens: int, seconds: float
) -> str:
    clock = Clock()
    monkeypatch.setattr(report_module, "time", clock)
    report = Report(total, first, is_quiet=True)
    clock.now += seconds
    lines: list[str] = []
    monkeypatch.setattr(report, "line", lines.append)
    report.step(1, tokens, 1.0, 1.0)
    return lines[0].rpartition("left ")[2]


def test_time_left_is_what_the_tokens_of_this_process_took(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left(monkeypatch, 1000, 0, 250, 60.0) == "00:03:00"
    assert left(monkeypatch, 1000, 500, 750, 60.0) == "00:01:00"  # a resume: 250 tokens a minute
    assert left(monkeypatch, 1_000_000, 0, 100, 60.0) == "6d 22:39:00"


def test_time_left_at_the_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch may reach beyond the total."""
    assert left(monkeypatch, 1000, 0, 1000, 60.0) == "00:00:00"
    assert left(monkeypatch, 1000, 0, 1024, 60.0) == "00:00:00"


class Unheard(io.StringIO):
    """A terminal that was closed: each write fails."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "the terminal is gone")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_report_that_nobody_can_read_falls_silent(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    nobody = Console(file=Unheard(), force_terminal=is_terminal)
    monkeypatch.setattr(report_module, "console", lambda: nobody)
    with Report(1000, 0) as report:
        report.line("begun")
        report.step(1, 1000, 1.0, 1.0)
    assert report.is_quiet


def test_mfu_stands_beside_the_speed_where_a_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Report, "line", lambda report, text: lines.append(text))
    report = Report(1000, 0, is_quiet=True)
    report.step(1, 1000, 2.0, 1234.0, mfu=0.306)
    report.step(2, 1000, 2.0, 1234.0)
    assert "1,234 tok/s  MFU 31%  left" in lines[0]
    assert "1,234 tok/s  left" in lines[1]


def test_the_last_batch_does_not_count_beyond_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Report, "line", lambda report, text: lines.append(text))
    report = Report(70_000, 0, is_quiet=True)
    report.step(1, 35_000, 2.0, 10.0)
    report.step(2, 70_144, 2.0, 10.0)
    assert ["35K/70K" in lines[0], "70.14K/70.14K" in lines[1]] == [True, True]
