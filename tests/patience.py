"""How tests wait: for an event, however long it takes; the limit is there to tell a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

HANG_SECONDS = 900.0
"""No healthy wait comes near it, even on two cores that fourteen other programs want. Below the
`timeout` of pyproject.toml, so that the test itself says what it waited for.
"""
POLL_SECONDS = 0.01


def wait_until(is_true: Callable[[], object]) -> None:
    """Returns when the condition holds; fails when the program must be hanging."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(POLL_SECONDS)


def is_there(pid: int) -> bool:
    """Whether the process runs: no longer one that has ended, though nobody waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
