"""DeepSeekMoE: shared experts for all tokens, routed experts for those that chose them (§2.1.2).

The way of a token: `Router` chooses, a `Dispatcher` brings rows to the experts that live here and
back, `Experts` computes them all in two grouped GEMMs. No token is dropped. Expert
parallelism replaces the dispatcher and touches nothing else.
"""

# B batch, T tokens, D hidden size, E experts, K experts per token, N = T*K rows, I intermediate
# size

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.model.config import ModelConfig
from rorqual.model.layers import FeedForward
from rorqual.model.router import Router, Routing
from rorqual.ops.grouped_gemm import grouped_gemm, grouped_gemm_plain


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
        return out_ND[place_N].view(num_tokens, num_choices, -1).sum(dim=1)


class Experts(nn.Module):
    """E SwiGLU experts, stacked. forward(dispatched) -> (N, D), each row times its gate value.

    gate_up_proj (E, 2I, D), gate rows first; down_proj (E, D, I).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, dim, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(num, dim, inner))
        self.use_plain = False

    def forward(self, dispatched: Dispatched) -> Tensor:
        multiply = grouped_gemm_plain if self.use_plain else grouped_gemm
        rows_ND, counts_E = dispatched.rows_ND, dispatched.counts_E
        # Custom operators do not follow autocast by themselves.
        kind = rows_ND.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_autocast else rows_ND.dtype
        gate_up = multiply(rows_ND.to(dtype), self.gate_up_proj.to(dtype), counts_E)
        gate, up = gate_up.chunk(2, dim=-1)
        # Choice: the gate value g scales the narrow inner vector, g W h = W (g h), before the
        # product.
        inner_NI = _silu(gate, dispatched.tile_rows) * up * dispatched.weights_N[:, None].to(dtype)
        return multiply(inner_NI, self.down_proj.to(dtype), counts_E)


def _silu(gate_NI: Tensor, tile_rows: int | None) -> Tensor:
    """How threads share many rows decides which values are taken in whole vectors, and which one by
    one: that changes last bits.
    """
    if tile_rows is None or not len(gate_NI):
        return F.silu(gate_NI)
    return torch.cat([F.silu(tile) for tile in gate_NI.split(tile_rows)])


class MoE(nn.Module):
    """forward(x_BTD) -> (out_BTD, Routing over the B*T tokens)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            FeedForward(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD)
        dispatched = self.dispatcher.dispatch(x_TD, routing, self.num_experts)
        out_ND = self.experts(dispatched)
        out_BTD = self.dispatcher.combine(out_ND, routing, dispatched).view_as(x_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, routing
