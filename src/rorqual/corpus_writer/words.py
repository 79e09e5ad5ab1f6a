"""The word list and the table of definitions that ship beside this file, read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent


@cache
def common_words() -> tuple[str, ...]:
    """About 3,000 common English words, lower case, sorted."""
    return tuple(_lines("words.txt"))


@cache
def definitions() -> dict[str, str]:
    """word -> a sentence that defines it ("A lake is a body of water surrounded by land.")."""
    return dict(line.split("\t") for line in _lines("definitions.tsv"))


def _lines(name: str) -> list[str]:
    lines = (_HERE / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
