"""Causal attention with key and value widths that differ, as MLA needs (report §2.1.1).

On the CPU these are explicit matrix products: torch's fused attention falls back to a slower path
there when the value is narrower than the key. Long inputs are taken in blocks of queries, so that
the scores never need more than a block's memory. On a GPU torch's fused kernels never write scores.
"""

# B batch, H heads (queries), G heads (keys: H, or 1 for all), T queries, S keys, C key width,
# V value width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 1024
CAUSAL_BLOCK = 128  # Choice: queries of a block; keys behind the block are not multiplied.
# Choice: on a GPU few queries that share one key, a decode step, stay two plain products up to this
# many scores: a fused kernel would give all heads' work to the few blocks that one key head makes.
EXPLICIT_SCORES = 1 << 26


def attention(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T, where visible) v -> (B, H, T, V) in v's dtype; the softmax is float32.

    `visible` is boolean and broadcasts to (B, 1, T, S): which keys a query may see. None means
    causal: the queries are the last T of the S tokens, and query t sees keys 0..S - T + t.
    """
    if not q_BHTC.is_cpu and not _is_small(q_BHTC, k_BGSC):
        return fused_attention(q_BHTC, k_BGSC, v_BGSV, visible, scale)
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


def attention_plain(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """The twin: all scores at once."""
    num_queries, num_keys = q_BHTC.shape[2], k_BGSC.shape[2]
    if visible is None:
        visible = _causal_mask(num_keys - num_queries, num_keys, q_BHTC.device)
    scores_BHTS = scale * (q_BHTC @ k_BGSC.transpose(-1, -2))
    scores_BHTS = scores_BHTS.masked_fill(~visible, float("-inf"))
    return scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BGSV.dtype) @ v_BGSV


def fused_attention(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """`attention` by torch's `scaled_dot_product_attention`, for GPUs."""
    num_heads, num_queries = q_BHTC.shape[1:3]
    num_before, width = k_BGSC.shape[2] - num_queries, v_BGSV.shape[3]
    is_whole = visible is None and num_before == 0
    if visible is None and not is_whole and num_queries > 1:
        # torch's own causal mask counts from the first key where queries are fewer than keys.
        visible = _causal_mask(num_before, num_before + num_queries, q_BHTC.device)
    # Choice: flash attention, the fastest of torch's kernels, takes no mask and wants one width,
    # so values are padded for it; the others take narrower values as they are.
    num_padded = q_BHTC.shape[3] - width if is_whole and q_BHTC.dtype.itemsize == 2 else 0
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTC,
        k_BGSC.expand(-1, num_heads, -1, -1),
        F.pad(v_BGSV, (0, num_padded)).expand(-1, num_heads, -1, -1),
        attn_mask=visible,
        is_causal=is_whole,
        scale=scale,
    )
    return out_BHTV[..., :width]


def _is_small(q_BHTC: Tensor, k_BGSC: Tensor) -> bool:
    num_scores = q_BHTC.shape[:3].numel() * k_BGSC.shape[2]
    return k_BGSC.shape[1] == 1 and num_scores <= EXPLICIT_SCORES


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_queries = q.shape[2]
    num_before = k.shape[2] - num_queries
    if num_queries <= 1:
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
