"""Sampling: from logits to token ids, many rows at once, each by its own settings.

A token costs one random number u: over the ids in their order, it is the first whose cumulative
weight exceeds u times the total. So what is drawn hardly depends on rounding, nor on whether tokens
come one by one or as verified drafts; `Engine` says what a seed promises.

A vocabulary is looked at in blocks of `BLOCK_PLACES` ids: what the filters leave nearly always lies
in the few blocks with the likeliest tokens, and only these are looked at closely.
"""

# N rows, M rows that are still open, V vocabulary, B blocks of P places, L blocks that are looked
# at, C places in them, K likeliest places

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.logit_changes import LogitChanges, change
from rorqual.engine.params import SamplingParams
from rorqual.errors import CheckpointError
from rorqual.ops.device import tensor_on

BLOCK_PLACES = 256
FEW_BLOCKS, FEW_PLACES, MANY_PLACES = 32, 128, 8192
"""Blocks, and likeliest places, that the filters look at before they look at more."""
BUCKET_BITS, NUM_BUCKETS = 15, 1 << 15
"""A weight's bucket is its float32 less this many bits: 256 buckets for each power of two."""
TILE_PLACES = {"cpu": 1 << 20}
"""Logits that are worked on at once: on a processor they should stay in its cache."""
MORE_PLACES = 1 << 24
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, eq=False)
class Row:
    """What one row of logits is sampled by."""

    params: SamplingParams
    uniform: float = 0.0
    changes: LogitChanges = field(default_factory=LogitChanges)

    def kind(self, vocab_size: int) -> tuple[bool, bool, bool]:
        """Whether its logits are changed, it is drawn, and something is filtered out."""
        params = self.params
        top_k, top_p = params.top_k or vocab_size, params.top_p or 1.0
        is_cut = top_k < vocab_size or top_p < 1 or bool(params.min_p)
        is_drawn = params.temperature > 0
        return self.changes.is_any, is_drawn, is_drawn and is_cut


def random_source(params: SamplingParams) -> torch.Generator:
    """The random numbers of one request: the same for the same seed, whatever runs beside it."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def check_finite(logits_NV: Tensor, total: float) -> None:
    """CheckpointError if the logits are not numbers. `total` is their sum."""
    # The sum finds nearly every fault in one pass; large logits may overflow it.
    if math.isfinite(total) or torch.isfinite(logits_NV).all():
        return
    raise not_finite()


def not_finite() -> CheckpointError:
    return CheckpointError(
        "the model's output is not finite numbers",
        found="NaN or infinite logits",
        fix="check the weights with `rorqual inspect MODEL --deep`, or load them as float32",
    )


def choose(
    logits_NV: Tensor,
    numbers: Sequence[int],
    rows: Sequence[Row],
    *,
    is_row_by_row: bool = False,
) -> Tensor:
    """(len(rows),) ids, on the logits' device: rows[i] is how row `numbers[i]` is sampled.

    At temperature 0 the likeliest, lowest id first. `is_row_by_row`: no operator sees two rows, so
    that a row's result does not depend on its neighbours to the last bit, whatever the processor.
    """
    num_ids = logits_NV.shape[1]
    places = TILE_PLACES.get(logits_NV.device.type, MORE_PLACES)
    size = 1 if is_row_by_row else max(1, places // num_ids)
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(row.kind(num_ids), []).append(index)
    if len(kinds) == 1 and len(rows) <= size:
        (kind,) = kinds
        return _choose(_take(logits_NV, numbers, is_copy=kind[0]), rows, *kind)
    order, chosen = [], []
    for kind, alike in kinds.items():
        for first in range(0, len(alike), size):
            tile = alike[first : first + size]
            order += tile
            tile_NV = _take(logits_NV, [numbers[i] for i in tile], is_copy=kind[0])
            chosen.append(_choose(tile_NV, [rows[i] for i in tile], *kind))
    ids = torch.cat(chosen)
    return torch.empty_like(ids).index_copy(0, tensor_on(ids.device, order, torch.int64), ids)


def _take(logits_NV: Tensor, numbers: Sequence[int], *, is_copy: bool) -> Tensor:
    """These rows; without `is_copy` perhaps a view of the logits."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        part = logits_NV[first : first + len(numbers)]
        return part.clone(memory_format=torch.contiguous_format) if is_copy else part
    return logits_NV.index_select(0, tensor_on(logits_NV.device, numbers, torch.int64))


