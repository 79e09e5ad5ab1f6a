"""The way of a token's hidden state to its experts and back. Expert parallelism replaces the
dispatcher and touches nothing else.
"""

# T tokens, D hidden size, E experts, K experts per token, N = T*K rows

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.model.router import Routing


class Dispatched(NamedTuple):
    """Rows sorted by expert, and each row's gate value.

    rows_ND; counts_E int64, rows of each expert; weights_N float32; order_N int64, the (token,
    choice) pair of each row, which `combine` needs. With `tile_rows` no operator whose last bits
    depend on its size takes more rows at a time.
    """

    rows_ND: Tensor
    counts_E: Tensor
    weights_N: Tensor
    order_N: Tensor
    tile_rows: int | None = None
    route: Any = None


class Dispatcher(Protocol):
    """Brings each token's hidden state to its experts, and the experts' outputs back."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> Dispatched: ...

    def combine(self, out_ND: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor: ...


class LocalDispatcher:
    """All experts live on this rank: a stable sort of pairs by expert, and its inverse."""

    def dispatch(self, x_TD: Tensor, routing: Routing, num_experts: int) -> Dispatched:
        num_choices = routing.experts_TK.shape[1]
        flat_N = routing.experts_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=x_TD.device)
        counts_E = counts_E.scatter_add(0, flat_N, torch.ones_like(flat_N))
        weights_N = routing.weights_TK.flatten()[order_N]
        return Dispatched(x_TD[order_N // num_choices], counts_E, weights_N, order_N)

    def combine(self, out_ND: Tensor, routing: Routing, dispatched: Dispatched) -> Tensor:
        num_tokens, num_choices = routing.experts_TK.shape
        place_N = torch.empty_like(dispatched.order_N)
        place_N = place_N.scatter(
            0, dispatched.order_N, torch.arange(place_N.numel(), device=place_N.device)
        )
        place_N = place_N[: num_tokens * num_choices]
        return out_ND[place_N].view(num_tokens, num_choices, out_ND.shape[1]).sum(dim=1)
