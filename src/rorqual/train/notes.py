"""A line to read before the first step, of whatever stage."""

from __future__ import annotations

from collections.abc import Iterator

from rorqual.ops.device import num_processors
from rorqual.train.recipe import Recipe


def threads_note(recipe: Recipe) -> Iterator[str]:
    """A line where more threads are asked for than can run at a time."""
    threads, processors = recipe.training.threads, num_processors()
    if threads is not None and threads > processors:
        yield f"training.threads = {threads} on {processors} processors: fewer would be faster"
