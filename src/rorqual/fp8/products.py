"""The three products of a linear map with FP8 operands, emulated (report §3.3.2, §3.5.2, Fig. 6).

The operands are E4M3 in their tiles and blocks; the sums are float32, which is what promoting the
partial sums of 128 to float32 is for. What is kept for the backward pass are the bytes of the
operands: an activation in FP8 tiles of 1x128, which are made 128x1 for the weight's gradient, or in
the 12 bits of E5M6; of SwiGLU its two inputs, from which its output is computed again.
"""

# N rows (tokens), D model width, I inner width or inputs, O outputs, E experts

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.fp8.operands import Fp8Options
from rorqual.ops import e5m6
from rorqual.ops.tile_fp8 import Quantised, quantise_rows


def linear(
    x: Tensor, weight_OI: Tensor, options: Fp8Options, *, keeps_e5m6: bool = False
) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype; differentiable in both.

    `keeps_e5m6`: what is kept of x are 12 bits a value, as of the input of the Linear after
    attention, which attention's own backward pass needs as well.
    """
    quantised = options.activation(x)
    y_NO: Tensor = _Linear.apply(x.flatten(0, -2), weight_OI, quantised, options, keeps_e5m6)
    return y_NO.view(*x.shape[:-1], -1)


def feed_forward(
    x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, options: Fp8Options
) -> Tensor:
    """down(silu(gate(x)) * up(x)), x (..., D) -> (..., D) in x's dtype; differentiable in all."""
    x_ND = x.flatten(0, -2)
    counts = torch.full((1,), x_ND.shape[0])
    weights = gate_ID[None], up_ID[None], down_DI[None]
    given = _Given(options.activation(x), counts, options)
    y_ND: Tensor = _Experts.apply(x_ND, *weights, None, given)
    return y_ND.view(x.shape)


def experts(
    rows_ND: Tensor,
    gate_up_E2D: Tensor,
    down_EDI: Tensor,
    weights_N: Tensor,
    counts_E: Tensor,
    options: Fp8Options,
) -> Tensor:
    """Each expert's SwiGLU of its rows, times the row's gate value: (N, D) in the rows' dtype.

    gate_up (E, 2I, D), gate first; down (E, D, I); counts_E int64, rows of each expert in order.
    Differentiable in rows, both stacks and the gate values. A gate value scales the inner vector.
    """
    gate_EID, up_EID = gate_up_E2D.chunk(2, dim=1)  # two matrices, each with blocks of its own
    given = _Given(options.activation(rows_ND), counts_E, options)
    y_ND: Tensor = _Experts.apply(rows_ND, gate_EID, up_EID, down_EDI, weights_N, given)
    return y_ND


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, x: Quantised, options: Fp8Options, is_12: bool
    ) -> Tensor:
        weight = options.matrix(weight_OI)
        kept = e5m6.quantise(x_NI) if is_12 else x
        ctx.save_for_backward(*kept[:2], *weight[:2])
        ctx.forms, ctx.options = ((type(kept), kept[2]), (Quantised, weight.tile)), options
        ctx.dtype = x_NI.dtype
        return (x.dequantise() @ weight.dequantise().T).to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), _ = _kept(ctx)
        options: Fp8Options = ctx.options
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = options.gradient(grad_NO).dequantise() @ weight.dequantise()
            grad_x = grad_x.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad_NO, x.dequantise(), options)
        return grad_x, grad_weight, None, None, None


class _Given(NamedTuple):
    x: Quantised  # the rows
    counts_E: Tensor
    options: Fp8Options


