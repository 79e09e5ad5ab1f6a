"""Deduplication, held-out split, limits and permutations against plain Python."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.data.corpus import Document
from rorqual.data.selection import (
    HASH,
    document_hash,
    first_occurrences,
    held_out_mask,
    limited,
    mix,
    permutation,
    scan_file,
)

SHARE_TOLERANCE = 0.005  # four standard deviations of 100,000 draws at 10 %


def _hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (count, 2), np.uint64).view(HASH)[:, 0]


def test_hash_ignores_white_space_and_unicode_form_only() -> None:
    same = ["caf\u00e9  au lait\n", "cafe\u0301 au\tlait"]
    assert len({document_hash(Document(text=text)) for text in same}) == 1
    assert document_hash(Document(text="Café au lait")) != document_hash(Document(text=same[0]))
    chat = [{"role": "user", "content": "x"}]
    assert document_hash(Document(messages=chat)) != document_hash(Document(text="x"))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))))
def test_first_occurrences_equal_a_set(values: list[tuple[int, int]]) -> None:
    hashes = np.array(values, dtype=HASH)
    seen: set[tuple[int, int]] = set()
    expected = [not (value in seen or seen.add(value)) for value in values]
    assert first_occurrences(hashes).tolist() == expected


def test_held_out_share_is_stable_under_order() -> None:
    hashes = _hashes(100_000)
    mask = held_out_mask(hashes, 0.1, seed=3)
    assert abs(mask.mean() - 0.1) < SHARE_TOLERANCE
    order = np.random.default_rng(1).permutation(len(hashes))
    assert (held_out_mask(hashes[order], 0.1, seed=3) == mask[order]).all()
    assert (held_out_mask(hashes, 0.1, seed=4) != mask).any()
    assert not held_out_mask(hashes, 0.0, 3).any()
    assert held_out_mask(hashes, 1.0, 3).all()
    assert (held_out_mask(hashes, 0.2, 3) >= mask).all()  # a larger share keeps the smaller one


def test_limits() -> None:
    hashes, sizes = _hashes(1000), np.full(1000, 10, np.uint32)
    kept = np.arange(1000) % 2 == 0
    by_count = limited(hashes, sizes, kept, max_documents=50, max_bytes=None)
    by_bytes = limited(hashes, sizes, kept, max_documents=None, max_bytes=505)
    assert (by_count == by_bytes).all()
    assert (limited(hashes, sizes, kept, None, max_bytes=500) == by_count).all()  # just filled
    assert limited(hashes, sizes, kept, None, max_bytes=499).sum() == 49
    lowest = sorted(tuple(int(n) for n in hashes[i]) for i in np.flatnonzero(kept))[:50]
    assert sorted(tuple(int(n) for n in row) for row in hashes[by_count]) == lowest
    assert limited(hashes, sizes, kept, max_documents=7, max_bytes=500).sum() == 7
    assert limited(hashes, sizes, kept, max_documents=60, max_bytes=500).sum() == 50
    assert by_count.sum() == 50
    assert (by_count <= kept).all()
    assert (limited(hashes, sizes, kept, None, None) == kept).all()


def test_splitmix64_against_its_published_stream() -> None:
    # The first outputs of splitmix64 from state 1234567, as published by its authors.
    stream = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = 1234567
    for expected in stream:
        assert int(mix(np.uint64(state))) == expected
        state = (state + 0x9E3779B97F4A7C15) % 2**64


def test_permutation_is_one_and_depends_on_every_seed() -> None:
    first = permutation(1000, 1, 2)
    assert sorted(first) == list(range(1000))
    assert (permutation(1000, 1, 2) == first).all()
    assert (permutation(1000, 2, 1) != first).any()
    assert (permutation(1000, 1, 3) != first).any()


def test_a_scan_counts_and_tells_conversations(tmp_path: Path) -> None:
    """Of a conversation the assistant's bytes count; one among texts is enough for a mask."""
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": "Ü."},
        {"role": "assistant", "content": None},
    ]
    chat[2]["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    path = tmp_path / "a.jsonl"
    for records, sizes in (
        ([{"text": "é"}, {"text": ""}], [2, 0]),
        ([{"messages": chat}, {"text": "abc"}], [3, 3]),
        ([{"text": "abc"}, {"messages": chat}], [3, 3]),
    ):
        path.write_text("\n".join(json.dumps(record) for record in records))
        scan = scan_file(path)
        assert scan.text_bytes.tolist() == sizes
        assert scan.has_messages == any("messages" in record for record in records)
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        assert scan.digest == digest
        first = document_hash(
            Document(text=records[0].get("text"), messages=records[0].get("messages"))
        )
        assert scan.hashes[:1].tobytes() == first


def test_the_hash_of_a_block_covers_all_before_it_in_its_own_text(tmp_path: Path) -> None:
    """Equal blocks differ by what stands before them, and texts do not touch each other."""
    (tmp_path / "a.txt").write_text("123456789\n" * 3)
    alone = scan_file(tmp_path / "a.txt", block_characters=10).hashes
    assert len(set(alone.tolist())) == len(alone) == 3
    block = document_hash(Document(text="123456789\n"))
    chained = hashlib.blake2b(block + block, digest_size=16).digest()
    assert alone[0].tobytes() == block
    assert alone[1].tobytes() == chained
    assert alone[2].tobytes() == hashlib.blake2b(chained + block, digest_size=16).digest()


@pytest.mark.parametrize("seeds", [(), (0,), (3, 1, 2), (-1, 2**63), (2**64 + 3,)])
def test_a_permutation_is_the_order_of_numbers_mixed_with_the_seeds(seeds: tuple[int, ...]) -> None:
    """splitmix64 in Python's own integers: the order of training may never change."""

    def mixed(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    key = 0
    for seed in seeds:
        key = mixed(key ^ seed % 2**64)
    assert permutation(50, *seeds).tolist() == sorted(range(50), key=lambda n: mixed(n ^ key))
