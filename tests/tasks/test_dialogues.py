"""Shape, size and determinism of the generated text."""

import itertools
import random
import re

import pytest

from rorqual.tasks import GENERATORS, dialogue
from rorqual.tasks.arithmetic import (
    LIMIT_ANSWER,
    ZERO_ANSWER,
    add_working,
    divide_working,
    subtract_working,
)
from rorqual.tasks.dialogues import MAX_TOKENS, approximate_tokens
from rorqual.tasks.follow_ups import follow_up
from rorqual.tasks.skill import Question
from rorqual.tasks.words import common_words

NUM_DOCUMENTS = 300


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_depend_on_the_seed_alone(name: str) -> None:
    generate = GENERATORS[name]
    first, again, other = (list(generate(seed, NUM_DOCUMENTS)) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len(first) == NUM_DOCUMENTS
    assert list(itertools.islice(generate(5, 10**9), 10)) == first[:10]


@pytest.mark.parametrize("name", GENERATORS)
def test_documents_hold_text_or_messages(name: str) -> None:
    for document in GENERATORS[name](1, NUM_DOCUMENTS):
        assert set(document) in ({"text"}, {"messages"})
        if "text" in document:
            assert document["text"].strip()


@pytest.mark.parametrize(
    ("working", "is_followed"),
    [
        (divide_working(84, 3), True),
        (divide_working(85, 3), False),  # a remainder: nothing can go on from the quotient alone
        (subtract_working(3, 8), False),
        (add_working(900, 99), True),
        (add_working(901, 99), False),
        (ZERO_ANSWER, False),
        (LIMIT_ANSWER, False),
    ],
)
def test_a_sum_goes_on_from_a_result_that_can_be_gone_on_from(
    working: str, is_followed: bool
) -> None:
    last = Question("arithmetic", "?", working, "arithmetic:?")
    for seed in range(40):
        found = follow_up(random.Random(seed), last)
        assert (found is not None) == is_followed, found


def test_dialogues_alternate_and_fit() -> None:
    rng = random.Random(0)
    lengths, systems = set(), 0
    for _ in range(3000):
        messages = dialogue(rng)
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            systems += 1
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        lengths.add(len(roles) // 2)
        assert all(message["content"].strip() for message in messages)
        used = sum(approximate_tokens(message["content"]) for message in messages)
        assert used <= MAX_TOKENS + 10
    assert lengths == {1, 2, 3, 4}
    assert 200 < systems < 400


def test_spelling_drills_cover_the_word_list() -> None:
    shown = set()
    for document in GENERATORS["spelling"](0, 400):
        shown |= set(re.findall(r"[a-z]+", document["text"].lower()))
    assert set(common_words()) <= shown
