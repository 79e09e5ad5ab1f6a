"""Oracles: Wilson's interval as the roots of (p - x)^2 = z^2 x (1 - x) / n, solved here; and tasks
written here, whose rewards are known.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import UsageError
from rorqual.tasks import (
    RIGHT,
    Answered,
    DrawnTask,
    Grade,
    Messages,
    Question,
    Split,
    TaskResult,
    evaluate,
    is_held_out,
    wilson,
    wrong,
)  # fmt: skip
from rorqual.tasks.evaluate import Z_95

ROUNDING = 1e-12  # closed form against closed form in float64
EXAMPLE = Path(__file__).parents[2] / "docs" / "eval.md"
RULES = {"role": "system", "content": "Three letters, please."}


class Recall:
    """Three questions, each asked in a conversation; a reward for each letter at its place."""

    name = "recall"
    WORDS = ("cat", "dog", "owl")

    def questions(self, split: Split, seed: int) -> Iterator[Question[str]]:
        if split == "held_out":
            for place, word in enumerate(self.WORDS):
                asked = f"Word {place}?"
                yield Question(self.name, asked, word, f"recall:{word}", word, (RULES,))

    def grade(self, question: Question[str], answer: str) -> Grade:
        word = question.facts
        same = sum(ours == theirs for ours, theirs in zip(word, answer, strict=False))
        return (
            RIGHT if answer == word else Grade(same / len(word) / 2, f"{same} letters are right.")
        )


class Double(DrawnTask[int]):
    """Drawn endlessly from 500 numbers."""

    name = "double"

    def question(self, rng: random.Random) -> Question[int]:
        number = rng.randrange(500)
        return Question(self.name, f"Twice {number}?", str(2 * number), f"double:{number}", number)

    def grade(self, question: Question[int], answer: str) -> Grade:
        return RIGHT if answer == str(2 * question.facts) else wrong("The number is wrong.")


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (5, 10), (10, 10), (190, 200), (1, 3)])
def test_wilson_solves_its_equation(correct: int, total: int) -> None:
    p, z2 = correct / total, Z_95**2 / total
    a, b, c = 1 + z2, -(2 * p + z2), p * p
    root = math.sqrt(b * b - 4 * a * c)
    expected = ((-b - root) / (2 * a), (-b + root) / (2 * a))
    assert wilson(correct, total) == pytest.approx(expected, abs=ROUNDING)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_task_of_few_questions_with_rewards_in_part() -> None:
    heard: list[Messages] = []

    def answer(asked: list[Messages]) -> list[str]:
        heard.extend(asked)
        return ["cat", "dot", "?"]

    result = evaluate(answer, Recall(), 100)
    assert heard == [[RULES, {"role": "user", "content": f"Word {n}?"}] for n in range(3)]
    assert (result.task, result.total, result.correct) == ("recall", 3, 1)
    assert result.mean_reward == pytest.approx((1 + 1 / 3 + 0) / 3, abs=ROUNDING)
    assert result.interval is None  # an answer is right in part: no accuracy of right and wrong
    assert [(each.response, each.grade.why) for each in result.failures] == [
        ("dot", "2 letters are right."), ("?", "0 letters are right."),
    ]  # fmt: skip
    assert evaluate(answer, Recall(), 3).total == 3


@pytest.mark.parametrize(
    ("reward", "is_measured"), [(0.0, True), (1e-9, False), (0.9, False), (1.0, True)]
)
def test_an_accuracy_is_measured_where_no_answer_is_right_in_part(
    reward: float, is_measured: bool
) -> None:
    asked = Question("double", "Twice 1?", "2", "double:1", 1)
    grades = (RIGHT, Grade(reward, "?"), wrong("?"))
    result = TaskResult("double", tuple(Answered(asked, "?", grade) for grade in grades))
    assert result.correct == (2 if reward == 1.0 else 1)
    assert len(result.failures) == 3 - result.correct
    assert result.interval == (wilson(result.correct, 3) if is_measured else None)


def test_a_drawn_task_is_right_or_wrong() -> None:
    known = {question.prompt: question.answer for question in _held_out(Double(), 7, 12)}

    def answer(asked: list[Messages], last: str = "") -> list[str]:
        told = [known[messages[-1]["content"]] for messages in asked]
        return [*told[:-1], last or told[-1]]

    right = evaluate(answer, Double(), 12, seed=7)
    assert (right.correct, right.total, right.failures) == (12, 12, ())
    assert (right.accuracy, right.mean_reward, right.interval) == (1.0, 1.0, wilson(12, 12))
    other = evaluate(lambda asked: answer(asked, "x"), Double(), 12, seed=7)
    assert (other.correct, other.accuracy, other.interval) == (11, 11 / 12, wilson(11, 12))
    assert other.failures == other.answered[-1:]
    assert other.failures[0].grade == wrong("The number is wrong.")


def test_a_drawn_task_keeps_its_splits_apart_and_says_the_same_again() -> None:
    held_out = _held_out(Double(), 0, 20)
    trained = list(islice(Double().questions("train", 0), 2000))
    assert held_out == _held_out(Double(), 0, 20) != _held_out(Double(), 1, 20)
    assert held_out[:5] == _held_out(Double(), 0, 5)
    assert trained[:50] == list(islice(Double().questions("train", 0), 50))
    assert all(is_held_out(question.key) for question in held_out)
    assert not any(is_held_out(question.key) for question in trained)
    assert len({question.prompt for question in held_out}) == 20  # about 25 of 500 are held out
    with pytest.raises(UsageError, match="no such split"):
        Double().questions("test", 0)  # type: ignore[arg-type]


def test_more_questions_than_there_are_different_ones_repeat() -> None:
    assert len(_held_out(Double(), 0, 60)) == 60


@pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan])
def test_a_reward_lies_between_0_and_1(reward: float) -> None:
    with pytest.raises(UsageError, match="reward"):
        Grade(reward, "?")


def test_bad_calls_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="a reward that is none"):
        Grade("1", "A text is no number.")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the number of questions"):
        evaluate(lambda asked: ["" for _ in asked], Recall(), -1)
    with pytest.raises(UsageError, match="one response"):
        evaluate(lambda asked: [], Double(), 5)
    with pytest.raises(UsageError, match="nothing to ask"):
        evaluate(lambda asked: [], Double(), 0)


@pytest.mark.parametrize("given", [0.5, True, None, (1.0, "right")])
def test_a_grader_gives_grades_and_nothing_like_them(given: Any) -> None:
    """Else a reward would be missed only where it is counted, far from who gave it."""

    class Careless(Recall):
        def grade(self, question: Question[str], answer: str) -> Grade:
            return given

    with pytest.raises(UsageError, match="must return a Grade"):
        evaluate(lambda asked: ["" for _ in asked], Careless(), 3)


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(from rorqual\.tasks .*?)```", EXAMPLE.read_text(), re.DOTALL)
    exec(compile(code, str(EXAMPLE), "exec"), {})
    low, high = wilson(1, 10)  # 42 is twice one of ten
    assert capsys.readouterr().out == f"0.1 0.1 ({low}, {high}) The number is wrong.\n"


def _held_out(task: DrawnTask[Any], seed: int, count: int) -> list[Question[Any]]:
    return list(islice(task.questions("held_out", seed), count))
