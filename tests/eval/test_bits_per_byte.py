"""Bits per byte of two held-out texts of unlike length. Oracle: each part by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import rorqual
from rorqual.data.shards import FORMAT
from rorqual.errors import DataError
from rorqual.eval import NgramModel, SourceResult, compare_on_held_out
from rorqual.eval.bits_per_byte import documents

TRAIN = ("The whale sings.", "The sea is deep and the whale is large.")
HELD_OUT = ("The sea sings.", "A whale is large, and sings in the deep sea all night and all day.")
LENGTH = 64
FLOAT32 = 1e-4  # float32 logits of one sample, summed in another order


def write(folder: Path, ids: list[int]) -> None:
    folder.mkdir(parents=True)
    np.array(ids, dtype="<u2").tofile(folder / "0.tokens")
    manifest = {
        "format": FORMAT, "dtype": "<u2", "has_mask": False, "num_tokens": len(ids),
        "text_bytes": 1, "tokenizer": "t", "shards": [{"name": "0", "num_tokens": len(ids)}],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_each_source_and_all_of_them_by_their_bytes(tmp_path: Path) -> None:
    model, tokenizer = rorqual.load("tiny"), rorqual.load_tokenizer("tiny")
    ngram = NgramModel(5)
    ngram.add(text.encode() for text in TRAIN)
    wanted: list[tuple[float, ...]] = []
    folders: list[Path] = []
    for number, (train, held_out) in enumerate(zip(TRAIN, HELD_OUT, strict=True)):
        folders.append(tmp_path / str(number))
        for split, text in (("train", train), ("held_out", held_out)):
            ids = [tokenizer.bos_id, *tokenizer.encode(text, False), tokenizer.eos_id]
            write(folders[-1] / split, ids)
        size = len(held_out.encode())
        with torch.no_grad():
            log_p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        nats = -sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 2))  # the end is no text
        packed = 8 * len(gzip.compress(held_out.encode(), 9))
        bits = (nats / math.log(2), ngram.bits(held_out.encode()), packed)
        wanted.append((size, *bits))
    found = compare_on_held_out(model, tokenizer, folders, LENGTH)
    wanted.append(tuple(map(sum, zip(*wanted, strict=True))))
    assert [result.source for result in found] == ["0", "1", "all"]
    for result, (size, *bits) in zip(found, wanted, strict=True):
        assert result.num_bytes == size
        assert figures(result) == pytest.approx(tuple(b / size for b in bits), rel=FLOAT32)


def figures(result: SourceResult) -> tuple[float, float, float]:
    return result.model, result.ngram, result.gzip


def test_documents_end_where_their_end_is(tmp_path: Path) -> None:
    """Over two shards; what a shard breaks off is none, and special tokens are no text."""
    tokenizer = rorqual.load_tokenizer("tiny")
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    texts = ("One.", "", "Two words.")
    ids = [i for text in texts for i in (begin, *tokenizer.encode(text), end)]
    write(tmp_path / "a", [*ids, begin, *tokenizer.encode("cut")])
    assert list(documents(tmp_path / "a", tokenizer)) == [text.encode() for text in texts]


def test_a_source_without_held_out_text_is_left_out(tmp_path: Path) -> None:
    model, tokenizer = rorqual.load("tiny"), rorqual.load_tokenizer("tiny")
    ids = [tokenizer.bos_id, *tokenizer.encode("The sea."), tokenizer.eos_id]
    for name, held_out in (("a", []), ("b", ids), ("c", [tokenizer.bos_id, tokenizer.eos_id])):
        write(tmp_path / name / "train", ids)
        write(tmp_path / name / "held_out", held_out)
    folders = [tmp_path / name for name in "abc"]
    found = compare_on_held_out(model, tokenizer, folders, LENGTH)
    assert [(result.source, result.num_bytes) for result in found] == [("b", 8), ("all", 8)]
    with pytest.raises(DataError, match="no source has held-out text"):
        compare_on_held_out(model, tokenizer, folders[::2], LENGTH)
