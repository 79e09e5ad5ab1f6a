"""Weights in the bytes of their file: FP8 blocks, GGUF's block types, 16-bit floats; frozen.

A matrix is decoded a tile of rows at a time for each product, by the plain decoders: correct, and
slow until a kernel multiplies the bytes themselves. Products are float32 and differentiate by their
input, as an adapter over a frozen base needs it.
"""

# E matrices of a stack, O rows (outputs), I columns (inputs), B bytes of a row, N rows of x

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.model.dispatch import Dispatched
from rorqual.ops.block_fp8 import dequantise_blocks, num_blocks
from rorqual.ops.quantise import decode_blocks
from rorqual.ops.swiglu import swiglu

FP8 = "F8_E4M3"
TILE_ELEMENTS = 1 << 20  # 4 MB of decoded values


class StoredStack(nn.Module):
    """E matrices (O, I) of one kind: FP8, or a type of GGUF (F32, F16 and BF16 among them).

    codes_EOB uint8; scales_EXY float32 are FP8's, one for each block.
    """

    codes_EOB: Tensor
    scales_EXY: Tensor | None

    def __init__(
        self, kind: str, shape: tuple[int, int, int], num_bytes: int, block: tuple[int, int]
    ) -> None:
        super().__init__()
        self.kind, self.shape, self.block = kind, shape, block
        num, rows, columns = shape
        codes_EOB = torch.empty(num, rows, num_bytes, dtype=torch.uint8)
        self.register_buffer("codes_EOB", codes_EOB)
        scales = None
        if kind == FP8:
            scales = torch.empty(num, num_blocks(rows, block[0]), num_blocks(columns, block[1]))
        self.register_buffer("scales_EXY", scales)

    def dense(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a matrix, float32 (rows, I)."""
        stop = self.shape[1] if stop is None else stop
        codes = self.codes_EOB[index]
        if self.scales_EXY is None:
            return decode_blocks(codes[start:stop], self.kind)
        height = self.block[0]
        first = start - start % height
        scales = self.scales_EXY[index, first // height : num_blocks(stop, height)]
        values = codes[first:stop].view(torch.float8_e4m3fn)
        return dequantise_blocks(values, scales, block=self.block)[start - first :]

    def rows(self, ids: Tensor) -> Tensor:
        """(N,) rows of the first matrix, float32 (N, I)."""
        if self.scales_EXY is None:
            return decode_blocks(self.codes_EOB[0, ids], self.kind)
        values = self.codes_EOB[0, ids].view(torch.float8_e4m3fn).float()
        scales = self.scales_EXY[0, ids // self.block[0]].repeat_interleave(self.block[1], dim=1)
        return values * scales[:, : self.shape[2]]

    def multiply(self, x: Tensor, index: int = 0) -> Tensor:
        """x (..., I) -> x W^T (..., O), in x's dtype."""
        y: Tensor = _Product.apply(x, self, index, False)
        return y

    def multiply_transposed(self, x: Tensor, index: int = 0) -> Tensor:
        """x (..., O) -> x W (..., I), in x's dtype."""
        y: Tensor = _Product.apply(x, self, index, True)
        return y

    def tiles(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        """A matrix in tiles of rows, each decoded when it is wanted."""
        _, num_rows, columns = self.shape
        height = self.block[0] if self.kind == FP8 else 1
        step = max(1, TILE_ELEMENTS // columns // height) * height
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield rows, self.dense(index, rows.start, rows.stop)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: StoredStack, index: int, is_transposed: bool) -> Tensor:
        ctx.stack, ctx.index, ctx.is_transposed = stack, index, is_transposed
        return _product(x, stack, index, is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(grad, ctx.stack, ctx.index, not ctx.is_transposed), None, None, None


def _product(x: Tensor, stack: StoredStack, index: int, is_transposed: bool) -> Tensor:
    wide = x.float()
    _, num_rows, columns = stack.shape
    y = wide.new_zeros(*x.shape[:-1], columns if is_transposed else num_rows)
    for rows, tile in stack.tiles(index):
        if is_transposed:
            y += wide[..., rows] @ tile
        else:
            y[..., rows] = wide @ tile.t()
    return y.to(x.dtype)


class StoredEmbedding(nn.Module):
    """ids (...) int64 -> (..., D) float32."""

    def __init__(self, stack: StoredStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, ids: Tensor) -> Tensor:
        return self.stack.rows(ids.flatten()).view(*ids.shape, -1)


class StoredLinear(nn.Module):
    """x (..., I) -> (..., O), in place of a `Linear`."""

    def __init__(self, stack: StoredStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.multiply(x)


class StoredHead(StoredLinear):
    """In place of a `Head`."""

    def forward(
        self, h: Tensor, targets_N: Tensor | None = None, is_target_N: Tensor | None = None
    ) -> Tensor:
        assert (targets_N is None) == (is_target_N is None), "targets come with their mask"
        logits = self.stack.multiply(h.float())
        if targets_N is None or is_target_N is None:
            return logits
        return (F.cross_entropy(logits, targets_N, reduction="none") * is_target_N).sum()

    @torch.no_grad()
    def token_losses(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(self.stack.multiply(h_ND.float()), targets_N, reduction="none")


class StoredLatentUp(nn.Module):
    """In place of a `LatentUp`, whose matrix (H * (N + V), C) is stored whole."""

    def __init__(self, stack: StoredStack, num_heads: int, widths: list[int]) -> None:
        super().__init__()
        self.stack, self.num_heads, self.widths = stack, num_heads, widths

    def forward(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.stack.multiply(c_kv).unflatten(-1, (self.num_heads, -1))
        keys, values = kv.split(self.widths, dim=-1)
        return keys, values

    def absorb(self, q_nope_MHN: Tensor) -> Tensor:
        rows = [self._by_head(head)[0] for head in range(self.num_heads)]
        return torch.stack(
            [q_nope_MHN[:, head] @ row.to(q_nope_MHN.dtype) for head, row in enumerate(rows)], 1
        )

    def unabsorb(self, out_MHC: Tensor) -> Tensor:
        rows = [self._by_head(head)[1] for head in range(self.num_heads)]
        return torch.stack(
            [out_MHC[:, head] @ row.t().to(out_MHC.dtype) for head, row in enumerate(rows)], 1
        )

    def _by_head(self, head: int) -> tuple[Tensor, Tensor]:
        """A head's W_uk (N, C) and W_uv (V, C)."""
        width = sum(self.widths)
        keys, values = self.stack.dense(0, head * width, (head + 1) * width).split(self.widths)
        return keys, values


class StoredHalves(nn.Module):
    """In place of a `LatentUp`, stored as GGUF's `attn_k_b` (H, C, N), transposed a head, and
    `attn_v_b` (H, V, C).
    """

    def __init__(self, keys: StoredStack, values: StoredStack) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.num_heads = keys.shape[0]

    def forward(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        heads = range(self.num_heads)
        keys = [self.keys.multiply_transposed(c_kv, head) for head in heads]
        values = [self.values.multiply(c_kv, head) for head in heads]
        return torch.stack(keys, dim=-2), torch.stack(values, dim=-2)

    def absorb(self, q_nope_MHN: Tensor) -> Tensor:
        heads = q_nope_MHN.unbind(1)
        return torch.stack([self.keys.multiply(q, head) for head, q in enumerate(heads)], dim=1)

    def unabsorb(self, out_MHC: Tensor) -> Tensor:
        heads = out_MHC.unbind(1)
        return torch.stack([self.values.multiply(x, head) for head, x in enumerate(heads)], dim=1)


class StoredExperts(nn.Module):
    """In place of `Experts`: E SwiGLU experts, whose parts may be of different kinds."""

    def __init__(self, gate: StoredStack, up: StoredStack, down: StoredStack) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def warm_up(self, num_choices: int) -> None:
        """Nothing is compiled."""

    def forward(self, dispatched: Dispatched) -> Tensor:
        counts = dispatched.counts_E.tolist()
        rows = dispatched.rows_ND.split(counts)
        weights = dispatched.weights_N.split(counts)
        outs = []
        for expert_id, (x_ND, weights_N) in enumerate(zip(rows, weights, strict=True)):
            if len(x_ND):
                gate, up = (stack.multiply(x_ND, expert_id) for stack in (self.gate, self.up))
                inner_NI = swiglu(gate, up, dispatched.tile_rows)
                inner_NI = inner_NI * weights_N[:, None].to(x_ND.dtype)
                outs.append(self.down.multiply(inner_NI, expert_id))
        return torch.cat(outs) if outs else dispatched.rows_ND
