"""SwiGLU's inner vector (arXiv 2002.05202), one operation for dense and routed experts."""

# N rows, I inner width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_NI: Tensor, up_NI: Tensor, tile_rows: int | None = None) -> Tensor:
    """silu(gate) * up; any leading shape.

    The number of rows decides which values threads take in whole vectors and which one by one, and
    that changes last bits. With `tile_rows` no operator takes more rows at a time.
    """
    if tile_rows is None or not len(gate_NI):
        return F.silu(gate_NI) * up_NI
    return torch.cat([F.silu(tile) for tile in gate_NI.split(tile_rows)]) * up_NI
