"""The bar of what is prepared. Oracle: what a terminal and a pipe are sent."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rorqual.cli.progress import shown_progress


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("is_busy", [True, False])
def test_a_bar_is_for_terminals_and_for_work(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, is_busy: bool
) -> None:
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=is_terminal, width=100)
    monkeypatch.setattr("rorqual.log.console", lambda: console)
    with shown_progress() as advance:
        if is_busy:
            advance("reading", 1, 3, "a.txt")
            advance("tokenising", 2, None, "b.txt")
    shown = sent.getvalue()
    assert bool(shown) == (is_terminal and is_busy)
    if shown:
        assert "tokenising" in shown
        assert "b.txt" in shown
