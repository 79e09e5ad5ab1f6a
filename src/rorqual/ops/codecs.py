"""One record for each block type of GGUF that is written and read here: all that its code needs."""

# N blocks, n values of a block, B bytes of one

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from rorqual.ops import k_quants as k
from rorqual.ops import k_quants_encode as k_encode
from rorqual.ops import quant_blocks as small
from rorqual.ops.quant_bounds import Bounds, above_min, k_above_min, k_signed, signed
from rorqual.ops.quant_types import QUANT_TYPES, QuantType


@dataclass(frozen=True)
class Codec:
    """decode: (N, B) uint8 -> (N, n) float32; encode: (N, n) float32, and the importance of each
    value or None, -> (N, B); bounds: what the values of blocks may have been; scales: where a
    block's float16 scales begin.
    """

    kind: QuantType
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor | None], Tensor]
    bounds: Bounds
    scales: tuple[int, ...]


def _codecs() -> Iterator[Codec]:
    kinds, mins = QUANT_TYPES, (0, 2)
    yield Codec(kinds["Q8_0"], small.decode_q8_0, small.encode_q8_0, signed(-127, 127), (0,))
    yield Codec(kinds["Q4_0"], small.decode_q4_0, small.encode_q4_0, signed(-8, 7), (0,))
    yield Codec(kinds["Q4_1"], small.decode_q4_1, small.encode_q4_1, above_min(15), mins)
    yield Codec(kinds["Q5_0"], small.decode_q5_0, small.encode_q5_0, signed(-16, 15), (0,))
    yield Codec(kinds["Q5_1"], small.decode_q5_1, small.encode_q5_1, above_min(31), mins)
    of_2, of_3 = k_above_min(k.unpack_q2_k, 3, 15, 4.0), k_signed(k.unpack_q3_k, 4)
    yield Codec(kinds["Q2_K"], k.decode_q2_k, k_encode.encode_q2_k, of_2, (80, 82))
    yield Codec(kinds["Q3_K"], k.decode_q3_k, k_encode.encode_q3_k, of_3, (108,))
    of_4, of_5 = (k_above_min(k.unpack_q4_k, 15, 63, 1.0), k_above_min(k.unpack_q5_k, 31, 63, 1.0))
    yield Codec(kinds["Q4_K"], k.decode_q4_k, k_encode.encode_q4_k, of_4, mins)
    yield Codec(kinds["Q5_K"], k.decode_q5_k, k_encode.encode_q5_k, of_5, mins)
    of_6 = k_signed(k.unpack_q6_k, 32)
    yield Codec(kinds["Q6_K"], k.decode_q6_k, k_encode.encode_q6_k, of_6, (208,))


CODECS: dict[str, Codec] = {codec.kind.name: codec for codec in _codecs()}
