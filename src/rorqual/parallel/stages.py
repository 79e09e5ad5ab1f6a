"""A model cut into the stages of a pipeline, by layers, and what a rank holds of it.

The first stage has the embedding; the last one the norm, the head and the MTP modules, which need
the embedding too. Where both are on one rank they share it (§3.2.2); elsewhere the last rank holds
a copy, whose gradient is added to the first's (`train/in_pipeline.py`). Layers keep their ids and
parameters their names, so that a rank's model is the whole one with parts left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import nn
from torch.distributed import ProcessGroup

from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, ModelConfig, empty
from rorqual.model.flops import head_flops_per_token, layer_flops_per_token
from rorqual.model.transformer import materialise
from rorqual.parallel.actions import Action, Kind, Order

EMBEDDING = "model.embed_tokens.weight"
M = TypeVar("M", bound=nn.Module)
ROUNDING = 1e-12  # relative: the same costs summed in another order


IN_A_V = ("zbv", "dualpipev")
ONE_EACH = ("1f1b", "zb1p")


@dataclass(frozen=True)
class Placement:
    """Which of `num_ranks` has which stages, in a pipeline order by name. `num_chunks` is for
    `interleaved` alone, which has 2 otherwise.
    """

    order: str
    num_ranks: int
    num_chunks: int | None = None

    def __post_init__(self) -> None:
        trained = (*ONE_EACH, "interleaved", *IN_A_V)
        if self.order not in trained:
            raise UsageError(
                "no training runs in this pipeline order",
                found=self.order,
                expected=f"one of {', '.join(trained)}",
                fix="dualpipev holds the model once" if self.order == "dualpipe" else None,
            )
        if self.num_chunks is not None and self.order != "interleaved":
            raise UsageError(
                "only interleaved lets one choose how many stages a rank has",
                found=f"{self.num_chunks} chunks for {self.order}",
                fix="leave it out",
            )

    @property
    def num_stages(self) -> int:
        return self.num_ranks * len(self.stages(0))

    def stages(self, rank: int) -> list[int]:
        """Those of a rank, in ascending order."""
        if self.order in ONE_EACH:
            return [rank]
        if self.order in IN_A_V:
            return [rank, 2 * self.num_ranks - 1 - rank]
        return [rank + chunk * self.num_ranks for chunk in range(self.num_chunks or 2)]

    @property
    def last_rank(self) -> int:
        """Who has the last stage; the first stage is always the first rank's."""
        return 0 if self.order in IN_A_V else self.num_ranks - 1

    def has_copy(self, config: ModelConfig) -> bool:
        """Does the last rank hold a copy of the first one's embedding?"""
        return self.last_rank > 0 and needs_copy(config)

    def shares(self, config: ModelConfig, num_inputs: int, rank: int) -> list[StageShare]:
        """A rank's stages, as `cut` makes them."""
        all_shares = cut(config, self.num_stages, num_inputs)
        return [all_shares[stage] for stage in self.stages(rank)]


@dataclass(frozen=True)
class RankStages:
    """The stages of one rank of the pipeline that `group` is."""

    placement: Placement
    shares: list[StageShare]
    group: ProcessGroup
    is_overlapped: bool = False
    """Whether the two passes of a pair run at the same time, where the order has pairs."""

    def part(self, config: ModelConfig) -> DeepseekV3:
        """What the rank holds of a model, on the CPU and without values."""
        model = rank_model(config, self.shares)
        materialise(model, "cpu")
        return model


@dataclass(frozen=True)
class StageShare:
    """The main layers of stage `index` of `num_stages`, by their ids."""

    index: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def forward_orders(placement: Placement, num_micro_batches: int) -> list[Order]:
    """All micro-batches through a rank's stages one after the other, and back: for what needs
    forward passes alone, of any number of micro-batches.
    """

    def passes(kind: Kind, stages: Sequence[int]) -> Order:
        return [Action(kind, stage, i) for stage in stages for i in range(num_micro_batches)]

    ranks = [placement.stages(rank) for rank in range(placement.num_ranks)]
    return [passes(Kind.FORWARD, stages) + passes(Kind.BACKWARD, stages[::-1]) for stages in ranks]


