"""What a skill is: it asks questions, checks answers, and keeps a part of its items from training.

The split is by a hash of an item's key, never by a random draw, so a question belongs to the same
side in every run and in every place that makes text from it. Where an item is worked out (sums,
dates, letters) the key is the item; where it can only be remembered (definitions, capitals) the key
is the item together with the phrasing, so the held-out part asks known things in unseen words.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

HELD_OUT_PERCENT = 5
CORE = ":core"  # ends the key of a line that every visitor says ("hello"): it is always trained


@dataclass(frozen=True)
class Question:
    """A prompt, the answer the model is taught, and the key that decides its split."""

    skill: str
    prompt: str
    answer: str
    key: str


def is_held_out(key: str) -> bool:
    """Whether `key` falls into the 5 % that training never sees (blake2b, stable everywhere)."""
    if key.endswith(CORE):
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


class Skill(ABC):
    """A family of questions with one answer format."""

    name: str

    @abstractmethod
    def question(self, rng: random.Random) -> Question:
        """A question of either split."""

    @abstractmethod
    def check(self, question: Question, response: str) -> bool:
        """Whether `response` gives the right final answer, by the rule of `tasks.answers`."""

    def is_held_out(self, key: str) -> bool:
        return is_held_out(key)

    def training_question(self, rng: random.Random) -> Question:
        """A question whose key is not held out."""
        while self.is_held_out((question := self.question(rng)).key):
            pass
        return question

    def held_out_question(self, rng: random.Random) -> Question:
        """A question whose key training never sees."""
        while not self.is_held_out((question := self.question(rng)).key):
            pass
        return question
