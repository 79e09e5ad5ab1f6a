"""Every skill by its name, and how often each is met in a conversation."""

from __future__ import annotations

from typing import Any

from rorqual.corpus_writer.about import About
from rorqual.corpus_writer.arithmetic import Arithmetic
from rorqual.corpus_writer.dates import Dates
from rorqual.corpus_writer.facts import Capitals, Definitions, Opposites
from rorqual.corpus_writer.letters import Letters
from rorqual.corpus_writer.numbers import Numbers
from rorqual.corpus_writer.python_line import PythonLine
from rorqual.corpus_writer.stories import Stories
from rorqual.corpus_writer.units import Units
from rorqual.tasks import DrawnTask

_ALL: tuple[DrawnTask[Any], ...] = (
    Arithmetic(), Dates(), Units(), Numbers(), Letters(), Definitions(), Capitals(), Opposites(),
    Stories(), PythonLine(), About(),
)  # fmt: skip
SKILLS = {skill.name: skill for skill in _ALL}
# Choice: by how much a skill has to learn (columns, letters) and how likely a visitor is to try it.
WEIGHTS = {
    "arithmetic": 24, "dates": 8, "units": 7, "numbers": 7, "letters": 15, "definitions": 10,
    "capitals": 4, "opposites": 3, "stories": 9, "python": 7, "about": 12,
}  # fmt: skip
