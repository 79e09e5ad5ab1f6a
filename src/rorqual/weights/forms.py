"""In which kind each matrix of a stored model runs: its own, or another that is made at loading."""

# R rows, B bytes of a row, X and Y blocks of an FP8 scale

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import listing
from rorqual.ops.block_fp8 import dequantise_into, num_blocks
from rorqual.ops.kernels import FP8, STORED
from rorqual.ops.quant_bits import as_bytes
from rorqual.ops.quant_blocks import as_q8_0
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.ops.quantise import decode_blocks, encode_blocks
from rorqual.weights.source import StoredBytes

PIECE_VALUES = 1 << 21
FAST = ("BF16", "Q8_0", "Q4_K", "Q6_K")
"""What the C++ kernels multiply."""
WIDER = ("Q4_0", "Q5_0")
"""What Q8_0 holds exactly: signed codes with one scale for 32."""


@dataclass(frozen=True)
class Form:
    """Matrices of the kinds in `keeps` run as they are stored, all others as `becomes`; rows that
    are no whole blocks of it as bfloat16. Where that is for the C++ kernels' sake, those of `WIDER`
    run as Q8_0, in fewer bytes and with the same values. An embedding of which rows alone are
    wanted keeps its kind.
    """

    name: str
    keeps: tuple[str, ...]
    becomes: str

    @property
    def needs_kernels(self) -> bool:
        """Whether it is there for the C++ kernels' sake."""
        return self.keeps != STORED

    def kind_of(self, kind: str, num_columns: int) -> str:
        """What a matrix runs as, by what it is stored as."""
        if kind in self.keeps:
            return kind
        if kind in WIDER and self.needs_kernels:
            return "Q8_0"
        return self.becomes if QUANT_TYPES[self.becomes].fits(num_columns) else "BF16"


FORMS = {
    form.name: form
    for form in (
        Form("stored", STORED, "BF16"),
        Form("native", FAST, "BF16"),
        # Our own int8 is Q8_0: a float16 scale for 32 values, 8.5 bits each.
        Form("int8", FAST[1:], "Q8_0"),
    )
}


def num_columns(stored: StoredBytes) -> int:
    """Values of a row."""
    num_bytes = stored.codes_RB.shape[1]
    if stored.kind == FP8:
        return num_bytes
    kind = QUANT_TYPES[stored.kind]
    return num_bytes // kind.block_bytes * kind.block_values


def made(stored: StoredBytes, kind: str) -> StoredBytes:
    """The matrix as another kind; RorqualError for values that it cannot hold."""
    if kind == stored.kind:
        return stored
    columns, num_rows = num_columns(stored), len(stored.codes_RB)
    if stored.kind in WIDER and kind == "Q8_0":
        blocks = stored.codes_RB.reshape(-1, QUANT_TYPES[stored.kind].block_bytes)
        return StoredBytes(kind, as_q8_0(blocks, stored.kind).view(num_rows, -1))
    codes_RB = torch.empty(num_rows, QUANT_TYPES[kind].num_bytes(columns), dtype=torch.uint8)
    height = stored.block[0] if stored.kind == FP8 else 1
    step = max(1, PIECE_VALUES // columns // height) * height
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        values = _values(stored, start, stop)
        # Not `encode_blocks`, which refuses what bfloat16 makes infinite: as any cast.
        is_cast = kind == "BF16"
        codes = as_bytes(values.bfloat16()) if is_cast else encode_blocks(values, kind)
        codes_RB[start:stop] = codes
    return StoredBytes(kind, codes_RB)


def _values(stored: StoredBytes, start: int, stop: int) -> Tensor:
    """Rows in float32; of FP8 `start` begins a block."""
    codes, height = stored.codes_RB[start:stop].contiguous(), stored.block[0]
    if stored.scales_XY is None:
        return decode_blocks(codes, stored.kind)
    scales = stored.scales_XY[start // height : num_blocks(stop, height)]
    values = codes.view(torch.float8_e4m3fn)
    return dequantise_into(torch.empty(codes.shape), values, scales, stored.block)


def note_of(form: Form, changes: Counter[tuple[str, str]]) -> str | None:
    """What became of how many matrices, (stored, run) -> number; None if all are as stored."""
    if not changes:
        return None
    told = {kind: _counts(kind, changes) for kind in (form.becomes, "BF16", "Q8_0")}
    parts = []
    if counts := told[form.becomes]:
        parts.append(f"matrices run as {form.becomes}: {counts}")
    if form.becomes != "BF16" and (counts := told["BF16"]):
        why = f"their rows are no whole blocks of {form.becomes}"
        parts.append(f"matrices run as BF16, since {why}: {counts}")
    if form.becomes != "Q8_0" and (counts := told["Q8_0"]):
        parts.append(f"matrices run as Q8_0, with the same values: {counts}")
    return f"{'; '.join(parts)} (dtype {form.name})"


def _counts(kind: str, changes: Counter[tuple[str, str]]) -> str:
    found = sorted((stored, number) for (stored, run), number in changes.items() if run == kind)
    return listing([f"{number:,} of {stored}" for stored, number in found])
