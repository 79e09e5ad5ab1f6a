"""What ranks send in a step. Oracle: choices drawn at random and sent as `parallel/dispatch.py`
says, row by row; sizes by hand.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from rorqual.cli.stages import stages
from rorqual.model import ModelConfig, preset
from rorqual.plan.train_memory import stage_sizes
from rorqual.plan.train_traffic import Traffic, expert_row_bytes, places_met, rows_sent, traffic_of
from rorqual.train.recipe import recipe_of
from small import SMALL

V3 = preset("671b")
DRAWS = 4000
NEAR = 0.02  # of a mean of so many draws


def drawn(config: ModelConfig, rng: random.Random) -> list[int]:
    """A token's experts: some groups, then any of their experts."""
    size = config.n_routed_experts // config.n_group
    groups = range(config.n_group)
    if config.topk_method != "greedy":
        groups = rng.sample(groups, config.topk_group)
    reachable = [group * size + i for group in groups for i in range(size)]
    return rng.sample(reachable, config.num_experts_per_tok)


@pytest.mark.parametrize(
    ("config", "ep", "per_node"),
    [
        (V3, 64, 8),
        (V3, 64, 4),
        (V3, 32, 8),
        (V3, 8, 8),
        (V3, 256, 8),
        (preset("16b"), 8, 8),
        (preset("16b"), 16, 4),
        (preset("236b"), 16, 8),
        (preset("tiny"), 2, 1),
    ],
)
def test_rows_of_tokens_drawn_at_random(config: ModelConfig, ep: int, per_node: int) -> None:
    rng = random.Random(0)
    own_experts = config.n_routed_experts // ep
    within = between = 0
    for _ in range(DRAWS):
        me = rng.randrange(ep)
        ranks = {expert // own_experts for expert in drawn(config, rng)}
        nodes = {rank // per_node for rank in ranks}
        between += len(nodes - {me // per_node})
        # In each node it is at the rank of its own number first.
        within += sum(rank % per_node != me % per_node for rank in ranks)
    found = rows_sent(config, ep, per_node)
    assert found[0] == pytest.approx(within / DRAWS, rel=NEAR, abs=0.01)
    assert found[1] == pytest.approx(between / DRAWS, rel=NEAR, abs=0.01)


def test_a_token_visits_four_machines_of_eight_at_most() -> None:
    """§3.2.2: at most 4 nodes, and 3.2 experts in each on average where all are used."""
    assert places_met(V3, 8) <= 4
    assert places_met(V3, 8) == pytest.approx(3.65, abs=0.1)
    assert rows_sent(V3, 1, 8) == (0, 0)
    assert rows_sent(V3, 8, 8)[1] == 0


def sent(config: ModelConfig, number: int = 2, **axes: Any) -> Traffic:
    table = {
        "name": "planned",
        "model": {"preset": "tiny"},
        "tokenizer": {"folder": "t"},
        "data": {"folder": "d", "sources": [{"path": "x"}]},
        "training": {"total_tokens": 10**6, "sequence_length": 64, "micro_batch_size": 1},
        "batch_ramp": {"start": 64, "end": 64},
        "parallel": axes,
    }
    return traffic_of(
        recipe_of(table, stages()).parallel,
        config,
        num_sequences=number,
        num_inputs=64,
        num_micro_batches=number,
        ranks_per_node=8,
    )


def test_experts_of_one_node_by_hand() -> None:
    """Two ranks: a token's two experts are both on the other with chance 1/4 each way."""
    config = SMALL.with_changes(n_group=1, topk_group=1)
    row = 4 * 4 * config.hidden_size + config.num_experts_per_tok * 16
    assert expert_row_bytes(config) == row
    found = sent(config, ep=2)
    # 8 experts, 2 of them drawn: the other half is missed with chance (4 * 3) / (8 * 7).
    layers = config.num_layers_with_mtp - config.first_k_dense_replace
    rows = 2 * 64 * layers * (1 - 12 / 56)
    assert found.experts_within == pytest.approx(rows * row)
    assert found.experts_between == found.pipeline == 0


def test_weights_and_gradients_by_hand() -> None:
    """Shards: gathered once and scattered once; copies: there and back."""
    config = SMALL
    from rorqual.parallel.stages import StageShare

    sizes = stage_sizes(config, [StageShare(0, 1, range(config.num_hidden_layers))])
    assert sent(config).weights == 0
    assert sent(config, dp_shard=4).weights == pytest.approx(4 * sizes.total * 2 * 3 / 4)
    assert sent(config, dp_replicate=4).weights == pytest.approx(4 * sizes.total * 2 * 3 / 4)
    experts_alone = 4 * sizes.dense * 2 * 1 / 2
    assert sent(config, ep=2).weights == pytest.approx(experts_alone)
    assert sent(config, dp_shard=4, zero=3).weights == pytest.approx(
        4 * sizes.total * 3 / 4 * (2 * 2 + 2)
    )


def test_a_pipeline_sends_streams_there_and_back() -> None:
    config = SMALL.with_changes(num_hidden_layers=6)
    stream = 2 * 64 * config.hidden_size * 4
    assert sent(config, pp=2, order="1f1b").pipeline == stream
    assert sent(config, pp=3, order="1f1b").pipeline == 2 * stream
    # In a V of two ranks each has one neighbour, twice; the turn is within the last one.
    assert sent(config, pp=2, order="zbv").pipeline == 2 * stream


def test_chunks_of_an_interleaved_pipeline() -> None:
    """Two ranks with three stages each: five boundaries, all between the two."""
    config = SMALL.with_changes(num_hidden_layers=6)
    stream = 2 * 64 * config.hidden_size * 4
    found = sent(config, pp=2, order="interleaved", chunks=3)
    assert found.pipeline == 5 * stream
