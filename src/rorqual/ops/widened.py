"""Products with bfloat16 weights on processors without bfloat16 arithmetic (AVX2 and older), where
torch multiplies bfloat16 at a tenth of float32's speed or less.

Weights stay bfloat16 in memory and are widened on the way: a few rows through a kernel that reads
each weight once, if there is a compiler for it, many by widening a tile at a time for float32 GEMM.
Sums are float32.
"""

# M rows, I inputs, O outputs, D width of a row, H heads, N rows in the order of their experts,
# E experts

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import attention as torch_attention
from rorqual.ops.linear import linear_float32
from rorqual.ops.rms_norm import rms_norm
from rorqual.ops.twins import by_kernel

# Measured on Zen 3 (docs/performance.md): beyond 8 rows a kernel's sums leave the registers, beyond
# 24 reading the weights again for each 8 costs more than widening them.
KERNEL_ROWS = 8
FEW_ROWS = 24
TILE_ELEMENTS = 1 << 20  # 4 MB of widened weights stay in a core's share of the last cache
# Choice: at most this many rows go through one kernel that reads an expert's weight for each row:
# among so few, two rows seldom have the same expert.
GATHER_ROWS = 64
GATHER_SIZES = tuple(1 << i for i in range(GATHER_ROWS.bit_length()))

RowKernel = Callable[..., Tensor]

_scratch = threading.local()


class Widened:
    """The operations of `Kernels`, by tiles alone. Differentiable: their gradients are those of
    float32 products of the widened values, rounded to the inputs' dtypes.
    """

    def linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return by_kernel(self._linear, _linear_wide, x, weight_OI)

    def linear_float32(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return by_kernel(self._linear_float32, linear_float32, x, weight_OI)

    def head_linear(self, x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
        return by_kernel(self._head_linear, _head_linear_wide, x_MHI, weight_HOI)

    def grouped_gemm(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        return by_kernel(self._grouped_gemm, _grouped_gemm_wide, x_NI, weight_EOI, counts_E)

    @property
    def rms_norm(self) -> Callable[[Tensor, Tensor, float], Tensor]:
        return rms_norm

    def warm_up(self, weight_EOI: Tensor, num_choices: int) -> None:
        """Nothing is compiled."""

    def _linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return _by_tiles(x, weight_OI).to(x.dtype)

    def _linear_float32(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        return _by_tiles(x, weight_OI)

    def _head_linear(self, x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
        return _head_linear_wide(x_MHI, weight_HOI)

    def _grouped_gemm(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        return self._by_experts(x_NI, weight_EOI, counts_E.tolist())

    def _by_experts(self, x_NI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
        start = 0
        for expert_id, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                y_NO[rows] = self._linear(x_NI[rows], weight_EOI[expert_id])
            start += count
        return y_NO


class WidenedByRows(Widened):
    """Few rows go through compiled kernels; `compiled` makes one of a function (`Compiled`)."""

    def __init__(self, compiled: Callable[[RowKernel], RowKernel]) -> None:
        self._compiled = compiled
        self._rows, self._rows_float32 = compiled(_sum_rows), compiled(_sum_rows_float32)
        self._head_rows, self._expert_rows = compiled(_sum_head_rows), compiled(_sum_expert_rows)
        self._norms: dict[float, tuple[RowKernel, RowKernel]] = {}

    @property
    def rms_norm(self) -> Callable[[Tensor, Tensor, float], Tensor]:
        return self._rms_norm

    def _rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if not 0 < x.numel() <= KERNEL_ROWS * x.shape[-1]:
            return rms_norm(x, weight_D, eps)
        if eps not in self._norms:
            plain = partial(_rms_norm, eps)
            self._norms.setdefault(eps, (self._compiled(plain), plain))
        return by_kernel(*self._norms[eps], x, weight_D)

    def warm_up(self, weight_EOI: Tensor, num_choices: int) -> None:
        """Compiles the kernels for few tokens that choose `num_choices` experts each."""
        for size in GATHER_SIZES:
            if size >= num_choices:
                x_NI = weight_EOI.new_zeros(size, weight_EOI.shape[2])
                self._gather(x_NI, weight_EOI, torch.zeros(size, dtype=torch.int64))

    def _linear(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        if _is_few(x, weight_OI):
            return _by_eights(self._rows, x.float(), weight_OI).to(x.dtype)
        return super()._linear(x, weight_OI)

    def _linear_float32(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        if _is_few(x, weight_OI):
            return _by_eights(self._rows_float32, x.float(), weight_OI)
        return super()._linear_float32(x, weight_OI)

    def _head_linear(self, x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
        if 0 < len(x_MHI) <= FEW_ROWS:
            return _by_eights(self._head_rows, x_MHI.float(), weight_HOI)
        return super()._head_linear(x_MHI, weight_HOI)

    def _grouped_gemm(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        # Experts with many rows take the way of many, however many there are: what a
        # batch-invariant engine fills up never comes here.
        if 0 < len(x_NI) <= GATHER_ROWS and max(counts) <= FEW_ROWS:
            return self._gathered(x_NI, weight_EOI, counts_E)
        return self._by_experts(x_NI, weight_EOI, counts)

    def _gathered(self, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        """By the kernel of the next of `GATHER_SIZES`: the rows are padded with zeros for the last
        expert, whose weights are read anyway.
        """
        num_rows = len(x_NI)
        numbers_E = torch.arange(len(counts_E))
        experts_N = numbers_E.repeat_interleave(counts_E, output_size=num_rows)
        num_more = next(size for size in GATHER_SIZES if size >= num_rows) - num_rows
        if num_more:
            x_NI = F.pad(x_NI, (0, 0, 0, num_more))
            experts_N = torch.cat([experts_N, experts_N[-1:].expand(num_more)])
        return self._gather(x_NI, weight_EOI, experts_N)[:num_rows]

    def _gather(self, x_NI: Tensor, weight_EOI: Tensor, experts_N: Tensor) -> Tensor:
        """y_NO = x_NI[n] @ weight_EOI[experts_N[n]].T, without copying any weight."""
        return self._expert_rows(x_NI.float(), weight_EOI, experts_N)


def attention(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """`ops.attention.attention` in float32, rounded once at the end."""
    wide = torch_attention.attention(q_BHTC.float(), k_BGSC.float(), v_BGSV.float(), visible, scale)
    return wide.to(v_BGSV.dtype)


# What the kernels compute, in float32 at once: their gradients are these functions'.
def _linear_wide(x: Tensor, weight_OI: Tensor) -> Tensor:
    return linear_float32(x, weight_OI).to(x.dtype)


def _head_linear_wide(x_MHI: Tensor, weight_HOI: Tensor) -> Tensor:
    y_MHO = torch.einsum("mhi,hoi->mho", x_MHI.float(), weight_HOI.float())
    return y_MHO.to(weight_HOI.dtype)


def _grouped_gemm_wide(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    rows = x_NI.split(counts_E.tolist())
    return torch.cat([_linear_wide(x, weight) for x, weight in zip(rows, weight_EOI, strict=True)])


def _rms_norm(eps: float, x: Tensor, weight_D: Tensor) -> Tensor:
    return rms_norm(x, weight_D, eps)


def _is_few(x: Tensor, weight_OI: Tensor) -> bool:
    return 0 < x.numel() <= FEW_ROWS * weight_OI.shape[1]


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


def _by_eights(kernel: RowKernel, x: Tensor, weight: Tensor) -> Tensor:
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
