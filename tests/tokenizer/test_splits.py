"""The pre-tokenizers of the family. Oracles: the `regex` module, one expression after the other,
and the ids that llama.cpp publishes beside its vocabularies.

With RORQUAL_LLAMA_CPP_VOCABS naming llama.cpp's folder `models`, the published ids are checked too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tokenizer.splits import KIMI_SPLIT, SPLITS, pre_tokenizer_of
from rorqual.weights.gguf.reader import load_gguf_tokenizer

VOCABS = os.environ.get("RORQUAL_LLAMA_CPP_VOCABS")
SAMPLES = [
    "", " ", "  \n \t\n", "Whales dive; we've seen 12345 of them!", "IT'S A WHALE'S life, HeLLo",
    "鲸鱼在1999年 游泳, 고래 クジラ", "µm Straße Ёлка ǅ ᾼ", "a\r\nb\rc", "...!?~`$+<=>^|",
    "  indented\n    more\n", "x²½Ⅷ٣", "é\u0301 👩‍🚀🐋 \u200b", "don't DON'T 'tis", "　全角！？",
    "tail   ", "\u00a0\u2003x", "CamelCaseWords和ABC中文abc", "한글 조선말", "1.5e-10, 0x1F",
]  # fmt: skip


def pieces_of(name: str, text: str) -> list[str]:
    """What `tokenizers` cuts, in letters that stand for bytes."""
    shell = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    shell["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": pre_tokenizer_of(name)["pretokenizers"][:-1],
    }
    cutter = tokenizers.Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
    return [piece for piece, _ in cutter.pre_tokenize_str(text)]


def oracle(name: str, text: str) -> list[str]:
    """Each expression cuts what the last one left; what lies between its hits stays as it is."""
    pieces = [text]
    for expression in SPLITS[name]:
        cut = []
        for piece in pieces:
            end = 0
            # `regex` lets $ stand before a last line break too.
            expression = r"\s+\Z" if expression == r"\s+$" else expression
            for hit in regex.finditer(expression, piece, regex.VERSION1):
                cut += [piece[end : hit.start()], hit.group()]
                end = hit.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("text", SAMPLES)
def test_samples_are_cut_as_the_expressions_say(name: str, text: str) -> None:
    assert pieces_of(name, text) == oracle(name, text)


# Characters that both libraries know from the same edition of Unicode.
letters = st.sampled_from(
    "abcXYZ éÉßµΣςЖжǅ 12½٣Ⅷ.,!?'`-_~$+<=> \t\n\r\u00a0\u3000鲸鱼クジ고래،🐋ʰـ\u0301"
)


@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(letters, max_size=30))
def test_any_text_is_cut_as_the_expressions_say(name: str, text: str) -> None:
    assert pieces_of(name, text) == oracle(name, text)


# By hand, from the expressions as published: what they do to digits, marks, line ends and Chinese.
BY_HAND = {
    "deepseek-llm": ["12345", "we|'|ve", " a|,| b", "a|\r|\n", "a|和|b"],
    "deepseek-coder": ["1|2|3|4|5", "we|'|ve", " a|,| b", "a|\r|\n", "a|和|b"],
    "deepseek-v3": ["123|45", "we|'ve", " a|,| b", "a|\r\n", "a|和|b"],
    "kimi-k2": ["123|45", "we've", " a|,| b", "a|\r\n", "a|和|b"],
}


def test_each_family_cuts_as_it_was_published() -> None:
    assert BY_HAND.keys() == SPLITS.keys()
    for name, cases in BY_HAND.items():
        for cut in cases:
            assert pieces_of(name, cut.replace("|", "")) == cut.split("|"), name


def test_kimi_parts_words_where_the_case_changes_and_before_chinese() -> None:
    assert pieces_of("kimi-k2", "CamelCase和ABC's") == ["Camel", "Case", "和", "ABC's"]
    assert KIMI_SPLIT.count("{Han}") == 5


@pytest.mark.skipif(VOCABS is None, reason="RORQUAL_LLAMA_CPP_VOCABS names no folder")
@pytest.mark.parametrize("name", ["deepseek-llm", "deepseek-coder"])
def test_published_ids(name: str) -> None:
    file = Path(str(VOCABS)) / f"ggml-vocab-{name}.gguf"
    texts = file.with_suffix(".gguf.inp").read_text(encoding="utf-8")
    lines = file.with_suffix(".gguf.out").read_text().splitlines()
    tokenizer = load_gguf_tokenizer(file)
    for text, line in zip(texts.split("\n__ggml_vocab_test__\n"), lines, strict=False):
        assert tokenizer.encode(text) == [int(token_id) for token_id in line.split()], text
    assert len(lines) > 40
