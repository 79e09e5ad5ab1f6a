"""Oracle: the factors written out again here, and Python's integers."""

import random
import re

from rorqual.corpus_writer.arithmetic import sum_key
from rorqual.corpus_writer.units import Units
from rorqual.tasks import is_held_out

METERS = {"kilometer": 1000000, "meter": 1000, "centimeter": 10, "millimeter": 1}
GRAMS = {"ton": 1000000, "kilogram": 1000, "gram": 1}
SECONDS = {"week": 604800, "day": 86400, "hour": 3600, "minute": 60, "second": 1}
MONTHS = {"century": 1200, "decade": 120, "year": 12, "month": 1}
CENTS = {"dollar": 100, "euro": 100, "cent": 1}
INCHES = {"yard": 36, "foot": 12, "inch": 1}
EGGS = {"dozen": 12, "egg": 1}
LITERS = {"liter": 1000, "milliliter": 1}
TABLES = (METERS, GRAMS, SECONDS, MONTHS, CENTS, INCHES, EGGS, LITERS)
SINGULAR = {"feet": "foot", "inches": "inch", "centuries": "century"}


def singular(name: str) -> str:
    return SINGULAR.get(name, name.removesuffix("s"))


def test_conversions_equal_the_tables() -> None:
    rng, skill = random.Random(0), Units()
    for _ in range(4000):
        question = skill.question(rng)
        _, given, wanted, count = question.key.split(":")
        if given == "unknown":
            assert question.answer.startswith("I do not know")
            continue
        given, wanted = singular(given), singular(wanted)
        table = next(table for table in TABLES if given in table and wanted in table)
        result, name = re.search(r"Answer: (\d+) (\w+)$", question.answer).groups()
        assert singular(name) == wanted
        assert int(result) * table[wanted] == int(count) * table[given], question


def test_an_amount_may_stand_with_one_or_many_of_its_unit_and_with_no_other() -> None:
    rng, skill, seen = random.Random(2), Units(), set()
    for _ in range(1500):
        question = skill.question(rng)
        if question.answer.startswith("I do not know"):
            continue
        result, name = re.search(r"Answer: (\d+) (\w+)$", question.answer).groups()
        one = singular(name)
        seen.add(one)
        assert skill.grade(question, f"{result} {one}").is_right, question
        assert skill.grade(question, f"{result} {name}").is_right, question
        others = {other for table in TABLES for other in table} - {one}
        assert not any(skill.grade(question, f"{result} {other}").is_right for other in others), (
            question
        )
    assert seen == {name for table in TABLES for name in table} - {"dozen"}


def test_training_shows_no_sum_that_arithmetic_holds_out() -> None:
    rng, skill = random.Random(1), Units()
    for _ in range(3000):
        inner = re.search(r"(\d+) x (\d+):", skill.training_question(rng).answer)
        if inner:
            assert not is_held_out(sum_key("x", int(inner[1]), int(inner[2])))
