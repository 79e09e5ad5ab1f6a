"""Output head and cross entropy in one operator: the logits never exist all at once.

A block of rows goes through the head, gives its losses, turns into its own gradient in place and is
multiplied back into the gradients of the hidden states and the head, all while it lies in the CPU's
cache. So the gradients are made in the forward pass and nothing of size N x V is kept. It is a
custom operator, opaque to torch.compile. The plain twin is `linear_cross_entropy_plain`.
"""

# N rows, D hidden size, V vocabulary, C rows of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.native import library
from rorqual.ops.native.training import CrossEntropy, rows, run

# Choice: a block of logits of 8 MB in bfloat16 and 16 in float32. A larger one adds up the weight's
# gradient less often; beyond a CPU's last-level cache nothing is won.
BLOCK_ELEMENTS = 1 << 22
BLOCK_ELEMENTS_CUDA = 1 << 28
SERVED = (torch.float32, torch.bfloat16)
"""By the C++ library, which needs no more memory than the logits."""


def losses_of_logits(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row, (N,)."""
    return F.cross_entropy(logits_NV, targets_N, reduction="none")


def loss_of_logits(logits_NV: Tensor, targets_N: Tensor, is_target_N: Tensor) -> Tensor:
    """Their sum over the rows marked in `is_target_N`."""
    return (losses_of_logits(logits_NV, targets_N) * is_target_N).sum()


def linear_cross_entropy_plain(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, is_target_N: Tensor
) -> Tensor:
    """The twin: from all logits at once."""
    logits_NV = F.linear(h_ND, weight_VD.to(h_ND.dtype)).float()
    return loss_of_logits(logits_NV, targets_N, is_target_N)


def linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, is_target_N: Tensor
) -> Tensor:
    """Sum of the marked rows' cross entropy, a float32 scalar; differentiable in h and weight.

    Args: h (N, D), weight (V, D), targets (N,) int64, is_target (N,) bool. Unmarked rows cost
    nothing. The products are of h's dtype; softmax and sum are float32 always.
    """
    total, _, _ = _loss_and_gradients(h_ND, weight_VD, targets_N, is_target_N)
    return total


@torch.no_grad()
def token_losses_plain(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The twin: from all logits at once."""
    return losses_of_logits(F.linear(h_ND, weight_VD).float(), targets_N)


@torch.no_grad()
def token_losses(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Each row's cross entropy, (N,) float32, without gradients: for validation."""
    losses = [
        F.cross_entropy(F.linear(h, weight_VD).float(), targets, reduction="none")
        for h, targets in _blocks(weight_VD, h_ND, targets_N)
    ]
    return torch.cat(losses) if losses else h_ND.new_zeros(0, dtype=torch.float32)


@torch.library.custom_op("rorqual::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, is_target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, its gradient in h, its gradient in weight)."""
    if not h_ND.is_cpu:
        return _all_rows(h_ND, weight_VD, targets_N, is_target_N)
    rows = is_target_N.nonzero().squeeze(1)
    if rows.numel() == h_ND.shape[0]:
        return _all_rows(h_ND, weight_VD, targets_N, None)
    chosen = h_ND.index_select(0, rows), targets_N.index_select(0, rows)
    total, grad_h, grad_weight_VD = _all_rows(chosen[0], weight_VD, chosen[1], None)
    grad_h_ND = torch.zeros_like(h_ND, memory_format=torch.contiguous_format)
    return total, grad_h_ND.index_copy_(0, rows, grad_h), grad_weight_VD


def _all_rows(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, is_target_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss_and_gradients` of every row. With `is_target_N` unmarked rows are computed too and
    count zero: on a GPU that is cheaper than to wait for their number.
    """
    h_chosen, narrow_VD = h_ND.contiguous(), weight_VD.to(h_ND.dtype)
    grad_h = torch.empty_like(h_chosen)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
    start = 0
    marks_N = targets_N if is_target_N is None else is_target_N
    for h_CD, targets_C, marks_C in _blocks(weight_VD, h_chosen, targets_N, marks_N):
        logits_CV = torch.mm(h_CD, narrow_VD.t())
        losses_C, grad_CV = _softmax_gradient(logits_CV, targets_C)
        if is_target_N is not None:
            losses_C = losses_C.masked_fill(~marks_C, 0.0)
            grad_CV.masked_fill_(~marks_C[:, None], 0.0)
        total += losses_C.sum()
        torch.mm(grad_CV, narrow_VD, out=grad_h[start : start + len(targets_C)])
        if grad_CV.dtype == torch.float32:
            grad_weight_VD.addmm_(grad_CV.t(), h_CD)
        else:
            grad_weight_VD += torch.mm(grad_CV.t(), h_CD)
        start += len(targets_C)
    return total, grad_h, grad_weight_VD.to(weight_VD.dtype)


@_loss_and_gradients.register_fake
def _(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, is_target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    total = h_ND.new_empty((), dtype=torch.float32)
    return total, h_ND.new_empty(h_ND.shape), weight_VD.new_empty(weight_VD.shape)


def _keep_gradients(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_h_ND, grad_weight_VD = output
    ctx.mark_non_differentiable(grad_h_ND, grad_weight_VD)
    ctx.save_for_backward(grad_h_ND, grad_weight_VD)


def _backward(
    ctx: Any, grad_total: Tensor, _grad_h: Tensor, _grad_weight: Tensor
) -> tuple[Tensor, Tensor, None, None]:
    grad_h_ND, grad_weight_VD = ctx.saved_tensors
    return (
        grad_h_ND * grad_total.to(grad_h_ND.dtype),
        grad_weight_VD * grad_total.to(grad_weight_VD.dtype),
        None,
        None,
    )


_loss_and_gradients.register_autograd(_backward, setup_context=_keep_gradients)


def _softmax_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(losses_C float32, softmax - one-hot in the logits' dtype); it may take their place."""
    if logits_CV.is_cpu and logits_CV.dtype in SERVED and library() is not None:
        losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
        targets_C = targets_C.contiguous()
        arguments = CrossEntropy(
            rows(logits_CV), targets_C.data_ptr(), None, losses_C.data_ptr(), logits_CV.shape[1]
        )
        run("cross_entropy", arguments, len(losses_C))
        return losses_C, logits_CV
    losses_C, grad_CV = softmax_gradient_plain(logits_CV.float(), targets_C)
    return losses_C, grad_CV.to(logits_CV.dtype)


def softmax_gradient_plain(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The twin: one exponential an element.

    log sum exp = max(logits) - log(max(softmax)), which cannot underflow: the maximum of a softmax
    is at least 1/V.
    """
    probs_CV = logits_CV.softmax(dim=-1)
    logsumexp_C = logits_CV.amax(dim=-1) - probs_CV.amax(dim=-1).log()
    index_C1 = targets_C[:, None]
    losses_C = logsumexp_C - logits_CV.gather(1, index_C1).squeeze(1)
    probs_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=probs_CV.dtype))
    return losses_C, probs_CV


def _blocks(weight_VD: Tensor, *by_row: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in pieces of rows whose logits fit a block."""
    limit = BLOCK_ELEMENTS if weight_VD.is_cpu else BLOCK_ELEMENTS_CUDA
    num_rows = max(64, limit // weight_VD.shape[0])
    if len(by_row[0]):
        yield from zip(*[tensor.split(num_rows) for tensor in by_row], strict=True)
