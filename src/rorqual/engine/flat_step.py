"""A flat step: tokens of many sequences in one row, without padding.

Long pieces of text (prefill chunks) and sequences with a long past attend alone. The others, with
equally many tokens, attend together: only there, in the slots, short ones are padded and masked.
"""

# M tokens of the step, B sequences of a part, T tokens of each, S slots, P blocks

from __future__ import annotations

from array import array
from collections import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.engine.paged_cache import PagedLatentCache, Reach, StepView
from rorqual.model import ModelConfig
from rorqual.model.fused import PagedTokens
from rorqual.ops.device import tensor_on

# Choice: a sequence with more tokens or slots gains nothing from attending with others, and makes
# them pad.
MAX_TOGETHER_TOKENS = 8
MAX_TOGETHER_SLOTS = 1024


class Span(NamedTuple):
    """Tokens of one sequence: the first belongs in slot `start` of the slots in `blocks`. They look
    at the slots from `first` on; at an MTP depth those below it are empty.
    """

    token_ids: abc.Sequence[int]
    start: int
    blocks: abc.Sequence[int]
    first: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class FlatStep:
    """Spans in the order in which they run; `order` holds their numbers in the caller's, `view` is
    the cache as this step sees it.
    """

    order: list[int]
    tokens_1M: Tensor
    positions_1M: Tensor
    view: StepView

    def split(self, x_1MD: Tensor, spans: abc.Sequence[Span]) -> list[Tensor]:
        """(1, M, D) -> each span's (T, D), in the caller's order."""
        if len(spans) == 1:
            return [x_1MD[0]]
        sizes = [len(spans[i].token_ids) for i in self.order]
        parts = dict(zip(self.order, x_1MD[0].split(sizes), strict=True))
        return [parts[i] for i in range(len(spans))]


def flat_step(
    spans: abc.Sequence[Span],
    cache: PagedLatentCache,
    config: ModelConfig,
    device: torch.device,
    depth: int = 0,
    *,
    is_together: bool = True,
) -> FlatStep:
    """What the model needs to run these spans, at an MTP depth or (0) through the main layers.

    Without `is_together` each attends alone to a copy of its past, in operators whose shapes no
    other span has a part in.
    """
    groups = _groups(spans) if is_together else [[i] for i in range(len(spans))]
    order = [i for group in groups for i in group]
    size = cache.block_tokens
    token_ids: list[int] = []
    positions, places = [], []
    for i in order:
        span = spans[i]
        slots = range(span.start, span.stop)
        token_ids += span.token_ids
        positions += [slot - depth for slot in slots]
        places += [span.blocks[slot // size] * size + slot % size for slot in slots]

    reaches = [_reach([spans[i] for i in group], size, config, device, depth) for group in groups]
    if not is_together:
        reaches = [replace(reach, first_block=None) for reach in reaches]
    # One copy to the device, so that a GPU's step begins with one.
    rows_3M = tensor_on(device, [token_ids, positions, places], torch.int64)
    return FlatStep(order, rows_3M[:1], rows_3M[1:2], StepView(cache, rows_3M[2], reaches))


def paged_tokens(
    spans: abc.Sequence[Span],
    cache: PagedLatentCache,
    config: ModelConfig,
    depth: int = 0,
    *,
    is_together: bool = True,
) -> PagedTokens:
    """The same for a call of whole layers. Without `is_together` all attend absorbed: one way of
    summing.
    """
    ids, numbers, tables = array("q"), array("q"), array("q")
    num_positions = 0
    for span in spans:
        token_ids, start, blocks, first = span
        num, first = len(token_ids), max(first, depth)
        is_absorbed = not is_together or is_absorbed_cheaper(config, num, start + num - first)
        numbers.extend((num, start, first, start - depth, len(tables), is_absorbed))
        ids.extend(token_ids)
        tables.extend(blocks)
        num_positions = max(num_positions, start + num - depth)
    return PagedTokens(ids, numbers, tables, num_positions, cache.block_tokens, cache.structs)


def joined(parts: abc.Sequence[Tensor]) -> Tensor:
    """(M, D): their rows one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def is_absorbed_cheaper(config: ModelConfig, num_queries: int, num_slots: int) -> bool:
    """Which form of MLA takes fewer multiply-adds a head for these queries (report §2.1.1).

    Expanded makes a key and a value of every slot; absorbed takes each query into the latent space
    and its output back, and multiplies with wider keys and values.
    """
    if num_queries == 1:
        return True
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    up = rank * (nope + value)
    expanded = num_slots * up + num_queries * num_slots * (nope + rope + value)
    absorbed = num_queries * up + num_queries * num_slots * (2 * rank + rope)
    return absorbed < expanded


def _groups(spans: abc.Sequence[Span]) -> list[list[int]]:
    """Numbers of the spans that attend together, a group a part."""
    together: dict[int, list[int]] = {}
    alone = []
    for i, span in enumerate(spans):
        num_tokens = len(span.token_ids)
        if num_tokens <= MAX_TOGETHER_TOKENS and span.stop <= MAX_TOGETHER_SLOTS:
            together.setdefault(num_tokens, []).append(i)
        else:
            alone.append([i])
    return [*together.values(), *alone]


def _reach(
    spans: list[Span], block_tokens: int, config: ModelConfig, device: torch.device, depth: int
) -> Reach:
    num_queries = len(spans[0].token_ids)
    stop = max(span.stop for span in spans)
    num_blocks = -(-stop // block_tokens)
    firsts = [max(span.first, depth) for span in spans]
    first = min(firsts)
    use_absorbed = is_absorbed_cheaper(config, num_queries, stop - first)
    # A shorter sequence is padded with its own blocks: what is masked need only be numbers.
    tables = [
        [*span.blocks[:num_blocks], *[span.blocks[0]] * (num_blocks - len(span.blocks))]
        for span in spans
    ]
    visible = None
    if len(spans) > 1:
        starts_B = tensor_on(device, [span.start for span in spans], torch.int64)
        last_BT = starts_B[:, None] + torch.arange(num_queries, device=device)
        firsts_B11 = tensor_on(device, firsts, torch.int64)[:, None, None]
        slots_S = torch.arange(first, stop, device=device)
        visible = ((slots_S <= last_BT[..., None]) & (slots_S >= firsts_B11))[:, None]
    return Reach(
        num_tokens=num_queries * len(spans),
        first=first,
        stop=stop,
        blocks_BP=tensor_on(device, tables, torch.int64),
        first_block=tables[0][0] if len(spans) == 1 and _are_neighbours(tables[0]) else None,
        visible=visible,
        use_absorbed=use_absorbed,
    )


def _are_neighbours(blocks: list[int]) -> bool:
    first = blocks[0]
    return blocks[-1] == first + len(blocks) - 1 and blocks == list(
        range(first, first + len(blocks))
    )
