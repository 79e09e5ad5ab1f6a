"""Unit conversions: name the factor, then multiply or divide as in `arithmetic`."""

from __future__ import annotations

import random
import re

from rorqual.tasks.answers import Forms, any_of, is_refusal, is_right, number
from rorqual.tasks.arithmetic import divide_working, multiply_working, sum_key
from rorqual.tasks.phrasing import phrase
from rorqual.tasks.skill import Question, Skill, is_held_out

# larger unit (one, many), smaller unit (one, many), smaller units in one larger
UNITS = (
    ("kilometer", "kilometers", "meter", "meters", 1000),
    ("meter", "meters", "centimeter", "centimeters", 100),
    ("centimeter", "centimeters", "millimeter", "millimeters", 10),
    ("kilogram", "kilograms", "gram", "grams", 1000),
    ("ton", "tons", "kilogram", "kilograms", 1000),
    ("liter", "liters", "milliliter", "milliliters", 1000),
    ("hour", "hours", "minute", "minutes", 60),
    ("minute", "minutes", "second", "seconds", 60),
    ("day", "days", "hour", "hours", 24),
    ("week", "weeks", "day", "days", 7),
    ("year", "years", "month", "months", 12),
    ("century", "centuries", "year", "years", 100),
    ("decade", "decades", "year", "years", 10),
    ("dollar", "dollars", "cent", "cents", 100),
    ("euro", "euros", "cent", "cents", 100),
    ("foot", "feet", "inch", "inches", 12),
    ("yard", "yards", "foot", "feet", 3),
    ("dozen", "dozen", "egg", "eggs", 12),
)
SHORT = {
    "kilometers": "km", "meters": "m", "centimeters": "cm", "millimeters": "mm",
    "kilograms": "kg", "grams": "g", "liters": "l", "milliliters": "ml", "minutes": "min",
    "hours": "h",
}  # fmt: skip

DOWN = (
    "how many {small} are in {n} {big}?", "how many {small} is {n} {big}?",
    "how many {small} in {n} {big}?", "!convert {n} {big} to {small}", "{n} {big} in {small}",
    "what is {n} {big} in {small}?", "how many {small} are there in {n} {big}?",
    "!change {n} {big} into {small}", "{n} {big} to {small}", "{n} {big} = ? {small}",
    "{n} {big} is how many {small}?", "{n} {big} are how many {small}?",
)  # fmt: skip
UNKNOWN_PAIRS = (
    ("miles", "kilometers"), ("kilometers", "miles"), ("pounds", "kilograms"),
    ("kilograms", "pounds"), ("inches", "centimeters"), ("gallons", "liters"), ("feet", "meters"),
    ("ounces", "grams"), ("meters", "feet"), ("acres", "hectares"), ("dollars", "euros"),
    ("euros", "dollars"), ("yards", "meters"), ("cups", "milliliters"), ("stones", "kilograms"),
    ("degrees celsius", "fahrenheit"), ("degrees fahrenheit", "celsius"), ("knots", "miles"),
    ("watts", "horsepower"), ("bytes", "bits"), ("miles", "feet"), ("seconds", "hours"),
    ("liters", "gallons"), ("grams", "ounces"), ("yen", "dollars"), ("months", "weeks"),
)  # fmt: skip
UNKNOWN_ANSWER = "I do not know how to turn {big} into {small}."
DOZEN = (
    "how many are {n} dozen?", "how many eggs are in {n} dozen?", "what is {n} dozen?",
    "how many is {n} dozen?", "how many eggs is {n} dozen?", "{n} dozen eggs is how many?",
)  # fmt: skip


