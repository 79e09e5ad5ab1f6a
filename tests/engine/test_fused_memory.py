"""What a step in one call needs beside weights and cache. Oracle: the process's own peak."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_fused import native_model

import small
from rorqual.engine.flat_step import Span
from rorqual.engine.invariant import InvariantRunner
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.ops import native
from rorqual.ops.memory import peak_bytes

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them"),
    pytest.mark.skipif(sys.platform != "linux", reason="the system says the peak"),
]
MANY = small.SMALL.with_changes(
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    num_attention_heads=32,
    kv_lora_rank=512,
)
"""64 kB of sums a token and chunk of its past."""
NUM_TOKENS = 600


def test_many_tokens_that_attend_absorbed_keep_few_sums(tmp_path: Path) -> None:
    """Those of all of them would be 200 MB; and where they are cut shows in no bit."""
    model = native_model(MANY, tmp_path)
    cache = PagedLatentCache(model.config, (64, 16), "bf16", torch.empty(0))
    runner, ids = (
        InvariantRunner(model, cache, spare_block=60),
        [3 + i % 90 for i in range(NUM_TOKENS)],
    )
    blocks = range(50)
    runner.run([Span(ids[:1], 0, blocks)])
    before = peak_bytes()
    whole = runner.run([Span(ids, 0, blocks)])[0]
    grown = (peak_bytes() or 0) - (before or 0)
    a_row = NUM_TOKENS * MANY.num_attention_heads * 4  # bytes, for each number of a head
    needed = a_row * (2 * MANY.kv_lora_rank + 2 * MANY.qk_head_dim + 3 * MANY.v_head_dim)
    assert grown < needed + (64 << 20)
    parts = [runner.run([Span(ids[a:b], a, blocks)])[0] for a, b in ((0, 1), (1, 250), (250, 600))]
    assert torch.equal(torch.cat(parts), whole)
