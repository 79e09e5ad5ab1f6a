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

NUM_QUESTIONS, NUM_HELD_OUT, NUM_DOCUMENTS = 1500, 40, 150


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


def of_generator(name: str) -> str:
    return digest(document.as_record() for document in GENERATORS[name](0, NUM_DOCUMENTS))


QUESTIONS: dict[str, tuple[str, str, str]] = {
    "arithmetic": ("b473950e4790a5dd", "5bdc7ec16be347c8", "7b160ffaa7ea2035"),
    "dates": ("d2aab9d0e0889b3f", "0c849705b2e948bc", "d99299eab677397e"),
    "units": ("75c4e847cd72cf36", "8fab241f3af5a1eb", "e121178cdea3e8e1"),
    "numbers": ("4f93e985c511bad8", "b6795dcef269ed3c", "6c9a0f88082eda0a"),
    "letters": ("5915346c16a1fc84", "84b6ceafe5efdf08", "537b979863dced26"),
    "definitions": ("8105537c187d9f89", "c9cd413a99b1c1cc", "c0589967177e4493"),
    "capitals": ("38af44a7f7b4b9de", "99f0045c8d2e3876", "849596ff45519459"),
    "opposites": ("23023466b6d765b4", "3f517724fa1a4797", "bcf787400a646b41"),
    "stories": ("e2022df613718868", "0be624923ee44745", "c1758099c43de964"),
    "python": ("10b5da94115d443e", "b99ba4bd21df9f3e", "ed5f0d369dbe16b6"),
    "about": ("42400e29d5c4a8b5", "784126a05f84753a", "51e3a4a7846d5075"),
}

DOCUMENTS: dict[str, str] = {
    "dialogues": "7f2e7771ec9fa895",
    "questions": "aeb67c1ff5cd8ba9",
    "stories": "0f4bb26cfee0c921",
    "arithmetic": "8f66f77db2936940",
    "spelling": "4b8a87580e5ccae6",
    "definitions": "f875c4094f8ea002",
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
