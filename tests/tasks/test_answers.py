"""The rule of answers, and the reason that it gives. Oracle: cases written by hand."""

from __future__ import annotations

import pytest

from rorqual.tasks.answers import MAX_CHARACTERS, Forms, grade_answer, number, plain

NUMBER = Forms(number(132), number(132), "number")
WRONG = "The number is wrong."
AMONG = "The right number is there, but not by itself."


@pytest.mark.parametrize(
    ("response", "is_so"),
    [
        ("132", True),
        ("132.", True),
        (" 132\n", True),
        ("Answer: 132", True),
        ("47 + 85: 7+5=12. Answer: 132", True),
        ("ANSWER: 132!", True),
        ("The answer is 132.", True),
        ("Answer: 131. No: Answer: 132", True),
        ("Answer: 132. No: Answer: 131", False),
        ("132 133", False),
        ("1132", False),
        ("1320", False),
        ("13 2", False),
        ("not 132", False),
        ("Answer: not 132", False),
        ("Answer: 132 or 133", False),
        ("１３２", False),
        ("Answer: 132\nAnswer:", False),
        ("answers 132", False),
        ("", False),
        ("132 " + " " * MAX_CHARACTERS, False),
    ],
)
def test_the_rule(response: str, is_so: bool) -> None:
    assert grade_answer(response, NUMBER).is_right == is_so


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("132", "It is right."),
        ("", "There is no answer."),
        (" . ", "There is no answer."),
        ("Answer:", 'Nothing follows the last "Answer:".'),
        ("132 Answer: ", 'Nothing follows the last "Answer:".'),
        ("133", WRONG),
        ("Answer: 133", WRONG),
        ("1132", WRONG),
        ("132.5", WRONG),
        ("-132", WRONG),
        ("Answer: 132. No: Answer: 131", WRONG),  # the last one is judged, and it alone
        ("132 or 133", AMONG),
        ("Answer: it is 132, I think", AMONG),
        ("x" * (MAX_CHARACTERS + 1), "It is longer than 4,000 characters."),
    ],
)
def test_the_reason(response: str, why: str) -> None:
    assert grade_answer(response, NUMBER).why == why


def test_plain_is_bounded() -> None:
    assert plain("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS
    assert plain("x" * (MAX_CHARACTERS + 1)) is None
