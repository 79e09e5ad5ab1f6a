"""Oracle: Python's strings."""

import random
import re

from rorqual.corpus_writer.letters import Letters, counted, hyphenated, numbered
from rorqual.corpus_writer.words import common_words, definitions


def test_spellings() -> None:
    assert hyphenated("garden") == "g-a-r-d-e-n"
    assert numbered("cat") == "c1-a2-t3"
    assert counted("strawberry", "r") == "s-t-r1-a-w-b-e-r2-r3-y"


def read(form: str, word: str, detail: str = "") -> str:
    if form in ("spell", "reverse"):
        return "-".join(word if form == "spell" else reversed(word))
    if form == "nth":
        return word[int(detail) - 1]
    if form == "contains":
        return "yes" if detail in word else "no"
    if form == "many":
        return str(word.count(detail))
    return {"length": str(len(word)), "first": word[0], "last": word[-1]}[form]


def test_answers_equal_python() -> None:
    rng, skill = random.Random(0), Letters()
    for _ in range(5000):
        question = skill.question(rng)
        _, form, word, *detail = question.key.split(":")
        final = re.split(r"Answer: |Backwards: | is ", question.answer)[-1].strip(".")
        assert final == read(form, word, *detail), question
        assert re.search(rf"\b{word}\b", question.prompt, re.IGNORECASE)


def test_checker_takes_other_ways_to_write_a_spelling() -> None:
    skill, rng = Letters(), random.Random(0)
    spell, reverse = skill.ask(rng, "spell", "garden"), skill.ask(rng, "reverse", "garden")
    for response in ("g-a-r-d-e-n", "G-A-R-D-E-N", "g a r d e n", "garden is g-a-r-d-e-n."):
        assert skill.grade(spell, response).is_right
    assert skill.grade(reverse, "nedrag").is_right
    assert skill.grade(reverse, "Backwards: n-e-d-r-a-g").is_right
    assert not skill.grade(reverse, "g-a-r-d-e-n").is_right
    assert not skill.grade(spell, "g-a-r-d-n").is_right


def test_word_list_is_clean() -> None:
    words = common_words()
    assert 2500 <= len(words) <= 4000
    assert all(re.fullmatch(r"[a-z]{2,13}", word) for word in words)
    assert list(words) == sorted(set(words))
    assert set(definitions()) <= set(words)
