"""Conversations of one to four exchanges over the skills, as message lists.

A conversation stays under MAX_TOKENS by a rough count, so that it fits a context of 256 whole; all
its items are of the training split.
"""

from __future__ import annotations

import random
import re
from typing import Any

from rorqual.corpus_writer.about import About
from rorqual.corpus_writer.follow_ups import follow_up
from rorqual.corpus_writer.skills import SKILLS, WEIGHTS
from rorqual.data.corpus import Message
from rorqual.tasks import Question, is_held_out

MAX_TOKENS = 205
SYSTEM_RATE = 0.10
SYSTEM_TEXTS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer shortly.",
    "You are Rorqual tiny, a small and honest model.", "Be kind and brief.",
    "You are a chat model.", "Help the user.",
)  # fmt: skip
_PIECE = re.compile(r"\d|[^\W\d_]+|[^\w\s]+|_")


def approximate_tokens(text: str) -> int:
    """Digits and runs of marks count one, a word one and a third: close for a 4,096-entry BPE."""
    return sum(
        1 if not piece[0].isalpha() else 1 + len(piece) // 7 for piece in _PIECE.findall(text)
    )


def single(rng: random.Random) -> list[Message]:
    """One question of one skill and its answer."""
    (name,) = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))
    return _exchange(SKILLS[name].training_question(rng))


def dialogue(rng: random.Random) -> list[Message]:
    """One to four exchanges, with greetings, follow-ups and thanks."""
    (turns,) = rng.choices((1, 2, 3, 4), (45, 27, 17, 11))
    questions = _questions(rng, turns)
    messages: list[Message] = []
    if rng.random() < SYSTEM_RATE:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_TEXTS)})
    budget = MAX_TOKENS
    for place, question in enumerate(questions):
        # Two markers and an end-of-sentence go with each exchange.
        budget -= approximate_tokens(question.prompt) + approximate_tokens(question.answer) + 3
        if budget < 0 and place > 0:
            break
        messages += _exchange(question)
    return messages


def _questions(rng: random.Random, turns: int) -> list[Question[Any]]:
    about = About()
    questions: list[Question[Any]] = []
    names, weights = tuple(WEIGHTS), tuple(WEIGHTS.values())
    while len(questions) < turns:
        last = questions[-1] if questions else None
        if last is None and turns > 1 and rng.random() < 0.25:
            question = _talk(rng, about, rng.choice(("hello", "hello", "how", "can")))
        elif last is not None and len(questions) == turns - 1 and rng.random() < 0.3:
            question = _talk(rng, about, rng.choice(("thanks", "thanks", "praise", "bye")))
        else:
            found = follow_up(rng, last) if last is not None and rng.random() < 0.5 else None
            (name,) = rng.choices(names, weights)
            if last is not None and last.task != "about" and rng.random() < 0.3:
                name = last.task
            question = found or SKILLS[name].training_question(rng)
        questions.append(question)
    return questions


def _talk(rng: random.Random, about: About, kind: str) -> Question[Any]:
    while is_held_out((question := about.talk(rng, kind)).key):
        pass
    return question


def _exchange(question: Question[Any]) -> list[Message]:
    return [
        {"role": "user", "content": question.prompt},
        {"role": "assistant", "content": question.answer},
    ]
