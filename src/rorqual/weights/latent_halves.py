"""kv_b_proj as attention over cached latents reads it: a head's keys transposed, and its values.

A checkpoint has one matrix (H * (N + V), C). Floats and FP8 are moved as they are; of GGUF's block
types, whose blocks run along the rows, the keys' half becomes float32.
"""

# H heads, N width of a head without rotary part, V of its value, C latent; B bytes of a row

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.kernels import FP8
from rorqual.ops.quant_bits import as_bytes
from rorqual.ops.quantise import FLOAT_DTYPES, decode_blocks
from rorqual.weights.fp8 import BLOCK_PAIR
from rorqual.weights.source import StoredBytes


@dataclass(frozen=True)
class Half:
    """A matrix (O, I) a head, of one kind; scales are FP8's."""

    kind: str
    shape: tuple[int, int, int]
    codes_HOB: Tensor
    scales_HXY: Tensor | None = None
    block: tuple[int, int] = BLOCK_PAIR

    def heads(self) -> Iterator[StoredBytes]:
        for head, codes in enumerate(self.codes_HOB):
            scales = None if self.scales_HXY is None else self.scales_HXY[head]
            yield StoredBytes(self.kind, codes, scales, self.block)


def split_latent_up(stored: StoredBytes, widths: tuple[int, int]) -> tuple[Half, Half]:
    """Keys (H, C, N) and values (H, V, C) of the matrix with these rows; `widths` are N and V."""
    nope, value = widths
    heads = len(stored.codes_RB) // (nope + value)
    by_head = stored.codes_RB.unflatten(0, (heads, nope + value))
    if stored.kind == FP8:
        assert stored.scales_XY is not None, "FP8 has scales"
        return _split_fp8(by_head, stored.scales_XY, stored.block, widths)
    key_rows, value_codes = by_head.split((nope, value), dim=1)
    if stored.kind in FLOAT_DTYPES:
        kind, keys_HNC = stored.kind, key_rows.contiguous().view(FLOAT_DTYPES[stored.kind])
    else:
        kind = "F32"
        keys_HNC = decode_blocks(key_rows.flatten(0, 1), stored.kind).unflatten(0, (heads, nope))
    latent = keys_HNC.shape[2]
    keys = as_bytes(keys_HNC.transpose(1, 2).flatten(0, 1)).unflatten(0, (heads, latent))
    return (
        Half(kind, (heads, latent, nope), keys),
        Half(stored.kind, (heads, value, latent), value_codes),
    )


def _split_fp8(
    codes_HRC: Tensor, scales_XY: Tensor, block: tuple[int, int], widths: tuple[int, int]
) -> tuple[Half, Half]:
    """Where a block crosses from one half to the other, both get blocks of fewer rows."""
    heads, num_rows, latent = codes_HRC.shape
    height = math.gcd(block[0], *widths)
    first_rows = torch.arange(0, heads * num_rows, height)
    scales_HXY = scales_XY[first_rows // block[0]].unflatten(0, (heads, -1))
    keys, values = codes_HRC.split(widths, dim=1)
    key_scales, value_scales = scales_HXY.split([width // height for width in widths], dim=1)
    return (
        Half(
            FP8,
            (heads, latent, widths[0]),
            keys.transpose(1, 2),
            key_scales.transpose(1, 2),
            (block[1], height),
        ),
        Half(FP8, (heads, widths[1], latent), values, value_scales, (height, block[1])),
    )
