"""What a rank sends to others in a step of training: to experts and back, along the pipeline, and
for weights and gradients that ranks share.

As the trainer sends it (`parallel/`): hidden states in float32; a token goes once to each node that
has an expert of it and there once to each rank that has one, with the gate values and the numbers
of its experts, and comes back so (§3.2.2); the backward pass sends the gradients of both ways.
Counted in expectation, where every choice of groups and experts is equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.model import ModelConfig
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.stages import StageShare
from rorqual.plan.train_memory import shares_of, stage_sizes

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step; of the ranks of a pipeline the one that sends most."""

    experts_within: float  # nodes
    experts_between: float
    pipeline: float
    weights: float  # and gradients, of ranks that share them

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


def traffic_of(
    options: ParallelSettings,
    config: ModelConfig,
    *,
    num_sequences: int,
    num_inputs: int,
    num_micro_batches: int,
    ranks_per_node: int,
) -> Traffic:
    """`num_sequences` of a rank in a step, each of `num_inputs` tokens."""
    tokens = num_sequences * num_inputs
    rows = rows_sent(config, options.ep, options.ranks_per_node or ranks_per_node)
    ranks = []
    for rank in range(options.pp):
        shares = shares_of(options, config, rank, num_inputs)
        shared = _shared_bytes(options, config, shares, num_micro_batches)
        ranks.append(_of_rank(config, shares, tokens, rows, shared))
    return max(ranks, key=lambda traffic: sum(traffic.as_dict().values()))


def _of_rank(
    config: ModelConfig,
    shares: Sequence[StageShare],
    tokens: int,
    rows: tuple[float, float],
    shared: float,
) -> Traffic:
    num_sparse = sum(config.is_moe_layer(i) for share in shares for i in share.layers)
    num_sparse += sum(share.is_last for share in shares) * config.num_nextn_predict_layers
    within, between = rows
    row = expert_row_bytes(config)
    stages = [share.index for share in shares]
    num_stages = shares[0].num_stages
    # Forward to the stage behind, backward to the one before, unless this rank has it.
    hops = sum(s + 1 < num_stages and s + 1 not in stages for s in stages)
    hops += sum(s > 0 and s - 1 not in stages for s in stages)
    return Traffic(
        experts_within=tokens * num_sparse * within * row,
        experts_between=tokens * num_sparse * between * row,
        pipeline=hops * tokens * config.hidden_size * FLOAT32,
        weights=shared,
    )


def expert_row_bytes(config: ModelConfig) -> int:
    """A token's way over one hop, there and back, and its gradients' way."""
    hidden = 4 * config.hidden_size * FLOAT32
    return hidden + config.num_experts_per_tok * (2 * FLOAT32 + INT64)


def rows_sent(config: ModelConfig, ep: int, ranks_per_node: int) -> tuple[float, float]:
    """Rows that a token makes its hops send, within nodes and between them, in expectation.

    Between nodes it goes to other nodes than its own; there, and in its own, to other ranks than
    the one at which it arrives.
    """
    per_node = math.gcd(ep, ranks_per_node)
    num_nodes = ep // per_node
    between = places_met(config, num_nodes) * (1 - 1 / num_nodes)
    within = places_met(config, ep) * (1 - 1 / per_node)
    return within, between


def places_met(config: ModelConfig, num_places: int) -> float:
    """Places that have an expert of a token, in expectation, where all experts are divided among
    them in order. A token's groups are `topk_group` of `n_group`, and its experts any of theirs.
    """
    num_experts, num_groups = config.n_routed_experts, config.n_group
    open_groups = config.topk_group if config.topk_method != "greedy" else num_groups
    a_group, a_place = num_experts // num_groups, num_experts // num_places
    chosen, open_experts = config.num_experts_per_tok, open_groups * a_group
    missed = 0.0
    # Of the groups that lie in a place as many are open as chance gives.
    groups_in = max(1, a_place // a_group)
    for num_open in range(groups_in + 1):
        if num_open > open_groups or groups_in - num_open > num_groups - open_groups:
            continue
        chance = (
            math.comb(groups_in, num_open)
            * math.comb(num_groups - groups_in, open_groups - num_open)
            / math.comb(num_groups, open_groups)
        )
        here = num_open * min(a_group, a_place)
        missed += chance * math.comb(open_experts - here, chosen) / math.comb(open_experts, chosen)
    return num_places * (1 - missed)


def _shared_bytes(
    options: ParallelSettings,
    config: ModelConfig,
    shares: Sequence[StageShare],
    num_micro_batches: int,
) -> float:
    """FSDP's: weights gathered and gradients scattered among those that share them, then gradients
    summed over the replicas. ZeRO-3 gathers twice and scatters once a micro-batch.
    """
    sizes = stage_sizes(config, shares)
    gathers, scatters = (2 * num_micro_batches, num_micro_batches) if options.zero == 3 else (1, 1)
    total = 0.0
    for size, num_shards in (
        (sizes.dense, options.num_shards),
        (sizes.experts / options.ep, options.dp_shard),
    ):
        around = (gathers + scatters) * size * (1 - 1 / num_shards)
        replicas = 2 * size / num_shards * (1 - 1 / options.dp_replicate)
        total += FLOAT32 * (around + replicas)
    return total
