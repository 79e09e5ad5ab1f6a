"""The K-quants of GGUF, Q2_K to Q6_K: 256 values in groups with scales that are quantised too.

Layouts of a super-block (ggml-common.h), d and dmin little-endian float16:

    Q2_K   84 bytes  16 x (scale | min << 4), 64 bytes of 2-bit codes, d, dmin; groups of 16
    Q3_K  110 bytes  32 bytes of third bits, 64 of 2-bit codes, 12 of 6-bit scales, d; groups of 16
    Q4_K  144 bytes  d, dmin, 12 bytes of 6-bit scales and mins, 128 of nibbles; groups of 32
    Q5_K  176 bytes  d, dmin, 12 bytes of scales and mins, 32 of fifth bits, 128 of nibbles
    Q6_K  210 bytes  128 bytes of low nibbles, 64 of high pairs, 16 x int8 scale, d; groups of 16

    value = (d * scale) * code - (dmin * min)    Q2_K, Q4_K, Q5_K: codes from 0
    value = (d * scale) * (code - offset)        Q3_K: offset 4, scale - 32; Q6_K: offset 32

`unpack_*` gives codes and scales as numbers, which a kernel may repack without losing anything;
`pack_*` is the inverse.
"""

# N super-blocks, 256 values each

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.quant_bits import BITS, NIBBLES, PAIRS, as_bytes, half_of, pack, unpack

SUPER_BLOCK = 256


@dataclass(frozen=True)
class Parts:
    """A super-block taken apart: codes (N, 256) uint8, scales and mins (N, groups).

    `scale` is uint8 from 0, or int8 where it is signed (Q3_K, Q6_K, which have no mins); `d` and
    `dmin` are float32 (N, 1) that float16 holds exactly.
    """

    codes: Tensor
    scale: Tensor
    d: Tensor
    min: Tensor | None = None
    dmin: Tensor | None = None


