"""Tokens of punctuation and line breaks in all their spellings are split (report §4.1).

Oracle: every id of the tokenizer, its bytes looked at by hand: marks, then line breaks.
"""

from __future__ import annotations

import random

import pytest

from rorqual.data.punctuation import PunctuationSplitter
from rorqual.tokenizer import Tokenizer, train_tokenizer

JOINED = (".\n", ".\r\n", "!\r\n", "。\n", "！\r\n", "?\n\n", " ;\r\n", "_\n")


@pytest.fixture(scope="module")
def joined() -> Tokenizer:
    return train_tokenizer([f"word{mark}" * 40 for mark in JOINED] * 3, 450)


@pytest.mark.parametrize("mark", JOINED)
def test_each_joined_token_is_split(joined: Tokenizer, mark: str) -> None:
    (token_id,) = joined.encode(mark)
    splitter = PunctuationSplitter(joined, 1.0)
    ids = splitter.split([token_id, token_id], random.Random(0))
    breaks = len(mark) - len(mark.rstrip("\r\n"))
    parts = [*joined.encode(mark[:-breaks]), *joined.encode(mark[-breaks:])]
    assert ids == parts * 2
    assert joined.decode(ids) == mark * 2


def test_no_other_token_is_touched(joined: Tokenizer) -> None:
    splitter = PunctuationSplitter(joined, 1.0)
    for token_id in range(joined.vocab_size):
        raw = joined.bytes_of_text(token_id)
        body = raw.rstrip(b"\r\n")
        text = body.decode("utf-8", errors="replace").removeprefix(" ")
        is_marks = bool(text) and not any(c.isspace() or (c.isalnum() and c != "_") for c in text)
        is_joined = body != raw and is_marks and "\ufffd" not in text
        assert (token_id in splitter.parts) == is_joined, raw
