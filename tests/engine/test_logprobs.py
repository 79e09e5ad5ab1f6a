"""Oracle: torch's log_softmax over the tokenizer's ids."""

from __future__ import annotations

import pytest
import torch

from rorqual.engine.logprobs import ROWS_AT_ONCE, token_logprobs

ROUNDING = 1e-5  # float32 logsumexp against float64
VOCAB_SIZE = 50


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_logprobs_are_those_of_the_softmax(num_top: int) -> None:
    num_rows = ROWS_AT_ONCE + 3
    logits_NV = 5 * torch.randn(num_rows, VOCAB_SIZE + 6)
    logits_NV[:, VOCAB_SIZE:] = 100  # rows beyond the tokenizer take no part
    ids = torch.randint(VOCAB_SIZE, (num_rows,)).tolist()
    expected_NV = logits_NV[:, :VOCAB_SIZE].double().log_softmax(-1)
    rows = token_logprobs(logits_NV, ids, num_top, VOCAB_SIZE)
    assert [row.token_id for row in rows] == ids
    for row, expected_V in zip(rows, expected_NV, strict=True):
        assert row.logprob == pytest.approx(expected_V[row.token_id].item(), abs=ROUNDING)
        values, top_ids = expected_V.topk(num_top)
        assert [token_id for token_id, _ in row.top] == top_ids.tolist()
        assert [value for _, value in row.top] == pytest.approx(values.tolist(), abs=ROUNDING)


def test_no_more_alternatives_than_tokens() -> None:
    (row,) = token_logprobs(torch.zeros(1, 4), [2], 20, 3)
    assert len(row.top) == 3
