"""Shape, size and determinism of the generated text."""

import itertools
import random
import re

import pytest

from rorqual.corpus_writer import GENERATORS
from rorqual.corpus_writer.arithmetic import Sum
from rorqual.corpus_writer.dialogues import MAX_TOKENS, approximate_tokens, dialogue
from rorqual.corpus_writer.follow_ups import follow_up
from rorqual.corpus_writer.skill import Beyond
from rorqual.corpus_writer.words import common_words
from rorqual.data.corpus import document_from_record
from rorqual.tasks import Question

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
        # As the reader of files checks them.
        assert document == document_from_record(document.as_record(), name, "here")
        if document.text is not None:
            assert document.text.strip()


@pytest.mark.parametrize(
    ("asked", "is_followed"),
    [
        (Sum("/", (84, 3)), True),
        (Sum("/", (85, 3)), False),  # a remainder: nothing can go on from the quotient alone
        (Sum("-", (3, 8)), False),
        (Sum("+", (900, 99)), True),
        (Sum("+", (901, 99)), False),
        (Sum("/", (7, 0)), False),
        (Sum("+", (1, 2, 3)), True),
        (Beyond("7 ^ 2"), False),
    ],
)
def test_a_sum_goes_on_from_a_result_that_can_be_gone_on_from(
    asked: Sum | Beyond, is_followed: bool
) -> None:
    last = Question("arithmetic", "?", "?", "arithmetic:?", asked)
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
        shown |= set(re.findall(r"[a-z]+", (document.text or "").lower()))
    assert set(common_words()) <= shown
