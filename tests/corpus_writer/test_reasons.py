"""Why an answer is right or wrong, from facts alone. Oracle: cases written by hand."""

from __future__ import annotations

import random
from dataclasses import is_dataclass, replace
from typing import Any

import pytest

from rorqual.corpus_writer import SKILLS
from rorqual.corpus_writer.about import Talk
from rorqual.corpus_writer.arithmetic import Sum
from rorqual.corpus_writer.dates import DayCount, LeapYear, MonthLength, Neighbour
from rorqual.corpus_writer.facts import Fact, of_country, of_opposite
from rorqual.corpus_writer.letters import Spelling
from rorqual.corpus_writer.numbers import Comparison, Counting, Parity, Progression
from rorqual.corpus_writer.python_line import Line
from rorqual.corpus_writer.skill import Beyond
from rorqual.corpus_writer.stories import StoryWish
from rorqual.corpus_writer.units import UNITS, Conversion
from rorqual.tasks import Question

STORY = (
    "Once there was a fox named Lily. She had a red ball and took it everywhere. One day, the "
    "ball was gone. The owl helped her to look for it. At last they found it under a tree."
)
WRONG, RIGHT, REFUSES = "The {} is wrong.", "It is right.", "It refuses where an answer was due."
AMONG, NO_REFUSAL = "The right {} is there, but not by itself.", "It answers where only an honest"


@pytest.mark.parametrize(
    ("task", "facts", "said", "why"),
    [
        ("arithmetic", Sum("+", (47, 85)), "85 + 47 = 132", RIGHT),
        ("arithmetic", Sum("+", (47, 85)), "47 + 85: 7+5=12. Answer: 133", WRONG.format("number")),
        ("arithmetic", Sum("-", (3, 8)), "-5", RIGHT),
        ("arithmetic", Sum("/", (85, 3)), "28", WRONG.format("number")),
        ("arithmetic", Sum("/", (85, 3)), "28 remainder 1", RIGHT),
        ("arithmetic", Sum("+", (1, 2, 3)), "It is 6 I think", AMONG.format("number")),
        ("arithmetic", Sum("x", (7, 8)), "That is beyond me.", REFUSES),
        ("arithmetic", Beyond("sin(3)"), "0.14", NO_REFUSAL),
        ("arithmetic", Beyond("sin(3)"), "That is beyond me.", RIGHT),
        ("dates", DayCount("Monday", 10, 1), "Thursday", RIGHT),
        ("dates", DayCount("Monday", 10, -1), "Thursday", WRONG.format("name")),
        ("dates", Neighbour("December", 1), "January", RIGHT),
        ("dates", MonthLength("March"), "March has 31 days.", RIGHT),
        ("dates", MonthLength("March"), "March", WRONG.format("number")),
        ("dates", LeapYear(2000), "No", WRONG.format("answer")),
        ("units", Conversion(UNITS[-2], 2, True), "6 feet", RIGHT),
        ("units", Conversion(UNITS[-2], 2, True), "6 yards", WRONG.format("amount")),
        ("units", Conversion(UNITS[-2], 6, False), "2 yards", RIGHT),
        ("numbers", Parity(7), "even", WRONG.format("word")),
        ("numbers", Comparison((12, 21), is_larger=True), "21", RIGHT),
        ("numbers", Comparison((12, 21), is_larger=False), "21", WRONG.format("number")),
        ("numbers", Counting((2, 4, 6)), "2, 4", WRONG.format("list")),
        ("numbers", Progression((5, 8, 11)), "11", RIGHT),
        ("letters", Spelling("spell", "cat"), "c-a-t", RIGHT),
        ("letters", Spelling("nth", "cat", place=2), "t", WRONG.format("letter")),
        ("letters", Spelling("many", "berry", letter="r"), "2", RIGHT),
        ("letters", Spelling("contains", "berry", letter="x"), "yes", WRONG.format("word")),
        ("capitals", of_country("France"), "Paris", RIGHT),
        ("capitals", of_country("France"), "Rome", WRONG.format("capital")),
        ("capitals", of_country("France"), "Not Paris.", AMONG.format("capital")),
        ("capitals", Fact("Mars"), "Paris", NO_REFUSAL),
        ("opposites", of_opposite("hot"), "cold", RIGHT),
        ("definitions", Fact("zob"), "I do not know", RIGHT),
        ("about", Talk("bye"), "Hello!", WRONG.format("reply")),
        ("python", Line("print(1)"), "`print( 1 )`", RIGHT),
        ("python", Line("print(1)"), "```python\n```", "There is no answer."),
        ("python", Line("print(1)"), "print(", "It is no Python, or not by itself."),
        ("python", Line("print(1)"), "print(2)", "The code does another thing."),
        ("stories", StoryWish(name="Lily", animal="fox"), STORY, RIGHT),
        ("stories", StoryWish(name="Tom"), STORY, "It does not tell of Tom."),
        ("stories", StoryWish(), STORY[:-1], "It does not come to an end."),
        ("stories", StoryWish(), f"{STORY} {STORY}", "It says a sentence again."),
        ("stories", StoryWish(), "A fox ran. It fell.", "It is too short for a story."),
        ("stories", StoryWish(), f"{STORY} oh no.", "Not all of its sentences are sentences."),
        ("letters", Spelling("spell", "cat"), "", "There is no answer."),
        ("stories", StoryWish(), " \n", "There is no answer."),
        ("python", Line("print(1)"), "1 + " * 2000 + "1", "It is longer than 4,000 characters."),
    ],
)
def test_the_reason(task: str, facts: Any, said: str, why: str) -> None:
    grade = SKILLS[task].grade(Question(task, "?", "?", "?", facts), said)
    assert grade.why.startswith(why)
    assert grade.reward == float(why == RIGHT)


@pytest.mark.parametrize("name", SKILLS)
def test_a_grader_reads_facts_and_neither_prompt_nor_key(name: str) -> None:
    rng, skill = random.Random(f"facts:{name}"), SKILLS[name]
    questions = [skill.question(rng) for _ in range(300)]
    for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
        assert is_dataclass(question.facts)
        hidden = replace(question, prompt="?", key="?")
        for said in (question.answer, other.answer):
            assert skill.grade(hidden, said) == skill.grade(question, said)


@pytest.mark.parametrize(
    ("task", "facts", "said"),
    [
        ("arithmetic", Sum("+", (47, 85)), "Answer: 132"),
        ("python", Line("print(1)"), "print(1)"),
        ("stories", StoryWish(), STORY),
    ],
)
def test_an_answer_of_4000_characters_is_not_too_long(task: str, facts: Any, said: str) -> None:
    question = Question(task, "?", "?", "?", facts)
    for length, is_right in ((4000, True), (4001, False)):
        grade = SKILLS[task].grade(question, said.ljust(length))
        assert grade.is_right == is_right
        assert is_right or grade.why == "It is longer than 4,000 characters."
