"""The tasks that commands know by name, and how their results are shown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rorqual.errors import UsageError, listing

if TYPE_CHECKING:
    from rorqual.tasks import Task, TaskResult


def find_tasks(names: Sequence[str] | None) -> list[Task[Any]]:
    """The tasks of these names, each of which may be several with commas between; all without any.

    UsageError lists the names that there are.
    """
    from rorqual.corpus_writer import SKILLS

    known: dict[str, Task[Any]] = {**SKILLS}
    if names is None:
        return list(known.values())
    wanted = [name.strip() for some in names for name in some.split(",")]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                "no such task", found=name or "an empty name", expected=listing(sorted(known)),
                fix=f"ask for {near[0]}" if near else "name some of these, with commas between",
            )  # fmt: skip
    return [known[name] for name in dict.fromkeys(wanted)]


def print_results(results: Sequence[TaskResult], num_failures: int) -> None:
    """A table, and the first wrong answers of each task with the reason."""
    from rich.table import Table

    from rorqual.log import output_console

    if not results:
        return
    table = Table("task", "right", "asked", "accuracy", "95 % interval", "mean reward")
    for result in results:
        measured = ("", "")  # an accuracy says little where an answer may be right in part
        if result.interval is not None:
            low, high = result.interval
            measured = (f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}")
        counts = (str(result.correct), str(result.total))
        table.add_row(result.task, *counts, *measured, f"{result.mean_reward:.3f}")
    output = output_console()
    output.print(table)
    for result in results:
        for failure in result.failures[:num_failures]:
            question = failure.question
            output.print(f"{result.task}: {question.prompt!r}", markup=False)
            output.print(f"   said {failure.response!r}", markup=False)
            output.print(f"   for  {question.answer!r}", markup=False)
            output.print(f"   why  {failure.grade.why}", markup=False)


def as_records(results: Sequence[TaskResult], num_failures: int) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [
        {
            "task": result.task,
            "correct": result.correct,
            "total": result.total,
            "mean_reward": result.mean_reward,
            "low": result.interval[0] if result.interval else None,
            "high": result.interval[1] if result.interval else None,
            "failures": [
                {
                    "prompt": failure.question.prompt,
                    "response": failure.response,
                    "answer": failure.question.answer,
                    "reward": failure.grade.reward,
                    "why": failure.grade.why,
                }
                for failure in result.failures[:num_failures]
            ],
        }
        for result in results
    ]