class _Experts(torch.autograd.Function):
    """All that an expert computes, since what is kept of it are SwiGLU's inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        gate_EID: Tensor,
        up_EID: Tensor,
        down_EDI: Tensor,
        weights_N: Tensor | None,
        given: _Given,
    ) -> Tensor:
        x, counts_E, options = given
        stacks = [
            [options.matrix(matrix) for matrix in stack] for stack in (gate_EID, up_EID, down_EDI)
        ]
        rows = x.dequantise()
        gate_NI = _by_expert(rows, counts_E, stacks[0], transposed=True)
        up_NI = _by_expert(rows, counts_E, stacks[1], transposed=True)
        inner_NI = F.silu(gate_NI) * up_NI
        if weights_N is not None:
            inner_NI = inner_NI * weights_N.float()[:, None]
        inner = quantise_rows(inner_NI, use_ue8m0=options.use_ue8m0)
        kept = [quantise_rows(part, use_ue8m0=options.use_ue8m0) for part in (gate_NI, up_NI)]
        parts = [x, *kept, *stacks[0], *stacks[1], *stacks[2]]
        others = (counts_E,) if weights_N is None else (counts_E, weights_N)
        ctx.save_for_backward(*[tensor for part in parts for tensor in part[:2]], *others)
        ctx.forms, ctx.options = [(Quantised, part.tile) for part in parts], options
        ctx.dtype = rows_ND.dtype
        return _by_expert(inner.dequantise(), counts_E, stacks[2], transposed=True).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (x, gate, up, *weights), others = _kept(ctx)
        counts_E, weights_N = others if len(others) == 2 else (others[0], None)
        num, options = len(counts_E), ctx.options
        stacks = weights[:num], weights[num : 2 * num], weights[2 * num :]
        gate_NI, up_NI = gate.dequantise(), up.dequantise()
        sigmoid_NI = gate_NI.sigmoid()
        silu_NI = gate_NI * sigmoid_NI
        factor = 1.0 if weights_N is None else weights_N.float()[:, None]
        grad_weights = grad_gate = grad_up = grad_down = None
        if ctx.needs_input_grad[3]:
            inner_NI = silu_NI * up_NI * factor
            grad_down = _weight_gradients(grad_ND, inner_NI, counts_E, options)
        grad_inner = _by_expert(options.gradient(grad_ND).dequantise(), counts_E, stacks[2])
        if weights_N is not None and ctx.needs_input_grad[4]:
            grad_weights = (grad_inner * silu_NI * up_NI).sum(1).to(weights_N.dtype)
        grad_inner = grad_inner * factor
        grad_gate_NI = grad_inner * up_NI * sigmoid_NI * (1 + gate_NI * (1 - sigmoid_NI))
        grad_up_NI = grad_inner * silu_NI
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            rows = x.dequantise()
            grad_gate = _weight_gradients(grad_gate_NI, rows, counts_E, options)
            grad_up = _weight_gradients(grad_up_NI, rows, counts_E, options)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            by_gate = options.gradient(grad_gate_NI).dequantise()
            by_up = options.gradient(grad_up_NI).dequantise()
            grad_rows = _by_expert(by_gate, counts_E, stacks[0])
            grad_rows = (grad_rows + _by_expert(by_up, counts_E, stacks[1])).to(ctx.dtype)
        return grad_rows, grad_gate, grad_up, grad_down, grad_weights, None


def _by_expert(
    rows: Tensor, counts_E: Tensor, weights: Sequence[Quantised], *, transposed: bool = False
) -> Tensor:
    """Each expert's rows times its matrix, or times that transposed."""
    parts = []
    for part, weight in zip(rows.split(counts_E.tolist()), weights, strict=True):
        matrix = weight.dequantise()
        parts.append(part @ (matrix.T if transposed else matrix))
    return torch.cat(parts)


def _weight_gradient(grad_NO: Tensor, x_NI: Tensor, options: Fp8Options) -> Tensor:
    return options.along_tokens(grad_NO).T @ options.along_tokens(x_NI)


def _weight_gradients(
    grad_NO: Tensor, x_NI: Tensor, counts_E: Tensor, options: Fp8Options
) -> Tensor:
    """(E, O, I) float32; an expert's rows begin a tile of their own."""
    counts = counts_E.tolist()
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(
        options.along_tokens(grad_NO, counts_E).split(counts),
        options.along_tokens(x_NI, counts_E).split(counts),
        strict=True,
    )
    return torch.stack([grad.T @ x for grad, x in pairs])


def _kept(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """What the forward pass kept, in the forms that it had, and the tensors behind it."""
    saved = ctx.saved_tensors
    parts = [form(saved[2 * i], saved[2 * i + 1], rest) for i, (form, rest) in enumerate(ctx.forms)]
    return parts, saved[2 * len(ctx.forms) :]
