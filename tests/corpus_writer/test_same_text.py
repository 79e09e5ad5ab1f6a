"""The text that training sees stays the same to the letter: what was measured on it holds no longer
once it changes. Oracle: stored references, blake2b over the JSON of what is made, written out by
`python tests/corpus_writer/test_same_text.py` after a change that was meant.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest

from rorqual.corpus_writer import GENERATORS, SKILLS
from rorqual.corpus_writer.follow_ups import follow_up
from rorqual.tasks import Question

NUM_QUESTIONS, NUM_HELD_OUT, NUM_DOCUMENTS = 1500, 50, 300


def digest(items: Iterable[Any]) -> str:
    raw = "\n".join(json.dumps(item, sort_keys=True) for item in items)
    return hashlib.blake2b(raw.encode(), digest_size=8).hexdigest()


def record(asked: Question[Any]) -> dict[str, str]:
    """What training and a benchmark show of a question."""
    shown = {"prompt": asked.prompt, "answer": asked.answer, "key": asked.key}
    return {"skill": asked.task, **shown}


def of_skill(name: str) -> tuple[str, str, str]:
    """Of its questions, of either split; of what is asked after each; and of the first that it
    keeps from training.
    """
    rng = random.Random(f"same:{name}")
    made = [SKILLS[name].question(rng) for _ in range(NUM_QUESTIONS)]
    after = [asked and record(asked) for asked in (follow_up(rng, each) for each in made)]
    kept = islice(SKILLS[name].questions("held_out", 0), NUM_HELD_OUT)
    return digest(map(record, made)), digest(after), digest(map(record, kept))


def of_generator(name: str) -> tuple[str, str]:
    """Of its first documents, for two seeds."""
    first, second = (
        digest(document.as_record() for document in GENERATORS[name](seed, NUM_DOCUMENTS))
        for seed in (0, 1)
    )
    return first, second


QUESTIONS: dict[str, tuple[str, str, str]] = {
    "arithmetic": ("b473950e4790a5dd", "5bdc7ec16be347c8", "10d7d5b4654d21e0"),
    "dates": ("d2aab9d0e0889b3f", "0c849705b2e948bc", "088cdfafce12d23f"),
    "units": ("75c4e847cd72cf36", "8fab241f3af5a1eb", "341e18d63e3c51b7"),
    "numbers": ("4f93e985c511bad8", "b6795dcef269ed3c", "f1deeb4e2ed2bf3c"),
    "letters": ("5915346c16a1fc84", "84b6ceafe5efdf08", "6d6b069f561ce486"),
    "definitions": ("8105537c187d9f89", "c9cd413a99b1c1cc", "b78458a805182733"),
    "capitals": ("38af44a7f7b4b9de", "99f0045c8d2e3876", "eefbcdeb4f3c4141"),
    "opposites": ("23023466b6d765b4", "3f517724fa1a4797", "78d9965c4b054c7d"),
    "stories": ("e2022df613718868", "0be624923ee44745", "e60ca1bfc827afda"),
    "python": ("10b5da94115d443e", "b99ba4bd21df9f3e", "5e10029710361e0b"),
    "about": ("42400e29d5c4a8b5", "784126a05f84753a", "d394e3059bfff824"),
}

DOCUMENTS: dict[str, tuple[str, str]] = {
    "dialogues": ("d054fc390079a54b", "508413be2087daf5"),
    "questions": ("7817085cb61afd43", "3a293b135aef586d"),
    "stories": ("cbc7c035acb78fc1", "a3d8f014a745e1f5"),
    "arithmetic": ("73fd8d704e563d11", "ed68a8b0f5800bf7"),
    "spelling": ("fd2e2115b4a746b9", "1af0eeaca87f33a8"),
    "definitions": ("a6957349d2e98ce7", "9feab91e1eb3fe56"),
}


@pytest.mark.parametrize("name", SKILLS)
def test_questions_are_the_same(name: str) -> None:
    assert of_skill(name) == QUESTIONS[name]


@pytest.mark.parametrize("name", GENERATORS)
def test_documents_are_the_same(name: str) -> None:
    assert of_generator(name) == DOCUMENTS[name]


if __name__ == "__main__":
    print({name: of_skill(name) for name in SKILLS})
    print({name: of_generator(name) for name in GENERATORS})
