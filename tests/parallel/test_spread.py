"""What is sent, and which rows a rank holds: seen on one process whose others are pretended.

Oracle: FSDP's own shards, and counts by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from rorqual.model import DeepseekV3, build, preset
from rorqual.parallel.groups import Groups
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.spread import Spread
from rorqual.train.loss import TrainingModel, coefficients, target_counts
from rorqual.train.ranks import local
from rorqual.train.step import InTurn

CONFIG = preset("tiny").with_changes(
    vocab_size=61, hidden_size=24, intermediate_size=20, moe_intermediate_size=12,
    num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2,
    first_k_dense_replace=1, n_group=4, topk_group=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, max_position_embeddings=64,
)  # fmt: skip
NUM_LAYERS = CONFIG.num_layers_with_mtp


@contextmanager
def pretended(rank: int, options: ParallelSettings) -> Iterator[Groups]:
    """This process as one of all; what it sends nobody gets."""
    dist.init_process_group("fake", rank=rank, world_size=options.world, store=FakeStore())
    try:
        yield Groups(options, torch.device("cpu"), options.world)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "plan",
    [{"dp_shard": 5}, {"ep": 4}, {"ep": 2, "dp_shard": 3}, {"ep": 2, "dp_replicate": 2}],
)
def test_rows_are_those_that_fsdp_holds(plan: dict[str, int]) -> None:
    whole = {name: value.detach() for name, value in build(CONFIG).named_parameters()}
    options = ParallelSettings(**plan)
    for rank in range(options.world):
        with pretended(rank, options) as groups:
            model = build(CONFIG)
            spread = Spread(model, [TrainingModel(model)], groups)
            for name, value in model.named_parameters():
                rows = spread.rows(name)
                assert rows.total == len(whole[name])
                assert torch.equal(local(value.detach()), whole[name][rows.start : rows.stop]), name


def run(model: DeepseekV3, spread: Spread, root: TrainingModel, num_micro_batches: int) -> None:
    depths = CONFIG.num_nextn_predict_layers
    tokens_BS = torch.randint(0, CONFIG.vocab_size, (2, 9 + depths))
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    by = coefficients(target_counts(mask_BS, depths), 2, 0.3, 1e-4)
    given = {"tokens_BS": tokens_BS, "mask_BS": mask_BS}
    InTurn(model, root, spread=spread)([given] * num_micro_batches, by)


@pytest.mark.parametrize(("zero", "gathers", "times"), [(1, 1, 1), (3, 2 * 3, 3)])
def test_weights_are_gathered_and_gradients_summed_as_zero_says(
    zero: int, gathers: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three micro-batches, by hand: once a step; or each time, weights forward and backward."""
    calls = {DefaultAllGather: 0, DefaultReduceScatter: 0}
    for cls in calls:
        monkeypatch.setattr(cls, "__call__", _counting(calls, cls, cls.__call__))
    options = ParallelSettings(dp_shard=2, zero=zero)
    with pretended(0, options) as groups:
        model = build(CONFIG).train()
        root = TrainingModel(model)
        run(model, Spread(model, [root], groups), root, 3)
    # Behind the layers' the root's, which is gathered once for both passes.
    assert calls[DefaultAllGather] == NUM_LAYERS * gathers + times
    assert calls[DefaultReduceScatter] == (NUM_LAYERS + 1) * times


def _counting(calls: dict[Any, int], cls: Any, original: Callable[..., Any]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[cls] += 1
        return original(*args, **kwargs)

    return counted
