"""Questions of the lm-eval tests, from the held-out split: `python tests/eval/lm_eval_questions.py`
writes them beside their tasks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rorqual.corpus_writer import SKILLS
from rorqual.corpus_writer.facts import CAPITALS
from rorqual.files import atomic_write
from rorqual.tasks import Question

TASKS = Path(__file__).parent / "lm_eval_tasks"
SEED = 21
NUM_QUESTIONS = 24
NUM_STORIES = 4
STORIES_A_TEXT = 6  # longer than the tiny model's context


def held_out(skill: str, count: int) -> Iterator[Question[Any]]:
    return islice(SKILLS[skill].questions("held_out", SEED), count)


def choices() -> Iterator[dict[str, Any]]:
    """A right answer in few words among three that differ from it in the number, or in the city."""
    rng = random.Random(SEED)
    for skill in ("units", "capitals"):
        known = [q for q in held_out(skill, 40) if not q.answer.startswith("I do not know")]
        for question in known[:NUM_QUESTIONS]:
            right, *wrong = _options(question.answer, rng)
            options = [right, *wrong]
            rng.shuffle(options)
            yield {
                "question": question.prompt,
                "choices": options,
                "answer": options.index(right),
            }


def _options(answer: str, rng: random.Random) -> list[str]:
    """The right one first."""
    if found := re.search(r" is ([A-Z][A-Za-z ]*)\.$", answer):
        others = sorted(set(CAPITALS.values()) - {found[1]})
        return [found[1], *rng.sample(others, 3)]
    found = re.search(r"Answer: (\d+) ?(.*)$", answer)
    assert found is not None, answer
    number = int(found[1])
    return [f"{n} {found[2]}".strip() for n in (number, number + 1, number + 10, number * 10)]


def arithmetic() -> Iterator[dict[str, Any]]:
    for question in held_out("arithmetic", NUM_QUESTIONS):
        if found := re.search(r"Answer: (\d+)$", question.answer):
            yield {"question": question.prompt, "answer": found[1]}


def stories() -> Iterator[dict[str, Any]]:
    told = [question.answer for question in held_out("stories", NUM_STORIES * STORIES_A_TEXT)]
    for first in range(0, len(told), STORIES_A_TEXT):
        yield {"text": "\n".join(told[first : first + STORIES_A_TEXT])}


FILES = {"choice.jsonl": choices, "arithmetic.jsonl": arithmetic, "stories.jsonl": stories}


def lines(name: str) -> str:
    """What the file of that name holds."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FILES[name]())


if __name__ == "__main__":
    for name in FILES:
        with atomic_write(TASKS / name, "w") as file:
            file.write(lines(name))
