"""Log-probabilities as users see them: of the model's own distribution, before any setting."""

# N rows of logits, V vocabulary, K alternatives

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.device import tensor_on

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenLogprob:
    """`top` are the likeliest ids with their log-probabilities, the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(
    logits_NV: Tensor,
    token_ids: Sequence[int],
    num_top: int,
    vocab_size: int,
    *,
    is_row_by_row: bool = False,
) -> tuple[TokenLogprob, ...]:
    """Row n's float32 logits say how likely `token_ids[n]` was, beside `num_top` alternatives.

    This is the softmax at temperature 1 over the tokenizer's ids; what never can be sampled has no
    part in it. `is_row_by_row`: to the last bit the same whatever rows there are.
    """
    step = 1 if is_row_by_row else ROWS_AT_ONCE
    assert len(logits_NV) == len(token_ids), "one row of logits for each id"
    return tuple(
        row
        for start in range(0, len(token_ids), step)
        for row in _rows(
            logits_NV[start : start + step, :vocab_size],
            token_ids[start : start + step],
            min(num_top, vocab_size),
        )
    )


def _rows(logits_NV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    ids_N = tensor_on(logits_NV.device, token_ids, torch.int64)
    total_N1 = logits_NV.float().logsumexp(-1, keepdim=True)
    chosen_N1 = logits_NV.gather(-1, ids_N[:, None]) - total_N1
    top_NK, top_ids_NK = logits_NV.topk(num_top, dim=-1)
    # One copy from the device; float64 holds ids and float32 exactly.
    read = torch.cat([chosen_N1.double(), (top_NK - total_N1).double(), top_ids_NK.double()], -1)
    return [
        TokenLogprob(
            token_id,
            row[0],
            tuple(zip(map(int, row[1 + num_top :]), row[1 : 1 + num_top], strict=True)),
        )
        for token_id, row in zip(token_ids, read.tolist(), strict=True)
    ]
