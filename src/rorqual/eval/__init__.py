"""What a model can do, measured: tasks, and bits per byte beside plain compressors."""

from rorqual.eval.bits_per_byte import SourceResult, compare_on_held_out
from rorqual.eval.ngram import NgramModel
from rorqual.eval.tasks import answer_greedily, evaluate_tasks

__all__ = [
    "NgramModel",
    "SourceResult",
    "answer_greedily",
    "compare_on_held_out",
    "evaluate_tasks",
]
