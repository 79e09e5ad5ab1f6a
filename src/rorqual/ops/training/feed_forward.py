"""SwiGLU networks in a training step, dense and routed: kept for the backward pass are the input,
gate and up alone.

Routed experts go one after the other: its rows are gathered, multiplied, and added to their tokens
while they lie in the CPU's cache. The gate value g scales the narrow inner vector, g W h = W (g h).
"""

# T tokens, D hidden size, I inner width, E experts, K experts per token, N = T*K rows

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.native.training import Move, Sort, Swiglu, SwigluGrad, address, rows, run


def feed_forward_plain(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """The twin of `feed_forward`."""
    gate_TI, up_TI = (F.linear(x_TD, weight.to(x_TD.dtype)) for weight in (gate_ID, up_ID))
    return F.linear(F.silu(gate_TI) * up_TI, down_DI.to(x_TD.dtype))


def routed_plain(
    x_TD: Tensor,
    base_TD: Tensor | None,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
) -> Tensor:
    """The twin of `routed`: each token through each of its experts."""
    wide = weights_TK.dtype
    out_TD = x_TD.new_zeros(x_TD.shape, dtype=wide) if base_TD is None else base_TD.to(wide)
    for expert, (gate_up_JD, down_DI) in enumerate(zip(gate_up_EJD, down_EDI, strict=True)):
        by_T = (weights_TK * (experts_TK == expert)).sum(1)
        gate, up = F.linear(x_TD, gate_up_JD.to(x_TD.dtype)).chunk(2, dim=-1)
        inner = F.silu(gate) * up * by_T[:, None].to(x_TD.dtype)
        out_TD = out_TD + F.linear(inner, down_DI.to(x_TD.dtype))
    return out_TD


def feed_forward(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) in x's dtype; weights are float32, their gradients too."""
    return _forward(x_TD, gate_ID, up_ID, down_DI)[0]


def routed(
    x_TD: Tensor,
    base_TD: Tensor | None,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
) -> Tensor:
    """base + sum over a token's experts, float32; the products are of x's dtype."""
    return _routed(x_TD, base_TD, weights_TK, experts_TK, gate_up_EJD, down_EDI)[0]


@torch.library.custom_op("rorqual::train_feed_forward", mutates_args=())
def _forward(
    x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, gate, up)."""
    x_TD = x_TD.contiguous()
    gate_TI = torch.mm(x_TD, gate_ID.to(x_TD.dtype).t())
    up_TI = torch.mm(x_TD, up_ID.to(x_TD.dtype).t())
    inner_TI = torch.empty_like(gate_TI)
    width = gate_TI.shape[1]
    run("swiglu", Swiglu(rows(gate_TI), rows(up_TI), rows(inner_TI), None, width), len(gate_TI))
    return torch.mm(inner_TI, down_DI.to(x_TD.dtype).t()), gate_TI, up_TI


@_forward.register_fake
def _(
    x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inner = x_TD.shape[0], gate_ID.shape[0]
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(inner), x_TD.new_empty(inner)


@torch.library.custom_op("rorqual::train_feed_forward_grad", mutates_args=())
def _grad(
    dout_TD: Tensor,
    x_TD: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    gate_ID: Tensor,
    up_ID: Tensor,
    down_DI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x_TD.dtype
    dout_TD, x_TD = dout_TD.to(dtype).contiguous(), x_TD.contiguous()
    dinner_TI = torch.mm(dout_TD, down_DI.to(dtype))
    inner_TI, dgate_TI = torch.empty_like(gate_TI), torch.empty_like(gate_TI)
    dup_TI = dinner_TI  # a value is read before its place is written
    run(
        "swiglu_grad",
        SwigluGrad(
            *map(rows, (gate_TI, up_TI, dinner_TI, dgate_TI, dup_TI, inner_TI)),
            None,
            None,
            gate_TI.shape[1],
        ),
        len(gate_TI),
    )
    ddown_DI = torch.mm(dout_TD.t(), inner_TI).to(down_DI.dtype)
    dgate_ID = torch.mm(dgate_TI.t(), x_TD).to(gate_ID.dtype)
    dup_ID = torch.mm(dup_TI.t(), x_TD).to(up_ID.dtype)
    dx_TD = torch.mm(dgate_TI, gate_ID.to(dtype))
    dx_TD.addmm_(dup_TI, up_ID.to(dtype))
    return dx_TD, dgate_ID, dup_ID, ddown_DI


@_grad.register_fake
def _(
    dout_TD: Tensor,
    x_TD: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    gate_ID: Tensor,
    up_ID: Tensor,
    down_DI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = x_TD, gate_ID, up_ID, down_DI
    dx, dgate, dup, ddown = (tensor.new_empty(tensor.shape) for tensor in given)
    return dx, dgate, dup, ddown


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gate_ID, up_ID, down_DI = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, *output[1:], gate_ID, up_ID, down_DI)


def _backward(ctx: Any, dout_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout_TD is None:
        return None, None, None, None
    return _grad(dout_TD, *ctx.saved_tensors)


_forward.register_autograd(_backward, setup_context=_keep)


def _num_rows(experts_TK: Tensor, num_experts: int, dtype: torch.dtype) -> int:
    """Of all experts, each with whole blocks of rows: as many as there can be."""
    return experts_TK.numel() + num_experts * (_whole(experts_TK, num_experts, dtype) - 1)


def _whole(experts_TK: Tensor, num_experts: int, dtype: torch.dtype) -> int:
    """Choice: torch's products of bfloat16 are compiled for each number of rows, so experts are
    given a multiple of this, with rows of zeros.
    """
    if dtype == torch.float32:
        return 1
    return 32 if experts_TK.numel() >= 128 * num_experts else 8


def _sorted(experts_TK: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs by expert, -1 for rows of zeros, and how many rows each expert has."""
    order_N = experts_TK.new_full((_num_rows(experts_TK, num_experts, dtype),), -1)
    counts_E = experts_TK.new_empty(num_experts)
    addresses = (tensor.data_ptr() for tensor in (experts_TK, order_N, counts_E))
    whole = _whole(experts_TK, num_experts, dtype)
    run("sort", Sort(*addresses, experts_TK.numel(), num_experts, whole), 1)
    return order_N, counts_E


def _narrowed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


def _by_expert(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


@torch.library.custom_op("rorqual::train_routed", mutates_args=())
def _routed(
    x_TD: Tensor,
    base_TD: Tensor | None,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, gate and up of each row, the pair of each row, rows of each expert, and the matrices
    rounded to x's dtype, or nothing where they are of it).
    """
    x_TD, experts_TK = x_TD.contiguous(), experts_TK.contiguous()
    num_choices, dtype = experts_TK.shape[1], x_TD.dtype
    if base_TD is None:
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    else:
        out_TD = base_TD.to(torch.float32, copy=True)
    narrow_EJD, narrow_EDI = _narrowed(gate_up_EJD, dtype), _narrowed(down_EDI, dtype)
    order_N, counts_E = _sorted(experts_TK, gate_up_EJD.shape[0], dtype)
    weights_N = weights_TK.flatten()[order_N]
    width = gate_up_EJD.shape[1] // 2
    gate_up_NJ = x_TD.new_empty(len(order_N), 2 * width)
    for expert, place in _by_expert(counts_E):
        gate_up_ND, by_N, index_N = gate_up_NJ[place], weights_N[place], order_N[place]
        x_ND = _gathered(x_TD, index_N, num_choices)
        torch.mm(x_ND, narrow_EJD[expert].t(), out=gate_up_ND)
        inner_NI = x_ND.new_empty(len(index_N), width)
        gate, up = gate_up_ND[:, :width], gate_up_ND[:, width:]
        swiglu = Swiglu(rows(gate), rows(up), rows(inner_NI), by_N.data_ptr(), width)
        run("swiglu", swiglu, len(index_N))
        torch.mm(inner_NI, narrow_EDI[expert].t(), out=x_ND)
        _scatter(x_ND, out_TD, index_N, num_choices)
    if dtype == gate_up_EJD.dtype:
        narrow_EJD, narrow_EDI = x_TD.new_empty(0), x_TD.new_empty(0)
    return out_TD, gate_up_NJ, order_N, counts_E, narrow_EJD, narrow_EDI


@_routed.register_fake
def _(
    x_TD: Tensor,
    base_TD: Tensor | None,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts = gate_up_EJD.shape[0]
    num_rows = _num_rows(experts_TK, num_experts, x_TD.dtype)
    is_narrow = x_TD.dtype != gate_up_EJD.dtype
    return (
        x_TD.new_empty(x_TD.shape, dtype=torch.float32),
        x_TD.new_empty(num_rows, gate_up_EJD.shape[1]),
        experts_TK.new_empty(num_rows),
        experts_TK.new_empty(num_experts),
        x_TD.new_empty(gate_up_EJD.shape if is_narrow else (0,)),
        x_TD.new_empty(down_EDI.shape if is_narrow else (0,)),
    )


@torch.library.custom_op("rorqual::train_routed_grad", mutates_args=())
def _routed_grad(
    dout_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    gate_up_NJ: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of the gate values and of the experts' matrices."""
    x_TD, dout_TD = x_TD.contiguous(), dout_TD.contiguous()
    num_choices, dtype = weights_TK.shape[1], x_TD.dtype
    dx_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    weights_N = weights_TK.flatten()[order_N]
    dweights_N = torch.empty_like(weights_N)
    dgate_up_EJD = torch.empty_like(gate_up_EJD, dtype=weights_TK.dtype)
    ddown_EDI = torch.empty_like(down_EDI, dtype=weights_TK.dtype)
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        dgate_up_EJD[expert].zero_()
        ddown_EDI[expert].zero_()
    width = gate_up_EJD.shape[1] // 2
    for expert, place in _by_expert(counts_E):
        gate_up_ND, index_N = gate_up_NJ[place], order_N[place]
        x_ND = _gathered(x_TD, index_N, num_choices)
        dout_ND = _gathered(dout_TD, index_N, num_choices, dtype)
        dinner_NI = torch.mm(dout_ND, down_EDI[expert])
        inner_NI, dgate_up_NJ = torch.empty_like(dinner_NI), torch.empty_like(gate_up_ND)
        halves = [
            half
            for both in (gate_up_ND, dgate_up_NJ)
            for half in (both[:, :width], both[:, width:])
        ]
        gate, up, dgate, dup = map(rows, halves)
        grad = SwigluGrad(
            gate, up, rows(dinner_NI), dgate, dup, rows(inner_NI),
            address(weights_N[place]), address(dweights_N[place]), width,
        )  # fmt: skip
        run("swiglu_grad", grad, len(index_N))
        _product(dout_ND.t(), inner_NI, ddown_EDI[expert])
        _product(dgate_up_NJ.t(), x_ND, dgate_up_EJD[expert])
        torch.mm(dgate_up_NJ, gate_up_EJD[expert], out=x_ND)
        _scatter(x_ND, dx_TD, index_N, num_choices)
    dweights = weights_TK.new_empty(weights_TK.numel() + 1)
    dweights[order_N] = dweights_N  # that of no pair goes to the last place
    dweights_TK = dweights[:-1].clone().view_as(weights_TK)
    return dx_TD.to(dtype), dweights_TK, dgate_up_EJD, ddown_EDI


@_routed_grad.register_fake
def _(
    dout_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    gate_up_NJ: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = weights_TK.dtype
    return (
        x_TD.new_empty(x_TD.shape),
        weights_TK.new_empty(weights_TK.shape),
        gate_up_EJD.new_empty(gate_up_EJD.shape, dtype=wide),
        down_EDI.new_empty(down_EDI.shape, dtype=wide),
    )


def _keep_routed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, base_TD, weights_TK, _, gate_up_EJD, down_EDI = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.base_dtype = None if base_TD is None else base_TD.dtype
    narrow = output[4:]
    matrices = narrow if narrow[0].numel() else (gate_up_EJD, down_EDI)
    ctx.save_for_backward(x_TD, weights_TK, *matrices, *output[1:4])


def _backward_routed(ctx: Any, dout_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout_TD is None:
        return (None,) * 6
    dx, dweights, dgate_up, ddown = _routed_grad(dout_TD, *ctx.saved_tensors)
    dbase = None if ctx.base_dtype is None else dout_TD.to(ctx.base_dtype)
    return dx, dbase, dweights, None, dgate_up, ddown


_routed.register_autograd(_backward_routed, setup_context=_keep_routed)


def _gathered(x_TD: Tensor, index_N: Tensor, num: int, dtype: torch.dtype | None = None) -> Tensor:
    """The rows of tokens index // num."""
    x_ND = x_TD.new_empty(len(index_N), x_TD.shape[1], dtype=dtype)
    move = Move(rows(x_TD), rows(x_ND), index_N.data_ptr(), num, x_TD.shape[1])
    run("gather", move, len(index_N))
    return x_ND


def _scatter(x_ND: Tensor, out_TD: Tensor, index_N: Tensor, num: int) -> None:
    move = Move(rows(x_ND), rows(out_TD), index_N.data_ptr(), num, x_ND.shape[1])
    run("scatter", move, len(index_N))


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x y; rounded to their dtype first where that is narrower."""
    if x.dtype == out.dtype:
        torch.mm(x, y, out=out)
    else:
        out.copy_(torch.mm(x, y))
