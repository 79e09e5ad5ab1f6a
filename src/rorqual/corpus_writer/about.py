"""Greetings, thanks, what the model is, and an honest no to what lies beyond it.

A model of this size that guesses is worse than one that names what it can do: so everything outside
the skills has one answer, which says so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rorqual.corpus_writer.about_parts import BEYOND, REFUSAL, TALK
from rorqual.corpus_writer.phrasing import canonical, phrase
from rorqual.corpus_writer.skill import Beyond, Skill
from rorqual.corpus_writer.words import common_words
from rorqual.tasks import Question
from rorqual.tasks.answers import Forms, exactly
from rorqual.tasks.task import CORE

NUM_CORE_LINES = 8  # the first lines of each kind, the likeliest, are always trained
# Commoner in a first conversation, so commoner here.
_WEIGHTS = {"hello": 5, "how": 3, "name": 4, "maker": 3, "can": 5, "thanks": 3, "bye": 3}


@dataclass(frozen=True)
class Talk:
    """What is said beside the skills; `kind` is a key of TALK."""

    kind: str


class About(Skill[Talk | Beyond]):
    name = "about"

    def question(self, rng: random.Random) -> Question[Talk | Beyond]:
        if rng.random() < 0.5:
            return self._beyond(rng)
        kinds = tuple(TALK)
        (kind,) = rng.choices(kinds, [_WEIGHTS.get(each, 2) for each in kinds])
        return self.talk(rng, kind)

    def talk(self, rng: random.Random, kind: str) -> Question[Talk | Beyond]:
        """What is said of one kind ("hello", "thanks", "bye" ...) and a reply."""
        said, replies = TALK[kind]
        place = rng.randrange(len(said))
        prompt = phrase(rng, said[place])
        key = f"about:{kind}:{canonical(said[place])}"
        if place < NUM_CORE_LINES:
            key += CORE
        return Question(self.name, prompt, rng.choice(replies), key, Talk(kind))

    def forms(self, question: Question[Talk | Beyond]) -> Forms | None:
        """One of the replies to talk of its kind."""
        if isinstance(question.facts, Beyond):
            return None
        replies = exactly(*TALK[question.facts.kind][1])
        return Forms(replies, replies, "reply")

    def _beyond(self, rng: random.Random) -> Question[Talk | Beyond]:
        frame, fillers = rng.choices(BEYOND, [len(entry[1]) for entry in BEYOND])[0]
        filler = rng.choice(fillers)
        if rng.random() < 0.08:  # anything at all: words that ask nothing we teach
            filler = " ".join(rng.choice(common_words()) for _ in range(rng.randint(3, 6)))
            frame = "{x}"
        template = frame if frame.endswith("?") or frame == "{x}" else f"!{frame}"
        if frame.startswith("i have"):
            template = frame
        key = f"about:beyond:{filler.lower()}"
        prompt = phrase(rng, template, x=filler)
        return Question(self.name, prompt, REFUSAL, key, Beyond(filler))
