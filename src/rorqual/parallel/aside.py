"""Which of two passes that run at the same time a thread is in: the one aside, or the other.

What ranks send each other must come in the same order on all of them. Two passes come to their
sends in any order, so that the one aside has groups of its own.
"""

from __future__ import annotations

from contextvars import ContextVar

from torch.distributed import ProcessGroup

_is_aside: ContextVar[bool] = ContextVar("aside", default=False)


def step_aside() -> None:
    """From now on this thread runs passes aside."""
    _is_aside.set(True)


def group_of_thread(group: ProcessGroup, aside: ProcessGroup | None) -> ProcessGroup:
    """Where this thread sends; without a group for passes aside there are none."""
    return aside if aside is not None and _is_aside.get() else group
