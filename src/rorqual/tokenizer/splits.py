"""The pre-tokenizers of DeepSeek's family, under the names that llama.cpp gave them.

A pre-tokenizer cuts a text before byte pairs are merged; each expression cuts the pieces that the
one before it left. Sources: the `tokenizer.json` of DeepSeek-LLM (and V2), DeepSeek-Coder and V3,
and for Kimi-K2 and Moonlight the one expression of their tiktoken tokenizers (identical in both;
llama.cpp approximates it: it does not part words where the case changes).
"""

from __future__ import annotations

from typing import Any

from rorqual.tokenizer.special import (
    SPLIT_CHINESE_JAPANESE,
    SPLIT_NUMBERS,
    SPLIT_WORDS,
    byte_level,
)

_LETTERS = (  # of the alphabets that have case
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ"
    "-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK"
    "-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-"
    "𐳲𑢠-𑣟𞤀-𞥃"
)
_PUNCTUATION = "!-/:-~！-／：-～‘-‟\u3000-。"
_CHINESE_KOREAN = "[一-龥ࠀ-一가-퟿]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_SPLIT = (
    r"[\p{Han}]+"
    f"|{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}"
    f"|{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

V3 = "deepseek-v3"
SPLITS: dict[str, tuple[str, ...]] = {
    V3: (SPLIT_NUMBERS, SPLIT_CHINESE_JAPANESE, SPLIT_WORDS),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_LETTERS}]+",
        rf"\s?[{_PUNCTUATION}]+",
        r"\s+$",
        _CHINESE_KOREAN,
        r"\p{N}+",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}"),
    "kimi-k2": (KIMI_SPLIT,),
}
WHOLE_PIECES_FIRST = ("kimi-k2",)
"""tiktoken takes a piece that is a token as it is, before any merge."""


def pre_tokenizer_of(name: str) -> dict[str, Any]:
    """The pre-tokenizer of that name, as `tokenizer.json` writes it."""
    return pre_tokenizer(*SPLITS[name])


def pre_tokenizer(*expressions: str) -> dict[str, Any]:
    """Cuts by one expression after the other, then writes bytes as letters."""
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level(trim_offsets=True)]}
