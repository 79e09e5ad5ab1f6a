"""Greetings, thanks, what the model is, and an honest no to what lies beyond it.

A model of this size that guesses is worse than one that names what it can do: so everything outside
the skills has one answer, which says so.
"""

from __future__ import annotations

import random

from rorqual.tasks.about_parts import BEYOND, REFUSAL, TALK
from rorqual.tasks.answers import Forms, exactly, is_refusal, is_right
from rorqual.tasks.phrasing import canonical, phrase
from rorqual.tasks.skill import CORE, Question, Skill
from rorqual.tasks.words import common_words

NUM_CORE_LINES = 8  # the first lines of each kind, the likeliest, are always trained
# Commoner in a first conversation, so commoner here.
_WEIGHTS = {"hello": 5, "how": 3, "name": 4, "maker": 3, "can": 5, "thanks": 3, "bye": 3}


class About(Skill):
    name = "about"

    def question(self, rng: random.Random) -> Question:
        if rng.random() < 0.5:
            return self._beyond(rng)
        kinds = tuple(TALK)
        (kind,) = rng.choices(kinds, [_WEIGHTS.get(each, 2) for each in kinds])
        return self.talk(rng, kind)

    def talk(self, rng: random.Random, kind: str) -> Question:
        """What is said of one kind ("hello", "thanks", "bye" ...) and a reply."""
        said, replies = TALK[kind]
        place = rng.randrange(len(said))
        prompt = phrase(rng, said[place])
        key = f"about:{kind}:{canonical(said[place])}"
        if place < NUM_CORE_LINES:
            key += CORE
        return Question(self.name, prompt, rng.choice(replies), key)

    def check(self, question: Question, response: str) -> bool:
        """A refusal refuses; talk has one of the replies of its kind."""
        kind = question.key.split(":")[1]
        if kind == "beyond":
            return is_refusal(response)
        replies = exactly(*TALK[kind][1])
        return is_right(response, Forms(replies, replies))

    def _beyond(self, rng: random.Random) -> Question:
        frame, fillers = rng.choices(BEYOND, [len(entry[1]) for entry in BEYOND])[0]
        filler = rng.choice(fillers)
        if rng.random() < 0.08:  # anything at all: words that ask nothing we teach
            filler = " ".join(rng.choice(common_words()) for _ in range(rng.randint(3, 6)))
            frame = "{x}"
        template = frame if frame.endswith("?") or frame == "{x}" else f"!{frame}"
        if frame.startswith("i have"):
            template = frame
        key = f"about:beyond:{filler.lower()}"
        return Question(self.name, phrase(rng, template, x=filler), REFUSAL, key)
