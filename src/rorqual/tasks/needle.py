"""A needle in a haystack: one sentence that tells a number, somewhere in a long text, and a
question about it (report §4.3, Fig. 8; arXiv 2404.06654 calls the like `niah_single`).

The haystack is anybody's text; `eval/needle.py` lays it out by tokens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rorqual.tasks.task import RIGHT, Grade, wrong

SUBJECTS = (
    "anchor apron arrow basket beacon blanket bottle bridge bucket button candle canoe carpet "
    "castle chimney clock cradle curtain drum engine feather fiddle garden hammer harbour hat "
    "kettle kite ladder lamp lantern mirror needle orchard oven paddle pencil pillow piano pocket "
    "quilt ribbon river rocket saddle sail scissors shovel spoon stable table teapot tent tower "
    "trumpet tunnel umbrella violin wagon wallet wheel whistle window"
).split()
INTRODUCTION = "Somewhere in this text a secret number is told. Remember it.\n\n"
DIGITS = 4


@dataclass(frozen=True)
class Needle:
    """`number` is the secret number of `subject`."""

    subject: str
    number: str

    @property
    def sentence(self) -> str:
        return f"The secret number of the {self.subject} is {self.number}."

    @property
    def question(self) -> str:
        return f"What is the secret number of the {self.subject}?"

    @property
    def beginning(self) -> str:
        """Of the answer, for a model that only goes on writing."""
        return f"The secret number of the {self.subject} is"

    @staticmethod
    def drawn(rng: random.Random) -> Needle:
        return Needle(rng.choice(SUBJECTS), str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)))

    def grade(self, answer: str) -> Grade:
        """Right where the first number of the answer is the needle's."""
        found = re.search(r"\d[\d,]*", answer)
        if found is None:
            return wrong("There is no number.")
        number = found.group().replace(",", "")
        return RIGHT if number == self.number else wrong(f"It is {self.number}, not {number}.")
