"""Grouped GEMM: each expert's rows times that expert's matrix, in one call.

Where a gradient may be wanted it is a custom operator, which torch.compile treats as one opaque
node: on CPU the built-in `F.grouped_mm` cannot be compiled in float32. Its plain twin is
`grouped_gemm_plain`, a loop over the experts.

On a GPU `F.grouped_mm` takes the counts from the device. Choice: in float32, for which it has no
kernel, we loop over the experts as on the CPU, so each product waits for the counts to reach the
host. Padding every expert to the largest possible count would take E / K times the work, and who
asks for float32 on a GPU asks for exactness.
"""

# N rows sorted by expert, E experts, I inputs, O outputs

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm_plain(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """The twin: rows of expert e are the next counts_E[e] rows of x; returns y_NO in x's dtype."""
    rows = x_NI.split(counts_E.tolist())
    return torch.cat(
        [F.linear(part, weight) for part, weight in zip(rows, weight_EOI, strict=True)]
    )


def grouped_gemm(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """y_NO = x_NI @ weight_EOI[e].T for the counts_E[e] rows of each expert e, in order.

    Args: x (N, I) and weight (E, O, I) of one floating dtype, counts (E,) int64 with sum N.
    Returns: (N, O). Differentiable in x and weight.
    """
    # An operator's first call imports torch's compiler, a second or two; answers need neither.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or counts_E.is_meta:
        return _forward_op(x_NI, weight_EOI, counts_E)
    return _multiply(x_NI, weight_EOI, counts_E, transposed=True)


@torch.library.custom_op("rorqual::grouped_gemm", mutates_args=())
def _forward_op(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return _multiply(x_NI, weight_EOI, counts_E, transposed=True)


@_forward_op.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("rorqual::grouped_gemm_backward", mutates_args=())
def _backward_op(
    grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    """dgrad and wgrad of `grouped_gemm`."""
    grad_NO = grad_NO.contiguous()
    grad_x_NI = _multiply(grad_NO, weight_EOI, counts_E, transposed=False)
    return grad_x_NI, _weight_gradient(grad_NO, x_NI, weight_EOI, counts_E)


@_backward_op.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NI), torch.empty_like(weight_EOI)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_backward_op(grad_NO, *ctx.saved_tensors), None)


_forward_op.register_autograd(_backward, setup_context=_keep_inputs)


def _has_kernel(x_NI: Tensor, weight_EOI: Tensor) -> bool:
    """Does `F.grouped_mm` run on the device alone? It wants bfloat16 rows of whole 16 bytes."""
    is_aligned = all(width % 8 == 0 for width in weight_EOI.shape[1:])
    return not x_NI.is_cpu and x_NI.dtype is torch.bfloat16 and is_aligned


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _multiply(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, *, transposed: bool) -> Tensor:
    weight = weight_EOI.transpose(1, 2) if transposed else weight_EOI
    if _has_kernel(x_NI, weight_EOI):
        return F.grouped_mm(x_NI, weight, offs=_offsets(counts_E))
    y = x_NI.new_empty(x_NI.shape[0], weight.shape[2])
    start = 0
    for expert_id, count in enumerate(counts_E.tolist()):
        if count:
            torch.mm(x_NI[start : start + count], weight[expert_id], out=y[start : start + count])
        start += count
    return y


def _weight_gradient(grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    if _has_kernel(x_NI, weight_EOI):
        return F.grouped_mm(grad_NO.t(), x_NI, offs=_offsets(counts_E))
    gradient_EOI = torch.empty_like(weight_EOI)
    start = 0
    for expert_id, count in enumerate(counts_E.tolist()):
        stop = start + count
        if count:
            torch.mm(grad_NO[start:stop].t(), x_NI[start:stop], out=gradient_EOI[expert_id])
        else:
            gradient_EOI[expert_id].zero_()
        start = stop
    return gradient_EOI
