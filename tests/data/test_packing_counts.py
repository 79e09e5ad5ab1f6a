"""What the packing says of itself. Oracle: the sentences written out by hand."""

from __future__ import annotations

from rorqual.data.packing import PackingCounts


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
    assert ", 1 targets (raise" in lost
    assert str(PackingCounts()).startswith("an epoch learns 0 % of 0 targets; 0 documents in 0 ")
