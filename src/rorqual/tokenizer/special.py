"""The names of DeepSeek-V3's special tokens, and its pre-tokenizer.

Source: V3's `tokenizer.json`. The bars are U+FF5C and the word marks U+2581, so that no
keyboard types them by accident. `<think>` and `</think>` are the names that R1 and V3.1 gave to two
of V3's placeholders.
"""

from __future__ import annotations

from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
EOT = "<|EOT|>"
TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
TOOL_OUTPUTS_END = "<｜tool▁outputs▁end｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"

FIRST_SPECIALS = (BOS, EOS, PAD)
"""Ids 0, 1, 2, before the 256 bytes and the merges."""

LAST_SPECIALS = (
    THINK_BEGIN, THINK_END, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT,
    TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END,
    TOOL_OUTPUTS_BEGIN, TOOL_OUTPUTS_END, TOOL_OUTPUT_BEGIN, TOOL_OUTPUT_END, TOOL_SEP,
)  # fmt: skip
"""The last ids of the vocabulary, in V3's order (there 128798 to 128814)."""

HIDDEN_SPECIALS = (*FIRST_SPECIALS, EOT)
"""The ones that V3 flags `special`: other programs' `skip_special_tokens` drops just these."""

SPLIT_NUMBERS = r"\p{N}{1,3}"
SPLIT_CHINESE_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
SPLIT_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def byte_level(*, trim_offsets: bool) -> dict[str, Any]:
    """A ByteLevel step of `tokenizer.json` without a regex and without a leading space."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim_offsets,
        "use_regex": False,
    }
