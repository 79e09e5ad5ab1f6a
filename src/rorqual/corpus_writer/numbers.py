"""Which is larger, what comes next, counting, even and odd: numbers below a thousand."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from rorqual.corpus_writer.phrasing import phrase
from rorqual.corpus_writer.skill import Skill
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, number

LARGER = (
    "which is larger, {a} or {b}?", "which is bigger, {a} or {b}?", "which is greater, {a} or {b}?",
    "what is larger, {a} or {b}?", "which number is larger: {a} or {b}?",
    "{a} or {b}, which is more?",
    "is {a} or {b} bigger?", "which one is bigger, {a} or {b}?", "which is more, {a} or {b}?",
    "what's bigger, {a} or {b}?", "larger: {a} or {b}", "!tell me which is larger, {a} or {b}",
)  # fmt: skip
SMALLER = (
    "which is smaller, {a} or {b}?", "which is less, {a} or {b}?", "what is smaller, {a} or {b}?",
    "which number is smaller: {a} or {b}?", "which one is smaller, {a} or {b}?",
    "what's smaller, {a} or {b}?", "smaller: {a} or {b}",
)  # fmt: skip
SEQUENCE = (
    "what comes next: {s}?", "what is the next number: {s}?", "what is next: {s}", "{s}, ...",
    "what number comes next in {s}?", "!continue {s}", "!continue the sequence {s}",
    "what is the next number in the sequence {s}?", "next number: {s}", "{s}, what comes next?",
    "which number follows {s}?", "what's next: {s}?", "{s}, ?",
)  # fmt: skip
COUNT_UP = (
    "!count from {a} to {b}", "!count up from {a} to {b}", "!list the numbers from {a} to {b}",
    "!say the numbers from {a} to {b}", "!count {a} to {b}", "numbers from {a} to {b}",
    "!write the numbers {a} to {b}",
)  # fmt: skip
COUNT_TO = ("!count to {b}", "!count up to {b}", "!please count to {b}")
COUNT_DOWN = (
    "!count down from {a} to {b}", "!count backwards from {a} to {b}",
    "!count back from {a} to {b}",
)  # fmt: skip
COUNT_BY = ("!count by {step}s to {b}", "!count in {step}s to {b}", "!count by {step}s up to {b}")
PARITY = (
    "is {a} even or odd?", "is {a} odd or even?", "is {a} even?", "is {a} an even number?",
    "is {a} odd?", "is {a} an odd number?", "{a}: odd or even?", "!tell me if {a} is even or odd",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The larger or the smaller of two numbers."""

    numbers: tuple[int, int]
    is_larger: bool

    @property
    def answer(self) -> str:
        """The sentence that says it."""
        low, high = sorted(self.numbers)
        first, word, last = (high, "larger", low) if self.is_larger else (low, "smaller", high)
        return f"{first} is {word} than {last}."


@dataclass(frozen=True)
class Progression:
    """The last of terms that go up or down by one step."""

    terms: tuple[int, ...]


