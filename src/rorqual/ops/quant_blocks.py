"""GGUF's blocks of 32 values with one scale: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Layouts (ggml-common.h), d and m little-endian float16, value = d * q (+ m):

    Q8_0  d, 32 x int8 q
    Q4_0  d, 16 bytes: value i in the low nibble, i + 16 in the high one; q = code - 8
    Q4_1  d, m, the same 16 bytes; q = code
    Q5_0  d, 4 bytes with the fifth bits (bit i for value i), 16 bytes of nibbles; q = code - 16
    Q5_1  d, m, fifth bits, nibbles; q = code

Without an importance the scale is the one that reaches the extreme value, as ggml's `_ref`
functions compute it; with one it is searched for (`quant_search`).
"""

# N blocks, n = 32 values of a block

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops.quant_bits import BITS, NIBBLES, as_bytes, half_of, inverse_of, pack, unpack
from rorqual.ops.quant_search import FINE_GRID, SIGNED_GRID, fit_scale, fit_scale_and_min


def as_q8_0(raw: Tensor, kind: str) -> Tensor:
    """Blocks of Q4_0 or Q5_0, (N, B), as blocks of Q8_0 with the same scale and the same values."""
    codes = _nibbles(raw[:, 2:]) if kind == "Q4_0" else _five_bits(raw[:, 2:])
    signed = codes.to(torch.int8) - (8 if kind == "Q4_0" else 16)
    return torch.cat([raw[:, :2], signed.view(torch.uint8)], dim=1)


def decode_q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * half_of(raw, 0)


def decode_q4_0(raw: Tensor) -> Tensor:
    return half_of(raw, 0) * (_nibbles(raw[:, 2:]).float() - 8)


def decode_q4_1(raw: Tensor) -> Tensor:
    return half_of(raw, 0) * _nibbles(raw[:, 4:]).float() + half_of(raw, 2)


def decode_q5_0(raw: Tensor) -> Tensor:
    return half_of(raw, 0) * (_five_bits(raw[:, 2:]).float() - 16)


def decode_q5_1(raw: Tensor) -> Tensor:
    return half_of(raw, 0) * _five_bits(raw[:, 4:]).float() + half_of(raw, 2)


def encode_q8_0(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """(N, 32) float32 -> (N, 34) bytes; an importance changes nothing at eight bits."""
    scale = x.abs().amax(1, keepdim=True) / 127
    scaled = x * inverse_of(scale)
    # C's roundf: halves go away from zero.
    codes = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    return torch.cat([as_bytes(scale.half()), as_bytes(codes.to(torch.int8))], 1)


def encode_q4_0(x: Tensor, weight: Tensor | None = None) -> Tensor:
    scale, codes = _signed_codes(x, weight, 8)
    return torch.cat([as_bytes(scale.half()), pack(codes.view(-1, 2, 16), NIBBLES)], 1)


def encode_q5_0(x: Tensor, weight: Tensor | None = None) -> Tensor:
    scale, codes = _signed_codes(x, weight, 16)
    return torch.cat([as_bytes(scale.half()), _pack_five_bits(codes)], 1)


def encode_q4_1(x: Tensor, weight: Tensor | None = None) -> Tensor:
    scale, low, codes = _codes_above_min(x, weight, 15)
    packed = pack(codes.view(-1, 2, 16), NIBBLES)
    return torch.cat([as_bytes(scale.half()), as_bytes(low.half()), packed], 1)


def encode_q5_1(x: Tensor, weight: Tensor | None = None) -> Tensor:
    scale, low, codes = _codes_above_min(x, weight, 31)
    return torch.cat([as_bytes(scale.half()), as_bytes(low.half()), _pack_five_bits(codes)], 1)


def _signed_codes(x: Tensor, weight: Tensor | None, half: int) -> tuple[Tensor, Tensor]:
    """Scale (N, 1) and codes (N, 32) in 0 .. 2 * half - 1, which stand for code - half."""
    if weight is None:
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
        scale = extreme / -half
        codes = (x * inverse_of(scale) + (half + 0.5)).trunc_()
    else:
        found = fit_scale(x.t().contiguous(), weight.t().contiguous(), half, SIGNED_GRID)
        scale = found.unsqueeze(1)
        codes = (x * inverse_of(scale)).round_() + half
    return scale, codes.clamp_(0, 2 * half - 1).to(torch.uint8)


def _codes_above_min(x: Tensor, weight: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum (N, 1), codes (N, 32) in 0 .. top."""
    if weight is None:
        low = x.amin(1, keepdim=True)
        scale = (x.amax(1, keepdim=True) - low) / top
        codes = ((x - low) * inverse_of(scale) + 0.5).trunc_()
    else:
        found, depth = fit_scale_and_min(
            x.t().contiguous(), weight.t().contiguous(), top, FINE_GRID
        )
        scale, low = found.unsqueeze(1), -depth.unsqueeze(1)
        codes = ((x - low) * inverse_of(scale)).round_()
    return scale, low, codes.clamp_(0, top).to(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    return unpack(packed, NIBBLES).flatten(1)


def _five_bits(packed: Tensor) -> Tensor:
    """(N, 20): 4 bytes of fifth bits, 16 of nibbles -> (N, 32) codes."""
    high = unpack(packed[:, :4].unsqueeze(-1), BITS).flatten(1)  # bit b of byte k is value 8k + b
    return _nibbles(packed[:, 4:]) | (high << 4)


def _pack_five_bits(codes: Tensor) -> Tensor:
    high = pack((codes >> 4).view(-1, 4, 8, 1), BITS).flatten(1)
    return torch.cat([high, pack(codes.view(-1, 2, 16), NIBBLES)], 1)
