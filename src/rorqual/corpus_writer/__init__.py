"""The shipped model's corpus: its skills (each a task) with the answers that it is taught, and the
conversations, stories and drills made of them.
"""

from rorqual.corpus_writer.generators import GENERATORS
from rorqual.corpus_writer.skills import SKILLS

__all__ = ["GENERATORS", "SKILLS"]
