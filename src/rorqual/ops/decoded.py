"""Products with matrices in the bytes of their file, decoded a tile of rows at a time: the plain
twin of every kernel that multiplies the bytes themselves.

Products are float32 and differentiate by their input, as an adapter over a frozen base needs it.
"""

# N rows of x, I columns (inputs) and O rows (outputs) of a matrix, E matrices of a stack, D hidden
# size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.ops.cross_entropy import loss_of_logits, losses_of_logits


class Stack(Protocol):
    """E matrices (O, I) of one kind.

    codes_EOB uint8 are the bytes of the rows; scales_EXY float32 are FP8's, one for each block.
    """

    kind: str
    shape: tuple[int, int, int]
    block: tuple[int, int]
    codes_EOB: Tensor
    scales_EXY: Tensor | None

    def dense(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a matrix, float32 (rows, I)."""
        ...

    def tiles(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        """A matrix in tiles of rows, each decoded when it is wanted."""
        ...


def linear(x: Tensor, stack: Stack, index: int = 0) -> Tensor:
    """x (..., I) -> x W^T (..., O), in x's dtype."""
    y: Tensor = _Product.apply(x, stack, index, False)
    return y


def linear_transposed(x: Tensor, stack: Stack, index: int = 0) -> Tensor:
    """x (..., O) -> x W (..., I), in x's dtype."""
    y: Tensor = _Product.apply(x, stack, index, True)
    return y


def linear_float32(x: Tensor, stack: Stack) -> Tensor:
    return linear(x.float(), stack)


def head_linear(x_NHI: Tensor, stack: Stack) -> Tensor:
    """Each head's rows times that head's matrix: (N, H, I) -> (N, H, O) in x's dtype."""
    heads = enumerate(x_NHI.unbind(1))
    return torch.stack([linear(x_NI, stack, head) for head, x_NI in heads], dim=1)


def grouped_gemm(x_NI: Tensor, stack: Stack, counts_E: Tensor) -> Tensor:
    """As `ops.grouped_gemm.grouped_gemm`; experts without rows are not decoded."""
    rows = enumerate(x_NI.split(counts_E.tolist()))
    outs = [linear(x, stack, expert_id) for expert_id, x in rows if len(x)]
    return torch.cat(outs) if outs else linear(x_NI, stack)


def linear_cross_entropy(
    h_ND: Tensor, stack: Stack, targets_N: Tensor, is_target_N: Tensor
) -> Tensor:
    """As `ops.cross_entropy.linear_cross_entropy`."""
    return loss_of_logits(linear_float32(h_ND, stack), targets_N, is_target_N)


@torch.no_grad()
def token_losses(h_ND: Tensor, stack: Stack, targets_N: Tensor) -> Tensor:
    """As `ops.cross_entropy.token_losses`."""
    return losses_of_logits(linear_float32(h_ND, stack), targets_N)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Stack, index: int, is_transposed: bool) -> Tensor:
        ctx.stack, ctx.index, ctx.is_transposed = stack, index, is_transposed
        return _product(x, stack, index, is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(grad, ctx.stack, ctx.index, not ctx.is_transposed), None, None, None


def _product(x: Tensor, stack: Stack, index: int, is_transposed: bool) -> Tensor:
    wide = x.float()
    _, num_rows, columns = stack.shape
    y = wide.new_zeros(*x.shape[:-1], columns if is_transposed else num_rows)
    for rows, tile in stack.tiles(index):
        if is_transposed:
            y += wide[..., rows] @ tile
        else:
            y[..., rows] = wide @ tile.t()
    return y.to(x.dtype)
