"""The training loss: main + lambda/D * sum_k MTP_k + alpha * sequence-wise balance (§2.1.2, §2.2).

Each cross entropy is a mean over its own valid targets of the *whole batch*: a micro-batch gives
its sums times coefficients that are known before the first one runs, so accumulated gradients are
those of one large batch. All sums are float32.
"""

# B sequences, T inputs, S = T + 1 + depths tokens of a sample, D hidden size, E experts, L sparse
# layers, K experts a token

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.model import DeepseekV3
from rorqual.model.mtp import documents_at
from rorqual.model.router import Routing
from rorqual.ops.cross_entropy import linear_cross_entropy


class Coefficients(NamedTuple):
    """What a micro-batch's sums are multiplied by; tensors, so that a new lambda recompiles
    nothing.

    `mean_C` (1 + depths,): 1 / valid targets of the main model and of each MTP depth in the batch.
    `weight_C` (1 + depths,): 1 for the main model, lambda / depths for the others.
    `balance`: alpha / sequences of the batch.
    """

    mean_C: Tensor
    weight_C: Tensor
    balance: Tensor


class LossParts(NamedTuple):
    """A micro-batch's share of the batch's loss. `total` carries the gradient; `cross_entropy_C`
    (means of the main model, then each depth) and `balance` (alpha included) are for the record;
    `loads_LE` int64 counts the (token, choice) pairs of each expert in each sparse layer.
    """

    total: Tensor
    cross_entropy_C: Tensor
    balance: Tensor
    loads_LE: Tensor


class RoutedLayer(NamedTuple):
    """What a sparse layer did, and the documents of its positions where they are isolated."""

    routing: Routing
    documents_BT: Tensor | None


def target_mask(
    mask_BS: Tensor, depth: int, num_inputs: int, documents_BS: Tensor | None
) -> Tensor:
    """(B, T) bool: where `depth` has a target that counts.

    With documents, position i counts only if it and its target, token i + depth + 1, lie in one:
    what a document's end says of the next one's beginning would teach nothing.
    """
    is_target_BT = mask_BS[:, depth + 1 : num_inputs + depth + 1]
    if documents_BS is None:
        return is_target_BT
    return is_target_BT & (documents_at(depth + 1, documents_BS, num_inputs) > 0)


def target_counts(mask_BS: Tensor, num_depths: int, documents_BS: Tensor | None = None) -> Tensor:
    """(1 + depths,) int64: valid targets of the main model and of each MTP depth."""
    num_inputs = mask_BS.shape[1] - 1 - num_depths
    depths = range(num_depths + 1)
    masks = [target_mask(mask_BS, depth, num_inputs, documents_BS) for depth in depths]
    return torch.stack([mask_BT.sum() for mask_BT in masks])


def coefficients(
    counts_C: Tensor, num_sequences: int, mtp_weight: float, balance_alpha: float
) -> Coefficients:
    """The coefficients of a batch from its target counts; a part without targets counts zero."""
    num_depths, device = counts_C.numel() - 1, counts_C.device
    weight_C = torch.full((num_depths + 1,), mtp_weight / max(num_depths, 1), device=device)
    weight_C[0] = 1.0
    return Coefficients(
        mean_C=1.0 / counts_C.clamp(min=1).float(),
        weight_C=weight_C,
        balance=torch.full((), balance_alpha / num_sequences, device=device),
    )


def micro_batch_loss(
    model: DeepseekV3,
    tokens_BS: Tensor,
    mask_BS: Tensor,
    by: Coefficients,
    documents_BS: Tensor | None = None,
) -> LossParts:
    """The loss of tokens (B, T + 1 + depths) int64, where `mask_BS` marks valid targets (bool).

    With `documents_BS`, numbers of packed documents from 1 and 0 for padding, none of them sees
    another (§5.1), and what exists in none counts neither in the loss nor in the balance.
    """
    num_depths = by.mean_C.numel() - 1
    num_inputs = tokens_BS.shape[1] - 1 - num_depths
    head_VD = model.lm_head.weight

    def documents(depth: int) -> Tensor | None:
        return None if documents_BS is None else documents_at(depth, documents_BS, num_inputs)

    hidden = model.hidden(tokens_BS[:, :num_inputs], documents_BT=documents(0))
    h_BTD = hidden.h_BTD
    layers = [RoutedLayer(routing, documents(0)) for routing in hidden.routing]
    sums = []
    for depth in range(num_depths + 1):
        if depth:
            next_BT = tokens_BS[:, depth : num_inputs + depth]
            hidden = model.mtp_hidden(depth, h_BTD, next_BT, documents_BT=documents(depth))
            h_BTD = hidden.h_BTD
            layers += [RoutedLayer(routing, documents(depth)) for routing in hidden.routing]
        targets_BT = tokens_BS[:, depth + 1 : num_inputs + depth + 1]
        is_target_BT = target_mask(mask_BS, depth, num_inputs, documents_BS)
        sums.append(
            linear_cross_entropy(
                h_BTD.flatten(0, 1), head_VD, targets_BT.flatten(), is_target_BT.flatten()
            )
        )
    cross_entropy_C = torch.stack(sums) * by.mean_C
    loads_LE, balance = _balance(model, layers, tokens_BS.shape[0])
    balance = balance * by.balance
    total = (cross_entropy_C * by.weight_C).sum() + balance
    return LossParts(total, cross_entropy_C.detach(), balance.detach(), loads_LE)


def _balance(
    model: DeepseekV3, layers: list[RoutedLayer], num_sequences: int
) -> tuple[Tensor, Tensor]:
    """(loads_LE, sum over layers and sequences of the sequence-wise balance loss)."""
    num_experts = model.config.n_routed_experts
    loads, losses = [], []
    for routing, documents_BT in layers:
        exists_T = None if documents_BT is None else documents_BT.flatten() > 0
        counts_BE = sequence_loads(routing.experts_TK, num_sequences, num_experts, exists_T)
        losses.append(sequence_balance_loss(routing.scores_TE, counts_BE, exists_T))
        loads.append(counts_BE.sum(0))
    if not loads:
        device = model.lm_head.weight.device
        empty = torch.zeros(0, num_experts, dtype=torch.int64, device=device)
        return empty, torch.zeros((), device=device)
    return torch.stack(loads), torch.stack(losses).sum()


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
