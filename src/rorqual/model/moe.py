"""DeepSeekMoE: shared experts for all tokens, routed experts for those that chose them (§2.1.2).

The way of a token: `Router` chooses, the step's `Dispatcher` brings rows to the experts that live
here and back, `Experts` computes them all in two grouped GEMMs. No token is dropped.
"""

# B batch, T tokens, D hidden size, E experts, K experts per token, N = T*K rows, I intermediate
# size

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.balance import Balance
from rorqual.model.config import ModelConfig
from rorqual.model.dispatch import Dispatched, LocalDispatcher
from rorqual.model.layers import FeedForward
from rorqual.model.router import Router, Routing
from rorqual.model.served import Served
from rorqual.model.step import Step
from rorqual.ops.kernels import TrainingKernels, storage_of
from rorqual.ops.swiglu import swiglu


class Experts(Served):
    """E SwiGLU experts, stacked. forward(dispatched) -> (N, D), each row times its gate value.

    gate_up_proj (E, 2I, D), gate rows first; down_proj (E, D, I). `compute_dtype` as of `Linear`.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, dim, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(num, dim, inner))

    def storage(self) -> tuple[str, torch.device]:
        return storage_of(self.gate_up_proj), self.gate_up_proj.device

    def forward(self, dispatched: Dispatched) -> Tensor:
        multiply = self.kernels.grouped_gemm
        rows_ND, counts_E = dispatched.rows_ND, dispatched.counts_E
        dtype = self.compute_dtype or rows_ND.dtype
        gate_up = multiply(rows_ND.to(dtype), self.gate_up_proj.to(dtype), counts_E)
        gate, up = gate_up.chunk(2, dim=-1)
        # Choice: the gate value g scales the narrow inner vector, g W h = W (g h), before the
        # product.
        inner_NI = swiglu(gate, up, dispatched.tile_rows) * dispatched.weights_N[:, None].to(dtype)
        return multiply(inner_NI, self.down_proj.to(dtype), counts_E)


class MoE(nn.Module):
    """forward(x_BTD, step) -> (B, T, D).

    With a step's training kernels `narrow_TD` is x in the dtype of products.

    In training, where the step has a balance term, the backward pass adds the gradient of this
    layer's balance loss and counts it in `balance`.
    """

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
        self.balance = Balance(config.n_routed_experts)

    def forward(self, x_BTD: Tensor, step: Step, *, narrow_TD: Tensor | None = None) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        if step.training is not None:
            assert narrow_TD is not None, "in a training step it is given what is multiplied, too"
            out_TD, routing = self._trained(x_TD, narrow_TD, step, step.training)
            out_BTD = out_TD.view_as(x_BTD)
        else:
            routing = self.gate(x_TD)
            dispatched = step.dispatcher.dispatch(x_TD, routing, self.num_experts)
            out_ND = self.experts(dispatched)
            out_BTD = step.dispatcher.combine(out_ND, routing, dispatched).view_as(x_BTD)
            if self.shared_experts is not None:
                out_BTD = out_BTD + self.shared_experts(x_BTD)
        if step.balance is not None:
            out_BTD = self.balance(out_BTD, routing, step.balance)
        return out_BTD

    def _trained(
        self, x_TD: Tensor, narrow_TD: Tensor, step: Step, kernels: TrainingKernels
    ) -> tuple[Tensor, Routing]:
        """(T, D) as the router takes it, and as it is multiplied."""
        routing = self.gate(x_TD, kernels)
        base_TD = None
        if self.shared_experts is not None:
            base_TD = self.shared_experts.trained(narrow_TD, kernels)
        if isinstance(step.dispatcher, LocalDispatcher):
            experts = self.experts
            assert len(experts.gate_up_proj) == self.num_experts, "all of them live here"
            out_TD = kernels.routed(
                narrow_TD, base_TD, routing.weights_TK, routing.experts_TK,
                experts.gate_up_proj, experts.down_proj,
            )  # fmt: skip
            return out_TD, routing
        dispatched = step.dispatcher.dispatch(narrow_TD, routing, self.num_experts)
        out_TD = step.dispatcher.combine(self.experts(dispatched), routing, dispatched)
        return (out_TD if base_TD is None else out_TD + base_TD), routing
