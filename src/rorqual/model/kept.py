"""Buffers that stay as exact as they are made, whatever the model around them is cast to: angles,
the router's bias, the balance loss, scales of FP8 blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class KeepsBuffers(nn.Module):
    """Its own buffers move with it, and keep their dtype where it is cast (`model.bfloat16()`)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
