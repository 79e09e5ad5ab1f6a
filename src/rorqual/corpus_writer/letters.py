"""Letters of a word: the answer first spells it, then reads the spelling.

A byte-level BPE hides letters inside tokens, so spelling is a table that training must show: the
`spelling` drills cover every word of the list. What is held out is a (question form, word) pair;
words outside the list, made of syllables, are held out by themselves ("new word" items).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rorqual.corpus_writer.phrasing import phrase
from rorqual.corpus_writer.skill import Skill
from rorqual.corpus_writer.words import common_words
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, any_of

SPELL = (
    "!spell {w}", "!spell {w}", "!spell the word {w}", "how do you spell {w}?",
    "how is {w} spelled?",
    "!spell {w} for me", "how do i spell {w}?", "!spell out {w}", "spelling of {w}",
    "what is the spelling of {w}?", "how is the word {w} spelled?", "!spell '{w}'", '!spell "{w}"',
    "!spell {w} letter by letter", "!list the letters of {w}", "what letters are in {w}?",
)  # fmt: skip
REVERSE = (
    "!reverse {w}", "!reverse the word {w}", "what is {w} backwards?", "!spell {w} backwards",
    "!write {w} backwards", "{w} backwards", "how do you spell {w} backwards?", "{w} in reverse",
    "what is {w} spelled backwards?", "!say {w} backwards", "what's {w} in reverse?",
    "!spell {w} in reverse", "!turn {w} around",
)  # fmt: skip
LENGTH = (
    "how many letters are in {w}?", "how many letters does {w} have?", "how many letters in {w}?",
    "how long is the word {w}?", "!count the letters in {w}", "number of letters in {w}",
    "how many letters are there in {w}?", "how many letters are in the word {w}?",
    "how many letters has {w}?", "!count the letters of {w}",
)  # fmt: skip
FIRST = (
    "what is the first letter of {w}?", "what letter does {w} start with?", "first letter of {w}",
    "what letter does {w} begin with?", "which letter starts {w}?", "{w} starts with which letter?",
    "what is the first letter in {w}?", "what's the first letter of {w}?",
)  # fmt: skip
LAST = (
    "what is the last letter of {w}?", "what letter does {w} end with?", "last letter of {w}",
    "what's the last letter of {w}?", "which letter ends {w}?", "{w} ends with which letter?",
    "what is the last letter in {w}?", "what letter does {w} end in?",
)  # fmt: skip
NTH = (
    "what is the {n} letter of {w}?", "{n} letter of {w}", "which letter is {n} in {w}?",
    "what's the {n} letter of {w}?", "what is the {n} letter in {w}?",
    "which is the {n} letter of the word {w}?",
)  # fmt: skip
HOW_MANY = (
    "how many {l}'s are in {w}?", "how many {l}s are in {w}?",
    "how many times does {l} appear in {w}?",
    "how many {l} are in {w}?", "how many {l} in {w}?", "!count the letter {l} in {w}",
    "how many {l}s are there in {w}?", "how many of the letter {l} are in {w}?",
    "how many {l}'s in {w}?", "how often is {l} in {w}?",
)  # fmt: skip
CONTAINS = (
    "does {w} contain {l}?", "does {w} contain the letter {l}?", "is there an {l} in {w}?",
    "is the letter {l} in {w}?", "does {w} have the letter {l}?", "is {l} in {w}?",
    "does the word {w} have an {l} in it?", "does {w} have an {l}?",
)  # fmt: skip
ORDINALS = ("second", "third", "fourth", "fifth", "sixth")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SYLLABLES = (
    "ba be bi bo bu ca co da de di do du fa fe fi fo ga go ha he hi ho ja jo ka ke ki ko la le li "
    "lo lu ma me mi mo mu na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu "
    "va ve vi vo wa we wi za ze zi zo bra cre dri flo gra pla sti tro clu spe cha sho thi whe qui "
    "an en in on un ar er or al el il ack ell ing ong est ash ick ump and end old oom oon eep ail"
).split()


@dataclass(frozen=True)
class Spelling:
    """What is asked of a word's letters: "spell", "reverse", "length", "first", "last", "nth" with
    a place from 1, "many" and "contains" with a letter.
    """

    form: str
    word: str
    place: int | None = None
    letter: str | None = None

    @property
    def result(self) -> str:
        """A letter, a number or a word."""
        match self.form:
            case "spell":
                return self.word
            case "reverse":
                return self.word[::-1]
            case "length":
                return str(len(self.word))
            case "first" | "last":
                return self.word[0 if self.form == "first" else -1]
            case "nth":
                assert self.place is not None, "no place"
                return self.word[self.place - 1]
        assert self.letter is not None, "no letter"
        if self.form == "many":
            return str(self.word.count(self.letter))
        return "yes" if self.letter in self.word else "no"


def hyphenated(word: str) -> str:
    """`garden` -> `g-a-r-d-e-n`"""
    return "-".join(word)


def numbered(word: str) -> str:
    """`cat` -> `c1-a2-t3`"""
    return "-".join(f"{letter}{i}" for i, letter in enumerate(word, 1))


def counted(word: str, letter: str) -> str:
    """`berry`, r -> `b-e-r1-r2-y`"""
    parts, seen = [], 0
    for each in word:
        seen += each == letter
        parts.append(f"{each}{seen}" if each == letter else each)
    return "-".join(parts)


def new_word(rng: random.Random) -> str:
    """A pronounceable word that is not in the list."""
    while True:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
        if word not in common_words():
            return word


def _spelled(word: str) -> str:
    """The pattern of a word's letters with one kind of mark between them."""
    return any_of(mark.join(word) for mark in ("-", " ", ", ", " - "))


