"""The router's choice in a training step: scores, groups, the best experts and their weights in one
pass over a token's logits, and its gradient. The twin is `Router.choice` (`model/router.py`).
"""

# T tokens, E experts, K experts per token, G groups

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.training import Route, address, run


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    groups: list[int],
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights_TK float32, experts_TK int64, scores_TE float32), highest score first.

    `groups`: their number, how many are kept, how many scores make a group's; none: [].
    """
    weights_TK, experts_TK, scores_TE = _route(
        logits_TE, bias_E, num_chosen, groups, is_softmax, is_normalised, scale
    )
    return weights_TK, experts_TK, scores_TE


def _struct(
    num_experts: int,
    num_chosen: int,
    groups: list[int],
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> Route:
    made = Route(
        num_experts=num_experts,
        num_chosen=num_chosen,
        is_softmax=is_softmax,
        is_normalised=is_normalised,
        scale=scale,
    )
    if groups:
        made.num_groups, made.kept_groups, made.best_of_group = groups
    return made


@torch.library.custom_op("rorqual::train_route", mutates_args=())
def _route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    groups: list[int],
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_tokens, num_chosen)
    experts_TK = logits_TE.new_empty(num_tokens, num_chosen, dtype=torch.int64)
    scores_TE = torch.empty_like(logits_TE)
    arguments = _struct(num_experts, num_chosen, groups, is_softmax, is_normalised, scale)
    arguments.logits, arguments.bias = logits_TE.data_ptr(), address(bias_E)
    arguments.weights, arguments.experts = weights_TK.data_ptr(), experts_TK.data_ptr()
    arguments.scores = scores_TE.data_ptr()
    run("route", arguments, num_tokens)
    return weights_TK, experts_TK, scores_TE


@_route.register_fake
def _(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    groups: list[int],
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits_TE.shape[0], num_chosen
    return (
        logits_TE.new_empty(shape),
        logits_TE.new_empty(shape, dtype=torch.int64),
        logits_TE.new_empty(logits_TE.shape),
    )


@torch.library.custom_op("rorqual::train_route_grad", mutates_args=())
def _grad(
    dweights_TK: Tensor,
    dscores_TE: Tensor | None,
    experts_TK: Tensor,
    scores_TE: Tensor,
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> Tensor:
    num_tokens, num_experts = scores_TE.shape
    dweights_TK = dweights_TK.contiguous()
    dscores_TE = None if dscores_TE is None else dscores_TE.contiguous()
    dlogits_TE = torch.empty_like(scores_TE)
    num_chosen = experts_TK.shape[1]
    arguments = _struct(num_experts, num_chosen, [], is_softmax, is_normalised, scale)
    arguments.dweights, arguments.dscores = dweights_TK.data_ptr(), address(dscores_TE)
    arguments.experts, arguments.scores = experts_TK.data_ptr(), scores_TE.data_ptr()
    arguments.dlogits = dlogits_TE.data_ptr()
    run("route_grad", arguments, num_tokens)
    return dlogits_TE


@_grad.register_fake
def _(
    dweights_TK: Tensor,
    dscores_TE: Tensor | None,
    experts_TK: Tensor,
    scores_TE: Tensor,
    is_softmax: bool,
    is_normalised: bool,
    scale: float,
) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], output[2])


def _backward(
    ctx: Any, dweights_TK: Tensor | None, _: Any, dscores_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    experts_TK, scores_TE = ctx.saved_tensors
    if dweights_TK is None:
        dweights_TK = scores_TE.new_zeros(experts_TK.shape)
    return _grad(dweights_TK, dscores_TE, experts_TK, scores_TE, *ctx.options), *(None,) * 6


_route.register_autograd(_backward, setup_context=_keep)