def values_of(parts: Parts, offset: int = 0) -> Tensor:
    """(N, 256) float32; the order of the roundings is the reference's."""
    num_groups = parts.scale.shape[1]
    scale = (parts.d * parts.scale.float()).unsqueeze(-1)
    codes = parts.codes.view(-1, num_groups, SUPER_BLOCK // num_groups)
    values = scale * (codes.float() - offset)
    if parts.min is not None and parts.dmin is not None:
        values -= (parts.dmin * parts.min.float()).unsqueeze(-1)
    return values.flatten(1)


def decode_q2_k(raw: Tensor) -> Tensor:
    return values_of(unpack_q2_k(raw))


def decode_q3_k(raw: Tensor) -> Tensor:
    return values_of(unpack_q3_k(raw), offset=4)


def decode_q4_k(raw: Tensor) -> Tensor:
    return values_of(unpack_q4_k(raw))


def decode_q5_k(raw: Tensor) -> Tensor:
    return values_of(unpack_q5_k(raw))


def decode_q6_k(raw: Tensor) -> Tensor:
    return values_of(unpack_q6_k(raw), offset=32)


def unpack_q2_k(raw: Tensor) -> Parts:
    codes = unpack(raw[:, 16:80].unflatten(1, (2, 32)), PAIRS).flatten(1)
    return Parts(codes, raw[:, :16] & 15, half_of(raw, 80), raw[:, :16] >> 4, half_of(raw, 82))


def pack_q2_k(parts: Parts) -> Tensor:
    low, dmin = _mins(parts)
    codes = pack(parts.codes.view(-1, 2, 4, 32), PAIRS).flatten(1)
    scales = parts.scale | (low << 4)
    return torch.cat([scales, codes, _half_bytes(parts.d), _half_bytes(dmin)], 1)


def unpack_q3_k(raw: Tensor) -> Parts:
    low = unpack(raw[:, 32:96].unflatten(1, (2, 32)), PAIRS).flatten(1)
    high = unpack(raw[:, :32], BITS).flatten(1)
    six_bits = unpack(raw[:, 96:104], NIBBLES).flatten(1)
    six_bits = six_bits | (unpack(raw[:, 104:108], PAIRS).flatten(1) << 4)
    scale = six_bits.to(torch.int8) - 32
    return Parts(low | (high << 2), scale, half_of(raw, 108))


def pack_q3_k(parts: Parts) -> Tensor:
    low = pack(parts.codes.view(-1, 2, 4, 32), PAIRS).flatten(1)
    high = pack((parts.codes >> 2).view(-1, 8, 32), BITS)
    six_bits = (parts.scale + 32).to(torch.uint8)
    scales = [
        pack(six_bits.view(-1, 2, 8), NIBBLES),
        pack((six_bits >> 4).view(-1, 4, 4), PAIRS),
    ]
    return torch.cat([high, low, *scales, _half_bytes(parts.d)], 1)


def unpack_q4_k(raw: Tensor) -> Parts:
    scale, low = _unpack_scales_and_mins(raw[:, 4:16])
    codes = unpack(raw[:, 16:].unflatten(1, (4, 32)), NIBBLES).flatten(1)
    return Parts(codes, scale, half_of(raw, 0), low, half_of(raw, 2))


def pack_q4_k(parts: Parts) -> Tensor:
    codes = pack(parts.codes.view(-1, 4, 2, 32), NIBBLES).flatten(1)
    return torch.cat([*_head_with_mins(parts), codes], 1)


def unpack_q5_k(raw: Tensor) -> Parts:
    scale, low = _unpack_scales_and_mins(raw[:, 4:16])
    codes = unpack(raw[:, 48:].unflatten(1, (4, 32)), NIBBLES).flatten(1)
    high = unpack(raw[:, 16:48], BITS).flatten(1)
    return Parts(codes | (high << 4), scale, half_of(raw, 0), low, half_of(raw, 2))


def pack_q5_k(parts: Parts) -> Tensor:
    codes = pack(parts.codes.view(-1, 4, 2, 32), NIBBLES).flatten(1)
    high = pack((parts.codes >> 4).view(-1, 8, 32), BITS)
    return torch.cat([*_head_with_mins(parts), high, codes], 1)


def unpack_q6_k(raw: Tensor) -> Parts:
    low = unpack(raw[:, :128].unflatten(1, (2, 64)), NIBBLES).flatten(1)
    high = unpack(raw[:, 128:192].unflatten(1, (2, 32)), PAIRS).flatten(1)
    scale = raw[:, 192:208].contiguous().view(torch.int8)
    return Parts(low | (high << 4), scale, half_of(raw, 208))


def pack_q6_k(parts: Parts) -> Tensor:
    low = pack(parts.codes.view(-1, 2, 2, 64), NIBBLES).flatten(1)
    high = pack((parts.codes >> 4).view(-1, 2, 4, 32), PAIRS).flatten(1)
    return torch.cat([low, high, as_bytes(parts.scale), _half_bytes(parts.d)], 1)


def _mins(parts: Parts) -> tuple[Tensor, Tensor]:
    assert parts.min is not None, "Q2_K, Q4_K and Q5_K have mins"
    assert parts.dmin is not None, "mins have a scale"
    return parts.min, parts.dmin


def _head_with_mins(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """d, dmin and the 12 bytes of Q4_K and Q5_K that hold 8 scales and 8 mins of 6 bits."""
    low, dmin = _mins(parts)
    first, last = parts.scale[:, :4], parts.scale[:, 4:]
    first_min, last_min = low[:, :4], low[:, 4:]
    scales = torch.cat(
        [
            first | (last >> 4 << 6),
            first_min | (last_min >> 4 << 6),
            (last & 15) | ((last_min & 15) << 4),
        ],
        1,
    )
    return _half_bytes(parts.d), _half_bytes(dmin), scales


def _unpack_scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    first, first_min, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    low = torch.cat([first_min & 63, (rest >> 4) | (first_min >> 6 << 4)], 1)
    return scale, low


def _half_bytes(d: Tensor) -> Tensor:
    return as_bytes(d.half())
