"""Memory for packed weights, on huge pages where the system grants them.

A decode step reads all active weights once: on pages of 4 kB much of its time is spent in looking
up where they lie (docs/log.md).
"""

# N tensors of S bytes each

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
BLOCK_BYTES = 32 * HUGE_PAGE
ALIGNMENT = 64


class Arena:
    """Blocks that tensors are cut from; a block lives as long as one of its tensors."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._left: Tensor | None = None

    def empty(self, num: int, size: int) -> Tensor:
        """uint8 (N, S) of no certain values."""
        num_bytes = num * size
        with self._lock:
            if self._left is None or len(self._left) < num_bytes:
                self._left = _block(max(num_bytes, BLOCK_BYTES))
            found, self._left = (
                self._left[:num_bytes],
                self._left[num_bytes + -num_bytes % ALIGNMENT :],
            )
        return found.view(num, size)


def _block(num_bytes: int) -> Tensor:
    """A block that begins on a huge page. What nobody writes takes no memory."""
    length = num_bytes + 2 * HUGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    # Private: shared memory, which is the default, has huge pages of its own rules.
    room = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        room.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(room, dtype=torch.uint8)
    start = -block.data_ptr() % HUGE_PAGE
    return block[start : start + num_bytes + -num_bytes % HUGE_PAGE]


ARENA = Arena()
