"""Oracle: Python's `range`, read from what the question says."""

from __future__ import annotations

import random
import re

from rorqual.corpus_writer.numbers import Numbers

STEPS = {"two": 2, "three": 3, "four": 4, "five": 5, "ten": 10}


def test_counting_goes_from_the_first_number_to_the_last() -> None:
    rng, skill = random.Random(0), Numbers()
    seen = set()
    for _ in range(5000):
        question = skill.question(rng)
        if question.key.split(":")[1] != "count":
            continue
        prompt = question.prompt.lower()
        given = [int(digits) for digits in re.findall(r"\d+", prompt)]
        step = re.search(r"(\d+|two|three|four|five|ten)s\b", prompt)
        if step:
            by = STEPS.get(step[1]) or int(step[1])
            wanted = range(by, given[-1] + 1, by)
        elif len(given) == 1:
            wanted = range(1, given[0] + 1)
        else:
            by = 1 if given[0] < given[1] else -1
            wanted = range(given[0], given[1] + by, by)
        seen.add((bool(step), wanted.step > 0, len(given)))
        assert question.answer == ", ".join(map(str, wanted)), prompt
    assert {(False, True, 1), (False, True, 2), (False, False, 2)} <= seen
    assert {(True, True, 1), (True, True, 2)} <= seen
