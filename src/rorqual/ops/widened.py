"""Products with bfloat16 weights on processors without bfloat16 arithmetic (AVX2 and older), where
torch multiplies bfloat16 at a tenth of float32's speed or less.

Weights stay bfloat16 in memory and are widened a tile at a time for float32 GEMM; sums are float32.
Gradients are those of float32 products of the widened values, rounded to the inputs' dtypes. The
C++ kernels widen in registers: a model that is loaded as `native` decodes several times faster.
"""

# M rows, I inputs, O outputs, H heads, N rows in the order of their experts, E experts

from __future__ import annotations

import threading

import torch
from torch import Tensor

from rorqual.ops import attention as torch_attention
from rorqual.ops.linear import linear_float32 as linear_float32_plain
from rorqual.ops.twins import by_kernel

TILE_ELEMENTS = 1 << 20  # 4 MB of widened weights stay in a core's share of the last cache

_scratch = threading.local()


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    return by_kernel(_linear, _linear_wide, x, weight_OI)


def linear_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    return by_kernel(_by_tiles, linear_float32_plain, x, weight_OI)


def head_linear(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    return by_kernel(_head_linear_wide, _head_linear_wide, x_MHI, weight_HOI)


def grouped_gemm(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return by_kernel(_grouped_gemm, _grouped_gemm_wide, x_NI, weight_EOI, counts_E)


def attention(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """`ops.attention.attention` in float32, rounded once at the end."""
    wide = torch_attention.attention(q_BHTC.float(), k_BGSC.float(), v_BGSV.float(), visible, scale)
    return wide.to(v_BGSV.dtype)


def _linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    return _by_tiles(x, weight_OI).to(x.dtype)


def _grouped_gemm(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    start = 0
    for expert_id, count in enumerate(counts_E.tolist()):
        if count:
            rows = slice(start, start + count)
            y_NO[rows] = _linear(x_NI[rows], weight_EOI[expert_id])
        start += count
    return y_NO


# What these compute, in float32 at once: their gradients are these functions'.
def _linear_wide(x: Tensor, weight_OI: Tensor) -> Tensor:
    return linear_float32_plain(x, weight_OI).to(x.dtype)


def _head_linear_wide(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    y_MHO = torch.einsum("mhi,hoi->mho", x_MHI.float(), weight_HOI.float())
    return y_MHO.to(weight_HOI.dtype)


def _grouped_gemm_wide(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    rows = x_NI.split(counts_E.tolist())
    return torch.cat([_linear_wide(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)])


def _by_tiles(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> float32 (..., O)."""
    x_MI = x.reshape(-1, x.shape[-1]).float()
    step = max(1, TILE_ELEMENTS // weight_OI.shape[1])
    y_MO = x_MI.new_empty(len(x_MI), len(weight_OI))
    for first in range(0, len(weight_OI), step):
        part = weight_OI[first : first + step]
        y_MO[:, first : first + step] = x_MI @ _wide_copy(part).t()
    return y_MO.view(*x.shape[:-1], len(weight_OI))


def _wide_copy(weight: Tensor) -> Tensor:
    """The weight as float32, in memory that the next call overwrites."""
    num = weight.numel()
    if getattr(_scratch, "tile", None) is None or _scratch.tile.numel() < num:
        with torch.inference_mode(False):  # else it could be written in that mode alone
            _scratch.tile = torch.empty(max(num, TILE_ELEMENTS))
    return _scratch.tile[:num].view(weight.shape).copy_(weight)