def _choose(
    logits_NV: Tensor, rows: Sequence[Row], is_changed: bool, is_drawn: bool, is_filtered: bool
) -> Tensor:
    if is_changed:
        change(logits_NV, [row.changes for row in rows])
    if not is_drawn:
        return likeliest(logits_NV)
    blocks_NBP = _blocks(_weights(logits_NV, rows), 0.0)
    uniforms_N = tensor_on(logits_NV.device, [row.uniform for row in rows], torch.float64)
    if not is_filtered:
        return _pick(blocks_NBP, uniforms_N)
    ids_N = torch.empty(len(rows), dtype=torch.int64, device=logits_NV.device)
    for left in _filtered(blocks_NBP, rows, logits_NV.shape[1]):
        place_M = _pick(left.weights_MLP, uniforms_N[left.rows_M])
        ids_N[left.rows_M] = left.ids_MC.gather(1, place_M[:, None])[:, 0]
    return ids_N


def likeliest(logits_NV: Tensor) -> Tensor:
    """(N,) argmax. On a CPU numpy's is several times faster than torch's."""
    if logits_NV.is_cpu:
        return torch.from_numpy(logits_NV.numpy().argmax(-1))
    return logits_NV.argmax(-1)


def _blocks(values_NV: Tensor, filling: float) -> Tensor:
    """(N, B, P)."""
    num_missing = -values_NV.shape[1] % BLOCK_PLACES
    if num_missing:
        values_NV = F.pad(values_NV, (0, num_missing), value=filling)
    return values_NV.unflatten(-1, (-1, BLOCK_PLACES))


