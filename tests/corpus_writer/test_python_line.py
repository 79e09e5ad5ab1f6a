"""Oracle: Python's own parser, and a run of the reference lines (ours, not a model's)."""

import ast
import contextlib
import io
import random

import pytest

from rorqual.corpus_writer.python_line import RECIPES, PythonLine, fenced

EXPECTED_OUTPUT = {
    "print(sorted([3, 1, 2]))": "[1, 2, 3]\n",
    "print(list(range(2, 11, 2)))": "[2, 4, 6, 8, 10]\n",
    'name = "Ben"; print(f"Hello, {name}!")': "Hello, Ben!\n",
}


@pytest.mark.parametrize("recipe", range(len(RECIPES)))
def test_every_reference_parses_and_runs(recipe: int) -> None:
    rng, skill = random.Random(recipe), PythonLine()
    for _ in range(20):
        answer = skill.ask(rng, recipe).answer
        line = answer.removeprefix("```python\n").removesuffix("\n```")
        assert "\n" not in line
        ast.parse(line)
        if "input(" not in line:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(line, "answer", "exec"), {})
            assert output.getvalue()


@pytest.mark.parametrize(("line", "output"), EXPECTED_OUTPUT.items())
def test_lines_do_what_they_say(line: str, output: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as found:
        exec(compile(line, "answer", "exec"), {})
    assert found.getvalue() == output


def test_checker_compares_trees() -> None:
    rng, skill = random.Random(0), PythonLine()
    while 'print("' not in (question := skill.question(rng)).answer:
        pass
    line = question.answer.split("\n")[1]
    assert skill.grade(question, fenced(line)).is_right
    assert skill.grade(question, f"`{line}`").is_right
    assert skill.grade(question, line.replace('"', "'").replace("(", "( ")).is_right
    assert not skill.grade(question, line.replace("print", "show")).is_right
    assert not skill.grade(question, "print(").is_right
