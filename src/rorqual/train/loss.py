"""The training loss: main + lambda/D * sum_k MTP_k + alpha * sequence-wise balance (§2.1.2, §2.2).

The balance loss arises in the layers (`model/balance.py`); here are the others. Each cross
entropy is a mean over its own valid targets of the *whole batch*: a micro-batch gives
its sums times coefficients that are known before the first one runs, so accumulated gradients are
those of one large batch. All sums are float32.
"""

# B sequences, T inputs, S = T + 1 + depths tokens of a sample, D hidden size, C = 1 + depths,
# L sparse layers, E experts

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rorqual.model import DeepseekV3
from rorqual.model.mtp import documents_at
from rorqual.ops.kernels import for_training


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
    """A micro-batch's share of the batch's loss. `total` carries the gradient of main model and
    MTP; `cross_entropy_C` (means of the main model, then each depth) is for the record, as are the
    figures that a stage's root names in `metric_names`. The balance loss adds its gradient in the
    layers, where `balance_seen` finds what it was.
    """

    total: Tensor
    cross_entropy_C: Tensor
    metrics_M: Tensor | None = None


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


class TrainingModel(nn.Module):
    """forward(tokens_BS, documents_BS, mask_BS, by) -> LossParts: body, MTP modules, head and loss.

    Tokens (B, T + 1 + depths) int64, where `mask_BS` (bool) marks valid targets. With
    `documents_BS`, numbers of packed documents from 1 and 0 for padding, none of them sees another
    (§5.1), and what exists in none counts neither in the loss nor in the balance.

    Call `total.backward()` itself, once and unscaled: the layers' balance losses take no part in
    a factor. What scales a loss is in the coefficients.

    This is what FSDP wraps and what a pipeline cuts: every stage is given all of these by name, and
    by position `x_BTD` alone, the hidden states of the stage before. A stage whose model has no
    head returns its own. Without `is_fused` layers compute by the operators of an answer.
    """

    metric_names: tuple[str, ...] = ()

    def __init__(self, model: DeepseekV3, *, is_fused: bool = True) -> None:
        super().__init__()
        self.model = model
        self.kernels = for_training() if is_fused else None

    def forward(
        self,
        x_BTD: Tensor | None = None,
        *,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        mask_BS: Tensor,
        by: Coefficients,
    ) -> LossParts | Tensor:
        num_depths = by.mean_C.numel() - 1
        num_inputs = tokens_BS.shape[1] - 1 - num_depths
        steps = []
        for depth in range(num_depths + 1):
            documents_BT = None
            if documents_BS is not None:
                documents_BT = documents_at(depth, documents_BS, num_inputs)
            inputs_BT = tokens_BS[:, depth : num_inputs + depth]
            steps.append(
                self.model.model.step(
                    inputs_BT, documents_BT, balance=by.balance, training=self.kernels
                )
            )
        x = tokens_BS[:, :num_inputs] if x_BTD is None else x_BTD
        h_BTD = self.model.hidden(x, steps[0])
        if self.model.lm_head is None:
            return h_BTD
        sums = []
        for depth, step in enumerate(steps):
            if depth:
                next_BT = tokens_BS[:, depth : num_inputs + depth]
                h_BTD = self.model.mtp_hidden(depth, h_BTD, next_BT, step)
            targets_BT = tokens_BS[:, depth + 1 : num_inputs + depth + 1]
            is_target_BT = target_mask(mask_BS, depth, num_inputs, documents_BS)
            sums.append(
                self.model.lm_head(
                    h_BTD.flatten(0, 1), targets_BT.flatten(), is_target_BT.flatten()
                )
            )
        cross_entropy_C = torch.stack(sums) * by.mean_C
        return LossParts((cross_entropy_C * by.weight_C).sum(), cross_entropy_C.detach())


class BalanceSeen(NamedTuple):
    """What the layers' backward passes saw: `loads_LE` int64 counts the (token, choice) pairs of
    each expert in each sparse layer, `loss` sums the balance losses, before their coefficient.
    """

    loads_LE: Tensor
    loss: Tensor


def balance_seen(model: DeepseekV3) -> BalanceSeen:
    """What they saw since the last call; resets their counters."""
    layers = [layer.balance for layer in model.sparse_layers()]
    if not layers:
        num_experts = model.config.n_routed_experts
        none = torch.zeros(0, num_experts, dtype=torch.int64, device=model.device)
        return BalanceSeen(none, torch.zeros((), device=model.device))
    seen = BalanceSeen(
        torch.stack([layer.loads_E for layer in layers]),
        torch.stack([layer.loss for layer in layers]).sum(),
    )
    for layer in layers:
        layer.reset()
    return seen
