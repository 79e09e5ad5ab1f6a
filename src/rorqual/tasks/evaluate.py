"""What answers to a task's held-out questions are worth: mean reward, and accuracy with Wilson's
interval where no answer is right in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rorqual.errors import UsageError
from rorqual.tasks.task import Grade, Messages, Question, Task

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Answered:
    """A question, what was said to it, and what that is worth."""

    question: Question[Any]
    response: str
    grade: Grade


@dataclass(frozen=True)
class TaskResult:
    """What a task's questions were answered, in their order."""

    task: str
    answered: tuple[Answered, ...]

    @property
    def total(self) -> int:
        return len(self.answered)

    @property
    def correct(self) -> int:
        """How many are wholly right."""
        return sum(each.grade.is_right for each in self.answered)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def mean_reward(self) -> float:
        return math.fsum(each.grade.reward for each in self.answered) / self.total

    @property
    def interval(self) -> tuple[float, float] | None:
        """What bounds the true accuracy (95 %); None where an answer may be right in part."""
        if any(0.0 < each.grade.reward < 1.0 for each in self.answered):
            return None
        return wilson(self.correct, self.total)

    @property
    def failures(self) -> tuple[Answered, ...]:
        """Those that are not wholly right."""
        return tuple(each for each in self.answered if not each.grade.is_right)


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a proportion; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    rate = correct / total
    scale = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _graded(task: Task[Any], question: Question[Any], response: str) -> Grade:
    """UsageError for a grader that gives anything but a Grade."""
    grade = task.grade(question, response)
    if not isinstance(grade, Grade):
        raise UsageError(
            f"grade() of the task {task.name} must return a Grade",
            found=repr(grade), expected='such as Grade(0.5, "Half of it is right.")',
        )  # fmt: skip
    return grade


def evaluate(
    answer: Callable[[list[Messages]], list[str]], task: Task[Any], count: int, seed: int = 0
) -> TaskResult:
    """Asks at most `count` held-out questions in one call of `answer` (conversations -> responses,
    in order).
    """
    if count < 0:
        raise UsageError(
            "the number of questions is out of range", found=count, expected="1 or more"
        )
    questions = list(islice(task.questions("held_out", seed), count))
    if not questions:
        raise UsageError(
            f"the task {task.name} has nothing to ask", found="no held-out question",
            expected="at least one", fix="name another task, or ask for more than 0 questions",
        )  # fmt: skip
    responses = answer([question.messages for question in questions])
    if len(responses) != len(questions):
        raise UsageError(
            "answer() must return one response for each question",
            found=len(responses), expected=len(questions),
        )  # fmt: skip
    return TaskResult(
        task.name,
        tuple(
            Answered(question, response, _graded(task, question, response))
            for question, response in zip(questions, responses, strict=True)
        ),
    )
