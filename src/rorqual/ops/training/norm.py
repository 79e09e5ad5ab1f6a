"""RMSNorm in a training step: with the residual's sum before it, and rounded to what is multiplied
next, in one pass over a row; the backward pass adds the residual's gradient in one more.
"""

# N rows, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.ops.native.training import NORM_ROWS, Norm, NormGrad, address, rows, run
from rorqual.ops.rms_norm import rms_norm_plain


def norm(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D) / rms(x) * weight in `dtype`; rows of float32 or bfloat16 may lie apart."""
    _, y_ND, _, _ = _norm(x_ND, None, weight_D, eps, dtype, False)
    return y_ND


def add_norm(
    x_ND: Tensor, more_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + more, its norm in float32, its norm in `dtype`) of a residual stream x in float32."""
    total_ND, y_ND, narrow_ND, _ = _norm(
        x_ND, more_ND, weight_D, eps, torch.float32, dtype != torch.float32
    )
    return total_ND, y_ND, y_ND if dtype == torch.float32 else narrow_ND


def norm_plain(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The twin: its formula."""
    return rms_norm_plain(x_ND.to(weight_D.dtype), weight_D, eps).to(dtype)


def add_norm_plain(
    x_ND: Tensor, more_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total_ND = x_ND + more_ND
    y_ND = rms_norm_plain(total_ND, weight_D, eps)
    return total_ND, y_ND, y_ND.to(dtype)


@torch.library.custom_op("rorqual::train_norm", mutates_args=())
def _norm(
    x_ND: Tensor,
    more_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    is_narrow_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + more or nothing, the norm, it in bfloat16 or nothing, 1 / rms of each row)."""
    shape = x_ND.shape
    total_ND = x_ND.new_empty(shape if more_ND is not None else 0, dtype=torch.float32)
    y_ND = x_ND.new_empty(shape, dtype=dtype)
    narrow_ND = x_ND.new_empty(shape if is_narrow_too else 0, dtype=torch.bfloat16)
    inverse_N = x_ND.new_empty(shape[:-1], dtype=torch.float32)
    weight_D = weight_D.contiguous()
    given = [None if x is None else _whole(x) for x in (x_ND, more_ND)]  # held until it has run
    run(
        "norm",
        Norm(
            *map(rows, given),
            rows(None if more_ND is None else _whole(total_ND)),
            rows(_whole(y_ND)),
            rows(_whole(narrow_ND) if is_narrow_too else None),
            weight_D.data_ptr(),
            inverse_N.data_ptr(),
            shape[-1],
            eps,
        ),
        inverse_N.numel(),
    )
    return total_ND, y_ND, narrow_ND, inverse_N


@_norm.register_fake
def _(
    x_ND: Tensor,
    more_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    is_narrow_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = x_ND.shape
    return (
        x_ND.new_empty(shape if more_ND is not None else (0,), dtype=torch.float32),
        x_ND.new_empty(shape, dtype=dtype),
        x_ND.new_empty(shape if is_narrow_too else (0,), dtype=torch.bfloat16),
        x_ND.new_empty(shape[:-1], dtype=torch.float32),
    )


@torch.library.custom_op("rorqual::train_norm_grad", mutates_args=())
def _norm_grad(
    dtotal_ND: Tensor | None,
    dy_ND: Tensor | None,
    dnarrow_ND: Tensor | None,
    x_ND: Tensor,
    weight_D: Tensor,
    inverse_N: Tensor,
) -> tuple[Tensor, Tensor]:
    num_rows, width = inverse_N.numel(), x_ND.shape[-1]
    num_items = -(-num_rows // NORM_ROWS)
    dx_ND = x_ND.new_empty(x_ND.shape)
    parts_XD = x_ND.new_empty(num_items, width, dtype=torch.float32)
    weight_D = weight_D.contiguous()
    four = dy_ND, dnarrow_ND, dtotal_ND, x_ND
    given = [None if d is None else _whole(d) for d in four]  # held until it has run
    run(
        "norm_grad",
        NormGrad(
            *map(rows, given),
            rows(_whole(dx_ND)),
            weight_D.data_ptr(),
            address(inverse_N),
            parts_XD.data_ptr(),
            width,
            num_rows,
        ),
        num_items,
    )
    return dx_ND, parts_XD.sum(0)


@_norm_grad.register_fake
def _(
    dtotal_ND: Tensor | None,
    dy_ND: Tensor | None,
    dnarrow_ND: Tensor | None,
    x_ND: Tensor,
    weight_D: Tensor,
    inverse_N: Tensor,
) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), weight_D.new_empty(weight_D.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_ND, more_ND, weight_D, _, _, _ = inputs
    total_ND, _, _, inverse_N = output
    ctx.set_materialize_grads(False)
    ctx.has_more = more_ND is not None
    ctx.more_dtype = None if more_ND is None else more_ND.dtype
    ctx.mark_non_differentiable(inverse_N)
    ctx.save_for_backward(total_ND if ctx.has_more else x_ND, weight_D, inverse_N)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dtotal_ND, dy_ND, dnarrow_ND, _ = grads
    x_ND, weight_D, inverse_N = ctx.saved_tensors
    if not ctx.has_more:
        dtotal_ND = None
    dx_ND, dweight_D = _norm_grad(dtotal_ND, dy_ND, dnarrow_ND, x_ND, weight_D, inverse_N)
    dmore_ND = dx_ND.to(ctx.more_dtype) if ctx.has_more else None
    return dx_ND, dmore_ND, dweight_D, None, None, None


_norm.register_autograd(_backward, setup_context=_keep)


def _whole(x_ND: Tensor) -> Tensor:
    """As a matrix: its rows may lie apart, the values of a row may not."""
    x_ND = x_ND.flatten(0, -2)
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
