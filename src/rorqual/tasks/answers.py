"""The one rule by which every skill judges an answer.

The last "Answer: X" counts if there is one, and X, all that follows it, must be right; its working
is not judged. Otherwise the whole response must be one of the forms in which the skill's own
training answers say it. Nothing is searched for inside a response: a list of all options, "not
Paris" or 1132 for 132 are no answers, since what is judged today is what training is paid for
tomorrow. Case, spaces and a last full stop do not matter; digits are ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CHARACTERS = 4000  # four times the longest answer taught
_MARKER = re.compile(r"\banswer:|\bthe answer is\b")
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


@dataclass(frozen=True)
class Forms:
    """What is right, as patterns of `plain` text: after "Answer:", and as the whole response."""

    final: str
    whole: str


def is_right(response: str, forms: Forms) -> bool:
    """Whether a response says one of the forms, by the rule above."""
    text = plain(response)
    if text is None:
        return False
    marks = list(_MARKER.finditer(text))
    if marks:
        return re.fullmatch(forms.final, text[marks[-1].end() :].strip()) is not None
    return re.fullmatch(forms.whole, text) is not None


def is_refusal(response: str) -> bool:
    """Whether a response is an honest no, and nothing else."""
    text = plain(response)
    return text is not None and any(form.fullmatch(text) for form in _REFUSALS)


def plain(text: str) -> str | None:
    """Lower case, single spaces, no mark at the end; None for what is too long to be an answer."""
    if len(text) > MAX_CHARACTERS:
        return None
    return " ".join(text.lower().split()).rstrip(".!").rstrip()


def exactly(*texts: str) -> str:
    """The pattern of any of these texts, in `plain` form."""
    return any_of(re.escape(plain(text) or "") for text in texts)


def any_of(patterns: Iterable[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


def number(value: int) -> str:
    """The pattern of a whole number: 1320 or 1,320."""
    return any_of((str(value), f"{value:,}"))
