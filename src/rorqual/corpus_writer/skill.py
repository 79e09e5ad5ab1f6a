"""What the shipped model's skills share: a known thing is said in a form that it was taught, and
what lies beyond the skill is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from rorqual.corpus_writer.refusals import grade_refusal, is_refusal
from rorqual.tasks import DrawnTask, Grade, Question, wrong
from rorqual.tasks.answers import Forms, grade_answer
from rorqual.tasks.task import Facts


@dataclass(frozen=True)
class Beyond:
    """What was asked and is beyond the model: only an honest no is right."""

    asked: str


class Skill(DrawnTask[Facts]):
    """A family of questions with one answer format."""

    @abstractmethod
    def forms(self, question: Question[Facts]) -> Forms | None:
        """What is right; None where only an honest no is."""

    def grade(self, question: Question[Facts], answer: str) -> Grade:
        forms = self.forms(question)
        if forms is None:
            return grade_refusal(answer)
        grade = grade_answer(answer, forms)
        if not grade.is_right and is_refusal(answer):
            return wrong("It refuses where an answer was due.")
        return grade
