"""Tasks by name, and results as they are shown. Oracle: results written here."""

from __future__ import annotations

import pytest

from rorqual.cli.tasks import as_records, find_tasks, print_results
from rorqual.corpus_writer import SKILLS
from rorqual.errors import UsageError
from rorqual.tasks import RIGHT, Answered, Grade, Question, TaskResult, wilson, wrong

ASKED = Question("words", "Spell [cat]?", "c-a-t", "words:cat", "cat")


def result(name: str, *grades: Grade) -> TaskResult:
    return TaskResult(name, tuple(Answered(ASKED, "c-a-[b]", grade) for grade in grades))


def test_names_stand_with_commas_or_one_by_one_and_count_once() -> None:
    wanted = [SKILLS["units"], SKILLS["dates"]]
    for names in (["units,dates"], ["units", "dates"], [" units , dates,units"]):
        assert find_tasks(names) == wanted
    assert find_tasks(None) == list(SKILLS.values())
    with pytest.raises(UsageError, match="no such task") as problem:
        find_tasks(["dates,unit"])
    assert (problem.value.found, problem.value.fix) == ("unit", "ask for units")


def test_an_accuracy_stands_where_answers_are_right_or_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = result("plain", RIGHT, RIGHT, wrong("It is [wrong]."))
    partial = result("partial", RIGHT, Grade(0.5, "Half of it is right."))
    print_results([plain, partial], 1)
    printed = capsys.readouterr().out
    rows = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    assert "66.7%" in rows["plain"]
    assert "0.667" in rows["plain"]
    assert "%" not in rows["partial"]
    assert "0.750" in rows["partial"]
    assert printed.count("why ") == 2
    for said in (
        "plain: 'Spell [cat]?'",
        "'c-a-[b]'",
        "why  It is [wrong].",
        "Half of it is right",
    ):
        assert said in printed
    low, high = wilson(2, 3)
    whole, part = as_records([plain, partial], 0)
    assert whole == {
        "task": "plain", "correct": 2, "total": 3, "mean_reward": 2 / 3, "low": low, "high": high,
        "failures": [],
    }  # fmt: skip
    assert (part["mean_reward"], part["low"], part["high"]) == (0.75, None, None)
    assert as_records([partial], 5)[0]["failures"] == [
        {
            "prompt": "Spell [cat]?", "response": "c-a-[b]", "answer": "c-a-t", "reward": 0.5,
            "why": "Half of it is right.",
        }
    ]  # fmt: skip
    print_results([], 1)
    assert capsys.readouterr().out == ""
