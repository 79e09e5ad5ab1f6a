"""Unit conversions: name the factor, then multiply or divide as in `arithmetic`."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rorqual.corpus_writer.arithmetic import Sum, divide_working, multiply_working, sum_key
from rorqual.corpus_writer.phrasing import phrase
from rorqual.corpus_writer.skill import Beyond, Skill
from rorqual.tasks import Question, is_held_out
from rorqual.tasks.answers import Forms, any_of, number


@dataclass(frozen=True)
class Unit:
    """A larger unit by its names for one and for many, a smaller one, how many of these it has."""

    one: str
    many: str
    small_one: str
    small: str
    factor: int


UNITS = (
    Unit("kilometer", "kilometers", "meter", "meters", 1000),
    Unit("meter", "meters", "centimeter", "centimeters", 100),
    Unit("centimeter", "centimeters", "millimeter", "millimeters", 10),
    Unit("kilogram", "kilograms", "gram", "grams", 1000),
    Unit("ton", "tons", "kilogram", "kilograms", 1000),
    Unit("liter", "liters", "milliliter", "milliliters", 1000),
    Unit("hour", "hours", "minute", "minutes", 60),
    Unit("minute", "minutes", "second", "seconds", 60),
    Unit("day", "days", "hour", "hours", 24),
    Unit("week", "weeks", "day", "days", 7),
    Unit("year", "years", "month", "months", 12),
    Unit("century", "centuries", "year", "years", 100),
    Unit("decade", "decades", "year", "years", 10),
    Unit("dollar", "dollars", "cent", "cents", 100),
    Unit("euro", "euros", "cent", "cents", 100),
    Unit("foot", "feet", "inch", "inches", 12),
    Unit("yard", "yards", "foot", "feet", 3),
    Unit("dozen", "dozen", "egg", "eggs", 12),
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


@dataclass(frozen=True)
class Conversion:
    """`count` of a unit in its smaller one, or of the smaller one in it.

    `product`: the factors of the multiplication that its working shows in columns, if it does.
    """

    unit: Unit
    count: int
    is_to_smaller: bool
    product: tuple[int, int] | None = None

    @property
    def result(self) -> int:
        if self.is_to_smaller:
            return self.count * self.unit.factor
        return self.count // self.unit.factor

    @property
    def wanted(self) -> str:
        """The name for many of the unit that is asked for."""
        return self.unit.small if self.is_to_smaller else self.unit.many

    @property
    def is_trainable(self) -> bool:
        """Whether it shows no sum that arithmetic holds out."""
        return self.product is None or not is_held_out(sum_key("x", *self.product))


class Units(Skill[Conversion | Beyond]):
    name = "units"

    def question(self, rng: random.Random) -> Question[Conversion | Beyond]:
        if rng.random() < 0.06:
            return self._unknown(rng)
        return self.ask(rng, rng.choice(UNITS))

    def ask(self, rng: random.Random, unit: Unit) -> Question[Conversion | Beyond]:
        """A conversion between the two units of one row, in either direction."""
        if rng.random() < 0.7 or unit.factor == 24:
            return self._down(rng, unit)
        return self._up(rng, unit)

    def training_question(self, rng: random.Random) -> Question[Conversion | Beyond]:
        # A conversion carries a sum: one that arithmetic holds out must not be shown here either.
        while True:
            question = super().training_question(rng)
            if isinstance(question.facts, Beyond) or question.facts.is_trainable:
                return question

    def forms(self, question: Question[Conversion | Beyond]) -> Forms | None:
        """The amount with its unit, alone or after what was asked and "="."""
        asked = question.facts
        if isinstance(asked, Beyond):
            return None
        name = asked.wanted
        names = {name, SHORT.get(name, name)}
        names |= {unit.one for unit in UNITS if unit.many == name}
        names |= {unit.small_one for unit in UNITS if unit.small == name}
        final = f"{number(asked.result)} ?{any_of(sorted(names))}"
        return Forms(final, rf"(?:{asked.count} ?[a-z]+ (?:=|is|are) )?{final}", "amount")

    def _unknown(self, rng: random.Random) -> Question[Conversion | Beyond]:
        big, small = rng.choice(UNKNOWN_PAIRS)
        count = rng.randint(2, 99)
        prompt = phrase(rng, rng.choice(DOWN), n=count, big=big, small=small)
        answer = UNKNOWN_ANSWER.format(big=big, small=small)
        facts = Beyond(f"{count} {big} in {small}")
        return Question(self.name, prompt, answer, f"units:unknown:{big}:{count}", facts)

    def _down(self, rng: random.Random, unit: Unit) -> Question[Conversion | Beyond]:
        factor = unit.factor
        if factor in (10, 100, 1000):
            count = rng.randint(1, 20) if rng.random() < 0.7 else rng.randint(21, 99)
        else:
            count = rng.randint(1, 12) if rng.random() < 0.8 else rng.randint(13, 30)
        if factor in (24, 60) and count > 9 and count != 10:
            count = rng.randint(1, 9)
        if factor == 12 and count > 12:
            count = rng.randint(1, 12)
        name = unit.one if count == 1 else unit.many
        if unit.one == "dozen":
            prompt = phrase(rng, rng.choice(DOZEN), n=count)
        else:
            prompt = self._prompt(rng, count, name, unit.small)
        is_shown = not (_is_easy(count, factor) or Sum("x", (count, factor)).is_recalled)
        product = (count, factor) if is_shown else None
        answer = f"1 {unit.one} = {factor} {unit.small}. {_product(count, factor)} {unit.small}"
        key = f"units:{unit.one}:{unit.small}:{count}"
        return Question(self.name, prompt, answer, key, Conversion(unit, count, True, product))

    def _up(self, rng: random.Random, unit: Unit) -> Question[Conversion | Beyond]:
        if unit.one == "dozen":
            return self._down(rng, unit)
        factor = unit.factor
        count = rng.randint(2, 20) if factor in (10, 100, 1000) else rng.randint(2, 9)
        total = count * factor
        prompt = self._prompt(rng, total, unit.small, unit.many)
        answer = f"{factor} {unit.small} = 1 {unit.one}. "
        if factor in (3, 7) and total > 9:
            answer += divide_working(total, factor)
        else:
            answer += f"{total} / {factor} = {count}. Answer: {count}"
        key = f"units:{unit.small}:{unit.one}:{total}"
        facts = Conversion(unit, total, False)
        return Question(self.name, prompt, f"{answer} {unit.many}", key, facts)

    def _prompt(self, rng: random.Random, count: int, given: str, wanted: str) -> str:
        template = rng.choice(DOWN)
        is_short = rng.random() < 0.3 and not template.startswith("how many")
        if is_short:
            given, wanted = SHORT.get(given, given), SHORT.get(wanted, wanted)
        prompt = phrase(rng, template, n=count, big=given, small=wanted)
        if is_short and given in SHORT.values() and rng.random() < 0.3:
            prompt = re.sub(r"(\d) (?=[a-z])", r"\1", prompt, count=1)
        return prompt


def _is_easy(count: int, factor: int) -> bool:
    """Whether a product is said at once, in the order in which it is asked."""
    return factor in (10, 60, 100, 1000) or (count <= 12 and factor <= 12)


def _product(count: int, factor: int) -> str:
    if _is_easy(count, factor):
        return f"{count} x {factor} = {count * factor}. Answer: {count * factor}"
    working = multiply_working(max(count, factor), min(count, factor))
    return working if ":" in working else f"{working}. Answer: {count * factor}"
