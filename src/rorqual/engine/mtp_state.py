"""How far one MTP depth has come with one sequence."""

# T slots, D hidden size

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DepthState(NamedTuple):
    """The slots from `first_slot` to below `next_slot` are in the depth's cache. `rows`, one after
    the other, are the `num_rows` hidden states of the depth before (the main model's for the first)
    that belong to the slots from `next_slot` on.
    """

    first_slot: int
    next_slot: int
    num_rows: int = 0
    rows: tuple[Tensor, ...] = ()

    def with_rows(self, more_TD: Tensor, num: int) -> DepthState:
        rows = (*self.rows, more_TD) if self.rows else (more_TD,)
        return DepthState(self.first_slot, self.next_slot, self.num_rows + num, rows)

    def taken(self, num: int) -> tuple[Tensor, DepthState]:
        """The rows of the next `num` slots, (T, D), and the state when these are in the cache."""
        rows_TD = self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows)
        num_left = self.num_rows - num
        left: tuple[Tensor, ...] = ()
        if num_left:
            rows_TD, left = rows_TD[:num], (rows_TD[num:].clone(),)
        return rows_TD, DepthState(self.first_slot, self.next_slot + num, num_left, left)