def _weights(logits_NV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Probabilities up to a factor: the likeliest has 1."""
    temperatures = [max(row.params.temperature, MIN_TEMPERATURE) for row in rows]
    temperatures_N1 = tensor_on(logits_NV.device, temperatures, torch.float32)[:, None]
    # The largest becomes 0 first, so that no temperature, however small, overflows.
    best_N1 = _blocks(logits_NV, -torch.inf).amax(-1).amax(-1, keepdim=True)
    return (logits_NV - best_N1).div_(temperatures_N1).exp_()


def _pick(weights_NBP: Tensor, uniforms_N: Tensor) -> Tensor:
    """(N,) places in each row; never one of weight 0. `uniforms_N` are float64.

    First the block in which the place lies, then the place: sums over blocks are several times
    faster than the running sum of a whole vocabulary.
    """
    # float64: in float32 the tail of many weights would be lost in the sum.
    sums_NB = weights_NBP.sum(-1).double().cumsum(-1)
    targets_N = sums_NB[:, -1] * uniforms_N
    # Rows that are not numbers have no place: theirs only has to exist until the caller sees them.
    block_N = _first_above(sums_NB, targets_N).clamp(max=sums_NB.shape[1] - 1)
    before_N = F.pad(sums_NB, (1, 0)).gather(-1, block_N[:, None])[:, 0]
    rows_N = torch.arange(len(block_N), device=block_N.device)
    sums_NP = weights_NBP[rows_N, block_N].double().cumsum(-1)
    place_N = _first_above(sums_NP, targets_N - before_N).clamp(max=BLOCK_PLACES - 1)
    return block_N * BLOCK_PLACES + place_N


def _first_above(sums_NX: Tensor, targets_N: Tensor) -> Tensor:
    """(N,) the first place in each row of running sums that exceeds the target."""
    # Rounding may lift a target to the total itself: the last place with a weight is meant then.
    totals_N = sums_NX[:, -1]
    targets_N = targets_N.minimum(totals_N.nextafter(torch.zeros_like(totals_N)))
    return torch.searchsorted(sums_NX, targets_N[:, None], right=True)[:, 0]


_Look = tuple[tuple[Tensor, Tensor], Tensor]
"""(what the filters leave: weights_MLP, ids_MC), and for which rows that is the whole truth."""


@dataclass(frozen=True, eq=False)
class _Left:
    """What the filters leave of some rows: weights in places that stand for `ids_MC`, ascending;
    the others' are 0.
    """

    rows_M: Tensor
    weights_MLP: Tensor
    ids_MC: Tensor


def _filtered(weights_NBP: Tensor, rows: Sequence[Row], num_ids: int) -> Iterator[_Left]:
    """Each row once. Of equally likely ids the lower ones stay."""
    device = weights_NBP.device
    params = [row.params for row in rows]
    limits = _Limits(
        tensor_on(device, [min(p.top_k or num_ids, num_ids) for p in params], torch.int64),
        tensor_on(device, [p.top_p or 1.0 for p in params], torch.float64),
        tensor_on(device, [p.min_p or 0.0 for p in params], torch.float32),
        weights_NBP.sum(-1).double().sum(-1),
        num_ids,
    )
    open_M = torch.arange(len(rows), device=device)
    for look in LOOKS:
        left, is_settled_M = look(weights_NBP, limits)
        is_settled = is_settled_M.tolist()
        if all(is_settled):
            yield _Left(open_M, *left)
            return
        if any(is_settled):
            yield _Left(open_M[is_settled_M], *(part[is_settled_M] for part in left))
        is_open_M = ~is_settled_M
        open_M, limits = open_M[is_open_M], limits.of(is_open_M)
        weights_NBP = weights_NBP[is_open_M]
    raise AssertionError("the last look sees all")


@dataclass(frozen=True, eq=False)
class _Limits:
    """The filters of each row, and the sum of its weights."""

    top_k_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor
    totals_N: Tensor
    num_ids: int

    def of(self, rows_M: Tensor) -> _Limits:
        return _Limits(
            self.top_k_N[rows_M],
            self.top_p_N[rows_M],
            self.min_p_N[rows_M],
            self.totals_N[rows_M],
            self.num_ids,
        )


def _first_look(weights_MBP: Tensor, limits: _Limits) -> _Look:
    return _look(weights_MBP, limits, FEW_BLOCKS, FEW_PLACES)


def _second_look(weights_MBP: Tensor, limits: _Limits) -> _Look:
    return _look(weights_MBP, limits, None, MANY_PLACES)


def _last_look(weights_MBP: Tensor, limits: _Limits) -> _Look:
    left, is_settled_M = _look(weights_MBP, limits, None, None)
    return left, torch.ones_like(is_settled_M)


def _look(
    weights_MBP: Tensor, limits: _Limits, num_blocks: int | None, num_places: int | None
) -> _Look:
    """As far as the blocks with the likeliest tokens and the likeliest places in these tell."""
    seen_MLP, ids_MC, bound_M1 = _likely_blocks(weights_MBP, num_blocks)
    seen_MC = seen_MLP.flatten(1)
    best_MK = seen_MC.topk(min(num_places or seen_MC.shape[1], seen_MC.shape[1])).values
    # Beside what is above the bound there may be equals elsewhere.
    num_sure_M = (best_MK > bound_M1).sum(-1)
    sums_MK = best_MK.double().cumsum(-1)
    top_k_M, is_all_M = limits.top_k_N, limits.top_k_N == limits.num_ids
    last_M = top_k_M.clamp(max=best_MK.shape[1]) - 1
    # top_p counts within what top_k has left.
    totals_M = torch.where(is_all_M, limits.totals_N, sums_MK.gather(1, last_M[:, None])[:, 0])
    # The token that crosses top_p is kept: one goes when those before it already reach it.
    is_before_MK = sums_MK - best_MK < (limits.top_p_N * totals_M)[:, None]
    is_whole_M = limits.top_p_N == 1
    num_kept_M = top_k_M.minimum(torch.where(is_whole_M, limits.num_ids, is_before_MK.sum(-1)))
    is_seen_M = top_k_M <= num_sure_M
    is_settled_M = is_seen_M | (is_all_M & (num_kept_M < num_sure_M))
    # Without top_k and top_p all that min_p leaves must be in sight.
    is_free_M = is_all_M & is_whole_M
    is_settled_M = torch.where(is_free_M, limits.min_p_N > bound_M1[:, 0], is_settled_M)
    place_M1 = num_kept_M.clamp(1, best_MK.shape[1])[:, None] - 1
    least_M1 = best_MK.gather(1, place_M1).masked_fill(is_free_M[:, None], 0.0)
    kept_MC = _keep(seen_MC, least_M1, num_kept_M, limits)
    return (kept_MC.view_as(seen_MLP), ids_MC), is_settled_M


def _look_in_buckets(weights_MBP: Tensor, limits: _Limits) -> _Look:
    """The whole truth for rows without top_k, many times faster than a sort: the bucket of the last
    weight that top_p leaves is found by the sums of the buckets, and only that one is sorted.
    """
    seen_MC = weights_MBP.flatten(1)
    num_rows, num_places = seen_MC.shape
    buckets_MC = (seen_MC.view(torch.int32) >> BUCKET_BITS).clamp_(0, NUM_BUCKETS - 1)
    sums_MX = torch.stack(
        [
            torch.bincount(buckets_C, seen_C.double(), NUM_BUCKETS)
            for buckets_C, seen_C in zip(buckets_MC, seen_MC, strict=True)
        ]
    )
    sums_MX = sums_MX.flip(-1).cumsum(-1)  # the bucket of the heaviest weights first
    targets_M1 = (limits.top_p_N * limits.totals_N)[:, None]
    number_M1 = (sums_MX < targets_M1).sum(-1, keepdim=True).clamp_(max=NUM_BUCKETS - 1)
    before_M1 = F.pad(sums_MX, (1, 0)).gather(1, number_M1)
    bucket_M1 = (NUM_BUCKETS - 1 - number_M1).int()
    is_in_MC = buckets_MC == bucket_M1
    most = max(1, int(is_in_MC.sum(-1).max()))
    best_MK = torch.where(is_in_MC, seen_MC, -1.0).topk(most).values
    inside_MK = best_MK.clamp(min=0).double()
    is_before_MK = before_M1 + inside_MK.cumsum(-1) - inside_MK < targets_M1
    num_inside_M1 = (is_before_MK & (best_MK >= 0)).sum(-1, keepdim=True).clamp_(min=1)
    num_above_M = (buckets_MC > bucket_M1).sum(-1)
    is_whole_M = limits.top_p_N == 1
    num_kept_M = torch.where(is_whole_M, limits.num_ids, num_above_M + num_inside_M1[:, 0])
    least_M1 = best_MK.gather(1, num_inside_M1 - 1).masked_fill(is_whole_M[:, None], 0.0)
    kept_MC = _keep(seen_MC, least_M1, num_kept_M, limits)
    ids_MC = torch.arange(num_places, device=seen_MC.device).expand(num_rows, -1)
    return (kept_MC.view_as(weights_MBP), ids_MC), limits.top_k_N == limits.num_ids


LOOKS = (_first_look, _look_in_buckets, _second_look, _last_look)
"""What is not settled by one is left to the next."""


def _keep(seen_MC: Tensor, least_M1: Tensor, num_kept_M: Tensor, limits: _Limits) -> Tensor:
    """The weights from the least on, and 0 for the others."""
    is_kept_MC = seen_MC >= least_M1.maximum(limits.min_p_N[:, None])
    num_surplus_M = (is_kept_MC.sum(-1) - num_kept_M).clamp(min=0)
    if bool((num_surplus_M > 0).any()):  # several are as likely as the last that is kept
        is_last_MC = seen_MC == least_M1
        num_before_MC = is_last_MC.cumsum(-1)
        most_M1 = num_before_MC[:, -1:] - num_surplus_M[:, None]
        is_kept_MC &= ~is_last_MC | (num_before_MC <= most_M1)
    return torch.where(is_kept_MC, seen_MC, 0.0)


def _likely_blocks(weights_MBP: Tensor, num_blocks: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks with the likeliest tokens, in the order of their ids, these ids, and (M, 1) what
    no weight elsewhere exceeds.
    """
    num_rows, num_all, _ = weights_MBP.shape
    device = weights_MBP.device
    places_P = torch.arange(BLOCK_PLACES, device=device)
    if num_blocks is None or num_blocks >= num_all:
        ids_MC = torch.arange(num_all * BLOCK_PLACES, device=device).expand(num_rows, -1)
        return weights_MBP, ids_MC, torch.full((num_rows, 1), -1.0, device=device)
    best = weights_MBP.amax(-1).topk(num_blocks)
    blocks_ML = best.indices.sort(-1).values
    rows_M1 = torch.arange(num_rows, device=device)[:, None]
    ids_MLP = blocks_ML[..., None] * BLOCK_PLACES + places_P
    return weights_MBP[rows_M1, blocks_ML], ids_MLP.flatten(1), best.values[:, -1:]