@dataclass(frozen=True)
class Counting:
    """All numbers from the first to the last."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Parity:
    """Even or odd."""

    number: int

    @property
    def word(self) -> str:
        return "odd" if self.number % 2 else "even"

    @property
    def answer(self) -> str:
        """The sentence that says it."""
        return f"{self.number} ends in {self.number % 10}, so it is {self.word}."


NumberFacts = Comparison | Progression | Counting | Parity


class Numbers(Skill[NumberFacts]):
    name = "numbers"

    def question(self, rng: random.Random) -> Question[NumberFacts]:
        (make,) = rng.choices(
            (self._compare, self._sequence, self._count, self._parity), (38, 30, 18, 14)
        )
        return make(rng)

    def forms(self, question: Question[NumberFacts]) -> Forms:
        """A number, a word or a list alone, or in the sentence that training has for it."""
        noun = "number"
        match question.facts:
            case Counting(numbers):
                final = whole = r"(?:, ?|,? and | )".join(map(str, numbers))
                noun = "list"
            case Parity(of) as asked:
                final = rf"(?:(?:{of}|it) is )?{asked.word}"
                whole = rf"(?:{of} ends in {of % 10}, so )?{final}"
                noun = "word"
            case Comparison(numbers, is_larger):
                first, last = sorted(numbers, reverse=is_larger)
                word = "larger|bigger|greater|more" if is_larger else "smaller|less"
                final = whole = rf"{first}(?: is (?:{word})(?: than {last})?)?"
            case Progression(terms):
                final = whole = number(terms[-1])
        return Forms(final, whole, noun)

    def _compare(self, rng: random.Random) -> Question[NumberFacts]:
        top = rng.choice((20, 100, 100, 1000, 1000))
        a, b = rng.sample(range(top), 2)
        if rng.random() < 0.3 and a > 9:  # near numbers and swapped digits are the hard ones
            b = int(str(a)[::-1]) if rng.random() < 0.5 else a + rng.randint(1, 9)
        if a == b:
            b = a + 1
        is_larger = rng.random() < 0.65
        template = rng.choice(LARGER if is_larger else SMALLER)
        facts = Comparison((a, b), is_larger)
        key = f"numbers:compare:{min(a, b)},{max(a, b)}"
        return Question(self.name, phrase(rng, template, a=a, b=b), facts.answer, key, facts)

    def _sequence(self, rng: random.Random) -> Question[NumberFacts]:
        step, start = rng.randint(1, 10), rng.randint(0, 50)
        length = rng.choice((3, 4, 4, 5))
        terms = [start + step * i for i in range(length + 1)]
        if rng.random() < 0.25:
            terms = terms[::-1]
        sign = "+" if terms[0] < terms[1] else "-"
        shown = rng.choice((", ", ", ", " ")).join(map(str, terms[:-1]))
        answer = (
            f"{max(terms[:2])}-{min(terms[:2])}={step}, so each step is {sign}{step}. "
            f"{terms[-2]}{sign}{step}={terms[-1]}. Answer: {terms[-1]}"
        )
        prompt = phrase(rng, rng.choice(SEQUENCE), s=shown)
        key = f"numbers:sequence:{terms[0]},{terms[1]}"
        return Question(self.name, prompt, answer, key, Progression(tuple(terms)))

    def _count(self, rng: random.Random) -> Question[NumberFacts]:
        roll = rng.random()
        if roll < 0.45:
            low = rng.choice((1, 1, 0, rng.randint(2, 40)))
            high = low + rng.randint(4, 19)
            templates = COUNT_TO if low == 1 and rng.random() < 0.5 else COUNT_UP
            numbers = list(range(low, high + 1))
            slots: dict[str, Any] = {"a": low, "b": high}
        elif roll < 0.7:
            low = rng.choice((1, 1, 0, rng.randint(2, 20)))
            high = low + rng.randint(4, 14)
            templates = COUNT_DOWN
            numbers = list(range(high, low - 1, -1))
            slots = {"a": high, "b": low}
        else:
            step = rng.choice((2, 2, 3, 4, 5, 5, 10, 10))
            templates = COUNT_BY
            numbers = list(range(step, step * rng.randint(4, 10) + 1, step))
            slots = {"step": step, "b": numbers[-1]}
        prompt = phrase(rng, rng.choice(templates), **slots)
        if roll >= 0.7 and rng.random() < 0.5:
            names = {2: "two", 3: "three", 4: "four", 5: "five", 10: "ten"}
            prompt = re.sub(r"\b\d+s\b", f"{names[slots['step']]}s", prompt)
        key = f"numbers:count:{numbers[0]},{numbers[1]},{numbers[-1]}"
        facts = Counting(tuple(numbers))
        return Question(self.name, prompt, ", ".join(map(str, numbers)), key, facts)

    def _parity(self, rng: random.Random) -> Question[NumberFacts]:
        facts = Parity(rng.randint(0, rng.choice((20, 100, 999))))
        prompt = phrase(rng, rng.choice(PARITY), a=facts.number)
        return Question(self.name, prompt, facts.answer, f"numbers:parity:{facts.number}", facts)
