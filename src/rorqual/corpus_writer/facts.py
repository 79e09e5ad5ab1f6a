"""Small memorised tables: definitions, capitals, opposites; what is not in them is not known.

A fact is never held out, since it cannot be worked out; a phrasing of it is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from rorqual.corpus_writer.letters import new_word
from rorqual.corpus_writer.phrasing import canonical, phrase
from rorqual.corpus_writer.skill import Skill
from rorqual.corpus_writer.words import common_words, definitions
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, exactly

DEFINE_NOUN = (
    "what is {w}?", "what is {w}?", "what's {w}?", "whats {w}?", "!define {b}", "!define {w}",
    "what does {b} mean?", "what is the meaning of {b}?", "!explain what {w} is",
    "!tell me what {w} is", "meaning of {b}", "do you know what {w} is?", "definition of {b}",
    "what does the word {b} mean?", "!explain the word {b}", "can you define {b}?",
    "what is the definition of {b}?", "{b} meaning", "!describe {w}",
)  # fmt: skip
DEFINE_PLAIN = (
    "what does {b} mean?", "what does {b} mean?", "what does the word {b} mean?", "!define {b}",
    "what is the meaning of {b}?", "meaning of {b}", "definition of {b}", "{b} meaning",
    "!explain the word {b}", "!tell me what {b} means", "do you know what {b} means?",
    "can you define {b}?", "what is the definition of {b}?", "!define the word {b}",
)  # fmt: skip
UNKNOWN_WORD = 'I do not know the word "{w}". I know a few hundred everyday words.'

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "England": "London", "Ireland": "Dublin", "Scotland": "Edinburgh",
    "Austria": "Vienna", "Switzerland": "Bern", "Belgium": "Brussels", "the Netherlands":
    "Amsterdam", "Denmark": "Copenhagen", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens",
    "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Morocco": "Rabat", "India": "New Delhi", "China": "Beijing", "Japan": "Tokyo",
    "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Australia": "Canberra",
    "New Zealand": "Wellington", "Canada": "Ottawa", "the United States": "Washington",
    "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Chile": "Santiago", "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad",
}  # fmt: skip
OTHER_NAMES = {"the United States": ("the USA", "America", "the US", "USA"), "England": ("the UK",)}
UNKNOWN_COUNTRIES = (
    "Chad", "Mali", "Niger", "Togo", "Benin", "Ghana", "Gabon", "Angola", "Zambia", "Malawi",
    "Uganda", "Rwanda", "Burundi", "Somalia", "Sudan", "Libya", "Tunisia", "Algeria", "Senegal",
    "Nigeria", "Cameroon", "Botswana", "Namibia", "Lesotho", "Ethiopia", "Eritrea", "Laos",
    "Nepal", "Bhutan", "Mongolia", "Pakistan", "Bangladesh", "Cambodia", "Malaysia", "Indonesia",
    "Singapore", "Brunei", "Yemen", "Oman", "Qatar", "Kuwait", "Jordan", "Syria", "Lebanon",
    "Armenia", "Georgia", "Estonia", "Latvia", "Lithuania", "Moldova", "Romania", "Bulgaria",
    "Serbia", "Croatia", "Slovenia", "Albania", "Malta", "Cyprus", "Iceland", "Ecuador",
    "Bolivia", "Paraguay", "Uruguay", "Colombia", "Venezuela", "Guyana", "Panama", "Honduras",
    "Nicaragua", "Guatemala", "Jamaica", "Haiti", "Fiji", "Samoa", "Tonga", "Texas", "Bavaria",
    "California", "Florida", "Mars", "Atlantis", "Tuscany", "Ohio", "Madagascar", "Tanzania",
)  # fmt: skip
CAPITAL = (
    "what is the capital of {c}?", "what is the capital of {c}?", "what's the capital of {c}?",
    "whats the capital of {c}?", "capital of {c}", "which city is the capital of {c}?",
    "!name the capital of {c}", "!tell me the capital of {c}", "what is {c}'s capital?",
    "what city is the capital of {c}?", "do you know the capital of {c}?", "the capital of {c}",
    "what is the capital city of {c}?", "{c} capital",
)  # fmt: skip
UNKNOWN_CAPITAL = "I do not know the capital of {c}. I know only about forty capitals."

OPPOSITES = (
    "hot cold", "big small", "tall short", "fast slow", "up down", "in out", "left right",
    "day night", "light dark", "black white", "old new", "happy sad", "rich poor", "hard soft",
    "wet dry", "clean dirty", "full empty", "open closed", "loud quiet", "strong weak",
    "early late", "first last", "good bad", "right wrong", "true false", "yes no", "on off",
    "high low", "near far", "thick thin", "wide narrow", "deep shallow", "long short",
    "easy difficult", "sweet sour", "begin end", "start stop", "push pull", "give take",
    "buy sell", "win lose", "laugh cry", "love hate", "come go", "ask answer", "war peace",
    "friend enemy", "king queen", "north south", "east west", "summer winter", "above below",
    "before after", "inside outside", "always never", "more less", "many few", "alive dead",
    "awake asleep", "young old", "heavy light", "safe dangerous", "smooth rough", "sharp blunt",
    "polite rude", "brave afraid", "cheap expensive", "beautiful ugly", "teach learn",
)  # fmt: skip
OPPOSITE = (
    "what is the opposite of {w}?", "what is the opposite of {w}?", "opposite of {w}",
    "what's the opposite of {w}?", "!tell me the opposite of {w}", "the opposite of {w}",
    "!give me the opposite of {w}", "what word is the opposite of {w}?", "{w} opposite",
    "!name the opposite of {w}", "which word means the opposite of {w}?",
    "!find the opposite of {w}",
)  # fmt: skip
UNKNOWN_OPPOSITE = 'I do not know the opposite of "{w}".'


@cache
def opposites() -> dict[str, str]:
    """word -> its opposite, in both directions; the first pair of a word counts."""
    table: dict[str, str] = {}
    for pair in OPPOSITES:
        one, other = pair.split()
        table.setdefault(one, other)
        table.setdefault(other, one)
    return table


@dataclass(frozen=True)
class Fact:
    """What is asked about, and the texts that say what is known of it: the one that is taught
    first, none if nothing is known.
    """

    about: str
    sayings: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return bool(self.sayings)


def of_word(word: str) -> Fact:
    return Fact(word, (definitions()[word],))


def of_country(country: str) -> Fact:
    """A capital is said as the city, or in the sentence with any name of its country."""
    city, names = CAPITALS[country], (country, *OTHER_NAMES.get(country, ()))
    return Fact(country, (*(f"The capital of {name} is {city}." for name in names), city))


def of_opposite(word: str) -> Fact:
    other = opposites()[word]
    return Fact(word, (f"The opposite of {word} is {other}.", other))


def with_article(word: str) -> str:
    """A word that is defined, after the article with which its definition begins, if any."""
    first = definitions()[word].split()[0]
    return {"A": "a ", "An": "an ", "The": "the "}.get(first, "") + word


class Remembered(Skill[Fact]):
    """What the three skills share: a fact is said in one of its sayings, an unknown one is
    admitted.
    """

    noun: str

    def forms(self, question: Question[Fact]) -> Forms | None:
        if not question.facts.is_known:
            return None
        forms = exactly(*question.facts.sayings)
        return Forms(forms, forms, self.noun)


class Definitions(Remembered):
    name, noun = "definitions", "definition"

    def question(self, rng: random.Random) -> Question[Fact]:
        table = definitions()
        if rng.random() < 0.12:
            return self._unknown(rng)
        return self.ask(rng, rng.choice(tuple(table)))

    def ask(self, rng: random.Random, word: str) -> Question[Fact]:
        """The question about one known word, phrased at random."""
        sentence, named = definitions()[word], with_article(word)
        is_plain = sentence.startswith("To ") or f"{word} means" in sentence.lower()
        template = rng.choice(DEFINE_PLAIN if is_plain else DEFINE_NOUN)
        prompt = phrase(rng, template, w=named, b=word)
        key = f"definitions:{canonical(template, w=named, b=word)}"
        return Question(self.name, prompt, sentence, key, of_word(word))

    def _unknown(self, rng: random.Random) -> Question[Fact]:
        word = rng.choice(common_words()) if rng.random() < 0.6 else new_word(rng)
        while word in definitions():
            word = rng.choice(common_words())
        template = rng.choice(DEFINE_PLAIN if rng.random() < 0.5 else DEFINE_NOUN)
        article = "an " if word[0] in "aeiou" else "a "
        prompt = phrase(rng, template, w=article + word, b=word)
        key = f"definitions:unknown:{word}"
        return Question(self.name, prompt, UNKNOWN_WORD.format(w=word), key, Fact(word))


class Capitals(Remembered):
    name, noun = "capitals", "capital"

    def question(self, rng: random.Random) -> Question[Fact]:
        if rng.random() < 0.15:
            country = rng.choice(UNKNOWN_COUNTRIES)
            if rng.random() < 0.25:
                country = new_word(rng).capitalize()
            prompt = phrase(rng, rng.choice(CAPITAL), c=country)
            answer = UNKNOWN_CAPITAL.format(c=country)
            key = f"capitals:unknown:{country}"
            return Question(self.name, prompt, answer, key, Fact(country))
        return self.ask(rng, rng.choice(tuple(CAPITALS)))

    def ask(self, rng: random.Random, country: str) -> Question[Fact]:
        template = rng.choice(CAPITAL)
        shown = country
        if country in OTHER_NAMES and rng.random() < 0.5:
            shown = rng.choice(OTHER_NAMES[country])
        prompt = phrase(rng, template, c=shown)
        fact, key = of_country(country), f"capitals:{canonical(template, c=shown)}"
        return Question(self.name, prompt, fact.sayings[0], key, fact)


class Opposites(Remembered):
    name, noun = "opposites", "opposite"

    def question(self, rng: random.Random) -> Question[Fact]:
        table = opposites()
        if rng.random() < 0.1:
            word = rng.choice(common_words())
            while word in table:
                word = rng.choice(common_words())
            prompt = phrase(rng, rng.choice(OPPOSITE), w=word)
            answer = UNKNOWN_OPPOSITE.format(w=word)
            return Question(self.name, prompt, answer, f"opposites:unknown:{word}", Fact(word))
        word = rng.choice(tuple(table))
        template = rng.choice(OPPOSITE)
        prompt, fact = phrase(rng, template, w=word), of_opposite(word)
        key = f"opposites:{canonical(template, w=word)}"
        return Question(self.name, prompt, fact.sayings[0], key, fact)
