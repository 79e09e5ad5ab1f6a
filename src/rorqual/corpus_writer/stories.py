"""Short stories of a seeded grammar: a hero, a place, a wish or trouble, a helper, a good end.

A request may fix the hero's name, the animal, an object or the topic; the story then holds it. The
shape follows TinyStories (arXiv 2305.07759): few words, one idea a sentence, a plain ending.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rorqual.corpus_writer import story_parts as parts
from rorqual.corpus_writer.phrasing import canonical, phrase
from rorqual.errors import listing
from rorqual.tasks import RIGHT, DrawnTask, Grade, Question, wrong
from rorqual.tasks.answers import MAX_CHARACTERS, NO_ANSWER, TOO_LONG
from rorqual.tasks.task import CORE

MIN_SENTENCES, MIN_STORY_WORDS, MAX_SENTENCE_WORDS = 4, 25, 40

PLAIN = (
    "!tell me a story", "!tell me a story", "!tell me a short story", "!write a story",
    "!write a short story", "tell me a story", "story", "a story please", "!tell a story",
    "i want a story", "i want to hear a story", "do you know a story?", "!make up a story",
    "!tell me a bedtime story", "do you have a story for me?", "story please", "!write me a story",
)  # fmt: skip
ABOUT = (
    "!tell me a story about {x}", "!tell me a short story about {x}", "!write a story about {x}",
    "!write a short story about {x}", "a story about {x}", "story about {x}",
    "i want a story about {x}", "!make up a story about {x}", "!tell a story about {x}",
    "do you know a story about {x}?", "!write me a story about {x}",
    "i would like a story about {x}", "a short story about {x} please",
)  # fmt: skip


@dataclass(frozen=True)
class StoryWish:
    """What a request fixes; None leaves it to the grammar."""

    name: str | None = None
    animal: str | None = None
    item: str | None = None
    topic: str | None = None
    child: str | None = None

    def words(self) -> tuple[str, ...]:
        """The words that the story must hold."""
        topic = parts.TOPICS[self.topic][1] if self.topic else None
        return tuple(w for w in (self.name, self.animal, self.item, topic, self.child) if w)


PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her"},
    "boy": {"he": "he", "him": "him", "his": "his"},
}


def tell(rng: random.Random, wish: StoryWish) -> str:
    """A story of eight or nine sentences that holds what `wish` names."""
    while True:
        story = _draft(rng, wish)
        lowered = story.lower()
        # A beat's other sentences may pass by the topic's word or the item: draw again.
        if all(word.lower() in lowered for word in wish.words()):
            return story


def _draft(rng: random.Random, wish: StoryWish) -> str:
    plot = parts.TOPICS[wish.topic][0] if wish.topic else rng.choice(tuple(parts.PLOTS))
    if wish.item:
        plot = rng.choice(parts.PLOTS_WITH_OBJECT)
    slots = _cast(rng, wish, plot)
    beats = parts.PLOTS[plot]
    sentences = [rng.choice(parts.OPENINGS), *(rng.choice(beat) for beat in beats)]
    sentences.append(rng.choice(parts.CLOSINGS))
    story = " ".join(sentence.format(**slots) for sentence in sentences)
    return re.sub(r"(?<=[.!?] )the\b|(?<=[.!?]\" )the\b", "The", story)


def _cast(rng: random.Random, wish: StoryWish, plot: str) -> dict[str, str]:
    gender = rng.choice(("girl", "boy"))
    if wish.child:
        gender = wish.child
    if wish.animal in parts.PEOPLE:
        gender = parts.PEOPLE[wish.animal]
    if wish.name:
        gender = "girl" if wish.name in parts.GIRLS else "boy"
    name = wish.name or rng.choice(parts.GIRLS if gender == "girl" else parts.BOYS)
    animal = wish.animal or (rng.choice(parts.ANIMALS) if rng.random() < 0.4 else None)
    if wish.child:
        animal = None
    size = rng.choice(("little ", "young ", "small ", "kind ", "brave ", "shy ", ""))
    kind = size + (animal or gender)
    # The friend is an animal with "the", or a child of another name: never a second "he" by name.
    f_gender = "boy" if gender == "girl" else "girl"
    friends = [other for other in parts.ANIMALS if other != animal]
    friend = f"the {rng.choice(friends)}"
    if rng.random() < 0.4:
        friend = rng.choice(parts.GIRLS if f_gender == "girl" else parts.BOYS)
    bare = wish.item or rng.choice(parts.OBJECTS)
    thing = f"{rng.choice(parts.OBJECT_ADJECTIVES)} {bare}"
    place = rng.choice(parts.PLACES)
    weather = rng.choice(parts.PLOT_WEATHERS.get(plot, parts.WEATHERS))
    he, f_he = PRONOUNS[gender], PRONOUNS[f_gender]
    return {
        "N": name, "F": friend, "dear_F": friend.replace("the ", "dear "), "bare": bare,
        "a_kind": _article(kind), "a_thing": _article(thing), "thing": thing, "weather": weather,
        "place": place, "Place": place[0].upper() + place[1:], "food": rng.choice(parts.FOODS),
        "skill": rng.choice(parts.SKILLS_TO_LEARN),
        **he, "He": he["he"].capitalize(), "His": he["his"].capitalize(),
        **{f"f_{case}": word for case, word in f_he.items()},
    }  # fmt: skip


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Stories(DrawnTask[StoryWish]):
    name = "stories"

    def question(self, rng: random.Random) -> Question[StoryWish]:
        roll = rng.random()
        wish, about, template = StoryWish(), "", ""
        names = parts.GIRLS + parts.BOYS
        if roll < 0.2:
            template = rng.choice(PLAIN)
        elif roll < 0.45:
            animal = rng.choice(parts.ANIMALS if roll < 0.38 else tuple(parts.PEOPLE))
            wish, about = StoryWish(animal=animal), _article(animal)
        elif roll < 0.6:
            animal, name = rng.choice(parts.ANIMALS), rng.choice(names)
            wish = StoryWish(animal=animal, name=name)
            about = f"{_article(animal)} {rng.choice(('named', 'called'))} {name}"
        elif roll < 0.72:
            name = rng.choice(names)
            wish, about = StoryWish(name=name), name
        elif roll < 0.8:
            name = rng.choice(names)
            child = "girl" if name in parts.GIRLS else "boy"
            wish, about = StoryWish(child=child, name=name), f"a {child} named {name}"
            if rng.random() < 0.3:
                wish, about = StoryWish(child=child), f"a {child}"
        elif roll < 0.9:
            item = rng.choice(parts.OBJECTS)
            wish, about = StoryWish(item=item), _article(item)
        else:
            about = rng.choice(tuple(parts.TOPICS))
            wish = StoryWish(topic=about)
        template = template or rng.choice(ABOUT)
        prompt = phrase(rng, template, x=about)
        key = f"stories:{canonical(template, x=about)}:{','.join(wish.words())}"
        if not about:
            key += CORE
        return Question(self.name, prompt, tell(rng, wish), key, wish)

    def grade(self, question: Question[StoryWish], answer: str) -> Grade:
        """Holds what was asked for, in at least four different sentences that are sentences: a
        capital, two words or more that are not all the same, a mark at the end.
        """
        text = answer.strip()
        if not text:
            return wrong(NO_ANSWER)
        if len(answer) > MAX_CHARACTERS:
            return wrong(TOO_LONG)
        if text[-1] not in '.!"':
            return wrong("It does not come to an end.")
        sentences = re.split(r"(?<=[.!?])\s+", text)
        if len(set(sentences)) < len(sentences):
            return wrong("It says a sentence again.")
        if len(sentences) < MIN_SENTENCES or len(text.split()) < MIN_STORY_WORDS:
            return wrong("It is too short for a story.")
        if not all(map(_is_sentence, sentences)):
            return wrong("Not all of its sentences are sentences.")
        missing = [word for word in question.facts.words() if not _has(text, word)]
        return wrong(f"It does not tell of {listing(missing)}.") if missing else RIGHT


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}(?:s|ed|d|'s)?\b", text, re.IGNORECASE) is not None


def _is_sentence(text: str) -> bool:
    words = re.findall(r"[a-z']+", text.lower())
    is_varied = 2 <= len(words) <= MAX_SENTENCE_WORDS and len(set(words)) * 2 > len(words)
    return text.lstrip('"')[:1].isupper() and is_varied
