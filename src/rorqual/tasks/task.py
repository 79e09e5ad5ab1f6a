"""What a task is: it asks questions of two splits, and grades an answer to one with a reward and a
sentence why. Benchmark and reward use the same grader.

Where the split is drawn by us (`DrawnTask`), a hash of an item's key decides it, never a random
draw, so a question belongs to the same side in every run and in every place that makes text from
it. Where an item is worked out (sums, dates, letters) the key is the item; where it can only be
remembered (definitions, capitals) the key is the item together with the phrasing, so the held-out
part asks known things in unseen words.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from rorqual.errors import UsageError, listing

Split = Literal["train", "held_out"]
Messages = list[dict[str, Any]]  # {"role", "content"}, as a chat template takes them
Facts = TypeVar("Facts")

HELD_OUT_PERCENT = 5
CORE = ":core"  # ends the key of a line that every visitor says ("hello"): it is always trained
_MAX_REPEATS = 50


@dataclass(frozen=True)
class Question(Generic[Facts]):
    """What a user says, the reference answer, the key that decides the split, and the facts of
    which all three are made, so that nobody need read them out of text again.

    `before`: the messages that stand before the prompt (a system message, earlier turns).
    """

    task: str
    prompt: str
    answer: str
    key: str
    facts: Facts
    before: tuple[dict[str, Any], ...] = ()

    @property
    def messages(self) -> Messages:
        """The conversation that asks it."""
        return [*self.before, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Grade:
    """A reward from 0 to 1, which is right, and a sentence that says why."""

    reward: float
    why: str

    def __post_init__(self) -> None:
        if not isinstance(self.reward, int | float) or not 0.0 <= self.reward <= 1.0:
            raise UsageError(
                "a reward that is none", found=repr(self.reward), expected="a number from 0 to 1",
                fix="scale it in the task's grade()",
            )  # fmt: skip

    @property
    def is_right(self) -> bool:
        return self.reward == 1.0


RIGHT = Grade(1.0, "It is right.")


def wrong(why: str) -> Grade:
    """No reward."""
    return Grade(0.0, why)


class Task(Protocol[Facts]):
    """Questions of one kind, and what an answer to one is worth."""

    @property
    def name(self) -> str: ...

    def questions(self, split: Split, seed: int) -> Iterator[Question[Facts]]:
        """The same questions for the same seed, as many as there are; endless where they are drawn.
        No question is in both splits.
        """
        ...

    def grade(self, question: Question[Facts], answer: str) -> Grade:
        """What `answer` is worth: 1 is right."""
        ...


def is_held_out(key: str) -> bool:
    """Whether `key` falls into the 5 % that training never sees (blake2b, stable everywhere)."""
    if key.endswith(CORE):
        return False
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


class DrawnTask(ABC, Generic[Facts]):
    """A task whose questions are drawn at random, endlessly, and split by their keys."""

    name: str

    @abstractmethod
    def question(self, rng: random.Random) -> Question[Facts]:
        """A question of either split."""

    @abstractmethod
    def grade(self, question: Question[Facts], answer: str) -> Grade:
        """What `answer` is worth: 1 is right."""

    def training_question(self, rng: random.Random) -> Question[Facts]:
        """A question whose key is not held out."""
        while is_held_out((question := self.question(rng)).key):
            pass
        return question

    def held_out_question(self, rng: random.Random) -> Question[Facts]:
        """A question whose key training never sees."""
        while not is_held_out((question := self.question(rng)).key):
            pass
        return question

    def questions(self, split: Split, seed: int) -> Iterator[Question[Facts]]:
        """Held out, with different prompts as far as they go; for training, as they come."""
        if split == "train":
            return _drawn(self.training_question, random.Random(f"train:{self.name}:{seed}"))
        if split == "held_out":
            rng = random.Random(f"held out:{self.name}:{seed}")
            return _different(self.held_out_question, rng)
        raise UsageError("no such split", found=split, expected=listing(["train", "held_out"]))


def _drawn(
    draw: Callable[[random.Random], Question[Facts]], rng: random.Random
) -> Iterator[Question[Facts]]:
    while True:
        yield draw(rng)


def _different(
    draw: Callable[[random.Random], Question[Facts]], rng: random.Random
) -> Iterator[Question[Facts]]:
    seen: set[str] = set()
    while True:
        question = draw(rng)
        for _ in range(_MAX_REPEATS):
            if question.prompt not in seen:
                break
            question = draw(rng)
        seen.add(question.prompt)
        yield question