def cut(config: ModelConfig, num_stages: int, num_inputs: int) -> list[StageShare]:
    """Stages of neighbouring layers: the costliest one costs as little as it can, and then they are
    as even as they can be. What is behind the last layer, MTP modules included, may be the last
    stage by itself.

    `num_inputs`: tokens of a sample, since the cost of attention depends on them.
    """
    costs = unit_costs(config, num_inputs)
    if num_stages > len(costs):
        raise UsageError(
            "the pipeline has more stages than the model has layers",
            found=f"{num_stages} stages, {config.num_hidden_layers} layers",
            expected=f"at most {len(costs)} stages: a layer each, and one for the head",
            fix="lower parallel.pp, or take a pipeline order with fewer stages a rank",
        )
    bounds = [0, *_even_ends(costs, num_stages)]
    num_layers = config.num_hidden_layers
    return [
        StageShare(index, num_stages, range(first, min(end, num_layers)))
        for index, (first, end) in enumerate(pairwise(bounds))
    ]


def unit_costs(config: ModelConfig, num_inputs: int) -> list[float]:
    """FLOPs of a token's forward pass in each main layer, and in what is behind the last: norm,
    head and MTP modules. Backward passes take twice as many everywhere.
    """
    context = (num_inputs + 1) / 2
    cost = [layer_flops_per_token(config, i, context) for i in range(config.num_layers_with_mtp)]
    num_layers = config.num_hidden_layers
    num_heads = 1 + config.num_nextn_predict_layers
    end = sum(cost[num_layers:]) + num_heads * head_flops_per_token(config)
    return [*cost[:num_layers], end]


def _even_ends(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where each stage ends: first the least maximum, then the least sum of squares below it."""
    limit = _best(costs, num_stages, float("inf"), max)[0]
    return _best(costs, num_stages, limit, lambda before, cost: before + cost * cost)[1]


def _best(
    costs: Sequence[float],
    num_stages: int,
    limit: float,
    joined: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least `joined` of the stages' costs, none of which exceeds `limit`, and their ends."""
    sums = [0.0, *accumulate(costs)]
    # By number of units: the best of the stages so far that end there.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(num_stages):
        further: dict[int, tuple[float, list[int]]] = {}
        for start, (value, ends) in best.items():
            for end in range(start + 1, len(sums)):
                cost = sums[end] - sums[start]
                found = joined(value, cost), [*ends, end]
                if cost <= limit * (1 + ROUNDING) and (end not in further or found < further[end]):
                    further[end] = found
        best = further
    return best[len(costs)]


def rank_model(config: ModelConfig, shares: Sequence[StageShare]) -> DeepseekV3:
    """What a rank with these stages holds, on the device meta (`materialise` gives it memory,
    `reset_parameters` or `fill` values).
    """
    model = empty(config, device="meta")
    has_last = any(share.is_last for share in shares)
    held = {layer_id for share in shares for layer_id in _layer_ids(config, share)}
    _keep_layers(model, held)
    if not any(share.is_first for share in shares) and not (has_last and needs_copy(config)):
        model.model.embed_tokens = None
    if not has_last:
        model.model.norm = model.lm_head = None
    return model


def needs_copy(config: ModelConfig) -> bool:
    """Does the last stage need the embedding? MTP modules do, and a head that is the same."""
    return config.num_nextn_predict_layers > 0 or config.tie_word_embeddings


def stage_model(held: DeepseekV3, share: StageShare) -> DeepseekV3:
    """One stage of what a rank holds: a model of the same modules, without those of others."""
    stage, body = _shallow(held), _shallow(held.model)
    stage.model = body
    _keep_layers(stage, set(_layer_ids(held.config, share)))
    if not share.is_first and not (share.is_last and needs_copy(held.config)):
        body.embed_tokens = None
    if not share.is_last:
        body.norm = stage.lm_head = None
    return stage


def uses_twice(config: ModelConfig) -> bool:
    """Has the last stage a parameter in several places of which one is behind the other? torch
    cannot leave the weights' gradients of such a stage for later.
    """
    depths = config.num_nextn_predict_layers
    return depths > 1 or (depths > 0 and config.tie_word_embeddings)


def _layer_ids(config: ModelConfig, share: StageShare) -> list[int]:
    mtp = range(config.num_hidden_layers, config.num_layers_with_mtp) if share.is_last else ()
    return [*share.layers, *mtp]


def _keep_layers(model: DeepseekV3, kept: set[int]) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleDict(
        {layer_id: layer for layer_id, layer in layers.items() if int(layer_id) in kept}
    )


def _shallow(module: M) -> M:
    """Another module of the same parts: what is taken out of it stays in the first."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