class Letters(Skill[Spelling]):
    name = "letters"

    def question(self, rng: random.Random) -> Question[Spelling]:
        word = rng.choice(common_words()) if rng.random() < 0.85 else new_word(rng)
        (form,) = rng.choices(
            ("spell", "reverse", "length", "first", "last", "nth", "many", "contains"),
            (26, 16, 14, 7, 8, 8, 14, 7),
        )
        return self.ask(rng, form, word)

    def ask(self, rng: random.Random, form: str, word: str) -> Question[Spelling]:
        """The question of one form about one word, phrased at random."""
        makers: dict[str, Callable[[random.Random, str], tuple[str, str, int | str | None]]] = {
            "spell": self._spell, "reverse": self._reverse, "length": self._length,
            "first": self._first, "last": self._last, "nth": self._nth, "many": self._many,
            "contains": self._contains,
        }  # fmt: skip
        prompt, answer, detail = makers[form](rng, word)
        key = f"letters:{form}:{word}" + (f":{detail}" if detail is not None else "")
        place = detail if isinstance(detail, int) else None
        letter = detail if isinstance(detail, str) else None
        return Question(self.name, prompt, answer, key, Spelling(form, word, place, letter))

    def forms(self, question: Question[Spelling]) -> Forms:
        """Letters with marks between them, or a letter, number or word alone or in its sentence."""
        asked = question.facts
        word, final = asked.word, asked.result
        working = r"(?:[a-z0-9]+(?:-[a-z0-9]+)*\. )?"
        if asked.form == "spell":  # its letters, never the word again
            said = rf"(?:(?:the word )?{word}(?: is(?: spelled)?|:| =) )?(?:{_spelled(word)})"
            return Forms(said, said, "spelling")
        if asked.form == "reverse":
            backwards = f"{final}|{_spelled(final)}"
            return Forms(backwards, rf"{working}(?:backwards: ?)?(?:{backwards})", "spelling")
        sentence = {
            "first": "the first letter is ", "last": "the last letter is ",
            "nth": f"letter {asked.place} is ",
        }.get(asked.form)  # fmt: skip
        whole = rf"{working}{sentence}{final}|{final}" if sentence else final
        if asked.form == "length":
            whole += rf"|{word} has {final} letters?"
        noun = {"length": "number", "many": "number", "contains": "word"}.get(asked.form, "letter")
        return Forms(final, whole, noun)

    def _spell(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        shown = rng.choices((word, word.capitalize(), word.upper()), (85, 10, 5))[0]
        prompt = phrase(rng, rng.choice(SPELL), is_case_kept=shown != word, w=shown)
        return prompt, hyphenated(word), None

    def _reverse(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        prompt = phrase(rng, rng.choice(REVERSE), w=word)
        return prompt, f"{hyphenated(word)}. Backwards: {hyphenated(word[::-1])}", None

    def _length(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        prompt = phrase(rng, rng.choice(LENGTH), w=word)
        return prompt, f"{numbered(word)}. Answer: {len(word)}", None

    def _first(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        prompt = phrase(rng, rng.choice(FIRST), w=word)
        return prompt, f"{hyphenated(word)}. The first letter is {word[0]}.", None

    def _last(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        prompt = phrase(rng, rng.choice(LAST), w=word)
        return prompt, f"{hyphenated(word)}. The last letter is {word[-1]}.", None

    def _nth(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        place = rng.randint(2, min(6, len(word)))
        ending = {2: "nd", 3: "rd"}.get(place, "th")
        name = rng.choice((ORDINALS[place - 2], f"{place}{ending}"))
        prompt = phrase(rng, rng.choice(NTH), w=word, n=name)
        answer = f"{numbered(word)}. Letter {place} is {word[place - 1]}."
        return prompt, answer, place

    def _many(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        letter = rng.choice(word) if rng.random() < 0.85 else rng.choice(LETTERS)
        repeated = [each for each in word if word.count(each) > 1]
        if repeated and rng.random() < 0.6:
            letter = rng.choice(repeated)
        prompt = phrase(rng, rng.choice(HOW_MANY), w=word, l=letter)
        answer = f"{counted(word, letter)}. Answer: {word.count(letter)}"
        return prompt, answer, letter

    def _contains(self, rng: random.Random, word: str) -> tuple[str, str, int | str | None]:
        letter = rng.choice(word) if rng.random() < 0.5 else rng.choice(LETTERS)
        article = "an" if letter in "aefhilmnorsx" else "a"
        template = rng.choice(CONTAINS)
        template = template.replace("an {l}", article + " {l}")
        prompt = phrase(rng, template, w=word, l=letter)
        verdict = "yes" if letter in word else "no"
        return prompt, f"{counted(word, letter)}. Answer: {verdict}", letter
