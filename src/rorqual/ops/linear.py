"""Linear maps, on processors without bfloat16 arithmetic too.

There (AVX2 and older) torch multiplies bfloat16 at a tenth of float32's speed or less. Here such
weights stay bfloat16 in memory and are widened on the way: a few rows through a kernel that reads
each weight once, many by widening a tile at a time for float32 GEMM. Sums are float32. Everywhere
else, and wherever a gradient is wanted, these are torch's own operators.
"""

# M rows, I inputs, O outputs, H heads, N rows in the order of their experts, E experts

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.compiled import Compiled, can_compile

# Measured on Zen 3 (docs/performance.md): beyond 8 rows a kernel's sums leave the registers, beyond
# 24 reading the weights again for each 8 costs more than widening them.
KERNEL_ROWS = 8
FEW_ROWS = 24
TILE_ELEMENTS = 1 << 20  # 4 MB of widened weights stay in a core's share of the last cache

_scratch = threading.local()


@cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widens(weight: Tensor) -> bool:
    """Does arithmetic with this weight go through float32, on this processor and right now?"""
    return (
        weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _has_bfloat16()
    )


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    return _wide_linear(x, weight_OI).to(x.dtype) if widens(weight_OI) else F.linear(x, weight_OI)


def linear_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> (..., O) in float32, where that of x and the weight is wanted exactly."""
    if widens(weight_OI):
        return _wide_linear(x, weight_OI)
    return F.linear(x.float(), weight_OI.float())


def logits(h: Tensor, weight_VD: Tensor) -> Tensor:
    """h (..., D) -> float32 (..., V); the sums are as wide as the processor's path makes them."""
    return _wide_linear(h, weight_VD) if widens(weight_VD) else F.linear(h, weight_VD).float()


def head_linear(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    """Each head's rows times that head's matrix: (M, H, I) -> (M, H, O) in the weight's dtype."""
    if not widens(weight_HOI):
        return torch.einsum("mhi,hoi->mho", x_MHI, weight_HOI)
    if len(x_MHI) <= FEW_ROWS and can_compile():
        return _by_eights(_head_rows, x_MHI.float(), weight_HOI)
    y_MHO = torch.einsum("mhi,hoi->mho", x_MHI.float(), weight_HOI.float())
    return y_MHO.to(weight_HOI.dtype)


def expert_rows(x_NI: Tensor, weight_EOI: Tensor, experts_N: Tensor) -> Tensor:
    """y_NO = x_NI[n] @ weight_EOI[experts_N[n]].T for a few rows, without copying any weight."""
    return _expert_rows(x_NI.float(), weight_EOI, experts_N)


def _wide_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    x_MI = x.reshape(-1, x.shape[-1]).float()
    return _wide_rows(x_MI, weight_OI).view(*x.shape[:-1], -1)


def _wide_rows(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    if len(x_MI) <= FEW_ROWS and can_compile():
        return _by_eights(_rows, x_MI, weight_OI)
    step = max(1, TILE_ELEMENTS // weight_OI.shape[1])
    y_MO = x_MI.new_empty(len(x_MI), len(weight_OI))
    for first in range(0, len(weight_OI), step):
        part = weight_OI[first : first + step]
        y_MO[:, first : first + step] = x_MI @ _wide_copy(part).t()
    return y_MO


def _wide_copy(weight: Tensor) -> Tensor:
    """The weight as float32, in memory that the next call overwrites."""
    num = weight.numel()
    if getattr(_scratch, "tile", None) is None or _scratch.tile.numel() < num:
        _scratch.tile = torch.empty(max(num, TILE_ELEMENTS))
    return _scratch.tile[:num].view(weight.shape).copy_(weight)


def _by_eights(kernel: Compiled, x: Tensor, weight: Tensor) -> Tensor:
    """Kernels exist for 1, 2, 4 and 8 rows: pieces of 8, and the last one filled up with zeros."""
    if len(x) > KERNEL_ROWS:
        return torch.cat([_by_eights(kernel, part, weight) for part in x.split(KERNEL_ROWS)])
    num_padded = 1 << (len(x) - 1).bit_length()
    if num_padded == len(x):
        return kernel(x.contiguous(), weight)
    padded = x.new_zeros(num_padded, *x.shape[1:])
    padded[: len(x)] = x
    return kernel(padded, weight)[: len(x)]


# A sum a row, spelt out, so that Inductor reads and widens each weight once for all rows.
def _sum_rows(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    wide_OI = weight_OI.float()
    return torch.stack([(wide_OI * x_I).sum(-1) for x_I in x_MI.unbind()])


def _sum_head_rows(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    wide_HOI = weight_HOI.float()
    sums = [(wide_HOI * x_HI[:, None]).sum(-1) for x_HI in x_MHI.unbind()]
    return torch.stack(sums).to(weight_HOI.dtype)


def _sum_expert_rows(x_NI: Tensor, weight_EOI: Tensor, experts_N: Tensor) -> Tensor:
    return (weight_EOI[experts_N].float() * x_NI[:, None]).sum(-1).to(weight_EOI.dtype)


_rows = Compiled(_sum_rows)
_head_rows = Compiled(_sum_head_rows)
_expert_rows = Compiled(_sum_expert_rows)
