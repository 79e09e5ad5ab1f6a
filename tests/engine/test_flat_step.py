"""Oracle: `model.flops`, which counts both forms of MLA in closed form."""

from __future__ import annotations

import pytest

from rorqual.engine.flat_step import is_absorbed_cheaper
from rorqual.model import preset


def test_decode_is_absorbed_and_a_fresh_prompt_expanded() -> None:
    config = preset("671b")
    for num_slots in (1, 10, 1000, 100_000):
        assert is_absorbed_cheaper(config, 1, num_slots)
    for length in (2, 100, 4096):
        assert not is_absorbed_cheaper(config, length, length)


@pytest.mark.parametrize("num_queries", [2, 8, 64, 512])
def test_a_longer_past_speaks_for_the_latent(num_queries: int) -> None:
    """Expanded pays for each slot once; that is too much where few queries look at many."""
    config = preset("671b")
    is_absorbed = [
        is_absorbed_cheaper(config, num_queries, num_slots)
        for num_slots in range(num_queries, 20_000, 50)
    ]
    assert is_absorbed == sorted(is_absorbed), "there is one turning point at most"
    # 170 queries: C (N + V) / (2 C - N - V), from which on expanded wins at any length.
    assert is_absorbed[-1] == (num_queries < 170)
