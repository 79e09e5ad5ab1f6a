"""How far one MTP depth has come with one sequence."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DepthState(NamedTuple):
    """The slots below `next_slot` are in the depth's cache; `rows_TD` are the hidden states of the
    depth before (the main model's for the first) that belong to the slots from there on.
    """

    next_slot: int
    rows_TD: Tensor
