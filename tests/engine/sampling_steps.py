"""Sampling in small steps, and one row at a time in plain words: the oracle of the batched sampler.

What is here was the sampler before rows were sampled together, over the whole vocabulary and with a
full sort.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.logit_changes import change
from rorqual.engine.params import BAN, SamplingParams
from rorqual.engine.sampler import Row, choose
from rorqual.engine.sampling_state import SamplingState
from rorqual.engine.verify import Scores, Verified, verify


def verified(
    logits_NV: Tensor, drafts: Sequence[Sequence[int]], states: Sequence[SamplingState]
) -> list[Verified]:
    """`verify`, and the states take what it gave, as an answer's commit does."""
    results = verify(Scores(logits_NV), drafts, states)
    for state, result in zip(states, results, strict=True):
        state.commit(result.token_ids, result.guide)
    return results


def put(state: SamplingState, token_id: int) -> None:
    """A token of a guided answer."""
    assert state.guide is not None, "nothing guides the answer"
    guide = state.guide.fork()
    guide.put(token_id)
    guide.rewind()
    state.commit([token_id], guide)


def adjusted(state: SamplingState, logits_V: Tensor) -> Tensor:
    """The logits that temperature and filters work on."""
    logits_NV = logits_V[None].clone()
    change(logits_NV, [state.row((), state.guide).changes])
    return logits_NV[0]


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """(V,) the distribution that the sampler draws from."""
    blocks_NBP = sampler._blocks(sampler._weights(logits_V[None], [Row(params)]), 0.0)
    weights = blocks_NBP.flatten(1)
    if Row(params).kind(len(logits_V))[2]:
        (left,) = sampler._filtered(blocks_NBP, [Row(params)], len(logits_V))
        weights = torch.zeros_like(weights).scatter(1, left.ids_MC, left.weights_MLP.flatten(1))
    return (weights / weights.sum())[0, : len(logits_V)]


def drawn(
    logits_NV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    rows = [Row(settings, uniform) for settings, uniform in zip(params, uniforms, strict=True)]
    return choose(logits_NV, range(len(rows)), rows).tolist()


def plain_adjusted(
    logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], **_: Any
) -> Tensor:
    """Penalties, bias and bans, one after the other over the whole row."""
    num_ids = len(logits_V)
    counts_V = torch.zeros(num_ids)
    for token_id, count in Counter(answer).items():
        counts_V[token_id] = count
    is_seen_V = counts_V > 0
    is_seen_V[list(prompt)] = True
    factor = params.repetition_penalty
    penalised_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
    logits_V = torch.where(is_seen_V, penalised_V, logits_V)
    logits_V = logits_V - params.frequency_penalty * counts_V
    logits_V = logits_V - params.presence_penalty * (counts_V > 0)
    for token_id, bias in (params.logit_bias or {}).items():
        if bias > BAN:
            logits_V[token_id] += bias
    barred = [[i for i, bias in (params.logit_bias or {}).items() if bias <= BAN]]
    if params.allowed_token_ids is not None:
        barred.append([i for i in range(num_ids) if i not in params.allowed_token_ids])
    if len(answer) < params.min_tokens:
        barred.append(list(params.stop_token_ids))
    for ids in barred:
        left_V = logits_V.clone()
        left_V[ids] = -torch.inf
        if left_V.max() > -torch.inf:
            logits_V = left_V
    return logits_V


def plain_kept(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """(V,) float64 weights that the filters leave, by a stable sort of the whole row."""
    shifted_V = (logits_V - logits_V.max()) / max(params.temperature, 1e-6)
    weights_V, ids_V = shifted_V.exp().double().sort(descending=True, stable=True)
    if params.top_k is not None:
        weights_V[params.top_k :] = 0
    if params.top_p is not None:
        before_V = F.pad(weights_V.cumsum(-1)[:-1], (1, 0))
        weights_V[before_V >= params.top_p * weights_V.sum()] = 0
    if params.min_p is not None:
        weights_V[weights_V < torch.tensor(params.min_p)] = 0
    return torch.zeros_like(weights_V).scatter(0, ids_V, weights_V)


def plain_drawn(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    if params.temperature == 0:
        return int(logits_V.argmax())
    sums_V = plain_kept(logits_V, params).cumsum(-1)
    return int((sums_V <= uniform * sums_V[-1]).sum())
