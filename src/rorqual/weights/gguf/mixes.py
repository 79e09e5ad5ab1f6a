"""Which tensor of a GGUF file gets which type: llama.cpp's mixes, and unsloth's two of 2 bits.

Source: llama_tensor_get_type of llama.cpp's src/llama-quant.cpp as of early 2025, and the cards of
unsloth/DeepSeek-V3-GGUF. Norms, biases and the router's gate stay F32 in every mix. Rows that are
no whole blocks of a type fall back to another (`FALLBACK`), and to F16 where that does not fit
either. Choice: llama.cpp's exceptions for models of exactly eight experts (Mixtral) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.ops.quant_types import QUANT_TYPES, QuantType
from rorqual.weights.gguf.names import gguf_tensors
from rorqual.weights.planned import PlannedTensor

Rule = Literal["first_sixteenth", "more_bits"]


@dataclass(frozen=True)
class Mix:
    """`base` is every matrix's type but those named here.

    `ffn_down` gets `down`, or `important_down` in the layers that `rule` chooses. `file_type` is
    llama.cpp's number for `general.file_type`.
    """

    name: str
    file_type: int
    base: str
    output: str
    embedding: str
    attn_output: str
    down: str
    important_down: str | None = None
    rule: Rule | None = None


def _same(name: str, file_type: int) -> Mix:
    return Mix(name, file_type, name, name, name, name, name)


MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        _same("F32", 0),
        _same("F16", 1),
        _same("BF16", 32),
        _same("Q8_0", 7),
        _same("Q6_K", 18),
        # name, file type, base, output, embedding, attn_output, down, important down, rule
        Mix("Q5_K_M", 17, "Q5_K", "Q6_K", "Q5_K", "Q5_K", "Q5_K", "Q6_K", "more_bits"),
        Mix("Q4_K_M", 15, "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K", "more_bits"),
        Mix("Q3_K_M", 12, "Q3_K", "Q6_K", "Q3_K", "Q4_K", "Q4_K", "Q5_K", "first_sixteenth"),
        Mix("Q2_K_L", 10, "Q2_K", "Q6_K", "Q4_K", "Q3_K", "Q3_K"),
        Mix("Q2_K_XS", 10, "Q2_K", "Q6_K", "Q4_K", "Q2_K", "Q2_K"),
    )
}
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
KEPT_F32 = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|(?<!\.weight)$")
_BLOCK = re.compile(r"blk\.(\d+)\.")


def mix_of(name: str) -> Mix:
    """The mix of that name; UsageError lists the ones there are."""
    if name.upper() not in MIXES:
        raise UsageError(f"no GGUF mix {name!r}", expected=", ".join(MIXES))
    return MIXES[name.upper()]


def type_of(
    mix: Mix, name: str, shape: Sequence[int], num_blocks: int, *, is_tied: bool = False
) -> QuantType:
    """The type of a tensor of a file of `num_blocks` blocks; `shape` is outermost first.

    A tied embedding is the output too and gets its type.
    """
    if len(shape) < 2 or KEPT_F32.search(name):
        return QUANT_TYPES["F32"]
    wanted = _wanted(mix, name, num_blocks, is_tied)
    if QUANT_TYPES[wanted].fits(shape[-1]):
        return QUANT_TYPES[wanted]
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    other = "Q8_0" if is_output and wanted in FALLBACK else FALLBACK.get(wanted, wanted)
    return QUANT_TYPES[other if QUANT_TYPES[other].fits(shape[-1]) else "F16"]


def planned_gguf(
    config: ModelConfig, mix: str, *, is_split_mla: bool = True
) -> list[PlannedTensor]:
    """Every tensor of such a file with its type, in the order of the file."""
    chosen, num_blocks, is_tied = (
        mix_of(mix),
        config.num_layers_with_mtp,
        config.tie_word_embeddings,
    )

    def dtype_of(name: str, shape: tuple[int, ...]) -> str:
        return type_of(chosen, name, shape, num_blocks, is_tied=is_tied).name

    return list(gguf_tensors(config, dtype_of, is_split=is_split_mla))


def gguf_bytes(config: ModelConfig, mix: str) -> int:
    """Bytes of the tensors of such a file."""
    return sum(tensor.num_bytes for tensor in planned_gguf(config, mix))


def _wanted(mix: Mix, name: str, num_blocks: int, is_tied: bool) -> str:
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return mix.output
    if name == "token_embd.weight":
        return mix.embedding
    if "attn_output.weight" in name:
        return mix.attn_output
    if "ffn_down" in name:
        block = _BLOCK.match(name)
        is_important = block is not None and _is_important(mix.rule, int(block[1]), num_blocks)
        return mix.important_down if is_important and mix.important_down else mix.down
    return mix.base


def _is_important(rule: Rule | None, block_id: int, num_blocks: int) -> bool:
    if rule == "first_sixteenth":
        return block_id < num_blocks // 16
    if rule == "more_bits":
        eighth = num_blocks // 8
        is_outer = block_id < eighth or block_id >= 7 * num_blocks // 8
        return is_outer or (block_id - eighth) % 3 == 2
    return False
