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
        and weight.is_cpu
        and not _has_bfloat16()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype."""
    if not widens(weight_OI):
        return F.linear(x, weight_OI)
    if _is_few(x, weight_OI):
        return _by_eights(_rows, x.float(), weight_OI).to(x.dtype)
    return _by_tiles(x, weight_OI).to(x.dtype)


def linear_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> (..., O) in float32, where that of x and the weight is wanted exactly."""
    if not widens(weight_OI):
        return F.linear(x.float(), weight_OI.float())
    few = _is_few(x, weight_OI)
    return _by_eights(_rows_float32, x.float(), weight_OI) if few else _by_tiles(x, weight_OI)


def logits(h: Tensor, weight_VD: Tensor) -> Tensor:
    """h (..., D) -> float32 (..., V); the sums are as wide as the processor's path makes them."""
    if widens(weight_VD):
        return linear_float32(h, weight_VD)
    return F.linear(h, weight_VD).float()


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


def _is_few(x: Tensor, weight_OI: Tensor) -> bool:
    return x.numel() <= FEW_ROWS * weight_OI.shape[1] and can_compile()


def _by_tiles(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) -> float32 (..., O)."""
    x_MI = x.reshape(-1, x.shape[-1]).float()
    step = max(1, TILE_ELEMENTS // weight_OI.shape[1])
    y_MO = x_MI.new_empty(len(x_MI), len(weight_OI))
    for first in range(0, len(weight_OI), step):
        part = weight_OI[first : first + step]
        y_MO[:, first : first + step] = x_MI @ _wide_copy(part).t()
    return y_MO.view(*x.shape[:-1], -1)


def _wide_copy(weight: Tensor) -> Tensor:
    """The weight as float32, in memory that the next call overwrites."""
    num = weight.numel()
    if getattr(_scratch, "tile", None) is None or _scratch.tile.numel() < num:
        with torch.inference_mode(False):  # else it could be written in that mode alone
            _scratch.tile = torch.empty(max(num, TILE_ELEMENTS))
    return _scratch.tile[:num].view(weight.shape).copy_(weight)


def _by_eights(kernel: Compiled, x: Tensor, weight: Tensor) -> Tensor:
    """Kernels exist for 1, 2, 4 and 8 rows: pieces of 8, and the last one filled up with zeros.

    x (..., I) for a weight (O, I), (M, H, I) for (H, O, I).
    """
    num_inner = weight.dim() - 1
    inner = x.shape[x.dim() - num_inner :]
    num_rows = x.numel() // inner.numel()
    if num_rows in (1, 2, 4, KERNEL_ROWS) and x.is_contiguous():
        return kernel(x, weight)
    x_M = x.reshape(num_rows, *inner)
    pieces = [kernel(_filled(piece), weight)[: len(piece)] for piece in x_M.split(KERNEL_ROWS)]
    y_M = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y_M.view(*x.shape[: x.dim() - num_inner], *y_M.shape[1:])


def _filled(x_M: Tensor) -> Tensor:
    num_padded = 1 << (len(x_M) - 1).bit_length()
    if num_padded == len(x_M):
        return x_M.contiguous()
    padded = x_M.new_zeros(num_padded, *x_M.shape[1:])
    padded[: len(x_M)] = x_M
    return padded


# A sum a row, spelt out, so that Inductor reads and widens each weight once for all rows. The rows
# come widened: inside, that would be done again for each output.
def _sum_rows(x: Tensor, weight_OI: Tensor) -> Tensor:
    return _sum_rows_float32(x, weight_OI).to(weight_OI.dtype)


def _sum_rows_float32(x: Tensor, weight_OI: Tensor) -> Tensor:
    wide_OI = weight_OI.float()
    sums = [(wide_OI * x_I).sum(-1) for x_I in x.view(-1, x.shape[-1]).unbind()]
    return torch.stack(sums).view(*x.shape[:-1], -1)


def _sum_head_rows(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    wide_HOI = weight_HOI.float()
    sums = [(wide_HOI * x_HI[:, None]).sum(-1) for x_HI in x_MHI.unbind()]
    return torch.stack(sums).to(weight_HOI.dtype)


def _sum_expert_rows(x_NI: Tensor, weight_EOI: Tensor, experts_N: Tensor) -> Tensor:
    return (weight_EOI[experts_N].float() * x_NI[:, None]).sum(-1).to(weight_EOI.dtype)


_rows, _rows_float32 = Compiled(_sum_rows), Compiled(_sum_rows_float32)
_head_rows = Compiled(_sum_head_rows)
_expert_rows = Compiled(_sum_expert_rows)
