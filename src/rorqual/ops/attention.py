"""Causal attention with key and value widths that differ, as MLA needs (report §2.1.1).

Explicit matrix products: torch's fused attention falls back to a slower path on CPU when the value
is narrower than the key. Long inputs are taken in blocks of queries, so that the scores never need
more than a block's memory.
"""

# B batch, H heads (queries), G heads (keys: H, or 1 for all), T queries, S keys, C key width,
# V value width

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops.linear import widens

QUERY_BLOCK = 1024
CAUSAL_BLOCK = 128  # Choice: keys behind a block of so many queries are not even multiplied.


def attention(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T, where visible) v -> (B, H, T, V) in v's dtype; the softmax is float32.

    `visible` is boolean and broadcasts to (B, 1, T, S): which keys a query may see. None means
    causal: the queries are the last T of the S tokens, and query t sees keys 0..S - T + t.
    """
    if widens(k_BGSC):
        wide = attention(q_BHTC.float(), k_BGSC.float(), v_BGSV.float(), visible, scale)
        return wide.to(v_BGSV.dtype)
    q_BHTC = q_BHTC * scale
    num_queries = q_BHTC.shape[2]
    if visible is None:
        return _causal(q_BHTC, k_BGSC, v_BGSV)
    if num_queries <= QUERY_BLOCK:
        return _attend(q_BHTC, k_BGSC, v_BGSV, visible)
    blocks = [
        _attend(q, k_BGSC, v_BGSV, seen)
        for q, seen in zip(
            q_BHTC.split(QUERY_BLOCK, 2), visible.split(QUERY_BLOCK, -2), strict=True
        )
    ]
    return torch.cat(blocks, dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_queries = q.shape[2]
    num_before = k.shape[2] - num_queries
    if num_queries == 1:
        return _attend(q, k, v, None)
    blocks = []
    for start in range(0, num_queries, CAUSAL_BLOCK):
        stop = min(start + CAUSAL_BLOCK, num_queries)
        seen = num_before + stop
        visible = _causal_mask(num_before + start, seen, q.device)
        blocks.append(_attend(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], visible))
    return torch.cat(blocks, dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    heads_and_queries = q.shape[1:3]
    is_multi_query = k.shape[1] == 1 and q.shape[1] > 1
    if is_multi_query:  # one product for all heads; a broadcast one would copy the keys for each
        q = q.flatten(1, 2)[:, None]
    scores = q @ k.transpose(-1, -2)
    if is_multi_query:
        scores = scores[:, 0].unflatten(1, heads_and_queries)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    if is_multi_query:
        return (probs.flatten(1, 2)[:, None] @ v)[:, 0].unflatten(1, heads_and_queries)
    return probs @ v


def _causal_mask(start: int, stop: int, device: torch.device) -> Tensor:
    """(stop - start, stop) boolean: row i, the token at start + i, sees keys 0..start + i."""
    ones = torch.ones(stop - start, stop, dtype=torch.bool, device=device)
    return ones.tril(diagonal=start)
