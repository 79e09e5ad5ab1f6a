"""A kernel that knows nothing of gradients, differentiated by its plain twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Operation = Callable[..., Tensor]


def by_kernel(kernel: Operation, twin: Operation, *inputs: Tensor) -> Tensor:
    """`kernel(*inputs)`; in a backward pass the twin is computed and differentiated instead.

    The inputs are kept for it, nothing else is.
    """
    # Where no gradient can be wanted the detour would cost microseconds.
    if not torch.is_grad_enabled() or inputs[0].is_inference():
        return kernel(*inputs)
    y: Tensor = _ByKernel.apply(kernel, twin, *inputs)
    return y


class _ByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Operation, twin: Operation, *inputs: Tensor) -> Tensor:
        ctx.twin = twin
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            tensor.detach().requires_grad_(is_needed)
            for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            y = ctx.twin(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, grad))
        return (None, None, *[next(gradients) if is_needed else None for is_needed in needed])
