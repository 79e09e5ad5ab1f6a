"""The sequence-wise balance loss (report §2.1.2), added where it arises: in each sparse layer.

A layer hands on hidden states alone. Its balance loss enters the backward pass there, through a
function that leaves the layer's output as it is, and is counted in the layer's own buffers. So a
pipeline's stage needs to hand on nothing else, and a layer that is computed again in the backward
pass is counted once.
"""

# B sequences, T tokens, D hidden size, E experts, K experts per token, X = T*K choices

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.model.kept import KeepsBuffers
from rorqual.model.router import Routing


class BalanceTerm(NamedTuple):
    """`coefficient`: alpha / sequences of the batch. `exists_BT` bool: which positions count, where
    packed documents leave some out.
    """

    coefficient: Tensor
    exists_BT: Tensor | None


class Balance(KeepsBuffers):
    """forward(out_BTD, routing, term) -> out_BTD, with the balance loss in its backward pass.

    What the training passes since `reset` saw: `loads_E` int64 counts each expert's (token, choice)
    pairs, `loss` float32 is the balance loss before its coefficient. Neither is part of a
    checkpoint.
    """

    loads_E: Tensor
    loss: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        loads_E = torch.zeros(num_experts, dtype=torch.int64)
        self.register_buffer("loads_E", loads_E, persistent=False)
        self.register_buffer("loss", torch.zeros(()), persistent=False)

    def forward(self, out_BTD: Tensor, routing: Routing, term: BalanceTerm) -> Tensor:
        exists_T = None if term.exists_BT is None else term.exists_BT.flatten()
        num_experts = self.loads_E.shape[0]
        counts_BE = sequence_loads(routing.experts_TK, len(out_BTD), num_experts, exists_T)
        loss = sequence_balance_loss(routing.scores_TE, counts_BE, exists_T)
        totals, seen = (self.loss, self.loads_E), (loss.detach(), counts_BE.sum(0))
        if not out_BTD.requires_grad and not loss.requires_grad:
            if torch.is_grad_enabled():  # a frozen layer below all that learns: no backward pass
                _add(totals, seen)
            return out_BTD
        with_loss: Tensor = _WithLoss.apply(out_BTD, loss * term.coefficient, totals, seen)
        return with_loss

    def reset(self) -> None:
        self.loads_E.zero_()
        self.loss.zero_()


class _WithLoss(torch.autograd.Function):
    """The output as it is. The backward pass gives the loss a gradient of one, and adds what this
    forward saw, `seen`, to the layer's `totals`.
    """

    @staticmethod
    def forward(
        ctx: Any, out_BTD: Tensor, loss: Tensor, totals: Sequence[Tensor], seen: Sequence[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(*seen)
        ctx.totals = totals
        return out_BTD.view_as(out_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _add(ctx.totals, ctx.saved_tensors)
        one = torch.ones((), dtype=torch.float32, device=grad_BTD.device)
        return grad_BTD, one, None, None


def _add(totals: Sequence[Tensor], seen: Sequence[Tensor]) -> None:
    for total, value in zip(totals, seen, strict=True):
        total.add_(value)


def sequence_loads(
    experts_TK: Tensor, num_sequences: int, num_experts: int, exists_T: Tensor | None = None
) -> Tensor:
    """(B, E) int64: how often each sequence chose each expert; `exists_T` says who counts."""
    chosen_BX = experts_TK.view(num_sequences, -1)
    ones_TK = torch.ones_like(experts_TK)
    if exists_T is not None:
        ones_TK = ones_TK * exists_T[:, None]
    counts_BE = chosen_BX.new_zeros(num_sequences, num_experts)
    return counts_BE.scatter_add(1, chosen_BX, ones_TK.view(num_sequences, -1))


def sequence_balance_loss(
    scores_TE: Tensor, counts_BE: Tensor, exists_T: Tensor | None = None
) -> Tensor:
    """Sum over sequences of sum_i f_i P_i (§2.1.2): f_i = E/(K T) * count, P_i the mean affinity
    after normalising each token's over all experts. 1 for each perfectly balanced sequence.
    """
    num_sequences, num_experts = counts_BE.shape
    # Each row of counts sums to K T; counting it keeps the formula free of K.
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    shares_BTE = shares_TE.view(num_sequences, -1, num_experts)
    if exists_T is None:
        f_BE = counts_BE * (num_experts / counts_BE.sum(1, keepdim=True))
        return (f_BE * shares_BTE.mean(1)).sum()
    # T is the number of positions that exist; a sequence without any gives zero.
    exists_BT1 = exists_T.view(num_sequences, -1, 1)
    f_BE = counts_BE * (num_experts / counts_BE.sum(1, keepdim=True).clamp(min=1))
    p_BE = (shares_BTE * exists_BT1).sum(1) / exists_BT1.sum(1).clamp(min=1)
    return (f_BE * p_BE).sum()
