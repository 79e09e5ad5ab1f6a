"""Tasks: questions of two splits, and one grader of answers for benchmark and reward alike."""

from rorqual.tasks.evaluate import Answered, TaskResult, evaluate, wilson
from rorqual.tasks.task import (
    RIGHT,
    DrawnTask,
    Grade,
    Messages,
    Question,
    Split,
    Task,
    is_held_out,
    wrong,
)  # fmt: skip

__all__ = [
    "RIGHT", "Answered", "DrawnTask", "Grade", "Messages", "Question", "Split", "Task",
    "TaskResult", "evaluate", "is_held_out", "wilson", "wrong",
]  # fmt: skip
