"""What the packing says of itself, and of documents without turns. Oracle: written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rorqual.data import Isolation, Loader
from rorqual.data.packing import PackingCounts
from rorqual.data.shards import FORMAT

BEGIN = 7


def one_document(path: Path, mask: list[int] | None, num_tokens: int = 100) -> Path:
    path.mkdir()
    tokens = np.array([BEGIN, *range(100, 99 + num_tokens)], dtype="<u2")
    tokens.tofile(path / "0.tokens")
    if mask is not None:
        np.array(mask, dtype=np.uint8).tofile(path / "0.mask")
    manifest = {
        "format": FORMAT, "dtype": "<u2", "has_mask": mask is not None, "num_tokens": num_tokens,
        "text_bytes": 1, "tokenizer": "t", "shards": [{"name": "0", "num_tokens": num_tokens}],
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("speakers", [{}, {"user_id": 3, "assistant_id": 4}])
def test_a_conversation_without_turns_keeps_its_beginning(
    tmp_path: Path, speakers: dict[str, int]
) -> None:
    path = one_document(tmp_path / "a", [0] * 10 + [1] * 90)
    loader = Loader([(path, 1.0)], 64, isolation=Isolation(BEGIN, is_whole=True, **speakers))
    assert loader.batch(0, 1).tokens_BS.tolist() == [[BEGIN, *range(100, 164)]]
    assert loader.packing == PackingCounts(1, 1, 1, 90, 55, 1, 65, 65)


def test_a_folder_of_texts_alone_is_packed_too(tmp_path: Path) -> None:
    """All tokens but the first are targets: 99 in pieces of 65 and 36, which share one."""
    path = one_document(tmp_path / "a", None)
    loader = Loader([(path, 1.0)], 64, isolation=Isolation(BEGIN, is_whole=True))
    assert loader.packing == PackingCounts(1, 1, 0, 99, 99, 2, 101, 130)
    assert sorted(row[0] for row in loader.batch(0, 2).tokens_BS.tolist()) == [BEGIN, 163]


def test_the_counts_in_words() -> None:
    """By hand. A share is rounded down; there may be nothing at all."""
    counts = PackingCounts(
        num_documents=1200, num_targets=30_000, num_learnt=30_000, num_samples=1000,
        num_tokens=45_000, num_places=50_000,
    )  # fmt: skip
    assert str(counts) == (
        "an epoch learns 100 % of 30,000 targets; 1,200 documents in 1,000 samples, 10.0% padding"
    )
    lost = str(counts + PackingCounts(num_split=3, num_cut=2, num_targets=1, num_samples=1))
    assert lost.startswith("an epoch learns 99.99 % of 30,001 targets; 1,200 documents in 1,001 ")
    assert "; 3 too long for a sample were split; 2 have a turn" in lost
    assert ", 1 target (raise" in lost
    assert str(PackingCounts()).startswith("an epoch learns 0 % of 0 targets; 0 documents in 0 ")
    few = str(PackingCounts(num_documents=4, num_samples=1, num_places=1))
    assert "4 documents in 1 sample, " in few
    one = PackingCounts(1, 1, 1, 2, 1, 2)
    assert "of 2 targets; 1 document in 2 samples, " in str(one)
    assert "; 1 too long for a sample was split; 1 has a turn" in str(one)
