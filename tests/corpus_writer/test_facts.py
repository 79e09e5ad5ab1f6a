"""Oracle: the shipped tables read again; the refusal of everything that is not in them."""

import random

from rorqual.corpus_writer.facts import (
    CAPITALS,
    OTHER_NAMES,
    UNKNOWN_COUNTRIES,
    Capitals,
    Definitions,
    Opposites,
    opposites,
)
from rorqual.corpus_writer.words import definitions


def test_definitions_are_short_whole_sentences_about_their_word() -> None:
    table = definitions()
    assert len(table) > 400
    for word, sentence in table.items():
        assert sentence.endswith(".")
        assert sentence[0].isupper()
        assert len(sentence.split()) <= 16
        assert word in sentence.lower()


def test_known_and_unknown_do_not_meet() -> None:
    assert not set(CAPITALS) & set(UNKNOWN_COUNTRIES)
    rng = random.Random(0)
    for skill, known in ((Definitions(), set(definitions())), (Opposites(), set(opposites()))):
        for _ in range(2000):
            question = skill.question(rng)
            if question.key.split(":")[1] == "unknown":
                assert question.key.split(":")[2] not in known


def test_a_guess_is_not_a_refusal_nor_the_reverse() -> None:
    skill, rng = Capitals(), random.Random(0)
    known = skill.ask(rng, "France")
    assert not skill.grade(known, "Paris is nice, but: the capital of France is Paris.").is_right
    assert not skill.grade(known, "I do not know the capital of France.").is_right
    assert not skill.grade(known, "The capital of France is Rome.").is_right
    while ":unknown:" not in (question := skill.question(rng)).key:
        pass
    assert not skill.grade(question, "The capital is Paris.").is_right


def test_a_capital_may_be_said_of_any_name_of_its_country_and_of_no_other() -> None:
    skill, rng = Capitals(), random.Random(0)
    for country, others in OTHER_NAMES.items():
        for _ in range(8):  # some questions have the one name, some another
            question, city = skill.ask(rng, country), CAPITALS[country]
            for name in (country, *others):
                assert skill.grade(question, f"The capital of {name} is {city}.").is_right, name
            assert not skill.grade(question, f"The capital of France is {city}.").is_right


def test_opposites_go_both_ways() -> None:
    table = opposites()
    assert table["hot"] == "cold"
    assert table["cold"] == "hot"
    assert all(word != other for word, other in table.items())
