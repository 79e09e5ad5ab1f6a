"""What a visitor says next about the same thing: "and 5 more?", "another one", "and backwards?"."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rorqual.corpus_writer import (
    arithmetic,
    dates,
    facts,
    letters,
    numbers,
    python_line,
    stories,
    story_parts,
)
from rorqual.corpus_writer.phrasing import phrase
from rorqual.corpus_writer.skill import Beyond
from rorqual.corpus_writer.units import Conversion, Units
from rorqual.corpus_writer.words import common_words, definitions
from rorqual.tasks import Question, is_held_out
from rorqual.tasks.task import CORE

Asked = Question[Any]

PLUS = (
    "and {b} more?",
    "plus {b}",
    "add {b}",
    "now add {b}",
    "and plus {b}?",
    "+ {b}",
    "add {b} more",
)
MINUS = (
    "minus {b}",
    "take away {b}",
    "now subtract {b}",
    "and minus {b}?",
    "- {b}",
    "now take away {b}",
)
TIMES = ("times {b}", "now multiply by {b}", "x {b}", "and times {b}?", "multiply that by {b}")
DOUBLE = ("double it", "double that", "and twice that?", "now double it")
AGAIN = ("and {x}?", "what about {x}?", "{x}?", "now {x}", "and {x}", "how about {x}?")
ANOTHER = (
    "another one", "another story", "one more", "!tell me another", "another", "again",
    "one more story",
    "another one please", "can i have another one?", "more", "!tell me another story",
)  # fmt: skip
ANOTHER_ABOUT = (
    "now one about {x}", "and one about {x}?", "another one about {x}", "one about {x} please",
    "!tell me one about {x}", "now a story about {x}",
)  # fmt: skip
BACKWARDS = ("and backwards?", "backwards?", "now backwards", "reverse it", "and in reverse?")
HOW_LONG = ("how many letters does it have?", "how many letters is that?", "how many letters?")
PYTHON_AGAIN = ("and {w} in python?", "now {w} in python", "and how do i {w} in python?")
AND_THEN = ("and after that?", "and then?", "what comes after that?", "and the next one?")


def follow_up(rng: random.Random, last: Asked) -> Asked | None:
    """A question that leans on the last one, never a held-out item; None where there is none."""
    make = _MAKERS.get(last.task)
    for _ in range(4):  # a held-out draw is thrown away
        question = make(rng, last) if make else None
        if question is None or not is_held_out(question.key):
            return question
    return None


def _arithmetic(rng: random.Random, last: Question[arithmetic.Sum | Beyond]) -> Asked | None:
    if isinstance(last.facts, Beyond) or last.facts.result is None:
        return None
    a, rest = last.facts.result
    if rest or not 0 <= a <= 999:
        return None
    b = rng.randint(1, 9) if rng.random() < 0.4 else rng.randint(10, 99)
    kind = rng.choice("++-x2")
    if kind == "+":
        prompt, working = phrase(rng, rng.choice(PLUS), b=b), arithmetic.add_working(a, b)
    elif kind == "-":
        prompt, working = phrase(rng, rng.choice(MINUS), b=b), arithmetic.subtract_working(a, b)
    else:
        b = 2 if kind == "2" else rng.randint(2, 9)
        prompt = phrase(rng, rng.choice(DOUBLE if kind == "2" else TIMES), b=b)
        working = arithmetic.multiply_working(a, b)
        kind = "x"
    key, done = arithmetic.sum_key(kind, a, b), arithmetic.Sum(kind, (a, b))
    return Question(last.task, prompt, working, key, done)


def _stories(rng: random.Random, last: Question[stories.StoryWish]) -> Asked:
    wish, key = stories.StoryWish(), f"stories::{CORE}"
    if rng.random() < 0.5:
        story = stories.tell(rng, wish)
        return Question(last.task, phrase(rng, rng.choice(ANOTHER)), story, key, wish)
    wish = stories.StoryWish(animal=(animal := rng.choice(story_parts.ANIMALS)))
    about = f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}"
    prompt = phrase(rng, rng.choice(ANOTHER_ABOUT), x=about)
    story, key = stories.tell(rng, wish), f"stories:another {about}:{animal}"
    return Question(last.task, prompt, story, key, wish)


def _letters(rng: random.Random, last: Question[letters.Spelling]) -> Asked | None:
    form, word = last.facts.form, last.facts.word
    if form in ("many", "contains", "nth"):
        return None
    roll = rng.random()
    said: tuple[str, ...] = AGAIN
    if form == "spell" and roll < 0.6:
        form = "reverse" if roll < 0.3 else "length"
        said = BACKWARDS if form == "reverse" else HOW_LONG
    else:
        word = rng.choice(common_words())
    question = letters.Letters().ask(rng, form, word)
    return replace(question, prompt=phrase(rng, rng.choice(said), x=word))


def _dates(rng: random.Random, last: Question[dates.DateFacts]) -> Asked | None:
    match last.facts:
        case dates.Neighbour(step=1, is_follow_up=False) as before:
            then = dates.Neighbour(before.result, 1, is_follow_up=True)
            prompt = phrase(rng, rng.choice(AND_THEN))
            answer = f"{then.result} comes after {then.name}."
            return Question(last.task, prompt, answer, f"dates:then:{then.name}", then)
        case dates.MonthLength(is_follow_up=False):
            again = dates.MonthLength(rng.choice(dates.MONTHS[2:]), is_follow_up=True)
            prompt = phrase(rng, rng.choice(AGAIN), x=again.month)
            answer = f"{again.month} has {again.result} days."
            return Question(last.task, prompt, answer, f"dates:again:{again.month}", again)
    return None


def _units(rng: random.Random, last: Question[Conversion | Beyond]) -> Asked | None:
    asked = last.facts
    if isinstance(asked, Beyond) or not asked.is_to_smaller or asked.unit.one == "dozen":
        return None
    question = Units().ask(rng, asked.unit)
    found = question.facts
    if isinstance(found, Beyond) or not (found.is_to_smaller and found.is_trainable):
        return None
    name = asked.unit.one if found.count == 1 else asked.unit.many
    return replace(question, prompt=phrase(rng, rng.choice(AGAIN), x=f"{found.count} {name}"))


def _definitions(rng: random.Random, last: Question[facts.Fact]) -> Asked | None:
    if not last.facts.is_known:
        return None
    word = rng.choice(tuple(definitions()))
    fact = facts.of_word(word)
    prompt = phrase(rng, rng.choice(AGAIN), x=facts.with_article(word))
    key = f"definitions:again:{word}:{prompt}"
    return Question(last.task, prompt, fact.sayings[0], key, fact)


def _capitals(rng: random.Random, last: Question[facts.Fact]) -> Asked:
    return _again(rng, last, facts.of_country(rng.choice(tuple(facts.CAPITALS))))


def _opposites(rng: random.Random, last: Question[facts.Fact]) -> Asked:
    return _again(rng, last, facts.of_opposite(rng.choice(tuple(facts.opposites()))))


def _again(rng: random.Random, last: Question[facts.Fact], fact: facts.Fact) -> Asked:
    prompt = phrase(rng, rng.choice((*AGAIN, "and of {x}?")), x=fact.about)
    return Question(last.task, prompt, fact.sayings[0], f"{last.task}:again:{prompt}", fact)


def _python(rng: random.Random, last: Question[python_line.Line]) -> Asked:
    recipe = rng.randrange(len(python_line.RECIPES))
    return python_line.PythonLine().ask(rng, recipe, frames=PYTHON_AGAIN)


def _numbers(rng: random.Random, last: Question[numbers.NumberFacts]) -> Asked | None:
    match last.facts:
        case numbers.Parity():
            parity = numbers.Parity(rng.randint(0, 99))
            prompt = phrase(rng, rng.choice(AGAIN), x=parity.number)
            key = f"numbers:parity:{parity.number}"
            return Question(last.task, prompt, parity.answer, key, parity)
        case numbers.Comparison(is_larger=is_larger):
            a, b = rng.sample(range(rng.choice((20, 100, 1000))), 2)
            pair = numbers.Comparison((a, b), is_larger)
            prompt = phrase(rng, rng.choice(AGAIN), x=f"{a} or {b}")
            key = f"numbers:compare:{min(a, b)},{max(a, b)}"
            return Question(last.task, prompt, pair.answer, key, pair)
    return None


_MAKERS: dict[str, Callable[[random.Random, Asked], Asked | None]] = {
    "arithmetic": _arithmetic, "stories": _stories, "letters": _letters, "dates": _dates,
    "units": _units, "definitions": _definitions, "capitals": _capitals, "opposites": _opposites,
    "python": _python, "numbers": _numbers,
}  # fmt: skip
