"""An honest no: how the shipped model says that something is beyond it, and how that is judged."""

from __future__ import annotations

import re

from rorqual.tasks import RIGHT, Grade, wrong
from rorqual.tasks.answers import NO_ANSWER, plain

# How training says no. The slots may be filled by anything that could be a name.
_SLOT = r"[a-z' -]{1,40}"
_REFUSALS = tuple(
    re.compile(form)
    for form in (
        r"that(?: sum)? is beyond me",
        r"that sum is beyond me\. i can add and subtract whole numbers up to 999, "
        r"and multiply or divide them by one digit",
        r"that is beyond me: i am a very small model(?:\. i can do sums, dates, units, spelling, "
        r"simple definitions, capitals, short stories and one-line python)?",
        rf'i do not know the word "{_SLOT}"(?:\. i know a few hundred everyday words)?',
        rf"i do not know the capital of {_SLOT}(?:\. i know only about forty capitals)?",
        rf'i do not know the opposite of "{_SLOT}"',
        rf"i do not know how to turn {_SLOT} into {_SLOT}",
        r"i do not know",
    )
)


def is_refusal(response: str) -> bool:
    """Whether a response is an honest no, and nothing else."""
    text = plain(response)
    return text is not None and any(form.fullmatch(text) for form in _REFUSALS)


def grade_refusal(response: str) -> Grade:
    """1 for an honest no, where nothing else is right."""
    if is_refusal(response):
        return RIGHT
    if not response.strip():
        return wrong(NO_ANSWER)
    return wrong("It answers where only an honest no is right.")
