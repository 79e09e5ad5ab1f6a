"""Cutting a model: what is cut where, against all possible cuts; what ranks hold, against the whole
model; and the stages one after the other, against the model itself.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from rorqual import weights
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, ModelConfig, build, preset
from rorqual.model.flops import forward_flops_per_token
from rorqual.model.transformer import materialise
from rorqual.parallel import make_orders
from rorqual.parallel.actions import stages_of
from rorqual.parallel.stages import (
    EMBEDDING,
    Placement,
    cut,
    rank_model,
    stage_model,
    unit_costs,
)
from rorqual.weights.model_reader import fill
from small import LITTLE, lively, random_tokens, variants

LENGTH = 16
EIGHT = LITTLE.with_changes(num_hidden_layers=8)
TRAINED = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
SHAPES = [EIGHT, LITTLE.with_changes(num_hidden_layers=5, num_nextn_predict_layers=0)]


def rank_part(config: ModelConfig, placement: Placement, rank: int) -> DeepseekV3:
    model = rank_model(config, placement.shares(config, LENGTH, rank))
    materialise(model, "cpu")
    return model


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_the_costs_are_those_of_the_whole_model(depths: int) -> None:
    config = preset("671b").with_changes(num_nextn_predict_layers=depths)
    whole = forward_flops_per_token(config, (LENGTH + 1) / 2, with_mtp=True)
    assert sum(unit_costs(config, LENGTH)) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
def test_no_other_cut_is_more_even(config: ModelConfig, num_stages: int) -> None:
    costs = unit_costs(config, LENGTH)
    found = [len(share.layers) for share in cut(config, num_stages, LENGTH)]
    found[-1] += 1
    every = []
    for inner in combinations(range(1, len(costs)), num_stages - 1):
        sums = [sum(costs[a:b]) for a, b in pairwise([0, *inner, len(costs)])]
        every.append((max(sums), sum(cost * cost for cost in sums)))
    ends = [sum(found[:i]) for i in range(num_stages + 1)]
    sums = [sum(costs[a:b]) for a, b in pairwise(ends)]
    least = min(every)
    assert max(sums) == pytest.approx(least[0], rel=1e-9)
    assert sum(cost * cost for cost in sums) == pytest.approx(least[1], rel=1e-9)


@pytest.mark.parametrize("num_stages", [1, 2, 5, 8, 9])
def test_each_layer_is_in_one_stage_in_order(num_stages: int) -> None:
    shares = cut(EIGHT, num_stages, LENGTH)
    assert [layer for share in shares for layer in share.layers] == list(range(8))
    assert [share.index for share in shares] == list(range(num_stages))
    assert all(share.layers for share in shares[:-1])


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"(?s)more stages than.*10 stages, 8 layers.*parallel.pp"):
        cut(EIGHT, 10, LENGTH)


@pytest.mark.parametrize("order", TRAINED)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_placement_is_that_of_the_orders(order: str, num_ranks: int) -> None:
    placement = Placement(order, num_ranks, 3 if order == "interleaved" else None)
    orders = make_orders(order, num_ranks, 4 * num_ranks, placement.num_chunks)
    assert [placement.stages(rank) for rank in range(num_ranks)] == [*map(stages_of, orders)]
    assert placement.num_stages - 1 in placement.stages(placement.last_rank)
    assert 0 in placement.stages(0)


def test_dualpipe_is_simulated_alone() -> None:
    with pytest.raises(UsageError, match=r"(?s)no training runs.*dualpipev holds the model once"):
        Placement("dualpipe", 4)
    with pytest.raises(UsageError, match="only interleaved"):
        Placement("zbv", 4, 2)


@pytest.mark.parametrize("order", TRAINED)
@pytest.mark.parametrize("config", [EIGHT, *variants(EIGHT).values()])
def test_ranks_hold_the_model_once_and_its_first_values(order: str, config: ModelConfig) -> None:
    """Oracle: the serial model of the seed; twice there is the embedding alone."""
    whole, placement = build(config, seed=5), Placement(order, 2)
    seen: list[str] = []
    for rank in range(2):
        held = rank_part(config, placement, rank)
        held.reset_parameters(torch.Generator().manual_seed(5))
        for name, value in held.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name
        seen += dict(held.named_parameters())
    twice = [EMBEDDING] if placement.has_copy(config) else []
    assert sorted(seen) == sorted([*dict(whole.named_parameters()), *twice])


@pytest.mark.parametrize("config", [EIGHT, EIGHT.with_changes(tie_word_embeddings=True)])
def test_ranks_read_their_part_of_a_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    whole = lively(config)
    weights.save(whole, tmp_path, "float32")
    for rank in range(2):
        held = rank_part(config, Placement("1f1b", 2), rank)
        fill(held, tmp_path)
        for name, value in held.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize("num_stages", [2, 4, 9])
def test_stages_in_turn_are_the_model(num_stages: int) -> None:
    whole = lively(EIGHT)
    tokens_BT = random_tokens(EIGHT, 2, LENGTH)
    step = whole.model.step(tokens_BT)
    x = tokens_BT
    for share in cut(EIGHT, num_stages, LENGTH):
        stage = stage_model(whole, share)
        x = stage.hidden(x, step)
        assert (stage.lm_head is None) == (not share.is_last)
        assert stage.sparse_rows() == [
            row for row, i in enumerate(EIGHT.sparse_layer_ids) if str(i) in stage.model.layers
        ]
    assert torch.equal(x, whole.hidden(tokens_BT))
    assert whole.is_whole
    assert len(whole.model.layers) == 9
