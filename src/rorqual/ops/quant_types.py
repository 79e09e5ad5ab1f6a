"""The tensor types of GGUF files: their ids, and how many values lie in how many bytes.

Source: `ggml_type` and the block structures of ggml (ggml.h, ggml-common.h). Rorqual encodes and
decodes the ones in `CODED`, and reads those in `FOREIGN` through the `gguf` package; the rest are
here so that any file can be listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantType:
    """`block_values` consecutive values of a row are stored in `block_bytes` bytes."""

    name: str
    type_id: int
    block_values: int
    block_bytes: int

    def fits(self, num_values: int) -> bool:
        """Whether a row of `num_values` is a whole number of blocks."""
        return num_values % self.block_values == 0

    def num_bytes(self, num_values: int) -> int:
        """Bytes of `num_values`, a whole number of blocks."""
        assert self.fits(num_values), f"{num_values} values are no whole blocks of {self.name}"
        return num_values // self.block_values * self.block_bytes


_TYPES = (
    # name, id, values and bytes a block
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8),
    ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
)  # fmt: skip

QUANT_TYPES: dict[str, QuantType] = {entry[0]: QuantType(*entry) for entry in _TYPES}
TYPE_OF_ID: dict[int, QuantType] = {kind.type_id: kind for kind in QUANT_TYPES.values()}

FLOAT_TYPES = ("F32", "F16", "BF16")
SMALL_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CODED = (*FLOAT_TYPES, *SMALL_BLOCKS, *K_QUANTS)
FOREIGN = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
READABLE = (*CODED, *FOREIGN)
