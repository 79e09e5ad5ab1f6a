"""Weights in the bytes of their file: FP8 blocks, GGUF's block types, 16-bit floats; frozen.

Each stack has the kernels for its kind: the C++ ones multiply the bytes, in an order of their own
(`ops/packed.py`); the plain ones (`ops/decoded.py`) decode a matrix a tile of rows at a time.
"""

# E matrices of a stack, O rows (outputs), I columns (inputs), B bytes of a row, N rows of x

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model.dispatch import Dispatched
from rorqual.model.kept import KeepsBuffers
from rorqual.model.served import Served
from rorqual.ops.block_fp8 import dequantise_blocks, num_blocks
from rorqual.ops.decoded import linear_transposed
from rorqual.ops.kernels import DECODED, FP8, NATIVE, Kernels
from rorqual.ops.packed import (
    TILE_ROWS,
    can_pack,
    decode_rows,
    empty_packed,
    pack,
    pack_into,
    unpack,
)
from rorqual.ops.quantise import decode_blocks
from rorqual.ops.swiglu import swiglu

TILE_ELEMENTS = 1 << 20  # 4 MB of decoded values


class StoredStack(Served, KeepsBuffers):
    """E matrices (O, I) of one kind: FP8, or a type of GGUF (F32, F16 and BF16 among them).

    codes_EOB uint8; scales_EXY float32 are FP8's, one for each block. Where the C++ kernels serve,
    packed_EP holds the codes in their order, and codes_EOB is empty. Made for kernels that pack, it
    packs each matrix as it is put.
    """

    kernels = DECODED
    codes_EOB: Tensor
    scales_EXY: Tensor | None
    packed_EP: Tensor | None

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int],
        num_bytes: int,
        block: tuple[int, int],
        kernels: Kernels[Any] = DECODED,
    ) -> None:
        super().__init__()
        self.kind, self.shape, self.block = kind, shape, block
        num, rows, columns = shape
        scales = packed = None
        if kind == FP8:
            scales = torch.empty(num, num_blocks(rows, block[0]), num_blocks(columns, block[1]))
        codes_shape: tuple[int, ...] = num, rows, num_bytes
        if self._can_take(kernels):
            codes_shape, packed = (0,), empty_packed(kind, shape)
        self.register_buffer("codes_EOB", torch.empty(codes_shape, dtype=torch.uint8))
        self.register_buffer("scales_EXY", scales)
        self.register_buffer("packed_EP", packed)
        super().take(kernels if self._can_take(kernels) else DECODED)

    @classmethod
    def holding(
        cls,
        kind: str,
        shape: tuple[int, int, int],
        block: tuple[int, int],
        buffers: dict[str, Tensor | None],
    ) -> StoredStack:
        """One whose buffers are there already, by their names; codes_EOB or packed_EP."""
        stack = cls(kind, shape, 0, block)
        for name, tensor in buffers.items():
            setattr(stack, name, tensor)
        if stack.codes_EOB is None:
            stack.codes_EOB = torch.empty(0, dtype=torch.uint8)
        Served.take(stack, DECODED if stack.packed_EP is None else NATIVE)
        return stack

    def put(self, index: int, codes_OB: Tensor, scales_XY: Tensor | None = None) -> None:
        """Fills a matrix with the bytes of its rows."""
        if self.packed_EP is not None:
            pack_into(self.packed_EP[index], codes_OB, self.kind, self.shape[2])
            return
        self.codes_EOB[index].copy_(codes_OB)
        if self.scales_EXY is not None:
            assert scales_XY is not None, "FP8 has scales"
            self.scales_EXY[index].copy_(scales_XY)

    def dense(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a matrix, float32 (rows, I)."""
        stop = self.shape[1] if stop is None else stop
        if self.scales_EXY is None:
            return decode_blocks(self._codes(index, start, stop), self.kind)
        height = self.block[0]
        first = start - start % height
        scales = self.scales_EXY[index, first // height : num_blocks(stop, height)]
        values = self.codes_EOB[index, first:stop].view(torch.float8_e4m3fn)
        return dequantise_blocks(values, scales, block=self.block)[start - first :]

    def rows(self, ids: Tensor) -> Tensor:
        """(N,) rows of the first matrix, float32 (N, I)."""
        if self.packed_EP is not None:
            return decode_rows(self.packed_EP[0], self.kind, self.shape[1:], ids)
        if self.scales_EXY is None:
            return decode_blocks(self.codes_EOB[0, ids], self.kind)
        values = self.codes_EOB[0, ids].view(torch.float8_e4m3fn).float()
        scales = self.scales_EXY[0, ids // self.block[0]].repeat_interleave(self.block[1], dim=1)
        return values * scales[:, : self.shape[2]]

    def storage(self) -> tuple[str, torch.device]:
        return self.kind, self.codes_EOB.device

    def take(self, kernels: Kernels[Any]) -> None:
        can_take = self._can_take(kernels)
        super().take(kernels if can_take else DECODED)
        if can_take and self.packed_EP is None:
            self.packed_EP = pack(self.codes_EOB, self.kind, self.shape[2])
            self.codes_EOB = self.codes_EOB.new_empty(0)
        elif not can_take and self.packed_EP is not None:
            self.codes_EOB = torch.stack(
                [self._codes(i, 0, self.shape[1]) for i in range(self.shape[0])]
            )
            self.packed_EP = None

    def _can_take(self, kernels: Kernels[Any]) -> bool:
        return kernels is NATIVE and can_pack(self.kind, self.shape[2])

    def tiles(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        """A matrix in tiles of rows, each decoded when it is wanted."""
        _, num_rows, columns = self.shape
        height = TILE_ROWS if self.packed_EP is not None else 1
        height = self.block[0] if self.kind == FP8 else height
        step = max(1, TILE_ELEMENTS // columns // height) * height
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield rows, self.dense(index, rows.start, rows.stop)

    def _codes(self, index: int, start: int, stop: int) -> Tensor:
        """Rows of a matrix as files store them, (rows, B)."""
        if self.packed_EP is None:
            return self.codes_EOB[index, start:stop]
        return unpack(self.packed_EP[index], self.kind, self.shape[2], start, stop)


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
        return self.stack.kernels.linear(x, self.stack)


class StoredHead(StoredLinear):
    """In place of a `Head`."""

    def forward(
        self, h: Tensor, targets_N: Tensor | None = None, is_target_N: Tensor | None = None
    ) -> Tensor:
        assert (targets_N is None) == (is_target_N is None), "targets come with their mask"
        kernels = self.stack.kernels
        if targets_N is None or is_target_N is None:
            return kernels.logits(h, self.stack)
        return kernels.linear_cross_entropy(h, self.stack, targets_N, is_target_N)

    def token_losses(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        return self.stack.kernels.token_losses(h_ND, self.stack, targets_N)


class StoredHalves(nn.Module):
    """In place of a `LatentUp`: keys (H, C, N), transposed a head, and values (H, V, C).

    GGUF files have it so, as `attn_k_b` and `attn_v_b`.
    """

    def __init__(self, keys: StoredStack, values: StoredStack) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.num_heads = keys.shape[0]

    def forward(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        keys = [linear_transposed(c_kv, self.keys, head) for head in range(self.num_heads)]
        # Each head's values from the same latents.
        c_kv_MHC = c_kv.flatten(0, -2)[:, None].expand(-1, self.num_heads, -1)
        values = self.values.kernels.head_linear(c_kv_MHC, self.values)
        return torch.stack(keys, dim=-2), values.unflatten(0, c_kv.shape[:-1])

    def absorb(self, q_nope_MHN: Tensor) -> Tensor:
        return self.keys.kernels.head_linear(q_nope_MHN, self.keys)

    def unabsorb(self, out_MHC: Tensor) -> Tensor:
        return self.values.kernels.head_linear(out_MHC, self.values)


class StoredExperts(nn.Module):
    """In place of `Experts`: E SwiGLU experts, whose parts may be of different kinds."""

    def __init__(self, gate: StoredStack, up: StoredStack, down: StoredStack) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, dispatched: Dispatched) -> Tensor:
        rows_ND, counts_E = dispatched.rows_ND, dispatched.counts_E
        gate, up = (
            stack.kernels.grouped_gemm(rows_ND, stack, counts_E) for stack in (self.gate, self.up)
        )
        inner_NI = swiglu(gate, up, dispatched.tile_rows)
        inner_NI = inner_NI * dispatched.weights_N[:, None].to(rows_ND.dtype)
        return self.down.kernels.grouped_gemm(inner_NI, self.down, counts_E)
