"""Which is larger, what comes next, counting, even and odd: numbers below a thousand."""

from __future__ import annotations

import random
import re
from typing import Any

from rorqual.tasks.answers import Forms, is_right, number
from rorqual.tasks.phrasing import phrase
from rorqual.tasks.skill import Question, Skill

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


class Numbers(Skill):
    name = "numbers"

    def question(self, rng: random.Random) -> Question:
        (make,) = rng.choices(
            (self._compare, self._sequence, self._count, self._parity), (38, 30, 18, 14)
        )
        return make(rng)

    def check(self, question: Question, response: str) -> bool:
        """A number, a word or a list alone, or in the sentence that training has for it."""
        kind = question.key.split(":")[1]
        wanted = re.findall(r"[0-9]+", question.answer)
        if kind == "count":
            final = whole = r"(?:, ?|,? and | )".join(wanted)
        elif kind == "parity":
            word = "even" if "even" in question.answer else "odd"
            final = rf"(?:(?:{wanted[0]}|it) is )?{word}"
            whole = rf"(?:{wanted[0]} ends in {wanted[1]}, so )?{final}"
        elif kind == "compare":
            word = "larger|bigger|greater|more" if "larger" in question.answer else "smaller|less"
            final = whole = rf"{wanted[0]}(?: is (?:{word})(?: than {wanted[1]})?)?"
        else:
            final = whole = number(int(wanted[-1]))
        return is_right(response, Forms(final, whole))

    def _compare(self, rng: random.Random) -> Question:
        top = rng.choice((20, 100, 100, 1000, 1000))
        a, b = rng.sample(range(top), 2)
        if rng.random() < 0.3 and a > 9:  # near numbers and swapped digits are the hard ones
            b = int(str(a)[::-1]) if rng.random() < 0.5 else a + rng.randint(1, 9)
        if a == b:
            b = a + 1
        is_larger = rng.random() < 0.65
        template = rng.choice(LARGER if is_larger else SMALLER)
        answer = f"{max(a, b)} is larger than {min(a, b)}."
        if not is_larger:
            answer = f"{min(a, b)} is smaller than {max(a, b)}."
        key = f"numbers:compare:{min(a, b)},{max(a, b)}"
        return Question(self.name, phrase(rng, template, a=a, b=b), answer, key)

    def _sequence(self, rng: random.Random) -> Question:
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
        return Question(self.name, prompt, answer, key)

    def _count(self, rng: random.Random) -> Question:
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
        return Question(self.name, prompt, ", ".join(map(str, numbers)), key)

    def _parity(self, rng: random.Random) -> Question:
        number = rng.randint(0, rng.choice((20, 100, 999)))
        word = "odd" if number % 2 else "even"
        answer = f"{number} ends in {number % 10}, so it is {word}."
        prompt = phrase(rng, rng.choice(PARITY), a=number)
        return Question(self.name, prompt, answer, f"numbers:parity:{number}")