class Units(Skill):
    name = "units"

    def question(self, rng: random.Random) -> Question:
        if rng.random() < 0.06:
            return self._unknown(rng)
        return self.ask(rng, rng.choice(UNITS))

    def ask(self, rng: random.Random, unit: tuple[str, str, str, str, int]) -> Question:
        """A conversion between the two units of one row, in either direction."""
        if rng.random() < 0.7 or unit[4] == 24:
            return self._down(rng, unit)
        return self._up(rng, unit)

    def training_question(self, rng: random.Random) -> Question:
        # A conversion carries a sum: one that arithmetic holds out must not be shown here either.
        while True:
            question = super().training_question(rng)
            inner = re.search(r"(\d+) x (\d+):", question.answer)
            if not inner or not is_held_out(sum_key("x", int(inner[1]), int(inner[2]))):
                return question

    def check(self, question: Question, response: str) -> bool:
        """The amount with its unit, alone or after what was asked and "="."""
        if question.answer.startswith("I do not know"):
            return is_refusal(response)
        amount, _, name = question.answer.rpartition("Answer: ")[2].partition(" ")
        names = [name, SHORT.get(name, name), *(row[0] for row in UNITS if row[1] == name)]
        names += [row[2] for row in UNITS if row[3] == name]
        final = f"{number(int(amount))} ?{any_of(sorted(set(names)))}"
        given = question.key.split(":")[3]
        return is_right(response, Forms(final, rf"(?:{given} ?[a-z]+ (?:=|is|are) )?{final}"))

    def _unknown(self, rng: random.Random) -> Question:
        big, small = rng.choice(UNKNOWN_PAIRS)
        count = rng.randint(2, 99)
        prompt = phrase(rng, rng.choice(DOWN), n=count, big=big, small=small)
        answer = UNKNOWN_ANSWER.format(big=big, small=small)
        return Question(self.name, prompt, answer, f"units:unknown:{big}:{count}")

    def _down(self, rng: random.Random, unit: tuple[str, str, str, str, int]) -> Question:
        one, many, _, small, factor = unit
        if factor in (10, 100, 1000):
            count = rng.randint(1, 20) if rng.random() < 0.7 else rng.randint(21, 99)
        else:
            count = rng.randint(1, 12) if rng.random() < 0.8 else rng.randint(13, 30)
        if factor in (24, 60) and count > 9 and count != 10:
            count = rng.randint(1, 9)
        if factor == 12 and count > 12:
            count = rng.randint(1, 12)
        name = one if count == 1 else many
        if one == "dozen":
            prompt = phrase(rng, rng.choice(DOZEN), n=count)
        else:
            prompt = self._prompt(rng, count, name, small)
        answer = f"1 {one} = {factor} {small}. "
        answer += _product(count, factor)
        key = f"units:{one}:{small}:{count}"
        return Question(self.name, prompt, f"{answer} {small}", key)

    def _up(self, rng: random.Random, unit: tuple[str, str, str, str, int]) -> Question:
        one, many, _, small, factor = unit
        if one == "dozen":
            return self._down(rng, unit)
        count = rng.randint(2, 20) if factor in (10, 100, 1000) else rng.randint(2, 9)
        total = count * factor
        prompt = self._prompt(rng, total, small, many)
        answer = f"{factor} {small} = 1 {one}. "
        if factor in (3, 7) and total > 9:
            answer += divide_working(total, factor)
        else:
            answer += f"{total} / {factor} = {count}. Answer: {count}"
        return Question(self.name, prompt, f"{answer} {many}", f"units:{small}:{one}:{total}")

    def _prompt(self, rng: random.Random, count: int, given: str, wanted: str) -> str:
        template = rng.choice(DOWN)
        is_short = rng.random() < 0.3 and not template.startswith("how many")
        if is_short:
            given, wanted = SHORT.get(given, given), SHORT.get(wanted, wanted)
        prompt = phrase(rng, template, n=count, big=given, small=wanted)
        if is_short and given in SHORT.values() and rng.random() < 0.3:
            prompt = re.sub(r"(\d) (?=[a-z])", r"\1", prompt, count=1)
        return prompt


def _product(count: int, factor: int) -> str:
    if factor in (10, 100, 1000) or factor == 60 or (count <= 12 and factor <= 12):
        return f"{count} x {factor} = {count * factor}. Answer: {count * factor}"
    working = multiply_working(factor, count) if factor > count else multiply_working(count, factor)
    return working if ":" in working else f"{working}. Answer: {count * factor}"
