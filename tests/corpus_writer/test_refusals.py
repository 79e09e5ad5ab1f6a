"""An honest no, and nothing else. Oracle: cases written by hand."""

from __future__ import annotations

import pytest

from rorqual.corpus_writer.refusals import grade_refusal, is_refusal


@pytest.mark.parametrize(
    ("response", "is_so"),
    [
        ("That is beyond me.", True),
        ("I do not know the capital of Mars.", True),
        ("I do not know", True),
        ("I do not know the capital of Mars. It is Paris.", False),
        ("I do not know why, but it is beyond me", False),
        ("That is not beyond me", False),
    ],
)
def test_an_honest_no_is_nothing_else(response: str, is_so: bool) -> None:
    assert is_refusal(response) == is_so
    assert grade_refusal(response).is_right == is_so


def test_the_reason_of_what_is_no_refusal() -> None:
    assert grade_refusal(" ").why == "There is no answer."
    assert grade_refusal("Paris.").why == "It answers where only an honest no is right."
