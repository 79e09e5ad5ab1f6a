"""The one rule by which an answer in words or numbers is judged.

The last "Answer: X" counts if there is one, and X, all that follows it, must be right; its working
is not judged. Otherwise the whole response must be one of the forms in which the task's own
reference answers say it. Nothing is searched for inside a response: a list of all options, "not
Paris" or 1132 for 132 are no answers, since what is judged today is what training is paid for
tomorrow. Case, spaces and a last full stop do not matter; digits are ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rorqual.tasks.task import RIGHT, Grade, wrong

MAX_CHARACTERS = 4000  # four times the longest answer taught
NO_ANSWER = "There is no answer."
TOO_LONG = f"It is longer than {MAX_CHARACTERS:,} characters."
_MARKER = re.compile(r"\banswer:|\bthe answer is\b")


@dataclass(frozen=True)
class Forms:
    """What is right, as patterns of `plain` text: after "Answer:", and as the whole response; and
    what to call it ("number", "day").
    """

    final: str
    whole: str
    noun: str = "answer"


def grade_answer(response: str, forms: Forms) -> Grade:
    """1 if a response says one of the forms, by the rule above; else 0, and what is wrong."""
    text = plain(response)
    if text is None:
        return wrong(TOO_LONG)
    if not text:
        return wrong(NO_ANSWER)
    marks = list(_MARKER.finditer(text))
    said = text[marks[-1].end() :].strip() if marks else text
    if re.fullmatch(forms.final if marks else forms.whole, said):
        return RIGHT
    if not said:
        return wrong('Nothing follows the last "Answer:".')
    # To say why, and for no reward, the answer may be searched for.
    if re.search(rf"(?<![\w.,-])(?:{forms.final})(?![\w-]|[.,]\d)", said):
        return wrong(f"The right {forms.noun} is there, but not by itself.")
    return wrong(f"The {forms.noun} is wrong.")


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
