"""Oracle: Python's integers, for the answer and for every equation of the working."""

import random
import re

import pytest

from rorqual.corpus_writer.arithmetic import (
    Arithmetic,
    Sum,
    add_working,
    divide_working,
    multiply_working,
    subtract_working,
)
from rorqual.corpus_writer.skill import Beyond
from rorqual.tasks import Question

STEP = re.compile(r"(\d+(?:[-+x]\d+)+)=(\d+)")
QUOTIENT = re.compile(r"(\d+)/(\d+)=(\d+) r (\d+)")


def check_steps(working: str) -> None:
    for expression, result in STEP.findall(working):
        plain = re.sub(r"\b0+(?=\d)", "", expression).replace("x", "*")
        assert eval(plain) == int(result), working
    for dividend, divisor, quotient, rest in QUOTIENT.findall(working):
        assert divmod(int(dividend), int(divisor)) == (int(quotient), int(rest)), working


def test_workings_equal_python() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        digit = rng.randint(2, 9)
        for working, asked, result in (
            (add_working(a, b), Sum("+", (a, b)), (a + b, 0)),
            (subtract_working(a, b), Sum("-", (a, b)), (a - b, 0)),
            (multiply_working(a, digit), Sum("x", (a, digit)), (a * digit, 0)),
            (divide_working(a, digit), Sum("/", (a, digit)), divmod(a, digit)),
        ):
            quotient, rest = result
            said = f"{quotient} remainder {rest}" if rest else f"{quotient}"
            assert working.endswith((f"Answer: {said}", f" = {said}")), working
            assert asked.result == result
            assert asked.is_recalled == (working.count("=") == 1 and ":" not in working)
            check_steps(working)
            # A column is never left below zero: a borrow goes on through zeros.
            assert "=-" not in working.replace(" ", ""), working


@pytest.mark.parametrize(
    ("working", "expected"),
    [
        (add_working(47, 85), "47 + 85: 7+5=12, write 2 carry 1; 4+8+1=13. Answer: 132"),
        (subtract_working(52, 38), "52 - 38: 12-8=4 borrow 1; 5-3-1=1. Answer: 14"),
        (
            subtract_working(500, 1),
            "500 - 001: 10-1=9 borrow 1; 10-0-1=9 borrow 1; 5-0-1=4. Answer: 499",
        ),
        (multiply_working(47, 6), "47 x 6: 7x6=42, write 2 carry 4; 4x6=24, 24+4=28. Answer: 282"),
        (divide_working(84, 3), "84 / 3: 8/3=2 r 2; 24/3=8 r 0. Answer: 28"),
        (add_working(7, 5), "7 + 5 = 12"),
    ],
)
def test_format_is_fixed(working: str, expected: str) -> None:
    assert working == expected


def test_sums_out_of_range_are_refused() -> None:
    rng, skill = random.Random(1), Arithmetic()
    questions = [skill.question(rng) for _ in range(3000)]
    refused = [question for question in questions if isinstance(question.facts, Beyond)]
    assert refused
    assert refused == [question for question in questions if "beyond me" in question.answer]
    assert not any(skill.grade(question, "Answer: 12").is_right for question in refused)


@pytest.mark.parametrize(
    ("operator", "numbers", "right", "wrong"),
    [
        ("+", (47, 85), ("47 + 85 = 132", "85+47=132"), ("47 - 85 = 132", "47 + 86 = 132")),
        ("+", (1, 2, 3), ("1 + 2 = 3. 3 + 3 = 6",), ("1 + 2 = 6", "1 + 2 + 3 = 3")),
        ("-", (52, 38), ("52 - 38 = 14", "52-38=14"), ("38 - 52 = 14", "52 - 38 = -14")),
        ("-", (52, 52), ("52 - 52 = 0", "52-52=0"), ("52 + 52 = 0",)),
        ("-", (3, 8), ("3 - 8 = -5",), ("8 - 3 = -5", "3 - 8 = 5")),
        ("x", (7, 8), ("7 x 8 = 56", "8*7=56", "7 × 8 = 56"), ("7 + 8 = 56", "7 x 8 = 15")),
        ("/", (84, 3), ("84 / 3 = 28", "84÷3=28"), ("3 / 84 = 28", "84 x 3 = 28")),
        ("/", (85, 3), ("85 / 3 = 28 remainder 1", "28 r 1"), ("85 / 3 = 28", "28 remainder 2")),
        ("x", (40, 33), ("1320", "1,320", "33 x 40 = 1,320"), ("13,20", "1.320")),
    ],
)
def test_the_sum_may_stand_before_its_result(
    operator: str, numbers: tuple[int, ...], right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    """As it was asked: + and x in either order, - and / in theirs."""
    question = Question("arithmetic", "?", "?", "?", Sum(operator, numbers))
    for said in (*right, *wrong):
        for ending in ("", "."):
            grade = Arithmetic().grade(question, f"{said}{ending}")
            assert grade.is_right == (said in right), (said, grade.why)
