"""FP8 as DeepSeek-V3 is published: which tensors have it, in which blocks, with which scales.

Written in FP8 are exactly the projections of `self_attn` and `mlp` (of routed and shared experts
too). Embedding, head, router, norms and `eh_proj` stay bfloat16, the router's bias is float32. A
scale stands for a block of 128x128 and is named after its weight. Read is more than is written: any
matrix may be FP8, in blocks of another size, with scales in other types. How values are coded:
`ops/block_fp8`.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from rorqual.ops.block_fp8 import BLOCK, num_blocks
from rorqual.ops.kernels import FP8

Format = Literal["float32", "bfloat16", "fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)
# By their names on the command line.
FORMAT_OF: dict[str, Format] = {"float32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
Kind = Literal["plain", "projection", "bias", "copy"]

E4M3, E8M0 = FP8, "F8_E8M0"  # as safetensors names them
SCALE_DTYPES = ("F32", "BF16", E8M0)
SCALE_SUFFIX = "_scale_inv"
BLOCK_PAIR = (BLOCK, BLOCK)
QUANTISATION: dict[str, Any] = {  # of a config.json that we write
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(\w+\.)*\w+_proj\w*\.weight$")


def is_projection(name: str) -> bool:
    """Whether the weight of this name is FP8 in an FP8 checkpoint."""
    return bool(_PROJECTION.search(name))


def dtype_in(format: Format, kind: Kind) -> str:
    """What a tensor of this kind is written as, by safetensors' name."""
    if kind == "bias" or format == "float32":
        return "F32"
    return E4M3 if format == "fp8" and kind == "projection" else "BF16"


def may_be_fp8(kind: Kind, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that is stored in FP8 is read."""
    return kind in ("projection", "plain") and len(shape) == 2


def scale_name(name: str) -> str:
    return name + SCALE_SUFFIX


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK_PAIR) -> tuple[int, int]:
    return num_blocks(shape[0], block[0]), num_blocks(shape[1], block[1])
