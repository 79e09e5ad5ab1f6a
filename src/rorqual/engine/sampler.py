"""Sampling: from logits to a token id.

A token costs one random number u: over the ids in their order, it is the first whose cumulative
weight exceeds u times the total. So what is drawn hardly depends on rounding, nor on whether tokens
come one by one or as verified drafts; what a seed promises, says `Engine`.
"""

# N rows, V vocabulary, C candidates, K likeliest, B blocks of P places

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine.params import SamplingParams
from rorqual.errors import CheckpointError
from rorqual.ops.device import tensor_on

FIRST_LOOK = 512
"""How many of the likeliest `top_p` looks at before it sorts them all."""
ROWS_AT_ONCE = 16
BLOCK_PLACES = 256
MIN_TEMPERATURE = 1e-6


def random_source(params: SamplingParams) -> torch.Generator:
    """The random numbers of one request: the same for the same seed, whatever runs beside it."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def check_finite(logits_NV: Tensor, total: float | None = None) -> None:
    """CheckpointError if the logits are not numbers. `total` is their sum, where it is known."""
    # The sum finds nearly every fault in one pass; large logits may overflow it.
    total = logits_NV.sum().item() if total is None else total
    if math.isfinite(total) or torch.isfinite(logits_NV).all():
        return
    raise CheckpointError(
        "the model's output is not finite numbers",
        found="NaN or infinite logits",
        fix="check the weights with `rorqual inspect`, or load them as float32",
    )


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """(V,) float32, the distribution that `draw` draws from, at a temperature above 0."""
    weights_V = _weights(logits_V, params.temperature)
    ids_C = _kept(weights_V, params)
    if ids_C is not None:
        weights_V = torch.zeros_like(weights_V).scatter(0, ids_C, weights_V[ids_C])
    return weights_V / weights_V.sum()


def draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    """The id that `uniform` (0 <= u < 1) picks; at temperature 0 the likeliest, lowest id first."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    weights_V = _weights(logits_V, params.temperature)
    uniforms = torch.tensor([uniform], dtype=torch.float64, device=logits_V.device)
    ids_C = _kept(weights_V, params)
    if ids_C is None:
        return int(_pick(weights_V[None], uniforms))
    return int(ids_C[_pick(weights_V[ids_C][None], uniforms)])


def draw_rows(
    logits_NV: Tensor,
    temperatures_N: Sequence[float],
    uniforms_N: Sequence[float],
    *,
    is_row_by_row: bool = False,
) -> list[int]:
    """`draw` without filters for many rows at once, all at temperatures above 0.

    `is_row_by_row`: to the last bit the same whatever rows there are.
    """
    return pick_rows(logits_NV, temperatures_N, uniforms_N, is_row_by_row).tolist()


def pick_rows(
    logits_NV: Tensor,
    temperatures_N: Sequence[float],
    uniforms_N: Sequence[float],
    is_row_by_row: bool,
) -> Tensor:
    """`draw_rows` as (N,) ids on the logits' device."""
    device = logits_NV.device
    temperatures_N1 = tensor_on(device, temperatures_N, torch.float32)[:, None]
    uniforms = tensor_on(device, uniforms_N, torch.float64)
    ids = []
    step = 1 if is_row_by_row else ROWS_AT_ONCE
    for start in range(0, len(logits_NV), step):
        part = slice(start, start + step)
        ids.append(_pick(_weights(logits_NV[part], temperatures_N1[part]), uniforms[part]))
    return torch.cat(ids)


def _weights(logits_XV: Tensor, temperature: float | Tensor) -> Tensor:
    """Probabilities up to a factor: the likeliest has 1."""
    if isinstance(temperature, Tensor):
        temperature = temperature.clamp(min=MIN_TEMPERATURE)
    else:
        temperature = max(temperature, MIN_TEMPERATURE)
    # The largest becomes 0 first, so that no temperature, however small, overflows.
    return (logits_XV - logits_XV.amax(-1, keepdim=True)).div_(temperature).exp_()


def _pick(weights_NC: Tensor, uniforms_N: Tensor) -> Tensor:
    """(N,) places in each row; never one of weight 0. `uniforms_N` are float64.

    First the block in which the place lies, then the place: sums over blocks are several times
    faster than the running sum of a whole vocabulary.
    """
    num_rows, num_places = weights_NC.shape
    blocks_NBP = F.pad(weights_NC, (0, -num_places % BLOCK_PLACES)).view(num_rows, -1, BLOCK_PLACES)
    # float64: in float32 the tail of many weights would be lost in the sum.
    sums_NB = blocks_NBP.sum(-1).double().cumsum(-1)
    targets_N = sums_NB[:, -1] * uniforms_N
    # Rows that are not numbers have no place: theirs only has to exist until the caller sees them.
    block_N = _first_above(sums_NB, targets_N).clamp(max=sums_NB.shape[1] - 1)
    before_N = F.pad(sums_NB, (1, 0)).gather(-1, block_N[:, None])[:, 0]
    rows_N = torch.arange(num_rows, device=weights_NC.device)
    sums_NP = blocks_NBP[rows_N, block_N].double().cumsum(-1)
    return block_N * BLOCK_PLACES + _first_above(sums_NP, targets_N - before_N)


def _first_above(sums_NX: Tensor, targets_N: Tensor) -> Tensor:
    """(N,) the first place in each row of running sums that exceeds the target."""
    # Rounding may lift a target to the total itself: the last place with a weight is meant then.
    totals_N = sums_NX[:, -1]
    targets_N = targets_N.minimum(totals_N.nextafter(torch.zeros_like(totals_N)))
    return torch.searchsorted(sums_NX, targets_N[:, None], right=True)[:, 0]


def _kept(weights_V: Tensor, params: SamplingParams) -> Tensor | None:
    """(C,) ids, ascending, that the filters leave; None for all. Of equal ones the lower ids."""
    if not params.has_filters:
        return None
    num_kept, least = len(weights_V), 0.0
    top_k, top_p = params.top_k or len(weights_V), params.top_p or 1.0
    if top_k < len(weights_V) or top_p < 1:
        num_kept, least = _top(weights_V, min(top_k, len(weights_V)), top_p)
    ids_C = (weights_V >= max(least, params.min_p or 0.0)).nonzero()[:, 0]
    num_surplus = len(ids_C) - num_kept
    if num_surplus > 0:  # several are as likely as the last that is kept
        is_last_C = weights_V[ids_C] == least
        num_before_C = is_last_C.cumsum(0)
        ids_C = ids_C[~is_last_C | (num_before_C <= num_before_C[-1] - num_surplus)]
    return ids_C


def _top(weights_V: Tensor, top_k: int, top_p: float) -> tuple[int, float]:
    """How many of the likeliest `top_k` and then `top_p` leave, and the least of their weights."""
    if top_p == 1:
        return top_k, weights_V.topk(top_k).values[-1].item()
    # A sort of the whole vocabulary is rarely needed: the few likeliest mostly reach top_p.
    num_seen = min(FIRST_LOOK, top_k)
    while True:
        weights_K = weights_V.topk(num_seen).values.double()
        sums_K = weights_K.cumsum(0)
        total = (
            sums_K[-1] if num_seen == top_k < len(weights_V) else weights_V.sum(dtype=torch.float64)
        )
        # The token that crosses top_p is kept: one goes when those before it already reach it.
        num_kept = int((sums_K - weights_K < top_p * total).sum())
        if num_kept < num_seen or num_seen == top_k:
            return num_kept, weights_K[num_kept - 1].item()
        num_seen = min(16 * num_seen, top_k)
