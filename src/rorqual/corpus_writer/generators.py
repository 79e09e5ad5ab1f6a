"""Training text by name: each generator is a function (seed, count) of documents.

Only the training split comes out, with two tables shown whole because nothing could be answered
without them: the spelling of every listed word and the definitions (their held-out part is the form
of the question).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rorqual.corpus_writer.dialogues import dialogue, single
from rorqual.corpus_writer.letters import hyphenated, new_word
from rorqual.corpus_writer.skills import SKILLS
from rorqual.corpus_writer.stories import StoryWish, tell
from rorqual.corpus_writer.story_parts import BOYS, GIRLS
from rorqual.corpus_writer.words import common_words, definitions
from rorqual.data.corpus import Document
from rorqual.data.plan import Generator
from rorqual.tasks import is_held_out

SUMS_PER_DOCUMENT = 6
WORDS_PER_DOCUMENT = 12
DEFINITIONS_PER_DOCUMENT = 10
SPELLING_FORMS = (
    "{w} = {s}", "{w} = {s}", "{w}: {s}", "The word {w} is spelled {s}.", "{s} spells {w}.",
    "The letters of {w} are {s}.", "To spell {w}, write {s}.",
)  # fmt: skip


def dialogues(seed: int, count: int) -> Iterator[Document]:
    """Conversations over all skills."""
    rng = random.Random(f"dialogues:{seed}")
    for _ in range(count):
        yield Document(messages=dialogue(rng), source="dialogues")


def questions(seed: int, count: int) -> Iterator[Document]:
    """Single questions with their answers over all skills."""
    rng = random.Random(f"questions:{seed}")
    for _ in range(count):
        yield Document(messages=single(rng), source="questions")


def stories(seed: int, count: int) -> Iterator[Document]:
    """Plain stories."""
    rng = random.Random(f"stories:{seed}")
    for _ in range(count):
        yield Document(tell(rng, StoryWish()), source="stories")


def arithmetic(seed: int, count: int) -> Iterator[Document]:
    """Workings of sums, one a line."""
    rng = random.Random(f"arithmetic:{seed}")
    skill = SKILLS["arithmetic"]
    for _ in range(count):
        lines = (skill.training_question(rng).answer for _ in range(SUMS_PER_DOCUMENT))
        text = "\n".join(line for line in lines if "=" in line)
        yield Document(text, source="arithmetic")


def spelling(seed: int, count: int) -> Iterator[Document]:
    """Words and their letters, one a line; every listed word comes once before any comes twice."""
    rng = random.Random(f"spelling:{seed}")
    listed = [*common_words(), *(name.lower() for name in GIRLS + BOYS)]
    queue: list[str] = []
    for _ in range(count):
        lines: list[str] = []
        while len(lines) < WORDS_PER_DOCUMENT:
            if rng.random() < 0.2:
                word = new_word(rng)
                if is_held_out(f"letters:spell:{word}"):
                    continue  # words outside the list stay unseen when held out
            else:
                if not queue:
                    queue = rng.sample(listed, len(listed))
                word = queue.pop()
            (shown,) = rng.choices((word, word.capitalize(), word.upper()), (75, 20, 5))
            lines.append(rng.choice(SPELLING_FORMS).format(w=shown, s=hyphenated(word)))
        yield Document("\n".join(lines), source="spelling")


def definition_text(seed: int, count: int) -> Iterator[Document]:
    """Definitions, one a line."""
    rng = random.Random(f"definitions:{seed}")
    sentences = tuple(definitions().values())
    for _ in range(count):
        text = "\n".join(rng.sample(sentences, DEFINITIONS_PER_DOCUMENT))
        yield Document(text, source="definitions")


GENERATORS: dict[str, Generator] = {
    "dialogues": dialogues,
    "questions": questions,
    "stories": stories,
    "arithmetic": arithmetic,
    "spelling": spelling,
    "definitions": definition_text,
}
